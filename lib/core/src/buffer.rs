//! [`Buffer`] and [`BufferRange`]: a dma-buf, the host memory behind it, if any, and its provenance.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::fs::{OFlags, SealFlags};

use crate::access::Access;
use crate::dmabuf::DmaBuf;
use crate::error::{BufferError, SystemError};
use crate::stage::{Shared, Stage};
use crate::sys::copy::Memory;
use crate::sys::fork::Process;
use crate::topology::{PciAddress, Sysfs};

/// The kind of exporter that made a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Part of a device's BAR, exported by peerbuf.ko.
    Bar,
    /// A memfd with a udmabuf over it.
    Udmabuf,
    /// A memfd without a dma-buf, usable by files and the CPU.
    Memfd,
    /// A dma-buf of an unknown exporter.
    Other,
    /// System memory from a dma-heap.
    Heap,
    /// A buffer of a graphics driver, in device or system memory.
    Drm,
    /// Part of a device's BAR, exported by vfio-pci.
    Vfio,
    /// A frame of a video device.
    V4l2,
    /// Memory that another driver provides for peers, such as an NVMe controller memory buffer.
    Provider,
}

/// The number of each kind in messages. The numbers never change.
const KINDS: [(u32, Kind); 9] = [
    (1, Kind::Bar),
    (2, Kind::Udmabuf),
    (3, Kind::Memfd),
    (4, Kind::Other),
    (5, Kind::Heap),
    (6, Kind::Drm),
    (7, Kind::Vfio),
    (8, Kind::V4l2),
    (9, Kind::Provider),
];

impl Kind {
    /// True if the bytes are always in system memory.
    pub fn is_host_memory(self) -> bool {
        matches!(self, Kind::Udmabuf | Kind::Memfd | Kind::Heap | Kind::V4l2)
    }

    /// True if the bytes are in device memory, at least at first.
    pub fn is_device_memory(self) -> bool {
        matches!(self, Kind::Bar | Kind::Vfio | Kind::Provider)
    }

    /// The kind's number in messages, which never changes.
    pub fn number(self) -> u32 {
        let entry = KINDS.iter().find(|(_, kind)| *kind == self);
        entry.map_or(0, |(number, _)| *number)
    }

    /// The kind with this number.
    pub fn from_number(number: u32) -> Option<Kind> {
        let entry = KINDS.iter().find(|(known, _)| *known == number);
        entry.map(|(_, kind)| *kind)
    }

    /// Whether a buffer of this kind can have this combination of a dma-buf and the memfd behind it.
    pub fn allows_descriptors(self, dmabuf: bool, memfd: bool) -> bool {
        match self {
            // A udmabuf of several pieces has no single memfd, and a read-only receiver gets the memfd alone.
            Kind::Udmabuf => dmabuf || memfd,
            Kind::Memfd => memfd && !dmabuf,
            _ => dmabuf && !memfd,
        }
    }

    /// Whether a buffer of this kind may (`named`) or may not name the device that owns its memory.
    pub fn allows_device(self, named: bool) -> bool {
        match self {
            Kind::Bar | Kind::Vfio | Kind::Provider => named,
            Kind::Udmabuf | Kind::Memfd | Kind::Heap => !named,
            Kind::Drm | Kind::V4l2 | Kind::Other => true,
        }
    }
}

/// The origin of a buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// The kind of exporter.
    pub kind: Kind,
    /// The device that owns the memory; `None` for system memory, or if unknown.
    pub device: Option<PciAddress>,
    /// The index of the BAR, for memory in a BAR.
    pub bar: Option<u8>,
    /// A name for diagnostics.
    pub name: String,
}

/// A buffer that devices and processes can share. Clones refer to the same buffer.
#[derive(Debug, Clone)]
pub struct Buffer {
    inner: Arc<Inner>,
    stage: Option<Shared>,
}

#[derive(Debug)]
struct Inner {
    dmabuf: Option<DmaBuf>,
    /// The memfd with the bytes, for a buffer in system memory.
    host: Option<OwnedFd>,
    /// For a dma-buf without `mmap`: the exporter's own descriptor for mapping, and the offset of the bytes
    /// in it. Never passed to another process, since it may give access to more than the buffer.
    view: Option<(OwnedFd, u64)>,
    size: u64,
    writable: bool,
    provenance: Provenance,
    /// False if another process reported the provenance: facts about the named device must not be applied to
    /// this buffer.
    vouched: bool,
    /// Whether the buffer's BAR is prefetchable; read from sysfs at first use.
    prefetchable: OnceLock<bool>,
    /// Dropped last, after the descriptors are closed and every mapping is gone. So it must stay the last
    /// field.
    last: Option<Box<dyn LastHandle>>,
}

