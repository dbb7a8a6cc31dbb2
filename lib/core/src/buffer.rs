//! [`Buffer`] and [`BufferRange`]: a dma-buf, the memory of the host behind it if there is some, and
//! where it comes from.

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

/// What kind of exporter made a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Part of a device's BAR, exported by peerbuf.ko.
    Bar,
    /// A memfd with a dma-buf over it.
    Udmabuf,
    /// A memfd alone, where there is no dma-buf exporter: usable by files and by the CPU.
    Memfd,
    /// A dma-buf of an exporter that peerbuf knows nothing about.
    Other,
    /// System memory of a dma-heap.
    Heap,
    /// A buffer of a graphics driver, in its device's memory or in the system's.
    Drm,
    /// Part of a device's BAR, exported by vfio-pci.
    Vfio,
    /// A frame of a video device.
    V4l2,
    /// Memory that another driver provides for peers, such as an NVMe controller memory buffer.
    Provider,
}

/// Each kind and its number in messages, which never changes.
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
    /// True when the bytes are known to be in system memory.
    pub fn is_host_memory(self) -> bool {
        matches!(self, Kind::Udmabuf | Kind::Memfd | Kind::Heap | Kind::V4l2)
    }

    /// True when the bytes are known to be in a device's memory, at least when the buffer is made.
    pub fn is_device_memory(self) -> bool {
        matches!(self, Kind::Bar | Kind::Vfio | Kind::Provider)
    }

    /// Its number in messages, which never changes.
    pub fn number(self) -> u32 {
        let entry = KINDS.iter().find(|(_, kind)| *kind == self);
        entry.map_or(0, |(number, _)| *number)
    }

    /// The kind with this number.
    pub fn from_number(number: u32) -> Option<Kind> {
        let entry = KINDS.iter().find(|(known, _)| *known == number);
        entry.map(|(_, kind)| *kind)
    }

    /// Whether a buffer of this kind can come with these: a dma-buf, and the memfd behind it.
    pub fn allows_descriptors(self, dmabuf: bool, memfd: bool) -> bool {
        match self {
            // One that is made of several pieces has no single memfd, and who may only read gets
            // the memfd alone.
            Kind::Udmabuf => dmabuf || memfd,
            Kind::Memfd => memfd && !dmabuf,
            _ => dmabuf && !memfd,
        }
    }

    /// Whether a buffer of this kind can, and must, name the device that has its memory.
    pub fn allows_device(self, named: bool) -> bool {
        match self {
            Kind::Bar | Kind::Vfio | Kind::Provider => named,
            Kind::Udmabuf | Kind::Memfd | Kind::Heap => !named,
            Kind::Drm | Kind::V4l2 | Kind::Other => true,
        }
    }
}

/// Where a buffer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// The kind of exporter.
    pub kind: Kind,
    /// The device that owns the memory; `None` for system memory, or where it is not known.
    pub device: Option<PciAddress>,
    /// The BAR's index, for memory in a BAR.
    pub bar: Option<u8>,
    /// A name for people.
    pub name: String,
}

/// A buffer that can be handed to devices and processes. Clones are the same buffer.
#[derive(Debug, Clone)]
pub struct Buffer {
    inner: Arc<Inner>,
    stage: Option<Shared>,
}

#[derive(Debug)]
struct Inner {
    dmabuf: Option<DmaBuf>,
    /// The memfd that holds the bytes, for a buffer in system memory.
    host: Option<OwnedFd>,
    /// Where the exporter itself maps the bytes, for a dma-buf that cannot be mapped: a
    /// descriptor, and where in it they begin. Never handed to another process, since it may give
    /// more than the buffer.
    view: Option<(OwnedFd, u64)>,
    size: u64,
    writable: bool,
    provenance: Provenance,
    /// False when another process told us the provenance, so that what is known about the
    /// device it names must not be believed of this buffer.
    vouched: bool,
    /// Whether the BAR that it is in is, once somebody asked.
    prefetchable: OnceLock<bool>,
    /// Dropped after the descriptors were closed; every mapping is gone by then. Last for that
    /// reason.
    last: Option<Box<dyn LastHandle>>,
}

#[doc(hidden)]
/// Something that is to be dropped when a buffer's last handle in this process is gone.
pub trait LastHandle: fmt::Debug + Send + Sync {
    /// For a buffer that is lent to this process.
    fn lease(&self) -> Option<LeaseState> {
        None
    }

    /// The process that it is lent to, for a buffer that is lent.
    fn borrower(&self) -> Option<Process> {
        None
    }
}

#[doc(hidden)]
/// A lent buffer.
pub struct LeaseState {
    /// The number of the generation.
    pub generation: u64,
    /// Whether it is still lent: the publisher waits for it before there is another generation.
    pub current: bool,
}

/// A buffer that is another's bytes keeps that one in use.
impl LastHandle for BufferRange {
    fn lease(&self) -> Option<LeaseState> {
        self.buffer.lease()
    }

    fn borrower(&self) -> Option<Process> {
        self.buffer.borrower()
    }
}

impl Buffer {
    /// A buffer that is a dma-buf and nothing else.
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
    /// A dma-buf that the kernel gives no mapping, with the exporter's own.
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

