// SPDX-License-Identifier: GPL-2.0

//! The PCI core's calls to the driver of a bound device around a reset, and around an error that AER or DPC
//! reports ([Documentation/PCI/pci-error-recovery.rst]).
//!
//! Rust's PCI drivers have no error handlers in Linux 7.3, so the probe of the first device writes them into the
//! C driver. The PCI core calls them with the device lock held, as it does `probe` and `remove`. It does not
//! hold that lock from the report of an error to the end of the recovery, so a reset or the device's removal
//! can come in between: each is a reason of its own for what is revoked.
//!
//! [Documentation/PCI/pci-error-recovery.rst]: https://docs.kernel.org/PCI/pci-error-recovery.html

use kernel::bindings;

use crate::{common, device::Device, devices, ffi::Table};

static HANDLERS: Table<bindings::pci_error_handlers> = Table(bindings::pci_error_handlers {
    error_detected: Some(error_detected),
    slot_reset: Some(slot_reset),
    resume: Some(resume),
    reset_prepare: Some(prepare),
    reset_done: Some(done),
    // SAFETY: A null function pointer is an event that the driver ignores.
    ..unsafe { core::mem::zeroed() }
});

/// Makes the PCI core call the handlers.
pub(crate) fn hear_of(device: &Device) {
    let raw = common::raw(device.pci());
    // SAFETY: The device is being probed, so it has a driver, and that is this module's. Concurrent probes
    // write the same value. Readers hold the lock of a bound device, so the write came before.
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

/// `pci_error_handlers.error_detected`. The answer never stands in the way of the recovery of the other
/// devices below the same port.
unsafe extern "C" fn error_detected(
    pdev: *mut bindings::pci_dev,
    state: bindings::pci_channel_state_t,
) -> bindings::pci_ers_result_t {
    if let Some(device) = devices::find(pdev) {
        device.error_detected();
    }
    match state {
        bindings::pci_channel_io_normal => bindings::pci_ers_result_PCI_ERS_RESULT_CAN_RECOVER,
        bindings::pci_channel_io_frozen => bindings::pci_ers_result_PCI_ERS_RESULT_NEED_RESET,
        _ => bindings::pci_ers_result_PCI_ERS_RESULT_DISCONNECT,
    }
}

/// `pci_error_handlers.slot_reset`: the device has been reset, its configuration space, too.
unsafe extern "C" fn slot_reset(pdev: *mut bindings::pci_dev) -> bindings::pci_ers_result_t {
    // SAFETY: The PCI core passes a valid device and holds its lock. The PCI core saved the state when it
    // added the device. Bus mastering, which a saved state may contain, stays off.
    let enabled = unsafe {
        bindings::pci_restore_state(pdev);
        let enabled = bindings::pci_reenable_device(pdev);
        bindings::pci_clear_master(pdev);
        enabled
    };
    match enabled {
        0 => bindings::pci_ers_result_PCI_ERS_RESULT_RECOVERED,
        _ => bindings::pci_ers_result_PCI_ERS_RESULT_DISCONNECT,
    }
}

/// `pci_error_handlers.resume`: the devices below the port work again.
unsafe extern "C" fn resume(pdev: *mut bindings::pci_dev) {
    if let Some(device) = devices::find(pdev) {
        device.error_resume();
    }
}
