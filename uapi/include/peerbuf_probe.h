/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The interface of peerbuf_probe.ko, for C. The same as uapi/src/probe.rs, where each field is
 * explained; a test compares the two.
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
#define PEERBUF_PROBE_DYNAMIC (1U << 0) /* can be told that its mappings are stale */
#define PEERBUF_PROBE_PEER (1U << 1)    /* takes peer memory */

/* struct peerbuf_probe_attach, on_invalidate */
#define PEERBUF_PROBE_ON_INVALIDATE_UNMAP 0
#define PEERBUF_PROBE_ON_INVALIDATE_REMAP 1
#define PEERBUF_PROBE_ON_INVALIDATE_HOLD 2 /* until told, or for hold_ms */

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
#define PEERBUF_PROBE_VMAP_IOMEM (1U << 4) /* that mapping is of device memory */
#define PEERBUF_PROBE_FENCED (1U << 5)     /* a fence has not signalled yet */
#define PEERBUF_PROBE_DETACHED (1U << 6)
#define PEERBUF_PROBE_DEVICE_GONE (1U << 7) /* ... because the device's driver let go of it */

struct peerbuf_probe_attach {
	__u32 size;          /* in: sizeof(struct peerbuf_probe_attach) */
	__u32 flags;         /* in: PEERBUF_PROBE_DYNAMIC, PEERBUF_PROBE_PEER */
	__s32 dmabuf;        /* in: the dma-buf */
	__u32 fd_flags;      /* in: O_CLOEXEC or 0 */
	__u32 on_invalidate; /* in: PEERBUF_PROBE_ON_INVALIDATE_* */
	__u32 hold_ms;       /* in: how long a mapping is held; 0: until told */
	__u32 detach_ms;     /* in: how long it stays after its file was closed */
	__s32 fd;            /* out: the attachment; 0 on entry */
	__u8 bdf[16];        /* in: "DDDD:BB:DD.F", NUL-padded */
	__u64 ns;            /* out: time taken; 0 on entry */
};

struct peerbuf_probe_map {
	__u32 size;      /* in: sizeof(struct peerbuf_probe_map) */
	__u32 flags;     /* in: 0 */
	__u32 direction; /* in: PEERBUF_PROBE_BIDIRECTIONAL and so on */
	__u32 reserved;  /* 0 */
	__u64 ns;        /* out: time taken; 0 on entry */
};

struct peerbuf_probe_step {
	__u32 size;  /* in: sizeof(struct peerbuf_probe_step) */
	__u32 flags; /* in: 0 */
	__u64 ns;    /* out: time taken; 0 on entry */
};

struct peerbuf_probe_fence {
	__u32 size;       /* in: sizeof(struct peerbuf_probe_fence) */
	__u32 flags;      /* in: 0 */
	__u32 usage;      /* in: PEERBUF_PROBE_FENCE_* */
	__u32 timeout_ms; /* in: signals by itself after this long */
};

struct peerbuf_probe_query {
	__u32 size;          /* in: sizeof(struct peerbuf_probe_query) */
	__u32 flags;         /* in: 0 */
	__u32 state;         /* out: PEERBUF_PROBE_MAPPED and the flags after it */
	__u32 segments;      /* out: of the mapping; so is what follows */
	__u64 bytes;         /* out: all */
	__u64 system_bytes;  /* out: in system memory */
	__u64 bus_bytes;     /* out: in a BAR, by bus address */
	__u64 bridge_bytes;  /* out: in a BAR, through the host bridge */
	__u64 other_bytes;   /* out: somewhere else */
	__u8 provider[16];   /* out: the device whose BAR it is, as "DDDD:BB:DD.F" */
	__u64 invalidations; /* out */
	__u64 maps;          /* out: mappings made */
	__u64 remaps;        /* out: those made by itself */
	__u64 map_ns;        /* out: time that the last one took */
	__u32 remap_error;   /* out: errno of the last attempt by itself */
	__u32 reserved;      /* 0 */
};

#endif
