//! [`Mapping`]: the bytes of a buffer in this process, and the times in which the CPU touches them.

use std::os::fd::AsFd;

use bytemuck::Pod;

use crate::access::Access;
use crate::buffer::{BufferRange, Kind};
use crate::errno::Errno;
use crate::error::{BufferError, SystemError};
use crate::fence::flags_of;
use crate::sys::dmabuf::{SYNC_END, sync};
use crate::sys::memory::Map;

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

    /// The address of its first byte, for engines that take a pointer: buffers registered with io_uring,
    /// `cuMemHostRegister`, `ucp_mem_map`. The bytes that follow it are [`Mapping::len`]. It is null in a child
    /// of the process that a lent buffer was mapped in.
    ///
    /// ```
    /// # fn register_with_an_engine(_: *mut u8, _: usize) {}
    /// # fn main() -> Result<(), peerbuf_core::error::BufferError> {
    /// # let buffer = peerbuf_core::memfd::buffer("example", 4096)?;
    /// let mapping = buffer.whole().map(buffer.allowed())?;
    /// register_with_an_engine(mapping.as_ptr(), mapping.len() as usize);
    /// // The mapping outlives what the engine does with the pointer.
    /// # drop(mapping);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Safety
    /// Getting the pointer is safe. Who uses it sees to this:
    ///
    /// - It is used while the mapping exists, and for no byte beyond its length. An engine that keeps it has to
    ///   forget it (deregistration, completion of all work) before the mapping is dropped.
    /// - Bytes are written only if the mapping was made for writing; otherwise the processor gets `SIGSEGV`, and
    ///   a system call `EFAULT`.
    /// - No reference (`&[u8]`, `&mut [u8]`) is made of it, not even for a moment: devices and other processes
    ///   change the bytes. Give it to the kernel or to a library, or copy with `read_volatile` and
    ///   `write_volatile`.
    /// - The processor touches the bytes only between [`Mapping::begin_cpu_access`] and its end. Whoever lets a
    ///   device or the kernel use them waits for the buffer's fences first
    ///   ([`DmaBuf::wait`](crate::DmaBuf::wait)).
    /// - Copies by the processor may raise `SIGBUS` when the buffer's device goes away, and memory that has no
    ///   struct pages cannot be pinned: `EFAULT` from direct I/O and registrations.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.window(0, 0).address()
    }

    #[doc(hidden)]
    pub fn map(&self) -> &Map {
        &self.map
    }

    fn check_here(&self) -> Result<(), BufferError> {
        if self.map.is_here() {
            return Ok(());
        }
        let object = self.range.buffer().name().to_owned();
        Err(BufferError::Inherited { object })
    }

    /// Begins a time in which the CPU may copy bytes in or out (`DMA_BUF_IOCTL_SYNC`, which
    /// makes caches agree where they do not by themselves, and waits for devices' fences).
    ///
    /// One at a time: the mapping is borrowed mutably until the guard is gone, so nesting does
    /// not compile.
    ///
    /// ```compile_fail
    /// # use peerbuf_core::{Access, memfd};
    /// let buffer = memfd::buffer("example", 4096).unwrap();
    /// let mut mapping = buffer.whole().map(Access::ReadWrite).unwrap();
    /// let outer = mapping.begin_cpu_access(Access::Read).unwrap();
    /// let inner = mapping.begin_cpu_access(Access::Write).unwrap();
    /// outer.end().unwrap();
    /// ```
    ///
    /// The wait has no limit of its own: [`DmaBuf::wait`](crate::DmaBuf::wait) before it has one.
    ///
    /// # Errors
    /// [`BufferError::Access`] for access that the mapping was not made for;
    /// [`BufferError::Inherited`] for lent memory in a child of the process that mapped it; or the
    /// ioctl's error.
    #[doc(alias = "DMA_BUF_IOCTL_SYNC")]
    #[doc(alias = "DMA_BUF_SYNC_START")]
    pub fn begin_cpu_access(&mut self, access: Access) -> Result<CpuAccess<'_>, BufferError> {
        self.begin_unguarded(access)?;
        Ok(CpuAccess {
            mapping: self,
            access,
            last_write: None,
            open: true,
        })
    }

    #[doc(hidden)]
    /// As [`Mapping::begin_cpu_access`], for other languages, in which no guard can borrow: the caller
    /// ends what it began, and begins nothing twice.
    pub fn begin_unguarded(&self, access: Access) -> Result<(), BufferError> {
        if access.writes() && !self.access.writes() {
            let object = self.range.buffer().name().to_owned();
            return Err(BufferError::Access {
                object,
                wanted: "write",
            });
        }
        self.check_here()?;
        self.sync(flags_of(access))
    }

    #[doc(hidden)]
    /// Ends what [`Mapping::begin_unguarded`] began. `last_write` is the place of a byte that was written after
    /// all others; nothing where none was.
    pub fn end_unguarded(
        &self,
        access: Access,
        last_write: Option<usize>,
    ) -> Result<(), BufferError> {
        if let Some(offset) = last_write {
            self.map.drain_writes();
            if self.range.buffer().is_read_back() {
                self.map.read_back(offset);
            }
        }
        self.sync(SYNC_END | flags_of(access))
    }

    fn sync(&self, flags: u64) -> Result<(), BufferError> {
        let buffer = self.range.buffer();
        let Some(dmabuf) = buffer.dmabuf() else {
            return Ok(());
        };
        sync(dmabuf.as_fd(), flags).map_err(|errno| {
            SystemError::new("ioctl(DMA_BUF_IOCTL_SYNC)", buffer.name(), errno).into()
        })
    }

    /// Copies bytes to its beginning, within one CPU access.
    ///
    /// # Errors
    /// As [`Mapping::begin_cpu_access`]; [`BufferError::OutOfRange`] for more bytes than it has.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<(), BufferError> {
        let mut cpu = self.begin_cpu_access(Access::Write)?;
        cpu.write_at(0, bytes)?;
        cpu.end()
    }

    /// Copies bytes from its beginning, as many as `into` has room for, within one CPU access.
    ///
    /// # Errors
    /// As [`Mapping::write_bytes`].
    pub fn read_bytes(&mut self, into: &mut [u8]) -> Result<(), BufferError> {
        let cpu = self.begin_cpu_access(Access::Read)?;
        cpu.read_at(0, into)?;
        cpu.end()
    }
}

