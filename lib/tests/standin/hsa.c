/* A stand-in for libhsa-runtime64.so.1. Its answers follow hsa_ext_amd.h and the reported behaviour of ROCm: the
   descriptor is that of the memory around the allocation, the offset counts from the start of that memory, and the
   descriptor is not close-on-exec. */
#include "standin.h"

enum { SUCCESS = 0, INVALID_ARGUMENT = 0x1001, OUT_OF_RESOURCES = 0x1008, NOT_INITIALIZED = 0x100b };
/* The kinds of standin_allocate. */
enum { PLAIN, LOCKED };

static struct setting settings[] = {
    {"export_pcie", 0, 0},      /* the results of an export by PCIe, with the driver's choice, and by the older call */
    {"export_driver", 0, 0},
    {"export_old", 0, 0},
    {"copy", 0, 0},             /* the result of copies */
    {"interop", 0, 0},          /* the result of an import */
    {"interop_short", 0, 0},    /* how many bytes fewer an import maps */
    {"lock", 0, 0},             /* the result of a lock */
    {"imports", 0, 0},          /* number of calls */
    {"mapped", 0, 0},           /* number of imports that were not unmapped */
    {"locked", 0, 0},           /* number of locks that were not unlocked */
    {"disorder", 0, 0},         /* number of releases in the wrong order */
    {"fragment", 0, 0},         /* number of bytes of the memory before the reported allocation */
    {"offset", -1, -1},         /* the reported offset, instead of the right one */
    {"next_fd", -1, -1},        /* the descriptor of the next exports; -1 for the stand-in's memory */
    {"short", 0, 0},            /* the dma-buf lacks a page */
    {"init", 0, 0},             /* the result of hsa_init */
    {"initialised", 1, 1},      /* number of references: the program has one */
    {NULL, 0, 0},
};

#define NEEDS_INIT if (VALUE("initialised") < 1) return NOT_INITIALIZED

struct pointer_info {
    uint32_t size, type;
    void *agent_base, *host_base;
    size_t length;
    void *user_data;
    uint64_t owner;
    uint32_t global_flags;
};

EXPORT int hsa_init(void) {
    if (!VALUE("init")) COUNT("initialised");
    return VALUE("init");
}

EXPORT int hsa_shut_down(void) {
    NEEDS_INIT;
    __atomic_sub_fetch(&setting("initialised")->value, 1, __ATOMIC_RELAXED);
    return SUCCESS;
}

EXPORT int hsa_status_string(int status, const char **text) {
    switch (status) {
    case INVALID_ARGUMENT: *text = "HSA_STATUS_ERROR_INVALID_ARGUMENT: One of the arguments is not right."; break;
    case OUT_OF_RESOURCES: *text = "HSA_STATUS_ERROR_OUT_OF_RESOURCES: The runtime has none left."; break;
    case NOT_INITIALIZED: *text = "HSA_STATUS_ERROR_NOT_INITIALIZED: Not initialised."; break;
    default: return INVALID_ARGUMENT;
    }
    return SUCCESS;
}

/* One CPU and two GPUs. */
EXPORT int hsa_iterate_agents(int (*each)(uint64_t, void *), void *data) {
    NEEDS_INIT;
    for (uint64_t agent = 1; agent <= 3; agent++) {
        int answer = each(agent, data);
        if (answer) return answer;
    }
    return SUCCESS;
}

EXPORT int hsa_agent_get_info(uint64_t agent, int attribute, void *value) {
    NEEDS_INIT;
    if (agent < 1 || agent > 3) return INVALID_ARGUMENT;
    switch (attribute) {
    case 17: *(uint32_t *)value = agent != 1; return SUCCESS;
    case 0xa006: *(uint32_t *)value = agent << 8; return SUCCESS;
    case 0xa00f: *(uint32_t *)value = 0; return SUCCESS;
    }
    return INVALID_ARGUMENT;
}

