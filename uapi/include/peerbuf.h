/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The ioctl interface of peerbuf.ko, for C. uapi/src/abi.rs defines the same interface and explains each
 * field and each error; a test compares the two.
 *
 * Offsets and lengths are in bytes, times in the unit that the field's name ends with (_ms, _ns). An
 * ioctl returns 0, or -1 with errno set. Fields marked 0 are refused with EINVAL unless zero.
 *
 * Structs grow at the end. A struct's size may be any from its minimum, PEERBUF_*_MIN_SIZE, which never
 * changes: missing bytes count as zeros, the answer is cut, and bytes that the module does not know are refused
 * with E2BIG unless zero. What a module can do is in struct peerbuf_query, features.
 */
#ifndef PEERBUF_H
#define PEERBUF_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PEERBUF_IOC_MAGIC 0xBB

/* On /dev/peerbuf/<BDF>; the argument is a pointer to the struct of the same name. */
#define PEERBUF_IOC_QUERY _IO(PEERBUF_IOC_MAGIC, 0x00)
#define PEERBUF_IOC_EXPORT _IO(PEERBUF_IOC_MAGIC, 0x01)
#define PEERBUF_IOC_MOVE _IO(PEERBUF_IOC_MAGIC, 0x03)
#define PEERBUF_IOC_REVOKE _IO(PEERBUF_IOC_MAGIC, 0x04)
#define PEERBUF_IOC_RESTORE _IO(PEERBUF_IOC_MAGIC, 0x05)
#define PEERBUF_IOC_WATCH _IO(PEERBUF_IOC_MAGIC, 0x06)
#define PEERBUF_IOC_UNWATCH _IO(PEERBUF_IOC_MAGIC, 0x07)
#define PEERBUF_IOC_BUFFER _IO(PEERBUF_IOC_MAGIC, 0x08)

#define PEERBUF_NUM_BARS 6
#define PEERBUF_DEVICE_NAME_LEN 64

/* A PCI address as a number: function 3 bits, device 5 bits, bus 8 bits, domain 32 bits */
#define PEERBUF_PCI_ADDRESS(domain, bus, device, function) \
	((__u64)(domain) << 16 | (__u64)(bus) << 8 | ((__u64)(device) & 0x1f) << 3 | ((__u64)(function) & 7))

/* struct peerbuf_query, features */
#define PEERBUF_FEATURE_EXPORT (1ULL << 0)   /* ranges of one BAR and of system memory */
#define PEERBUF_FEATURE_MOVE (1ULL << 1)     /* with what is in the way */
#define PEERBUF_FEATURE_REVOKE (1ULL << 2)   /* temporary and permanent, and restore */
#define PEERBUF_FEATURE_WATCH (1ULL << 3)    /* each PEERBUF_EVENT_* */
#define PEERBUF_FEATURE_PROVIDER (1ULL << 4) /* PEERBUF_IOC_PROVIDER_OPEN */
#define PEERBUF_FEATURE_SEVERAL_BARS (1ULL << 5) /* reserved: ranges of several BARs in one export */

/* struct peerbuf_bar, flags */
#define PEERBUF_BAR_MEMORY (1U << 0)       /* a memory BAR with an address */
#define PEERBUF_BAR_PREFETCHABLE (1U << 1) /* reads have no side effects */
#define PEERBUF_BAR_64BIT (1U << 2)        /* 64 bit address register */
#define PEERBUF_BAR_EXPORT (1U << 3)       /* regions can be exported */
#define PEERBUF_BAR_PAGES (1U << 4)        /* O_DIRECT on a mapping is peer-to-peer DMA */
#define PEERBUF_BAR_WRITE_COMBINING (1U << 5) /* mappings are, unless PEERBUF_EXPORT_UNCACHED */

/* struct peerbuf_export, flags (bit 8 is reserved, for clearing) */
#define PEERBUF_EXPORT_MAY_MOVE (1U << 0)     /* may move to system memory for importers that need it */
#define PEERBUF_EXPORT_DEVICES_READ (1U << 1) /* devices may only read: EACCES for other mappings */
#define PEERBUF_EXPORT_CACHE_MASK (0xfU << 4) /* cache mode, a number; 0: as the BAR allows */
#define PEERBUF_EXPORT_UNCACHED (1U << 4)     /* cache mode: processes map the BAR uncached */

/* struct peerbuf_range, flags (bits 24 to 29 are reserved, for an alignment) */
#define PEERBUF_RANGE_ANY_OFFSET (1U << 0) /* the module chooses the offset */
#define PEERBUF_RANGE_SYSTEM (1U << 1)     /* system memory, no place in the BAR */
#define PEERBUF_MAX_RANGES 1024

