// SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT

// The interface between peerbuf.ko and userspace: ioctl numbers and structs. `probe.rs` has that of
// peerbuf_probe.ko.
//
// This file is compiled twice: into the crate `peerbuf-uapi` and, with `include!`, into peerbuf.ko.
// `include/peerbuf.h` declares the same for C; a test compares the two, field by field.
//
// Rules of the interface (ABI 2):
// - Every struct begins with `size`, its size in bytes as the caller knows it. Structs grow at the end, as those of
//   `copy_struct_from_user` do. A kernel that knows fewer bytes than the caller refuses further bytes that are not
//   zero (E2BIG), and answers with zeros there. A kernel that knows more takes the missing bytes as zeros, and writes
//   only as many bytes as the caller has.
// - Each struct has a minimum size, `*_MIN_SIZE`, which never changes: EINVAL below it. A caller who does not need
//   the last fields of an answer passes a shorter struct. More than a page is E2BIG.
// - Entries of arrays grow in the same way. Their size is a field of the struct that names the array.
// - Unknown and reserved flags are EINVAL, and so is padding that is not zero, and an output field that is not zero
//   on entry, where its comment says so.
// - On an error nothing has changed and nothing was written back, with two exceptions: EFAULT may leave a partly
//   written answer, and a move that fails with EBUSY says what is in the way.
// - The ioctl numbers encode no size (`_IO`), so they stay the same when a struct grows.
// - What a module can do is in [`Query::features`]. There is no version.
// - A PCI address is a number: bits 0 to 2 are the function, 3 to 7 the device, 8 to 15 the bus, and 16 to 47 the
//   domain. See [`pci_address`].

/// [`Query::features`]: [`IOC_EXPORT`], with ranges of one BAR and of system memory.
pub const FEATURE_EXPORT: u64 = 1 << 0;
/// [`Query::features`]: [`IOC_MOVE`], which says what is in the way.
pub const FEATURE_MOVE: u64 = 1 << 1;
/// [`Query::features`]: [`IOC_REVOKE`], temporary and permanent, and [`IOC_RESTORE`].
pub const FEATURE_REVOKE: u64 = 1 << 2;
/// [`Query::features`]: [`IOC_WATCH`] with each `EVENT_*`.
pub const FEATURE_WATCH: u64 = 1 << 3;
/// [`Query::features`]: [`IOC_PROVIDER_OPEN`].
pub const FEATURE_PROVIDER: u64 = 1 << 4;
/// [`Query::features`]: the ranges of one export may be in several BARs. Reserved: no module has it yet.
pub const FEATURE_SEVERAL_BARS: u64 = 1 << 5;

/// The features of this version's module.
pub const FEATURES: u64 =
    FEATURE_EXPORT | FEATURE_MOVE | FEATURE_REVOKE | FEATURE_WATCH | FEATURE_PROVIDER;

/// A PCI address as a number.
pub const fn pci_address(domain: u32, bus: u8, device: u8, function: u8) -> u64 {
    (domain as u64) << 16 | (bus as u64) << 8 | (device as u64 & 0x1f) << 3 | function as u64 & 7
}

/// The length of a device's name, NUL-padded. The last byte is NUL.
pub const DEVICE_NAME_LEN: usize = 64;

/// The ioctl type byte of peerbuf.ko's ioctls.
pub const IOC_MAGIC: u8 = 0xBB;

/// `_IO(IOC_MAGIC, number)`.
const fn io(number: u32) -> u32 {
    ((IOC_MAGIC as u32) << 8) | number
}

/// `_IO(0xBB, 0x00)`: fills a [`Query`]. On a `/dev/peerbuf/<BDF>` node.
pub const IOC_QUERY: u32 = io(0x00);

/// `_IO(0xBB, 0x01)`: exports ranges as one dma-buf, by [`Export`]. On a `/dev/peerbuf/<BDF>` node. (0x02 is not
/// used.)
pub const IOC_EXPORT: u32 = io(0x01);

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

/// The buffer moves to system memory for importers that cannot use the BAR; without this flag they are
/// refused.
pub const EXPORT_MAY_MOVE: u32 = 1 << 0;

