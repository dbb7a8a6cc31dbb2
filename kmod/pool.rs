// SPDX-License-Identifier: GPL-2.0

//! Chunks of a P2PDMA pool that another driver has published.

use kernel::{bindings, ffi::*, page::PAGE_SIZE, prelude::*};

use crate::ffi;

/// A contiguous run of pages allocated from a provider's pool. Dropping it frees the pages.
///
/// # Invariants
///
/// From `first` on there are `count` pages of the pool, not zero. This object owns one count of each page,
/// and for each page a reference to the pool's memory (`pgmap->ref`).
pub(crate) struct Chunk {
    first: *mut bindings::page,
    count: usize,
    kaddr: *mut c_void,
}

// SAFETY: Pages are not tied to a thread.
unsafe impl Send for Chunk {}

/// Bytes cleared between two calls of `cond_resched`.
const STEP: usize = 1 << 20;

impl Chunk {
    /// Allocates and clears `len` bytes, a multiple of the page size and not zero. They may hold another
    /// driver's data. ENOSPC.
    ///
    /// # Safety
    ///
    /// The driver of `pdev` has a pool, is bound, and stays bound until this function returns.
    pub(crate) unsafe fn take(pdev: *mut bindings::pci_dev, len: u64) -> Result<Self> {
        let len = usize::try_from(len).map_err(|_| ENOSPC)?;
        // SAFETY: The driver is bound and has a pool, by the caller's promise.
        let kaddr = unsafe { bindings::pci_alloc_p2pmem(pdev, len) };
        if kaddr.is_null() {
            return Err(ENOSPC);
        }
        let count = len / PAGE_SIZE;
        // INVARIANT: The pool gave the pages with a count of zero and one `pgmap` reference for all of them.
        // The loop and `get_pgmap` add the rest.
        // SAFETY: The pages were just allocated, so no one else uses them.
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
            // SAFETY: The kernel has the pages mapped at `kaddr`.
            unsafe {
                bindings::memset_io(kaddr.wrapping_byte_add(at), 0, STEP.min(len - at));
                ffi::peerbuf_cond_resched();
            }
        }
        Ok(this)
    }

    /// The chunk's physical address and its kernel virtual address.
    pub(crate) fn place(&self) -> (u64, *mut c_void) {
        // SAFETY: By the type invariant `first` is a valid page.
        let pfn = unsafe { ffi::peerbuf_page_to_pfn(self.first) };
        (pfn as u64 * PAGE_SIZE as u64, self.kaddr)
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        for at in 0..self.count {
            // SAFETY: By the type invariant this object owns the count. The last count returns the page to
            // the pool, which the page's `pgmap` reference keeps alive.
            unsafe { ffi::peerbuf_put_page(self.first.wrapping_add(at)) };
        }
    }
}
