//! [`Mapping`]: a buffer's bytes in this process, and the CPU's access to them.

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
/// Importers pass its addresses to the kernel. The CPU copies bytes within [`Mapping::begin_cpu_access`].
///
/// Device memory can go away: after its device was unbound or unplugged, a copy raises `SIGBUS`, as for a
/// truncated file. System calls on the mapping then fail with `EFAULT`.
#[derive(Debug)]
pub struct Mapping {
    map: Map,
    range: BufferRange,
    access: Access,
}

impl Mapping {
    /// The mapped range.
    pub fn range(&self) -> &BufferRange {
        &self.range
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.range.len()
    }

    /// True if the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The address of the first byte, for engines that take a pointer: buffers registered with io_uring,
    /// `cuMemHostRegister`, `ucp_mem_map`. The mapping has [`Mapping::len`] bytes. The pointer is null in a
    /// forked child if the buffer is lent.
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
    /// Getting the pointer is safe. A user of the pointer ensures:
    ///
    /// - The pointer is used only while the mapping exists, and only within its length. An engine that keeps
    ///   the pointer must have dropped it (deregistration, completion of all work) before the mapping is
    ///   dropped.
    /// - Bytes are written only if the mapping was made for writing; otherwise the CPU gets `SIGSEGV`, and a
    ///   system call `EFAULT`.
    /// - No reference (`&[u8]`, `&mut [u8]`) to the bytes exists at any time, because devices and other
    ///   processes change them. Pass the pointer to the kernel or to a library, or copy with `read_volatile`
    ///   and `write_volatile`.
    /// - The CPU accesses the bytes only between [`Mapping::begin_cpu_access`] and its end. Before a device
    ///   or the kernel accesses them, wait for the buffer's fences ([`DmaBuf::wait`](crate::DmaBuf::wait)).
    /// - A copy by the CPU may raise `SIGBUS` when the buffer's device goes away. Memory without struct pages
    ///   cannot be pinned: direct I/O and registrations fail with `EFAULT`.
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

    /// Begins a CPU access, in which bytes may be copied in or out. `DMA_BUF_IOCTL_SYNC` waits for the
    /// devices' fences, and synchronises caches that are not coherent.
    ///
    /// Accesses do not nest: the guard borrows the mapping mutably, so a second access does not compile.
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
    /// The wait has no time limit. For a limit, call [`DmaBuf::wait`](crate::DmaBuf::wait) first.
    ///
    /// # Errors [`BufferError::Access`] if the mapping does not allow this access; [`BufferError::Inherited`]
    /// for lent memory in a child of the process that mapped it; or the ioctl's error.
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
    /// As [`Mapping::begin_cpu_access`] but without a guard, for other languages. The caller ends each access
    /// and does not nest accesses.
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
    /// Ends an access from [`Mapping::begin_unguarded`]. `last_write` is the offset of the byte written last;
    /// `None` if none was written.
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

