//! The CPU's access to a buffer's bytes, through the crate.

use peerbuf::BufferRange;

/// Writes `bytes` to the start of a range.
pub fn put(range: &BufferRange, bytes: &[u8]) {
    range.write_bytes(bytes).unwrap();
}

/// All bytes of a range.
pub fn get(range: &BufferRange) -> Vec<u8> {
    range.to_vec().unwrap()
}
