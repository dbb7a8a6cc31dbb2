//! [`Access`]: reading, writing or both.

/// The kind of access to a buffer's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read them.
    Read,
    /// Write them.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    /// True for [`Access::Read`] and [`Access::ReadWrite`].
    pub fn reads(self) -> bool {
        self != Access::Write
    }

    /// True for [`Access::Write`] and [`Access::ReadWrite`].
    pub fn writes(self) -> bool {
        self != Access::Read
    }
}
