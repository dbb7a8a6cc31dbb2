//! Buffers: what is shared, and how the CPU gets at it.
//!
//! A [`Buffer`] is a dma-buf, or memory of the host with a dma-buf over it, or (the stand-in on
//! machines without either) memory of the host alone. Its bytes may be device memory, and a
//! device or another process may change them at any time, so they are never a `&[u8]`: a
//! [`Mapping`] gives them to importers, and [`Mapping::begin_cpu_access`] lets the CPU copy them.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, SealFlags, SeekFrom};

use crate::errno::Errno;
use crate::error::{BufferError, SystemError};
use crate::plan::topology::PciAddress;
use crate::sys::dmabuf::{SYNC_END, SYNC_READ, SYNC_WRITE, sync};
use crate::sys::memory::Map;

/// The type number of the filesystem that dma-bufs live on (`DMA_BUF_MAGIC`, linux/magic.h).
const DMA_BUF_MAGIC: u64 = 0x444d_4142;

/// What the CPU, or whoever holds the buffer, may do with its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read them.
    Read,
    /// Write them.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    /// True for [`Access::Read`] and [`Access::ReadWrite`].
    pub fn reads(self) -> bool {
        self != Access::Write
    }

    /// True for [`Access::Write`] and [`Access::ReadWrite`].
    pub fn writes(self) -> bool {
        self != Access::Read
    }
}

/// Tells one dma-buf from another: two descriptors of one buffer have the same identity, in
/// whichever process they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
}

/// A descriptor that is known to be a dma-buf.
#[derive(Debug)]
pub struct DmaBuf {
    fd: OwnedFd,
    size: u64,
    identity: Identity,
    writable: bool,
}

impl DmaBuf {
    /// Takes a descriptor, after a look at what it is.
    ///
    /// # Errors
    /// [`BufferError::NotADmaBuf`], or the call that failed. The descriptor is closed then.
    pub fn from_fd(fd: OwnedFd) -> Result<DmaBuf, BufferError> {
        let failed = |call| move |errno| SystemError::new(call, "a descriptor", errno);
        let filesystem = rustix::fs::fstatfs(&fd).map_err(failed("fstatfs"))?.f_type as u64;
        if filesystem != DMA_BUF_MAGIC {
            let object = "the descriptor".into();
            return Err(BufferError::NotADmaBuf {
                object,
                found: filesystem,
            });
        }
        let stat = rustix::fs::fstat(&fd).map_err(failed("fstat"))?;
        // dma-bufs answer lseek with their size, and it is the only way to learn it.
        let size = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(failed("lseek"))?;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed("fcntl(F_GETFL)"))?;
        Ok(DmaBuf {
            identity: Identity {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            size,
            writable: flags & OFlags::RWMODE == OFlags::RDWR,
            fd,
        })
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Which dma-buf this is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// True when the descriptor was opened for writing, so that mappings may be written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The exporter's name as the kernel has it, such as `udmabuf`; empty where procfs does not
    /// show it.
    pub fn exporter(&self) -> String {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let info = std::fs::read_to_string(path).unwrap_or_default();
        let name = info.lines().find_map(|line| line.strip_prefix("exp_name:"));
        name.map(str::trim).unwrap_or_default().to_owned()
    }

    /// Another descriptor of the same buffer.
    ///
    /// # Errors
    /// The call that failed, with `EMFILE` where the process has too many descriptors.
    pub fn try_clone(&self) -> Result<DmaBuf, BufferError> {
        let fd = self.fd.try_clone().map_err(|error| {
            SystemError::new(
                "fcntl(F_DUPFD_CLOEXEC)",
                "a dma-buf",
                Errno(raw_errno(&error)),
            )
        })?;
        Ok(DmaBuf { fd, ..*self })
    }
}

impl AsFd for DmaBuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<DmaBuf> for OwnedFd {
    fn from(dmabuf: DmaBuf) -> OwnedFd {
        dmabuf.fd
    }
}

/// What kind of exporter made a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
}

impl Kind {
    /// True when the bytes are known to be in system memory.
    pub fn is_host_memory(self) -> bool {
        matches!(self, Kind::Udmabuf | Kind::Memfd)
    }
}

/// Where a buffer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// The kind of exporter.
    pub kind: Kind,
    /// The device that owns the memory; `None` for system memory, or where it is not known.
    pub device: Option<PciAddress>,
    /// The BAR's index, for [`Kind::Bar`].
    pub bar: Option<u8>,
    /// A name for people.
    pub name: String,
}

