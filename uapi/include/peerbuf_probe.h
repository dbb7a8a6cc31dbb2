/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The ioctl interface of peerbuf_probe.ko, for C. uapi/src/probe.rs defines the same interface and
 * explains each field; a test compares the two.
 *
 * The rules for sizes and PCI addresses are those of peerbuf.h.
 *
 * Sizes are in bytes, times in the unit that the field's name ends with (_ms), and in nanoseconds in ns
 * and *_ns. An ioctl returns 0, or -1 with errno set.
 */
#ifndef PEERBUF_PROBE_H
#define PEERBUF_PROBE_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PEERBUF_PROBE_IOC_MAGIC 0xBC

/* On /dev/peerbuf/importer; the argument is a pointer to struct peerbuf_probe_attach. */
#define PEERBUF_PROBE_IOC_ATTACH _IO(PEERBUF_PROBE_IOC_MAGIC, 0x00)
/* On an attachment; the argument is a pointer to the struct named. */
#define PEERBUF_PROBE_IOC_MAP _IO(PEERBUF_PROBE_IOC_MAGIC, 0x01)    /* map */
#define PEERBUF_PROBE_IOC_UNMAP _IO(PEERBUF_PROBE_IOC_MAGIC, 0x02)  /* step */
#define PEERBUF_PROBE_IOC_PIN _IO(PEERBUF_PROBE_IOC_MAGIC, 0x03)    /* step */
#define PEERBUF_PROBE_IOC_UNPIN _IO(PEERBUF_PROBE_IOC_MAGIC, 0x04)  /* step */
#define PEERBUF_PROBE_IOC_FENCE _IO(PEERBUF_PROBE_IOC_MAGIC, 0x05)  /* fence */
#define PEERBUF_PROBE_IOC_SIGNAL _IO(PEERBUF_PROBE_IOC_MAGIC, 0x06) /* step */
#define PEERBUF_PROBE_IOC_VMAP _IO(PEERBUF_PROBE_IOC_MAGIC, 0x07)   /* step */
#define PEERBUF_PROBE_IOC_VUNMAP _IO(PEERBUF_PROBE_IOC_MAGIC, 0x08) /* step */
#define PEERBUF_PROBE_IOC_DETACH _IO(PEERBUF_PROBE_IOC_MAGIC, 0x09) /* step */
#define PEERBUF_PROBE_IOC_QUERY _IO(PEERBUF_PROBE_IOC_MAGIC, 0x0a)  /* query */

/* struct peerbuf_probe_attach, flags */
#define PEERBUF_PROBE_DYNAMIC (1U << 0) /* can be notified of stale mappings */
#define PEERBUF_PROBE_PEER (1U << 1)    /* accepts peer-to-peer memory */

/* struct peerbuf_probe_attach, on_invalidate */
#define PEERBUF_PROBE_ON_INVALIDATE_UNMAP 0
#define PEERBUF_PROBE_ON_INVALIDATE_REMAP 1
#define PEERBUF_PROBE_ON_INVALIDATE_HOLD 2 /* until an unmap step, or for hold_ms */

/* struct peerbuf_probe_map, direction */
#define PEERBUF_PROBE_BIDIRECTIONAL 0
#define PEERBUF_PROBE_TO_DEVICE 1
#define PEERBUF_PROBE_FROM_DEVICE 2

/* struct peerbuf_probe_fence, usage */
#define PEERBUF_PROBE_FENCE_KERNEL 0
#define PEERBUF_PROBE_FENCE_WRITE 1
#define PEERBUF_PROBE_FENCE_READ 2
#define PEERBUF_PROBE_FENCE_BOOKKEEP 3

#define PEERBUF_PROBE_MAX_MS 60000 /* the longest hold_ms, detach_ms, timeout_ms */

