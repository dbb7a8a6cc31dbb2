//! What the registering importers have in common: the rungs by which a card, or a fabric's
//! provider, can be given a buffer, the system memory that the lower ones need, and how a
//! registration knows that it is stale.

mod rung;
mod standing;
mod system;

pub use rung::{Attempt, Layer, Rung};
pub(super) use standing::Standing;
pub(super) use system::{Staging, shared_memory};
#[cfg(feature = "libfabric")]
pub(super) use system::{no_mapping, whole_access};
