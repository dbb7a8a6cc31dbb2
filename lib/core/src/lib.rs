//! The core of peerbuf: a dma-buf as a value, and the CPU's access to its bytes.
//!
//! A [`DmaBuf`] is a descriptor that is known to be a dma-buf, whoever made it. A [`Buffer`] is one
//! with what is known of it: who made it, on which device, and the memory of the host behind it, if
//! there is some. A [`BufferRange`] is part of a buffer. Its bytes may be device memory, and a device
//! or another process may change them at any time, so they are never a `&[u8]`: a [`Mapping`] gives
//! them to importers, and [`Mapping::begin_cpu_access`] lets the CPU copy them. Work that a device has
//! queued on a buffer is waited for by its fences ([`DmaBuf::wait`], [`SyncFile`]).
//!
//! The crate `peerbuf` makes buffers and brings devices to them; it has all of this under
//! `peerbuf::buffer`.
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
//! What is hidden from this documentation is for peerbuf's own crates, and may change with each
//! version.
#![deny(unsafe_code)]

mod access;
mod buffer;
mod chunks;
mod copies;
mod deadline;
mod dmabuf;
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