/* struct peerbuf_probe_query, state */
#define PEERBUF_PROBE_MAPPED (1U << 0)
#define PEERBUF_PROBE_STALE (1U << 1)  /* mapped in spite of an invalidation */
#define PEERBUF_PROBE_PINNED (1U << 2)
#define PEERBUF_PROBE_VMAPPED (1U << 3)
#define PEERBUF_PROBE_VMAP_IOMEM (1U << 4) /* the vmap is of device memory */
#define PEERBUF_PROBE_FENCED (1U << 5)     /* a fence has not signalled yet */
#define PEERBUF_PROBE_DETACHED (1U << 6)
#define PEERBUF_PROBE_DEVICE_GONE (1U << 7) /* detached because the driver unbound */

/* struct peerbuf_probe_query, provider */
#define PEERBUF_PROBE_PROVIDER_NONE (~0ULL) /* no peer memory */

#define PEERBUF_PROBE_ATTACH_MIN_SIZE 48
struct peerbuf_probe_attach {
	__u32 size;          /* in: sizeof(struct peerbuf_probe_attach) */
	__u32 flags;         /* in: PEERBUF_PROBE_DYNAMIC, PEERBUF_PROBE_PEER */
	__s32 dmabuf;        /* in: the dma-buf */
	__u32 fd_flags;      /* in: O_CLOEXEC or 0 */
	__u32 on_invalidate; /* in: PEERBUF_PROBE_ON_INVALIDATE_* */
	__u32 hold_ms;       /* in: time to hold a stale mapping; 0: until an unmap step */
	__u32 detach_ms;     /* in: time from closing the file to detaching */
	__s32 fd;            /* out: the attachment; 0 on entry */
	__u64 address;       /* in: PCI address, as in peerbuf.h */
	__u64 ns;            /* out: time taken; 0 on entry */
};

#define PEERBUF_PROBE_MAP_MIN_SIZE 24
struct peerbuf_probe_map {
	__u32 size;      /* in: sizeof(struct peerbuf_probe_map) */
	__u32 flags;     /* in: 0 */
	__u32 direction; /* in: PEERBUF_PROBE_BIDIRECTIONAL and so on */
	__u32 reserved;  /* 0 */
	__u64 ns;        /* out: time taken; 0 on entry */
};

#define PEERBUF_PROBE_STEP_MIN_SIZE 16
struct peerbuf_probe_step {
	__u32 size;  /* in: sizeof(struct peerbuf_probe_step) */
	__u32 flags; /* in: 0 */
	__u64 ns;    /* out: time taken; 0 on entry */
};

#define PEERBUF_PROBE_FENCE_MIN_SIZE 16
struct peerbuf_probe_fence {
	__u32 size;       /* in: sizeof(struct peerbuf_probe_fence) */
	__u32 flags;      /* in: 0 */
	__u32 usage;      /* in: PEERBUF_PROBE_FENCE_* */
	__u32 timeout_ms; /* in: the fence signals after this time at the latest */
};

#define PEERBUF_PROBE_QUERY_MIN_SIZE 16 /* without the mapping and the counts */
struct peerbuf_probe_query {
	__u32 size;          /* in: sizeof(struct peerbuf_probe_query) */
	__u32 flags;         /* in: 0 */
	__u32 state;         /* out: PEERBUF_PROBE_MAPPED and the flags after it */
	__u32 remap_error;   /* out: errno of the last remap attempt */
	__u64 segments;      /* out: segments of the mapping */
	__u64 bytes;         /* out: bytes of the mapping */
	__u64 system_bytes;  /* out: in system memory */
	__u64 bus_bytes;     /* out: in a BAR, by bus address */
	__u64 bridge_bytes;  /* out: in a BAR, through the host bridge */
	__u64 other_bytes;   /* out: at other addresses */
	__u64 provider;      /* out: PCI address of the device that owns the BAR */
	__u64 invalidations; /* out */
	__u64 maps;          /* out: mappings made */
	__u64 remaps;        /* out: mappings made on an invalidation */
	__u64 map_ns;        /* out: duration of the last mapping */
};

#endif
