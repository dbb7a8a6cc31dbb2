//! Locks that somebody panicked with.

use std::sync::{LockResult, PoisonError};

/// The guard, whoever panicked with it before. Only for locks whose holders leave what is locked as it was between two
/// changes wherever they may panic.
#[doc(hidden)]
pub fn unpoisoned<G>(locked: LockResult<G>) -> G {
    locked.unwrap_or_else(PoisonError::into_inner)
}
