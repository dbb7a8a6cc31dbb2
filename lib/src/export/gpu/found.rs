//! The results of an export of a GPU's memory: descriptors, a buffer, and a receipt.

use std::error::Error;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use super::super::plain;
use crate::buffer::{Buffer, BufferRange, DmaBuf, Kind, Provenance, Stage};
use crate::error::{BufferError, ExportError, SystemError};
use crate::sys::gpu::{Allocated, Failed};
use crate::topology::PciAddress;

/// A GPU's runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Runtime {
    /// NVIDIA's driver API, the base of CUDA programs and PyTorch.
    Cuda,
    /// ROCm's runtime, the base of HIP.
    Hsa,
    /// Intel's runtime, the base of SYCL.
    LevelZero,
}

impl Runtime {
    /// All runtimes, in the order in which they are tried.
    pub const ALL: [Runtime; 3] = [Runtime::Cuda, Runtime::Hsa, Runtime::LevelZero];

    /// The file name of the library, for the dynamic loader.
    pub fn library(self) -> &'static str {
        match self {
            Runtime::Cuda => crate::sys::gpu::cuda::NAME,
            Runtime::Hsa => crate::sys::gpu::hsa::NAME,
            Runtime::LevelZero => crate::sys::gpu::level_zero::NAME,
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Runtime::Cuda => "CUDA",
            Runtime::Hsa => "ROCm",
            Runtime::LevelZero => "Level Zero",
        })
    }
}

/// The requested route of an importer to the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mapping {
    /// Over PCIe, through the device's BAR: for NICs and disks on PCIe.
    Pcie,
    /// The driver's choice: PCIe on most machines, the coherent link on machines whose CPU has
    /// one (GB200). A NIC on PCIe cannot use that link.
    Driver,
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mapping::Pcie => "PCIe",
            Mapping::Driver => "the driver's choice",
        })
    }
}

/// A place of bytes, by the addresses that the kernel gives an importer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// In a BAR of this device, or of one that the kernel does not name.
    Bar(Option<PciAddress>),
    /// In system memory: the driver has exported, or moved, the bytes there.
    System,
    /// In more than one of these, or where the kernel knows no BAR: beyond a coherent link, for one.
    Unknown,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Bar(Some(device)) => write!(f, "a BAR of {device}"),
            Place::Bar(None) => f.write_str("a BAR"),
            Place::System => f.write_str("system memory"),
            Place::Unknown => f.write_str("a place that the kernel does not know"),
        }
    }
}

/// The kernel's word on where an importer finds the bytes ([`Exported::ask`]).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Seen {
    /// The device whose driver would import it.
    pub by: PciAddress,
    /// The descriptor.
    pub mapping: Mapping,
    /// The place, or why the kernel refuses the importer.
    pub place: Result<Place, String>,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Seen { by, mapping, .. } = self;
        match &self.place {
            Ok(place) => write!(f, "{by} finds the bytes in {place} (mapping: {mapping})"),
            Err(why) => write!(f, "{by} gets nothing (mapping: {mapping}): {why}"),
        }
    }
}

/// The properties of an export, and the calls that failed on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt {
    /// The runtime that owns the memory.
    pub runtime: Runtime,
    /// The GPU; `None` if the runtime does not tell.
    pub device: Option<PciAddress>,
    /// The mapping of the first descriptor.
    pub mapping: Mapping,
    /// True if both mappings have a descriptor: [`Mapping::Pcie`] is the first,
    /// [`Mapping::Driver`] the other.
    pub both: bool,
    /// Number of bytes in the dma-buf before the range. A runtime exports whole pages or whole
    /// allocations.
    pub added_before: u64,
    /// Number of bytes in the dma-buf after the range.
    pub added_after: u64,
    /// True if the runtime guarantees that its synchronous copies into this memory are complete
    /// when they return, so that a device that reads the memory by DMA sees them.
    pub ordered: bool,
    /// Calls that failed or are missing, with their answers. The export worked without them.
    pub notes: Vec<String>,
    /// Where importers find the bytes, as far as the kernel was asked ([`Exported::ask`]).
    pub seen: Vec<Seen>,
}

impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} memory", self.runtime)?;
        if let Some(device) = self.device {
            write!(f, " of {device}")?;
        }
        write!(f, ", mapping: {}", self.mapping)?;
        if self.both {
            write!(f, " (and {})", Mapping::Driver)?;
        }
        let (before, after) = (self.added_before, self.added_after);
        write!(f, ", bytes added: {before} before, {after} after")?;
        self.seen.iter().try_for_each(|seen| write!(f, "; {seen}"))
    }
}

/// A range of GPU memory with copies that need no mapping.
pub(super) trait Copies: Send + Sync {
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Failed>;
    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Failed>;
    /// See [`Exported::flush`].
    fn flush(&self) -> Result<(), Failed>;
}

/// The [`Stage`] of GPU memory: the copies of its runtime.
struct ByRuntime(Arc<dyn Copies>);

impl Stage for ByRuntime {
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.0.upload(offset, from).map_err(told)
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        // The bytes must include earlier writes of other devices.
        self.0.flush().map_err(told)?;
        self.0.download(offset, into).map_err(told)
    }
}

fn told(failed: Failed) -> Box<dyn Error + Send + Sync> {
    format!("{}: {failed}", failed.call).into()
}

/// GPU memory as descriptors, for programs that pass them to another library
/// (`ibv_reg_dmabuf_mr`).
///
/// [`Descriptors::into_buffer`] makes a [`Buffer`] of them.
#[non_exhaustive]
pub struct Descriptors {
    /// A dma-buf with the range's bytes, with the best available mapping. Closed on exec.
    pub fd: OwnedFd,
    /// Offset of the range in the dma-buf, in bytes.
    pub offset: u64,
    /// The range's length in bytes.
    pub length: u64,
    /// The same bytes at the same offset with the other mapping, if there is one.
    pub other: Option<OwnedFd>,
    /// The properties of the export.
    pub receipt: Receipt,
    pointer: u64,
    memory: Arc<dyn Copies>,
    name: String,
}

impl fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Descriptors")
            .field("fd", &self.fd)
            .field("offset", &self.offset)
            .field("length", &self.length)
            .field("other", &self.other)
            .field("receipt", &self.receipt)
            .finish_non_exhaustive()
    }
}

impl Descriptors {
    /// Checks the descriptors of a runtime, and sets close-on-exec. `memory` copies to and from
    /// the dma-buf, with offsets from the dma-buf's start. The receipt has the bytes around the
    /// range.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] if a dma-buf is smaller than the range and these bytes.
    pub(super) fn checked(
        of: Allocated,
        fd: OwnedFd,
        other: Option<OwnedFd>,
        receipt: Receipt,
        memory: Arc<dyn Copies>,
    ) -> Result<Descriptors, ExportError> {
        let name = format!("{} memory at {:#x}", receipt.runtime, of.pointer);
        let (offset, length) = (receipt.added_before, of.length);
        let needed = offset + length + receipt.added_after;
        for fd in [Some(&fd), other.as_ref()].into_iter().flatten() {
            close_on_exec(fd)
                .map_err(|errno| plain(SystemError::new("fcntl(F_SETFD)", name.clone(), errno)))?;
            let end = size_of(fd, &name)?;
            if end < needed {
                return Err(ExportError::Buffer(BufferError::OutOfRange {
                    object: format!("the dma-buf that {} gave for {name}", receipt.runtime),
                    offset: 0,
                    length: needed,
                    size: end,
                }));
            }
        }
        Ok(Descriptors {
            pointer: of.pointer,
            fd,
            offset,
            length,
            other,
            receipt,
            memory,
            name,
        })
    }

    /// The copies of the runtime, for a [`Buffer`] that another library makes of the
    /// descriptor. Offsets count from the dma-buf's start.
    pub fn stage(&self) -> impl Stage + use<> {
        ByRuntime(self.memory.clone())
    }

