// SPDX-License-Identifier: GPL-2.0

//! A cache of the devices that have a peer-to-peer route to a BAR.
//!
//! The query (`pci_p2pdma_distance_many`) walks the bridges and reads their configuration space, which takes
//! four times as long as the rest of an attach. So a device with a route is cached, by its address. Three
//! events could make an entry wrong:
//!
//! - Another device gets the same address. The old device was removed before that; the driver core announces
//!   the removal, which clears the cache. An importer keeps its device until after that, so no removed device
//!   enters the cache again.
//! - A bridge on the route is replaced. Everything below the bridge is removed before that.
//! - A process changes the bridges' redirection (ACS) with `setpci`. The kernel would not notice either: it
//!   maps by a cache of its own (`p2pdma->map_types`). Rebinding the importer's driver makes both ask again.
//!
//! The absence of a route is not cached: refusals need not be fast.

use core::ptr;

use kernel::{
    bindings, pci,
    sync::atomic::{Atomic, Relaxed},
};

use crate::common;

/// The devices that are known to reach one BAR.
pub(crate) struct Peers {
    /// The index for the next entry.
    next: Atomic<i32>,
    known: [Atomic<*mut bindings::device>; 8],
}

impl Peers {
    pub(crate) const fn new() -> Self {
        Self {
            next: Atomic::new(0),
            known: [const { Atomic::new(ptr::null_mut()) }; 8],
        }
    }

    /// Clears the cache: a PCI device has lost its driver, or was removed.
    pub(crate) fn forget(&self) {
        for known in &self.known {
            known.store(ptr::null_mut(), Relaxed);
        }
    }

    /// Whether `importer` is in the cache.
    pub(crate) fn know(&self, importer: *mut bindings::device) -> bool {
        self.known
            .iter()
            .any(|known| known.load(Relaxed) == importer)
    }

    /// Adds `importer`, which its caller keeps until after its driver is unbound.
    pub(crate) fn remember(&self, importer: *mut bindings::device) {
        if !self.know(importer) {
            let next = self.next.fetch_add(1, Relaxed) as usize % self.known.len();
            self.known[next].store(importer, Relaxed);
        }
    }
}

/// Asks the kernel whether the bridges let DMA of `importer` through to `provider`. The answer also replaces
/// that in the kernel's cache, by which it maps.
///
/// # Safety
///
/// The caller keeps `importer`.
pub(crate) unsafe fn has_route(
    mut importer: *mut bindings::device,
    provider: &pci::Device,
) -> bool {
    // SAFETY: Both devices are kept. The array has one entry.
    let distance = unsafe {
        bindings::pci_p2pdma_distance_many(common::raw(provider), &mut importer, 1, false)
    };
    distance >= 0
}
