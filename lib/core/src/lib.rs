//! dma-bufs as values, and the CPU's access to their bytes.
//!
//! - A [`DmaBuf`] is a file descriptor that is known to be a dma-buf, from any exporter.
//! - A [`Buffer`] adds what is known about it: the exporter, the device, and the host memory behind it, if
//!   any.
//! - A [`BufferRange`] is part of a buffer.
//! - A [`Mapping`] makes the bytes available to importers. The bytes may be device memory, and a device or
//!   another process may change them at any time, so they are never a `&[u8]`: the CPU copies them within
//!   [`Mapping::begin_cpu_access`].
//! - Fences ([`DmaBuf::wait`], [`SyncFile`]) tell when the work that devices have queued on a buffer is done.
//!
//! The crate `peerbuf` makes buffers and imports them to devices; it re-exports this crate as
//! `peerbuf::buffer`. Kernel documentation: <https://docs.kernel.org/driver-api/dma-buf.html>.
//!
//! ```
//! use peerbuf_core::{Access, memfd};
//!
//! # fn main() -> Result<(), peerbuf_core::error::BufferError> {
//! // A dma-buf that another library made: Buffer::import(fd)
//! let buffer = memfd::buffer("example", 1 << 20)?;
//! let mut part = buffer.range(4096, 5)?.map(Access::ReadWrite)?;
//! part.write_bytes(b"hello")?;
//! assert_eq!(buffer.range(4096, 5)?.to_vec()?, b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! Items hidden from this documentation serve peerbuf's own crates, and may change in any version.
#![deny(unsafe_code)]

mod access;
mod buffer;
mod chunks;
mod copies;
mod deadline;
mod dmabuf;
pub mod engine;
mod errno;
pub mod error;
mod fence;
mod foreign;
mod lazy;
#[doc(hidden)]
pub mod limits;
mod mapping;
pub mod memfd;
mod stage;
mod sys;
pub mod topology;
mod unpoisoned;

pub use access::Access;
pub use buffer::{Buffer, BufferRange, Kind, Provenance};
#[doc(hidden)]
pub use buffer::{LastHandle, LeaseState};
/// The traits of [`CpuAccess::read`] and [`CpuAccess::write`].
pub use bytemuck;
#[doc(hidden)]
pub use chunks::in_chunks;
pub use deadline::Deadline;
#[doc(hidden)]
pub use dmabuf::parse_info;
pub use dmabuf::{DmaBuf, Identity, Info};
pub use errno::Errno;
pub use fence::{FenceState, SyncFile};
pub use lazy::LazyMapping;
pub use mapping::{CpuAccess, Mapping};
pub use stage::Stage;
#[doc(hidden)]
pub use sys::{fork, memory};
pub use topology::PciAddress;
#[doc(hidden)]
pub use unpoisoned::unpoisoned;
