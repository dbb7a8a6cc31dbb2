// SPDX-License-Identifier: GPL-2.0

//! System memory for buffers that are not, or not wholly, in a BAR.

use core::ptr;

use kernel::{bindings, ffi::*, page::PAGE_SIZE, prelude::*, sync::Arc};

use crate::ffi;

const fn bit(number: u32) -> bindings::gfp_t {
    1 << number
}

/// On the account of whoever asks. A request that cannot be met fails (ENOMEM): it calls no OOM
/// killer, and says nothing in the log.
const SINGLE: bindings::gfp_t =
    bindings::GFP_KERNEL_ACCOUNT | bindings::__GFP_NOWARN | bit(bindings::___GFP_RETRY_MAYFAIL_BIT);

/// As [`SINGLE`], but only if it is to be had at once, and as one block (a folio).
const LARGE: bindings::gfp_t = (SINGLE & !bit(bindings::___GFP_RETRY_MAYFAIL_BIT))
    | bit(bindings::___GFP_NORETRY_BIT)
    | bit(bindings::___GFP_COMP_BIT);

/// What the pages hold at first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contents {
    Zeroes,
    /// What they held before, so every byte is to be written before anybody else sees them.
    Old,
}

/// The orders that are tried, so that scatter lists are short where memory is not fragmented, and
/// taking and freeing is quick.
const ORDERS: [u32; 3] = [9, 4, 0];

/// Pages of system memory.
///
/// # Invariants
///
/// The entries are the pages, in order, of blocks of one of the [`ORDERS`], not in high memory. This
/// object has one reference to each block. A count above one means that a page table entry or an I/O
/// request uses a page of the block: the kernel counts a block's references as one.
pub(crate) struct System {
    pages: KVVec<*mut bindings::page>,
}

// SAFETY: Pages are not tied to a thread.
unsafe impl Send for System {}
// SAFETY: The list does not change once it is made.
unsafe impl Sync for System {}

impl System {
    /// Takes `len` bytes, a multiple of the page size. It may take long and lets others run.
    ///
    /// Errors: ENOMEM; EINTR where the task is being killed, which nobody sees but the task's end.
    pub(crate) fn alloc(len: u64, contents: Contents) -> Result<Arc<Self>> {
        let zero = match contents {
            Contents::Zeroes => bindings::__GFP_ZERO,
            Contents::Old => 0,
        };
        let count = usize::try_from(len).map_err(|_| ENOMEM)? / PAGE_SIZE;
        // What cannot be had is refused before the list of it, which alone might take all there is.
        // SAFETY: It only returns a number.
        if count > unsafe { ffi::peerbuf_totalram_pages() } {
            return Err(ENOMEM);
        }
        // Dropped on an error, with what it has by then.
        let mut this = Self {
            pages: KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?,
        };
        let mut orders = ORDERS.as_slice();
        while this.pages.len() < count {
            // SAFETY: The callers may sleep: the allocations do.
            unsafe { ffi::peerbuf_cond_resched() };
            if ffi::fatal_signal_pending() {
                return Err(EINTR);
            }
            let left = count - this.pages.len();
            let (&order, smaller) = orders.split_first().ok_or(ENOMEM)?;
            if 1 << order > left {
                orders = smaller;
                continue;
            }
            let gfp = if order == 0 { SINGLE } else { LARGE };
            // SAFETY: A plain allocation by a task that may sleep.
            let first = unsafe { ffi::peerbuf_alloc_pages(gfp | zero, order) };
            if first.is_null() {
                orders = smaller;
                continue;
            }
            // INVARIANT: The block has a count of one, which is ours.
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
        let mut at = 0;
        while let Some(&first) = self.pages.get(at) {
            // SAFETY: By the type invariant a block begins here, and the reference is ours. Direct
            // I/O that outlives the buffer has its own, and frees the block when it is done.
            unsafe {
                let order = ffi::peerbuf_page_order(first);
                bindings::__free_pages(first, order);
                at += 1 << order;
            }
        }
    }
}

/// Where the kernel sees a page of [`System`] memory.
pub(crate) fn address(page: *mut bindings::page) -> *mut c_void {
    // SAFETY: The page is valid and not in high memory.
    unsafe { ffi::peerbuf_page_address(page) }
}

/// The bytes of a page's block before the page and after it.
pub(crate) fn beside(page: *mut bindings::page) -> (u64, u64) {
    // SAFETY: The callers' pages are valid, and ours, so their blocks stay.
    let (first, order) = unsafe {
        let first = ffi::peerbuf_page_head(page);
        (first, ffi::peerbuf_page_order(first))
    };
    let before = (page.addr() - first.addr()) / size_of::<bindings::page>();
    let after = (1 << order) - before - 1;
    ((before * PAGE_SIZE) as u64, (after * PAGE_SIZE) as u64)
}

/// How many of `pages` a page table entry or I/O may use: those of blocks that are in use.
pub(crate) fn busy(pages: &[*mut bindings::page]) -> usize {
    let used = |page: &&*mut bindings::page| {
        // SAFETY: The callers' pages are valid.
        unsafe { ffi::peerbuf_page_count(ptr::from_ref(&***page)) > 1 }
    };
    pages.iter().filter(used).count()
}

/// Whether a device may be at work on one of `pages`: direct I/O, a registration of io_uring or of an RDMA
/// card pin them (`FOLL_PIN`). Others have a reference at most, such as a pipe.
pub(crate) fn any_pinned(pages: &[*mut bindings::page]) -> bool {
    // SAFETY: The callers' pages are valid.
    let pinned = |&page: &*mut bindings::page| unsafe { ffi::peerbuf_page_maybe_dma_pinned(page) };
    pages.iter().any(pinned)
}
