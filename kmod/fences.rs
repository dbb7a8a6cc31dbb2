// SPDX-License-Identifier: GPL-2.0

//! The fences that a revoke waits for.
//!
//! A holder of a dma-buf's descriptor can import a fence at any time, also after a revoke
//! (`DMA_BUF_IOCTL_IMPORT_SYNC_FILE`). If a revoke waited for those, a new fence every few seconds could
//! delay the owner forever. A fence says when accesses end that began before it; no access begins after the
//! revoke's mark, so later fences guard nothing. The revoke therefore waits for a snapshot taken at the mark.

use core::{ptr, slice};

use kernel::{bindings, error::to_result, prelude::*, sync::Arc};

use crate::ffi;

/// A snapshot of the fences of a reservation object.
///
/// # Invariants
///
/// Either `count` is 0, or `first` points to an array of `count` fences. This object owns the array and one
/// reference to each fence.
pub(crate) struct Fences {
    first: *mut *mut bindings::dma_fence,
    count: usize,
}

// SAFETY: Fences may be used from any thread.
unsafe impl Send for Fences {}
// SAFETY: The list does not change, and each fence does its own locking.
unsafe impl Sync for Fences {}

impl Fences {
    /// The unsignalled fences of every usage. ENOMEM.
    ///
    /// # Safety
    ///
    /// `resv` is valid, and its lock is held.
    pub(crate) unsafe fn of(resv: *mut bindings::dma_resv) -> Result<Arc<Self>> {
        let (mut first, mut count) = (ptr::null_mut(), 0);
        // The usage BOOKKEEP includes all others.
        // SAFETY: `resv` is valid and locked, by the caller's promise; both outputs are valid for writes.
        to_result(unsafe {
            bindings::dma_resv_get_fences(
                resv,
                bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP,
                &mut count,
                &mut first,
            )
        })?;
        // INVARIANT: The call allocated the array and took the references. If `Arc::new` fails it drops
        // `this`.
        let this = Self {
            first,
            count: count as usize,
        };
        Ok(Arc::new(this, GFP_KERNEL)?)
    }

    fn list(&self) -> &[*mut bindings::dma_fence] {
        match self.count {
            0 => &[],
            // SAFETY: By the type invariant there are `count` fences at `first`.
            count => unsafe { slice::from_raw_parts(self.first, count) },
        }
    }

    /// The unsignalled fences.
    fn unsignalled(&self) -> impl Iterator<Item = *mut bindings::dma_fence> + '_ {
        let pending = |&fence: &*mut bindings::dma_fence| {
            // SAFETY: By the type invariant this object has a reference to the fence.
            !unsafe { ffi::peerbuf_dma_fence_is_signaled(fence) }
        };
        self.list().iter().copied().filter(pending)
    }

    /// The number of unsignalled fences.
    pub(crate) fn pending(&self) -> usize {
        self.unsignalled().count()
    }

    /// Waits for the first unsignalled fence, at most `jiffies`. The caller holds no lock.
    pub(crate) fn wait_for_one(&self, jiffies: usize) {
        if let Some(fence) = self.unsignalled().next() {
            // SAFETY: By the type invariant this object has a reference to the fence; the caller may sleep.
            unsafe { bindings::dma_fence_wait_timeout(fence, false, jiffies as isize) };
        }
    }
}

impl Drop for Fences {
    fn drop(&mut self) {
        for &fence in self.list() {
            // SAFETY: This object owns the reference.
            unsafe { ffi::peerbuf_dma_fence_put(fence) };
        }
        // SAFETY: The memory came from `dma_resv_get_fences`, or the pointer is null.
        unsafe { bindings::kfree(self.first.cast()) };
    }
}