/// Devices may only read the buffer: mapping it in a direction that allows a device to write is refused
/// (EACCES), and so is a kernel mapping (`vmap`). RDMA cards and graphics drivers map in both directions
/// regardless of their use, so they cannot use such a buffer.
pub const EXPORT_DEVICES_READ: u32 = 1 << 1;

/// The bits of [`Export::flags`] that choose the cache mode of the processes' mappings of the BAR: a number, not
/// flags. Zero means write-combining for a BAR with [`BAR_WRITE_COMBINING`]: writes wait in the CPU, in any order,
/// until the end of the access (`DMA_BUF_IOCTL_SYNC`) or a store fence. For another BAR it means uncached. Numbers
/// without a name are reserved.
pub const EXPORT_CACHE_MASK: u32 = 0xf << 4;

/// Cache mode: processes map the BAR uncached: each access reaches the device, in order.
pub const EXPORT_UNCACHED: u32 = 1 << 4;

/// Every flag of [`Export::flags`] that this version knows. (Bit 8 is reserved, for clearing the bytes.)
pub const EXPORT_FLAGS: u32 = EXPORT_MAY_MOVE | EXPORT_DEVICES_READ | EXPORT_UNCACHED;

/// [`Range`]: the module chooses the offset in the BAR; [`Range::offset`] is zero on entry.
pub const RANGE_ANY_OFFSET: u32 = 1 << 0;
/// [`Range`]: system memory without a place in the BAR; [`Range::offset`] is zero.
pub const RANGE_SYSTEM: u32 = 1 << 1;

/// Every `RANGE_*` flag that a caller may set. (Bits 24 to 29 are reserved, for the binary logarithm of an alignment.)
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
/// [`BufferQuery::state`]: the buffer is temporarily revoked.
pub const STATE_REVOKED: u32 = 2;
/// [`BufferQuery::state`]: the buffer is permanently revoked, by its owner or because its device is gone.
pub const STATE_GONE: u32 = 3;

/// [`BufferQuery::reasons`]: the owner has revoked the buffer ([`IOC_REVOKE`]).
pub const REASON_OWNER: u32 = 1 << 0;
/// [`BufferQuery::reasons`]: the device is being reset.
pub const REASON_RESET: u32 = 1 << 1;
/// [`BufferQuery::reasons`]: the device is gone, permanently.
pub const REASON_GONE: u32 = 1 << 2;
/// [`BufferQuery::reasons`]: a PCI error was reported, and the PCI core has not recovered the device, or cannot; or an
/// importer has kept a mapping since.
pub const REASON_ERROR: u32 = 1 << 3;
/// [`BufferQuery::reasons`]: the device sleeps: the system is suspended or hibernates.
pub const REASON_POWER: u32 = 1 << 4;

/// Every `REASON_*` that this version knows.
pub const REASON_FLAGS: u32 =
    REASON_OWNER | REASON_RESET | REASON_GONE | REASON_ERROR | REASON_POWER;

/// [`Revoke`]: the revoke is permanent: [`IOC_RESTORE`] fails (ENODEV). Without this flag it is temporary. A permanent
/// revoke of a temporarily revoked buffer makes the revoke permanent, not the other way round.
pub const REVOKE_PERMANENT: u32 = 1 << 0;

/// [`Watch`]: the buffer, or part of it, has moved.
pub const EVENT_MOVED: u64 = 1 << 0;
/// [`Watch`]: the buffer was revoked. A further reason for the same revoke is no event.
pub const EVENT_REVOKED: u64 = 1 << 1;
/// [`Watch`]: the buffer was restored.
pub const EVENT_RESTORED: u64 = 1 << 2;
/// [`Watch`]: no holder keeps the buffer from moving to the BAR any more: the last pin, the kernel mapping, the last
/// importer that needs system memory, or the last old mapping of the BAR is gone. If there is none at the watch, the
/// eventfd is signalled at once. The end of fences and of the use of pages is no event: a move waits for those,
/// within its time limit.
pub const EVENT_MOVABLE_TO_DEVICE: u64 = 1 << 3;
/// [`Watch`]: as [`EVENT_MOVABLE_TO_DEVICE`], for a move to system memory: the last pin or the kernel mapping is gone.
pub const EVENT_MOVABLE_TO_SYSTEM: u64 = 1 << 4;

