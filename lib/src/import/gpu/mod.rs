//! CUDA, ROCm and Level Zero: a GPU reaches a buffer that somebody else made, at an address of its own.
//!
//! The driver decides how. [`Way::ALL`] lists the ways, best first; each is tried, and [`Attachment::refused`] has the
//! answer to each better one. Drivers differ in what they take by exporter, so what a driver said once of an exporter
//! is remembered for the process ([`known`]), and it is not asked again.
//!
//! | | CUDA | ROCm | Level Zero |
//! |---|---|---|---|
//! | [`Way::DmaBuf`] | `cuImportExternalMemory` | `hsa_amd_interop_map_buffer` | `ze_external_memory_import_fd_t` |
//! | [`Way::HostMemory`] | `cuMemHostRegister` | `hsa_amd_memory_lock` | |
//! | [`Way::IoMemory`] | `cuMemHostRegister` with `IOMEMORY` | | |
//!
//! Imports and registrations ignore the dma-buf's fences. A program that launches work on the address waits for them
//! before ([`DmaBuf::wait`](crate::DmaBuf::wait)).
//!
//! No machine with a GPU has run this. The tests run it against *stand-ins*; `docs/gpu.md` says which.
//!
//! ```no_run
//! use peerbuf::{export::udmabuf, import::gpu::{GpuImporter, Runtime}};
//!
//! # fn launch(_: u64, _: u64) {}
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let buffer = udmabuf::export("frame", 1 << 20)?;
//! let frame = GpuImporter::open(Runtime::Cuda, 0)?.attach(&buffer.whole())?;
//! println!("by {}; {:?}", frame.way(), frame.refused());
//! launch(frame.pointer(), frame.range().len()); // and wait for the kernel before `frame` is dropped
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "module")]
mod asked;
mod known;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{Attached, Importer, impossible};
use crate::buffer::{Access, Buffer, BufferRange, Kind};
use crate::error::{BufferError, ImportError};
use crate::export::gpu::{bdf_id, from_parts};
use crate::plan::{Path, Plan, ReasonCode};
use crate::sys::given::Given;
use crate::sys::gpu::{Failed, Imports, Reached, cuda, hsa, level_zero};
use crate::topology::PciAddress;

pub use crate::export::gpu::{Runtime, probe};
pub use known::{Known, forget, known};

/// How long the dma-buf's fences are waited for when bytes go by [`Importer`].
const LIMIT: Duration = Duration::from_secs(30);

/// How a GPU is brought to reach a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Way {
    /// The driver imports the dma-buf: the kernel knows both.
    DmaBuf,
    /// The driver pins the pages that this process has mapped, such as those of the memfd behind a udmabuf.
    HostMemory,
    /// The driver takes the addresses of a BAR that this process has mapped. The kernel knows nothing of it: nothing
    /// tells the GPU that the memory has moved.
    #[doc(alias = "CU_MEMHOSTREGISTER_IOMEMORY")]
    IoMemory,
}

impl Way {
    /// All, best first.
    pub const ALL: [Way; 3] = [Way::DmaBuf, Way::HostMemory, Way::IoMemory];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Way::DmaBuf => "dma-buf",
            Way::HostMemory => "registered host memory",
            Way::IoMemory => "registered I/O memory",
        })
    }
}

/// A way that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refused {
    /// The way.
    pub way: Way,
    /// Which kind of reason, for programs.
    pub code: ReasonCode,
    /// The call and the runtime's answer, or why it was not called.
    pub evidence: String,
    /// True for an answer to an earlier attachment of the same exporter's: the driver was not asked again.
    pub remembered: bool,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let again = match self.remembered {
            true => " (before)",
            false => "",
        };
        write!(f, "not by {}: {}{again}", self.way, self.evidence)
    }
}

/// A GPU that buffers can be attached to.
#[derive(Clone)]
pub struct GpuImporter {
    gpu: Arc<dyn Imports>,
    runtime: Runtime,
    number: u32,
    address: Option<PciAddress>,
    stays: bool,
}

