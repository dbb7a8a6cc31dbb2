// SPDX-License-Identifier: GPL-2.0

//! The calls to the driver of a bound device around a reset, around an error that AER or DPC reports
//! ([Documentation/PCI/pci-error-recovery.rst]), and around the system's sleep
//! ([Documentation/power/pci.rst]).
//!
//! Rust's PCI drivers have neither error handlers nor callbacks for sleep in Linux 7.3, so the probe of the first
//! device writes them into the C driver. The kernel calls them with the device lock held, as it does `probe` and
//! `remove`. It does not hold that lock from the report of an error to the end of the recovery, or while
//! the system sleeps, so another of these events or the device's removal can come in between: each is a
//! reason of its own for what is revoked.
//!
//! [Documentation/PCI/pci-error-recovery.rst]: https://docs.kernel.org/PCI/pci-error-recovery.html
//! [Documentation/power/pci.rst]: https://docs.kernel.org/power/pci.html

use kernel::{bindings, ffi::c_int, prelude::*};

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

static POWER: Table<bindings::dev_pm_ops> = Table(bindings::dev_pm_ops {
    suspend: Some(sleep),
    resume: Some(wake),
    freeze: Some(sleep),
    thaw: Some(wake),
    poweroff: Some(sleep),
    restore: Some(wake),
    // SAFETY: A null function pointer is an event that the driver ignores.
    ..unsafe { core::mem::zeroed() }
});

/// Makes the kernel call these functions.
pub(crate) fn hear_of(device: &Device) {
    let raw = common::raw(device.pci());
    // SAFETY: The device is being probed, so it has a driver, and that is this module's. Concurrent probes
    // write the same value. Readers hold the lock of a bound device, so the write came before.
    unsafe {
        let driver = (*raw).driver;
        (*driver).err_handler = &HANDLERS.0;
        (*driver).driver.pm = &POWER.0;
    }
}

/// The bound device of a `struct device` that the kernel passes to a callback in [`POWER`].
///
/// # Safety
///
/// `dev` is part of a valid `struct pci_dev`.
unsafe fn of(dev: *mut bindings::device) -> Option<kernel::sync::Arc<Device>> {
    // SAFETY: By the caller's promise.
    devices::find(unsafe { kernel::container_of!(dev, bindings::pci_dev, dev) })
}

/// `dev_pm_ops`, before the device sleeps, or before an image of the memory is made that it must not change.
unsafe extern "C" fn sleep(dev: *mut bindings::device) -> c_int {
    // SAFETY: The callbacks are those of a PCI driver.
    match unsafe { of(dev) }.map(|device| device.power_down()) {
        Some(Err(error)) => error.to_errno(),
        _ => 0,
    }
}

/// `dev_pm_ops`, when the device is awake; the PCI core has restored its configuration.
unsafe extern "C" fn wake(dev: *mut bindings::device) -> c_int {
    // SAFETY: The callbacks are those of a PCI driver.
    if let Some(device) = unsafe { of(dev) } {
        device.power_up();
    }
    0
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
