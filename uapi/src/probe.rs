// SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT

// The interface between peerbuf_probe.ko and userspace: ioctl numbers and structs. The rules are those of
// `abi.rs`.
//
// `/dev/peerbuf/importer` attaches dma-bufs of any exporter on behalf of a PCI device. Each attachment is a
// file of its own. It gives access neither to the bytes nor to DMA addresses.
//
// This file is compiled twice: into the crate `peerbuf-uapi` and into peerbuf_probe.ko.
// `include/peerbuf_probe.h` declares the same for C; a test compares the two.

/// The ioctl type byte of peerbuf_probe.ko's ioctls.
pub const IOC_MAGIC: u8 = 0xBC;

/// `_IO(IOC_MAGIC, number)`.
const fn io(number: u32) -> u32 {
    ((IOC_MAGIC as u32) << 8) | number
}

/// `_IO(0xBC, 0x00)`: attaches a dma-buf, by [`Attach`]. On `/dev/peerbuf/importer`.
pub const IOC_ATTACH: u32 = io(0x00);
/// `_IO(0xBC, 0x01)`: maps the buffer, by [`Map`]. This and the following: on an attachment.
pub const IOC_MAP: u32 = io(0x01);
/// `_IO(0xBC, 0x02)`: unmaps the buffer, by [`Step`]. ENOENT: not mapped.
pub const IOC_UNMAP: u32 = io(0x02);
/// `_IO(0xBC, 0x03)`: pins the buffer, by [`Step`]. EINVAL: a static attachment, which the kernel pins while
/// it is mapped; EBUSY: already pinned; or the exporter's error.
pub const IOC_PIN: u32 = io(0x03);
/// `_IO(0xBC, 0x04)`: unpins the buffer, by [`Step`]. ENOENT: not pinned; EBUSY: mapped by an importer whose
/// mappings cannot be invalidated.
pub const IOC_UNPIN: u32 = io(0x04);
/// `_IO(0xBC, 0x05)`: adds a fence to the reservation object, by [`Fence`].
pub const IOC_FENCE: u32 = io(0x05);
/// `_IO(0xBC, 0x06)`: signals that fence, by [`Step`]. ENOENT: there is none, or its timeout has signalled
/// it.
pub const IOC_SIGNAL: u32 = io(0x06);
/// `_IO(0xBC, 0x07)`: maps the buffer into the kernel's address space without reading it, by [`Step`]. EBUSY:
/// this attachment already has such a mapping; EINVAL: the exporter does not support it; EOPNOTSUPP: the
/// buffer is only partly in system memory; or the exporter's error for it, or for a mapping for the device,
/// which is tried first.
pub const IOC_VMAP: u32 = io(0x07);
/// `_IO(0xBC, 0x08)`: removes that mapping, by [`Step`]. ENOENT: there is none.
pub const IOC_VUNMAP: u32 = io(0x08);
/// `_IO(0xBC, 0x09)`: unmaps, unpins and detaches, as closing the file does, by [`Step`]; the time is that of
/// the detach alone.
pub const IOC_DETACH: u32 = io(0x09);
/// `_IO(0xBC, 0x0a)`: fills a [`Query`]. Never waits for the buffer.
pub const IOC_QUERY: u32 = io(0x0a);

/// The importer's mappings can be invalidated (`invalidate_mappings`).
pub const DYNAMIC: u32 = 1 << 0;
/// The importer accepts peer memory (`allow_peer2peer`). Without [`DYNAMIC`] it must pin before it maps, as
/// most RDMA drivers do.
pub const PEER: u32 = 1 << 1;

/// Every flag of [`Attach`] that this version knows.
pub const FLAGS: u32 = DYNAMIC | PEER;

/// On an invalidation: unmap at once, in the callback.
pub const ON_INVALIDATE_UNMAP: u32 = 0;
/// On an invalidation: unmap at once, and map again soon after.
pub const ON_INVALIDATE_REMAP: u32 = 1;
/// On an invalidation: misbehave, and keep the mapping until an explicit unmap, or for [`Attach::hold_ms`].
pub const ON_INVALIDATE_HOLD: u32 = 2;

/// `DMA_BIDIRECTIONAL`: the device may read and write.
pub const BIDIRECTIONAL: u32 = 0;
/// `DMA_TO_DEVICE`: the device may read.
pub const TO_DEVICE: u32 = 1;
/// `DMA_FROM_DEVICE`: the device may write.
pub const FROM_DEVICE: u32 = 2;

/// `DMA_RESV_USAGE_KERNEL`: memory management; everyone waits for it.
pub const FENCE_KERNEL: u32 = 0;
/// `DMA_RESV_USAGE_WRITE`: a write that others wait for.
pub const FENCE_WRITE: u32 = 1;
/// `DMA_RESV_USAGE_READ`: a read that writers wait for.
pub const FENCE_READ: u32 = 2;
/// `DMA_RESV_USAGE_BOOKKEEP`: only memory management waits for it.
pub const FENCE_BOOKKEEP: u32 = 3;

/// The longest misbehaviour that can be requested, in milliseconds.
pub const MAX_MS: u32 = 60_000;

/// The attachment has a mapping.
pub const MAPPED: u32 = 1 << 0;
/// The mapping was invalidated and not unmapped.
pub const STALE: u32 = 1 << 1;
/// The attachment has pinned the buffer.
pub const PINNED: u32 = 1 << 2;
/// The attachment has a mapping in the kernel's address space.
pub const VMAPPED: u32 = 1 << 3;
/// The kernel mapping is of device memory.
pub const VMAP_IOMEM: u32 = 1 << 4;
/// The attachment's fence is unsignalled.
pub const FENCED: u32 = 1 << 5;
/// Detached; every ioctl but the query fails (ENOTCONN).
pub const DETACHED: u32 = 1 << 6;
/// Detached because the device's driver was unbound.
pub const DEVICE_GONE: u32 = 1 << 7;

