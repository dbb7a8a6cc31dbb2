// SPDX-License-Identifier: GPL-2.0

//! The struct pages of a BAR. With them, direct I/O on a CPU mapping of the BAR is peer-to-peer DMA.
//!
//! The P2PDMA core makes the pages (`pci_p2pdma_add_resource`) and puts them into a pool. A page returns to
//! the pool when its reference count reaches zero, one page at a time; but exports need exact offsets. So
//! [`Pages`] allocates the whole pool once and gives each page a *base count* of one; [`crate::region`]
//! allocates ranges of it. A count above the base means that a page table entry or an I/O request uses the
//! page, which is how a waiter knows that the pages are idle. Before the device goes away, `WholePool` sets
//! the counts to zero and frees the pool in one piece: otherwise `devm_memunmap_pages` would wait forever.

use kernel::{
    bindings, device::Core, devres, error::to_result, ffi::*, page::PAGE_SIZE, pci, prelude::*,
};

use crate::{common, ffi};

/// The struct pages of one BAR.
///
/// # Invariants
///
/// From [`Pages::publish`] until the devres of the device is released, the frames `first..first + count` have
/// struct pages, each with a count of one or more, and are mapped in the kernel at `kaddr`, not cached. For a
/// provider's BAR (`provider.rs`) the same holds only for this module's chunks, each as long as it exists.
#[derive(Clone, Copy)]
pub(crate) struct Pages {
    kaddr: *mut c_void,
    first: usize,
    count: usize,
}

impl Pages {
    /// Whether a BAR of `len` bytes at physical address `start` can have struct pages. The kernel makes them
    /// only for aligned sections, and warns about anything smaller.
    pub(crate) fn possible(start: u64, len: u64) -> bool {
        // SAFETY: The call only returns a number.
        let align = unsafe { ffi::memremap_compat_align() } as u64;
        len != 0 && start % align == 0 && len % align == 0
    }

    /// Makes struct pages for all of `bar`, `len` bytes at `start`.
    ///
    /// Returns `None` if the kernel put the pages into its pool and this function could not allocate them
    /// from there. Other drivers may then allocate them, so the BAR must not be exported.
    ///
    /// Errors: those of `pci_p2pdma_add_resource` (ENOMEM, EINVAL, EOPNOTSUPP).
    ///
    /// # Safety
    ///
    /// `pdev` is being probed, [`Pages::possible`] holds for its memory BAR `bar`, and the function is called
    /// once per BAR. No page is in use any more when the devres of `pdev` is released.
    pub(crate) unsafe fn publish(
        pdev: &pci::Device<Core<'_>>,
        bar: u32,
        start: u64,
        len: u64,
    ) -> Result<Option<Self>> {
        let raw = common::raw(pdev);
        // SAFETY: `pdev` is being probed, by the caller's promise; size 0 means the whole BAR.
        to_result(unsafe { bindings::pci_p2pdma_add_resource(raw, bar as c_int, 0, 0) })?;
        // The pool has one chunk per BAR, and each is allocated as soon as it is added. So a request of this
        // size can only be met from this BAR's chunk.
        // SAFETY: `pdev` is being probed, and the call above made the pool.
        let kaddr = unsafe { bindings::pci_alloc_p2pmem(raw, len as usize) };
        if kaddr.is_null() {
            return Ok(None);
        }
        // INVARIANT: The pool gave the whole chunk, so no one else has any of its pages. `set_counts` gives
        // each page its base count; `WholePool` resets the counts when devres is released.
        let this = Self {
            kaddr,
            first: start as usize / PAGE_SIZE,
            count: len as usize / PAGE_SIZE,
        };
        this.set_counts(1);
        // On an error `devres::register` drops the chunk, which returns it to the pool at once. Devres is
        // released last in, first out: the chunk returns before the P2PDMA core unmaps the pages.
        let chunk = WholePool {
            pdev: raw,
            pages: this,
        };
        let registered = devres::register(pdev.as_ref(), chunk, GFP_KERNEL);
        Ok(registered.is_ok().then_some(this))
    }

    /// The pages of a BAR, or of part of it, that another driver has made and published.
    pub(crate) fn of_provider(kaddr: *mut c_void, start: u64, len: u64) -> Self {
        // INVARIANT: Callers ask only for pages in their chunks of the provider's pool.
        Self {
            kaddr,
            first: start as usize / PAGE_SIZE,
            count: len as usize / PAGE_SIZE,
        }
    }

    /// The `index`th page of the BAR.
    pub(crate) fn page(&self, index: usize) -> Result<*mut bindings::page> {
        if index >= self.count {
            return Err(EINVAL);
        }
        // SAFETY: By the type invariant the frame has a struct page.
        Ok(unsafe { ffi::peerbuf_pfn_to_page((self.first + index) as c_ulong) })
    }

    /// The kernel virtual address of the BAR.
    pub(crate) fn kernel_address(&self) -> *mut c_void {
        self.kaddr
    }

    /// The number of pages in the range with a count above the base: those that a page table entry or an I/O
    /// request uses.
    pub(crate) fn busy(&self, offset: u64, len: u64) -> usize {
        let first = offset as usize / PAGE_SIZE;
        (first..first + len as usize / PAGE_SIZE)
            .filter_map(|i| self.page(i).ok())
            // SAFETY: By the type invariant the struct page is valid.
            .filter(|&page| unsafe { ffi::peerbuf_page_count(page) } > 1)
            .count()
    }

    fn set_counts(&self, count: c_int) {
        for page in (0..self.count).filter_map(|i| self.page(i).ok()) {
            // SAFETY: No one else has a reference to the page: the callers are `publish`, before the first
            // reference, and `WholePool::drop`, after the last.
            unsafe { ffi::peerbuf_set_page_count(page, count) };
        }
    }
}

/// The chunk allocated from the pool. Dropping it returns the chunk.
struct WholePool {
    pdev: *mut bindings::pci_dev,
    pages: Pages,
}

// SAFETY: The pointers are not tied to a thread.
unsafe impl Send for WholePool {}

impl Drop for WholePool {
    fn drop(&mut self) {
        self.pages.set_counts(0);
        let len = self.pages.count * PAGE_SIZE;
        // SAFETY: The chunk is returned as it was allocated. The device is still bound: devres owns the
        // chunk.
        unsafe { bindings::pci_free_p2pmem(self.pdev, self.pages.kaddr, len) };
    }
}