impl BufferRange {
    /// Maps it. `access` is what the mapping will be used for, by the CPU or by an importer;
    /// writing a mapping needs a writable buffer.
    ///
    /// A child that is forked later inherits the mapping, unless the buffer is lent: its publisher
    /// would not know of the child.
    ///
    /// # Errors
    /// [`BufferError::Access`]; [`BufferError::Inherited`] for a buffer that was lent to a process
    /// from which this one was forked; or the call that failed.
    pub fn map(&self, access: Access) -> Result<Mapping, BufferError> {
        let borrower = self.usable(access)?;
        let (fd, at) = self.buffer().mappable();
        // Graphics drivers' fault handlers count from the mapping's beginning and not from the
        // buffer's (drm_gem_shmem_fault in drivers/gpu/drm/drm_gem_shmem_helper.c): with an offset,
        // other bytes than those asked for are mapped, without an error. Of exporters that are not
        // known to do it right the mapping begins where the buffer does.
        let honours_offset = self.buffer().host_memory().is_some()
            || matches!(
                self.buffer().provenance().kind,
                Kind::Bar | Kind::Vfio | Kind::Provider | Kind::Heap
            );
        // A page is mapped for a range without bytes, too. At the end of a dma-buf there is none.
        let offset = if self.is_empty() { 0 } else { self.offset() };
        let map = if honours_offset {
            Map::shared(fd, at + offset, self.len(), access.writes())
        } else {
            Map::shared_from(fd, at, offset, self.len(), access.writes())
        };
        let map = map.map_err(|errno| {
            let cause = SystemError::new("mmap", self.buffer().name(), errno);
            // What exporters answer that have no mapping to give; the kernel says EINVAL for those without the
            // operation. A memfd can always be mapped.
            let refused = matches!(errno, Errno::INVAL | Errno::NOTSUPP | Errno::OPNOTSUPP);
            match refused && self.buffer().host_memory().is_none() {
                true => BufferError::NotMappable { cause },
                false => cause.into(),
            }
        })?;
        let mut map = map.of(self.buffer().memory());
        if borrower.is_some() {
            map.keep_from_children()
                .map_err(|errno| SystemError::new("madvise", self.buffer().name(), errno))?;
        }
        Ok(Mapping {
            map,
            range: self.clone(),
            access,
        })
    }

    /// Copies bytes to its beginning: by the buffer's [`Stage`](crate::Stage) if it has one, otherwise with one
    /// mapping and one CPU access. To do it often, keep a [`Mapping`] or a [`LazyMapping`](crate::LazyMapping).
    ///
    /// # Errors
    /// As [`BufferRange::map`] and [`Mapping::begin_cpu_access`]; [`BufferError::OutOfRange`] for more
    /// bytes than it has.
    pub fn write_bytes(&self, bytes: &[u8]) -> Result<(), BufferError> {
        match self.upload(bytes) {
            Some(copied) => copied,
            None => self.map(Access::ReadWrite)?.write_bytes(bytes),
        }
    }

    /// Copies bytes from its beginning, as many as `into` has room for, likewise.
    ///
    /// # Errors
    /// As [`BufferRange::write_bytes`].
    pub fn read_bytes(&self, into: &mut [u8]) -> Result<(), BufferError> {
        match self.download(into) {
            Some(copied) => copied,
            None => self.map(Access::Read)?.read_bytes(into),
        }
    }

