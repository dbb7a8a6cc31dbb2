//! Entry points for the fuzz targets in tests/fuzz, which decode what a stranger may have written.
//! Not part of the interface.

use crate::error::ShareError;
pub use crate::share::Said;
use crate::topology::PciAddress;

/// Decodes a message as either end of a connection would.
///
/// # Errors
/// Why it was refused.
pub fn message(bytes: &[u8]) -> Result<Said, ShareError> {
    crate::share::decode_any(bytes)
}

/// One valid message of each kind, as the fuzzer's seeds.
pub fn messages() -> Vec<(&'static str, Vec<u8>)> {
    crate::share::samples()
}

/// Reads what the kernel says about a dma-buf: the exporter's name, its own, and the holders.
pub fn fdinfo(text: &str) -> (String, String, u64) {
    let info = crate::buffer::parse_info(text);
    (info.exporter, info.name, info.references)
}

/// Reads a PCI address.
pub fn address(text: &str) -> Option<PciAddress> {
    text.parse().ok()
}
