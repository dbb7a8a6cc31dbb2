//! What works on the buffers: each importer writes bytes into a range, and reads them from it,
//! in its own way.

use std::path::Path;

use peerbuf::buffer::BufferRange;
use peerbuf::export::memfd;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::plan::Path as Way;
use peerbuf::{Access, Buffer};
use serde::{Deserialize, Serialize};

use crate::Failure;

/// The kinds that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The processor copies
    Cpu,
    /// A disk's DMA, or direct I/O on system memory, through a scratch file
    Nvme,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Cpu => "cpu",
            Kind::Nvme => "nvme",
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
    })
}

struct Cpu;

impl Importer for Cpu {
    fn kind(&self) -> Kind {
        Kind::Cpu
    }

    fn write(&mut self, range: &BufferRange, bytes: &[u8]) -> Result<Done, Failure> {
        put(range, bytes)?;
        Ok(Done::Plainly)
    }

    fn read(&mut self, range: &BufferRange, into: &mut [u8]) -> Result<Done, Failure> {
        get(range, into)?;
        Ok(Done::Plainly)
    }
}

pub fn put(range: &BufferRange, bytes: &[u8]) -> Result<(), Failure> {
    let mut mapping = range.map(Access::ReadWrite)?;
    let mut cpu = mapping.begin_cpu_access(Access::Write)?;
    cpu.write_at(0, bytes)?;
    Ok(cpu.end()?)
}

fn get(range: &BufferRange, into: &mut [u8]) -> Result<(), Failure> {
    let mut mapping = range.map(Access::Read)?;
    let cpu = mapping.begin_cpu_access(Access::Read)?;
    cpu.read_at(0, into)?;
    Ok(cpu.end()?)
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
        put(&own, bytes)?;
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
        get(&own, into)?;
        Ok(Done::By(receipt.plan.path))
    }
}
