//! A subscriber's access to a buffer.

/// A subscriber's access to a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Grant {
    /// No access: the buffer is not offered, and the subscriber does not learn of it.
    Nothing,
    /// Reading. See [`Grant::ReadOnly`]'s section in [the module](super#read-only) for what the
    /// kernel enforces; a buffer for which it would enforce nothing is not offered at all.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}
