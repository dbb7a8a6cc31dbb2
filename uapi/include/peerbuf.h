/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The ioctl interface of peerbuf.ko, for C. uapi/src/abi.rs defines the same interface and explains each
 * field and each error; a test compares the two.
 *
 * Offsets and lengths are in bytes, times in the unit that the field's name ends with (_ms, _ns). An
 * ioctl returns 0, or -1 with errno set. Fields marked 0 are refused with EINVAL unless zero.
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
#define PEERBUF_IOC_EXPORT_RANGES _IO(PEERBUF_IOC_MAGIC, 0x02)
#define PEERBUF_IOC_MOVE _IO(PEERBUF_IOC_MAGIC, 0x03)
#define PEERBUF_IOC_REVOKE _IO(PEERBUF_IOC_MAGIC, 0x04)
#define PEERBUF_IOC_RESTORE _IO(PEERBUF_IOC_MAGIC, 0x05)
#define PEERBUF_IOC_WATCH _IO(PEERBUF_IOC_MAGIC, 0x06)
#define PEERBUF_IOC_UNWATCH _IO(PEERBUF_IOC_MAGIC, 0x07)
#define PEERBUF_IOC_BUFFER _IO(PEERBUF_IOC_MAGIC, 0x08)

#define PEERBUF_NUM_BARS 6

/* struct peerbuf_bar, flags */
#define PEERBUF_BAR_MEMORY (1U << 0)       /* a memory BAR with an address */
#define PEERBUF_BAR_PREFETCHABLE (1U << 1) /* reads have no side effects */
#define PEERBUF_BAR_64BIT (1U << 2)        /* 64 bit address register */
#define PEERBUF_BAR_EXPORT (1U << 3)       /* regions can be exported */
#define PEERBUF_BAR_PAGES (1U << 4)        /* O_DIRECT on a mapping is peer-to-peer DMA */
#define PEERBUF_BAR_WRITE_COMBINING (1U << 5) /* mappings are, unless PEERBUF_EXPORT_UNCACHED */

/* struct peerbuf_export, flags */
#define PEERBUF_EXPORT_ANY_OFFSET (1U << 0) /* the module chooses the offset */
#define PEERBUF_EXPORT_MAY_MOVE (1U << 1)   /* may move to system memory for importers that need it */
#define PEERBUF_EXPORT_DEVICES_READ (1U << 2) /* devices may only read: EACCES for other mappings */
#define PEERBUF_EXPORT_UNCACHED (1U << 3)   /* processes map the BAR uncached */

/* struct peerbuf_range, flags */
#define PEERBUF_RANGE_ANY_OFFSET (1U << 0) /* the module chooses the offset */
#define PEERBUF_RANGE_SYSTEM (1U << 1)     /* system memory, no place in the BAR */
#define PEERBUF_MAX_RANGES 1024

/* placements */
#define PEERBUF_PLACEMENT_DEVICE 1
#define PEERBUF_PLACEMENT_SYSTEM 2
#define PEERBUF_PLACEMENT_MIXED 3

/* struct peerbuf_buffer_query, state */
#define PEERBUF_STATE_LIVE 1
#define PEERBUF_STATE_REVOKED 2
#define PEERBUF_STATE_GONE 3

/* struct peerbuf_attachment, flags */
#define PEERBUF_ATTACHMENT_REVOCABLE (1U << 0)    /* can be notified of stale mappings */
#define PEERBUF_ATTACHMENT_DYNAMIC (1U << 1)      /* has importer operations */
#define PEERBUF_ATTACHMENT_PEER (1U << 2)         /* accepts peer-to-peer memory */
#define PEERBUF_ATTACHMENT_NEEDS_SYSTEM (1U << 3) /* keeps the buffer in system memory */
#define PEERBUF_ATTACHMENT_STALE (1U << 4)        /* has a mapping of an older generation */

/* struct peerbuf_buffer_query, refused_reason */
#define PEERBUF_REFUSED_NOBODY 0
#define PEERBUF_REFUSED_NOT_PEER 1
#define PEERBUF_REFUSED_NOT_REVOCABLE 2
#define PEERBUF_REFUSED_NO_ROUTE 3
#define PEERBUF_REFUSED_MOVE_FAILED 4

struct peerbuf_bar {
	__u64 size;         /* 0: no such BAR */
	__u64 free;         /* bytes in no export */
	__u64 largest_free; /* longest run of free bytes */
	__u32 exports;      /* exports that have a range in the BAR */
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
	__u64 offset;   /* in and out: offset in the BAR */
	__u64 length;   /* in */
	__s32 fd;       /* out: the dma-buf; 0 on entry */
	__u32 reserved; /* 0 */
};

struct peerbuf_range {
	__u64 offset;   /* in and out: offset in the BAR */
	__u64 length;   /* in */
	__u32 flags;    /* in: PEERBUF_RANGE_* */
	__u32 reserved; /* 0 */
};

