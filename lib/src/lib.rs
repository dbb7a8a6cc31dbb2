//! Share one buffer between devices through dma-buf, and know the path of its bytes.
//!
//! A [`Buffer`] comes from an exporter ([`export`]), may be passed to another process
//! ([`share`]), and is used by an importer ([`import`]). Between one exporter and one importer
//! there is a [`plan::Path`], the best of three that is proved to work:
//!
//! 1. *peer to peer*: the importing device reads and writes the exporter's memory itself;
//! 2. *shared host memory*: both devices use the same pages of system memory;
//! 3. *staged copy*: the CPU copies the bytes through a bounce buffer.
//!
//! The crate [`peerbuf_core`] has the dma-buf and the CPU's access to it, and is useful on its
//! own. The crate `peerbuf-rdma` builds on this crate and has importers for RDMA cards.
//!
//! On some machines the kernel and the devices report success and no byte arrives. A
//! peer-to-peer transfer therefore carries data only after a proof that bytes arrive in the
//! needed direction. The [`plan::Plan`] and the [`transfer::Receipt`] of every transfer name
//! the path and the reasons against each better one.
//!
//! ```
//! use peerbuf::export::memfd;
//! use peerbuf::import::file::FileImporter;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let path = std::env::temp_dir().join(format!("peerbuf-doc-{}", std::process::id()));
//! # std::fs::write(&path, vec![7; 100_000])?;
//! // On a machine with a card bound to peerbuf.ko: export::peerbuf::Device::open(..)?.export(..)?
//! let buffer = memfd::export("example", 1 << 20)?;
//! let file = FileImporter::open(&path)?;
//! # std::fs::remove_file(&path)?;
//! let receipt = file.attach(&buffer.range(0, 100_000)?)?.read(0)?;
//! assert_eq!(receipt.bytes, 100_000);
//! println!("{} ({} bytes through system memory)", receipt.plan.path, receipt.host_bytes);
//! for reason in &receipt.plan.reasons {
//!     println!("  not {}: {}: {}", reason.path, reason.code, reason.evidence);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Every function blocks, except those of `share::tokio` and `import::file::tokio` (feature `tokio`). No
//! function requires root: the permissions of `/dev/peerbuf/<BDF>`, `/dev/udmabuf` and the files decide.
#![deny(unsafe_code)]

pub mod buffer;
pub mod device;
pub mod error;
pub mod export;
#[cfg(feature = "share")]
#[doc(hidden)]
pub mod fuzz;
pub mod import;
pub mod joint;
mod path;
pub mod plan;
mod queue;
#[cfg(feature = "share")]
pub mod share;
mod sys;
pub mod transfer;

/// Error numbers.
mod errno {
    pub use peerbuf_core::Errno;
}

pub use buffer::{Access, Buffer, BufferRange, DmaBuf};
pub use peerbuf_core::{Deadline, Errno, bytemuck, engine, topology};
