//! Errors of buffers and mappings.
//!
//! Each error names the failed call and the object it failed on, and keeps the error number (`errno()`). `?`
//! converts it into a [`std::io::Error`] of the error number's kind, with the error itself inside
//! ([`std::io::Error::get_ref`]), so the text is kept.

use std::io::ErrorKind;
use std::time::Duration;

use crate::errno::Errno;

/// Implements the conversion into [`std::io::Error`] for an error type with a method `errno`. `$kind` gives
/// the kind of an error without a number.
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

/// A failed system call: the call, its object, and the error number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} on {object}: {errno}")]
#[non_exhaustive]
pub struct SystemError {
    /// The call, such as `mmap` or `ioctl(PEERBUF_IOC_EXPORT)`.
    pub call: &'static str,
    /// The object of the call: a path, a device's address, a buffer's name.
    pub object: String,
    /// The error number.
    pub errno: Errno,
}

impl SystemError {
    /// The failure of `call` on `object` with this error number.
    pub fn new(call: &'static str, object: impl Into<String>, errno: impl Into<Errno>) -> Self {
        SystemError {
            call,
            object: object.into(),
            errno: errno.into(),
        }
    }

    /// The error number.
    pub fn errno(&self) -> Option<Errno> {
        Some(self.errno)
    }
}

into_io_error!(SystemError, |_| ErrorKind::Other);

/// An error of taking, mapping or accessing a buffer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BufferError {
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The exporter allows no CPU mapping of the dma-buf.
    #[error(
        "{cause}: the exporter does not support mmap; copy with the owner's API (Buffer::with_stage)"
    )]
    NotMappable {
        /// The error of `mmap`.
        cause: SystemError,
    },
    /// The copy of a buffer's [`Stage`](crate::Stage) failed.
    #[error("{call} of {object}: {cause}")]
    Stage {
        /// The direction of the copy: `upload` or `download`.
        call: &'static str,
        /// The buffer's name.
        object: String,
        /// The stage's error.
        cause: String,
    },
    /// The descriptor is not a dma-buf.
    #[error("{object} is not a dma-buf (its filesystem's type is {found:#x})")]
    NotADmaBuf {
        /// The descriptor's name.
        object: String,
        /// The filesystem type from `fstatfs`.
        found: u64,
    },
    /// Another holder could shrink the memory; an access could then kill this process (`SIGBUS`).
    #[error("{object} is not sealed against shrinking (F_SEAL_SHRINK)")]
    NotSealed {
        /// The memfd's name.
        object: String,
    },
    /// The requested bytes are not all inside the buffer or range.
    #[error("{length} bytes at offset {offset} are not within {object}, which has {size} bytes")]
    OutOfRange {
        /// The buffer's or range's name.
        object: String,
        /// The requested offset.
        offset: u64,
        /// The requested length.
        length: u64,
        /// The size of the buffer or range.
        size: u64,
    },
    /// A write to something opened or mapped read-only, or a read of something begun for writing only.
    #[error("{object} does not allow {wanted} access")]
    Access {
        /// The buffer's name.
        object: String,
        /// The requested access: `read` or `write`.
        wanted: &'static str,
    },
    /// A wait timed out.
    #[error("timed out after {limit:?} waiting for {object}")]
    TimedOut {
        /// The awaited event.
        object: String,
        /// The time limit.
        limit: Duration,
    },
    /// The memory was lent to another process. This process inherited the handle through `fork`, but neither
    /// the lease nor the mappings.
    #[error(
        "{object} was lent to the parent process and is not usable after fork: connect a subscriber in this \
         process"
    )]
    Inherited {
        /// The buffer's name.
        object: String,
    },
    /// The kernel does not accept the name.
    #[error("{name:?} cannot be a buffer's name: at most {limit} bytes, none of them NUL")]
    Name {
        /// The rejected name.
        name: String,
        /// The maximum length in bytes.
        limit: usize,
    },
    /// The buffer has no handle that the engine takes ([`Buffer::for_engine`](crate::Buffer::for_engine)).
    #[error("{object} has no handle for the engine {engine}: {why}")]
    Engine {
        /// The buffer's name.
        object: String,
        /// The engine's name.
        engine: String,
        /// The reason.
        why: &'static str,
    },
}

impl BufferError {
    /// The error number, if a system call failed.
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
    BufferError::NotADmaBuf { .. }
    | BufferError::OutOfRange { .. }
    | BufferError::Name { .. }
    | BufferError::Engine { .. } => ErrorKind::InvalidInput,
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
