// SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT

// The whole interface between peerbuf.ko and userspace: numbers and structs, nothing else. That of
// peerbuf_probe.ko is in `probe.rs`.
//
// This one file is compiled twice: into the crate `peerbuf-uapi` and, by `include!`, into
// peerbuf.ko. `include/peerbuf.h` says the same for C; a test compares the two, field by field.
//
// Rules of the interface:
// - Every struct begins with `size`, the caller's size of it in bytes. A kernel that knows a
//   shorter struct refuses trailing bytes that are not zero (E2BIG); one that knows a longer
//   struct takes what is missing as zero. A size below the first version's is EINVAL.
// - Unknown flags are EINVAL, and so is padding that is not zero.
// - On an error nothing has changed and nothing was written back; but with EFAULT part of an answer
//   may have been written.
// - The ioctl numbers carry no size (`_IO`), so they stay when a struct grows.

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

/// `_IO(0xBB, 0x03)`: moves a buffer's bytes, by [`Move`]. On the node of the device that
/// exported the buffer, like the ioctls that follow.
pub const IOC_MOVE: u32 = io(0x03);

/// `_IO(0xBB, 0x04)`: takes access to a buffer away, by [`Revoke`].
pub const IOC_REVOKE: u32 = io(0x04);

/// `_IO(0xBB, 0x05)`: gives access again, by [`Restore`].
pub const IOC_RESTORE: u32 = io(0x05);

/// `_IO(0xBB, 0x06)`: signals an eventfd when a buffer changes, by [`Watch`].
pub const IOC_WATCH: u32 = io(0x06);

/// `_IO(0xBB, 0x07)`: ends what [`IOC_WATCH`] began, by [`Watch`].
pub const IOC_UNWATCH: u32 = io(0x07);

/// `_IO(0xBB, 0x08)`: says where a buffer is and who uses it, by [`BufferQuery`].
pub const IOC_BUFFER: u32 = io(0x08);

/// `_IO(0xBB, 0x20)`: opens a provider, by [`ProviderOpen`]. On `/dev/peerbuf/provider`. What it
/// gives takes the ioctls of a `/dev/peerbuf/<BDF>` node.
pub const IOC_PROVIDER_OPEN: u32 = io(0x20);

/// The number of base address registers that a PCI function has.
pub const NUM_BARS: usize = 6;

/// The BAR is a memory BAR that is assigned an address, not an I/O port BAR and not absent.
pub const BAR_MEMORY: u32 = 1 << 0;
/// The BAR is prefetchable: reads have no side effects, writes may be combined.
pub const BAR_PREFETCHABLE: u32 = 1 << 1;
/// The BAR's address register is 64 bits wide.
pub const BAR_64BIT: u32 = 1 << 2;
/// Regions of the BAR can be exported as dma-bufs.
pub const BAR_EXPORT: u32 = 1 << 3;
/// CPU mappings of exports have struct pages, so `O_DIRECT` I/O on them is peer-to-peer DMA.
/// Without it such I/O fails with EFAULT, and a copy is needed.
pub const BAR_PAGES: u32 = 1 << 4;

/// Every `BAR_*` flag that this version knows.
pub const BAR_FLAGS: u32 = BAR_MEMORY | BAR_PREFETCHABLE | BAR_64BIT | BAR_EXPORT | BAR_PAGES;

/// The module chooses the offset; [`Export::offset`] is zero on entry and set on return.
pub const EXPORT_ANY_OFFSET: u32 = 1 << 0;

/// The buffer moves to system memory for importers that cannot use the BAR, instead of refusing
/// them.
pub const EXPORT_MAY_MOVE: u32 = 1 << 1;

/// No device may write to the buffer: a mapping in a direction in which one could is refused (EACCES), and
/// so is one in the kernel's address space. RDMA cards and graphics drivers map in both directions whatever
/// they are going to do, so they cannot use such a buffer.
pub const EXPORT_DEVICES_READ: u32 = 1 << 2;

/// Every `EXPORT_*` flag that this version knows.
pub const EXPORT_FLAGS: u32 = EXPORT_ANY_OFFSET | EXPORT_MAY_MOVE | EXPORT_DEVICES_READ;

/// [`Range`]: the module chooses the offset in the BAR; [`Range::offset`] is zero on entry.
pub const RANGE_ANY_OFFSET: u32 = 1 << 0;
/// [`Range`]: system memory, with no place in the BAR; [`Range::offset`] is zero.
pub const RANGE_SYSTEM: u32 = 1 << 1;

/// Every `RANGE_*` flag that a caller may set.
pub const RANGE_FLAGS: u32 = RANGE_ANY_OFFSET | RANGE_SYSTEM;

