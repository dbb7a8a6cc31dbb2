// SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT

// The whole interface between peerbuf_probe.ko and userspace: numbers and structs, nothing else. The
// rules are those of `abi.rs`.
//
// `/dev/peerbuf/importer` attaches dma-bufs of any exporter on behalf of a PCI device; each attachment
// made with it is a file of its own. It never lets bytes be read or written, and does not tell DMA
// addresses.
//
// This one file is compiled twice: into the crate `peerbuf-uapi` and, by `include!`, into
// peerbuf_probe.ko. `include/peerbuf_probe.h` says the same for C; a test compares the two.

/// The ioctl type byte of peerbuf_probe.ko's ioctls.
pub const IOC_MAGIC: u8 = 0xBC;

/// `_IO(IOC_MAGIC, number)`.
const fn io(number: u32) -> u32 {
    ((IOC_MAGIC as u32) << 8) | number
}

/// `_IO(0xBC, 0x00)`: attaches a dma-buf, by [`Attach`]. On `/dev/peerbuf/importer`.
pub const IOC_ATTACH: u32 = io(0x00);
/// `_IO(0xBC, 0x01)`: maps the attachment, by [`Map`]. This and all that follow: on an
/// attachment.
pub const IOC_MAP: u32 = io(0x01);
/// `_IO(0xBC, 0x02)`: unmaps it, by [`Step`]. ENOENT: not mapped.
pub const IOC_UNMAP: u32 = io(0x02);
/// `_IO(0xBC, 0x03)`: asks the exporter to keep the buffer where it is, by [`Step`].
/// EINVAL: a static attachment, which the kernel pins while it is mapped; EBUSY: pinned already;
/// or what the exporter answers.
pub const IOC_PIN: u32 = io(0x03);
/// `_IO(0xBC, 0x04)`: ends that, by [`Step`]. ENOENT: not pinned; EBUSY: mapped, by an
/// importer that cannot be told that the buffer moves.
pub const IOC_UNPIN: u32 = io(0x04);
/// `_IO(0xBC, 0x05)`: leaves a fence on the reservation object, by [`Fence`].
pub const IOC_FENCE: u32 = io(0x05);
/// `_IO(0xBC, 0x06)`: signals that fence, by [`Step`]. ENOENT: there is none, or it has
/// signalled by itself.
pub const IOC_SIGNAL: u32 = io(0x06);
/// `_IO(0xBC, 0x07)`: maps the buffer into the kernel's address space, and does not look at it, by
/// [`Step`]. EBUSY: this attachment has done so already; EINVAL: the exporter has no such
/// mappings; EOPNOTSUPP: part of the buffer is in system memory and part is not; or what the
/// exporter answers to this or to a mapping for the device, which is tried first.
pub const IOC_VMAP: u32 = io(0x07);
/// `_IO(0xBC, 0x08)`: takes that mapping away, by [`Step`]. ENOENT: there is none.
pub const IOC_VUNMAP: u32 = io(0x08);
/// `_IO(0xBC, 0x09)`: lets everything go, as closing the file does, by [`Step`]; the time is
/// that of the detaching alone.
pub const IOC_DETACH: u32 = io(0x09);
/// `_IO(0xBC, 0x0a)`: fills an [`Query`]. Never waits for the buffer.
pub const IOC_QUERY: u32 = io(0x0a);

/// The importer can be told that its mappings are stale (`invalidate_mappings`).
pub const DYNAMIC: u32 = 1 << 0;
/// The importer takes peer memory (`allow_peer2peer`). Without [`DYNAMIC`] it is one that
/// must pin before it maps, as most RDMA drivers do.
pub const PEER: u32 = 1 << 1;

/// Every flag of [`Attach`] that this version knows.
pub const FLAGS: u32 = DYNAMIC | PEER;

/// On an invalidation: unmap at once, within the call.
pub const ON_INVALIDATE_UNMAP: u32 = 0;
/// On an invalidation: unmap at once, and map again soon after.
pub const ON_INVALIDATE_REMAP: u32 = 1;
/// On an invalidation: misbehave, and keep the mapping until told, or for
/// [`Attach::hold_ms`].
pub const ON_INVALIDATE_HOLD: u32 = 2;

/// `DMA_BIDIRECTIONAL`: the device may read and write.
pub const BIDIRECTIONAL: u32 = 0;
/// `DMA_TO_DEVICE`: the device may read.
pub const TO_DEVICE: u32 = 1;
/// `DMA_FROM_DEVICE`: the device may write.
pub const FROM_DEVICE: u32 = 2;

/// `DMA_RESV_USAGE_KERNEL`: memory management; everybody waits for it.
pub const FENCE_KERNEL: u32 = 0;
/// `DMA_RESV_USAGE_WRITE`: a write that others wait for.
pub const FENCE_WRITE: u32 = 1;
/// `DMA_RESV_USAGE_READ`: a read that writers wait for.
pub const FENCE_READ: u32 = 2;
/// `DMA_RESV_USAGE_BOOKKEEP`: only memory management waits for it.
pub const FENCE_BOOKKEEP: u32 = 3;

/// The longest time that an attachment can be told to misbehave, in milliseconds.
pub const MAX_MS: u32 = 60_000;