/// A buffer that can be handed to devices and processes. Clones are the same buffer.
#[derive(Debug, Clone)]
pub struct Buffer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dmabuf: Option<DmaBuf>,
    /// The memfd that holds the bytes, for a buffer in system memory.
    host: Option<OwnedFd>,
    size: u64,
    writable: bool,
    provenance: Provenance,
    /// False when another process told us the provenance, so that what is known about the
    /// device it names must not be believed of this buffer.
    vouched: bool,
}

impl Buffer {
    /// A buffer that is a dma-buf and nothing else.
    pub fn from_dmabuf(dmabuf: DmaBuf, provenance: Provenance) -> Buffer {
        let (size, writable) = (dmabuf.size(), dmabuf.is_writable());
        let dmabuf = Some(dmabuf);
        let inner = Inner {
            dmabuf,
            host: None,
            size,
            writable,
            provenance,
            vouched: true,
        };
        Buffer {
            inner: Arc::new(inner),
        }
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
        let host = Some(memfd);
        let inner = Inner {
            dmabuf,
            host,
            size,
            writable,
            provenance,
            vouched: true,
        };
        Ok(Buffer {
            inner: Arc::new(inner),
        })
    }

    /// Marks the provenance as hearsay. For a buffer that nobody shares yet.
    pub(crate) fn without_voucher(mut self) -> Buffer {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.vouched = false;
        }
        self
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

    /// Where it comes from. Of a buffer that was received, this is what the sender said.
    pub fn provenance(&self) -> &Provenance {
        &self.inner.provenance
    }

    /// A name for people.
    pub fn name(&self) -> &str {
        &self.inner.provenance.name
    }

    pub(crate) fn is_vouched(&self) -> bool {
        self.inner.vouched
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

    /// Maps it. `access` is what the mapping will be used for, by the CPU or by an importer;
    /// writing a mapping needs a writable buffer.
    ///
    /// # Errors
    /// [`BufferError::Access`], or the call that failed.
    pub fn map(&self, access: Access) -> Result<Mapping, BufferError> {
        if access.writes() && !self.buffer.is_writable() {
            let object = self.buffer.name().to_owned();
            return Err(BufferError::Access {
                object,
                wanted: "write",
            });
        }
        // The memfd comes first: the kernel can pin its pages for I/O, while those of a
        // udmabuf's own mapping have no struct pages and every O_DIRECT call gets EFAULT.
        let fd = match (self.buffer.host_memory(), self.buffer.dmabuf()) {
            (Some(memfd), _) => memfd,
            (None, Some(dmabuf)) => dmabuf.as_fd(),
            (None, None) => unreachable!("a buffer has a dma-buf or host memory"),
        };
        let map = Map::shared(fd, self.offset, self.length, access.writes())
            .map_err(|errno| SystemError::new("mmap", self.buffer.name(), errno))?;
        Ok(Mapping {
            map,
            range: self.clone(),
            access,
        })
    }
}

/// A mapped part of a buffer.
///
/// Importers give its addresses to the kernel. The CPU copies bytes within
/// [`Mapping::begin_cpu_access`].
///
/// Device memory can go away: after its device was unbound or unplugged, a copy raises `SIGBUS`,
/// as it does for a file that was cut off under a mapping. System calls on the mapping then fail
/// with `EFAULT` instead.
#[derive(Debug)]
pub struct Mapping {
    map: Map,
    range: BufferRange,
    access: Access,
}

impl Mapping {
    /// What is mapped.
    pub fn range(&self) -> &BufferRange {
        &self.range
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.range.len()
    }

    /// True when it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    pub(crate) fn map(&self) -> &Map {
        &self.map
    }

    /// Begins a time in which the CPU may copy bytes in or out (`DMA_BUF_IOCTL_SYNC`, which
    /// makes caches agree where they do not by themselves, and waits for devices' fences).
    ///
    /// One at a time: the mapping is borrowed mutably until the guard is gone, so nesting does
    /// not compile.
    ///
    /// ```compile_fail
    /// # use peerbuf::{Access, export::memfd};
    /// let buffer = memfd::export("example", 4096).unwrap();
    /// let mut mapping = buffer.whole().map(Access::ReadWrite).unwrap();
    /// let outer = mapping.begin_cpu_access(Access::Read).unwrap();
    /// let inner = mapping.begin_cpu_access(Access::Write).unwrap();
    /// outer.end().unwrap();
    /// ```
    ///
    /// # Errors
    /// [`BufferError::Access`] for access that the mapping was not made for, or the ioctl's
    /// error.
    pub fn begin_cpu_access(&mut self, access: Access) -> Result<CpuAccess<'_>, BufferError> {
        if access.writes() && !self.access.writes() {
            let object = self.range.buffer.name().to_owned();
            return Err(BufferError::Access {
                object,
                wanted: "write",
            });
        }
        let guard = CpuAccess {
            mapping: self,
            access,
            last_write: None,
            open: true,
        };
        if let Err(error) = guard.sync(0) {
            // There is nothing to end: the access has not begun.
            let mut guard = guard;
            guard.open = false;
            return Err(error);
        }
        Ok(guard)
    }
}