/// Every `EVENT_*` that this version knows.
pub const EVENT_FLAGS: u64 = EVENT_MOVED
    | EVENT_REVOKED
    | EVENT_RESTORED
    | EVENT_MOVABLE_TO_DEVICE
    | EVENT_MOVABLE_TO_SYSTEM;

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
    pub exports: u64,
    /// `BAR_*` flags.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
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
    /// Out: `FEATURE_*`.
    pub features: u64,
    /// Out: the PCI address.
    pub address: u64,
    /// Out: the PCI vendor id.
    pub vendor: u16,
    /// Out: the PCI device id.
    pub device: u16,
    /// Out: the granularity in bytes of offsets and lengths of exports.
    pub page_size: u32,
    /// Out: one entry per BAR.
    pub bars: [Bar; NUM_BARS],
}

/// The minimum of [`Query::size`]: without the BARs.
pub const QUERY_MIN_SIZE: usize = 32;

/// One range of an [`Export`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Range {
    /// In and out: the range's offset in the BAR, in bytes; zero for system memory.
    pub offset: u64,
    /// In: the range's length in bytes.
    pub length: u64,
    /// In: the BAR's index, 0 to 5; zero for system memory.
    pub bar: u32,
    /// In: `RANGE_*` flags.
    pub flags: u32,
}

/// The minimum of [`Export::range_size`].
pub const RANGE_MIN_SIZE: usize = 24;

/// [`IOC_EXPORT`]: exports ranges of a BAR and of system memory as one dma-buf, in the given order.
///
/// Errors: EINVAL (size, flags, padding; no range, more than [`MAX_RANGES`]; no such BAR, not a memory BAR, a length of
/// zero, an offset or length that is not a multiple of the page size, a range that ends beyond the BAR; a total length
/// that is not a positive signed 64-bit number), EOVERFLOW (offset plus length exceeds 64 bits), E2BIG (trailing bytes
/// that are not zero), EOPNOTSUPP (the BAR is smaller than a page; ranges in different BARs, see
/// [`FEATURE_SEVERAL_BARS`]), EBUSY (another export, another range, or I/O that outlived an export uses part of a
/// range), ENOSPC (no free range is long enough), ENODEV (the device is gone), EAGAIN (it is being reset, recovers from
/// an error, or sleeps), EACCES (O_RDWR on a node that was opened read-only), EMFILE, ENFILE, ENOMEM (also: system
/// memory is short), EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Export {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: `EXPORT_*` flags.
    pub flags: u32,
    /// In: flags of the new descriptor: `O_RDONLY` or `O_RDWR`, with or without `O_CLOEXEC`.
    pub fd_flags: u32,
    /// Out: the dma-buf's file descriptor; zero on entry.
    pub fd: i32,
    /// In: the address of an array of [`Range`], whose offsets are filled in.
    pub ranges: u64,
    /// In: the number of ranges.
    pub nr_ranges: u32,
    /// In: the size of an entry of the array as the caller knows it.
    pub range_size: u32,
    /// Out: the length of the dma-buf in bytes; zero on entry.
    pub length: u64,
}

/// The minimum of [`Export::size`].
pub const EXPORT_MIN_SIZE: usize = 40;

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
/// direct I/O did not end within the time limit; [`IOC_BUFFER`] names the users), EOPNOTSUPP (a move to the
/// BAR of a part without a place there), ENODEV (the buffer is revoked, or the device gone), EACCES (the node
/// was opened read-only), EINTR (a signal; nothing has moved), ENOMEM, EBADF, EFAULT.
///
/// After EBUSY the last four fields say what was in the way when the move gave up. All four are zero if that was
/// another move.
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
    /// Out: the buffer's generation after the move; unchanged if nothing had to move. Zero on entry.
    pub generation: u64,
    /// Out: the number of bytes copied; zero on entry.
    pub copied: u64,
    /// Out, after EBUSY: the kernel mapping, and for a move to the BAR the importers that need system memory and the
    /// old mappings of the BAR. Zero on entry, as the following.
    pub holders: u64,
    /// Out, after EBUSY: the number of fences that were unsignalled.
    pub fences: u64,
    /// Out, after EBUSY: the number of pages of the part that CPU mappings or direct I/O used, counted as in
    /// [`Revoke::pages`].
    pub pages: u64,
    /// Out, after EBUSY: the pins of all importers together.
    pub pins: u64,
}

