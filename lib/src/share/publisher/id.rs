//! Identifiers of buffers and subscribers.

use std::fmt;

/// Identifier of a published buffer. A publisher never reuses one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BufferId(u64);

impl BufferId {
    /// The identifier's number in messages.
    pub(super) fn number(self) -> u64 {
        self.0
    }

    /// The identifier that a message contains. The buffer may not exist: callers only look it
    /// up.
    pub(super) fn from_number(number: u64) -> BufferId {
        BufferId(number)
    }
}

/// Identifier of a connected subscriber. A publisher never reuses one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriberId(pub(super) u64);

impl fmt::Display for SubscriberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "subscriber {}", self.0)
    }
}