/// The CPU's access to a mapping, from [`Mapping::begin_cpu_access`] until it is dropped or
/// ended.
#[derive(Debug)]
pub struct CpuAccess<'m> {
    mapping: &'m Mapping,
    access: Access,
    /// Where the last bytes were written, if any were.
    last_write: Option<usize>,
    open: bool,
}

impl CpuAccess<'_> {
    /// Copies bytes out of the mapping, from `offset` on. Each byte is read once.
    ///
    /// # Errors
    /// [`BufferError::Access`] for access that began for writing only, and
    /// [`BufferError::OutOfRange`].
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), BufferError> {
        let offset = self.check(offset, into.len(), "read", self.access.reads())?;
        self.mapping.map.copy_out(offset, into);
        Ok(())
    }

    /// Copies bytes into the mapping, from `offset` on. Each byte is written once.
    ///
    /// # Errors
    /// [`BufferError::Access`] for access that began for reading only, and
    /// [`BufferError::OutOfRange`].
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), BufferError> {
        let offset = self.check(offset, from.len(), "write", self.access.writes())?;
        self.mapping.map.copy_in(offset, from);
        if !from.is_empty() {
            self.last_write = Some(offset + from.len() - 1);
        }
        Ok(())
    }

    /// Ends the access. What was written is then where a device sees it. Dropping the guard
    /// does the same, but has nobody to tell about an error.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn end(mut self) -> Result<(), BufferError> {
        self.finish()
    }

    fn finish(&mut self) -> Result<(), BufferError> {
        self.open = false;
        if let Some(offset) = self.last_write {
            self.mapping.map.flush_writes(offset);
        }
        self.sync(SYNC_END)
    }

    fn sync(&self, when: u64) -> Result<(), BufferError> {
        let Some(dmabuf) = self.mapping.range.buffer.dmabuf() else {
            return Ok(());
        };
        let what = match self.access {
            Access::Read => SYNC_READ,
            Access::Write => SYNC_WRITE,
            Access::ReadWrite => SYNC_READ | SYNC_WRITE,
        };
        let buffer = self.mapping.range.buffer.name();
        sync(dmabuf.as_fd(), when | what)
            .map_err(|errno| SystemError::new("ioctl(DMA_BUF_IOCTL_SYNC)", buffer, errno).into())
    }

    fn check(
        &self,
        offset: u64,
        length: usize,
        wanted: &'static str,
        allowed: bool,
    ) -> Result<usize, BufferError> {
        if !allowed {
            let object = self.mapping.range.buffer.name().to_owned();
            return Err(BufferError::Access { object, wanted });
        }
        self.mapping.range.slice(offset, length as u64)?;
        Ok(offset as usize)
    }
}

impl Drop for CpuAccess<'_> {
    fn drop(&mut self) {
        if self.open {
            // Nobody to tell; the kernel fails this only for a buffer that is gone.
            let _ = self.finish();
        }
    }
}

fn raw_errno(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::IO.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::memfd;

    #[test]
    fn bytes_come_back_at_every_offset_and_length() {
        let buffer = memfd::export("test", 1 << 16).unwrap();
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
    fn a_range_that_starts_off_a_page_maps_its_own_bytes() {
        let buffer = memfd::export("test", 3 << 12).unwrap();
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
    fn bytes_outside_a_range_are_refused() {
        let buffer = memfd::export("test", 4096).unwrap();
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
    fn access_other_than_the_one_begun_is_refused() {
        let buffer = memfd::export("test", 4096).unwrap();
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

    #[test]
    fn what_is_not_a_dma_buf_is_named_as_such() {
        let fd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(
            DmaBuf::from_fd(fd),
            Err(BufferError::NotADmaBuf { .. })
        ));
    }

    #[test]
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
