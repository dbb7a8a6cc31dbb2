/* The code that the stand-ins share. A stand-in is a library with the name of a GPU runtime's library. A stand-in
   has no GPU: its "device memory" is a mapped memfd, so a device address is also an address of this process. An
   export is a udmabuf over the memfd. On a machine without /dev/udmabuf, an export is a memfd with a copy of the
   bytes, which is not a dma-buf.

   Tests set how it answers (standin_set), and ask what was called (standin_get). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/dma-buf.h>
#include <linux/udmabuf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define GRANULE 65536ul

struct setting { const char *name; long initial; long value; };

/* The settings of the stand-in, defined in its own file. */
static struct setting settings[];

static struct setting *setting(const char *name) {
    for (struct setting *it = settings; it->name; it++)
        if (!strcmp(it->name, name)) return it;
    fprintf(stderr, "the stand-in has no setting %s\n", name);
    abort();
}
#define VALUE(name) (setting(name)->value)
#define COUNT(name) __atomic_add_fetch(&setting(name)->value, 1, __ATOMIC_RELAXED)
#define LESS(name) __atomic_sub_fetch(&setting(name)->value, 1, __ATOMIC_RELAXED)

EXPORT void standin_set(const char *name, long value) { setting(name)->value = value; }
EXPORT long standin_get(const char *name) { return setting(name)->value; }

/* A segment of device memory. */
struct block { uint64_t at, size, base, whole; int memfd, kind, device; off_t offset; };
static struct block blocks[64];
/* The kind of memory that somebody else made. */
enum { FOREIGN = 99 };

static uint64_t up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }
static uint64_t room(const struct block *it) { return up(it->size, it->kind == FOREIGN ? 4096 : GRANULE); }

/* The block that the runtime knows at an address, and the mapped block around it: whole pages. */
static struct block *block_at(uint64_t address) {
    for (struct block *it = blocks; it < blocks + 64; it++)
        if (it->size && address >= it->at && address - it->at < it->size) return it;
    return NULL;
}
static struct block *mapped_at(uint64_t address) {
    for (struct block *it = blocks; it < blocks + 64; it++)
        if (it->size && address >= it->at && address - it->at < room(it)) return it;
    return NULL;
}
static __attribute__((unused)) int is_mapped(uint64_t at, size_t length) {
    for (uint64_t end = at + length; at < end;) {
        struct block *it = mapped_at(at);
        if (!it) return 0;
        at = it->at + room(it);
    }
    return 1;
}

EXPORT void standin_reset(void) {
    for (struct setting *it = settings; it->name; it++) it->value = it->initial;
}

/* Allocates contiguous memory of `segments` segments of `size` bytes each. */
EXPORT uint64_t standin_allocate(uint64_t size, int segments, int kind, int device) {
    uint64_t each = segments > 1 ? up(size, GRANULE) : size, whole = up(each * segments, GRANULE);
    int memfd = memfd_create("standin-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (memfd < 0 || ftruncate(memfd, whole) || fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK)) return 0;
    void *mapped = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (mapped == MAP_FAILED) return 0;
    for (int n = 0; n < segments; n++)
        for (struct block *it = blocks; it < blocks + 64; it++)
            if (!it->size) {
                *it = (struct block){(uint64_t)mapped + n * each, each, (uint64_t)mapped, whole,
                                     memfd, kind, device, n * each};
                break;
            }
    return (uint64_t)mapped;
}

/* Removes one segment, as an unmap of virtual memory does. Its bytes stay. */
EXPORT void standin_unmap(uint64_t address) {
    struct block *it = block_at(address);
    if (it) it->size = 0;
}

/* Assigns one segment to another GPU. */
EXPORT void standin_move(uint64_t address, int device) {
    struct block *it = block_at(address);
    if (it) it->device = device;
}

/* Frees the memory. Returns 0 if there is none. */
EXPORT int standin_free(uint64_t base) {
    uint64_t whole = 0;
    int memfd = -1;
    for (struct block *it = blocks; it < blocks + 64; it++)
        if (it->size && it->base == base) {
            whole = it->whole;
            memfd = it->memfd;
            it->size = 0;
        }
    if (!whole) return 0;
    munmap((void *)base, whole);
    close(memfd);
    return 1;
}

/* Memory of somebody else's, at another address than the one that the processor has: `host` is mapped once more, or
   `fd` is. A BAR cannot be mapped once more, and keeps its address. */
static __attribute__((unused)) struct block *foreign(void *host, int fd, uint64_t size, int device) {
    uint64_t whole = up(size, 4096);
    void *at = host ? mremap(host, 0, whole, MREMAP_MAYMOVE)
                    : mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int own = at != MAP_FAILED;
    if (!own) at = host;
    for (struct block *it = blocks; at && it < blocks + 64; it++)
        if (!it->size) {
            *it = (struct block){(uint64_t)at, size, (uint64_t)host, own ? whole : 0, -1, FOREIGN, device, 0};
            return it;
        }
    return NULL;
}

/* Takes it away. Returns 0 where the host has unmapped it before. */
static __attribute__((unused)) int unmade(struct block *it) {
    int there = !it->base || !msync((void *)it->base, 4096, MS_ASYNC);
    if (it->whole) munmap((void *)it->at, it->whole);
    it->size = 0;
    return there;
}

static __attribute__((unused)) struct block *foreign_of(uint64_t host) {
    for (struct block *it = blocks; it < blocks + 64; it++)
        if (it->size && it->kind == FOREIGN && it->base == host) return it;
    return NULL;
}

/* Makes a descriptor of `size` bytes at an address. The caller owns the descriptor. */
static __attribute__((unused)) int hand_out(uint64_t at, uint64_t size, const char *name, int flags) {
    struct block *from = mapped_at(at);
    int given = VALUE("next_fd");
    if (given >= 0) return fcntl(given, flags & UDMABUF_FLAGS_CLOEXEC ? F_DUPFD_CLOEXEC : F_DUPFD, 0);
    if (!from) return -1;
    off_t offset = from->offset + (off_t)(at - from->at);
    if (VALUE("short")) size -= sysconf(_SC_PAGESIZE);
    int maker = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
    if (maker >= 0) {
        struct udmabuf_create create = {from->memfd, flags, offset, size};
        int made = ioctl(maker, UDMABUF_CREATE, &create);
        close(maker);
        if (made >= 0) ioctl(made, DMA_BUF_SET_NAME_B, (uintptr_t)name);
        return made;
    }
    int made = memfd_create(name, flags & UDMABUF_FLAGS_CLOEXEC ? MFD_CLOEXEC : 0);
    if (made >= 0 && write(made, (void *)at, size) != (ssize_t)size) {
        close(made);
        return -1;
    }
    return made;
}
