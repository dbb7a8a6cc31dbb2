// SPDX-License-Identifier: GPL-2.0

//! Classifies the DMA addresses of a mapping: system memory, or peer memory by one of two routes.
//!
//! The kernel gives an importer only addresses. Whether an address is peer memory, and whether it is a bus
//! address, is known only to the function that mapped it (`pci_p2pdma_map_type`, which is not exported); only
//! mappings of struct pages carry a mark (`sg_dma_is_bus_address`). So this module follows the addresses:
//!
//! - Behind a translating IOMMU it looks the address up in the device's domain. If the domain maps it, the
//!   route is through the host bridge. If not, it is a bus address, which a switch routes before an IOMMU
//!   sees it. (No address is both: the IOVA allocator avoids the host bridge's windows.)
//! - Otherwise DMA addresses are physical addresses, and a BAR's bus address equals its physical address on
//!   most machines. So this module applies the kernel's rule: it is a bus address if the two devices have a
//!   bridge in common and no bridge on the way redirects requests to the host bridge (ACS).

use core::ptr;

use kernel::{bindings, ffi::*, page::PAGE_SIZE};

use crate::{abi, ffi};

/// The bytes of a mapping by route.
#[derive(Clone, Copy, Default)]
pub(crate) struct Report {
    pub(crate) segments: u64,
    pub(crate) system: u64,
    pub(crate) bus: u64,
    pub(crate) bridge: u64,
    pub(crate) other: u64,
    /// The provider of the first peer segment, as in `abi::Query`.
    pub(crate) provider: u64,
}

impl Report {
    /// Classifies a mapping of `pdev`.
    ///
    /// # Safety
    ///
    /// `pdev` is valid and bound to a driver that does DMA through the kernel, so its IOMMU domain stays.
    /// `sgt` is a mapping for `pdev`, and stays.
    pub(crate) unsafe fn of(pdev: *mut bindings::pci_dev, sgt: *const bindings::sg_table) -> Self {
        let mut report = Self::default();
        let mut known = Known::default();
        // SAFETY: The mapping is valid, by the caller's promise.
        let (mut sg, count) = unsafe { ((*sgt).sgl, (*sgt).nents) };
        for _ in 0..count {
            if sg.is_null() {
                break;
            }
            // SAFETY: `sg` is an entry of the mapping.
            let (address, len, marked) = unsafe {
                (
                    bindings::sg_dma_address(sg),
                    u64::from(bindings::sg_dma_len(sg)),
                    is_marked(sg),
                )
            };
            // SAFETY: By the caller's promise, which is the same.
            let route = unsafe { known.route(pdev, address, marked) };
            report.segments += 1;
            match route {
                Route::System => report.system += len,
                Route::Other => report.other += len,
                Route::Bus => report.bus += len,
                Route::Bridge => report.bridge += len,
            }
            // SAFETY: `sg` is an entry of the mapping.
            sg = unsafe { bindings::sg_next(sg) };
        }
        report.provider = known.first.unwrap_or(abi::PROVIDER_NONE);
        report
    }

    /// The number of bytes in all.
    pub(crate) fn bytes(&self) -> u64 {
        self.system + self.bus + self.bridge + self.other
    }
}

/// `sg_dma_is_bus_address`; set only for mappings of struct pages.
///
/// # Safety
///
/// `sg` is valid.
unsafe fn is_marked(sg: *const bindings::scatterlist) -> bool {
    // SAFETY: `sg` is valid, by the caller's promise.
    unsafe { (*sg).dma_flags & bindings::SG_DMA_BUS_ADDRESS != 0 }
}

#[derive(Clone, Copy)]
enum Route {
    System,
    Bus,
    Bridge,
    Other,
}

/// A BAR, and whether requests to it stay below the host bridge.
#[derive(Clone, Copy, Default)]
struct Window {
    start: u64,
    len: u64,
    /// The addresses are bus addresses, not physical addresses.
    on_bus: bool,
    below_bridge: bool,
}

/// A cache of the last BAR (consecutive segments mostly lie in the same BAR) and the address of the first
/// provider.
#[derive(Default)]
struct Known {
    last: Window,
    first: Option<u64>,
}

