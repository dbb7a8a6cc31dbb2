// SPDX-License-Identifier: GPL-2.0

//! The fences that a revoke waits for.
//!
//! Whoever holds a descriptor of a dma-buf can import a fence into it at any time, also after access
//! was taken away (`DMA_BUF_IOCTL_IMPORT_SYNC_FILE`). If those counted, he could hold up the owner for ever
//! with a new one every few seconds. Fences say when accesses end that began before; nobody gets access
//! after the mark, so later fences mean nothing: the list is made at the mark.

use core::{ptr, slice};

use kernel::{bindings, error::to_result, prelude::*, sync::Arc};

use crate::ffi;

/// Fences of a reservation object at some time.
///
/// # Invariants
///
/// `first` points to `count` fences, each with a reference that is this object's, in memory that is its
/// own; or `count` is 0.
pub(crate) struct Fences {
    first: *mut *mut bindings::dma_fence,
    count: usize,
}

// SAFETY: Fences may be used from any thread.
unsafe impl Send for Fences {}
// SAFETY: The list does not change, and each fence has a lock of its own.
unsafe impl Sync for Fences {}

impl Fences {
    /// Those that are not signalled yet, of every usage. ENOMEM.
    ///
    /// # Safety
    ///
    /// `resv` is valid, and its lock is held.
    pub(crate) unsafe fn of(resv: *mut bindings::dma_resv) -> Result<Arc<Self>> {
        let (mut first, mut count) = (ptr::null_mut(), 0);
        // BOOKKEEP is the usage that includes all others.
        // SAFETY: By the caller's promise; both places are valid for writes.
        to_result(unsafe {
            bindings::dma_resv_get_fences(
                resv,
                bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP,
                &mut count,
                &mut first,
            )
        })?;
        // INVARIANT: The call made the list, and took the references. On an error here it is dropped.
        let this = Self {
            first,
            count: count as usize,
        };
        Ok(Arc::new(this, GFP_KERNEL)?)
    }

    fn list(&self) -> &[*mut bindings::dma_fence] {
        match self.count {
            0 => &[],
            // SAFETY: By the type invariant.
            count => unsafe { slice::from_raw_parts(self.first, count) },
        }
    }

    /// Whether one is not signalled.
    pub(crate) fn pending(&self) -> bool {
        let signalled = |&fence: &*mut bindings::dma_fence| {
            // SAFETY: By the type invariant there is a reference.
            unsafe { ffi::peerbuf_dma_fence_is_signaled(fence) }
        };
        !self.list().iter().all(signalled)
    }

    /// Waits for the first that is not signalled, at most `jiffies`. No lock is held.
    pub(crate) fn wait_for_one(&self, jiffies: usize) {
        let pending = |&&fence: &&*mut bindings::dma_fence| {
            // SAFETY: By the type invariant there is a reference.
            !unsafe { ffi::peerbuf_dma_fence_is_signaled(fence) }
        };
        if let Some(&fence) = self.list().iter().find(pending) {
            // SAFETY: As above; the caller may sleep.
            unsafe { bindings::dma_fence_wait_timeout(fence, false, jiffies as isize) };
        }
    }
}

impl Drop for Fences {
    fn drop(&mut self) {
        for &fence in self.list() {
            // SAFETY: The reference is this object's.
            unsafe { ffi::peerbuf_dma_fence_put(fence) };
        }
        // SAFETY: The memory came from `dma_resv_get_fences`, or is none.
        unsafe { bindings::kfree(self.first.cast()) };
    }
}
