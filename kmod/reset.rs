// SPDX-License-Identifier: GPL-2.0

//! Resets of a device that is bound: what the PCI core tells its driver before and after.
//!
//! Rust's PCI drivers have no error handlers in Linux 7.3, so they are put into the C driver when
//! it probes its first device. The PCI core calls them with the device's lock held, under which
//! devices are bound and unbound, too.

use kernel::bindings;

use crate::{common, device::Device, devices, ffi::Table};

static HANDLERS: Table<bindings::pci_error_handlers> = Table(bindings::pci_error_handlers {
    reset_prepare: Some(prepare),
    reset_done: Some(done),
    // SAFETY: Null function pointers are events that the driver does not care about.
    ..unsafe { core::mem::zeroed() }
});

/// Sees to it that resets of a device are told to this module.
pub(crate) fn hear_of(device: &Device) {
    let raw = common::raw(device.pci());
    // SAFETY: The device is being probed, so it has a driver, and that is this module's. Other probes
    // may write the same at the same time; who reads it holds the lock of a device that is bound, so
    // it was written before.
    unsafe { (*(*raw).driver).err_handler = &HANDLERS.0 };
}

/// `pci_error_handlers.reset_prepare`.
unsafe extern "C" fn prepare(pdev: *mut bindings::pci_dev) {
    if let Some(device) = devices::find(pdev) {
        device.reset_prepare();
    }
}

/// `pci_error_handlers.reset_done`.
unsafe extern "C" fn done(pdev: *mut bindings::pci_dev) {
    if let Some(device) = devices::find(pdev) {
        device.reset_done();
    }
}
