// SPDX-License-Identifier: GPL-2.0

//! To which devices the kernel has found a route from a provider.
//!
//! The question (`pci_p2pdma_distance_many`) walks the bridges and reads their configuration: four
//! times what the rest of an attach costs. So where the answer was yes, the device is remembered, by
//! its address. What could make that wrong:
//!
//! - the address gets another device: then the old one was removed first, which the driver core
//!   says, and all is forgotten. Who attaches keeps his device until after that, so none that is
//!   gone is ever remembered anew;
//! - a bridge on the way is replaced: everything below it is removed first;
//! - somebody changes the bridges' redirection (ACS) with `setpci`. The kernel keeps its own verdict
//!   as well, by which it maps (`p2pdma->map_types`), and it would not notice either. Binding the
//!   importer's driver anew makes both ask again.
//!
//! A no is not remembered: nobody waits for refusals.

use core::ptr;

use kernel::{
    bindings, pci,
    sync::atomic::{Atomic, Relaxed},
};

use crate::common;

/// The devices that one provider reaches.
pub(crate) struct Peers {
    /// Where the next one goes.
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

    /// Forgets them all: some PCI device has lost its driver, or was removed.
    pub(crate) fn forget(&self) {
        for known in &self.known {
            known.store(ptr::null_mut(), Relaxed);
        }
    }

    /// Whether `importer` is remembered.
    pub(crate) fn know(&self, importer: *mut bindings::device) -> bool {
        self.known
            .iter()
            .any(|known| known.load(Relaxed) == importer)
    }

    /// Whether the kernel sees a route for DMA of `importer` to `provider`, whose peers these are.
    ///
    /// # Safety
    ///
    /// The caller keeps `importer`, until after its driver is gone.
    pub(crate) unsafe fn reach(
        &self,
        mut importer: *mut bindings::device,
        provider: &pci::Device,
    ) -> bool {
        // A device of another bus is asked about as the PCI device above it, and gets no mapping.
        // SAFETY: By the caller's promise.
        if !ptr::eq(
            unsafe { (*importer).bus },
            &raw const bindings::pci_bus_type,
        ) {
            return false;
        }
        // SAFETY: Both devices are kept. The array has one entry.
        let distance = unsafe {
            bindings::pci_p2pdma_distance_many(common::raw(provider), &mut importer, 1, false)
        };
        if distance < 0 {
            return false;
        }
        if !self.know(importer) {
            let next = self.next.fetch_add(1, Relaxed) as usize % self.known.len();
            self.known[next].store(importer, Relaxed);
        }
        true
    }
}