/* placements */
#define PEERBUF_PLACEMENT_DEVICE 1
#define PEERBUF_PLACEMENT_SYSTEM 2
#define PEERBUF_PLACEMENT_MIXED 3

/* struct peerbuf_buffer_query, state */
#define PEERBUF_STATE_LIVE 1
#define PEERBUF_STATE_REVOKED 2 /* temporarily */
#define PEERBUF_STATE_GONE 3    /* permanently revoked */

/* struct peerbuf_buffer_query, reasons */
#define PEERBUF_REASON_OWNER (1U << 0) /* PEERBUF_IOC_REVOKE */
#define PEERBUF_REASON_RESET (1U << 1) /* the device is being reset */
#define PEERBUF_REASON_GONE (1U << 2)  /* the device is gone */
#define PEERBUF_REASON_ERROR (1U << 3) /* a PCI error, without a recovery so far */
#define PEERBUF_REASON_POWER (1U << 4) /* the device sleeps */

/* struct peerbuf_revoke, flags */
#define PEERBUF_REVOKE_PERMANENT (1U << 0) /* cannot be restored; 0: temporary */

/* struct peerbuf_watch, events */
#define PEERBUF_EVENT_MOVED (1ULL << 0)
#define PEERBUF_EVENT_REVOKED (1ULL << 1)
#define PEERBUF_EVENT_RESTORED (1ULL << 2)
#define PEERBUF_EVENT_MOVABLE_TO_DEVICE (1ULL << 3) /* no holder keeps it from moving to the BAR any more */
#define PEERBUF_EVENT_MOVABLE_TO_SYSTEM (1ULL << 4) /* no holder keeps it from moving to system memory any more */

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
	__u64 exports;      /* allocated ranges */
	__u32 flags;        /* PEERBUF_BAR_* */
	__u32 reserved;     /* 0 */
};

#define PEERBUF_QUERY_MIN_SIZE 32 /* without the BARs */
struct peerbuf_query {
	__u32 size;      /* in: sizeof(struct peerbuf_query) */
	__u32 flags;     /* in: 0 */
	__u64 features;  /* out: PEERBUF_FEATURE_* */
	__u64 address;   /* out: PCI address */
	__u16 vendor;    /* out: PCI vendor id */
	__u16 device;    /* out: PCI device id */
	__u32 page_size; /* out: unit of offsets and lengths */
	struct peerbuf_bar bars[PEERBUF_NUM_BARS];
};

#define PEERBUF_RANGE_MIN_SIZE 24
struct peerbuf_range {
	__u64 offset; /* in and out: offset in the BAR; 0 for system memory */
	__u64 length; /* in */
	__u32 bar;    /* in: 0 to 5; 0 for system memory */
	__u32 flags;  /* in: PEERBUF_RANGE_* */
};

#define PEERBUF_EXPORT_MIN_SIZE 40
struct peerbuf_export {
	__u32 size;       /* in: sizeof(struct peerbuf_export) */
	__u32 flags;      /* in: PEERBUF_EXPORT_* */
	__u32 fd_flags;   /* in: O_RDONLY or O_RDWR, with or without O_CLOEXEC */
	__s32 fd;         /* out: the dma-buf; 0 on entry */
	__u64 ranges;     /* in: address of an array of struct peerbuf_range */
	__u32 nr_ranges;  /* in: 1 to PEERBUF_MAX_RANGES; EOPNOTSUPP: in different BARs */
	__u32 range_size; /* in: sizeof(struct peerbuf_range) */
	__u64 length;     /* out: of the dma-buf; 0 on entry */
};

#define PEERBUF_MOVE_MIN_SIZE 56 /* without what is in the way */
struct peerbuf_move {
	__u32 size;       /* in: sizeof(struct peerbuf_move) */
	__u32 flags;      /* in: 0 */
	__s32 fd;         /* in: the dma-buf */
	__u32 placement;  /* in: PEERBUF_PLACEMENT_DEVICE or _SYSTEM */
	__u64 offset;     /* in: offset of the part in the dma-buf */
	__u64 length;     /* in: of the part; 0: up to the end */
	__u32 timeout_ms; /* in: time limit for fences and direct I/O */
	__u32 reserved;   /* 0 */
	__u64 generation; /* out; 0 on entry, as the following */
	__u64 copied;     /* out: bytes */
	/*
	 * After EBUSY, what was in the way; all 0: another move. Holders are the kernel mapping, and for a move to
	 * the BAR the importers that need system memory and the old mappings of the BAR.
	 */
	__u64 holders;    /* out */
	__u64 fences;     /* out: unsignalled */
	__u64 pages;      /* out: used by CPU mappings or direct I/O */
	__u64 pins;       /* out */
};