/// It has a mapping.
pub const MAPPED: u32 = 1 << 0;
/// That mapping should have been unmapped: it was invalidated.
pub const STALE: u32 = 1 << 1;
/// It has pinned the buffer.
pub const PINNED: u32 = 1 << 2;
/// It has a mapping in the kernel's address space.
pub const VMAPPED: u32 = 1 << 3;
/// That mapping is of device memory.
pub const VMAP_IOMEM: u32 = 1 << 4;
/// A fence of it has not signalled yet.
pub const FENCED: u32 = 1 << 5;
/// It has let go of the buffer; nothing but the query works any more (ENOTCONN).
pub const DETACHED: u32 = 1 << 6;
/// It has done so because the driver of its device let go of the device.
pub const DEVICE_GONE: u32 = 1 << 7;

/// [`IOC_ATTACH`]: attaches a dma-buf on behalf of a PCI device. The attachment ends when
/// its descriptor is closed, or when the driver of the device is unbound.
///
/// Errors: EINVAL (size, flags, padding, a malformed address, times without the misbehaviour that
/// they are for or above [`MAX_MS`], not a dma-buf), E2BIG (trailing bytes that are not
/// zero), EBADF (no such descriptor), ENXIO (no such PCI device), EUNATCH (the device has no driver
/// that does DMA through the kernel, or may not master the bus), EINTR (a signal came while the
/// device's driver was coming or going), EMFILE, ENFILE, ENOMEM, EFAULT; or what the exporter answers, of which EOPNOTSUPP, ENODEV, EINVAL and EREMOTEIO are usual.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Attach {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: [`DYNAMIC`], [`PEER`].
    pub flags: u32,
    /// In: the descriptor of the dma-buf.
    pub dmabuf: i32,
    /// In: `O_CLOEXEC`, or zero.
    pub fd_flags: u32,
    /// In: `ON_INVALIDATE_*`; zero unless dynamic.
    pub on_invalidate: u32,
    /// In: how long a mapping is kept after an invalidation, in milliseconds, and zero for 'until
    /// told'. Only with [`ON_INVALIDATE_HOLD`].
    pub hold_ms: u32,
    /// In: how long after the closing of its file the attachment stays, in milliseconds.
    pub detach_ms: u32,
    /// Out: the attachment's descriptor; zero on entry.
    pub fd: i32,
    /// In: the PCI address `DDDD:BB:DD.F`, NUL-terminated and NUL-padded.
    pub bdf: [u8; 16],
    /// Out: nanoseconds in `dma_buf_dynamic_attach`; zero on entry.
    pub ns: u64,
}

/// [`IOC_MAP`]: maps the attachment, and waits until the bytes are in place (KERNEL fences).
///
/// Errors: EINVAL (size, flags, padding, the direction; an importer that must pin first and has
/// not), E2BIG, EBUSY (it is mapped), ENOTCONN (it was detached), EINTR, ETIMEDOUT (half a minute
/// has gone by and the bytes are not in place), EFAULT; or what the exporter answers, of which
/// ENODEV (revoked), EINVAL and EREMOTEIO (no route) are usual.
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

/// The ioctls that only do something.
///
/// Errors, besides those of the ioctl: EINVAL (size, flags, padding), E2BIG, ENOTCONN (detached),
/// EFAULT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "bytemuck", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Step {
    /// In: the size of this struct as the caller knows it.
    pub size: u32,
    /// In: zero.
    pub flags: u32,
    /// Out: nanoseconds in the kernel's function for it; zero on entry.
    pub ns: u64,
}

/// [`IOC_FENCE`]: leaves a fence on the buffer's reservation object, as a device would that
/// works on the buffer.
///
/// Errors: EINVAL (size, flags, the usage, a time of zero or above [`MAX_MS`]), E2BIG, EBUSY
/// (the last one has not signalled), ENOTCONN (detached), ENOMEM, EFAULT.
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
    /// In: it signals by itself after so many milliseconds.
    pub timeout_ms: u32,
}

/// [`IOC_QUERY`]: what became of an attachment.
///
/// What is said of a mapping is said of the one there is, or of the last there was. Its bytes are
/// sorted by where their DMA addresses lead, and by how.
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
    /// Out: DMA segments of the mapping.
    pub segments: u32,
    /// Out: bytes of the mapping: the sum of the four that follow.
    pub bytes: u64,
    /// Out: bytes in system memory.
    pub system_bytes: u64,
    /// Out: bytes in a PCI device's BAR, reached by their bus address: the switch between the two
    /// devices routes them, and no IOMMU sees them.
    pub bus_bytes: u64,
    /// Out: bytes in a PCI device's BAR, reached through the host bridge.
    pub bridge_bytes: u64,
    /// Out: bytes that are neither in system memory nor in a BAR that the kernel knows.
    pub other_bytes: u64,
    /// Out: the address of the PCI device whose BAR the mapping's first peer segment is in; NULs
    /// where it has none.
    pub provider: [u8; 16],
    /// Out: calls of `invalidate_mappings`.
    pub invalidations: u64,
    /// Out: mappings made, by [`IOC_MAP`] or by itself.
    pub maps: u64,
    /// Out: those made by itself.
    pub remaps: u64,
    /// Out: nanoseconds that the last mapping took to make.
    pub map_ns: u64,
    /// Out: the errno with which the last attempt to map again by itself failed; zero if it did
    /// not.
    pub remap_error: u32,
    /// In and out: zero.
    pub reserved: u32,
}
