/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The interface of peerbuf.ko, for C. The same as uapi/src/abi.rs, where each field is
 * explained; a test compares the two.
 */
#ifndef PEERBUF_H
#define PEERBUF_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PEERBUF_ABI_VERSION 1
#define PEERBUF_IOC_MAGIC 0xBB

/* On /dev/peerbuf/<BDF>; the argument is a pointer to the struct of the same name. */
#define PEERBUF_IOC_QUERY _IO(PEERBUF_IOC_MAGIC, 0x00)
#define PEERBUF_IOC_EXPORT _IO(PEERBUF_IOC_MAGIC, 0x01)

#define PEERBUF_NUM_BARS 6

/* struct peerbuf_bar, flags */
#define PEERBUF_BAR_MEMORY (1U << 0)       /* a memory BAR with an address */
#define PEERBUF_BAR_PREFETCHABLE (1U << 1) /* reads have no side effects */
#define PEERBUF_BAR_64BIT (1U << 2)        /* 64 bit address register */
#define PEERBUF_BAR_EXPORT (1U << 3)       /* regions can be exported */
#define PEERBUF_BAR_PAGES (1U << 4)        /* O_DIRECT on a mapping is peer-to-peer DMA */

/* struct peerbuf_export, flags */
#define PEERBUF_EXPORT_ANY_OFFSET (1U << 0) /* the module chooses the offset */

/* All sizes are in bytes. */
struct peerbuf_bar {
	__u64 size;         /* 0: no such BAR */
	__u64 free;         /* bytes in no export */
	__u64 largest_free; /* longest run of free bytes */
	__u32 exports;      /* exports whose range is taken */
	__u32 flags;        /* PEERBUF_BAR_* */
};

struct peerbuf_query {
	__u32 size;        /* in: sizeof(struct peerbuf_query) */
	__u32 flags;       /* in: 0 */
	__u32 abi_version; /* out: PEERBUF_ABI_VERSION of the module */
	__u32 page_size;   /* out: unit of offsets and lengths */
	__u16 vendor;      /* out: PCI vendor id */
	__u16 device;      /* out: PCI device id */
	__u32 reserved;    /* 0 */
	__u8 bdf[16];      /* out: "DDDD:BB:DD.F", NUL-padded */
	struct peerbuf_bar bars[PEERBUF_NUM_BARS];
};

struct peerbuf_export {
	__u32 size;     /* in: sizeof(struct peerbuf_export) */
	__u32 flags;    /* in: PEERBUF_EXPORT_* */
	__u32 bar;      /* in: 0 to 5 */
	__u32 fd_flags; /* in: O_RDONLY or O_RDWR, with or without O_CLOEXEC */
	__u64 offset;   /* in and out: where in the BAR */
	__u64 length;   /* in */
	__s32 fd;       /* out: the dma-buf; 0 on entry */
	__u32 reserved; /* 0 */
};

#endif
