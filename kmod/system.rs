// SPDX-License-Identifier: GPL-2.0

//! System pages, for buffers that are at least partly in system memory.

use core::ptr;

use kernel::{bindings, ffi::*, page::PAGE_SIZE, prelude::*, sync::Arc};

use crate::ffi;

const fn bit(number: u32) -> bindings::gfp_t {
    1 << number
}

/// Charged to the calling task's memory cgroup. A request that cannot be met fails with ENOMEM: it invokes no
/// OOM killer and logs nothing.
const SINGLE: bindings::gfp_t =
    bindings::GFP_KERNEL_ACCOUNT | bindings::__GFP_NOWARN | bit(bindings::___GFP_RETRY_MAYFAIL_BIT);

/// Flags for a block of pages (a folio): as [`SINGLE`], but without retries.
const LARGE: bindings::gfp_t = (SINGLE & !bit(bindings::___GFP_RETRY_MAYFAIL_BIT))
    | bit(bindings::___GFP_NORETRY_BIT)
    | bit(bindings::___GFP_COMP_BIT);

/// Initial contents of the pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contents {
    Zeroes,
    /// The pages' old contents. The caller overwrites every byte before anyone else can read it.
    Old,
}

/// The orders tried, largest first. Large blocks keep scatter lists short, and are quick to allocate and
/// free.
const ORDERS: [u32; 3] = [9, 4, 0];

/// Pages of system memory.
///
/// # Invariants
///
/// The entries are pages, in order, in blocks of one of the [`ORDERS`], not in high memory. This object owns
/// one reference to each block. A reference count above one means that a page table entry or an I/O request
/// uses a page of the block: the kernel counts references per block.
pub(crate) struct System {
    pages: KVVec<*mut bindings::page>,
}

// SAFETY: Pages are not tied to a thread.
unsafe impl Send for System {}
// SAFETY: The list does not change after construction.
unsafe impl Sync for System {}

impl System {
    /// Allocates `len` bytes, a multiple of the page size. A large allocation takes long; the loop
    /// reschedules.
    ///
    /// Errors: ENOMEM; EINTR if the task is being killed (userspace never sees it).
    pub(crate) fn alloc(len: u64, contents: Contents) -> Result<Arc<Self>> {
        let zero = match contents {
            Contents::Zeroes => bindings::__GFP_ZERO,
            Contents::Old => 0,
        };
        let count = usize::try_from(len).map_err(|_| ENOMEM)? / PAGE_SIZE;
        // More than all memory is refused before the list of pages is allocated: that list alone could use up
        // memory.
        // SAFETY: The call only reads a number.
        if count > unsafe { ffi::peerbuf_totalram_pages() } {
            return Err(ENOMEM);
        }
        // Dropped on an error, with the pages allocated so far.
        let mut this = Self {
            pages: KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?,
        };
        let mut orders = ORDERS.as_slice();
        while this.pages.len() < count {
            // SAFETY: Allocating sleeps, so every caller may sleep.
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
            // SAFETY: The calling task may sleep, and the flags are valid.
            let first = unsafe { ffi::peerbuf_alloc_pages(gfp | zero, order) };
            if first.is_null() {
                orders = smaller;
                continue;
            }
            // INVARIANT: The new block has a reference count of one, which this object owns.
            for i in 0..1 << order {
                // Cannot fail: the list has capacity for `count` pages.
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
            // SAFETY: By the type invariant a block begins here and this object owns a reference to it.
            // Direct I/O that outlives the buffer has its own reference, and frees the block when it ends.
            unsafe {
                let order = ffi::peerbuf_page_order(first);
                bindings::__free_pages(first, order);
                at += 1 << order;
            }
        }
    }
}

/// The kernel virtual address of a page of [`System`] memory.
pub(crate) fn address(page: *mut bindings::page) -> *mut c_void {
    // SAFETY: The page is valid and not in high memory.
    unsafe { ffi::peerbuf_page_address(page) }
}

/// The number of bytes in a page's block before and after the page.
pub(crate) fn beside(page: *mut bindings::page) -> (u64, u64) {
    // SAFETY: The callers' pages are valid and referenced, so their blocks stay allocated.
    let (first, order) = unsafe {
        let first = ffi::peerbuf_page_head(page);
        (first, ffi::peerbuf_page_order(first))
    };
    let before = (page.addr() - first.addr()) / size_of::<bindings::page>();
    let after = (1 << order) - before - 1;
    ((before * PAGE_SIZE) as u64, (after * PAGE_SIZE) as u64)
}

/// The number of `pages` that a page table entry or an I/O request may use: all pages of the blocks in use.
pub(crate) fn busy(pages: &[*mut bindings::page]) -> usize {
    let used = |page: &&*mut bindings::page| {
        // SAFETY: The callers' pages are valid.
        unsafe { ffi::peerbuf_page_count(ptr::from_ref(&***page)) > 1 }
    };
    pages.iter().filter(used).count()
}

/// Whether a device may be accessing one of `pages`. Direct I/O, io_uring buffers and RDMA registrations pin
/// their pages (`FOLL_PIN`); a user such as a pipe only takes a reference.
pub(crate) fn any_pinned(pages: &[*mut bindings::page]) -> bool {
    // SAFETY: The callers' pages are valid.
    let pinned = |&page: &*mut bindings::page| unsafe { ffi::peerbuf_page_maybe_dma_pinned(page) };
    pages.iter().any(pinned)
}
