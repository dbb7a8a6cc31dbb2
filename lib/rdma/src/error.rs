//! [`RdmaError`]: what can go wrong between a buffer and a card.

use std::io::ErrorKind;
use std::time::Duration;

use peerbuf::Errno;
use peerbuf::error::{BufferError, ShareError, SystemError, Unavailable};
use peerbuf_core::into_io_error;

use crate::rung::Attempt;
use crate::work::WorkError;

/// Why a card could not be given a buffer, or did not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RdmaError {
    /// The machine lacks what RDMA needs.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// A call failed, of the library's or of the system's.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The buffer could not be mapped or accessed.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// A range without bytes.
    #[error("a range of {buffer} without bytes cannot be registered")]
    Empty {
        /// The buffer's name.
        buffer: String,
    },
    /// No way to give the card the buffer has worked.
    #[error("{card} cannot use {buffer}: {}", list(attempts))]
    NotRegistered {
        /// The card, or libfabric's provider.
        card: String,
        /// The buffer's name.
        buffer: String,
        /// Each that was tried.
        attempts: Vec<Attempt>,
    },
    /// The other end was not meant to use it.
    #[error("{buffer} is registered for this end only")]
    NotShared {
        /// The buffer's name.
        buffer: String,
    },
    /// The buffer is not what was registered any more. Nothing was given to the card.
    #[error("the registration of {buffer} is stale: {why}; register it again")]
    Stale {
        /// The buffer's name.
        buffer: String,
        /// What has happened.
        why: String,
    },
    /// The connection was stopped, because a buffer had to be given back that it was using. Nothing
    /// was given to the card.
    #[error(
        "the connection of {card} was stopped, because a buffer had to be given back that it was \
         using; connect again"
    )]
    Stopped {
        /// The card.
        card: String,
    },
    /// What a publisher lends could not be had.
    #[error(transparent)]
    Share(Box<ShareError>),
    /// Parts of a request do not fit each other. Nothing was given to the card.
    #[error("these do not go together: {what}")]
    Mismatch {
        /// Which.
        what: String,
    },
    /// The card could not do a request.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// Nothing came in time.
    #[error("{what}: nothing came within {limit:?}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// What the other end, or the card, said breaks the rules.
    #[error("malformed: {what}")]
    Malformed {
        /// The rule it breaks.
        what: String,
    },
}

impl RdmaError {
    /// What the kernel or the library answered, if a call failed.
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