/// [`Query::provider`]: the mapping has no peer memory.
pub const PROVIDER_NONE: u64 = u64::MAX;

/// [`IOC_ATTACH`]: attaches a dma-buf on behalf of a PCI device. The attachment ends when its file is closed,
/// or when the device's driver is unbound.
///
/// Errors: EINVAL (size, flags, padding, not an address, a time without its misbehaviour or above
/// [`MAX_MS`], not a dma-buf), E2BIG (trailing bytes that are not zero), EBADF (no such descriptor), ENXIO
/// (no such PCI device), EUNATCH (the device has no driver that does DMA through the kernel, or is not a bus
/// master), EINTR (a signal during a wait for the device's bind or unbind), EMFILE, ENFILE, ENOMEM, EFAULT;
/// or the exporter's error, usually EOPNOTSUPP, ENODEV, EINVAL or EREMOTEIO.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Attach {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: [`DYNAMIC`], [`PEER`].
    pub flags: u32,
    /// In: the dma-buf's file descriptor.
    pub dmabuf: i32,
    /// In: `O_CLOEXEC`, or zero.
    pub fd_flags: u32,
    /// In: `ON_INVALIDATE_*`; zero unless dynamic.
    pub on_invalidate: u32,
    /// In: how long a mapping is kept after an invalidation, in milliseconds; zero means until an explicit
    /// unmap. Only with [`ON_INVALIDATE_HOLD`].
    pub hold_ms: u32,
    /// In: how long the attachment outlives its file, in milliseconds.
    pub detach_ms: u32,
    /// Out: the attachment's descriptor; zero on entry.
    pub fd: i32,
    /// In: the PCI address, a number as in `abi.rs`.
    pub address: u64,
    /// Out: nanoseconds in `dma_buf_dynamic_attach`; zero on entry.
    pub ns: u64,
}

/// The minimum of [`Attach::size`].
pub const ATTACH_MIN_SIZE: usize = 48;

/// [`IOC_MAP`]: maps the buffer, and waits until the bytes are in place (KERNEL fences).
///
/// Errors: EINVAL (size, flags, padding, the direction; an importer that must pin first and has not), E2BIG,
/// EBUSY (already mapped), ENOTCONN (detached), EINTR, ETIMEDOUT (the bytes are not in place after 30
/// seconds), EFAULT; or the exporter's error, usually ENODEV (revoked), EINVAL or EREMOTEIO (no route).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Map {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: [`BIDIRECTIONAL`], [`TO_DEVICE`] or [`FROM_DEVICE`].
    pub direction: u32,
    /// In and out: zero.
    pub reserved: u32,
    /// Out: nanoseconds in `dma_buf_map_attachment`; zero on entry.
    pub ns: u64,
}

/// The minimum of [`Map::size`].
pub const MAP_MIN_SIZE: usize = 24;

/// The argument of ioctls without parameters.
///
/// Errors, in addition to the ioctl's: EINVAL (size, flags, padding), E2BIG, ENOTCONN (detached), EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Step {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// Out: nanoseconds in the kernel function that does the step; zero on entry.
    pub ns: u64,
}

/// The minimum of [`Step::size`].
pub const STEP_MIN_SIZE: usize = 16;

/// [`IOC_FENCE`]: adds a fence to the buffer's reservation object, as a driver does whose device works on the
/// buffer.
///
/// Errors: EINVAL (size, flags, the usage, a time of zero or above [`MAX_MS`]), E2BIG, EBUSY (the last fence
/// is unsignalled), ENOTCONN (detached), ENOMEM, EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Fence {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// In: `FENCE_*`.
    pub usage: u32,
    /// In: the fence's timeout in milliseconds, after which it signals by itself.
    pub timeout_ms: u32,
}

/// The minimum of [`Fence::size`].
pub const FENCE_MIN_SIZE: usize = 16;

/// [`IOC_QUERY`]: the state of an attachment.
///
/// The numbers of a mapping are those of the current mapping, or of the last one. They count its bytes by
/// where the DMA addresses lead, and by which route.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Query {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// Out: flags from [`MAPPED`] on.
    pub state: u32,
    /// Out: the errno of the last attempt to map again after an invalidation; zero if it succeeded.
    pub remap_error: u32,
    /// Out: DMA segments of the mapping.
    pub segments: u64,
    /// Out: bytes of the mapping: the sum of the next four.
    pub bytes: u64,
    /// Out: bytes in system memory.
    pub system_bytes: u64,
    /// Out: bytes in a PCI device's BAR at bus addresses: a switch between the two devices routes them,
    /// without an IOMMU.
    pub bus_bytes: u64,
    /// Out: bytes in a PCI device's BAR, reached through the host bridge.
    pub bridge_bytes: u64,
    /// Out: bytes neither in system memory nor in a BAR known to the kernel.
    pub other_bytes: u64,
    /// Out: the address of the PCI device whose BAR contains the mapping's first peer segment, or
    /// [`PROVIDER_NONE`].
    pub provider: u64,
    /// Out: the number of calls of `invalidate_mappings`.
    pub invalidations: u64,
    /// Out: the number of mappings made, by [`IOC_MAP`] or after an invalidation.
    pub maps: u64,
    /// Out: the number of mappings made after an invalidation.
    pub remaps: u64,
    /// Out: nanoseconds to make the last mapping.
    pub map_ns: u64,
}

/// The minimum of [`Query::size`]: without the mapping and the counts.
pub const QUERY_MIN_SIZE: usize = 16;
