// SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT

// The interface between peerbuf.ko and userspace: ioctl numbers and structs. `probe.rs` has that of
// peerbuf_probe.ko.
//
// This file is compiled twice: into the crate `peerbuf-uapi` and, with `include!`, into peerbuf.ko.
// `include/peerbuf.h` declares the same for C; a test compares the two, field by field.
//
// Rules of the interface:
// - Every struct begins with `size`, its size in bytes as the caller knows it. A kernel with a shorter struct
//   refuses trailing bytes that are not zero (E2BIG); a kernel with a longer struct takes the missing bytes
//   as zero. A size below that of the first version is EINVAL.
// - Unknown flags are EINVAL, and so is padding that is not zero.
// - On an error nothing has changed and nothing was written back, except that EFAULT may leave a partly
//   written answer.
// - The ioctl numbers encode no size (`_IO`), so they stay the same when a struct grows.

/// The version of this interface, reported by [`IOC_QUERY`].
pub const ABI_VERSION: u32 = 1;

/// The ioctl type byte of peerbuf.ko's ioctls.
pub const IOC_MAGIC: u8 = 0xBB;

/// `_IO(IOC_MAGIC, number)`.
const fn io(number: u32) -> u32 {
    ((IOC_MAGIC as u32) << 8) | number
}

/// `_IO(0xBB, 0x00)`: fills a [`Query`]. On a `/dev/peerbuf/<BDF>` node.
pub const IOC_QUERY: u32 = io(0x00);

/// `_IO(0xBB, 0x01)`: exports part of a BAR as a dma-buf, by [`Export`]. On a
/// `/dev/peerbuf/<BDF>` node.
pub const IOC_EXPORT: u32 = io(0x01);

/// `_IO(0xBB, 0x02)`: exports several ranges as one dma-buf, by [`ExportRanges`]. On a
/// `/dev/peerbuf/<BDF>` node.
pub const IOC_EXPORT_RANGES: u32 = io(0x02);

/// `_IO(0xBB, 0x03)`: moves a buffer's bytes, by [`Move`]. This and the following: on the node of the device
/// that exported the buffer.
pub const IOC_MOVE: u32 = io(0x03);

/// `_IO(0xBB, 0x04)`: revokes access to a buffer, by [`Revoke`].
pub const IOC_REVOKE: u32 = io(0x04);

/// `_IO(0xBB, 0x05)`: restores access to a buffer, by [`Restore`].
pub const IOC_RESTORE: u32 = io(0x05);

/// `_IO(0xBB, 0x06)`: signals an eventfd when a buffer changes, by [`Watch`].
pub const IOC_WATCH: u32 = io(0x06);

/// `_IO(0xBB, 0x07)`: stops signalling an eventfd, by [`Watch`].
pub const IOC_UNWATCH: u32 = io(0x07);

/// `_IO(0xBB, 0x08)`: queries a buffer's placement, users and statistics, by [`BufferQuery`].
pub const IOC_BUFFER: u32 = io(0x08);

/// `_IO(0xBB, 0x20)`: opens a provider, by [`ProviderOpen`]. On `/dev/peerbuf/provider`. The new file
/// supports the ioctls of a `/dev/peerbuf/<BDF>` node.
pub const IOC_PROVIDER_OPEN: u32 = io(0x20);

/// The number of base address registers of a PCI function.
pub const NUM_BARS: usize = 6;

/// The BAR is a memory BAR with an assigned address: neither absent nor an I/O port BAR.
pub const BAR_MEMORY: u32 = 1 << 0;
/// The BAR is prefetchable: reads have no side effects, and writes may be combined.
pub const BAR_PREFETCHABLE: u32 = 1 << 1;
/// The BAR's address register is 64 bits wide.
pub const BAR_64BIT: u32 = 1 << 2;
/// Regions of the BAR can be exported as dma-bufs.
pub const BAR_EXPORT: u32 = 1 << 3;
/// CPU mappings of exports have struct pages, so `O_DIRECT` I/O on them is peer-to-peer DMA. Without this
/// flag such I/O fails with EFAULT, and needs a copy instead.
pub const BAR_PAGES: u32 = 1 << 4;

/// The CPU's mappings of exports are write-combining, unless [`EXPORT_UNCACHED`] asks otherwise: the BAR is
/// prefetchable, and the kernel's list of memory types has it as write-combining.
pub const BAR_WRITE_COMBINING: u32 = 1 << 5;

