//! A subscriber's access to a buffer.

/// A subscriber's access to a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Grant {
    /// No access: the buffer is not offered, and the subscriber does not learn of it.
    Nothing,
    /// Reading. [The module](super#read-only) says what the kernel enforces. A buffer for which
    /// the kernel would enforce nothing is not offered.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}
