// SPDX-License-Identifier: GPL-2.0

//! Waiting with a limit.

use kernel::bindings;

/// A wait with a limit, and how long it took.
pub(crate) struct Wait {
    began_ns: u64,
    limit_ms: u32,
}

impl Wait {
    pub(crate) fn begin(limit_ms: u32) -> Self {
        Self {
            began_ns: now_ns(),
            limit_ms,
        }
    }

    /// Since it began.
    pub(crate) fn ns(&self) -> u64 {
        now_ns().saturating_sub(self.began_ns)
    }

    /// Until its limit.
    pub(crate) fn left_ms(&self) -> u32 {
        let gone = self.ns() / 1_000_000;
        u64::from(self.limit_ms).saturating_sub(gone) as u32
    }

    pub(crate) fn left_jiffies(&self) -> usize {
        Self::jiffies(self.left_ms())
    }

    /// `ms` for a kernel function that takes jiffies and knows zero as "do not wait".
    pub(crate) fn jiffies(ms: u32) -> usize {
        // SAFETY: It only computes.
        unsafe { bindings::__msecs_to_jiffies(ms) }
    }
}

fn now_ns() -> u64 {
    // SAFETY: It may be called everywhere.
    unsafe { bindings::ktime_get_mono_fast_ns() }
}