impl fmt::Debug for GpuImporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuImporter")
            .field("runtime", &self.runtime)
            .field("number", &self.number)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl GpuImporter {
    /// Opens a device by the runtime's number, from 0 on.
    ///
    /// # Errors
    /// [`ImportError::Runtime`] for a runtime that cannot be opened and a device that is not there.
    pub fn open(runtime: Runtime, device: u32) -> Result<GpuImporter, ImportError> {
        let refused = |answer: String| ImportError::Runtime {
            call: "open",
            object: format!("{runtime} device {device} ({})", runtime.library()),
            answer,
            hint: String::new(),
        };
        let (gpu, address): (Arc<dyn Imports>, _) = match runtime {
            Runtime::Cuda => {
                let gpu = cuda::Gpu::open(device).map_err(refused)?;
                let bus_id = gpu
                    .bus_id()
                    .map_err(|failed| refused(format!("{}: {failed}", failed.call)))?;
                (Arc::new(gpu), bus_id.parse().ok())
            }
            Runtime::Hsa => {
                let gpu = hsa::Gpu::open(device).map_err(refused)?;
                let address = gpu.address().and_then(bdf_id);
                (Arc::new(gpu), address)
            }
            Runtime::LevelZero => {
                let gpu = level_zero::Gpu::open(device).map_err(refused)?;
                let address = gpu.address().and_then(from_parts);
                (Arc::new(gpu), address)
            }
        };
        Ok(GpuImporter {
            gpu,
            runtime,
            number: device,
            address,
            stays: false,
        })
    }

    /// Allows [`Way::IoMemory`] for buffers of peerbuf.ko, which can be moved and revoked. Without it, only BARs of
    /// vfio-pci are registered so, whose devices this process drives.
    ///
    /// # Safety
    /// Buffers of peerbuf.ko that are attached stay where they are for as long: nobody moves or revokes one, unbinds
    /// or resets its device, or closes its exporter's node. The GPU would go on with the addresses, which may be
    /// another buffer's by then.
    #[must_use]
    // Nothing unsafe is done here: the caller's word is passed on.
    #[allow(unsafe_code)]
    pub unsafe fn with_io_memory(mut self) -> GpuImporter {
        self.stays = true;
        self
    }

    /// For people: the runtime, and the device's number.
    pub fn name(&self) -> String {
        format!("{} {}", self.runtime, self.number)
    }

    /// The GPU's address; `None` where the runtime does not say.
    pub fn address(&self) -> Option<PciAddress> {
        self.address
    }

    /// Brings the range and the GPU together, by the best way that its driver takes.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] with the answer to each way; [`BufferError::Access`] for a buffer that may only be
    /// read, since the GPU would write through it; [`ImportError::System`] where there is no descriptor left.
    #[doc(alias = "cuImportExternalMemory")]
    #[doc(alias = "cuMemHostRegister")]
    #[doc(alias = "hsa_amd_interop_map_buffer")]
    pub fn attach(&self, range: &BufferRange) -> Result<Attachment, ImportError> {
        let buffer = range.buffer();
        if !buffer.is_writable() {
            let object = buffer.name().to_owned();
            let wanted = "write";
            return Err(BufferError::Access { object, wanted }.into());
        }
        if range.is_empty() {
            let evidence = "the range is empty".to_owned();
            return Err(impossible(
                &self.name(),
                buffer,
                ReasonCode::TooSmall,
                evidence,
            ));
        }
        let exporter = buffer.dmabuf().map(|dmabuf| dmabuf.exporter());
        let about = |way| Known {
            runtime: self.runtime,
            device: self.number,
            kind: buffer.provenance().kind,
            exporter: exporter.clone().unwrap_or_default(),
            way,
            taken: Ok(()),
        };
        let mut refused = Vec::new();
        for way in Way::ALL {
            let mut refuse = |code, evidence, remembered| {
                refused.push(Refused {
                    way,
                    code,
                    evidence,
                    remembered,
                });
            };
            if let Err((code, evidence)) = self.applies(way, buffer) {
                refuse(code, evidence, false);
                continue;
            }
            let about = about(way);
            if let Some(evidence) = known::refusal(&about) {
                refuse(ReasonCode::AttachRefused, evidence, true);
                continue;
            }
            match self.by(way, range)? {
                Ok((reached, at)) => {
                    known::remember(about);
                    return Ok(Attachment {
                        reached,
                        at,
                        range: range.clone(),
                        way,
                        refused,
                    });
                }
                Err(No::Driver(failed)) => {
                    let evidence = format!("{}: {failed}", failed.call);
                    if self.gpu.is_final(&failed) {
                        known::remember(Known {
                            taken: Err(evidence.clone()),
                            ..about
                        });
                    }
                    refuse(ReasonCode::AttachRefused, evidence, false);
                }
                Err(No::Mapping(evidence)) => refuse(ReasonCode::NotMappable, evidence, false),
            }
        }
        let all: Vec<String> = refused.iter().map(Refused::to_string).collect();
        // What the driver said tells more than what could not be asked.
        let said = |refused: &&Refused| refused.code == ReasonCode::AttachRefused;
        let first = refused.iter().find(said).or(refused.first());
        let code = first.map_or(ReasonCode::AttachRefused, |refused| refused.code);
        Err(impossible(&self.name(), buffer, code, all.join("; ")))
    }

    /// Whether the way is one for such a buffer at all.
    fn applies(&self, way: Way, buffer: &Buffer) -> Result<(), (ReasonCode, String)> {
        let kind = buffer.provenance().kind;
        let in_device = Plan::in_place(buffer).path == Path::PeerToPeer;
        match way {
            Way::DmaBuf if buffer.dmabuf().is_none() => Err((
                ReasonCode::NoDmaBuf,
                "the buffer is host memory without a dma-buf".to_owned(),
            )),
            Way::HostMemory if kind.is_device_memory() => Err((
                ReasonCode::NotHostMemory,
                "the buffer is in a BAR, or may go back there".to_owned(),
            )),
            Way::IoMemory if !in_device => Err((
                ReasonCode::NotDeviceMemory,
                "the buffer is not known to be in a BAR".to_owned(),
            )),
            Way::IoMemory if kind != Kind::Vfio && !self.stays => Err((
                ReasonCode::AttachRefused,
                "a registration does not follow a buffer of peerbuf.ko that is moved or revoked; \
                 GpuImporter::with_io_memory is for one that stays"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// Asks the driver. Returns the range's place in what the GPU reaches, too.
    fn by(&self, way: Way, range: &BufferRange) -> Result<Result<Got, No>, ImportError> {
        let buffer = range.buffer();
        if let (Way::DmaBuf, Some(dmabuf)) = (way, buffer.dmabuf()) {
            let given = Given::copy_of(std::os::fd::AsFd::as_fd(dmabuf))?;
            let reached = self.gpu.dmabuf(given, dmabuf.size());
            return Ok(reached
                .map(|reached| (reached, range.offset()))
                .map_err(No::Driver));
        }
        // Drivers register whole pages.
        let page = rustix::param::page_size() as u64;
        let at = range.offset() % page;
        let begin = range.offset() - at;
        let end = (range.offset() + range.len()).next_multiple_of(page);
        let pages = buffer.range(begin, end.min(buffer.size()) - begin)?;
        let mapping = match pages.map(Access::ReadWrite) {
            Ok(mapping) => mapping,
            Err(error @ BufferError::NotMappable { .. }) => {
                return Ok(Err(No::Mapping(error.to_string())));
            }
            Err(error) => return Err(error.into()),
        };
        let reached = self.gpu.mapped(mapping, way == Way::IoMemory);
        Ok(reached.map(|reached| (reached, at)).map_err(No::Driver))
    }
}

type Got = (Box<dyn Reached>, u64);

/// Why a way is not possible.
enum No {
    Driver(Failed),
    Mapping(String),
}

/// A range and a GPU, brought together. What uses the address is to be done before this is dropped: that takes it away
/// from the GPU, and then lets go of the buffer.
pub struct Attachment {
    /// Dropped before the range.
    reached: Box<dyn Reached>,
    /// Where the range begins in it.
    at: u64,
    range: BufferRange,
    way: Way,
    refused: Vec<Refused>,
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment")
            .field("pointer", &self.pointer())
            .field("range", &self.range)
            .field("way", &self.way)
            .field("refused", &self.refused)
            .finish_non_exhaustive()
    }
}

impl Attachment {
    /// The address of the range's first byte, as the runtime has it: what a kernel is given.
    pub fn pointer(&self) -> u64 {
        self.reached.memory().pointer + self.at
    }

    /// What was attached. It has as many bytes as there are at the address.
    pub fn range(&self) -> &BufferRange {
        &self.range
    }

    /// How the GPU was brought to reach it.
    pub fn way(&self) -> Way {
        self.way
    }

    /// The better ways, with what the driver said.
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }

    /// How the GPU gets at the bytes: no way copies any.
    pub fn plan(&self) -> Plan {
        Plan::in_place(self.range.buffer())
    }

    /// The place of so many bytes, once no fence is in the way.
    fn prepare(&self, length: usize, access: Access) -> Result<u64, ImportError> {
        self.range.slice(0, length as u64)?;
        if let Some(dmabuf) = self.range.buffer().dmabuf() {
            dmabuf.wait(access, LIMIT)?;
        }
        Ok(self.at)
    }

    fn failed(&self, failed: &Failed) -> ImportError {
        ImportError::Runtime {
            call: failed.call,
            object: self.range.buffer().name().to_owned(),
            answer: failed.to_string(),
            hint: String::new(),
        }
    }
}

impl Importer for GpuImporter {
    fn name(&self) -> String {
        GpuImporter::name(self)
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        Ok(Box::new(GpuImporter::attach(self, range)?))
    }
}

/// Bytes go by the runtime's copies: CUDA's and Level Zero's by way of memory of the device. ROCm may have the
/// processor make them.
impl Attached for Attachment {
    fn plan(&self) -> Plan {
        Attachment::plan(self)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Option<Plan>, ImportError> {
        let at = self.prepare(bytes.len(), Access::Write)?;
        let copied = self.reached.upload(at, bytes);
        copied.map_err(|failed| self.failed(&failed))?;
        Ok(Some(Attachment::plan(self)))
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        let at = self.prepare(into.len(), Access::Read)?;
        let copied = self.reached.download(at, into);
        copied.map_err(|failed| self.failed(&failed))?;
        Ok(Some(Attachment::plan(self)))
    }
}