    /// A copy of its bytes, likewise.
    ///
    /// # Errors
    /// As [`BufferRange::write_bytes`].
    ///
    /// # Panics
    /// When there is not as much memory.
    pub fn to_vec(&self) -> Result<Vec<u8>, BufferError> {
        let mut bytes = vec![0; self.len() as usize];
        self.read_bytes(&mut bytes)?;
        Ok(bytes)
    }
}

/// The CPU's access to a mapping, from [`Mapping::begin_cpu_access`] until it is dropped or
/// ended. What was written is where a device or another process sees it once that has happened.
///
/// Bytes go in and out as copies, or as values of types that are plain bytes ([`Pod`]), each byte
/// moved exactly once. A value of 1, 2, 4 or 8 bytes whose address is a multiple of its size goes
/// in one access, as a device's registers need it; addresses begin at a page for a range that
/// does.
///
/// ```
/// use bytemuck::{Pod, Zeroable};
/// use peerbuf_core::{Access, memfd};
///
/// #[repr(C)]
/// #[derive(Clone, Copy, PartialEq, Debug, Pod, Zeroable)]
/// struct Header {
///     magic: u32,
///     count: u32,
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let buffer = memfd::buffer("frames", 4096)?;
/// let mut mapping = buffer.whole().map(Access::ReadWrite)?;
///
/// let mut cpu = mapping.begin_cpu_access(Access::Write)?;
/// cpu.write(0, &Header { magic: 7, count: 3 })?;
/// cpu.write_slice(8, &[1.0f32, 2.0, 3.0])?;
/// cpu.end()?; // from here on a device sees them
///
/// let cpu = mapping.begin_cpu_access(Access::Read)?;
/// let header: Header = cpu.read(0)?;
/// let mut values = vec![0f32; header.count as usize];
/// cpu.read_slice(8, &mut values)?;
/// assert_eq!(values, [1.0, 2.0, 3.0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct CpuAccess<'m> {
    mapping: &'m mut Mapping,
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

    /// Has the end of the access wait for bytes up to here, which were copied in by way of
    /// [`Mapping::map`].
    #[doc(hidden)]
    pub fn copied_in(&mut self, end: u64) {
        self.last_write = end.checked_sub(1).map(|last| last as usize);
    }

    /// What is accessed. Within the access its bytes may also be given to the kernel, as for file I/O.
    pub fn mapping(&self) -> &Mapping {
        &*self.mapping
    }

    /// Reads a value at `offset`, in bytes, which need not be a multiple of anything.
    ///
    /// # Errors
    /// As [`CpuAccess::read_at`].
    pub fn read<T: Pod>(&self, offset: u64) -> Result<T, BufferError> {
        let mut value = T::zeroed();
        self.read_at(offset, bytemuck::bytes_of_mut(&mut value))?;
        Ok(value)
    }

    /// Writes a value at `offset`, in bytes.
    ///
    /// # Errors
    /// As [`CpuAccess::write_at`].
    pub fn write<T: Pod>(&mut self, offset: u64, value: &T) -> Result<(), BufferError> {
        self.write_at(offset, bytemuck::bytes_of(value))
    }

    /// Reads values that follow each other from `offset` on, in bytes.
    ///
    /// # Errors
    /// As [`CpuAccess::read_at`].
    pub fn read_slice<T: Pod>(&self, offset: u64, into: &mut [T]) -> Result<(), BufferError> {
        self.read_at(offset, bytemuck::cast_slice_mut(into))
    }

    /// Writes values one after the other from `offset` on, in bytes.
    ///
    /// # Errors
    /// As [`CpuAccess::write_at`].
    pub fn write_slice<T: Pod>(&mut self, offset: u64, from: &[T]) -> Result<(), BufferError> {
        self.write_at(offset, bytemuck::cast_slice(from))
    }

    /// Ends the access. What was written is then where a device sees it. Dropping the guard
    /// does the same, but has nobody to tell about an error.
    ///
    /// # Errors
    /// The ioctl's error.
    #[doc(alias = "DMA_BUF_SYNC_END")]
    pub fn end(mut self) -> Result<(), BufferError> {
        self.finish()
    }

    fn finish(&mut self) -> Result<(), BufferError> {
        self.open = false;
        self.mapping.end_unguarded(self.access, self.last_write)
    }

    fn check(
        &self,
        offset: u64,
        length: usize,
        wanted: &'static str,
        allowed: bool,
    ) -> Result<usize, BufferError> {
        if !allowed {
            let object = self.mapping.range.buffer().name().to_owned();
            return Err(BufferError::Access { object, wanted });
        }
        self.mapping.check_here()?;
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > self.mapping.len()) {
            // The error that a part of the range has, which is made only for that.
            self.mapping.range.slice(offset, length as u64)?;
        }
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
