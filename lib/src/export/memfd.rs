//! Plain sealed memory: the stand-in for an exporter on a machine that has none.
//!
//! Files and the CPU can use such a buffer like any other. There is no dma-buf, so it cannot be
//! attached to a device.

use std::os::fd::OwnedFd;

use crate::buffer::Buffer;
use crate::error::{BufferError, ExportError};

pub use peerbuf_core::memfd::HugePages;

/// Makes a buffer of `length` zero bytes of system memory. `name` is for people.
///
/// # Errors
/// The call that failed: `ENOMEM` or `EFBIG` for a length that the machine cannot hold, `EMFILE`.
pub fn export(name: &str, length: u64) -> Result<Buffer, ExportError> {
    peerbuf_core::memfd::buffer(name, length).map_err(|error| match error {
        BufferError::System(cause) => super::plain(cause),
        other => other.into(),
    })
}

/// A memfd of `length` bytes that keeps that size for ever, so that no holder of it can make the
/// others' mappings fault.
pub(crate) fn sealed(name: &str, length: u64) -> Result<OwnedFd, ExportError> {
    peerbuf_core::memfd::sealed(name, length, None).map_err(super::plain)
}

/// The same of huge pages.
pub(crate) fn sealed_huge(
    name: &str,
    length: u64,
    pages: HugePages,
) -> Result<OwnedFd, ExportError> {
    peerbuf_core::memfd::sealed(name, length, Some(pages)).map_err(super::plain)
}