struct peerbuf_export_ranges {
	__u32 size;      /* in: sizeof(struct peerbuf_export_ranges) */
	__u32 flags;     /* in: PEERBUF_EXPORT_*, without PEERBUF_EXPORT_ANY_OFFSET */
	__u32 bar;       /* in: 0 to 5 */
	__u32 fd_flags;  /* in: as struct peerbuf_export */
	__u64 ranges;    /* in: address of an array of struct peerbuf_range */
	__u32 nr_ranges; /* in */
	__s32 fd;        /* out: the dma-buf; 0 on entry */
	__u64 length;    /* out: of the dma-buf; 0 on entry */
};

struct peerbuf_move {
	__u32 size;       /* in: sizeof(struct peerbuf_move) */
	__u32 flags;      /* in: 0 */
	__s32 fd;         /* in: the dma-buf */
	__u32 placement;  /* in: PEERBUF_PLACEMENT_DEVICE or _SYSTEM */
	__u64 offset;     /* in: offset of the part in the dma-buf */
	__u64 length;     /* in: of the part; 0: up to the end */
	__u32 timeout_ms; /* in: time limit for fences and direct I/O */
	__u32 reserved;   /* 0 */
	__u64 generation; /* out */
	__u64 copied;     /* out: bytes */
};

struct peerbuf_revoke {
	__u32 size;       /* in: sizeof(struct peerbuf_revoke) */
	__u32 flags;      /* in: 0 */
	__s32 fd;         /* in: the dma-buf */
	__u32 timeout_ms; /* in */
	__u64 generation; /* out */
	__u32 holders;    /* out: mappings that importers still have */
	__u32 fences;     /* out: 1 if a fence is not signalled */
	__u64 pages;      /* out: pages that direct I/O still uses */
};

struct peerbuf_restore {
	__u32 size;       /* in: sizeof(struct peerbuf_restore) */
	__u32 flags;      /* in: 0 */
	__s32 fd;         /* in: the dma-buf */
	__u32 reserved;   /* 0 */
	__u64 generation; /* out */
};

struct peerbuf_watch {
	__u32 size;    /* in: sizeof(struct peerbuf_watch) */
	__u32 flags;   /* in: 0 */
	__s32 fd;      /* in: the dma-buf */
	__s32 eventfd; /* in */
};

struct peerbuf_attachment {
	__u8 device[32];  /* name of the importing device, NUL-padded */
	__u32 flags;      /* PEERBUF_ATTACHMENT_* */
	__u32 mapped;     /* mappings now */
	__u32 pinned;     /* pins now */
	__u32 reserved;   /* 0 */
	__u64 generation; /* of its oldest mapping; 0: none */
};

struct peerbuf_piece {
	__u64 length;
	__u64 offset;    /* offset in the BAR; all ones: none */
	__u32 placement; /* PEERBUF_PLACEMENT_DEVICE or _SYSTEM */
	__u32 reserved;  /* 0 */
};

struct peerbuf_buffer_query {
	__u32 size;            /* in: sizeof(struct peerbuf_buffer_query) */
	__u32 flags;           /* in: 0 */
	__s32 fd;              /* in: the dma-buf */
	__u32 state;           /* out: PEERBUF_STATE_* */
	__u32 placement;       /* out: PEERBUF_PLACEMENT_* */
	__u32 bar;             /* out */
	__u64 length;          /* out */
	__u64 generation;      /* out: from 1 */
	__u64 attachments;     /* in: address of an array of struct peerbuf_attachment */
	__u64 pieces;          /* in: address of an array of struct peerbuf_piece */
	__u32 nr_attachments;  /* in: entries that fit into the array; out: entries there are */
	__u32 nr_pieces;       /* in: entries that fit into the array; out: entries there are */
	__u32 pins;            /* out */
	__u32 vmaps;           /* out: 1 if the kernel has it mapped */
	__u64 busy_pages;      /* out: used by CPU mappings or direct I/O */
	__u64 moves;           /* out */
	__u64 invalidations;   /* out */
	__u64 maps;            /* out */
	__u64 copied;          /* out: bytes */
	__u64 longest_wait_ns; /* out */
	__u64 refusals;        /* out */
	__u8 refused_device[32];
	__u32 refused_reason;  /* out: PEERBUF_REFUSED_* */
	__u32 refused_errno;   /* out: positive */
};

/*
 * On /dev/peerbuf/provider; the argument is a pointer to struct peerbuf_provider_open. The returned
 * descriptor accepts the ioctls of /dev/peerbuf/<BDF>.
 */
#define PEERBUF_IOC_PROVIDER_OPEN _IO(PEERBUF_IOC_MAGIC, 0x20)

struct peerbuf_provider_open {
	__u32 size;     /* in: sizeof(struct peerbuf_provider_open) */
	__u32 flags;    /* in: 0 */
	__u32 fd_flags; /* in: O_RDONLY or O_RDWR, O_CLOEXEC */
	__s32 fd;       /* out: the descriptor; 0 on entry */
	__u8 bdf[16];   /* in: "DDDD:BB:DD.F", NUL-padded */
};

#endif
