//! What works on the buffers: each importer writes bytes into a range, and reads them from it,
//! in its own way.

use std::path::Path;
use std::sync::Arc;

use peerbuf::buffer::BufferRange;
use peerbuf::buffer::Kind as Made;
use peerbuf::device::drm::Card;
use peerbuf::export::memfd;
use peerbuf::import::drm::{self, DrmImporter};
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::import::probe::{Direction, OnInvalidate, Options, Probe};
use peerbuf::plan::Path as Way;
use peerbuf::plan::topology::PciAddress;
use peerbuf::share::{Backing, Movable};
use peerbuf::{Access, Buffer};
use serde::{Deserialize, Serialize};

use super::memory::{Bar, Source};
use crate::Failure;

/// The kinds that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The processor copies
    Cpu,
    /// A disk's DMA, or direct I/O on system memory, through a scratch file
    Nvme,
    /// A graphics driver takes the buffer in; the bytes go by its mapping
    Drm,
    /// peerbuf.ko's importer maps the buffer for a disk meanwhile, as a driver would
    Probe,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Cpu => "cpu",
            Kind::Nvme => "nvme",
            Kind::Drm => "drm",
            Kind::Probe => "probe",
        }
    }
}

/// How a job was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// In the only way there is.
    Plainly,
    /// By this one of several.
    By(Way),
}

/// One importer of a worker.
pub trait Importer {
    fn kind(&self) -> Kind;

    /// Puts bytes into the range.
    fn write(&mut self, range: &BufferRange, bytes: &[u8]) -> Result<Done, Failure>;

    /// Gets the range's bytes.
    fn read(&mut self, range: &BufferRange, into: &mut [u8]) -> Result<Done, Failure>;
}

/// Opens an importer. `scratch` is where files may be made, `length` the longest range.
pub fn open(kind: Kind, scratch: &Path, length: u64) -> Result<Box<dyn Importer>, Failure> {
    Ok(match kind {
        Kind::Cpu => Box::new(Cpu),
        Kind::Nvme => Box::new(Disk::open(scratch, length)?),
        Kind::Drm => Box::new(Graphics::open()?),
        Kind::Probe => Box::new(Prober::open(scratch)?),
    })
}

struct Cpu;

impl Importer for Cpu {
    fn kind(&self) -> Kind {
        Kind::Cpu
    }

    fn write(&mut self, range: &BufferRange, bytes: &[u8]) -> Result<Done, Failure> {
        range.write_bytes(bytes)?;
        Ok(Done::Plainly)
    }

    fn read(&mut self, range: &BufferRange, into: &mut [u8]) -> Result<Done, Failure> {
        range.read_bytes(into)?;
        Ok(Done::Plainly)
    }
}

/// Bytes go through a file of this worker's own, and on the way between file and range they are
/// the disk's business. Memory of this process is the other end of the file.
struct Disk {
    file: FileImporter,
    own: Buffer,
}

impl Disk {
    fn open(scratch: &Path, length: u64) -> Result<Disk, Failure> {
        let file = unnamed_file(scratch)?;
        file.set_len(length)?;
        let name = format!("a scratch file in {}", scratch.display());
        let file = FileImporter::from_fd(file.into(), name)?;
        Ok(Disk {
            file: file.with_scratch_directory(scratch),
            own: memfd::export("scratch", length)?,
        })
    }
}

impl Importer for Disk {
    fn kind(&self) -> Kind {
        Kind::Nvme
    }

    fn write(&mut self, range: &BufferRange, bytes: &[u8]) -> Result<Done, Failure> {
        let own = self.own.range(0, bytes.len() as u64)?;
        own.write_bytes(bytes)?;
        self.file.attach(&own)?.write(0)?;
        let receipt = self.file.attach(range)?.read(0)?;
        if receipt.bytes != range.len() {
            return Err(format!("the disk read {} of {} bytes", receipt.bytes, range.len()).into());
        }
        Ok(Done::By(receipt.plan.path))
    }

    fn read(&mut self, range: &BufferRange, into: &mut [u8]) -> Result<Done, Failure> {
        let receipt = self.file.attach(range)?.write(0)?;
        let own = self.own.range(0, into.len() as u64)?;
        self.file.attach(&own)?.read(0)?;
        own.read_bytes(into)?;
        Ok(Done::By(receipt.plan.path))
    }
}

/// A driver attaches the buffer for as long as a job takes.
struct Graphics {
    importer: DrmImporter,
}

