//! Identifiers of buffers and subscribers.

use std::fmt;

/// A buffer that was published. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BufferId(u64);

impl BufferId {
    /// Its number in messages.
    pub(super) fn number(self) -> u64 {
        self.0
    }

    /// The buffer that a message means. There may be none: it is only looked up.
    pub(super) fn from_number(number: u64) -> BufferId {
        BufferId(number)
    }
}

/// A connected subscriber. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriberId(pub(super) u64);

impl fmt::Display for SubscriberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "subscriber {}", self.0)
    }
}
