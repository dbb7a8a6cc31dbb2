//! The publisher's state of one subscriber: its holdings and its pending messages.

use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};

use super::super::channel::{Channel, Peer};
use super::super::wire::{Message, Note};
use super::id::BufferId;

/// The relation of a subscriber to a buffer that it holds or that waits to be offered.
#[derive(Debug, Clone, Copy)]
pub(super) enum Standing {
    /// The buffer waits in the connection's queue.
    Unseen,
    Held(Holding),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Holding {
    pub(super) generation: u64,
    /// Number of the offer that contained the buffer, counted from 1.
    pub(super) offer: u64,
}

pub(super) struct Connection {
    pub(super) channel: Channel,
    pub(super) peer: Peer,
    pub(super) greeted: bool,
    pub(super) standing: BTreeMap<BufferId, Standing>,
    /// Queue of buffers that the subscriber may have to be offered, each once.
    pub(super) unseen: VecDeque<BufferId>,
    /// Pending messages about buffers that the subscriber holds.
    pub(super) notices: VecDeque<(Message, Note)>,
    /// Number of offers sent.
    pub(super) sent: u64,
    /// Number of descriptors in each offer that has not arrived; `under_way` is their sum.
    pub(super) waiting: VecDeque<usize>,
    pub(super) under_way: usize,
    /// Number of descriptors sent since the last request for an acknowledgement.
    pub(super) unasked: usize,
    /// True once the subscriber has acknowledged an offer, which proves that it reads.
    pub(super) proven: bool,
    /// True while the socket is full.
    pub(super) full: bool,
    /// True while epoll waits for room in the socket.
    pub(super) awaits_room: bool,
    /// True if the kernel took no more descriptors of this user; the publisher retries later.
    pub(super) refused: bool,
}

impl Connection {
    /// Number of offers that the subscriber has acknowledged.
    pub(super) fn arrived(&self) -> u64 {
        self.sent - self.waiting.len() as u64
    }

    pub(super) fn holding(&self, buffer: BufferId) -> Option<&Holding> {
        match self.standing.get(&buffer)? {
            Standing::Held(holding) => Some(holding),
            Standing::Unseen => None,
        }
    }

    /// Queues a buffer, unless the subscriber holds it or it is queued already.
    pub(super) fn queue(&mut self, buffer: BufferId) {
        if let Entry::Vacant(place) = self.standing.entry(buffer) {
            place.insert(Standing::Unseen);
            self.unseen.push_back(buffer);
        }
    }

    /// Removes the first buffer of the queue without an offer.
    pub(super) fn skip(&mut self) {
        if let Some(buffer) = self.unseen.pop_front() {
            self.standing.remove(&buffer);
        }
    }
}
