//! A cached plan of a buffer, which any thread can look up.
//!
//! A plan is stale if the buffer has another generation (the buffer moved or was revoked), or
//! if a proof was dropped: by a failed transfer on a proved path, or by
//! [`forget_proofs`](crate::plan::forget_proofs). The cache never returns a stale plan.

use std::sync::{Arc, RwLock};

use super::JointPlan;
use crate::error::ImportError;
use crate::plan::given_up;
use peerbuf_core::unpoisoned;

/// A cache for the plan of one buffer with one set of sinks. Clones share the same cache.
///
/// The program passes the buffer's generation: the generation of peerbuf.ko, the publisher's
/// generation of a lent buffer, or the program's own number, which it raises when the buffer or
/// the sinks change.
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
    /// An empty cache.
    pub fn new() -> KeptPlan {
        KeptPlan::default()
    }

    /// The plan of this generation, if there is one. Allocates nothing, and waits only for a
    /// thread that is storing a plan.
    pub fn get(&self, generation: u64) -> Option<Arc<JointPlan>> {
        let kept = unpoisoned(self.kept.read());
        let kept = kept.as_ref()?;
        let is_fresh = kept.generation == generation && kept.given_up == given_up();
        is_fresh.then(|| Arc::clone(&kept.plan))
    }

    /// The plan of this generation, made now if there is none. If two threads make it, the
    /// cache keeps one.
    ///
    /// # Errors
    /// The error of `make`. The cache stays unchanged in that case.
    pub fn get_or_make(
        &self,
        generation: u64,
        make: impl FnOnce() -> Result<JointPlan, ImportError>,
    ) -> Result<Arc<JointPlan>, ImportError> {
        if let Some(plan) = self.get(generation) {
            return Ok(plan);
        }
        // Read before the plan is made, so that a proof dropped meanwhile makes the plan stale.
        let before = given_up();
        let plan = Arc::new(make()?);
        let mut kept = unpoisoned(self.kept.write());
        let is_newer = |kept: &Tagged| kept.generation > generation;
        // A slow thread must not replace a newer plan by an older one.
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
