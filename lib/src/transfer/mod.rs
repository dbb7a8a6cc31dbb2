//! Moving bytes between files and mapped buffers, and from one buffer to another ([`copy`]).
//!
//! `engine.rs` cuts a transfer into requests and keeps many of them in flight, `file.rs` is the file's end and
//! says which disk that is on, `memory.rs` is between buffers.

pub(crate) mod engine;
pub(crate) mod file;
mod memory;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::path::Plan;

pub use crate::queue::Queue;
pub use memory::{copy, copy_watched};

/// Bytes at one place of a file and one of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where they begin in the file.
    pub file_offset: u64,
    /// Where they begin in the range that is attached.
    pub offset: u64,
    /// How many there are.
    pub length: u64,
}

/// Pieces in their order, where those that follow each other in the file and in the buffer are one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Merged<'p>(pub(crate) &'p [Piece]);

impl Iterator for Merged<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let (first, mut rest) = self.0.split_first()?;
        let mut piece = *first;
        while let Some((next, after)) = rest.split_first() {
            // Both are inside of their file and range, so nothing overflows.
            let follows = next.file_offset == piece.file_offset + piece.length
                && next.offset == piece.offset + piece.length;
            if !follows {
                break;
            }
            piece.length += next.length;
            rest = after;
        }
        self.0 = rest;
        Some(piece)
    }
}

/// What a transfer did: an account, not a forecast.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt {
    /// The path that carried the bytes. What direct I/O cannot carry goes by the processor on every path: the
    /// bytes before the first and after the last whole block of the disk, and all of a piece whose place in
    /// memory and in the file do not fit together. [`Receipt::copied`] counts those.
    pub plan: Plan,
    /// Bytes moved. Fewer than were asked for only where a file that was read ended.
    pub bytes: u64,
    /// Of these, the bytes that were in system memory on their way: none of those that went peer
    /// to peer, all of those in a buffer that is itself system memory, and all that the CPU
    /// copied.
    pub host_bytes: u64,
    /// Of these, the bytes that the processor copied.
    pub copied: u64,
    /// How many requests the kernel got, those included that came to nothing.
    pub requests: u64,
    /// How the requests got to the kernel.
    pub queue: Queue,
    /// How often the buffer moved meanwhile. Each time a path was chosen anew for the rest, and [`Receipt::plan`] is
    /// the worst of them.
    pub moves: u32,
    /// How long it took, from the call to its end: with the choice of the path, and with its proof if one was
    /// made.
    pub time: Duration,
}

/// A transfer as others see it: how far it is, and a way to end it early. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    bytes: AtomicU64,
    cancelled: AtomicBool,
}

impl Watch {
    /// Bytes that have arrived, of all transfers that it was given to. Fewer than before, if a buffer has moved
    /// and some are carried again.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Ends the transfer after the requests that are in flight: it fails with
    /// [`TransferError::Cancelled`](crate::error::TransferError::Cancelled). Later ones do, too.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Relaxed)
    }

    fn arrived(&self, bytes: u64) {
        self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// They have to be carried again.
    fn withdrawn(&self, bytes: u64) {
        self.shared.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(feature = "tokio")]
impl Receipt {
    /// Both transfers in one account. The plan is that of the worse path.
    pub(crate) fn followed_by(self, next: Receipt) -> Receipt {
        Receipt {
            bytes: self.bytes + next.bytes,
            host_bytes: self.host_bytes + next.host_bytes,
            copied: self.copied + next.copied,
            requests: self.requests + next.requests,
            moves: self.moves + next.moves,
            queue: match next.queue {
                Queue::Calls => self.queue,
                queue => queue,
            },
            time: self.time + next.time,
            plan: match next.plan.path < self.plan.path {
                true => next.plan,
                false => self.plan,
            },
        }
    }
}