#[doc(hidden)]
/// A hook that is dropped with a buffer's last handle in this process.
pub trait LastHandle: fmt::Debug + Send + Sync {
    /// The state of the lease, for a buffer that is lent to this process.
    fn lease(&self) -> Option<LeaseState> {
        None
    }

    /// The process that the buffer is lent to; `None` if it is not lent.
    fn borrower(&self) -> Option<Process> {
        None
    }
}

#[doc(hidden)]
/// The state of a lease.
pub struct LeaseState {
    /// The generation's number.
    pub generation: u64,
    /// Whether the lease still holds: the publisher waits for its end before it starts another generation.
    pub current: bool,
}

/// A buffer over the bytes of another buffer keeps that buffer in use.
impl LastHandle for BufferRange {
    fn lease(&self) -> Option<LeaseState> {
        self.buffer.lease()
    }

    fn borrower(&self) -> Option<Process> {
        self.buffer.borrower()
    }
}

impl Buffer {
    /// A buffer of a dma-buf alone.
    pub fn from_dmabuf(dmabuf: DmaBuf, provenance: Provenance) -> Buffer {
        Buffer::new(Inner {
            size: dmabuf.size(),
            writable: dmabuf.is_writable(),
            dmabuf: Some(dmabuf),
            host: None,
            view: None,
            provenance,
            vouched: true,
            prefetchable: OnceLock::new(),
            last: None,
        })
    }

    fn new(inner: Inner) -> Buffer {
        Buffer {
            inner: Arc::new(inner),
            stage: None,
        }
    }

    #[doc(hidden)]
    /// A buffer of a dma-buf that has no `mmap`, with the exporter's own descriptor for mapping.
    pub fn from_dmabuf_and_view(
        dmabuf: DmaBuf,
        view: OwnedFd,
        at: u64,
        provenance: Provenance,
    ) -> Buffer {
        let mut buffer = Buffer::from_dmabuf(dmabuf, provenance);
        if let Some(inner) = Arc::get_mut(&mut buffer.inner) {
            inner.view = Some((view, at));
        }
        buffer
    }

