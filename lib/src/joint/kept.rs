//! A cached plan of a buffer, which any thread can look up.
//!
//! A plan is stale if the buffer has another generation (the buffer moved or was revoked), if a
//! proof was dropped (by a failed transfer on a proved path, or by
//! [`forget_proofs`](crate::plan::forget_proofs)), or after ten minutes, as proofs are. The cache
//! never returns a stale plan.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};

use super::JointPlan;
use crate::error::ImportError;
use crate::plan::{Path, given_up, now, valid_until};

/// A cache for the plan of one buffer with one set of sinks. Clones share the same cache.
///
/// The program passes the buffer's generation: the generation of peerbuf.ko, the publisher's
/// generation of a lent buffer, or the program's own number, which it raises when the buffer or
/// the sinks change.
#[derive(Debug, Clone, Default)]
pub struct KeptPlan {
    kept: Arc<ArcSwap<Tagged>>,
}

#[derive(Debug)]
struct Tagged {
    generation: u64,
    given_up: u64,
    until: Duration,
    plan: JointPlan,
}

impl Default for Tagged {
    /// What an empty cache has: a plan that was never valid.
    fn default() -> Tagged {
        Tagged {
            generation: 0,
            given_up: 0,
            until: Duration::ZERO,
            plan: JointPlan {
                path: Path::StagedCopy,
                parts: Vec::new(),
                split: None,
            },
        }
    }
}

/// A plan that was looked up. It stays as it was when the cache gets another one, so drop it after use.
#[derive(Debug)]
pub struct PlanGuard(Guard<Arc<Tagged>>);

impl Deref for PlanGuard {
    type Target = JointPlan;

    fn deref(&self) -> &JointPlan {
        &self.0.plan
    }
}

impl KeptPlan {
    /// An empty cache.
    pub fn new() -> KeptPlan {
        KeptPlan::default()
    }

    /// The plan of this generation, if there is one. Waits for nobody, and allocates nothing after a thread's first call.
    pub fn get(&self, generation: u64) -> Option<PlanGuard> {
        let kept = self.kept.load();
        let is_fresh =
            kept.generation == generation && kept.given_up == given_up() && now() < kept.until;
        is_fresh.then_some(PlanGuard(kept))
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
    ) -> Result<PlanGuard, ImportError> {
        if let Some(plan) = self.get(generation) {
            return Ok(plan);
        }
        // Read before the plan is made, so that a proof dropped meanwhile makes the plan stale.
        let given_up = given_up();
        let plan = make()?;
        let made = Arc::new(Tagged {
            generation,
            given_up,
            until: valid_until(),
            plan,
        });
        // A slow thread must not replace a newer plan by an older one.
        self.kept.rcu(|kept| match kept.generation > generation {
            true => Arc::clone(kept),
            false => Arc::clone(&made),
        });
        Ok(PlanGuard(Guard::from_inner(made)))
    }
}
