//! The events that a [`Publisher`](super::owner::Publisher) reports to its owner.

use std::time::Duration;

use super::super::backing::Placement;
use super::super::channel::Peer;
use super::id::{BufferId, SubscriberId};
use crate::error::ShareError;

/// Why a subscriber was cut off.
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

/// Something that happened to a [`Publisher`](crate::share::Publisher).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A subscriber connected and sent a valid hello.
    Joined {
        /// The subscriber.
        subscriber: SubscriberId,
        /// The process, as the kernel vouches for it.
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
        /// The buffers that it had not given back, and whose current generation it can still
        /// reach until they move.
        held: Vec<BufferId>,
        /// Why.
        why: CutOff,
    },
    /// A subscriber did not get a buffer that the policy meant for it, or could not use it.
    NotOffered {
        /// The subscriber.
        subscriber: SubscriberId,
        /// The buffer.
        buffer: BufferId,
        /// Why.
        why: String,
    },
    /// A connection attempt failed. After a [shortage](ShareError::is_shortage) of
    /// descriptors or memory this is told once; newcomers wait, and are tried again until it is
    /// over.
    NotAccepted {
        /// Why.
        why: ShareError,
    },
}

/// The result of a migration, and the duration of each of its steps.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Migration {
    /// The generation that it made.
    pub generation: u64,
    /// The location of the bytes now.
    pub placement: Placement,
    /// Telling the subscribers.
    pub announce: Duration,
    /// Until the last of them had given the old generation back or was cut off.
    pub drain: Duration,
    /// Making the new generation, once the devices that worked on the old one are done: the copy, or
    /// the kernel's move.
    pub transfer: Duration,
    /// Offering the new generation.
    pub offer: Duration,
    /// Number of subscribers that returned the old generation.
    pub released: usize,
    /// Subscribers that were cut off by the migration, or left during it.
    pub lost: Vec<SubscriberId>,
    /// The new generation was made unreachable from the old, because somebody may still have it.
    pub isolated: bool,
}

impl Migration {
    /// The time from beginning to end.
    pub fn total(&self) -> Duration {
        self.announce + self.drain + self.transfer + self.offer
    }
}