/// The most ranges of one export.
pub const MAX_RANGES: usize = 1024;

/// Placement: the bytes are in the device's BAR.
pub const PLACEMENT_DEVICE: u32 = 1;
/// Placement: the bytes are in system memory.
pub const PLACEMENT_SYSTEM: u32 = 2;
/// Placement: some ranges are in the BAR and some in system memory. Never asked for.
pub const PLACEMENT_MIXED: u32 = 3;

/// [`BufferQuery::state`]: the buffer can be used.
pub const STATE_LIVE: u32 = 1;
/// [`BufferQuery::state`]: access was taken away and can be given again.
pub const STATE_REVOKED: u32 = 2;
/// [`BufferQuery::state`]: access was taken away for good, since the device is gone.
pub const STATE_GONE: u32 = 3;

/// [`Attachment`]: the importer can be told that its mappings are stale.
pub const ATTACHMENT_REVOCABLE: u32 = 1 << 0;
/// [`Attachment`]: the importer takes part in the dynamic rules (it has importer operations).
pub const ATTACHMENT_DYNAMIC: u32 = 1 << 1;
/// [`Attachment`]: the importer can use peer memory.
pub const ATTACHMENT_PEER: u32 = 1 << 2;
/// [`Attachment`]: keeps the buffer in system memory as long as it is attached.
pub const ATTACHMENT_NEEDS_SYSTEM: u32 = 1 << 3;
/// [`Attachment`]: has a mapping from before the last move or revoke.
pub const ATTACHMENT_STALE: u32 = 1 << 4;

/// [`BufferQuery::refused_reason`]: nobody was refused.
pub const REFUSED_NOBODY: u32 = 0;
/// [`BufferQuery::refused_reason`]: the importer did not ask for peer memory (EOPNOTSUPP).
pub const REFUSED_NOT_PEER: u32 = 1;
/// [`BufferQuery::refused_reason`]: the importer cannot be told that a mapping is stale
/// (EOPNOTSUPP).
pub const REFUSED_NOT_REVOCABLE: u32 = 2;
/// [`BufferQuery::refused_reason`]: the kernel sees no route between the devices (EREMOTEIO).
pub const REFUSED_NO_ROUTE: u32 = 3;
/// [`BufferQuery::refused_reason`]: the buffer could not be moved to system memory: it is pinned
/// or in use (EBUSY), or there is no memory (ENOMEM).
pub const REFUSED_MOVE_FAILED: u32 = 4;

/// What one BAR is, and how much of it is free. All sizes are in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Bar {
    /// Size of the BAR; 0 where the function has no such BAR.
    pub size: u64,
    /// Bytes in no export.
    pub free: u64,
    /// The longest run of free bytes, which is the largest export possible now.
    pub largest_free: u64,
    /// Exports whose range is taken.
    pub exports: u32,
    /// `BAR_*` flags.
    pub flags: u32,
}

/// [`IOC_QUERY`]: what the device is and what its BARs can do.
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
    /// Out: offsets and lengths of exports are multiples of this many bytes.
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

/// [`IOC_EXPORT`]: makes a dma-buf of `length` bytes of a BAR.
///
/// Errors: EINVAL (size, flags, padding, no such BAR, not a memory BAR, a length of zero, an
/// offset or length that is not a multiple of the page size, a range that ends beyond the BAR),
/// EOVERFLOW (offset and length together exceed 64 bits), E2BIG (trailing bytes that are not
/// zero), EOPNOTSUPP (the BAR is below a page), EBUSY (another export, or I/O that outlived one,
/// holds part of the range), ENOSPC (no free run is that long), ENODEV (the device is gone), EAGAIN
/// (it is being reset, or recovers from an error), EACCES (a descriptor for writing, by a node that was opened read-only),
/// EMFILE, ENFILE, ENOMEM, EFAULT.
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
    /// In: how the descriptor is opened: `O_RDONLY` or `O_RDWR`, with or without `O_CLOEXEC`.
    pub fd_flags: u32,
    /// In and out: where in the BAR the export begins, in bytes.
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
    /// In and out: where in the BAR the range begins, in bytes; zero for system memory.
    pub offset: u64,
    /// In: the range's length in bytes.
    pub length: u64,
    /// In: `RANGE_*` flags.
    pub flags: u32,
    /// In and out: zero.
    pub reserved: u32,
}

