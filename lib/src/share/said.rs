//! The effect of a message, for the fuzz targets to compare.

/// The effect of an accepted message: every value that a receiver acts upon.
#[derive(Debug, Default)]
pub struct Said {
    /// Of each buffer: the range's offset and length, and the buffer's size.
    pub ranges: Vec<[u64; 3]>,
    /// Of each buffer: how many descriptors must come with it.
    pub descriptors: Vec<usize>,
    /// Of each buffer that has one.
    pub bars: Vec<u8>,
    /// Names, which people are shown.
    pub texts: Vec<String>,
    /// How many words about buffers.
    pub notes: usize,
}
