// SPDX-License-Identifier: GPL-2.0

//! Resets of a bound device: the PCI core calls the driver before and after each.
//!
//! Rust's PCI drivers have no error handlers in Linux 7.3, so the first probe sets them in the C driver. The
//! PCI core calls them with the device lock held, which also serialises bind and unbind.

use kernel::bindings;

use crate::{common, device::Device, devices, ffi::Table};

static HANDLERS: Table<bindings::pci_error_handlers> = Table(bindings::pci_error_handlers {
    reset_prepare: Some(prepare),
    reset_done: Some(done),
    // SAFETY: A null function pointer means that the driver ignores the event.
    ..unsafe { core::mem::zeroed() }
});

/// Installs the error handlers in the device's driver.
pub(crate) fn hear_of(device: &Device) {
    let raw = common::raw(device.pci());
    // SAFETY: The device is being probed, so it has a driver, which is this module's. Other probes may write
    // the same value at the same time. A reader holds the lock of a bound device, so its probe wrote the
    // value before.
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
