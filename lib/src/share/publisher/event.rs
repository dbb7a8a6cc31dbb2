//! The events that a [`Publisher`](super::owner::Publisher) reports to its owner.

use std::time::Duration;

use super::super::backing::Placement;
use super::super::channel::Peer;
use super::id::{BufferId, SubscriberId};
use crate::error::ShareError;

/// The reason why a subscriber was cut off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CutOff {
    /// The subscriber did not return a buffer in time.
    #[error("the subscriber did not return {name} within {limit:?}")]
    Late {
        /// The buffer's published name.
        name: String,
        /// The time limit.
        limit: Duration,
    },
    /// A message of the subscriber breaks the protocol.
    #[error("{0}")]
    Rubbish(ShareError),
    /// The peer connected and did not send a hello, which must be a subscriber's first message.
    #[error("the subscriber sent no hello within {limit:?}")]
    Silent {
        /// The time limit.
        limit: Duration,
    },
    /// The publisher could not send to the subscriber.
    #[error("{0}")]
    Unreachable(ShareError),
}

/// An event of a [`Publisher`](crate::share::Publisher).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A subscriber connected and sent a valid hello.
    Joined {
        /// The subscriber.
        subscriber: SubscriberId,
        /// The peer process, as reported by the kernel.
        peer: Peer,
    },
    /// A subscriber closed its connection, or died.
    Left {
        /// The subscriber.
        subscriber: SubscriberId,
        /// The buffers that it had not returned.
        held: Vec<BufferId>,
    },
    /// A subscriber was cut off.
    CutOff {
        /// The subscriber.
        subscriber: SubscriberId,
        /// The buffers that the subscriber had not returned. The subscriber can reach their
        /// current generation until they move.
        held: Vec<BufferId>,
        /// The reason.
        why: CutOff,
    },
    /// A subscriber did not get a buffer that the policy granted, or could not use the buffer.
    NotOffered {
        /// The subscriber.
        subscriber: SubscriberId,
        /// The buffer.
        buffer: BufferId,
        /// The reason.
        why: String,
    },
    /// The publisher could not accept a connection. For a [shortage](ShareError::is_shortage)
    /// of descriptors or memory the publisher reports this event once. New connections wait,
    /// and the publisher retries until the shortage is over.
    NotAccepted {
        /// The reason.
        why: ShareError,
    },
}

/// The result of a migration, and the duration of each of its steps.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Migration {
    /// The number of the new generation.
    pub generation: u64,
    /// The location of the bytes after the migration.
    pub placement: Placement,
    /// Time to send the request to all subscribers.
    pub announce: Duration,
    /// Time until the last subscriber had returned the old generation or was cut off.
    pub drain: Duration,
    /// Time to make the new generation, after the devices finished their work on the old one:
    /// the copy, or the kernel's move.
    pub transfer: Duration,
    /// Time to offer the new generation.
    pub offer: Duration,
    /// Number of subscribers that returned the old generation.
    pub released: usize,
    /// The subscribers that the migration cut off, or that left during it.
    pub lost: Vec<SubscriberId>,
    /// True if the new generation was made unreachable from the old one, because a process may
    /// still hold the old one.
    pub isolated: bool,
}

impl Migration {
    /// The duration of the whole migration.
    pub fn total(&self) -> Duration {
        self.announce + self.drain + self.transfer + self.offer
    }
}
