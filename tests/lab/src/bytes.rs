//! The processor's view of a buffer's bytes, by the crate.

use peerbuf::{Access, BufferRange};

/// Writes `bytes` to the beginning of a range.
pub fn put(range: &BufferRange, bytes: &[u8]) {
    let mut mapping = range.map(Access::Write).unwrap();
    mapping
        .begin_cpu_access(Access::Write)
        .unwrap()
        .write_at(0, bytes)
        .unwrap();
}

/// All bytes of a range.
pub fn get(range: &BufferRange) -> Vec<u8> {
    let mut bytes = vec![0; range.len() as usize];
    let mut mapping = range.map(Access::Read).unwrap();
    mapping
        .begin_cpu_access(Access::Read)
        .unwrap()
        .read_at(0, &mut bytes)
        .unwrap();
    bytes
}
