//! A plan that is kept beside its buffer, so that it is made once and looked up often, from any thread.
//!
//! A plan is stale when the buffer has another generation (it moved, or was revoked), and when a proof was given
//! up: a transfer failed on a path that had been proved, or [`forget_proofs`](crate::plan::forget_proofs) was called.
//! A stale plan is never returned.

use std::sync::{Arc, RwLock};

use super::JointPlan;
use crate::error::ImportError;
use crate::plan::given_up;
use peerbuf_core::unpoisoned;

/// A place for the plan of one buffer with one set of sinks. Clones are the same place.
///
/// The program says which generation the buffer has: peerbuf.ko's, the publisher's of a lent buffer, or a number of
/// its own that it raises when the buffer or the sinks change.
#[derive(Debug, Clone, Default)]
pub struct KeptPlan {
    kept: Arc<RwLock<Option<Tagged>>>,
}

#[derive(Debug)]
struct Tagged {
    generation: u64,
    given_up: u64,
    plan: Arc<JointPlan>,
}

impl KeptPlan {
    /// A place without a plan.
    pub fn new() -> KeptPlan {
        KeptPlan::default()
    }

    /// The plan, if there is one of this generation. Takes no memory, and waits only for a plan that is being put.
    pub fn get(&self, generation: u64) -> Option<Arc<JointPlan>> {
        let kept = unpoisoned(self.kept.read());
        let kept = kept.as_ref()?;
        let is_fresh = kept.generation == generation && kept.given_up == given_up();
        is_fresh.then(|| Arc::clone(&kept.plan))
    }

    /// The plan, made now if there is none of this generation. Of two threads that make it, one's is kept.
    ///
    /// # Errors
    /// What `make` fails with. Nothing is kept then.
    pub fn get_or_make(
        &self,
        generation: u64,
        make: impl FnOnce() -> Result<JointPlan, ImportError>,
    ) -> Result<Arc<JointPlan>, ImportError> {
        if let Some(plan) = self.get(generation) {
            return Ok(plan);
        }
        // Before the plan is made: what is given up meanwhile makes it stale.
        let before = given_up();
        let plan = Arc::new(make()?);
        let mut kept = unpoisoned(self.kept.write());
        let is_newer = |kept: &Tagged| kept.generation > generation;
        // A thread that was slow does not put an old plan over a new one.
        if !kept.as_ref().is_some_and(is_newer) {
            *kept = Some(Tagged {
                generation,
                given_up: before,
                plan: Arc::clone(&plan),
            });
        }
        Ok(plan)
    }
}