    /// A buffer in system memory: the memfd with the bytes, and the dma-buf over the same bytes
    /// if there is one.
    ///
    /// That the two are the same bytes is the caller's word; the kernel has no way to ask.
    ///
    /// # Errors
    /// [`BufferError::NotSealed`] for a memfd that somebody could shrink, and
    /// [`BufferError::OutOfRange`] for one that is smaller than the dma-buf.
    pub fn from_host_memory(
        memfd: OwnedFd,
        dmabuf: Option<DmaBuf>,
        provenance: Provenance,
    ) -> Result<Buffer, BufferError> {
        let failed = |call| {
            let object = provenance.name.clone();
            move |errno| SystemError::new(call, object, errno)
        };
        // A file that is not a memfd cannot be sealed, and answers EINVAL.
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
    /// Marks the provenance as hearsay. For a buffer that nobody shares yet.
    pub fn without_voucher(mut self) -> Buffer {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.vouched = false;
        }
        self
    }

    #[doc(hidden)]
    /// Has `last` dropped when the last clone, range, mapping and attachment of this buffer in
    /// this process is gone and its descriptors are closed. For a buffer that nobody shares yet.
    pub fn with_last_handle(mut self, last: Box<dyn LastHandle>) -> Buffer {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.last = Some(last);
        }
        self
    }

    #[doc(hidden)]
    /// What is known of its loan; `None` for a buffer that is not lent.
    pub fn lease(&self) -> Option<LeaseState> {
        self.inner.last.as_ref()?.lease()
    }

    /// The process that it is lent to; `None` for a buffer that is not lent.
    pub(crate) fn borrower(&self) -> Option<Process> {
        self.inner.last.as_ref()?.borrower()
    }

    #[doc(hidden)]
    /// How many handles there are in this process: clones, ranges, mappings, attachments.
    pub fn handles(&self) -> usize {
        Arc::strong_count(&self.inner)
    }

    /// The dma-buf; `None` for the memfd stand-in.
    pub fn dmabuf(&self) -> Option<&DmaBuf> {
        self.inner.dmabuf.as_ref()
    }

    /// The memfd that holds the bytes; `None` for device memory.
    pub fn host_memory(&self) -> Option<BorrowedFd<'_>> {
        self.inner.host.as_ref().map(AsFd::as_fd)
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    /// True when the bytes may be written through this handle.
    pub fn is_writable(&self) -> bool {
        self.inner.writable
    }

    /// The most that its bytes may be used for.
    pub fn allowed(&self) -> Access {
        if self.is_writable() {
            Access::ReadWrite
        } else {
            Access::Read
        }
    }

    /// Where it comes from. Of a buffer that was received, this is what the sender said.
    pub fn provenance(&self) -> &Provenance {
        &self.inner.provenance
    }

    /// A name for people.
    pub fn name(&self) -> &str {
        &self.inner.provenance.name
    }

    /// By which descriptor its bytes are mapped, and where in that they begin.
    pub(crate) fn mappable(&self) -> (BorrowedFd<'_>, u64) {
        // The memfd comes first: the kernel can pin its pages for I/O, while those of a
        // udmabuf's own mapping have no struct pages and every O_DIRECT call gets EFAULT.
        let inner = &self.inner;
        match (&inner.host, &inner.view, &inner.dmabuf) {
            (Some(memfd), _, _) => (memfd.as_fd(), 0),
            (None, Some((view, at)), _) => (view.as_fd(), *at),
            (None, None, Some(dmabuf)) => (dmabuf.as_fd(), 0),
            (None, None, None) => unreachable!("a buffer has a dma-buf or host memory"),
        }
    }

    /// How the processor copies its bytes without a mapping.
    pub(crate) fn stage(&self) -> Option<&Shared> {
        self.stage.as_ref()
    }

    /// The same buffer, whose bytes the processor copies by this stage and not by a mapping.
    ///
    /// The stage belongs to this handle, and to the clones and ranges that are made of it.
    #[must_use]
    pub fn with_stage(mut self, stage: impl Stage + 'static) -> Buffer {
        self.stage = Some(Shared(Arc::new(stage)));
        self
    }

    /// True when copies go by a [`Stage`] and not by a mapping.
    pub fn has_stage(&self) -> bool {
        self.stage.is_some()
    }

    /// What kind of memory its mappings are of. Graphics drivers map what they like.
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

    /// Whether a byte is to be read after the processor wrote, so that the writes have arrived. peerbuf.ko does so
    /// itself, other exporters do what their memory needs, and system memory needs nothing: left are vfio-pci's,
    /// which does not. A BAR that is not prefetchable is never read: reading a register may change it.
    pub(crate) fn is_read_back(&self) -> bool {
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

    /// All of it.
    pub fn whole(&self) -> BufferRange {
        BufferRange {
            buffer: self.clone(),
            offset: 0,
            length: self.size(),
        }
    }

    /// `length` bytes from `offset` on.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] when they are not all inside.
    pub fn range(&self, offset: u64, length: u64) -> Result<BufferRange, BufferError> {
        self.whole().slice(offset, length)
    }
}

impl fmt::Display for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Part of a buffer. The buffer, the offset and the length are one value, so that a
/// sub-allocation cannot be used at the wrong offset.
#[derive(Debug, Clone)]
pub struct BufferRange {
    buffer: Buffer,
    offset: u64,
    length: u64,
}

impl BufferRange {
    /// The buffer that it is part of.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Where it begins in the buffer, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True when it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// A part of this part; `offset` counts from its beginning.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] when the bytes are not all inside.
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
        // An engine that is given the address, and reads and writes there.
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
            // Not known to be prefetchable.
            (Kind::Vfio, gone, Some(0)),
            (Kind::Vfio, None, None),
        ] {
            let buffer = memory_of(kind, device, bar);
            let memory = buffer.host_memory().unwrap();
            let mut mapping = buffer.whole().map(Access::ReadWrite).unwrap();
            let mut cpu = mapping.begin_cpu_access(Access::Write).unwrap();
            cpu.write_at(0, &[1]).unwrap();
            // A read of a page that has been taken away brings it back.
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