/// The minimum of [`Move::size`]: without what is in the way.
pub const MOVE_MIN_SIZE: usize = 56;

/// [`IOC_REVOKE`]: revokes the access of importers and processes, temporarily or permanently.
///
/// No one gets new access from the call on, whatever it returns. If it returns 0 and `holders`, `fences` and
/// `pages` are zero, no access remains. Otherwise the time limit was reached: [`IOC_BUFFER`] names the
/// holders, and repeating the call waits for them again.
///
/// Errors: EINVAL, E2BIG, ENODEV, EACCES, EBADF, EFAULT, as for [`Move`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Revoke {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: [`REVOKE_PERMANENT`], or zero for a temporary revoke.
    pub flags: u32,
    /// In: the dma-buf's file descriptor.
    pub fd: i32,
    /// In: the time limit of the wait, in milliseconds.
    pub timeout_ms: u32,
    /// Out: the buffer's generation after the revoke; zero on entry, as the following.
    pub generation: u64,
    /// Out: the number of remaining mappings of importers, the kernel mapping included.
    pub holders: u64,
    /// Out: the number of fences from before the revoke that are unsignalled.
    pub fences: u64,
    /// Out: the number of pages that direct I/O uses or a user keeps. In system memory, one page in use
    /// counts all pages of its block.
    pub pages: u64,
}

/// The minimum of [`Revoke::size`].
pub const REVOKE_MIN_SIZE: usize = 48;

/// Every flag of [`Revoke::flags`] that this version knows.
pub const REVOKE_FLAGS: u32 = REVOKE_PERMANENT;

/// [`IOC_RESTORE`]: restores access to a revoked buffer, with a new generation.
///
/// System pages that a user keeps are left to the user, as [`Move`] describes; the 10 seconds begin with the
/// revoke. The buffer gets other pages, with the same bytes.
///
/// Errors: EBUSY (accesses from before the revoke remain), EALREADY (the owner has not revoked the buffer), ENODEV (the
/// revoke is permanent, or the device gone), EINTR (a fatal signal), ENOMEM, EINVAL, E2BIG, EACCES, EBADF, EFAULT, as
/// for [`Move`].
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
    /// Out: the buffer's generation after the restore; zero on entry.
    pub generation: u64,
}

/// The minimum of [`Restore::size`].
pub const RESTORE_MIN_SIZE: usize = 24;

/// [`IOC_WATCH`] and [`IOC_UNWATCH`]: adds 1 to an eventfd at each of the named events of a buffer, until the
/// unwatch or until the node's file is closed.
///
/// Errors: EINVAL (also: not an eventfd, no event), E2BIG, ENOENT (unwatch: no such watcher), ENOSPC (too many watchers),
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
    /// In: `EVENT_*`; zero for [`IOC_UNWATCH`].
    pub events: u64,
}

/// The minimum of [`Watch::size`].
pub const WATCH_MIN_SIZE: usize = 24;

/// One attachment in the answer to [`BufferQuery`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Attachment {
    /// The importing device's name; a PCI address as text for PCI devices.
    pub device: [u8; DEVICE_NAME_LEN],
    /// `ATTACHMENT_*` flags.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// The number of its mappings.
    pub mapped: u64,
    /// The number of its pins.
    pub pinned: u64,
    /// The generation of its oldest mapping; zero without one.
    pub generation: u64,
}

impl Default for Attachment {
    fn default() -> Self {
        Self {
            device: [0; DEVICE_NAME_LEN],
            flags: 0,
            reserved: 0,
            mapped: 0,
            pinned: 0,
            generation: 0,
        }
    }
}

