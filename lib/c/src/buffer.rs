//! Buffers: making them, and the CPU's access to their bytes.

use std::ffi::{c_char, c_int, c_void};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use peerbuf::Access;
use peerbuf::buffer::{BufferRange, Kind, Provenance};
use peerbuf::engine::Handle;
use peerbuf::error::BufferError;
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::{heap, memfd, udmabuf};
use peerbuf::plan::topology::PciAddress;
use peerbuf::share::Lease;

use crate::failure::{Code, Failure};
use crate::foreign::{argument, descriptor, make, place, run, text};
use crate::handle::{free, get};

/// Access: read.
pub const PEERBUF_READ: u32 = 1;
/// Access: write.
pub const PEERBUF_WRITE: u32 = 2;
/// Access: read and write.
pub const PEERBUF_READ_WRITE: u32 = 3;
/// As an offset in a BAR: any. As a length: up to the end.
pub const PEERBUF_ANY: u64 = u64::MAX;
/// A buffer's dma-buf.
pub const PEERBUF_DMABUF: u32 = 1;
/// The memfd with a buffer's bytes.
pub const PEERBUF_MEMFD: u32 = 2;

/// The filesystems of memfds: tmpfs and hugetlbfs (linux/magic.h).
const MEMFDS: [u64; 2] = [0x0102_1994, 0x9584_58f6];

/// Memory that devices, files and processes can share.
pub struct Buffer(pub(crate) Held);

/// The owner of the memory.
pub(crate) enum Held {
    Own(peerbuf::Buffer),
    Lent(Lease),
}

impl Buffer {
    pub(crate) fn own(buffer: peerbuf::Buffer) -> Buffer {
        Buffer(Held::Own(buffer))
    }

    pub(crate) fn get(&self) -> &peerbuf::Buffer {
        match &self.0 {
            Held::Own(buffer) => buffer,
            Held::Lent(lease) => lease,
        }
    }

    /// The range of `length` bytes, or up to the end.
    pub(crate) fn range(&self, offset: u64, length: u64) -> Result<BufferRange, Failure> {
        let buffer = self.get();
        let length = match length {
            PEERBUF_ANY => buffer.size().saturating_sub(offset),
            length => length,
        };
        Ok(buffer.range(offset, length)?)
    }
}

/// Facts about a buffer.
#[repr(C)]
pub struct BufferInfo {
    /// The size in bytes.
    pub size: u64,
    /// The generation of a lent buffer; 0 for others.
    pub generation: u64,
    /// The kind of exporter, as its number in docs/wire.md.
    pub kind: u32,
    /// Whether it is writable.
    pub writable: bool,
    /// Whether it has a dma-buf.
    pub has_dmabuf: bool,
    /// Whether it has a memfd.
    pub has_memfd: bool,
}

/// Makes a buffer of `length` zero bytes of memory, without a dma-buf: for files and processes, on any
/// machine. `name` is for diagnostics, here and below.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_export_memfd(
    name: *const c_char,
    length: u64,
    buffer: Option<&mut MaybeUninit<*mut Buffer>>,
) -> Code {
    make(buffer, || {
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let name = unsafe { text("the name", name) }?;
        Ok(Buffer::own(memfd::export(name, length)?))
    })
}

/// Makes a dma-buf of `length` zero bytes of memory (/dev/udmabuf); `length` is a multiple of the page size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_export_udmabuf(
    name: *const c_char,
    length: u64,
    buffer: Option<&mut MaybeUninit<*mut Buffer>>,
) -> Code {
    make(buffer, || {
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let name = unsafe { text("the name", name) }?;
        Ok(Buffer::own(udmabuf::export(name, length)?))
    })
}

/// Makes a dma-buf of `length` zero bytes from the dma-heap `heap`, such as `system`; `length` is a multiple
/// of the page size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_export_heap(
    heap: *const c_char,
    name: *const c_char,
    length: u64,
    buffer: Option<&mut MaybeUninit<*mut Buffer>>,
) -> Code {
    make(buffer, || {
        // SAFETY: the caller passes valid strings, as the crate's documentation demands.
        let (heap, name) = unsafe { (text("the heap", heap)?, text("the name", name)?) };
        Ok(Buffer::own(heap::Heap::open(heap)?.export(name, length)?))
    })
}

