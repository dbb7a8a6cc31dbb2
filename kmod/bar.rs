// SPDX-License-Identifier: GPL-2.0

//! One BAR: where it is, of which kind, and what the kernel has made of it for peers.

use core::ptr;

use kernel::{bindings, device::Core, ffi::*, page::PAGE_SIZE, pci, prelude::*};

use crate::{abi, common::raw, ffi, pages::Pages, pool::Chunk, region::Regions};

/// One BAR, as it was found at probe time.
#[derive(Clone, Copy)]
pub(crate) struct Bar {
    /// Physical address as the processor sees it.
    pub(crate) start: u64,
    /// Bytes; zero where there is no such BAR.
    pub(crate) size: u64,
    /// `abi::BAR_*`.
    pub(crate) flags: u32,
    /// Null where the BAR cannot be exported. Valid while the device is bound.
    pub(crate) provider: *mut bindings::p2pdma_provider,
    /// Present where CPU mappings have struct pages.
    pub(crate) pages: Option<Pages>,
    /// The kernel's uncached mapping of the whole BAR, for copies. Null where the BAR cannot be
    /// exported. Valid while the device is bound.
    kernel: *mut c_void,
}

impl Bar {
    pub(crate) const ABSENT: Self = Self {
        start: 0,
        size: 0,
        flags: 0,
        provider: ptr::null_mut(),
        pages: None,
        kernel: ptr::null_mut(),
    };

    /// Reads where BAR `bar` is, and of which kind.
    ///
    /// # Safety
    ///
    /// `pdev` is valid, and `bar` is below `NUM_BARS`.
    pub(crate) unsafe fn describe(pdev: *mut bindings::pci_dev, bar: c_int) -> Self {
        // SAFETY: By the caller's promise.
        let (resource, start, size) = unsafe {
            (
                ffi::peerbuf_pci_resource_flags(pdev, bar) as u32,
                bindings::pci_resource_start(pdev, bar),
                bindings::pci_resource_len(pdev, bar),
            )
        };
        if size == 0 {
            return Self::ABSENT;
        }
        let mut this = Self {
            start,
            size,
            ..Self::ABSENT
        };
        if resource & bindings::IORESOURCE_MEM == 0 || resource & bindings::IORESOURCE_UNSET != 0 {
            return this;
        }
        this.flags |= abi::BAR_MEMORY;
        if resource & bindings::IORESOURCE_PREFETCH != 0 {
            this.flags |= abi::BAR_PREFETCHABLE;
        }
        if resource & bindings::IORESOURCE_MEM_64 != 0 {
            this.flags |= abi::BAR_64BIT;
        }
        this
    }

    /// Adds what a provider's BAR needs to be exported. Its pool is somewhere in it, and `chunk` is
    /// part of that.
    ///
    /// # Safety
    ///
    /// `pdev` is the provider, whose driver is bound, and the chunk lies in its BAR `bar`, this one.
    pub(crate) unsafe fn of_provider(
        mut self,
        pdev: *mut bindings::pci_dev,
        bar: c_int,
        chunk: &Chunk,
    ) -> Self {
        let (paddr, kaddr) = chunk.place();
        // The kernel has the pages in its linear mapping, so one distance is right for all.
        self.kernel = kaddr.wrapping_byte_sub((paddr - self.start) as usize);
        self.pages = Some(Pages::of_provider(self.kernel, self.start, self.size));
        // SAFETY: By the caller's promise. A device with a pool has one for each memory BAR.
        self.provider = unsafe { bindings::pcim_p2pdma_provider(pdev, bar) };
        self.flags |= abi::BAR_EXPORT | abi::BAR_PAGES;
        self
    }

    /// Reads what BAR `index` is, and makes struct pages for it where the kernel can.
    ///
    /// # Safety
    ///
    /// Called from the probe of `dev`, after `pcim_p2pdma_init`, once for each index below
    /// `NUM_BARS`. `Device::remove` runs before the devres of `dev` is released, unless nothing
    /// was exported.
    pub(crate) unsafe fn probe(dev: &pci::Device<Core<'_>>, index: u32) -> Self {
        let pdev = raw(dev);
        let bar = index as c_int;
        // SAFETY: `pdev` is valid.
        let mut this = unsafe { Self::describe(pdev, bar) };
        let (start, size) = (this.start, this.size);
        let page = PAGE_SIZE as u64;
        if this.flags & abi::BAR_MEMORY == 0 || start % page != 0 || size % page != 0 {
            return this;
        }
        // SAFETY: As above, and `pcim_p2pdma_init` was called.
        this.provider = unsafe { bindings::pcim_p2pdma_provider(pdev, bar) };
        if this.provider.is_null() {
            return this;
        }
        this.flags |= abi::BAR_EXPORT;
        if Pages::possible(start, size) {
            // SAFETY: By the caller's promise and the check above.
            match unsafe { Pages::publish(dev, index, start, size) } {
                Ok(Some(pages)) => {
                    this.kernel = pages.kernel_address();
                    this.pages = Some(pages);
                    this.flags |= abi::BAR_PAGES;
                }
                Ok(None) => {
                    pr_warn!(
                        "BAR {}: its pages are not to be had: it is not exported\n",
                        index
                    );
                    this.flags &= !abi::BAR_EXPORT;
                    return this;
                }
                Err(e) => pr_warn!(
                    "BAR {}: no struct pages ({:?}): direct I/O on its mappings will be refused\n",
                    index,
                    e
                ),
            }
        }
        if this.pages.is_none() {
            // SAFETY: `pdev` is being probed and `bar` is one of its memory BARs.
            this.kernel = unsafe { bindings::pcim_iomap(pdev, bar, 0) };
            if this.kernel.is_null() {
                this.flags &= !abi::BAR_EXPORT;
            }
        }
        this
    }

    /// Where the kernel sees `offset` of the BAR. EINVAL outside it.
    pub(crate) fn kernel_address(&self, offset: u64) -> Result<*mut c_void> {
        if self.kernel.is_null() || offset >= self.size {
            return Err(EINVAL);
        }
        Ok(self.kernel.wrapping_byte_add(offset as usize))
    }

    /// Waits until every write to the BAR that the processor has posted has arrived, by draining
    /// write-combining buffers and reading back from `offset`: a PCIe read pushes posted writes on
    /// its path ahead of itself. Only where a read has no side effects, which a BAR says by being
    /// prefetchable. The device is bound.
    pub(crate) fn flush(&self, offset: u64) {
        if self.flags & abi::BAR_PREFETCHABLE == 0 {
            return;
        }
        if let Ok(address) = self.kernel_address(offset) {
            // SAFETY: The address lies in the kernel's mapping of the BAR.
            unsafe {
                ffi::peerbuf_wmb();
                address.cast::<u8>().read_volatile();
            }
        }
    }

    /// Frees the ranges that only waited for direct I/O which has ended by now.
    pub(crate) fn reap(&self, regions: &mut Regions) {
        regions.reap(|start, len| {
            self.pages
                .as_ref()
                .is_some_and(|pages| pages.busy(start, len) != 0)
        });
    }
}