    /// A buffer in system memory: the memfd with the bytes, and the dma-buf over the same bytes, if any.
    ///
    /// The caller asserts that both have the same bytes; the kernel has no query for that.
    ///
    /// # Errors [`BufferError::NotSealed`] for a memfd that a holder could shrink, and
    /// [`BufferError::OutOfRange`] for a memfd that is smaller than the dma-buf.
    pub fn from_host_memory(
        memfd: OwnedFd,
        dmabuf: Option<DmaBuf>,
        provenance: Provenance,
    ) -> Result<Buffer, BufferError> {
        let failed = |call| {
            let object = provenance.name.clone();
            move |errno| SystemError::new(call, object, errno)
        };
        // `fcntl` returns EINVAL for a file that cannot be sealed.
        let seals = match rustix::fs::fcntl_get_seals(&memfd) {
            Ok(seals) => seals,
            Err(rustix::io::Errno::INVAL) => SealFlags::empty(),
            Err(errno) => return Err(failed("fcntl(F_GET_SEALS)")(errno).into()),
        };
        if !seals.contains(SealFlags::SHRINK) {
            return Err(BufferError::NotSealed {
                object: provenance.name,
            });
        }
        let stat = rustix::fs::fstat(&memfd).map_err(failed("fstat"))?;
        let flags = rustix::fs::fcntl_getfl(&memfd).map_err(failed("fcntl(F_GETFL)"))?;
        let held = stat.st_size as u64;
        let size = dmabuf.as_ref().map_or(held, DmaBuf::size);
        if size > held {
            let object = provenance.name;
            return Err(BufferError::OutOfRange {
                object,
                offset: 0,
                length: size,
                size: held,
            });
        }
        let writable = flags & OFlags::RWMODE == OFlags::RDWR
            && !seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE);
        Ok(Buffer::new(Inner {
            dmabuf,
            host: Some(memfd),
            view: None,
            size,
            writable,
            provenance,
            vouched: true,
            prefetchable: OnceLock::new(),
            last: None,
        }))
    }

    #[doc(hidden)]
    /// Marks the provenance as unverified. For a buffer without other handles.
    pub fn without_voucher(mut self) -> Buffer {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.vouched = false;
        }
        self
    }

    #[doc(hidden)]
    /// Drops `last` after the last clone, range, mapping and attachment of this buffer in this process is
    /// gone and its descriptors are closed. For a buffer without other handles.
    pub fn with_last_handle(mut self, last: Box<dyn LastHandle>) -> Buffer {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.last = Some(last);
        }
        self
    }

    #[doc(hidden)]
    /// The state of the lease; `None` for a buffer that is not lent.
    pub fn lease(&self) -> Option<LeaseState> {
        self.inner.last.as_ref()?.lease()
    }

    /// The process that the buffer is lent to; `None` if it is not lent.
    pub(crate) fn borrower(&self) -> Option<Process> {
        self.inner.last.as_ref()?.borrower()
    }

    #[doc(hidden)]
    /// The number of handles in this process: clones, ranges, mappings, attachments.
    pub fn handles(&self) -> usize {
        Arc::strong_count(&self.inner)
    }

    /// The dma-buf; `None` for memory without one, such as a memfd alone.
    pub fn dmabuf(&self) -> Option<&DmaBuf> {
        self.inner.dmabuf.as_ref()
    }

    /// The memfd with the bytes; `None` for device memory.
    pub fn host_memory(&self) -> Option<BorrowedFd<'_>> {
        self.inner.host.as_ref().map(AsFd::as_fd)
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    /// True if this handle allows writing.
    pub fn is_writable(&self) -> bool {
        self.inner.writable
    }

    /// The access that this handle allows.
    pub fn allowed(&self) -> Access {
        if self.is_writable() {
            Access::ReadWrite
        } else {
            Access::Read
        }
    }

    /// The origin of the buffer; for a received buffer, as the sender reported it.
    pub fn provenance(&self) -> &Provenance {
        &self.inner.provenance
    }

    /// A name for diagnostics.
    pub fn name(&self) -> &str {
        &self.inner.provenance.name
    }

    /// The descriptor to map the bytes with, and their offset in it.
    pub(crate) fn mappable(&self) -> (BorrowedFd<'_>, u64) {
        // The memfd comes first: the kernel can pin its pages for I/O. A udmabuf's own mapping has no struct
        // pages, so O_DIRECT fails with EFAULT.
        let inner = &self.inner;
        match (&inner.host, &inner.view, &inner.dmabuf) {
            (Some(memfd), _, _) => (memfd.as_fd(), 0),
            (None, Some((view, at)), _) => (view.as_fd(), *at),
            (None, None, Some(dmabuf)) => (dmabuf.as_fd(), 0),
            (None, None, None) => unreachable!("a buffer has a dma-buf or host memory"),
        }
    }

    /// The stage for the CPU's copies, if any.
    pub(crate) fn stage(&self) -> Option<&Shared> {
        self.stage.as_ref()
    }

    /// The same buffer; the CPU's copies go through this stage instead of a mapping.
    ///
    /// The stage belongs to this handle, and to clones and ranges made from it.
    #[must_use]
    pub fn with_stage(mut self, stage: impl Stage + 'static) -> Buffer {
        self.stage = Some(Shared(Arc::new(stage)));
        self
    }

    /// True if copies go through a [`Stage`] instead of a mapping.
    pub fn has_stage(&self) -> bool {
        self.stage.is_some()
    }

    /// The memory type of the buffer's mappings. For graphics drivers it is unknown.
    pub(crate) fn memory(&self) -> Memory {
        match self.provenance().kind {
            _ if self.host_memory().is_some() => Memory::Cached,
            Kind::Heap => Memory::Cached,
            Kind::Drm | Kind::V4l2 | Kind::Other => Memory::Combining,
            _ => Memory::Device,
        }
    }

    #[doc(hidden)]
    pub fn is_vouched(&self) -> bool {
        self.inner.vouched
    }

    /// Whether to read a byte back after the CPU's writes, which ensures that posted writes have arrived.
    ///
    /// System memory does not need it, and exporters do what their memory needs, peerbuf.ko included, except
    /// vfio-pci. A BAR that is not prefetchable is never read: reading a register may have side effects.
    #[doc(hidden)]
    pub fn is_read_back(&self) -> bool {
        let Provenance {
            kind, device, bar, ..
        } = self.provenance();
        match (kind, device, bar) {
            (Kind::Vfio, Some(device), Some(bar)) => *self
                .inner
                .prefetchable
                .get_or_init(|| Sysfs::default().is_prefetchable(*device, *bar)),
            _ => false,
        }
    }

    /// The whole buffer.
    pub fn whole(&self) -> BufferRange {
        BufferRange {
            buffer: self.clone(),
            offset: 0,
            length: self.size(),
        }
    }

    /// `length` bytes from `offset`.
    ///
    /// # Errors [`BufferError::OutOfRange`] if they are not all inside the buffer.
    pub fn range(&self, offset: u64, length: u64) -> Result<BufferRange, BufferError> {
        self.whole().slice(offset, length)
    }
}