/// Exports part of a device's BAR with peerbuf.ko. `device` is a PCI address, such as `0000:01:00.0`, or the
/// path of the device's node. `offset` may be PEERBUF_ANY. `access` is the access that the descriptor allows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_export_bar(
    device: *const c_char,
    bar: u32,
    offset: u64,
    length: u64,
    access: u32,
    buffer: Option<&mut MaybeUninit<*mut Buffer>>,
) -> Code {
    make(buffer, || {
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let device = unsafe { text("the device", device) }?;
        let request = Request {
            bar: u8::try_from(bar).map_err(|_| argument(format!("there is no BAR {bar}")))?,
            offset: (offset != PEERBUF_ANY).then_some(offset),
            length,
            access: crate::foreign::access(access)?,
        };
        let device = if device.starts_with('/') {
            Device::open_node(device)?
        } else {
            let address = device.parse::<PciAddress>();
            Device::open(address.map_err(|error| argument(error.to_string()))?)?
        };
        Ok(Buffer::own(device.export(request)?))
    })
}

/// Takes a dma-buf, or a memfd with F_SEAL_SHRINK, that another library or program made. Facts that the
/// kernel does not report stay unknown. The caller keeps the descriptor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_import(
    fd: c_int,
    buffer: Option<&mut MaybeUninit<*mut Buffer>>,
) -> Code {
    make(buffer, || {
        // SAFETY: the caller's descriptor is open or negative, as the crate's documentation demands.
        let fd = unsafe { descriptor(fd) }?;
        Ok(Buffer::own(import(fd)?))
    })
}

/// As [`peerbuf_import`], for other languages that build on this crate.
///
/// # Errors
/// [`Code::NotADmabuf`], [`Code::NotSealed`], or the call that failed.
pub fn import(fd: OwnedFd) -> Result<peerbuf::Buffer, Failure> {
    let again = fd
        .try_clone()
        .map_err(|error| Failure::new(Code::System, format!("a descriptor: {error}")))?;
    match peerbuf::Buffer::import(fd) {
        Err(BufferError::NotADmaBuf { found, .. }) if is_memory(found, &again) => {
            let name = name_of(&again);
            let provenance = Provenance {
                kind: Kind::Memfd,
                device: None,
                bar: None,
                name,
            };
            Ok(peerbuf::Buffer::from_host_memory(again, None, provenance)?)
        }
        taken => Ok(taken?),
    }
}

/// Whether the file is a memfd, or could be one.
fn is_memory(filesystem: u64, fd: &OwnedFd) -> bool {
    let stat = fd.try_clone().and_then(|fd| File::from(fd).metadata());
    MEMFDS.contains(&filesystem) && stat.is_ok_and(|stat| stat.is_file())
}

/// The name that its creator gave a memfd.
fn name_of(memfd: &OwnedFd) -> String {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", memfd.as_raw_fd()));
    let link = link.unwrap_or_default().display().to_string();
    let name = link.trim_start_matches("/memfd:");
    name.trim_end_matches(" (deleted)").to_owned()
}

/// Returns facts about a buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_buffer_get(
    buffer: *const Buffer,
    info: Option<&mut MaybeUninit<BufferInfo>>,
) -> Code {
    run(|| {
        let held = get(buffer)?;
        let buffer = held.get();
        let (generation, writable) = match &held.0 {
            Held::Own(buffer) => (0, buffer.is_writable()),
            Held::Lent(lease) => (lease.generation(), lease.is_writable()),
        };
        place("what is known", info)?.write(BufferInfo {
            size: buffer.size(),
            generation,
            kind: buffer.provenance().kind.number(),
            writable,
            has_dmabuf: buffer.dmabuf().is_some(),
            has_memfd: buffer.host_memory().is_some(),
        });
        Ok(())
    })
}

/// Returns a new descriptor of a buffer for another library: PEERBUF_DMABUF or PEERBUF_MEMFD. The caller
/// closes it. -1 on failure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_buffer_descriptor(
    buffer: *const Buffer,
    which: u32,
    fd: Option<&mut MaybeUninit<c_int>>,
) -> Code {
    run(|| {
        let fd = place("the descriptor", fd)?;
        fd.write(-1);
        let held = get(buffer)?;
        let buffer = held.get();
        let found = match which {
            PEERBUF_DMABUF => buffer.dmabuf().map(AsFd::as_fd),
            PEERBUF_MEMFD => buffer.host_memory(),
            other => return Err(argument(format!("{other} is no descriptor of a buffer"))),
        };
        let found = found.ok_or_else(|| {
            Failure::new(
                Code::Unavailable,
                format!("{buffer} has no such descriptor"),
            )
        })?;
        let again: OwnedFd = found
            .try_clone_to_owned()
            .map_err(|error| Failure::new(Code::System, format!("{buffer}: {error}")))?;
        fd.write(again.into_raw_fd());
        Ok(())
    })
}

