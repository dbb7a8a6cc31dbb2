//! Plain sealed memory, for machines without an exporter.
//!
//! Files and the CPU can use such a buffer. The buffer has no dma-buf, so no device can attach
//! it.

use std::os::fd::OwnedFd;

use crate::buffer::Buffer;
use crate::error::{BufferError, ExportError};

pub use peerbuf_core::memfd::HugePages;

/// Makes a buffer of `length` zero bytes of system memory. `name` is for messages.
///
/// # Errors
/// The call that failed: `ENOMEM` or `EFBIG` for a length that the machine cannot hold, `EMFILE`.
pub fn export(name: &str, length: u64) -> Result<Buffer, ExportError> {
    peerbuf_core::memfd::buffer(name, length).map_err(|error| match error {
        BufferError::System(cause) => super::plain(cause),
        other => other.into(),
    })
}

/// A memfd with a sealed size of `length` bytes, so that no holder can make the mappings of
/// others fault.
pub(crate) fn sealed(name: &str, length: u64) -> Result<OwnedFd, ExportError> {
    peerbuf_core::memfd::sealed(name, length, None).map_err(super::plain)
}

/// Like [`sealed`], with huge pages.
pub(crate) fn sealed_huge(
    name: &str,
    length: u64,
    pages: HugePages,
) -> Result<OwnedFd, ExportError> {
    peerbuf_core::memfd::sealed(name, length, Some(pages)).map_err(super::plain)
}
