//! What can go wrong with a buffer and a mapping.
//!
//! Each error names the call that failed and the object it failed on, and keeps the error number, which
//! `errno()` gives. Each becomes a [`std::io::Error`] with `?`: of the kind that the error number has, with the
//! error itself inside ([`std::io::Error::get_ref`]), so that its text stays.

use std::io::ErrorKind;
use std::time::Duration;

use crate::errno::Errno;

/// Lets an error with a method `errno` become a [`std::io::Error`]. Without an error number `$kind` says which
/// kind it is.
#[doc(hidden)]
#[macro_export]
macro_rules! into_io_error {
    ($error:ty, $kind:expr) => {
        impl From<$error> for std::io::Error {
            fn from(error: $error) -> std::io::Error {
                let without_number: fn(&$error) -> std::io::ErrorKind = $kind;
                let kind = match error.errno() {
                    Some(errno) => errno.kind(),
                    None => without_number(&error),
                };
                std::io::Error::new(kind, error)
            }
        }
    };
}

/// A system call that failed: which one, on what, and how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} on {object}: {errno}")]
#[non_exhaustive]
pub struct SystemError {
    /// The call, such as `mmap` or `ioctl(PEERBUF_IOC_EXPORT)`.
    pub call: &'static str,
    /// What it was called on: a path, a device's address, a buffer's name.
    pub object: String,
    /// What the kernel answered.
    pub errno: Errno,
}

impl SystemError {
    /// `call` failed on `object` with this number.
    pub fn new(call: &'static str, object: impl Into<String>, errno: impl Into<Errno>) -> Self {
        SystemError {
            call,
            object: object.into(),
            errno: errno.into(),
        }
    }

    /// What the kernel answered.
    pub fn errno(&self) -> Option<Errno> {
        Some(self.errno)
    }
}

into_io_error!(SystemError, |_| ErrorKind::Other);

/// Why a buffer could not be taken, mapped or accessed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BufferError {
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The exporter gives the processor no mapping of the dma-buf.
    #[error(
        "{cause}: the exporter gives the processor no mapping of it; copy its bytes by the owner's own way \
         (Buffer::with_stage)"
    )]
    NotMappable {
        /// What `mmap` answered.
        cause: SystemError,
    },
    /// The owner's own copy of the bytes failed (`Stage`).
    #[error("{call} of {object}: {cause}")]
    Stage {
        /// Which copy: `upload` or `download`.
        call: &'static str,
        /// The buffer's name.
        object: String,
        /// What it said.
        cause: String,
    },
    /// The descriptor is something else.
    #[error("{object} is not a dma-buf (its filesystem's type is {found:#x})")]
    NotADmaBuf {
        /// What was given.
        object: String,
        /// What `fstatfs` said instead of the dma-buf filesystem's number.
        found: u64,
    },
    /// Memory that could be shrunk by whoever else holds it: touching it could then kill this
    /// process.
    #[error("{object} is not sealed against shrinking (F_SEAL_SHRINK)")]
    NotSealed {
        /// The memfd's name.
        object: String,
    },
    /// The bytes asked for are not all inside.
    #[error("{length} bytes at offset {offset} are not within {object}, which has {size} bytes")]
    OutOfRange {
        /// The buffer's or range's name.
        object: String,
        /// Where the bytes were to begin.
        offset: u64,
        /// How many they were.
        length: u64,
        /// How many there are.
        size: u64,
    },
    /// A write through something that was opened or mapped for reading, or the reverse.
    #[error("{object} does not allow {wanted} access")]
    Access {
        /// The buffer's name.
        object: String,
        /// What was asked for: `read` or `write`.
        wanted: &'static str,
    },
    /// What was waited for did not come in time.
    #[error("{object}: nothing happened within {limit:?}")]
    TimedOut {
        /// What was waited for.
        object: String,
        /// How long.
        limit: Duration,
    },
    /// Memory that was lent to another process. This one inherited the handle through `fork`, and
    /// with it neither the loan nor the mappings.
    #[error(
        "{object} was lent to the process that this one was forked from: make a subscriber of this \
         process's own"
    )]
    Inherited {
        /// The buffer's name.
        object: String,
    },
    /// A name that the kernel does not take.
    #[error("{name:?} cannot be a buffer's name: at most {limit} bytes, none of them NUL")]
    Name {
        /// The name.
        name: String,
        /// The most bytes that it may have.
        limit: usize,
    },
}

impl BufferError {
    /// What the kernel answered, if a call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            BufferError::System(cause) | BufferError::NotMappable { cause } => cause.errno(),
            _ => None,
        }
    }
}

into_io_error!(BufferError, |error| match error {
    BufferError::Access { .. } | BufferError::NotSealed { .. } => ErrorKind::PermissionDenied,
    BufferError::TimedOut { .. } => ErrorKind::TimedOut,
    BufferError::NotADmaBuf { .. } | BufferError::OutOfRange { .. } | BufferError::Name { .. } => {
        ErrorKind::InvalidInput
    }
    _ => ErrorKind::Other,
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_stays_itself_within_an_io_error() {
        let failed = SystemError::new("mmap", "weights", Errno::NOMEM);
        let text = failed.to_string();
        let error = std::io::Error::from(BufferError::from(failed.clone()));
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        assert_eq!(error.to_string(), text);
        let inside = error.get_ref().and_then(|it| it.downcast_ref());
        assert_eq!(inside, Some(&BufferError::System(failed)));
        let late = BufferError::TimedOut {
            object: "weights".into(),
            limit: Duration::from_secs(1),
        };
        assert_eq!(std::io::Error::from(late).kind(), ErrorKind::TimedOut);
    }
}