/// Tells which handle of a buffer an engine takes: "ucx", "nixl", "libfabric" (its providers tcp, shm, sockets and udp) or
/// "verbs". PEERBUF_MEMFD: a pointer to a mapping of that descriptor; PEERBUF_DMABUF: that descriptor itself.
/// PEERBUF_CODE_UNSUITABLE for an engine that is not known, and for a buffer without a handle that the engine takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_buffer_for_engine(
    buffer: *const Buffer,
    engine: *const c_char,
    which: Option<&mut MaybeUninit<u32>>,
) -> Code {
    run(|| {
        let which = place("the handle", which)?;
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let engine = unsafe { text("the engine", engine) }?;
        let held = get(buffer)?;
        which.write(match held.get().for_engine(engine)? {
            Handle::DmaBuf(_) => PEERBUF_DMABUF,
            _ => PEERBUF_MEMFD,
        });
        Ok(())
    })
}

/// Frees a buffer. A lent buffer returns to its publisher once its mappings are freed, too. Null does
/// nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_buffer_free(buffer: *mut Buffer) -> Code {
    run(|| free(buffer))
}

/// A buffer's bytes in this process.
pub struct Mapping(Mutex<Mapped>);

struct Mapped {
    mapping: peerbuf::buffer::Mapping,
    begun: Option<Access>,
    /// Keeps a lent buffer.
    _buffer: std::sync::Arc<Buffer>,
}

impl Mapped {
    fn end(&mut self) -> Result<(), Failure> {
        let Some(access) = self.begun.take() else {
            let message = "no access to the mapping has begun";
            return Err(Failure::new(Code::Order, message));
        };
        // C does not report which bytes it wrote. The last one suffices: all are behind one bus.
        let last = self.mapping.len().checked_sub(1);
        let last = last.filter(|_| access.writes()).map(|last| last as usize);
        Ok(self.mapping.end_unguarded(access, last)?)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Ignores an error: often there is no access to end.
        let _ = self.end();
    }
}

impl Mapping {
    fn lock(&self) -> MutexGuard<'_, Mapped> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Maps `length` bytes of a buffer from `offset`, or up to the end (PEERBUF_ANY). The mapping keeps the
/// buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_map(
    buffer: *const Buffer,
    offset: u64,
    length: u64,
    access: u32,
    mapping: Option<&mut MaybeUninit<*mut Mapping>>,
) -> Code {
    make(mapping, || {
        let buffer = get(buffer)?;
        let mapping = buffer
            .range(offset, length)?
            .map(crate::foreign::access(access)?)?;
        Ok(Mapping(Mutex::new(Mapped {
            mapping,
            begun: None,
            _buffer: buffer,
        })))
    })
}

/// Returns the address and the number of the bytes, valid until the mapping is freed. Others may change the
/// bytes at any time; an access to memory of a device that went away raises SIGBUS.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_mapping_get(
    mapping: *const Mapping,
    data: Option<&mut MaybeUninit<*mut c_void>>,
    length: Option<&mut MaybeUninit<u64>>,
) -> Code {
    run(|| {
        let mapping = get(mapping)?;
        let mapped = mapping.lock();
        let bytes = mapped.mapping.len();
        place("the address", data)?.write(mapped.mapping.as_ptr().cast());
        if let Some(length) = length {
            length.write(bytes);
        }
        Ok(())
    })
}

/// Begins a CPU access to the bytes (DMA_BUF_IOCTL_SYNC): waits for devices, and synchronises caches. One
/// access at a time for each mapping.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_begin_access(mapping: *const Mapping, access: u32) -> Code {
    run(|| {
        let access = crate::foreign::access(access)?;
        let mapping = get(mapping)?;
        let mut mapped = mapping.lock();
        if mapped.begun.is_some() {
            let message = "an access to the mapping has begun already";
            return Err(Failure::new(Code::Order, message));
        }
        mapped.mapping.begin_unguarded(access)?;
        mapped.begun = Some(access);
        Ok(())
    })
}

/// Ends the CPU access: devices then see the written bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_end_access(mapping: *const Mapping) -> Code {
    run(|| get(mapping)?.lock().end())
}

/// Frees a mapping, and ends an access to it. Null does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_mapping_free(mapping: *mut Mapping) -> Code {
    run(|| free(mapping))
}