#define PEERBUF_REVOKE_MIN_SIZE 48
struct peerbuf_revoke {
	__u32 size;       /* in: sizeof(struct peerbuf_revoke) */
	__u32 flags;      /* in: PEERBUF_REVOKE_* */
	__s32 fd;         /* in: the dma-buf */
	__u32 timeout_ms; /* in */
	__u64 generation; /* out; 0 on entry, as the following */
	__u64 holders;    /* out: mappings that importers still have */
	__u64 fences;     /* out: not signalled */
	__u64 pages;      /* out: pages that direct I/O still uses */
};

#define PEERBUF_RESTORE_MIN_SIZE 24
struct peerbuf_restore {
	__u32 size;       /* in: sizeof(struct peerbuf_restore) */
	__u32 flags;      /* in: 0 */
	__s32 fd;         /* in: the dma-buf */
	__u32 reserved;   /* 0 */
	__u64 generation; /* out; 0 on entry */
};

#define PEERBUF_WATCH_MIN_SIZE 24
struct peerbuf_watch {
	__u32 size;    /* in: sizeof(struct peerbuf_watch) */
	__u32 flags;   /* in: 0 */
	__s32 fd;      /* in: the dma-buf */
	__s32 eventfd; /* in */
	__u64 events;  /* in: PEERBUF_EVENT_*; 0 to unwatch */
};

#define PEERBUF_ATTACHMENT_MIN_SIZE 96
struct peerbuf_attachment {
	__u8 device[PEERBUF_DEVICE_NAME_LEN]; /* name of the importing device, NUL-padded */
	__u32 flags;      /* PEERBUF_ATTACHMENT_* */
	__u32 reserved;   /* 0 */
	__u64 mapped;     /* mappings now */
	__u64 pinned;     /* pins now */
	__u64 generation; /* of its oldest mapping; 0: none */
};

#define PEERBUF_PIECE_MIN_SIZE 24
struct peerbuf_piece {
	__u64 length;
	__u64 offset;    /* offset in the BAR; all ones: none */
	__u32 bar;       /* all ones: none */
	__u32 placement; /* PEERBUF_PLACEMENT_DEVICE or _SYSTEM */
};

#define PEERBUF_BUFFER_QUERY_MIN_SIZE 40 /* without the lists and the statistics */
struct peerbuf_buffer_query {
	__u32 size;            /* in: sizeof(struct peerbuf_buffer_query) */
	__u32 flags;           /* in: 0 */
	__s32 fd;              /* in: the dma-buf */
	__u32 state;           /* out: PEERBUF_STATE_* */
	__u64 generation;      /* out: from 1 */
	__u64 length;          /* out */
	__u32 placement;       /* out: PEERBUF_PLACEMENT_* */
	__u32 reasons;         /* out: PEERBUF_REASON_* */
	__u64 attachments;     /* in: address of an array of struct peerbuf_attachment */
	__u64 pieces;          /* in: address of an array of struct peerbuf_piece */
	__u32 nr_attachments;  /* in: entries that fit into the array; out: entries there are */
	__u32 attachment_size; /* in: sizeof(struct peerbuf_attachment) */
	__u32 nr_pieces;       /* in: entries that fit into the array; out: entries there are */
	__u32 piece_size;      /* in: sizeof(struct peerbuf_piece) */
	__u64 pins;            /* out */
	__u64 vmaps;           /* out: 1 if the kernel has it mapped */
	__u64 busy_pages;      /* out: used by CPU mappings or direct I/O */
	__u64 moves;           /* out */
	__u64 invalidations;   /* out */
	__u64 maps;            /* out */
	__u64 copied;          /* out: bytes */
	__u64 longest_wait_ns; /* out */
	__u64 refusals;        /* out */
	__u8 refused_device[PEERBUF_DEVICE_NAME_LEN];
	__u32 refused_reason;  /* out: PEERBUF_REFUSED_* */
	__u32 refused_errno;   /* out: positive */
};

/*
 * On /dev/peerbuf/provider; the argument is a pointer to struct peerbuf_provider_open. The returned
 * descriptor accepts the ioctls of /dev/peerbuf/<BDF>.
 */
#define PEERBUF_IOC_PROVIDER_OPEN _IO(PEERBUF_IOC_MAGIC, 0x20)

#define PEERBUF_PROVIDER_OPEN_MIN_SIZE 24
struct peerbuf_provider_open {
	__u32 size;     /* in: sizeof(struct peerbuf_provider_open) */
	__u32 flags;    /* in: 0 */
	__u32 fd_flags; /* in: O_RDONLY or O_RDWR, O_CLOEXEC */
	__s32 fd;       /* out: the descriptor; 0 on entry */
	__u64 address;  /* in: PCI address */
};

#endif
