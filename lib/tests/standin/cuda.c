/* A stand-in for libcuda.so.1. Its answers follow cuda.h and the reported behaviour of drivers. */
#include "standin.h"

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, ALREADY_REGISTERED = 712, NOT_PERMITTED = 800, NOT_SUPPORTED = 801 };
/* The kinds of standin_allocate. Memory of the virtual memory management belongs to no context. */
enum { PLAIN, VMM, VMM_WITHOUT_RDMA, HOST, MANAGED };

static struct setting settings[] = {
    {"init", 0, 0},                 /* the result of cuInit */
    {"dmabuf_supported_0", 1, 1},   /* DMA_BUF_SUPPORTED of each GPU */
    {"dmabuf_supported_1", 0, 0},
    {"export_pcie", 0, 0},          /* the results of an export by PCIe, and with the driver's choice */
    {"export_driver", 0, 0},
    {"sync_memops", 0, 0},          /* the result of setting SYNC_MEMOPS on plain memory */
    {"context_flags", 0, 0},        /* the flags that are set */
    {"set_flags", 0, 0},            /* the result of cuCtxSetFlags */
    {"copy", 0, 0},                 /* the result of copies */
    {"import", 0, 0},               /* the result of an import */
    {"import_map", 0, 0},           /* the result of mapping an import */
    {"takes", 0, 0},                /* an imported descriptor: 0 left open, 1 closed with the import, 2 closed at once */
    {"closes_refused", 0, 0},       /* a refused import closes the descriptor */
    {"register", 0, 0},             /* the result of a registration */
    {"register_io", 0, 0},          /* the result of a registration with IOMEMORY */
    {"imports", 0, 0},              /* number of calls */
    {"registrations", 0, 0},
    {"externals", 0, 0},            /* number of imports that were not destroyed */
    {"mapped", 0, 0},
    {"registered", 0, 0},
    {"disorder", 0, 0},             /* number of releases in the wrong order */
    {"flush", 0, 0},                /* the result of a flush */
    {"next_fd", -1, -1},            /* the descriptor of the next exports; -1 for the stand-in's memory */
    {"short", 0, 0},                /* the dma-buf lacks a page */
    {"exports", 0, 0},              /* number of calls */
    {"flushes", 0, 0},
    {"flag_settings", 0, 0},
    {"late_copies", 0, 0},          /* copies that were incomplete when the call returned */
    {"pushed", 0, 0},               /* contexts pushed and not popped */
    {"retained", 0, 0},             /* primary contexts retained and not released */
    {"synchronous", 0, 0},          /* SYNC_MEMOPS is set */
    {"odd", 0, 0},                  /* allocations begin within a page */
    {"live", 0, 0},                 /* allocations by cuMemAlloc that were not freed */
    {"initialised", 0, 0},
    {NULL, 0, 0},
};

static _Thread_local void *stack[8];
static _Thread_local int depth;
static char contexts[2][2]; /* for each GPU: the primary context, and the program's */

#define NEEDS_CONTEXT if (!depth) return INVALID_CONTEXT
#define NEEDS_INIT if (!VALUE("initialised")) return NOT_INITIALIZED

EXPORT int cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    if (!VALUE("init")) standin_set("initialised", 1);
    return VALUE("init");
}

EXPORT int cuGetErrorName(int error, const char **name) {
    switch (error) {
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return SUCCESS;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
    case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; return SUCCESS;
    case NOT_PERMITTED: *name = "CUDA_ERROR_NOT_PERMITTED"; return SUCCESS;
    case NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; return SUCCESS;
    }
    *name = NULL;
    return INVALID_VALUE;
}

EXPORT int cuDeviceGetCount(int *count) {
    NEEDS_INIT;
    *count = 2;
    return SUCCESS;
}

/* A device handle differs from the device's ordinal. */
EXPORT int cuDeviceGet(int *device, int ordinal) {
    NEEDS_INIT;
    *device = ordinal + 100;
    return ordinal == 0 || ordinal == 1 ? SUCCESS : INVALID_DEVICE;
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute != 124) return INVALID_VALUE;
    *value = device == 100 ? VALUE("dmabuf_supported_0") : VALUE("dmabuf_supported_1");
    return SUCCESS;
}

EXPORT int cuDeviceGetPCIBusId(char *text, int room, int device) {
    snprintf(text, room, "0000:%s:00.0", device == 100 ? "4A" : "4B");
    return SUCCESS;
}

EXPORT int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
    NEEDS_INIT;
    struct block *it = block_at(pointer);
    if (!it) return INVALID_VALUE;
    switch (attribute) {
    case 1:
        *(void **)data = &contexts[it->device][1];
        return it->kind == VMM || it->kind == VMM_WITHOUT_RDMA ? INVALID_VALUE : SUCCESS;
    case 2: *(unsigned *)data = it->kind == HOST ? 1 : 2; return SUCCESS;
    case 8: *(unsigned char *)data = it->kind == MANAGED; return SUCCESS;
    case 9: *(int *)data = it->device; return SUCCESS;
    }
    return INVALID_VALUE;
}

