//! The importers of the storm: each writes bytes into a range and reads them from it, by its
//! own means.

use std::path::Path;
use std::sync::Arc;

use peerbuf::Buffer;
use peerbuf::buffer::BufferRange;
use peerbuf::buffer::Kind as Made;
use peerbuf::device::drm::Card;
use peerbuf::error::ImportError;
use peerbuf::import::cpu::Processor;
use peerbuf::import::drm::{self, DrmImporter};
use peerbuf::import::file::{FileImporter, Scratch, unnamed_file};
use peerbuf::import::probe::{self, OnBehalf, OnInvalidate, Options, Probe};
use peerbuf::import::{Attached, Importer};
use peerbuf::plan::{Plan, ReasonCode};
use peerbuf::share::{Backing, Movable};
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
    /// peerbuf_probe.ko maps the buffer for a disk meanwhile, as a driver would
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

/// Opens an importer. `scratch` is a directory for temporary files.
pub fn open(kind: Kind, scratch: &Path) -> Result<Box<dyn Importer>, Failure> {
    Ok(match kind {
        Kind::Cpu => Box::new(Processor),
        Kind::Nvme => Box::new(Scratch::new(scratch)),
        Kind::Drm => Box::new(DrmImporter::new(&Card::open(&drm::probe()?[0])?)),
        Kind::Probe => Box::new(Prober::open(scratch)?),
    })
}

/// A driver's mapping on behalf of the disk with the scratch directory, while the CPU copies.
/// The mapping must get no invalidation while the buffer is lent, unless the kernel moves the
/// buffer.
struct Prober {
    driver: OnBehalf,
}

impl Prober {
    fn open(scratch: &Path) -> Result<Prober, Failure> {
        let probe = Probe::open()?;
        let file = FileImporter::from_fd(unnamed_file(scratch)?.into(), "a scratch file")?;
        let device =
            file.disk_functions().into_iter().next().ok_or(
                "the scratch directory is on no PCI disk, for which a buffer could be mapped",
            )?;
        let options = Options {
            on_invalidate: OnInvalidate::Remap,
            ..Options::default()
        };
        let driver = OnBehalf::new(probe, device, options);
        Ok(Prober { driver })
    }
}

impl Importer for Prober {
    fn name(&self) -> String {
        self.driver.name()
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        let (attachment, _) = self.driver.map(range.buffer())?;
        Ok(Box::new(Watched {
            attachment,
            copies: Processor.attach(range)?,
            range: range.clone(),
        }))
    }
}

struct Watched {
    attachment: probe::Attachment,
    copies: Box<dyn Attached>,
    range: BufferRange,
}

impl Watched {
    /// Checks that the mapping was valid all the time.
    fn check(&self) -> Result<(), ImportError> {
        let report = self.attachment.report()?;
        let buffer = self.range.buffer();
        let moves_by_itself = matches!(buffer.provenance().kind, Made::Bar | Made::Provider);
        if report.invalidations > 0 && !moves_by_itself {
            return Err(ImportError::Impossible {
                importer: Kind::Probe.name().into(),
                buffer: buffer.name().into(),
                code: ReasonCode::DeviceError,
                evidence: format!("invalidated while it was lent: {report:?}"),
            });
        }
        Ok(())
    }
}

impl Attached for Watched {
    fn plan(&self) -> Plan {
        self.copies.plan()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Option<Plan>, ImportError> {
        let plan = self.copies.write(bytes)?;
        self.check()?;
        Ok(plan)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        let plan = self.copies.read(into)?;
        self.check()?;
        Ok(plan)
    }
}

/// Keeps only the importers that exist here and can use the sources' buffers, and reports why
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
    let mut attached = open(kind, scratch)?.attach(&buffer.whole())?;
    let bytes: Vec<u8> = (0..buffer.size()).map(|at| at as u8).collect();
    attached.write(&bytes)?;
    let mut back = vec![0; bytes.len()];
    attached.read(&mut back)?;
    match back == bytes {
        true => Ok(()),
        false => Err(format!("wrong bytes came back from {buffer}").into()),
    }
}
