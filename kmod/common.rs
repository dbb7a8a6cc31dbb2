// SPDX-License-Identifier: GPL-2.0

//! PCI and dma-buf helpers for peerbuf.ko and peerbuf_probe.ko. Each module compiles its own copy, so neither
//! needs the other to be loaded.

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

/// A registered notifier of the PCI bus. The driver core calls the notifier with the device lock held.
pub(crate) struct Listening(Pin<KBox<Opaque<bindings::notifier_block>>>);

// SAFETY: The only operation is unregistering in `drop`, which any thread may do.
unsafe impl Send for Listening {}
// SAFETY: A shared reference allows no operation.
unsafe impl Sync for Listening {}

impl Listening {
    /// Registers `call`, a `notifier_fn_t`, on the PCI bus; it runs before notifiers of a lower priority.
    /// ENOMEM.
    ///
    /// # Safety
    ///
    /// `call` is sound to call until the result is dropped. Its device argument is valid during the call.
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
        // SAFETY: The block is pinned until `this` is dropped, and `drop` unregisters it first.
        to_result(unsafe {
            bindings::bus_register_notifier(&raw const bindings::pci_bus_type, this.0.get())
        })?;
        Ok(this)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // SAFETY: The block is valid. Unregistering a block that is not registered does nothing (ENOENT);
        // otherwise the call returns when no notifier call is running.
        unsafe {
            bindings::bus_unregister_notifier(&raw const bindings::pci_bus_type, self.0.get())
        };
    }
}

/// A workqueue. Dropping it waits for all its work, so work items need no reference to the module.
pub(crate) struct OwnQueue(ptr::NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue may be used from any thread.
unsafe impl Send for OwnQueue {}
// SAFETY: `queue_work` and `destroy_workqueue` do their own locking.
unsafe impl Sync for OwnQueue {}

impl OwnQueue {
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: The name has no format specifiers.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(name.as_char_ptr(), bindings::wq_flags_WQ_UNBOUND, 0)
        };
        ptr::NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }

    /// The C workqueue, valid as long as `self`.
    pub(crate) fn raw(&self) -> *mut bindings::workqueue_struct {
        self.0.as_ptr()
    }
}

impl Drop for OwnQueue {
    fn drop(&mut self) {
        // SAFETY: The workqueue is valid, and nothing queues work on it any more. The call returns when no
        // work runs.
        unsafe { bindings::destroy_workqueue(self.raw()) };
    }
}

/// A reference to a dma-buf.
///
/// # Invariants
///
/// The pointer is valid, and this object owns one reference to it.
pub(crate) struct DmaBuf(*mut bindings::dma_buf);

impl DmaBuf {
    /// The dma-buf behind a file descriptor of the current task. EBADF; EINVAL for another kind of file.
    pub(crate) fn get(fd: i32) -> Result<Self> {
        // SAFETY: The call looks `fd` up in the current task's table and accepts any number.
        let dmabuf = from_err_ptr(unsafe { bindings::dma_buf_get(fd) })?;
        // INVARIANT: `dma_buf_get` took a reference.
        Ok(Self(dmabuf))
    }

    /// Takes over a reference.
    ///
    /// # Safety
    ///
    /// The caller owns a reference to `dmabuf`, and gives it up.
    // peerbuf_probe.ko does not call it.
    #[allow(dead_code)]
    pub(crate) unsafe fn from_raw(dmabuf: *mut bindings::dma_buf) -> Self {
        // INVARIANT: The caller passes its reference on.
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

/// A guard of a device lock.
pub(crate) struct DeviceLock(*mut bindings::device);

impl DeviceLock {
    /// Takes the device lock. A signal ends the wait (EINTR). The wait must be interruptible: the holder may
    /// be the device's removal, waiting for an attachment that only the exit of this very process releases.
    ///
    /// # Safety
    ///
    /// The caller keeps a reference to the device as long as the result lives.
    pub(crate) unsafe fn new(dev: *mut bindings::device) -> Result<Self> {
        // SAFETY: The caller keeps the device.
        match unsafe { ffi::peerbuf_device_lock(dev) } {
            0 => Ok(Self(dev)),
            _ => Err(EINTR),
        }
    }
}

impl Drop for DeviceLock {
    fn drop(&mut self) {
        // SAFETY: `new` took the lock, and its caller keeps the device.
        unsafe { ffi::peerbuf_device_unlock(self.0) };
    }
}

/// The PCI device at an address, a number as in `uapi/src/abi.rs`.
///
/// Errors: EINVAL (not an address), ENXIO (no such device).
pub(crate) fn find(address: u64) -> Result<ARef<pci::Device>> {
    let domain = c_int::try_from(address >> 16).map_err(|_| EINVAL)?;
    let (bus, devfn) = (
        c_uint::from((address >> 8) as u8),
        c_uint::from(address as u8),
    );
    // SAFETY: A lookup that accepts any numbers.
    let pdev = unsafe { bindings::pci_get_domain_bus_and_slot(domain, bus, devfn) };
    let pdev = ptr::NonNull::new(pdev.cast::<pci::Device>()).ok_or(ENXIO)?;
    // SAFETY: `pci::Device` is a transparent wrapper of `struct pci_dev`, and the lookup took the reference
    // that `ARef` takes over.
    Ok(unsafe { ARef::from_raw(pdev) })
}
