// SPDX-License-Identifier: GPL-2.0

//! Chunks of a pool of memory that another driver has published for peers.

use kernel::{bindings, ffi::*, page::PAGE_SIZE, prelude::*};

use crate::ffi;

/// Pages taken from a provider's pool, in one run. Dropping it gives them back.
///
/// # Invariants
///
/// From `first` on there are `count` pages of the pool, not zero, each with a count that is ours and
/// with a reference to the pool's memory (`pgmap->ref`).
pub(crate) struct Chunk {
    first: *mut bindings::page,
    count: usize,
    kaddr: *mut c_void,
}

// SAFETY: Pages are not tied to a thread.
unsafe impl Send for Chunk {}

/// The most bytes that are cleared without letting others run.
const STEP: usize = 1 << 20;

impl Chunk {
    /// Takes `len` bytes, whole pages and not zero, and clears them: who had them before may be
    /// anybody in the kernel. ENOSPC.
    ///
    /// # Safety
    ///
    /// The driver of `pdev` is bound, and stays so until this returns; it has a pool.
    pub(crate) unsafe fn take(pdev: *mut bindings::pci_dev, len: u64) -> Result<Self> {
        let len = usize::try_from(len).map_err(|_| ENOSPC)?;
        // SAFETY: By the caller's promise.
        let kaddr = unsafe { bindings::pci_alloc_p2pmem(pdev, len) };
        if kaddr.is_null() {
            return Err(ENOSPC);
        }
        let count = len / PAGE_SIZE;
        // INVARIANT: The pool gave the pages, uncounted and with one reference for all of them.
        // SAFETY: They are ours.
        let first = unsafe {
            let first = ffi::peerbuf_virt_to_page(kaddr);
            ffi::peerbuf_get_pgmap(first, count - 1);
            for at in 0..count {
                ffi::peerbuf_set_page_count(first.wrapping_add(at), 1);
            }
            first
        };
        let this = Self {
            first,
            count,
            kaddr,
        };
        for at in (0..len).step_by(STEP) {
            // SAFETY: The kernel sees the pages at that address.
            unsafe {
                bindings::memset_io(kaddr.wrapping_byte_add(at), 0, STEP.min(len - at));
                ffi::peerbuf_cond_resched();
            }
        }
        Ok(this)
    }

    /// Where it begins, as the processor sees it: physically, and in the kernel's mapping.
    pub(crate) fn place(&self) -> (u64, *mut c_void) {
        // SAFETY: By the type invariant.
        let pfn = unsafe { ffi::peerbuf_page_to_pfn(self.first) };
        (pfn as u64 * PAGE_SIZE as u64, self.kaddr)
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        for at in 0..self.count {
            // SAFETY: By the type invariant the count is ours. With the last one the page goes back
            // to the pool, which the page's reference has kept.
            unsafe { ffi::peerbuf_put_page(self.first.wrapping_add(at)) };
        }
    }
}
