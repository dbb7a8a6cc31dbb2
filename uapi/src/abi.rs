// SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT

// The whole interface between peerbuf.ko and userspace: numbers and structs, nothing else.
//
// This one file is compiled twice: into the crate `peerbuf-uapi` and, by `include!`, into
// peerbuf.ko. `include/peerbuf.h` says the same for C; a test compares the two, field by field.
//
// Rules of the interface:
// - Every struct begins with `size`, the caller's size of it in bytes. A kernel that knows a
//   shorter struct refuses trailing bytes that are not zero (E2BIG); one that knows a longer
//   struct takes what is missing as zero. A size below the first version's is EINVAL.
// - Unknown flags are EINVAL, and so is padding that is not zero.
// - On an error nothing has changed and nothing was written back.
// - The ioctl numbers carry no size (`_IO`), so they stay when a struct grows.

/// The version of this interface, reported by [`IOC_QUERY`].
pub const ABI_VERSION: u32 = 1;

/// The ioctl type byte, shared by all of peerbuf's ioctls.
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

/// Every `EXPORT_*` flag that this version knows.
pub const EXPORT_FLAGS: u32 = EXPORT_ANY_OFFSET;

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
/// holds part of the range), ENOSPC (no free run is that long), ENODEV (the device is gone),
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
