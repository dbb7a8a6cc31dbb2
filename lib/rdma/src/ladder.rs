//! Shared by both kinds of registration (cards, and providers of libfabric): the ladder of rungs, the system
//! memory of the lower rungs, and the detection of stale registrations.

mod standing;
mod system;

use crate::error::RdmaError;
use crate::rung::{Attempt, Rung};
use peerbuf::buffer::{Access, BufferRange};
use peerbuf::error::BufferError;

pub(crate) use standing::Standing;
#[cfg(feature = "libfabric")]
pub(crate) use system::no_mapping;
pub(crate) use system::{Staging, shared_memory};

/// Checks that a range can be registered with this remote access.
///
/// # Errors [`RdmaError::Empty`], and [`RdmaError::Buffer`] for writes to a read-only buffer.
pub(crate) fn registrable(range: &BufferRange, remote: Option<Access>) -> Result<(), RdmaError> {
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

/// A place to register buffers: a card's protection domain, or a domain of libfabric.
pub(crate) trait Domain {
    /// The access flags to request for a region.
    type Access: Copy;
    /// The registered region.
    type Region;

    /// A name for diagnostics.
    fn name(&self) -> String;

    /// Tries to register a range by one rung.
    fn try_rung(
        &self,
        range: &BufferRange,
        access: Self::Access,
        rung: Rung,
    ) -> Result<Self::Region, Attempt>;

    /// Corrects the layers of earlier failures, if a later answer allows it. `taken` is the rung that worked.
    fn name_the_layers(_attempts: &mut [Attempt], _taken: Option<Rung>) {}
}

/// The result of [`climb`].
pub(crate) struct Climbed<R> {
    pub(crate) region: R,
    pub(crate) rung: Rung,
    /// The failures of the better rungs.
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) standing: Standing,
}

/// Tries the rungs in order until one works.
///
/// # Errors [`RdmaError::NotRegistered`] with the failure of each rung.
pub(crate) fn climb<D: Domain>(
    domain: &D,
    range: &BufferRange,
    access: D::Access,
    rungs: &[Rung],
) -> Result<Climbed<D::Region>, RdmaError> {
    let buffer = range.buffer();
    let standing = Standing::of(buffer);
    let mut attempts = Vec::new();
    for &rung in rungs {
        match domain.try_rung(range, access, rung) {
            Ok(region) => {
                D::name_the_layers(&mut attempts, Some(rung));
                return Ok(Climbed {
                    region,
                    rung,
                    attempts,
                    standing,
                });
            }
            Err(attempt) => attempts.push(attempt),
        }
    }
    D::name_the_layers(&mut attempts, None);
    Err(RdmaError::NotRegistered {
        card: domain.name(),
        buffer: buffer.name().to_owned(),
        attempts,
    })
}
