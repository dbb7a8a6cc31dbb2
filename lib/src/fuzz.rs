//! Entry points for the fuzz targets in tests/fuzz, which decode untrusted input. Not part of
//! the public interface.

use crate::error::ShareError;
pub use crate::share::Said;
use crate::topology::PciAddress;

/// Decodes a message as either end of a connection would.
///
/// # Errors
/// The reason for the refusal.
pub fn message(bytes: &[u8]) -> Result<Said, ShareError> {
    crate::share::decode_any(bytes)
}

/// One valid message of each kind, as seeds for the fuzzer.
pub fn messages() -> Vec<(&'static str, Vec<u8>)> {
    crate::share::samples()
}

/// Parses the kernel's description of a dma-buf: the exporter's name, the buffer's name, and
/// the number of holders.
pub fn fdinfo(text: &str) -> (String, String, u64) {
    let info = crate::buffer::parse_info(text);
    (info.exporter, info.name, info.references)
}

/// Parses a PCI address.
pub fn address(text: &str) -> Option<PciAddress> {
    text.parse().ok()
}