impl fmt::Display for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Part of a buffer: the buffer, the offset and the length in one value, so that a sub-allocation cannot be
/// used at the wrong offset.
#[derive(Debug, Clone)]
pub struct BufferRange {
    buffer: Buffer,
    offset: u64,
    length: u64,
}

impl BufferRange {
    /// The buffer.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The offset in the buffer, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True if the range is empty.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Part of this range; `offset` is relative to the range.
    ///
    /// # Errors [`BufferError::OutOfRange`] if the bytes are not all inside the range.
    pub fn slice(&self, offset: u64, length: u64) -> Result<BufferRange, BufferError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => Ok(BufferRange {
                buffer: self.buffer.clone(),
                // Cannot overflow: the end is inside this range, which is inside the buffer.
                offset: self.offset + offset,
                length,
            }),
            _ => Err(BufferError::OutOfRange {
                object: self.buffer.name().to_owned(),
                offset,
                length,
                size: self.length,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd;

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn bytes_come_back_at_every_offset_and_length() {
        let buffer = memfd::buffer("test", 1 << 16).unwrap();
        let pattern: Vec<u8> = (0..200u8).collect();
        for offset in [0u64, 1, 3, 7, 8, 9, 4095, 4096, 65336] {
            for length in [0usize, 1, 2, 7, 8, 9, 15, 16, 17, 200] {
                let mut mapping = buffer.whole().map(Access::ReadWrite).unwrap();
                let mut cpu = mapping.begin_cpu_access(Access::ReadWrite).unwrap();
                cpu.write_at(offset, &pattern[..length]).unwrap();
                let mut back = vec![0; length];
                cpu.read_at(offset, &mut back).unwrap();
                cpu.end().unwrap();
                assert_eq!(back, &pattern[..length], "{length} bytes at {offset}");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_range_that_starts_off_a_page_maps_its_own_bytes() {
        let buffer = memfd::buffer("test", 3 << 12).unwrap();
        let mut all = buffer.whole().map(Access::ReadWrite).unwrap();
        all.begin_cpu_access(Access::Write)
            .unwrap()
            .write_at(5001, b"here")
            .unwrap();
        let part = buffer.range(5000, 100).unwrap().slice(1, 4).unwrap();
        let mut part = part.map(Access::Read).unwrap();
        let mut four = [0; 4];
        part.begin_cpu_access(Access::Read)
            .unwrap()
            .read_at(0, &mut four)
            .unwrap();
        assert_eq!(&four, b"here");
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn the_pointer_is_where_the_bytes_are() {
        use std::os::unix::fs::FileExt;
        let buffer = memfd::buffer("test", 3 << 12).unwrap();
        let range = buffer.range(5000, 4).unwrap();
        range.write_bytes(b"here").unwrap();
        let mapping = range.map(Access::ReadWrite).unwrap();
        // Stands in for an engine that gets the address, and reads and writes there.
        let mut open = std::fs::File::options();
        let engine = open.read(true).write(true).open("/proc/self/mem").unwrap();
        let at = mapping.as_ptr() as u64;
        let mut four = [0; 4];
        engine.read_exact_at(&mut four, at).unwrap();
        assert_eq!(&four, b"here");
        engine.write_all_at(b"came", at).unwrap();
        assert_eq!(range.to_vec().unwrap(), b"came");
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn values_cross_at_any_offset() {
        let buffer = memfd::buffer("test", 4096).unwrap();
        let mut mapping = buffer.whole().map(Access::ReadWrite).unwrap();
        let mut cpu = mapping.begin_cpu_access(Access::ReadWrite).unwrap();
        for offset in 0..17 {
            cpu.write(offset, &0x0102_0304_0506_0708_u64).unwrap();
            assert_eq!(cpu.read::<u64>(offset).unwrap(), 0x0102_0304_0506_0708);
            let four: [u16; 4] = cpu.read(offset).unwrap();
            let mut same = [0u16; 4];
            cpu.read_slice(offset, &mut same).unwrap();
            assert_eq!(four, same);
        }
        assert!(cpu.write(4089, &0u64).is_err());
        assert!(cpu.read::<u32>(4093).is_err());
        assert!(cpu.read::<[u8; 0]>(4096).is_ok());
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn bytes_outside_a_range_are_refused() {
        let buffer = memfd::buffer("test", 4096).unwrap();
        assert!(matches!(
            buffer.range(0, 4097),
            Err(BufferError::OutOfRange { .. })
        ));
        assert!(matches!(
            buffer.range(u64::MAX, 2),
            Err(BufferError::OutOfRange { .. })
        ));
        let range = buffer.range(10, 10).unwrap();
        assert!(range.slice(10, 1).is_err());
        let mut mapping = range.map(Access::ReadWrite).unwrap();
        let mut cpu = mapping.begin_cpu_access(Access::ReadWrite).unwrap();
        assert!(cpu.write_at(9, &[1, 2]).is_err());
        assert!(cpu.read_at(11, &mut []).is_err());
        assert!(cpu.read_at(10, &mut []).is_ok());
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn access_other_than_the_one_begun_is_refused() {
        let buffer = memfd::buffer("test", 4096).unwrap();
        let mut mapping = buffer.whole().map(Access::Read).unwrap();
        assert!(mapping.begin_cpu_access(Access::Write).is_err());
        let mut cpu = mapping.begin_cpu_access(Access::Read).unwrap();
        assert!(matches!(
            cpu.write_at(0, &[1]),
            Err(BufferError::Access {
                wanted: "write",
                ..
            })
        ));
    }

    fn memory_of(kind: Kind, device: Option<PciAddress>, bar: Option<u8>) -> Buffer {
        let memory = memfd::sealed("test", 4096, None).unwrap();
        let provenance = Provenance {
            kind,
            device,
            bar,
            name: "test".into(),
        };
        Buffer::from_host_memory(memory, None, provenance).unwrap()
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn nothing_is_read_after_a_write_where_reads_may_have_side_effects() {
        use rustix::fs::{FallocateFlags, fallocate, fstat};
        let gone = "ffff:ff:1f.7".parse().ok();
        for (kind, device, bar) in [
            (Kind::Bar, gone, Some(0)),
            (Kind::Provider, gone, None),
            (Kind::Udmabuf, None, None),
            (Kind::Other, None, None),
            // The device does not exist, so its BAR is not known to be prefetchable.
            (Kind::Vfio, gone, Some(0)),
            (Kind::Vfio, None, None),
        ] {
            let buffer = memory_of(kind, device, bar);
            let memory = buffer.host_memory().unwrap();
            let mut mapping = buffer.whole().map(Access::ReadWrite).unwrap();
            let mut cpu = mapping.begin_cpu_access(Access::Write).unwrap();
            cpu.write_at(0, &[1]).unwrap();
            // A read would allocate the punched page again.
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(memory, punch, 0, 4096).unwrap();
            cpu.end().unwrap();
            assert_eq!(fstat(memory).unwrap().st_blocks, 0, "{kind:?} was read");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn what_vfio_maps_is_read_back_if_it_is_prefetchable() {
        let sysfs = Sysfs::default();
        let bars = sysfs
            .pci_devices()
            .into_iter()
            .flat_map(|device| (0..6).map(move |bar| (device, bar)));
        let mut seen = false;
        for (device, bar) in bars {
            let prefetchable = sysfs.is_prefetchable(device, bar);
            seen |= prefetchable;
            let buffer = memory_of(Kind::Vfio, Some(device), Some(bar));
            assert_eq!(buffer.is_read_back(), prefetchable, "{device} BAR {bar}");
        }
        if !seen {
            let name = "what_vfio_maps_is_read_back_if_it_is_prefetchable";
            let text = format!("test {name} ... NOT RUN: no device has a prefetchable BAR\n");
            let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn memory_that_a_peer_could_shrink_is_refused() {
        let fd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        let provenance = Provenance {
            kind: Kind::Memfd,
            device: None,
            bar: None,
            name: "x".into(),
        };
        let refused = Buffer::from_host_memory(fd, None, provenance.clone());
        assert!(matches!(refused, Err(BufferError::NotSealed { .. })));
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let refused = Buffer::from_host_memory(file.into(), None, provenance);
        assert!(matches!(refused, Err(BufferError::NotSealed { .. })));
    }
}
