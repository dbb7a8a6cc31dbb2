//! Lock guards after a panic.

use std::sync::{LockResult, PoisonError};

/// The guard of a lock, also if a holder has panicked. Only for locks whose holders leave the data consistent
/// wherever they may panic.
#[doc(hidden)]
pub fn unpoisoned<G>(locked: LockResult<G>) -> G {
    locked.unwrap_or_else(PoisonError::into_inner)
}