impl Graphics {
    fn open() -> Result<Graphics, Failure> {
        let nodes = drm::probe()?;
        let card = Card::open(&nodes[0])?;
        let importer = DrmImporter::new(&card);
        Ok(Graphics { importer })
    }
}

impl Importer for Graphics {
    fn kind(&self) -> Kind {
        Kind::Drm
    }

    fn write(&mut self, range: &BufferRange, bytes: &[u8]) -> Result<Done, Failure> {
        self.importer
            .attach(range)?
            .map(Access::ReadWrite)?
            .write_bytes(bytes)?;
        Ok(Done::Plainly)
    }

    fn read(&mut self, range: &BufferRange, into: &mut [u8]) -> Result<Done, Failure> {
        self.importer
            .attach(range)?
            .map(Access::Read)?
            .read_bytes(into)?;
        Ok(Done::Plainly)
    }
}

/// A driver's mapping, for the disk that has the scratch directory, while the processor copies. It
/// must not be told that it is stale while the buffer is lent, unless the kernel moves the buffer
/// by itself.
struct Prober {
    probe: Probe,
    device: PciAddress,
}

impl Prober {
    fn open(scratch: &Path) -> Result<Prober, Failure> {
        let probe = Probe::open()?;
        let file = FileImporter::from_fd(unnamed_file(scratch)?.into(), "a scratch file")?;
        let device = *file
            .disk_functions()
            .first()
            .ok_or("the scratch directory is on no PCI disk, for which a buffer could be mapped")?;
        Ok(Prober { probe, device })
    }

    fn mapped(
        &self,
        range: &BufferRange,
        work: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<Done, Failure> {
        let buffer = range.buffer();
        let dmabuf = buffer.dmabuf().ok_or("the buffer has no dma-buf")?;
        let options = Options {
            on_invalidate: OnInvalidate::Remap,
            ..Options::default()
        };
        let attachment = self.probe.attach(dmabuf, self.device, options)?;
        attachment.map(Direction::Bidirectional)?;
        work()?;
        let report = attachment.report()?;
        let kind = buffer.provenance().kind;
        let moves_by_itself = matches!(kind, Made::Bar | Made::Provider);
        if report.invalidations > 0 && !moves_by_itself {
            return Err(format!("invalidated while it was lent: {report:?}").into());
        }
        Ok(Done::Plainly)
    }
}

impl Importer for Prober {
    fn kind(&self) -> Kind {
        Kind::Probe
    }

    fn write(&mut self, range: &BufferRange, bytes: &[u8]) -> Result<Done, Failure> {
        self.mapped(range, || Ok(range.write_bytes(bytes)?))
    }

    fn read(&mut self, range: &BufferRange, into: &mut [u8]) -> Result<Done, Failure> {
        self.mapped(range, || Ok(range.read_bytes(into)?))
    }
}

/// Leaves only those importers that exist here and can use what the sources make, and says why
/// the others cannot.
pub fn usable(
    kinds: &[Kind],
    sources: &[Source],
    bar: Option<&Bar>,
    scratch: &Path,
    length: u64,
    missing: &mut Vec<String>,
) -> Result<Vec<Kind>, Failure> {
    let mut buffers = Vec::new();
    for source in sources {
        buffers.push(source.make("a try", length)?);
    }
    if let Some(bar) = bar {
        let movable = Movable::new(Arc::clone(&bar.device), bar.index, length)?;
        buffers.push(movable.buffer().clone());
    }
    let mut usable = Vec::new();
    for &kind in kinds {
        let tried = buffers
            .iter()
            .try_for_each(|buffer| try_one(kind, buffer, scratch));
        match tried {
            Ok(()) if usable.contains(&kind) => {}
            Ok(()) => usable.push(kind),
            Err(error) => missing.push(format!("importer {}: {error}", kind.name())),
        }
    }
    Ok(usable)
}

/// Sends bytes through an importer and back.
fn try_one(kind: Kind, buffer: &Buffer, scratch: &Path) -> Result<(), Failure> {
    let mut importer = open(kind, scratch, buffer.size())?;
    let bytes: Vec<u8> = (0..buffer.size()).map(|at| at as u8).collect();
    importer.write(&buffer.whole(), &bytes)?;
    let mut back = vec![0; bytes.len()];
    importer.read(&buffer.whole(), &mut back)?;
    match back == bytes {
        true => Ok(()),
        false => Err(format!("wrong bytes came back from {buffer}").into()),
    }
}
