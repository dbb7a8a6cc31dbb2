//! What a [`Publisher`](super::owner::Publisher) tells its owner.

use std::time::Duration;

use super::super::backing::Placement;
use super::super::channel::Peer;
use super::id::{BufferId, SubscriberId};
use crate::error::ShareError;

/// Why a subscriber was cut off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CutOff {
    /// It did not give a buffer back in time.
    #[error("the subscriber did not return {name} within {limit:?}")]
    Late {
        /// What the buffer is published as.
        name: String,
        /// How long it had.
        limit: Duration,
    },
    /// What it sent breaks the protocol.
    #[error("{0}")]
    Rubbish(ShareError),
    /// It connected and did not greet, as a subscriber does first of all.
    #[error("the subscriber sent no hello within {limit:?}")]
    Silent {
        /// How long it had.
        limit: Duration,
    },
    /// Nothing could be sent to it.
    #[error("{0}")]
    Unreachable(ShareError),
}

/// Something that happened to a [`Publisher`](crate::share::Publisher).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A subscriber is there and speaks the protocol.
    Joined {
        /// Which one.
        subscriber: SubscriberId,
        /// The process, as the kernel vouches for it.
        peer: Peer,
    },
    /// A subscriber closed its connection, or died.
    Left {
        /// Which one.
        subscriber: SubscriberId,
        /// The buffers that it had not given back.
        held: Vec<BufferId>,
    },
    /// A subscriber was cut off.
    CutOff {
        /// Which one.
        subscriber: SubscriberId,
        /// The buffers that it had not given back, and whose current generation it can still
        /// reach until they move.
        held: Vec<BufferId>,
        /// Why.
        why: CutOff,
    },
    /// A subscriber did not get a buffer that the policy meant for it, or could not use it.
    NotOffered {
        /// Which one.
        subscriber: SubscriberId,
        /// Which buffer.
        buffer: BufferId,
        /// Why.
        why: String,
    },
    /// Somebody tried to connect, and could not. After a [shortage](ShareError::is_shortage) of
    /// descriptors or memory this is told once; newcomers wait, and are tried again until it is
    /// over.
    NotAccepted {
        /// Why.
        why: ShareError,
    },
}

/// What a migration did, and how long each of its parts took.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Migration {
    /// The generation that it made.
    pub generation: u64,
    /// Where the bytes are now.
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
    /// Subscribers that gave the old generation back.
    pub released: usize,
    /// Those that were cut off for it, or left meanwhile.
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
