//! What the registering importers have in common: the rungs by which a card, or a fabric's
//! provider, can be given a buffer, the system memory that the lower ones need, and how a
//! registration knows that it is stale.

mod rung;
mod standing;
mod system;

use crate::buffer::{Access, BufferRange};
use crate::error::{BufferError, RdmaError};

pub use rung::{Attempt, Layer, Rung};
pub(super) use standing::Standing;
pub(super) use system::{Staging, shared_memory};
#[cfg(feature = "libfabric")]
pub(super) use system::{no_mapping, whole_access};

/// Whether a range can be registered at all, for peers to do this with it.
///
/// # Errors
/// [`RdmaError::Empty`], and [`RdmaError::Buffer`] for writing what is not writable.
pub(super) fn registrable(range: &BufferRange, remote: Option<Access>) -> Result<(), RdmaError> {
    let buffer = range.buffer();
    if range.is_empty() {
        let buffer = buffer.name().to_owned();
        return Err(RdmaError::Empty { buffer });
    }
    if remote.is_some_and(Access::writes) && !buffer.is_writable() {
        let object = buffer.name().to_owned();
        let wanted = "write";
        return Err(BufferError::Access { object, wanted }.into());
    }
    Ok(())
}
