// SPDX-License-Identifier: GPL-2.0

//! The list of all devices: those bound to this module, and the providers whose memory it exports.
//!
//! Events that concern all devices, or carry nothing but a `struct pci_dev`, need this list. Its lock comes
//! before the devices' locks.

use kernel::{bindings, prelude::*, sync::Arc};

use crate::{common, device::Device};

kernel::sync::global_lock! {
    // SAFETY: The module calls `init` before it uses the list.
    unsafe(uninit) static ALL: Mutex<KVec<Arc<Device>>> = KVec::new();
}

/// Makes the list.
///
/// # Safety
///
/// Called once, before any other function of this module can run.
pub(crate) unsafe fn init() {
    // SAFETY: By the caller's promise this is the first and only call.
    unsafe { ALL.init() };
}

/// A device's membership of the list, which dropping it ends.
pub(crate) struct Listed(Arc<Device>);

impl Listed {
    /// Adds the device. ENOMEM.
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

/// Adds a device to the list. ENOMEM.
pub(crate) fn add(device: &Arc<Device>) -> Result {
    Ok(ALL.lock().push(device.clone(), GFP_KERNEL)?)
}

pub(crate) fn remove(gone: &Arc<Device>) {
    let mut all = ALL.lock();
    all.retain(|device| !Arc::ptr_eq(device, gone));
    if all.is_empty() {
        // A static is never dropped, so the last removal frees the list's memory.
        *all = KVec::new();
    }
}

/// The device of a `struct pci_dev`.
pub(crate) fn find(pdev: *mut bindings::pci_dev) -> Option<Arc<Device>> {
    let all = ALL.lock();
    let is_it = |device: &&Arc<Device>| common::raw(device.pci()) == pdev;
    all.iter().find(is_it).cloned()
}

/// The device at position `index`; the order is undefined.
pub(crate) fn nth(index: usize) -> Option<Arc<Device>> {
    ALL.lock().get(index).cloned()
}

/// Calls `act` for each device with the list locked; `act` must not wait.
pub(crate) fn each(act: impl FnMut(&Arc<Device>)) {
    ALL.lock().iter().for_each(act);
}
