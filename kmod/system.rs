// SPDX-License-Identifier: GPL-2.0

//! System memory for buffers that are not, or not wholly, in a BAR.

use core::ptr;

use kernel::{bindings, ffi::*, page::PAGE_SIZE, prelude::*, sync::Arc};

use crate::ffi;

const fn bit(number: u32) -> bindings::gfp_t {
    1 << number
}

/// Zeroed, on the account of whoever asks. A request that cannot be met fails (ENOMEM): it calls
/// no OOM killer, and says nothing in the log.
const SINGLE: bindings::gfp_t = bindings::GFP_KERNEL_ACCOUNT
    | bindings::__GFP_ZERO
    | bindings::__GFP_NOWARN
    | bit(bindings::___GFP_RETRY_MAYFAIL_BIT);

/// As [`SINGLE`], but only if it is to be had at once.
const LARGE: bindings::gfp_t =
    (SINGLE & !bit(bindings::___GFP_RETRY_MAYFAIL_BIT)) | bit(bindings::___GFP_NORETRY_BIT);

/// The orders that are tried, so that scatter lists are short where memory is not fragmented.
const ORDERS: [u32; 3] = [9, 4, 0];

/// Pages of system memory.
///
/// # Invariants
///
/// Each entry is a page of order 0, not in high memory, to which this object has one reference. A
/// count above one means that a page table entry or an I/O request uses the page.
pub(crate) struct System {
    pages: KVVec<*mut bindings::page>,
}

// SAFETY: Pages are not tied to a thread.
unsafe impl Send for System {}
// SAFETY: The list does not change once it is made.
unsafe impl Sync for System {}

impl System {
    /// Takes `len` bytes, a multiple of the page size, zeroed. ENOMEM is the only error.
    pub(crate) fn alloc(len: u64) -> Result<Arc<Self>> {
        let count = usize::try_from(len).map_err(|_| ENOMEM)? / PAGE_SIZE;
        // Dropped on an error, with what it has by then.
        let mut this = Self {
            pages: KVVec::with_capacity(count, GFP_KERNEL | __GFP_NOWARN)?,
        };
        let mut orders = ORDERS.as_slice();
        while this.pages.len() < count {
            let left = count - this.pages.len();
            let (&order, smaller) = orders.split_first().ok_or(ENOMEM)?;
            if 1 << order > left {
                orders = smaller;
                continue;
            }
            let gfp = if order == 0 { SINGLE } else { LARGE };
            // SAFETY: A plain allocation by a task that may sleep.
            let first = unsafe { ffi::peerbuf_alloc_pages(gfp, order) };
            if first.is_null() {
                orders = smaller;
                continue;
            }
            if order > 0 {
                // SAFETY: The block was just allocated, is not compound, and nobody else has it.
                unsafe { bindings::split_page(first, order) };
            }
            // INVARIANT: After the split each page has a count of one, which is ours.
            for i in 0..1 << order {
                // Cannot fail: there is room for `count`.
                let _ = this.pages.push_within_capacity(first.wrapping_add(i));
            }
        }
        Ok(Arc::new(this, GFP_KERNEL)?)
    }

    /// The pages in order.
    pub(crate) fn pages(&self) -> &[*mut bindings::page] {
        &self.pages
    }
}

impl Drop for System {
    fn drop(&mut self) {
        for &page in &self.pages {
            // SAFETY: By the type invariant the reference is ours. Direct I/O that outlives the
            // buffer has its own, and frees the page when it is done.
            unsafe { bindings::__free_pages(page, 0) };
        }
    }
}

/// Where the kernel sees a page of [`System`] memory.
pub(crate) fn address(page: *mut bindings::page) -> *mut c_void {
    // SAFETY: The page is valid and not in high memory.
    unsafe { ffi::peerbuf_page_address(page) }
}

/// How many of `pages` have a count above `base`: a page table entry or I/O uses them.
pub(crate) fn busy(pages: &[*mut bindings::page]) -> usize {
    let used = |page: &&*mut bindings::page| {
        // SAFETY: The callers' pages are valid.
        unsafe { ffi::peerbuf_page_ref_count(ptr::from_ref(&***page)) > 1 }
    };
    pages.iter().filter(used).count()
}