/// [`IOC_EXPORT_RANGES`]: makes one dma-buf of ranges of one BAR and of system memory, in the
/// order given.
///
/// Errors: as [`Export`], for each range; EINVAL also for no range, more than [`MAX_RANGES`], a
/// total length that is no positive 63-bit number, `EXPORT_ANY_OFFSET` among the flags; EBUSY also
/// for ranges that overlap; ENOMEM where there is not enough system memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ExportRanges {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: `EXPORT_*` flags, without `EXPORT_ANY_OFFSET`.
    pub flags: u32,
    /// In: the BAR's index, 0 to 5, the same for each range.
    pub bar: u32,
    /// In: as [`Export::fd_flags`].
    pub fd_flags: u32,
    /// In: the address of an array of [`Range`]; the offsets are filled in.
    pub ranges: u64,
    /// In: the number of ranges.
    pub nr_ranges: u32,
    /// Out: the dma-buf's file descriptor; zero on entry.
    pub fd: i32,
    /// Out: the length of the dma-buf in bytes; zero on entry.
    pub length: u64,
}

/// [`IOC_MOVE`]: takes the bytes of a buffer, or of a page-aligned part, to the BAR or to system
/// memory. Mappings made before are invalidated, and keep their old backing until they are
/// unmapped. Ranges that are there already stay as they are.
///
/// Pages of system memory that somebody keeps, in a pipe for example (`vmsplice`), do not keep the bytes
/// from moving: when the time is over, they are left to him with the bytes that they have, and he sees
/// none of what comes after. Where a device may be at work on them (direct I/O, registrations of io_uring or
/// of an RDMA card), that is done only after 10 seconds; with a lower limit the move fails with EBUSY. What
/// such a device writes after that is not in the buffer.
///
/// Errors: EINVAL (size, flags, padding, placement, a part that is not page-aligned or not inside
/// the buffer, a descriptor that is no dma-buf of this device), EBUSY (the buffer is pinned or has
/// a kernel mapping; a move to the BAR while an importer needs system memory, or still has a stale
/// mapping of the BAR; fences or direct I/O did not end within the time limit:
/// [`IOC_BUFFER`] tells who), EOPNOTSUPP (a move to the BAR of a part without a place there),
/// ENODEV (the buffer is revoked, or the device gone), EACCES (the node was opened read-only),
/// EINTR (a signal came; nothing has moved), ENOMEM, EBADF, EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Move {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf.
    pub fd: i32,
    /// In: `PLACEMENT_DEVICE` or `PLACEMENT_SYSTEM`.
    pub placement: u32,
    /// In: where the part begins in the buffer, in bytes.
    pub offset: u64,
    /// In: the part's length in bytes; zero for all that follows `offset`.
    pub length: u64,
    /// In: how long to wait for fences and direct I/O, in milliseconds.
    pub timeout_ms: u32,
    /// In and out: zero.
    pub reserved: u32,
    /// Out: the generation that the buffer has now; unchanged if nothing had to move.
    pub generation: u64,
    /// Out: bytes that were copied.
    pub copied: u64,
}

/// [`IOC_REVOKE`]: takes access away from importers and processes until it is given again.
///
/// From the call on nobody gets new access, whatever it returns. A return of 0 with no
/// `holders` and no `pages` says that nobody can reach the memory any more. Otherwise the time ran
/// out: [`IOC_BUFFER`] names the holders, and the call may be repeated to wait for them again.
///
/// Errors: EINVAL, ENODEV, EACCES, EBADF, EFAULT, as [`Move`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Revoke {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf.
    pub fd: i32,
    /// In: how long to wait, in milliseconds.
    pub timeout_ms: u32,
    /// Out: the generation that the buffer has now.
    pub generation: u64,
    /// Out: mappings that importers still have.
    pub holders: u32,
    /// Out: fences that are not signalled: 1 if any, otherwise 0.
    pub fences: u32,
    /// Out: pages that direct I/O still uses, or that somebody keeps. Of system memory all pages of a block
    /// count, of which one is in use.
    pub pages: u64,
}

/// [`IOC_RESTORE`]: gives access to a revoked buffer again, with a new generation.
///
/// Pages of system memory that somebody keeps are left to him, as [`Move`] says, the 10 seconds beginning
/// with the revoke: the buffer gets others, with the same bytes.
///
/// Errors: EBUSY (somebody still holds it from before), EALREADY (it is not revoked), ENODEV,
/// EINVAL, EACCES, EBADF, EFAULT, as [`Move`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Restore {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf.
    pub fd: i32,
    /// In and out: zero.
    pub reserved: u32,
    /// Out: the generation that the buffer has now.
    pub generation: u64,
}

/// [`IOC_WATCH`] and [`IOC_UNWATCH`]: adds 1 to an eventfd with each move, revoke and restore of a
/// buffer, until told otherwise or until the node's descriptor is closed.
///
/// Errors: EINVAL (also: no eventfd), ENOENT (unwatch: not watched by it), ENOSPC (too many
/// watchers), ENODEV, EBADF, EFAULT, ENOMEM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Watch {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf.
    pub fd: i32,
    /// In: the eventfd.
    pub eventfd: i32,
}

