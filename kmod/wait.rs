// SPDX-License-Identifier: GPL-2.0

//! A time limit for waits.

use kernel::bindings;

/// The start and the limit of a wait.
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

    /// Nanoseconds since the start.
    pub(crate) fn ns(&self) -> u64 {
        now_ns().saturating_sub(self.began_ns)
    }

    /// Milliseconds until the limit.
    pub(crate) fn left_ms(&self) -> u32 {
        let gone = self.ns() / 1_000_000;
        u64::from(self.limit_ms).saturating_sub(gone) as u32
    }

    pub(crate) fn left_jiffies(&self) -> usize {
        Self::jiffies(self.left_ms())
    }

    /// `ms` in jiffies, for kernel functions that take jiffies and do not wait if given zero.
    pub(crate) fn jiffies(ms: u32) -> usize {
        // SAFETY: A pure computation.
        unsafe { bindings::__msecs_to_jiffies(ms) }
    }
}

fn now_ns() -> u64 {
    // SAFETY: May be called in any context.
    unsafe { bindings::ktime_get_mono_fast_ns() }
}
