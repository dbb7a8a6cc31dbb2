//! The PCI tree of a machine, and what the kernel will say to DMA between two of its devices.
//!
//! A [`Machine`] is read from this machine ([`running`]), or from a snapshot ([`open`]): one that [`save`]
//! wrote, a copy of sysfs, or the output of `lspci -vvv`, `rdma_topo dump`, hwloc or NCCL. [`Rules`] are the
//! kernel's for that machine. [`Rules::route`] answers for two devices without an allocation;
//! [`argue`] gives all reasons, with evidence and remedies. A fact that could not be read is unknown, and
//! leaves several answers possible.
//!
//! What is said here is a prediction. The kernel's answer comes from asking it (`import::probe` of the crate
//! `peerbuf`), and whether bytes arrive, from moving some.
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