/// One attachment, as [`BufferQuery`] lists them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Attachment {
    /// The importing device's name, NUL-terminated and NUL-padded; a PCI address for PCI devices.
    pub device: [u8; 32],
    /// `ATTACHMENT_*` flags.
    pub flags: u32,
    /// Mappings that it has now.
    pub mapped: u32,
    /// How often it has pinned the buffer.
    pub pinned: u32,
    /// Zero.
    pub reserved: u32,
    /// The generation of its oldest mapping; zero without one.
    pub generation: u64,
}

/// One part of a buffer, as [`BufferQuery`] lists them in order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Piece {
    /// Its length in bytes.
    pub length: u64,
    /// Its place in the BAR, in bytes, kept also while the bytes are in system memory; all ones
    /// for none.
    pub offset: u64,
    /// `PLACEMENT_DEVICE` or `PLACEMENT_SYSTEM`.
    pub placement: u32,
    /// Zero.
    pub reserved: u32,
}

/// [`IOC_BUFFER`]: where a buffer is, who uses it, and what has happened to it.
///
/// Errors: EINVAL, EBADF, EFAULT, ENOMEM, as [`Move`]. It answers for a buffer whose device is
/// gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct BufferQuery {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: the dma-buf.
    pub fd: i32,
    /// Out: `STATE_*`.
    pub state: u32,
    /// Out: `PLACEMENT_*`.
    pub placement: u32,
    /// Out: the BAR's index.
    pub bar: u32,
    /// Out: the buffer's length in bytes.
    pub length: u64,
    /// Out: begins at 1, and rises with each move, revoke and restore.
    pub generation: u64,
    /// In: the address of an array of [`Attachment`].
    pub attachments: u64,
    /// In: the address of an array of [`Piece`].
    pub pieces: u64,
    /// In: how many attachments the array can take. Out: how many there are, also where that is
    /// more.
    pub nr_attachments: u32,
    /// In: how many pieces the array can take. Out: how many there are, also where that is more.
    pub nr_pieces: u32,
    /// Out: pins of all importers.
    pub pins: u32,
    /// Out: kernel mappings (`vmap`): 1 if there are any, otherwise 0.
    pub vmaps: u32,
    /// Out: pages that CPU mappings or direct I/O use now.
    pub busy_pages: u64,
    /// Out: moves of any part.
    pub moves: u64,
    /// Out: how often importers were told that their mappings are stale.
    pub invalidations: u64,
    /// Out: mappings made for importers.
    pub maps: u64,
    /// Out: bytes copied by moves.
    pub copied: u64,
    /// Out: the longest that a move or revoke has waited for others, in nanoseconds.
    pub longest_wait_ns: u64,
    /// Out: importers that were refused.
    pub refusals: u64,
    /// Out: the device that was refused last, as [`Attachment::device`].
    pub refused_device: [u8; 32],
    /// Out: `REFUSED_*`: why.
    pub refused_reason: u32,
    /// Out: the errno that it was given, positive.
    pub refused_errno: u32,
}

/// [`IOC_PROVIDER_OPEN`]: opens a device whose own driver has published memory for peers, such as an
/// NVMe disk with a controller memory buffer.
///
/// The descriptor takes the ioctls of a node, with these differences. The one BAR with `BAR_EXPORT`
/// is that in which the memory is; how much of it is free nobody but sysfs knows
/// (`p2pmem/available`), so [`Bar::free`] and [`Bar::largest_free`] are zero. The pool chooses the
/// place of exports: `EXPORT_ANY_OFFSET` or `RANGE_ANY_OFFSET` is needed (EINVAL), and ENOSPC says
/// that there is no run of that length left. Exports begin as zeroes. When the driver is unbound,
/// buffers are revoked for good.
///
/// Errors: EINVAL (size, flags, padding, a malformed address), E2BIG (trailing bytes that are not
/// zero), ENXIO (no such PCI device), ENODEV (it has no driver), EOPNOTSUPP (that has published no
/// memory, or the device is bound to peerbuf.ko and has a node), ENOSPC (all of the memory is taken),
/// EACCES (for writing, where `/dev/peerbuf/provider` was opened read-only), EINTR, EMFILE, ENFILE, ENOMEM,
/// EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ProviderOpen {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: how the descriptor is opened: `O_RDONLY` or `O_RDWR`, with or without `O_CLOEXEC`.
    pub fd_flags: u32,
    /// Out: the descriptor; zero on entry.
    pub fd: i32,
    /// In: the PCI address `DDDD:BB:DD.F`, NUL-terminated and NUL-padded.
    pub bdf: [u8; 16],
}
