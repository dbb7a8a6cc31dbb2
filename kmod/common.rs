// SPDX-License-Identifier: GPL-2.0

//! What peerbuf.ko and peerbuf_probe.ko need of PCI devices and of dma-bufs. Each has a copy of its own,
//! and neither needs the other to be loaded.

use core::ptr;

use kernel::{
    bindings,
    device::DeviceContext,
    error::{from_err_ptr, to_result},
    ffi::*,
    pci,
    prelude::*,
    sync::aref::ARef,
    types::Opaque,
};

use crate::ffi;

/// While it lives the driver core says what happens to PCI devices, with the lock of the device that it
/// concerns held.
pub(crate) struct Listening(Pin<KBox<Opaque<bindings::notifier_block>>>);

// SAFETY: Nothing is done with it but to end it, which any thread may.
unsafe impl Send for Listening {}
// SAFETY: As for `Send`.
unsafe impl Sync for Listening {}

impl Listening {
    /// Calls `call`, a `notifier_fn_t` of the PCI bus, before those of a lower priority. ENOMEM.
    ///
    /// # Safety
    ///
    /// `call` may be called from now on until the result is dropped, with the device it is given kept.
    pub(crate) unsafe fn begin(
        call: unsafe extern "C" fn(*mut bindings::notifier_block, c_ulong, *mut c_void) -> c_int,
        priority: c_int,
    ) -> Result<Self> {
        let block = Opaque::new(bindings::notifier_block {
            notifier_call: Some(call),
            next: ptr::null_mut(),
            priority,
        });
        let this = Self(KBox::pin(block, GFP_KERNEL)?);
        // SAFETY: The block stays where it is until `this` is dropped, which takes it out of the list first.
        to_result(unsafe {
            bindings::bus_register_notifier(&raw const bindings::pci_bus_type, this.0.get())
        })?;
        Ok(this)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // SAFETY: The block is valid. Where it was not registered nothing happens (ENOENT); else this returns
        // when it is not being called.
        unsafe {
            bindings::bus_unregister_notifier(&raw const bindings::pci_bus_type, self.0.get())
        };
    }
}

/// A work queue. Dropping it waits until nothing runs on it, which needs no reference to the module.
pub(crate) struct OwnQueue(ptr::NonNull<bindings::workqueue_struct>);

// SAFETY: A work queue may be used from any thread.
unsafe impl Send for OwnQueue {}
// SAFETY: As for `Send`.
unsafe impl Sync for OwnQueue {}

impl OwnQueue {
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: The name has no conversions.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(name.as_char_ptr(), bindings::wq_flags_WQ_UNBOUND, 0)
        };
        ptr::NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }

    /// Valid as long as this object.
    pub(crate) fn raw(&self) -> *mut bindings::workqueue_struct {
        self.0.as_ptr()
    }
}

impl Drop for OwnQueue {
    fn drop(&mut self) {
        // SAFETY: It is valid, and nobody queues anything any more. Returns when nothing runs.
        unsafe { bindings::destroy_workqueue(self.raw()) };
    }
}

/// A reference to a dma-buf.
///
/// # Invariants
///
/// It is valid.
pub(crate) struct DmaBuf(*mut bindings::dma_buf);

impl DmaBuf {
    /// That of a descriptor of the calling task. EBADF, or EINVAL for another kind of file.
    pub(crate) fn get(fd: i32) -> Result<Self> {
        // SAFETY: Called by a task on its own behalf.
        let dmabuf = from_err_ptr(unsafe { bindings::dma_buf_get(fd) })?;
        // INVARIANT: The call took a reference.
        Ok(Self(dmabuf))
    }

    /// Takes a reference over.
    ///
    /// # Safety
    ///
    /// It is the caller's.
    // The importer has none.
    #[allow(dead_code)]
    pub(crate) unsafe fn from_raw(dmabuf: *mut bindings::dma_buf) -> Self {
        // INVARIANT: By the caller's promise.
        Self(dmabuf)
    }

    pub(crate) fn raw(&self) -> *mut bindings::dma_buf {
        self.0
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // SAFETY: This object owns a reference.
        unsafe { bindings::dma_buf_put(self.0) };
    }
}

/// The C view of a PCI device.
pub(crate) fn raw<Ctx: DeviceContext>(pdev: &pci::Device<Ctx>) -> *mut bindings::pci_dev {
    // `pci::Device` is a transparent wrapper of `struct pci_dev`.
    ptr::from_ref(pdev).cast_mut().cast()
}

/// A device's lock, held.
pub(crate) struct DeviceLock(*mut bindings::device);

impl DeviceLock {
    /// Who holds it may be the device's removal, and that may wait for an attachment of this very
    /// process, which only the process's end gives up: so a signal ends the wait (EINTR).
    ///
    /// # Safety
    ///
    /// The caller keeps the device as long as the result lives.
    pub(crate) unsafe fn new(dev: *mut bindings::device) -> Result<Self> {
        // SAFETY: By the caller's promise.
        match unsafe { ffi::peerbuf_device_lock(dev) } {
            0 => Ok(Self(dev)),
            _ => Err(EINTR),
        }
    }
}

impl Drop for DeviceLock {
    fn drop(&mut self) {
        // SAFETY: Locked by `new`, to which the caller has promised to keep it.
        unsafe { ffi::peerbuf_device_unlock(self.0) };
    }
}

/// The PCI device at an address, `DDDD:BB:DD.F`, with as many digits of the domain as it has.
///
/// Errors: EINVAL (that is no address), ENXIO (no such device).
pub(crate) fn find(bdf: &[u8; 16]) -> Result<ARef<pci::Device>> {
    let end = bdf.iter().position(|&byte| byte == 0).ok_or(EINVAL)?;
    let (text, padding) = bdf.split_at(end);
    if padding.iter().any(|&byte| byte != 0) {
        return Err(EINVAL);
    }
    let (domain, rest) = text.split_at_checked(end.wrapping_sub(8)).ok_or(EINVAL)?;
    let [b':', bus @ .., b':', slot1, slot2, b'.', function] = rest else {
        return Err(EINVAL);
    };
    if domain.len() < 4 {
        return Err(EINVAL);
    }
    let (domain, bus) = (hex(domain)?, hex(bus)?);
    let (slot, function) = (hex(&[*slot1, *slot2])?, hex(&[*function])?);
    if slot > 0x1f || function > 7 {
        return Err(EINVAL);
    }
    let domain = c_int::try_from(domain).map_err(|_| EINVAL)?;
    // SAFETY: Looks it up; takes any numbers.
    let pdev =
        unsafe { bindings::pci_get_domain_bus_and_slot(domain, bus, (slot << 3) | function) };
    let pdev = ptr::NonNull::new(pdev.cast::<pci::Device>()).ok_or(ENXIO)?;
    // SAFETY: `pci::Device` is a transparent wrapper of `struct pci_dev`, and the lookup took the
    // reference that is handed over.
    Ok(unsafe { ARef::from_raw(pdev) })
}

/// Digits of a hexadecimal number of at most 32 bits, in either case, without a sign.
fn hex(digits: &[u8]) -> Result<u32> {
    if digits.len() > 8 {
        return Err(EINVAL);
    }
    digits.iter().try_fold(0, |number, &digit| {
        let digit = char::from(digit).to_digit(16).ok_or(EINVAL)?;
        Ok(number << 4 | digit)
    })
}
