//! The CPU: it maps a buffer and copies bytes in and out.
//!
//! [`BufferRange::map`] does the same. This importer adds a plan, which every importer has.
//!
//! ```
//! use peerbuf::{Access, export::memfd, import::cpu, plan::Path};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let buffer = memfd::export("example", 4096)?;
//! let mut attachment = cpu::attach(&buffer.whole(), Access::ReadWrite)?;
//! assert_eq!(attachment.plan().path, Path::SharedHostMemory);
//! let mut cpu = attachment.mapping().begin_cpu_access(Access::Write)?;
//! cpu.write_at(0, b"bytes")?;
//! cpu.end()?;
//! # Ok(())
//! # }
//! ```

use super::{Attached, Importer, not_mappable};
use crate::buffer::{Access, BufferRange, Mapping};
use crate::error::{BufferError, ImportError};
use crate::plan::{Path, Plan, Reason, ReasonCode};

const NAME: &str = "the processor";

/// Maps a range for the CPU.
///
/// # Errors
/// [`ImportError::Impossible`] with [`ReasonCode::NotMappable`], or [`ImportError::Buffer`] for
/// access that the buffer does not allow.
pub fn attach(range: &BufferRange, access: Access) -> Result<Attachment, ImportError> {
    let mapping = range.map(access).map_err(|error| match error {
        BufferError::System(cause) | BufferError::NotMappable { cause } => {
            not_mappable(NAME, range, &cause)
        }
        other => other.into(),
    })?;
    Ok(Attachment { mapping })
}

/// A range attached to the CPU.
#[derive(Debug)]
pub struct Attachment {
    mapping: Mapping,
}

impl Attachment {
    /// The path of the CPU's accesses. For device memory the path is a staged copy: the CPU's
    /// own loads and stores copy the bytes over the bus.
    pub fn plan(&self) -> Plan {
        let mut plan = Plan::in_place(self.mapping.range().buffer());
        if plan.path == Path::PeerToPeer {
            let peer = "the CPU has no DMA engine: it loads and stores over the bus";
            let host = "the bytes are in device memory";
            plan = Plan {
                path: Path::StagedCopy,
                reasons: vec![
                    Reason::new(Path::PeerToPeer, ReasonCode::NotADevice, peer),
                    Reason::new(Path::SharedHostMemory, ReasonCode::NotHostMemory, host),
                ],
            };
        }
        plan
    }

    /// The mapping.
    pub fn mapping(&mut self) -> &mut Mapping {
        &mut self.mapping
    }
}

/// The CPU as an [`Importer`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Processor;

impl Importer for Processor {
    fn name(&self) -> String {
        NAME.into()
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        Ok(Box::new(attach(range, range.buffer().allowed())?))
    }
}

impl Attached for Attachment {
    fn plan(&self) -> Plan {
        Attachment::plan(self)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Option<Plan>, ImportError> {
        self.mapping.write_bytes(bytes)?;
        Ok(Some(Attachment::plan(self)))
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        self.mapping.read_bytes(into)?;
        Ok(Some(Attachment::plan(self)))
    }
}