/// Every `BAR_*` flag that this version knows.
pub const BAR_FLAGS: u32 =
    BAR_MEMORY | BAR_PREFETCHABLE | BAR_64BIT | BAR_EXPORT | BAR_PAGES | BAR_WRITE_COMBINING;

/// The module chooses the offset; [`Export::offset`] is zero on entry and set on return.
pub const EXPORT_ANY_OFFSET: u32 = 1 << 0;

/// The buffer moves to system memory for importers that cannot use the BAR; without this flag they are
/// refused.
pub const EXPORT_MAY_MOVE: u32 = 1 << 1;

/// Devices may only read the buffer: mapping it in a direction that allows a device to write is refused
/// (EACCES), and so is a kernel mapping (`vmap`). RDMA cards and graphics drivers map in both directions
/// regardless of their use, so they cannot use such a buffer.
pub const EXPORT_DEVICES_READ: u32 = 1 << 2;

/// Processes map the BAR uncached: each access reaches the device, in order. Without this flag mappings of a BAR with
/// [`BAR_WRITE_COMBINING`] are write-combining: writes wait in the CPU, in any order, until the end of the access
/// (`DMA_BUF_IOCTL_SYNC`) or a store fence.
pub const EXPORT_UNCACHED: u32 = 1 << 3;

/// Every `EXPORT_*` flag that this version knows.
pub const EXPORT_FLAGS: u32 =
    EXPORT_ANY_OFFSET | EXPORT_MAY_MOVE | EXPORT_DEVICES_READ | EXPORT_UNCACHED;

/// [`Range`]: the module chooses the offset in the BAR; [`Range::offset`] is zero on entry.
pub const RANGE_ANY_OFFSET: u32 = 1 << 0;
/// [`Range`]: system memory without a place in the BAR; [`Range::offset`] is zero.
pub const RANGE_SYSTEM: u32 = 1 << 1;

/// Every `RANGE_*` flag that a caller may set.
pub const RANGE_FLAGS: u32 = RANGE_ANY_OFFSET | RANGE_SYSTEM;

/// The maximum number of ranges in one export.
pub const MAX_RANGES: usize = 1024;

/// Placement: the bytes are in the device's BAR.
pub const PLACEMENT_DEVICE: u32 = 1;
/// Placement: the bytes are in system memory.
pub const PLACEMENT_SYSTEM: u32 = 2;
/// Placement: some ranges are in the BAR and some in system memory. Only in answers.
pub const PLACEMENT_MIXED: u32 = 3;

/// [`BufferQuery::state`]: the buffer is accessible.
pub const STATE_LIVE: u32 = 1;
/// [`BufferQuery::state`]: the buffer is revoked, and can be restored.
pub const STATE_REVOKED: u32 = 2;
/// [`BufferQuery::state`]: the buffer is revoked permanently, because its device is gone.
pub const STATE_GONE: u32 = 3;

/// [`Attachment`]: the importer's mappings can be invalidated.
pub const ATTACHMENT_REVOCABLE: u32 = 1 << 0;
/// [`Attachment`]: a dynamic importer (it has importer operations).
pub const ATTACHMENT_DYNAMIC: u32 = 1 << 1;
/// [`Attachment`]: the importer can use peer memory.
pub const ATTACHMENT_PEER: u32 = 1 << 2;
/// [`Attachment`]: the importer keeps the buffer in system memory while it is attached.
pub const ATTACHMENT_NEEDS_SYSTEM: u32 = 1 << 3;
/// [`Attachment`]: the importer has a mapping from before the last move or revoke.
pub const ATTACHMENT_STALE: u32 = 1 << 4;

/// [`BufferQuery::refused_reason`]: no importer was refused.
pub const REFUSED_NOBODY: u32 = 0;
/// [`BufferQuery::refused_reason`]: the importer did not ask for peer memory (EOPNOTSUPP).
pub const REFUSED_NOT_PEER: u32 = 1;
/// [`BufferQuery::refused_reason`]: the importer's mappings cannot be invalidated (EOPNOTSUPP).
pub const REFUSED_NOT_REVOCABLE: u32 = 2;
/// [`BufferQuery::refused_reason`]: the kernel finds no peer-to-peer route between the devices (EREMOTEIO).
pub const REFUSED_NO_ROUTE: u32 = 3;
/// [`BufferQuery::refused_reason`]: the buffer could not be moved to system memory, because it is pinned or
/// in use (EBUSY), or memory is short (ENOMEM).
pub const REFUSED_MOVE_FAILED: u32 = 4;

