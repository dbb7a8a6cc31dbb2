// SPDX-License-Identifier: GPL-2.0

//! The devices that there are: those bound to this module, and the providers whose memory it lends.
//!
//! For events that come with nothing but a `struct pci_dev`, or concern all of them. The list's lock
//! comes before those of the devices.

use kernel::{bindings, prelude::*, sync::Arc};

use crate::{common, device::Device};

kernel::sync::global_lock! {
    // SAFETY: Initialised by the module before anything else of it is.
    unsafe(uninit) static ALL: Mutex<KVec<Arc<Device>>> = KVec::new();
}

/// Makes the list.
///
/// # Safety
///
/// Called once, before anything of this module can be called.
pub(crate) unsafe fn init() {
    // SAFETY: By the caller's promise.
    unsafe { ALL.init() };
}

/// A device is in the list until this is dropped.
pub(crate) struct Listed(Arc<Device>);

impl Listed {
    /// ENOMEM.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self> {
        add(device)?;
        Ok(Self(device.clone()))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// ENOMEM.
pub(crate) fn add(device: &Arc<Device>) -> Result {
    Ok(ALL.lock().push(device.clone(), GFP_KERNEL)?)
}

pub(crate) fn remove(gone: &Arc<Device>) {
    let mut all = ALL.lock();
    all.retain(|device| !Arc::ptr_eq(device, gone));
    if all.is_empty() {
        // Nobody drops a static: its memory goes before the module does.
        *all = KVec::new();
    }
}

/// That of a PCI device.
pub(crate) fn find(pdev: *mut bindings::pci_dev) -> Option<Arc<Device>> {
    let all = ALL.lock();
    let is_it = |device: &&Arc<Device>| common::raw(device.pci()) == pdev;
    all.iter().find(is_it).cloned()
}

/// Any of the providers.
pub(crate) fn find_provider() -> Option<Arc<Device>> {
    let all = ALL.lock();
    all.iter().find(|device| device.is_provider()).cloned()
}

/// The `index`th, in whatever order.
pub(crate) fn nth(index: usize) -> Option<Arc<Device>> {
    ALL.lock().get(index).cloned()
}

/// Calls `act` for each, with the list locked: for what waits for nobody.
pub(crate) fn each(act: impl FnMut(&Arc<Device>)) {
    ALL.lock().iter().for_each(act);
}