EXPORT int cuPointerSetAttribute(const void *value, int attribute, uint64_t pointer) {
    NEEDS_CONTEXT;
    struct block *it = block_at(pointer);
    if (!it || attribute != 6 || *(const unsigned *)value != 1) return INVALID_VALUE;
    if (it->kind != PLAIN) return INVALID_VALUE;
    if (!VALUE("sync_memops")) standin_set("synchronous", 1);
    return VALUE("sync_memops");
}

/* For virtual memory, the result is the segment. */
EXPORT int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t pointer) {
    NEEDS_CONTEXT;
    struct block *it = block_at(pointer);
    if (!it) return INVALID_VALUE;
    *base = it->at;
    *size = it->size;
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
    COUNT("retained");
    *context = &contexts[device - 100][0];
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    standin_set("retained", VALUE("retained") - 1);
    return device == 100 || device == 101 ? SUCCESS : INVALID_DEVICE;
}

EXPORT int cuCtxPushCurrent_v2(void *context) {
    if (depth == 8 || (char *)context < contexts[0] || (char *)context > &contexts[1][1]) return INVALID_CONTEXT;
    COUNT("pushed");
    stack[depth++] = context;
    return SUCCESS;
}

EXPORT int cuCtxPopCurrent_v2(void **context) {
    NEEDS_CONTEXT;
    __atomic_sub_fetch(&setting("pushed")->value, 1, __ATOMIC_RELAXED);
    *context = stack[--depth];
    return SUCCESS;
}

EXPORT int cuCtxGetFlags(unsigned *flags) {
    NEEDS_CONTEXT;
    *flags = VALUE("context_flags");
    return SUCCESS;
}

/* A copy from pageable memory completes when the program waits for the stream, unless copies are synchronous. */
static struct { uint64_t to; void *bytes; size_t length; } late;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void arrive(void) {
    if (late.bytes) memcpy((void *)late.to, late.bytes, late.length);
    free(late.bytes);
    late.bytes = NULL;
}

static void copy_late(uint64_t to, const void *from, size_t length) {
    pthread_mutex_lock(&lock);
    arrive();
    late.bytes = malloc(length);
    memcpy(late.bytes, from, length);
    late.to = to;
    late.length = length;
    if (VALUE("synchronous") || VALUE("context_flags") & 0x80) arrive();
    else COUNT("late_copies");
    pthread_mutex_unlock(&lock);
}

EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t length) {
    NEEDS_CONTEXT;
    if (VALUE("copy")) return VALUE("copy");
    if (!is_mapped(to, length)) return INVALID_VALUE;
    copy_late(to, from, length);
    return SUCCESS;
}

EXPORT int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t length) {
    NEEDS_CONTEXT;
    if (VALUE("copy")) return VALUE("copy");
    if (!is_mapped(to, length) || !is_mapped(from, length)) return INVALID_VALUE;
    copy_late(to, (void *)from, length);
    return SUCCESS;
}

EXPORT int cuMemcpyDtoH_v2(void *into, uint64_t from, size_t length) {
    NEEDS_CONTEXT;
    if (VALUE("copy")) return VALUE("copy");
    if (!is_mapped(from, length)) return INVALID_VALUE;
    memcpy(into, (void *)from, length);
    return SUCCESS;
}

EXPORT int cuStreamSynchronize(void *stream) {
    NEEDS_CONTEXT;
    pthread_mutex_lock(&lock);
    arrive();
    pthread_mutex_unlock(&lock);
    return stream ? INVALID_VALUE : SUCCESS;
}

EXPORT int cuMemAlloc_v2(uint64_t *pointer, size_t length) {
    NEEDS_CONTEXT;
    if (!length) return INVALID_VALUE;
    if (length > 1ul << 40) return OUT_OF_MEMORY;
    long odd = VALUE("odd") ? 256 : 0;
    uint64_t at = standin_allocate(length + odd, 1, PLAIN, (char *)stack[depth - 1] >= contexts[1]);
    if (!at) return OUT_OF_MEMORY;
    COUNT("live");
    *pointer = at + odd;
    return SUCCESS;
}

static struct external { struct block *it; int fd; } externals[16];