    /// Copies bytes to the mapping's start, in one CPU access.
    ///
    /// # Errors As [`Mapping::begin_cpu_access`]; [`BufferError::OutOfRange`] if the mapping is shorter than
    /// `bytes`.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<(), BufferError> {
        let mut cpu = self.begin_cpu_access(Access::Write)?;
        cpu.write_at(0, bytes)?;
        cpu.end()
    }

    /// Fills `into` from the mapping's start, in one CPU access.
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
    /// Maps the range. `access` is what the mapping will be used for, by the CPU or an importer; writing
    /// needs a writable buffer.
    ///
    /// A child forked later inherits the mapping, unless the buffer is lent: its publisher does not know the
    /// child.
    ///
    /// # Errors [`BufferError::Access`]; [`BufferError::Inherited`] for a buffer that was lent to a process
    /// from which this one was forked; or the failed call.
    pub fn map(&self, access: Access) -> Result<Mapping, BufferError> {
        let borrower = self.usable(access)?;
        let (fd, at) = self.buffer().mappable();
        // Fault handlers of graphics drivers count pages from the mapping's start instead of the buffer's
        // (drm_gem_shmem_fault in drivers/gpu/drm/drm_gem_shmem_helper.c). So a mapping with an offset shows
        // the wrong bytes, without an error. Unless the exporter is known to honour offsets, map from the
        // buffer's start.
        let honours_offset = self.buffer().host_memory().is_some()
            || matches!(
                self.buffer().provenance().kind,
                Kind::Bar | Kind::Vfio | Kind::Provider | Kind::Heap
            );
        // An empty range maps one page, too, but at the end of a dma-buf there is none to map.
        let offset = if self.is_empty() { 0 } else { self.offset() };
        let map = if honours_offset {
            Map::shared(fd, at + offset, self.len(), access.writes())
        } else {
            Map::shared_from(fd, at, offset, self.len(), access.writes())
        };
        let map = map.map_err(|errno| {
            let cause = SystemError::new("mmap", self.buffer().name(), errno);
            // Errors of exporters without CPU mappings; the kernel returns EINVAL if the exporter lacks the
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

    /// Copies bytes to the range's start: through the buffer's [`Stage`](crate::Stage) if it has one,
    /// otherwise with a mapping and a CPU access of its own. For many copies, keep a [`Mapping`] or a
    /// [`LazyMapping`](crate::LazyMapping).
    ///
    /// # Errors As [`BufferRange::map`] and [`Mapping::begin_cpu_access`]; [`BufferError::OutOfRange`] if the
    /// range is shorter than `bytes`.
    pub fn write_bytes(&self, bytes: &[u8]) -> Result<(), BufferError> {
        match self.upload(bytes) {
            Some(copied) => copied,
            None => self.map(Access::ReadWrite)?.write_bytes(bytes),
        }
    }

    /// Fills `into` from the range's start, in the same way as [`BufferRange::write_bytes`].
    ///
    /// # Errors
    /// As [`BufferRange::write_bytes`].
    pub fn read_bytes(&self, into: &mut [u8]) -> Result<(), BufferError> {
        match self.download(into) {
            Some(copied) => copied,
            None => self.map(Access::Read)?.read_bytes(into),
        }
    }

    /// A copy of the range's bytes, in the same way as [`BufferRange::read_bytes`].
    ///
    /// # Errors As [`BufferRange::write_bytes`].
    ///
    /// # Panics If the allocation fails.
    pub fn to_vec(&self) -> Result<Vec<u8>, BufferError> {
        let mut bytes = vec![0; self.len() as usize];
        self.read_bytes(&mut bytes)?;
        Ok(bytes)
    }
}

/// The CPU's access to a mapping, from [`Mapping::begin_cpu_access`] until it is ended or dropped. After
/// that, devices and other processes see the written bytes.
///
/// Bytes are copied, or read and written as values of plain types ([`Pod`]); each byte is accessed exactly
/// once. A value of 1, 2, 4 or 8 bytes at an address that is a multiple of its size is one access, as device
/// registers need it. The address of a range with a page-aligned offset is page-aligned.
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
    /// The offset of the byte written last, if any.
    last_write: Option<usize>,
    open: bool,
}

impl CpuAccess<'_> {
    /// Copies bytes from `offset` out of the mapping. Each byte is read once.
    ///
    /// # Errors [`BufferError::Access`] if the access was begun for writing only, and
    /// [`BufferError::OutOfRange`].
    /// [`BufferError::OutOfRange`].
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), BufferError> {
        let offset = self.check(offset, into.len(), "read", self.access.reads())?;
        self.mapping.map.copy_out(offset, into);
        Ok(())
    }

    /// Copies bytes to `offset` in the mapping. Each byte is written once.
    ///
    /// # Errors [`BufferError::Access`] if the access was begun for reading only, and
    /// [`BufferError::OutOfRange`].
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), BufferError> {
        let offset = self.check(offset, from.len(), "write", self.access.writes())?;
        self.mapping.map.copy_in(offset, from);
        if !from.is_empty() {
            self.last_write = Some(offset + from.len() - 1);
        }
        Ok(())
    }

    /// Notes that bytes up to `end` were written through [`Mapping::map`], so that the end of the access
    /// waits for them.
    #[doc(hidden)]
    pub fn copied_in(&mut self, end: u64) {
        self.last_write = end.checked_sub(1).map(|last| last as usize);
    }

    /// The mapping. During the access, system calls such as file I/O may use its bytes, too.
    pub fn mapping(&self) -> &Mapping {
        &*self.mapping
    }

    /// Reads a value at `offset`, in bytes; any alignment.
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

    /// Reads consecutive values from `offset`, in bytes.
    ///
    /// # Errors
    /// As [`CpuAccess::read_at`].
    pub fn read_slice<T: Pod>(&self, offset: u64, into: &mut [T]) -> Result<(), BufferError> {
        self.read_at(offset, bytemuck::cast_slice_mut(into))
    }

    /// Writes consecutive values from `offset`, in bytes.
    ///
    /// # Errors
    /// As [`CpuAccess::write_at`].
    pub fn write_slice<T: Pod>(&mut self, offset: u64, from: &[T]) -> Result<(), BufferError> {
        self.write_at(offset, bytemuck::cast_slice(from))
    }

    /// Ends the access; devices then see the written bytes. Dropping the guard does the same but discards an
    /// error.
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
            // `slice` makes the error.
            self.mapping.range.slice(offset, length as u64)?;
        }
        Ok(offset as usize)
    }
}

impl Drop for CpuAccess<'_> {
    fn drop(&mut self) {
        if self.open {
            // Discards an error: the kernel returns one only if the buffer is gone.
            let _ = self.finish();
        }
    }
}
