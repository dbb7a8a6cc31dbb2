//! The PCI topology of a machine, and a prediction of the kernel's answer to DMA between two of its devices
//! (<https://docs.kernel.org/driver-api/pci/p2pdma.html>).
//!
//! A [`Machine`] is read from this machine ([`running`]) or from a snapshot ([`open`]): one written by
//! [`save`], a copy of sysfs, or the output of `lspci -vvv`, `rdma_topo dump`, hwloc or NCCL. [`Rules`] are
//! the kernel's rules for that machine. [`Rules::route`] answers for two devices, without allocating;
//! [`argue`] gives all reasons, with evidence and remedies. A fact that could not be read is unknown, and
//! leaves several answers possible.
//!
//! All answers are predictions. `import::probe` of the crate `peerbuf` asks the kernel itself; whether bytes
//! arrive shows only a transfer.
//!
//! ```no_run
//! use peerbuf_topo::{Rules, argue};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let machine = peerbuf_topo::running()?;
//! let disk = machine.named("nvme0n1").ok_or("no such disk")?;
//! let card = machine.find("0000:41:00.0".parse()?).ok_or("no such card")?;
//! let argument = argue(&Rules::new(&machine, None), disk, card);
//! println!("{}", argument.verdict.name());
//! for reason in &argument.reasons {
//!     println!("{} {}: {}", reason.effect.name(), reason.code, reason.evidence);
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod config;
pub mod error;
mod foreign;
pub mod machine;
pub mod reasons;
pub mod rules;
mod snapshot;
mod sysfs;

pub use machine::Machine;
pub use peerbuf_core::PciAddress;
pub use reasons::{Argument, Code, argue};
pub use rules::Rules;
pub use snapshot::{open, read, save};
pub use sysfs::{running, tree};