    /// Makes a buffer's range, whose bytes the CPU copies through the runtime.
    ///
    /// # Errors
    /// [`BufferError::NotADmaBuf`], or the call that failed. The descriptors are closed in both
    /// cases.
    pub fn into_buffer(self) -> Result<Exported, ExportError> {
        let (name, device, memory) = (self.name, self.receipt.device, self.memory);
        let (offset, length) = (self.offset, self.length);
        let range = |fd: OwnedFd| -> Result<BufferRange, BufferError> {
            let provenance = Provenance {
                // The importer finds out the location of the bytes: drivers have exported
                // system memory.
                kind: Kind::Other,
                device,
                bar: None,
                name: name.clone(),
            };
            // Memory of one GPU can differ, so proofs about other buffers must not apply to
            // this one.
            let buffer = Buffer::from_dmabuf(DmaBuf::from_fd(fd)?, provenance).without_voucher();
            let buffer = buffer.with_stage(ByRuntime(memory.clone()));
            buffer.range(offset, length)
        };
        Ok(Exported {
            range: range(self.fd)?,
            other: self.other.map(range).transpose()?,
            receipt: self.receipt,
            pointer: self.pointer,
            memory,
        })
    }
}

fn close_on_exec(fd: impl AsFd) -> rustix::io::Result<()> {
    let flags = fcntl_getfd(&fd)?;
    fcntl_setfd(fd, flags | FdFlags::CLOEXEC)
}

/// GPU memory as a buffer.
#[non_exhaustive]
pub struct Exported {
    /// The requested memory, at its exact offset in the dma-buf.
    pub range: BufferRange,
    /// The same bytes with the other mapping, if there is one, for importers that refuse the
    /// first.
    pub other: Option<BufferRange>,
    /// The properties of the export.
    pub receipt: Receipt,
    pointer: u64,
    memory: Arc<dyn Copies>,
}

impl fmt::Debug for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exported")
            .field("range", &self.range)
            .field("other", &self.other)
            .field("receipt", &self.receipt)
            .finish_non_exhaustive()
    }
}

impl Exported {
    /// The range's address in the runtime, for kernel launches.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Waits until the GPU itself sees the writes of other devices to its memory
    /// (`cuFlushGPUDirectRDMAWrites`). Call this between a device's write and the launch of a
    /// kernel that reads.
    ///
    /// Copies of the range by the CPU include this wait.
    ///
    /// # Errors
    /// [`ExportError::Runtime`].
    #[doc(alias = "cuFlushGPUDirectRDMAWrites")]
    pub fn flush(&self) -> Result<(), ExportError> {
        let object = self.range.buffer().name().to_owned();
        let flushed = self.memory.flush();
        flushed.map_err(|failed| refused(&failed, object, String::new()))
    }
}

/// The size of a dma-buf in bytes. `object` names the buffer in errors.
pub(super) fn size_of(fd: &OwnedFd, object: &str) -> Result<u64, ExportError> {
    rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0))
        .map_err(|errno| plain(SystemError::new("lseek", object, errno)))
}

/// The error for a runtime's refusal.
pub(super) fn refused(failed: &Failed, object: String, hint: String) -> ExportError {
    ExportError::Runtime {
        call: failed.call,
        object,
        answer: failed.to_string(),
        hint,
    }
}

/// The number of bytes before and after a range that complete its first and last page; `None`
/// if the end exceeds the address space.
pub(super) fn to_pages(pointer: u64, length: u64, page: u64) -> Option<(u64, u64)> {
    let before = pointer % page;
    let end = pointer.checked_add(length)?;
    let after = end.checked_next_multiple_of(page)? - end;
    Some((before, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_aligned_outwards_to_the_page_size_of_the_machine_that_runs() {
        assert_eq!(to_pages(0x20000, 4096, 4096), Some((0, 0)));
        assert_eq!(to_pages(0x20001, 4096, 4096), Some((1, 4095)));
        assert_eq!(to_pages(0x20fff, 1, 4096), Some((4095, 0)));
        assert_eq!(to_pages(0x20fff, 2, 4096), Some((4095, 4095)));
        // Some arm64 machines have pages of 64 KiB.
        assert_eq!(to_pages(0x21000, 4096, 65536), Some((0x1000, 0xe000)));
        assert_eq!(to_pages(u64::MAX, 2, 4096), None);
        assert_eq!(to_pages(u64::MAX - 4096, 10, 4096), None);
    }
}
