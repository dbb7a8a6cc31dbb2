//! Moving bytes between a file and a mapped buffer.
//!
//! `engine.rs` has the loops, `file.rs` is the file's end of them, and `place.rs` says
//! which disk that is on.

pub(crate) mod engine;
pub(crate) mod file;
pub(crate) mod place;

use crate::path::Plan;

/// What a transfer did: an account, not a forecast.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt {
    /// The path that carried the bytes. A peer-to-peer transfer whose length is not a whole
    /// number of disk blocks moves the rest, less than a block, by the CPU; `host_bytes` has it.
    pub plan: Plan,
    /// Bytes moved. Fewer than the range's length only where a file that was read ended.
    pub bytes: u64,
    /// Of these, the bytes that were in system memory on their way: none of those that went peer
    /// to peer, all of those in a buffer that is itself system memory, and all that the CPU
    /// copied.
    pub host_bytes: u64,
}

#[cfg(feature = "tokio")]
impl Receipt {
    /// Both transfers in one account. The plan is that of the worse path.
    pub(crate) fn followed_by(self, next: Receipt) -> Receipt {
        Receipt {
            bytes: self.bytes + next.bytes,
            host_bytes: self.host_bytes + next.host_bytes,
            plan: match next.plan.path < self.plan.path {
                true => next.plan,
                false => self.plan,
            },
        }
    }
}
