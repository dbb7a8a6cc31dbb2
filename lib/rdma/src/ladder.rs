//! What the registering importers have in common: the rungs by which a card, or a fabric's
//! provider, can be given a buffer, the system memory that the lower ones need, and how a
//! registration knows that it is stale.

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

/// Whether a range can be registered at all, for peers to do this with it.
///
/// # Errors
/// [`RdmaError::Empty`], and [`RdmaError::Buffer`] for writing what is not writable.
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

/// Where buffers are registered: a card's protection domain, or a domain of libfabric.
pub(crate) trait Domain {
    /// What is asked for of a region, besides its bytes.
    type Access: Copy;
    /// What was registered.
    type Region;

    /// Its name, for people.
    fn name(&self) -> String;

    /// Registers a range by one rung.
    fn try_rung(
        &self,
        range: &BufferRange,
        access: Self::Access,
        rung: Rung,
    ) -> Result<Self::Region, Attempt>;

    /// Corrects who refused what, where a later answer tells. `taken` is the rung that worked.
    fn name_the_layers(_attempts: &mut [Attempt], _taken: Option<Rung>) {}
}

/// What [`climb`] has registered.
pub(crate) struct Climbed<R> {
    pub(crate) region: R,
    pub(crate) rung: Rung,
    /// What each better rung failed with.
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) standing: Standing,
}

/// Tries the rungs in their order, until one works.
///
/// # Errors
/// [`RdmaError::NotRegistered`] with each rung's failure.
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
