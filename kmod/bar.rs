// SPDX-License-Identifier: GPL-2.0

//! One BAR: its address, its kind, its struct pages and its P2PDMA provider.

use core::ptr;

use kernel::{bindings, device::Core, ffi::*, page::PAGE_SIZE, pci, prelude::*};

use crate::{abi, common::raw, ffi, pages::Pages, pool::Chunk, region::Regions};

/// One BAR, as found in probe.
#[derive(Clone, Copy)]
pub(crate) struct Bar {
    /// Physical address, as the CPU sees it.
    pub(crate) start: u64,
    /// Bytes; zero if the device has no such BAR.
    pub(crate) size: u64,
    /// Bytes that this module allocates; zero if another driver's pool does.
    pub(crate) own: u64,
    /// `abi::BAR_*`.
    pub(crate) flags: u32,
    /// Null if the BAR cannot be exported. Valid while the device is bound.
    pub(crate) provider: *mut bindings::p2pdma_provider,
    /// Present if CPU mappings have struct pages.
    pub(crate) pages: Option<Pages>,
    /// The kernel's mapping of the whole BAR, for copies: uncached or write-combining. Null if the BAR cannot be
    /// exported. Valid while the device is bound.
    kernel: *mut c_void,
}

impl Bar {
    pub(crate) const ABSENT: Self = Self {
        start: 0,
        size: 0,
        own: 0,
        flags: 0,
        provider: ptr::null_mut(),
        pages: None,
        kernel: ptr::null_mut(),
    };

    /// Reads the address and the kind of BAR `bar`.
    ///
    /// # Safety
    ///
    /// `pdev` is valid, and `bar` is below `NUM_BARS`.
    pub(crate) unsafe fn describe(pdev: *mut bindings::pci_dev, bar: c_int) -> Self {
        // SAFETY: `pdev` is valid and `bar` is an index of a BAR, by the caller's promise.
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

    /// Makes a provider's BAR exportable. `chunk` is a chunk of the provider's pool.
    ///
    /// # Safety
    ///
    /// `pdev` is the provider, its driver is bound, and the chunk lies in its BAR `bar`, which is this one.
    pub(crate) unsafe fn of_provider(
        mut self,
        pdev: *mut bindings::pci_dev,
        bar: c_int,
        chunk: &Chunk,
    ) -> Self {
        let (paddr, kaddr) = chunk.place();
        // The kernel has the pages in its linear mapping, so the virtual address has one offset for the whole
        // BAR.
        self.kernel = kaddr.wrapping_byte_sub((paddr - self.start) as usize);
        self.pages = Some(Pages::of_provider(self.kernel, self.start, self.size));
        // SAFETY: The driver is bound, by the caller's promise. A device with a pool has a provider per
        // memory BAR.
        self.provider = unsafe { bindings::pcim_p2pdma_provider(pdev, bar) };
        self.flags |= abi::BAR_EXPORT | abi::BAR_PAGES;
        self
    }

    /// Reads BAR `index`, and makes struct pages for it if the kernel can.
    ///
    /// # Safety
    ///
    /// Called from the probe of `dev`, after `pcim_p2pdma_init`, once for each index below `NUM_BARS`.
    /// `Device::remove` runs before the devres of `dev` is released, unless nothing was exported.
    pub(crate) unsafe fn probe(dev: &pci::Device<Core<'_>>, index: u32) -> Self {
        let pdev = raw(dev);
        let bar = index as c_int;
        // SAFETY: `pdev` is valid.
        let mut this = unsafe { Self::describe(pdev, bar) };
        let (start, size) = (this.start, this.size);
        this.own = size;
        let page = PAGE_SIZE as u64;
        if this.flags & abi::BAR_MEMORY == 0 || start % page != 0 || size % page != 0 {
            return this;
        }
        // SAFETY: `pdev` is valid, and `pcim_p2pdma_init` was called.
        this.provider = unsafe { bindings::pcim_p2pdma_provider(pdev, bar) };
        if this.provider.is_null() {
            return this;
        }
        this.flags |= abi::BAR_EXPORT;
        if Pages::possible(start, size) {
            // Before the pages, so that the kernel's own mapping, which is made with them, is of the same type: a
            // range has one type in the kernel's list.
            if this.flags & abi::BAR_PREFETCHABLE != 0 {
                // SAFETY: `dev` is being probed, by the caller's promise.
                this.flags |= unsafe { combines_writes(pdev, start, size) };
            }
            // SAFETY: `dev` is being probed, by the caller's promise, and `Pages::possible` was checked
            // above.
            match unsafe { Pages::publish(dev, index, start, size) } {
                Ok(Some(pages)) => {
                    this.kernel = pages.kernel_address();
                    this.pages = Some(pages);
                    this.flags |= abi::BAR_PAGES;
                }
                Ok(None) => {
                    pr_warn!(
                        "BAR {}: cannot allocate its P2PDMA pages; not exporting it\n",
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

    /// The kernel virtual address of `offset` in the BAR. EINVAL outside the BAR.
    pub(crate) fn kernel_address(&self, offset: u64) -> Result<*mut c_void> {
        if self.kernel.is_null() || offset >= self.size {
            return Err(EINVAL);
        }
        Ok(self.kernel.wrapping_byte_add(offset as usize))
    }

    /// Waits until every posted write of the CPU to the BAR has arrived: drains write-combining buffers, then
    /// reads at `offset`, because a PCIe read pushes the posted writes on its path ahead of it. Does nothing
    /// for a BAR that is not prefetchable, since a read could have side effects there. The device is bound.
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

    /// Frees the draining ranges whose direct I/O has ended.
    pub(crate) fn reap(&self, regions: &mut Regions) {
        regions.reap(|start, len| {
            self.pages
                .as_ref()
                .is_some_and(|pages| pages.busy(start, len) != 0)
        });
    }
}

/// Enters a range as write-combining into the kernel's list of memory types, until the devres of `pdev` is released.
/// Returns `abi::BAR_WRITE_COMBINING` if it is that now. Only x86 has the list.
///
/// # Safety
///
/// `pdev` is being probed.
unsafe fn combines_writes(pdev: *mut bindings::pci_dev, start: u64, size: u64) -> u32 {
    // SAFETY: `pdev` is being probed, by the caller's promise, so managed resources may be added.
    let entered = unsafe {
        bindings::devm_arch_io_reserve_memtype_wc(&raw mut (*pdev).dev, start, size) == 0
    };
    if cfg!(CONFIG_X86) && entered {
        abi::BAR_WRITE_COMBINING
    } else {
        0
    }
}
