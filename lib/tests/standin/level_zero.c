/* A stand-in for libze_loader.so.1. Its answers follow ze_api.h and the reported behaviour of drivers: each call
   returns a new descriptor of the whole allocation. For memory that was not allocated for export, the descriptor
   refers to something else. */
#include "standin.h"

enum { SUCCESS = 0, UNINITIALIZED = 0x78000001, UNSUPPORTED_FEATURE = 0x78000003, INVALID_ARGUMENT = 0x78000004,
       INVALID_NULL_HANDLE = 0x78000005, OUT_OF_DEVICE_MEMORY = 0x70000003 };
/* The kinds of standin_allocate. */
enum { NAMED, NOT_NAMED, HOST_MEMORY, SHARED };

static struct setting settings[] = {
    {"init", 0, 0},             /* the result of zeInit */
    {"export_types", 3, 3},     /* the export types of the second driver's device */
    {"import_types", 3, 3},     /* the import types of the second driver's device */
    {"import", 0, 0},           /* the result of an import */
    {"closes", 0, 0},           /* an import closes the descriptor */
    {"disorder", 0, 0},         /* number of releases in the wrong order */
    {"export", 0, 0},           /* the result of an export */
    {"none", 0, 0},             /* an export succeeds without a descriptor */
    {"copy", 0, 0},             /* the result of copies */
    {"next_fd", -1, -1},        /* the descriptor of the next exports; -1 for the stand-in's memory */
    {"short", 0, 0},
    {"exports", 0, 0},
    {"copies", 0, 0},
    {"contexts", 0, 0},         /* made and not destroyed */
    {"lists", 0, 0},
    {"host_memory", 0, 0},
    {"live", 0, 0},             /* device memory allocated and not freed */
    {"initialised", 0, 0},
    {NULL, 0, 0},
};

struct head { uint32_t type; void *next; };
struct flags { struct head head; uint32_t flags; };
struct export_fd { struct head head; uint32_t flags; int fd; };
struct properties { struct head head; uint32_t type; uint64_t id, page_size; };
struct external { struct head head; uint32_t memory_import, memory_export, image_import, image_export; };
struct device_memory { struct head head; uint32_t flags, ordinal; };
struct queue { struct head head; uint32_t ordinal, index, flags, mode, priority; };
struct pci { struct head head; uint32_t domain, bus, device, function; int32_t generation, width; int64_t bandwidth; };

/* Two drivers with a device each. */
static char drivers[2], devices[2], contexts[2], list;

EXPORT int zeInit(uint32_t flags) {
    if (flags) return INVALID_ARGUMENT;
    if (!VALUE("init")) standin_set("initialised", 1);
    return VALUE("init");
}

EXPORT int zeDriverGet(uint32_t *count, void **handles) {
    if (!VALUE("initialised")) return UNINITIALIZED;
    for (uint32_t n = 0; handles && n < *count && n < 2; n++) handles[n] = &drivers[n];
    *count = 2;
    return SUCCESS;
}

EXPORT int zeDeviceGet(void *driver, uint32_t *count, void **handles) {
    if (!driver) return INVALID_NULL_HANDLE;
    if (handles && *count) handles[0] = &devices[(char *)driver - drivers];
    *count = 1;
    return SUCCESS;
}

EXPORT int zeDeviceGetExternalMemoryProperties(void *device, struct external *external) {
    if (!device || external->head.type != 0xc) return INVALID_ARGUMENT;
    external->memory_import = device == &devices[1] ? VALUE("import_types") : 0;
    external->memory_export = device == &devices[1] ? VALUE("export_types") : 0;
    return SUCCESS;
}

EXPORT int zeDevicePciGetPropertiesExt(void *device, struct pci *pci) {
    if (!device || pci->head.type != 0x10008) return INVALID_ARGUMENT;
    pci->domain = 0;
    pci->bus = 0x20 + ((char *)device - devices);
    pci->device = pci->function = 0;
    return SUCCESS;
}

EXPORT int zeContextCreate(void *driver, const struct flags *description, void **context) {
    if (!driver || description->head.type != 0xd) return INVALID_ARGUMENT;
    COUNT("contexts");
    *context = &contexts[(char *)driver - drivers];
    return SUCCESS;
}

EXPORT int zeContextDestroy(void *context) {
    LESS("contexts");
    return context ? SUCCESS : INVALID_NULL_HANDLE;
}

