//! One subscriber, as its publisher sees it: what it holds and what it is still to be told.

use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};

use super::super::channel::{Channel, Peer};
use super::super::wire::{Message, Note};
use super::id::BufferId;

/// What is between a subscriber and a buffer that it may have to be offered, or holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Standing {
    /// It waits in the connection's queue.
    Unseen,
    Held(Holding),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Holding {
    pub(super) generation: u64,
    /// The offer that it came with, counted from 1.
    pub(super) offer: u64,
}

pub(super) struct Connection {
    pub(super) channel: Channel,
    pub(super) peer: Peer,
    pub(super) greeted: bool,
    pub(super) standing: BTreeMap<BufferId, Standing>,
    /// Buffers that it may have to be offered, each once.
    pub(super) unseen: VecDeque<BufferId>,
    /// What it is to be told about buffers that it holds.
    pub(super) notices: VecDeque<(Message, Note)>,
    /// How many offers it was sent.
    pub(super) sent: u64,
    /// How many descriptors are in each offer that has not arrived yet, and in all of them.
    pub(super) waiting: VecDeque<usize>,
    pub(super) under_way: usize,
    /// Descriptors that were sent since it was last asked what has arrived.
    pub(super) unasked: usize,
    /// It has confirmed offers, so it reads what it is sent.
    pub(super) proven: bool,
    /// Its socket was full; it is waited for.
    pub(super) full: bool,
    /// The wait for room is registered.
    pub(super) awaits_room: bool,
    /// The kernel took no more descriptors from this user; tried again after a while.
    pub(super) refused: bool,
}

impl Connection {
    /// How many offers it says have arrived.
    pub(super) fn arrived(&self) -> u64 {
        self.sent - self.waiting.len() as u64
    }

    pub(super) fn holding(&self, buffer: BufferId) -> Option<&Holding> {
        match self.standing.get(&buffer)? {
            Standing::Held(holding) => Some(holding),
            Standing::Unseen => None,
        }
    }

    /// Has a buffer offered, if it is neither held nor waiting.
    pub(super) fn queue(&mut self, buffer: BufferId) {
        if let Entry::Vacant(place) = self.standing.entry(buffer) {
            place.insert(Standing::Unseen);
            self.unseen.push_back(buffer);
        }
    }

    /// The first buffer that waits is not offered.
    pub(super) fn skip(&mut self) {
        if let Some(buffer) = self.unseen.pop_front() {
            self.standing.remove(&buffer);
        }
    }
}