EXPORT int cuMemFree_v2(uint64_t pointer) {
    NEEDS_CONTEXT;
    for (struct external *one = externals; one < externals + 16; one++)
        if (one->it && one->it->at == pointer) {
            LESS("mapped");
            return SUCCESS;
        }
    standin_set("live", VALUE("live") - 1);
    return standin_free(pointer - (VALUE("odd") ? 256 : 0)) ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuMemHostRegister_v2(void *host, size_t size, unsigned flags) {
    NEEDS_CONTEXT;
    COUNT("registrations");
    if ((flags & ~4u) != 3 || (uint64_t)host % 4096 || !size) return INVALID_VALUE;
    int answer = flags & 4 ? VALUE("register_io") : VALUE("register");
    if (answer) return answer;
    if (foreign_of((uint64_t)host)) return ALREADY_REGISTERED;
    if (!foreign(host, -1, size, (char *)stack[depth - 1] >= contexts[1])) return OUT_OF_MEMORY;
    COUNT("registered");
    return SUCCESS;
}

EXPORT int cuMemHostGetDevicePointer_v2(uint64_t *pointer, void *host, unsigned flags) {
    NEEDS_CONTEXT;
    struct block *it = foreign_of((uint64_t)host);
    if (!it || flags) return INVALID_VALUE;
    *pointer = it->at;
    return SUCCESS;
}

EXPORT int cuMemHostUnregister(void *host) {
    NEEDS_CONTEXT;
    struct block *it = foreign_of((uint64_t)host);
    if (!it || !unmade(it)) COUNT("disorder");
    LESS("registered");
    return SUCCESS;
}

#ifndef OLD_DRIVER
struct description { int type; union { int fd; void *pointers[2]; } handle; uint64_t size; unsigned flags, reserved[16]; };
struct part { uint64_t offset, size; unsigned flags, reserved[16]; };

EXPORT int cuImportExternalMemory(void **made, const struct description *description) {
    NEEDS_CONTEXT;
    COUNT("imports");
    if (description->type != 9 || description->flags || !description->size) return INVALID_VALUE;
    int fd = description->handle.fd;
    if (VALUE("import") && VALUE("closes_refused")) close(fd);
    if (VALUE("import")) return VALUE("import");
    for (struct external *one = externals; one < externals + 16; one++) {
        if (one->it) continue;
        one->it = foreign(NULL, fd, description->size, (char *)stack[depth - 1] >= contexts[1]);
        if (!one->it) return INVALID_VALUE;
        one->fd = VALUE("takes") == 1 ? fd : -1;
        if (VALUE("takes") == 2) close(fd);
        COUNT("externals");
        *made = one;
        return SUCCESS;
    }
    return OUT_OF_MEMORY;
}

EXPORT int cuExternalMemoryGetMappedBuffer(uint64_t *pointer, void *made, const struct part *part) {
    NEEDS_CONTEXT;
    struct external *one = made;
    if (!one->it || part->offset || part->size > one->it->size || part->flags) return INVALID_VALUE;
    if (VALUE("import_map")) return VALUE("import_map");
    COUNT("mapped");
    *pointer = one->it->at;
    return SUCCESS;
}

EXPORT int cuDestroyExternalMemory(void *made) {
    NEEDS_CONTEXT;
    struct external *one = made;
    if (VALUE("mapped") >= VALUE("externals")) COUNT("disorder");
    unmade(one->it);
    one->it = NULL;
    if (one->fd >= 0) close(one->fd);
    LESS("externals");
    return SUCCESS;
}

EXPORT int cuFlushGPUDirectRDMAWrites(int target, int scope) {
    NEEDS_CONTEXT;
    if (target != 0 || scope != 100) return INVALID_VALUE;
    COUNT("flushes");
    return VALUE("flush");
}

EXPORT int cuCtxSetFlags(unsigned flags) {
    NEEDS_CONTEXT;
    COUNT("flag_settings");
    if (!VALUE("set_flags")) standin_set("context_flags", flags);
    return VALUE("set_flags");
}

EXPORT int cuMemGetHandleForAddressRange(void *handle, uint64_t at, size_t length, int type,
                                         unsigned long long flags) {
    NEEDS_CONTEXT;
    COUNT("exports");
    uint64_t page = sysconf(_SC_PAGESIZE);
    if (type != 1 || flags > 1 || !length || at % page || length % page) return INVALID_VALUE;
    struct block *first = mapped_at(at);
    for (uint64_t to = at; to < at + length;) {
        struct block *it = mapped_at(to);
        if (!it || it->device != first->device) return INVALID_VALUE;
        if (it->kind != PLAIN && it->kind != VMM) return NOT_SUPPORTED;
        to = it->at + room(it);
    }
    if (!(first->device ? VALUE("dmabuf_supported_1") : VALUE("dmabuf_supported_0"))) return NOT_SUPPORTED;
    int answer = flags ? VALUE("export_pcie") : VALUE("export_driver");
    if (answer) return answer;
    int fd = hand_out(at, length, flags ? "standin-pcie" : "standin-driver", UDMABUF_FLAGS_CLOEXEC);
    if (fd < 0) return 304;
    *(int *)handle = fd;
    return SUCCESS;
}
#endif