EXPORT int hsa_amd_pointer_info(const void *pointer, struct pointer_info *info, void *(*allocate)(size_t),
                                uint32_t *count, uint64_t **accessible) {
    NEEDS_INIT;
    if (info->size < sizeof *info || allocate || count || accessible) return INVALID_ARGUMENT;
    info->size = sizeof *info;
    struct block *it = block_at((uint64_t)pointer);
    info->type = it ? it->kind == LOCKED ? 2 : 1 : 0;
    if (!it) return SUCCESS;
    long fragment = VALUE("fragment");
    info->agent_base = info->host_base = (void *)(it->at + fragment);
    info->length = it->size - fragment;
    info->owner = 2 + it->device;
    return SUCCESS;
}

EXPORT int hsa_memory_copy(void *to, const void *from, size_t length) {
    NEEDS_INIT;
    if (VALUE("copy")) return VALUE("copy");
    if (!is_mapped((uint64_t)to, length) && !is_mapped((uint64_t)from, length)) return INVALID_ARGUMENT;
    memcpy(to, from, length);
    return SUCCESS;
}

/* The kernel has a reference of its own: the descriptor stays the caller's. */
EXPORT int hsa_amd_interop_map_buffer(uint32_t count, uint64_t *agents, int fd, uint32_t flags, size_t *size,
                                      void **at, size_t *metadata_size, const void **metadata) {
    NEEDS_INIT;
    COUNT("imports");
    if (count != 1 || agents[0] < 2 || agents[0] > 3 || flags || metadata_size || metadata) return INVALID_ARGUMENT;
    if (VALUE("interop")) return VALUE("interop");
    off_t length = lseek(fd, 0, SEEK_END);
    struct block *it = length > 0 ? foreign(NULL, fd, length, agents[0] - 2) : NULL;
    if (!it) return INVALID_ARGUMENT;
    COUNT("mapped");
    *size = length - VALUE("interop_short");
    *at = (void *)it->at;
    return SUCCESS;
}

EXPORT int hsa_amd_interop_unmap_buffer(void *at) {
    NEEDS_INIT;
    struct block *it = block_at((uint64_t)at);
    if (!it || it->kind != FOREIGN || it->at != (uint64_t)at) return INVALID_ARGUMENT;
    unmade(it);
    LESS("mapped");
    return SUCCESS;
}

EXPORT int hsa_amd_memory_lock(void *host, size_t size, uint64_t *agents, int count, void **at) {
    NEEDS_INIT;
    if (count != 1 || agents[0] < 2 || agents[0] > 3 || (uint64_t)host % 4096 || !size) return INVALID_ARGUMENT;
    if (VALUE("lock")) return VALUE("lock");
    struct block *it = foreign(host, -1, size, agents[0] - 2);
    COUNT("locked");
    *at = (void *)it->at;
    return SUCCESS;
}

EXPORT int hsa_amd_memory_unlock(void *host) {
    NEEDS_INIT;
    struct block *it = foreign_of((uint64_t)host);
    if (!it || !unmade(it)) COUNT("disorder");
    LESS("locked");
    return SUCCESS;
}

#ifndef OLD_ROCM
static int export(const void *pointer, size_t size, int *fd, uint64_t *offset, const char *name) {
    NEEDS_INIT;
    struct block *it = block_at((uint64_t)pointer);
    if (!it || it->kind == LOCKED || !size) return INVALID_ARGUMENT;
    *fd = hand_out(it->base, it->whole, name, 0);
    *offset = VALUE("offset") >= 0 ? (uint64_t)VALUE("offset") : (uint64_t)pointer - it->base;
    return *fd < 0 ? OUT_OF_RESOURCES : SUCCESS;
}

EXPORT int hsa_amd_portable_export_dmabuf(const void *pointer, size_t size, int *fd, uint64_t *offset) {
    if (VALUE("export_old")) return VALUE("export_old");
    return export(pointer, size, fd, offset, "standin-old");
}
#ifndef BEFORE_7_1
EXPORT int hsa_amd_portable_export_dmabuf_v2(const void *pointer, size_t size, int *fd, uint64_t *offset,
                                             uint64_t flags) {
    if (flags > 1) return INVALID_ARGUMENT;
    int answer = flags ? VALUE("export_pcie") : VALUE("export_driver");
    return answer ? answer : export(pointer, size, fd, offset, flags ? "standin-pcie" : "standin-driver");
}
#endif
#endif
