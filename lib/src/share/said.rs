//! The effect of a message, for the fuzz targets to compare.

/// The effect of an accepted message: every value that a receiver acts upon.
#[derive(Debug, Default)]
pub struct Said {
    /// For each buffer: the range's offset and length, and the buffer's size, in bytes.
    pub ranges: Vec<[u64; 3]>,
    /// For each buffer: the number of descriptors that must come with it.
    pub descriptors: Vec<usize>,
    /// The BAR number of each buffer that has one.
    pub bars: Vec<u8>,
    /// Names, which are shown to people.
    pub texts: Vec<String>,
    /// Number of notes about buffers.
    pub notes: usize,
}