/// One BAR and its free space. All sizes are in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Bar {
    /// Size of the BAR; 0 if the function has no such BAR.
    pub size: u64,
    /// Free bytes.
    pub free: u64,
    /// The longest contiguous free range: the largest export possible now.
    pub largest_free: u64,
    /// The number of allocated ranges.
    pub exports: u32,
    /// `BAR_*` flags.
    pub flags: u32,
}

/// [`IOC_QUERY`]: describes the device and its BARs.
///
/// Errors: EINVAL, E2BIG, ENODEV (the device is gone), EAGAIN (it is being reset, or
/// recovers from an error), EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Query {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// Out: [`ABI_VERSION`] of the module.
    pub abi_version: u32,
    /// Out: the granularity in bytes of offsets and lengths of exports.
    pub page_size: u32,
    /// Out: the PCI vendor id.
    pub vendor: u16,
    /// Out: the PCI device id.
    pub device: u16,
    /// In and out: zero.
    pub reserved: u32,
    /// Out: the PCI address `DDDD:BB:DD.F`, NUL-terminated and NUL-padded.
    pub bdf: [u8; 16],
    /// Out: one entry per BAR.
    pub bars: [Bar; NUM_BARS],
}

/// [`IOC_EXPORT`]: exports `length` bytes of a BAR as a dma-buf.
///
/// Errors: EINVAL (size, flags, padding, no such BAR, not a memory BAR, a length of zero, an offset or length
/// that is not a multiple of the page size, a range that ends beyond the BAR), EOVERFLOW (offset plus length
/// exceeds 64 bits), E2BIG (trailing bytes that are not zero), EOPNOTSUPP (the BAR is smaller than a page),
/// EBUSY (another export, or I/O that outlived one, uses part of the range), ENOSPC (no free range is long
/// enough), ENODEV (the device is gone), EAGAIN (it is being reset, or recovers from an error), EACCES
/// (O_RDWR on a node that was opened read-only), EMFILE, ENFILE, ENOMEM, EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Export {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: `EXPORT_*` flags.
    pub flags: u32,
    /// In: the BAR's index, 0 to 5.
    pub bar: u32,
    /// In: flags of the new descriptor: `O_RDONLY` or `O_RDWR`, with or without `O_CLOEXEC`.
    pub fd_flags: u32,
    /// In and out: the export's offset in the BAR, in bytes.
    pub offset: u64,
    /// In: the export's length in bytes.
    pub length: u64,
    /// Out: the dma-buf's file descriptor; zero on entry.
    pub fd: i32,
    /// In and out: zero.
    pub reserved: u32,
}

/// One range of [`ExportRanges`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Range {
    /// In and out: the range's offset in the BAR, in bytes; zero for system memory.
    pub offset: u64,
    /// In: the range's length in bytes.
    pub length: u64,
    /// In: `RANGE_*` flags.
    pub flags: u32,
    /// In and out: zero.
    pub reserved: u32,
}

/// [`IOC_EXPORT_RANGES`]: exports ranges of one BAR and of system memory as one dma-buf, in the given order.
///
/// Errors: those of [`Export`], for each range. EINVAL also for no range, more than [`MAX_RANGES`], a total
/// length that is not a positive signed 64-bit number, or `EXPORT_ANY_OFFSET`; EBUSY also for overlapping
/// ranges; ENOMEM if system memory is short.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ExportRanges {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: `EXPORT_*` flags, without `EXPORT_ANY_OFFSET`.
    pub flags: u32,
    /// In: the BAR's index, 0 to 5, for all ranges.
    pub bar: u32,
    /// In: as [`Export::fd_flags`].
    pub fd_flags: u32,
    /// In: the address of an array of [`Range`], whose offsets are filled in.
    pub ranges: u64,
    /// In: the number of ranges.
    pub nr_ranges: u32,
    /// Out: the dma-buf's file descriptor; zero on entry.
    pub fd: i32,
    /// Out: the length of the dma-buf in bytes; zero on entry.
    pub length: u64,
}

