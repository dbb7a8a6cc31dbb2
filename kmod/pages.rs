// SPDX-License-Identifier: GPL-2.0

//! The struct pages of a BAR, which make direct I/O on its CPU mappings peer-to-peer DMA.
//!
//! The P2PDMA core makes the pages (`pci_p2pdma_add_resource`) and puts them in a pool of its
//! own, where a page whose count falls to zero returns by itself, one by one. Exports need exact
//! offsets instead, so [`Pages`] takes the whole pool once, gives each page a *base count* of one
//! and leaves sub-allocation to [`crate::region`]. A count above the base means that a page table
//! entry or an I/O request uses the page; that is how draining is known. Before the device goes
//! away the counts go back to zero and the chunk to the pool, as it was taken: without that,
//! `devm_memunmap_pages` would wait for ever.

use kernel::{
    bindings, device::Core, devres, error::to_result, ffi::*, page::PAGE_SIZE, pci, prelude::*,
};

use crate::{common, ffi};

/// The struct pages of one BAR.
///
/// # Invariants
///
/// From [`Pages::publish`] until the devres of the device is released, the frames
/// `first..first + count` have struct pages, each with a count of one or more, and are mapped
/// uncached in the kernel at `kaddr`. Of a BAR of which this module has only chunks, that is so for
/// the chunks, as long as there is one (`provider.rs`).
#[derive(Clone, Copy)]
pub(crate) struct Pages {
    kaddr: *mut c_void,
    first: usize,
    count: usize,
}

impl Pages {
    /// Whether a BAR at physical address `start` of `len` bytes can have struct pages: the kernel
    /// makes them for aligned sections only, and warns when asked for less.
    pub(crate) fn possible(start: u64, len: u64) -> bool {
        // SAFETY: It only returns a number.
        let align = unsafe { ffi::memremap_compat_align() } as u64;
        len != 0 && start % align == 0 && len % align == 0
    }

    /// Makes struct pages for the whole of `bar`, `len` bytes at `start`.
    ///
    /// Nothing where the kernel has made them and put them into its pool, and they could not be taken from
    /// there: others may take them, so the BAR is not ours to export.
    ///
    /// Errors: what `pci_p2pdma_add_resource` gives (ENOMEM, EINVAL, EOPNOTSUPP).
    ///
    /// # Safety
    ///
    /// `pdev` is being probed, [`Pages::possible`] holds for its memory BAR `bar`, and it is done
    /// once for a BAR. No page is used any more when the devres of `pdev` is released.
    pub(crate) unsafe fn publish(
        pdev: &pci::Device<Core<'_>>,
        bar: u32,
        start: u64,
        len: u64,
    ) -> Result<Option<Self>> {
        let raw = common::raw(pdev);
        // SAFETY: `pdev` is being probed, by the caller's promise; size 0 is the whole BAR.
        to_result(unsafe { bindings::pci_p2pdma_add_resource(raw, bar as c_int, 0, 0) })?;
        // The pool has one chunk per BAR and each is taken as soon as it is added, so a request
        // of this size can only come from this chunk.
        // SAFETY: As above; the pool exists since the call before.
        let kaddr = unsafe { bindings::pci_alloc_p2pmem(raw, len as usize) };
        if kaddr.is_null() {
            return Ok(None);
        }
        // INVARIANT: The pool gave the whole chunk, so nobody else has any of its pages; the
        // chunk gives each its base count, and takes it back when devres is released.
        let this = Self {
            kaddr,
            first: start as usize / PAGE_SIZE,
            count: len as usize / PAGE_SIZE,
        };
        this.set_counts(1);
        // On an error the chunk is dropped, and so goes back, at once. Devres is released last
        // in, first out: the chunk goes back before the P2PDMA core unmaps the pages.
        let chunk = WholePool {
            pdev: raw,
            pages: this,
        };
        let registered = devres::register(pdev.as_ref(), chunk, GFP_KERNEL);
        Ok(registered.is_ok().then_some(this))
    }

    /// Those of a BAR, or of part of it, that another driver has made and published.
    pub(crate) fn of_provider(kaddr: *mut c_void, start: u64, len: u64) -> Self {
        // INVARIANT: Nobody asks for a page that is not in a chunk of the provider's pool.
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

    /// Where the kernel sees the BAR.
    pub(crate) fn kernel_address(&self) -> *mut c_void {
        self.kaddr
    }

    /// How many pages of the range have a count above the base, which means that a page table
    /// entry or an I/O request uses them.
    pub(crate) fn busy(&self, offset: u64, len: u64) -> usize {
        let first = offset as usize / PAGE_SIZE;
        (first..first + len as usize / PAGE_SIZE)
            .filter_map(|i| self.page(i).ok())
            // SAFETY: By the type invariant it is a valid struct page.
            .filter(|&page| unsafe { ffi::peerbuf_page_count(page) } > 1)
            .count()
    }

    fn set_counts(&self, count: c_int) {
        for page in (0..self.count).filter_map(|i| self.page(i).ok()) {
            // SAFETY: Nobody else has a reference to the page: the callers are `publish`, before
            // anybody can, and the chunk's end, after the last.
            unsafe { ffi::peerbuf_set_page_count(page, count) };
        }
    }
}

/// The chunk that the pool gave; dropping it gives it back.
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
        // SAFETY: The chunk goes back as it was taken. The device is still bound: the chunk
        // belongs to its devres.
        unsafe { bindings::pci_free_p2pmem(self.pdev, self.pages.kaddr, len) };
    }
}