/* Each context knows the memory of all contexts of its driver. */
EXPORT int zeMemGetAllocProperties(void *context, const void *pointer, struct properties *properties, void **device) {
    if (!context || properties->head.type != 0x17) return INVALID_ARGUMENT;
    struct block *it = block_at((uint64_t)pointer);
    properties->type = 0;
    if (!it || context != &contexts[it->device]) return SUCCESS;
    properties->type = it->kind == HOST_MEMORY ? 1 : it->kind == SHARED ? 3 : 2;
    if (device) *device = it->kind == HOST_MEMORY ? NULL : &devices[it->device];
    struct export_fd *export = properties->head.next;
    if (!export) return SUCCESS;
    COUNT("exports");
    if (export->head.type != 0x1a || export->flags != 2) return INVALID_ARGUMENT;
    if (VALUE("export")) return VALUE("export");
    if (VALUE("none")) return SUCCESS;
    uint64_t size = it->kind == NOT_NAMED ? (uint64_t)sysconf(_SC_PAGESIZE) : it->whole;
    export->fd = hand_out(it->base, size, "standin-level-zero", 0);
    return SUCCESS;
}

EXPORT int zeMemGetAddressRange(void *context, const void *pointer, void **base, size_t *size) {
    struct block *it = block_at((uint64_t)pointer);
    if (!context || !it) return INVALID_ARGUMENT;
    *base = (void *)it->at;
    *size = it->size;
    return SUCCESS;
}

EXPORT int zeMemAllocHost(void *context, const struct flags *description, size_t size, size_t alignment, void **at) {
    if (!context || description->head.type != 0x16 || alignment) return INVALID_ARGUMENT;
    COUNT("host_memory");
    *at = (void *)standin_allocate(size, 1, HOST_MEMORY, (char *)context - contexts);
    return *at ? SUCCESS : OUT_OF_DEVICE_MEMORY;
}

/* The memory can be exported if the description names the type. */
EXPORT int zeMemAllocDevice(void *context, const struct device_memory *description, size_t size, size_t alignment,
                            void *device, void **at) {
    if (!context || !device || description->head.type != 0x15 || alignment) return INVALID_ARGUMENT;
    if (size > 1ul << 40) return OUT_OF_DEVICE_MEMORY;
    const struct export_fd *import = description->head.next;
    if (import && import->head.type == 0x19) {
        struct block *it = NULL;
        if (import->flags != 2 || !size) return INVALID_ARGUMENT;
        if (!VALUE("import")) it = foreign(NULL, import->fd, size, (char *)device - devices);
        if (VALUE("closes")) close(import->fd);
        if (!it) return VALUE("import") ? VALUE("import") : INVALID_ARGUMENT;
        COUNT("live");
        *at = (void *)it->at;
        return SUCCESS;
    }
    const struct flags *export = description->head.next;
    int named = export && export->head.type == 0x18 && export->flags & 2;
    COUNT("live");
    *at = (void *)standin_allocate(size, 1, named ? NAMED : NOT_NAMED, (char *)device - devices);
    return *at ? SUCCESS : OUT_OF_DEVICE_MEMORY;
}

EXPORT int zeMemFree(void *context, void *at) {
    struct block *it = block_at((uint64_t)at);
    if (!context || !it) return INVALID_ARGUMENT;
    if (it->kind == HOST_MEMORY) LESS("host_memory");
    else LESS("live");
    if (VALUE("contexts") < 1) COUNT("disorder");
    if (it->kind == FOREIGN) {
        unmade(it);
        return SUCCESS;
    }
    return standin_free((uint64_t)at) ? SUCCESS : INVALID_ARGUMENT;
}

EXPORT int zeCommandListCreateImmediate(void *context, void *device, const struct queue *queue, void **made) {
    if (!context || !device || queue->head.type != 0xe || queue->mode != 1) return INVALID_ARGUMENT;
    COUNT("lists");
    *made = &list;
    return SUCCESS;
}

EXPORT int zeCommandListDestroy(void *made) {
    LESS("lists");
    return made ? SUCCESS : INVALID_NULL_HANDLE;
}

/* The devices do not reach memory that the runtime did not allocate. */
EXPORT int zeCommandListAppendMemoryCopy(void *made, void *to, const void *from, size_t size, void *signal,
                                         uint32_t waits, void **events) {
    if (made != &list || signal || waits || events) return INVALID_ARGUMENT;
    if (VALUE("copy")) return VALUE("copy");
    if (!is_mapped((uint64_t)to, size) || !is_mapped((uint64_t)from, size)) return INVALID_ARGUMENT;
    COUNT("copies");
    memcpy(to, from, size);
    return SUCCESS;
}
