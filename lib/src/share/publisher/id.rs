//! What buffers and subscribers are called.

use std::fmt;

use slotmap::{Key, KeyData};

slotmap::new_key_type! {
    /// A buffer that was published. Never used twice.
    pub struct BufferId;
}

impl BufferId {
    /// Its number in messages.
    pub(super) fn number(self) -> u64 {
        self.data().as_ffi()
    }

    /// The buffer that a message means. There may be none: it is only looked up.
    pub(super) fn from_number(number: u64) -> BufferId {
        KeyData::from_ffi(number).into()
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