/// [`IOC_MOVE`]: moves a buffer, or a page-aligned part of it, to the BAR or to system memory. Earlier
/// mappings are invalidated, and keep their old backing until they are unmapped. Ranges already at the
/// destination stay as they are.
///
/// A user may keep system pages, for example in a pipe (`vmsplice`). When the time limit is over, the move
/// leaves these pages, with the old bytes, to their user, who does not see later changes. For pages that a
/// device may be accessing (direct I/O, registrations of io_uring or of an RDMA card), it does so only after
/// 10 seconds; with a lower limit the move fails with EBUSY. Later writes of such a device do not reach the
/// buffer.
///
/// Errors: EINVAL (size, flags, padding, placement, a part that is not page-aligned or not inside the buffer,
/// a descriptor that is not a dma-buf of this device), EBUSY (the buffer is pinned or has a kernel mapping; a
/// move to the BAR while an importer needs system memory or still has a stale mapping of the BAR; fences or
/// direct I/O did not end within the time limit: [`IOC_BUFFER`] names the users), EOPNOTSUPP (a move to the
/// BAR of a part without a place there), ENODEV (the buffer is revoked, or the device gone), EACCES (the node
/// was opened read-only), EINTR (a signal; nothing has moved), ENOMEM, EBADF, EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Move {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf's file descriptor.
    pub fd: i32,
    /// In: `PLACEMENT_DEVICE` or `PLACEMENT_SYSTEM`.
    pub placement: u32,
    /// In: the part's offset in the buffer, in bytes.
    pub offset: u64,
    /// In: the part's length in bytes; zero means all bytes from `offset`.
    pub length: u64,
    /// In: the time limit for fences and direct I/O, in milliseconds.
    pub timeout_ms: u32,
    /// In and out: zero.
    pub reserved: u32,
    /// Out: the buffer's generation after the move; unchanged if nothing had to move.
    pub generation: u64,
    /// Out: the number of bytes copied.
    pub copied: u64,
}

/// [`IOC_REVOKE`]: revokes the access of importers and processes until it is restored.
///
/// No one gets new access from the call on, whatever it returns. If it returns 0 and `holders`, `fences` and
/// `pages` are zero, no access remains. Otherwise the time limit was reached: [`IOC_BUFFER`] names the
/// holders, and repeating the call waits for them again.
///
/// Errors: EINVAL, ENODEV, EACCES, EBADF, EFAULT, as for [`Move`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Revoke {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf's file descriptor.
    pub fd: i32,
    /// In: the time limit of the wait, in milliseconds.
    pub timeout_ms: u32,
    /// Out: the buffer's generation after the revoke.
    pub generation: u64,
    /// Out: the number of remaining mappings of importers.
    pub holders: u32,
    /// Out: 1 if a fence is unsignalled, otherwise 0.
    pub fences: u32,
    /// Out: the number of pages that direct I/O uses or a user keeps. In system memory, one page in use
    /// counts all pages of its block.
    pub pages: u64,
}

/// [`IOC_RESTORE`]: restores access to a revoked buffer, with a new generation.
///
/// System pages that a user keeps are left to the user, as [`Move`] describes; the 10 seconds begin with the
/// revoke. The buffer gets other pages, with the same bytes.
///
/// Errors: EBUSY (accesses from before the revoke remain), EALREADY (the buffer is not revoked), ENODEV,
/// EINVAL, EACCES, EBADF, EFAULT, as for [`Move`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Restore {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf's file descriptor.
    pub fd: i32,
    /// In and out: zero.
    pub reserved: u32,
    /// Out: the buffer's generation after the restore.
    pub generation: u64,
}

/// [`IOC_WATCH`] and [`IOC_UNWATCH`]: adds 1 to an eventfd at each move, revoke and restore of a buffer,
/// until the unwatch or until the node's file is closed.
///
/// Errors: EINVAL (also: not an eventfd), ENOENT (unwatch: no such watcher), ENOSPC (too many watchers),
/// ENODEV, EBADF, EFAULT, ENOMEM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Watch {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf's file descriptor.
    pub fd: i32,
    /// In: the eventfd's file descriptor.
    pub eventfd: i32,
}

/// One attachment in the answer to [`BufferQuery`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Attachment {
    /// The importing device's name, NUL-terminated and NUL-padded; a PCI address for PCI devices.
    pub device: [u8; 32],
    /// `ATTACHMENT_*` flags.
    pub flags: u32,
    /// The number of its mappings.
    pub mapped: u32,
    /// The number of its pins.
    pub pinned: u32,
    /// Zero.
    pub reserved: u32,
    /// The generation of its oldest mapping; zero without one.
    pub generation: u64,
}

