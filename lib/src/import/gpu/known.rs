//! What each driver takes of which exporter, as it said in this process.

use std::sync::{Mutex, PoisonError};

use super::{Runtime, Way};
use crate::buffer::Kind;

/// A driver's answer to one way for the buffers of one exporter.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Known {
    /// The runtime.
    pub runtime: Runtime,
    /// The device's number in it.
    pub device: u32,
    /// The kind of the exporter.
    pub kind: Kind,
    /// The exporter's name in the kernel, such as `udmabuf`; empty for memory without a dma-buf.
    pub exporter: String,
    /// The way.
    pub way: Way,
    /// The call and the runtime's answer, where it was refused.
    pub taken: Result<(), String>,
}

static ALL: Mutex<Vec<Known>> = Mutex::new(Vec::new());

fn with<T>(what: impl FnOnce(&mut Vec<Known>) -> T) -> T {
    what(&mut ALL.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Known {
    fn is_about(&self, other: &Known) -> bool {
        let taken = self.taken.clone();
        *self
            == Known {
                taken,
                ..other.clone()
            }
    }
}

/// All answers that are remembered: one for each device, exporter and way that was tried. Refusals that may be over
/// the next time, such as a shortage of memory, are not among them.
pub fn known() -> Vec<Known> {
    with(|all| all.clone())
}

/// Forgets them, so that drivers are asked again: after a driver was loaded anew, say.
pub fn forget() {
    with(Vec::clear);
}

/// The refusal, if there was one; `about.taken` counts for nothing.
pub(super) fn refusal(about: &Known) -> Option<String> {
    with(|all| {
        let found = all.iter().find(|known| known.is_about(about));
        found?.taken.clone().err()
    })
}

pub(super) fn remember(new: Known) {
    with(
        |all| match all.iter_mut().find(|known| known.is_about(&new)) {
            Some(known) => *known = new,
            None => all.push(new),
        },
    );
}
