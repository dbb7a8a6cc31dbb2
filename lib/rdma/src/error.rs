//! [`RdmaError`]: errors between a buffer and a card.

use std::io::ErrorKind;
use std::time::Duration;

use peerbuf::Errno;
use peerbuf::error::{BufferError, ShareError, SystemError, Unavailable};
use peerbuf_core::into_io_error;

use crate::rung::Attempt;
use crate::work::WorkError;

/// An error of registering a buffer or of a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RdmaError {
    /// The machine lacks what RDMA needs.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// A library or system call failed.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The buffer could not be mapped or accessed.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// The range is empty.
    #[error("cannot register an empty range of {buffer}")]
    Empty {
        /// The buffer's name.
        buffer: String,
    },
    /// No rung could register the buffer.
    #[error("{card} cannot use {buffer}: {}", list(attempts))]
    NotRegistered {
        /// The card, or libfabric's provider.
        card: String,
        /// The buffer's name.
        buffer: String,
        /// The failure of each rung.
        attempts: Vec<Attempt>,
    },
    /// The range was registered for local work only.
    #[error("{buffer} is registered for this end only")]
    NotShared {
        /// The buffer's name.
        buffer: String,
    },
    /// The buffer has changed since its registration. Nothing was passed to the card.
    #[error("the registration of {buffer} is stale: {why}; register it again")]
    Stale {
        /// The buffer's name.
        buffer: String,
        /// The change.
        why: String,
    },
    /// The connection was stopped, because a buffer that it used had to be given back. Nothing was passed to
    /// the card.
    #[error(
        "the connection of {card} was stopped, because a buffer that it used had to be returned; connect again"
    )]
    Stopped {
        /// The card.
        card: String,
    },
    /// The object was inherited through `fork`. Nothing was passed to the card.
    #[error(
        "{card} was opened by the parent process and is not usable after fork: open it in this process"
    )]
    Inherited {
        /// The card.
        card: String,
    },
    /// A lent buffer could not be acquired.
    #[error(transparent)]
    Share(Box<ShareError>),
    /// Parts of a request do not fit each other. Nothing was passed to the card.
    #[error("the parts of the request do not match: {what}")]
    Mismatch {
        /// The conflict.
        what: String,
    },
    /// The card failed a request.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// A wait timed out.
    #[error("timed out after {limit:?} waiting for {what}")]
    TimedOut {
        /// The awaited event.
        what: String,
        /// The time limit.
        limit: Duration,
    },
    /// A message of the peer or an answer of the card violates the protocol.
    #[error("malformed: {what}")]
    Malformed {
        /// The violated rule.
        what: String,
    },
}

impl RdmaError {
    /// The error number of the kernel or the library, if a call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            RdmaError::Unavailable(error) => error.errno(),
            RdmaError::System(error) => error.errno(),
            RdmaError::Buffer(error) => error.errno(),
            RdmaError::Share(error) => error.errno(),
            _ => None,
        }
    }
}

into_io_error!(RdmaError, |error| match error {
    RdmaError::Empty { .. } | RdmaError::Mismatch { .. } => ErrorKind::InvalidInput,
    RdmaError::NotRegistered { .. } => ErrorKind::Unsupported,
    RdmaError::NotShared { .. } => ErrorKind::PermissionDenied,
    RdmaError::Stopped { .. } | RdmaError::Work(_) => ErrorKind::ConnectionAborted,
    RdmaError::TimedOut { .. } => ErrorKind::TimedOut,
    RdmaError::Malformed { .. } => ErrorKind::InvalidData,
    _ => ErrorKind::Other,
});

fn list(attempts: &[Attempt]) -> String {
    let texts: Vec<String> = attempts.iter().map(Attempt::to_string).collect();
    texts.join("; ")
}
