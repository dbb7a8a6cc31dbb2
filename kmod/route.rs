// SPDX-License-Identifier: GPL-2.0

//! Where the DMA addresses that an importer was given lead, and by which route.
//!
//! The kernel tells an importer addresses and nothing else: whether one is peer memory, and whether
//! it is a bus address, is known to the function that mapped it (`pci_p2pdma_map_type`, which is not
//! exported). Only mappings of struct pages are marked (`sg_dma_is_bus_address`). So the addresses
//! are followed:
//!
//! - behind a translating IOMMU, to what the device's domain has at that address. Where it has
//!   something, that is a mapping through the host bridge. Where it has nothing, it is a bus address,
//!   which a switch routes before any IOMMU sees it (the IOVA allocator keeps clear of the host
//!   bridge's windows, so that no address is both);
//! - otherwise DMA addresses are physical ones, and a BAR's bus address and its physical address
//!   are the same on most machines. Then the kernel's rule is applied once more: a bus address if
//!   the two devices have a bridge in common and no bridge on the way redirects requests to the
//!   host bridge (ACS).

use core::ptr;

use kernel::{bindings, ffi::*, page::PAGE_SIZE};

use crate::ffi;

/// The bytes of a mapping, by route.
#[derive(Clone, Copy, Default)]
pub(crate) struct Report {
    pub(crate) segments: u32,
    pub(crate) system: u64,
    pub(crate) bus: u64,
    pub(crate) bridge: u64,
    pub(crate) other: u64,
    /// The provider of the first peer segment, as in `abi::Query`.
    pub(crate) provider: [u8; 16],
}

impl Report {
    /// Looks at what `pdev` was given.
    ///
    /// # Safety
    ///
    /// `pdev` is valid and bound to a driver that does DMA through the kernel, so that its IOMMU
    /// domain stays; `sgt` is a mapping of it that stays.
    pub(crate) unsafe fn of(pdev: *mut bindings::pci_dev, sgt: *const bindings::sg_table) -> Self {
        let mut report = Self::default();
        let mut known = Known::default();
        // SAFETY: By the caller's promise. The same for what follows.
        let (mut sg, count) = unsafe { ((*sgt).sgl, (*sgt).nents) };
        for _ in 0..count {
            if sg.is_null() {
                break;
            }
            // SAFETY: As above.
            let (address, len, marked) = unsafe {
                (
                    bindings::sg_dma_address(sg),
                    u64::from(bindings::sg_dma_len(sg)),
                    is_marked(sg),
                )
            };
            // SAFETY: As above.
            let route = unsafe { known.route(pdev, address, marked) };
            report.segments += 1;
            match route {
                Route::System => report.system += len,
                Route::Other => report.other += len,
                Route::Bus => report.bus += len,
                Route::Bridge => report.bridge += len,
            }
            // SAFETY: As above.
            sg = unsafe { bindings::sg_next(sg) };
        }
        report.provider = known.first;
        report
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.system + self.bus + self.bridge + self.other
    }
}

/// `sg_dma_is_bus_address`: set only where the exporter maps struct pages.
///
/// # Safety
///
/// `sg` is valid.
unsafe fn is_marked(sg: *const bindings::scatterlist) -> bool {
    // SAFETY: By the caller's promise.
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
    /// The addresses are those of the bus, not the processor's.
    on_bus: bool,
    below_bridge: bool,
}

/// What was found so far: neighbouring segments mostly lie in the same BAR.
#[derive(Default)]
struct Known {
    last: Window,
    first: [u8; 16],
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
        // SAFETY: By the caller's promise: `pdev` has a driver, and so a domain that stays.
        let (physical, translated) = unsafe {
            let dev = &raw mut (*pdev).dev;
            let domain = bindings::iommu_get_domain_for_dev(dev);
            if domain.is_null() {
                (ffi::peerbuf_dma_to_phys(dev, address), false)
            } else {
                // An identity domain answers with the address itself.
                let physical = bindings::iommu_iova_to_phys(domain, address);
                (physical, physical != 0 && physical != address)
            }
        };
        if physical == 0 || marked {
            // SAFETY: As above.
            return match unsafe { self.window(pdev, address, true) } {
                Some(_) => Route::Bus,
                None => Route::Other,
            };
        }
        // SAFETY: It only looks the frame up.
        if unsafe { bindings::page_is_ram((physical / PAGE_SIZE as u64) as c_ulong) } != 0 {
            return Route::System;
        }
        // SAFETY: As above.
        match unsafe { self.window(pdev, physical, false) } {
            Some(window) if !translated && window.below_bridge => Route::Bus,
            Some(_) => Route::Bridge,
            None => Route::Other,
        }
    }

    /// The BAR that an address lies in.
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
            // SAFETY: Walks the list of PCI devices; takes a reference to each and gives back that
            // to the one before.
            provider = unsafe { bindings::pci_get_device(c_uint::MAX, c_uint::MAX, provider) };
            if provider.is_null() {
                return None;
            }
            for bar in 0..bindings::PCI_STD_NUM_BARS as c_int {
                // SAFETY: The device is valid and this is the index of a standard BAR.
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
                    // SAFETY: Both are valid.
                    below_bridge: unsafe { below_bridge(provider, client) },
                };
                if self.first[0] == 0 {
                    // SAFETY: The device is valid.
                    self.first =
                        name(unsafe { kernel::device::Device::from_raw(&raw mut (*provider).dev) });
                }
                // SAFETY: The walk ends here, so its reference is given back.
                unsafe { bindings::pci_dev_put(provider) };
                return Some(self.last);
            }
        }
    }
}

/// A device's address, NUL-padded; the last byte stays NUL, and no PCI address is that long.
fn name(dev: &kernel::device::Device) -> [u8; 16] {
    let mut text = [0; 16];
    for (to, &from) in text[..15].iter_mut().zip(dev.name().to_bytes()) {
        *to = from;
    }
    text
}

/// Whether a switch routes requests of `client` to `provider`: they have a bridge in common, or are
/// one device, and none on the way redirects requests upstream. The kernel's rule, with the bridge
/// in common counted among those on the provider's side.
///
/// # Safety
///
/// Both are valid. A device keeps the bridges above it.
unsafe fn below_bridge(provider: *mut bindings::pci_dev, client: *mut bindings::pci_dev) -> bool {
    let mut redirected = false;
    let mut common = provider;
    while !common.is_null() {
        // SAFETY: By the caller's promise. The same for what follows.
        redirected |= unsafe { redirects(common) };
        let mut below = false;
        let mut other = client;
        while !other.is_null() {
            if other == common {
                return !redirected && !below;
            }
            // SAFETY: As above.
            unsafe {
                below |= redirects(other);
                other = ffi::peerbuf_pci_upstream_bridge(other);
            }
        }
        // SAFETY: As above.
        common = unsafe { ffi::peerbuf_pci_upstream_bridge(common) };
    }
    false
}

/// Whether a bridge redirects its devices' requests to each other upstream (ACS).
///
/// # Safety
///
/// `dev` is valid.
unsafe fn redirects(dev: *mut bindings::pci_dev) -> bool {
    const REDIRECT: u32 = bindings::PCI_ACS_RR | bindings::PCI_ACS_CR | bindings::PCI_ACS_EC;
    let mut control = 0;
    // SAFETY: By the caller's promise.
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