impl Known {
    /// # Safety
    ///
    /// As for [`Report::of`].
    unsafe fn route(
        &mut self,
        pdev: *mut bindings::pci_dev,
        address: bindings::dma_addr_t,
        marked: bool,
    ) -> Route {
        // SAFETY: By the caller's promise `pdev` has a driver, and so a domain that stays.
        let (physical, translated) = unsafe {
            let dev = &raw mut (*pdev).dev;
            let domain = bindings::iommu_get_domain_for_dev(dev);
            if domain.is_null() {
                (ffi::peerbuf_dma_to_phys(dev, address), false)
            } else {
                // An identity domain returns the address itself.
                let physical = bindings::iommu_iova_to_phys(domain, address);
                (physical, physical != 0 && physical != address)
            }
        };
        if physical == 0 || marked {
            // SAFETY: `pdev` is valid, by the caller's promise.
            return match unsafe { self.window(pdev, address, true) } {
                Some(_) => Route::Bus,
                None => Route::Other,
            };
        }
        // SAFETY: A lookup that accepts any frame number.
        if unsafe { bindings::page_is_ram((physical / PAGE_SIZE as u64) as c_ulong) } != 0 {
            return Route::System;
        }
        // SAFETY: `pdev` is valid, by the caller's promise.
        match unsafe { self.window(pdev, physical, false) } {
            Some(window) if !translated && window.below_bridge => Route::Bus,
            Some(_) => Route::Bridge,
            None => Route::Other,
        }
    }

    /// The BAR that contains an address.
    ///
    /// # Safety
    ///
    /// `client` is valid.
    unsafe fn window(
        &mut self,
        client: *mut bindings::pci_dev,
        address: u64,
        on_bus: bool,
    ) -> Option<Window> {
        if self.last.on_bus == on_bus && address.wrapping_sub(self.last.start) < self.last.len {
            return Some(self.last);
        }
        let mut provider = ptr::null_mut();
        loop {
            // SAFETY: Walks the list of PCI devices. The call takes a reference to the next device and drops
            // that to the previous one.
            provider = unsafe { bindings::pci_get_device(c_uint::MAX, c_uint::MAX, provider) };
            if provider.is_null() {
                return None;
            }
            for bar in 0..bindings::PCI_STD_NUM_BARS as c_int {
                // SAFETY: The device is valid, and `bar` is the index of a standard BAR.
                let (start, len) = unsafe {
                    let start = if on_bus {
                        ffi::peerbuf_pci_bus_address(provider, bar)
                    } else {
                        bindings::pci_resource_start(provider, bar)
                    };
                    (start, bindings::pci_resource_len(provider, bar))
                };
                if address.wrapping_sub(start) >= len {
                    continue;
                }
                self.last = Window {
                    start,
                    len,
                    on_bus,
                    // SAFETY: Both devices are valid.
                    below_bridge: unsafe { below_bridge(provider, client) },
                };
                if self.first.is_none() {
                    // SAFETY: The device is valid.
                    self.first = Some(unsafe { ffi::peerbuf_pci_address(provider) });
                }
                // SAFETY: The walk ends here, so this drops its reference.
                unsafe { bindings::pci_dev_put(provider) };
                return Some(self.last);
            }
        }
    }
}

/// Whether a switch routes requests of `client` to `provider`: they have a bridge in common, or are one
/// device, and no bridge on the way redirects requests upstream. This is the kernel's rule; it counts the
/// common bridge on the provider's side.
///
/// # Safety
///
/// Both devices are valid. A device keeps the bridges above it.
unsafe fn below_bridge(provider: *mut bindings::pci_dev, client: *mut bindings::pci_dev) -> bool {
    let mut redirected = false;
    let mut common = provider;
    while !common.is_null() {
        // SAFETY: `common` is `provider` or a bridge above it.
        redirected |= unsafe { redirects(common) };
        let mut below = false;
        let mut other = client;
        while !other.is_null() {
            if other == common {
                return !redirected && !below;
            }
            // SAFETY: `other` is `client` or a bridge above it.
            unsafe {
                below |= redirects(other);
                other = ffi::peerbuf_pci_upstream_bridge(other);
            }
        }
        // SAFETY: `common` is `provider` or a bridge above it.
        common = unsafe { ffi::peerbuf_pci_upstream_bridge(common) };
    }
    false
}

/// Whether a bridge redirects peer-to-peer requests upstream (ACS).
///
/// # Safety
///
/// `dev` is valid.
unsafe fn redirects(dev: *mut bindings::pci_dev) -> bool {
    const REDIRECT: u32 = bindings::PCI_ACS_RR | bindings::PCI_ACS_CR | bindings::PCI_ACS_EC;
    let mut control = 0;
    // SAFETY: The device is valid, by the caller's promise.
    unsafe {
        let acs = c_int::from((*dev).acs_cap);
        acs != 0
            && bindings::pci_read_config_word(
                dev,
                acs + bindings::PCI_ACS_CTRL as c_int,
                &mut control,
            ) == 0
            && u32::from(control) & REDIRECT != 0
    }
}