/// One part of a buffer in the answer to [`BufferQuery`], in order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Piece {
    /// Length in bytes.
    pub length: u64,
    /// Offset in the BAR, in bytes, reserved also while the bytes are in system memory; all ones if the part
    /// has no place there.
    pub offset: u64,
    /// `PLACEMENT_DEVICE` or `PLACEMENT_SYSTEM`.
    pub placement: u32,
    /// Zero.
    pub reserved: u32,
}

/// [`IOC_BUFFER`]: a buffer's placement, users and statistics.
///
/// Errors: EINVAL, EBADF, EFAULT, ENOMEM, as for [`Move`]. Also works after the device is gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct BufferQuery {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf's file descriptor.
    pub fd: i32,
    /// Out: `STATE_*`.
    pub state: u32,
    /// Out: `PLACEMENT_*`.
    pub placement: u32,
    /// Out: the BAR's index.
    pub bar: u32,
    /// Out: the buffer's length in bytes.
    pub length: u64,
    /// Out: the generation: starts at 1; each move, revoke and restore increments it.
    pub generation: u64,
    /// In: the address of an array of [`Attachment`].
    pub attachments: u64,
    /// In: the address of an array of [`Piece`].
    pub pieces: u64,
    /// In: the capacity of the array of attachments. Out: the number of attachments, which may exceed the
    /// capacity.
    pub nr_attachments: u32,
    /// In: the capacity of the array of pieces. Out: the number of pieces, which may exceed the capacity.
    pub nr_pieces: u32,
    /// Out: the pins of all importers together.
    pub pins: u32,
    /// Out: 1 if there is a kernel mapping (`vmap`), otherwise 0.
    pub vmaps: u32,
    /// Out: the number of pages that CPU mappings or direct I/O use now.
    pub busy_pages: u64,
    /// Out: the number of moves, partial ones included.
    pub moves: u64,
    /// Out: the number of invalidations.
    pub invalidations: u64,
    /// Out: the number of mappings made for importers.
    pub maps: u64,
    /// Out: the number of bytes copied by moves.
    pub copied: u64,
    /// Out: the longest wait of a move or revoke, in nanoseconds.
    pub longest_wait_ns: u64,
    /// Out: the number of refused attachments.
    pub refusals: u64,
    /// Out: the device refused last, in the format of [`Attachment::device`].
    pub refused_device: [u8; 32],
    /// Out: the reason, a `REFUSED_*`.
    pub refused_reason: u32,
    /// Out: the errno of the refusal, positive.
    pub refused_errno: u32,
}

/// [`IOC_PROVIDER_OPEN`]: opens a device whose own driver has published P2PDMA memory, such as an NVMe disk
/// with a controller memory buffer.
///
/// The new file supports the ioctls of a node, with these differences. The one BAR with `BAR_EXPORT` is the
/// one that contains the memory; its free space is known only to sysfs (`p2pmem/available`), so [`Bar::free`]
/// and [`Bar::largest_free`] are zero. The pool chooses the offset of an export: `EXPORT_ANY_OFFSET` or
/// `RANGE_ANY_OFFSET` is required (EINVAL), and ENOSPC means that no free range is long enough. Exports are
/// zeroed. Unbinding the driver revokes all buffers permanently.
///
/// Errors: EINVAL (size, flags, padding, a malformed address), E2BIG (trailing bytes that are not zero),
/// ENXIO (no such PCI device), ENODEV (it has no driver), EOPNOTSUPP (its driver has published no memory, or
/// the device is bound to peerbuf.ko and has a node), ENOSPC (the pool is used up), EACCES (O_RDWR if
/// `/dev/peerbuf/provider` was opened read-only), EINTR, EMFILE, ENFILE, ENOMEM, EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ProviderOpen {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: flags of the new descriptor: `O_RDONLY` or `O_RDWR`, with or without `O_CLOEXEC`.
    pub fd_flags: u32,
    /// Out: the new file descriptor; zero on entry.
    pub fd: i32,
    /// In: the PCI address `DDDD:BB:DD.F`, NUL-terminated and NUL-padded.
    pub bdf: [u8; 16],
}