/// The minimum of [`BufferQuery::attachment_size`].
pub const ATTACHMENT_MIN_SIZE: usize = 96;

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
    /// The BAR's index; all ones if the part has no place in a BAR.
    pub bar: u32,
    /// `PLACEMENT_DEVICE` or `PLACEMENT_SYSTEM`.
    pub placement: u32,
}

/// The minimum of [`BufferQuery::piece_size`].
pub const PIECE_MIN_SIZE: usize = 24;

/// [`IOC_BUFFER`]: a buffer's placement, users and statistics.
///
/// Errors: EINVAL (also: an array's entries are shorter than the minimum), E2BIG, EBADF, EFAULT, ENOMEM, as for
/// [`Move`]. Also works after the device is gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Out: the generation: starts at 1; each move, revoke and restore increments it.
    pub generation: u64,
    /// Out: the buffer's length in bytes.
    pub length: u64,
    /// Out: `PLACEMENT_*`.
    pub placement: u32,
    /// Out: why the buffer is revoked: `REASON_*`; zero if it is not.
    pub reasons: u32,
    /// In: the address of an array of [`Attachment`].
    pub attachments: u64,
    /// In: the address of an array of [`Piece`].
    pub pieces: u64,
    /// In: the capacity of the array of attachments. Out: the number of attachments, which may exceed the
    /// capacity.
    pub nr_attachments: u32,
    /// In: the size of an entry of that array as the caller knows it; ignored if the capacity is zero.
    pub attachment_size: u32,
    /// In: the capacity of the array of pieces. Out: the number of pieces, which may exceed the capacity.
    pub nr_pieces: u32,
    /// In: the size of an entry of that array as the caller knows it; ignored if the capacity is zero.
    pub piece_size: u32,
    /// Out: the pins of all importers together.
    pub pins: u64,
    /// Out: the number of kernel mappings (`vmap`): 1 or 0, since importers share it.
    pub vmaps: u64,
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
    pub refused_device: [u8; DEVICE_NAME_LEN],
    /// Out: the reason, a `REFUSED_*`.
    pub refused_reason: u32,
    /// Out: the errno of the refusal, positive.
    pub refused_errno: u32,
}

impl Default for BufferQuery {
    fn default() -> Self {
        Self {
            size: 0,
            flags: 0,
            fd: 0,
            state: 0,
            generation: 0,
            length: 0,
            placement: 0,
            reasons: 0,
            attachments: 0,
            pieces: 0,
            nr_attachments: 0,
            attachment_size: 0,
            nr_pieces: 0,
            piece_size: 0,
            pins: 0,
            vmaps: 0,
            busy_pages: 0,
            moves: 0,
            invalidations: 0,
            maps: 0,
            copied: 0,
            longest_wait_ns: 0,
            refusals: 0,
            refused_device: [0; DEVICE_NAME_LEN],
            refused_reason: 0,
            refused_errno: 0,
        }
    }
}

/// The minimum of [`BufferQuery::size`]: without the lists and the statistics.
pub const BUFFER_QUERY_MIN_SIZE: usize = 40;

/// [`IOC_PROVIDER_OPEN`]: opens a device whose own driver has published P2PDMA memory, such as an NVMe disk
/// with a controller memory buffer.
///
/// The new file supports the ioctls of a node, with these differences. The one BAR with `BAR_EXPORT` is the
/// one that contains the memory; its free space is known only to sysfs (`p2pmem/available`), so [`Bar::free`]
/// and [`Bar::largest_free`] are zero. The pool chooses the offset of a range: `RANGE_ANY_OFFSET` is required
/// (EINVAL), and ENOSPC means that no free range is long enough. Exports are
/// zeroed. Unbinding the driver revokes all buffers permanently.
///
/// Errors: EINVAL (size, flags, padding, not an address), E2BIG (trailing bytes that are not zero),
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
    /// In: the PCI address.
    pub address: u64,
}

/// The minimum of [`ProviderOpen::size`].
pub const PROVIDER_OPEN_MIN_SIZE: usize = 24;
