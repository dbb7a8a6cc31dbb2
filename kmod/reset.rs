// SPDX-License-Identifier: GPL-2.0

//! Resets of a device that is bound: what the PCI core tells its driver before and after.
//!
//! Rust's PCI drivers have no error handlers in Linux 7.2, so they are put into the C driver when
//! it probes its first device. The PCI core calls them with the device's lock held, under which
//! devices are bound and unbound, too. They find the device in a list of their own.

use kernel::{bindings, prelude::*, sync::Arc};

use crate::{
    device::{self, Device},
    ffi::Table,
};

static HANDLERS: Table<bindings::pci_error_handlers> = Table(bindings::pci_error_handlers {
    reset_prepare: Some(prepare),
    reset_done: Some(done),
    // SAFETY: Null function pointers are events that the driver does not care about.
    ..unsafe { core::mem::zeroed() }
});

kernel::sync::global_lock! {
    // SAFETY: Initialised by the module before it registers its driver.
    unsafe(uninit) static BOUND: Mutex<KVec<Arc<Device>>> = KVec::new();
}

/// Makes the list.
///
/// # Safety
///
/// Called once, before the driver is registered.
pub(crate) unsafe fn init() {
    // SAFETY: By the caller's promise.
    unsafe { BOUND.init() };
}

/// A bound device that hears of resets, until this is dropped.
pub(crate) struct Resets(Arc<Device>);

impl Resets {
    /// ENOMEM.
    pub(crate) fn register(device: &Arc<Device>) -> Result<Self> {
        BOUND.lock().push(device.clone(), GFP_KERNEL)?;
        let raw = device::raw(device.pci());
        // SAFETY: The device is being probed, so it has a driver, and that is this module's. Other
        // probes may write the same at the same time; who reads it holds the lock of a device that
        // is bound, so it was written before.
        unsafe { (*(*raw).driver).err_handler = &HANDLERS.0 };
        Ok(Self(device.clone()))
    }
}

impl Drop for Resets {
    fn drop(&mut self) {
        let mut bound = BOUND.lock();
        bound.retain(|device| !Arc::ptr_eq(device, &self.0));
        if bound.is_empty() {
            // Nobody drops a static: its memory goes before the module does.
            *bound = KVec::new();
        }
    }
}

/// Calls `each` for every device that is bound.
pub(crate) fn each_bound(each: impl FnMut(&Arc<Device>)) {
    BOUND.lock().iter().for_each(each);
}

fn find(pdev: *mut bindings::pci_dev) -> Option<Arc<Device>> {
    let bound = BOUND.lock();
    let device = bound
        .iter()
        .find(|device| device::raw(device.pci()) == pdev)?;
    Some(device.clone())
}

/// `pci_error_handlers.reset_prepare`.
unsafe extern "C" fn prepare(pdev: *mut bindings::pci_dev) {
    if let Some(device) = find(pdev) {
        device.reset_prepare();
    }
}

/// `pci_error_handlers.reset_done`.
unsafe extern "C" fn done(pdev: *mut bindings::pci_dev) {
    if let Some(device) = find(pdev) {
        device.reset_done();
    }
}
