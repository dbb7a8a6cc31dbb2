// SPDX-License-Identifier: GPL-2.0

//! `/dev/peerbuf/provider`: memory that another driver lends to peers, such as the controller memory
//! buffer of an NVMe disk.
//!
//! The owner has put it in the P2PDMA core's pool and published that (`pci_p2pmem_publish`); anybody
//! in the kernel may take from it. Opening the node takes a right, by its permissions; its one ioctl
//! opens a provider, and what it gives is a descriptor like those of the nodes of bound devices, for
//! that one provider. The exports are the same buffers, too: only their places come from the pool
//! (`pool.rs`) instead of a BAR's regions.
//!
//! # Lifetimes
//!
//! - The pool, its pages and the `p2pdma_provider` are there while the owner's driver is bound.
//!   [`open_device`] looks whether it is under the device's lock, so no unbinding is under way.
//!   From then on the driver core tells of an unbinding before it begins (`BUS_NOTIFY_UNBIND_DRIVER`,
//!   with the device's lock held), and [`unbinds`] does what removal does for devices of our own:
//!   nothing new is exported, every buffer is revoked, no importer has a mapping when it returns.
//!   But for importers that do not let go within two seconds: the rest is done by a work item, and meanwhile
//!   the owner's removal waits for the chunks that they use (`memunmap_pages`).
//!   Whatever uses the pool holds the lock of `Device::state`, after a look that the device is
//!   there; or the reservation lock, after a look that the buffer is not gone.
//! - Each page of a chunk has a count of its own and a reference to the pool, as those that
//!   `p2pmem_alloc_mmap` gives to processes: it goes back by itself when the last user lets go.
//!   Direct I/O may keep some when the chunk is given up. The owner's removal waits for them
//!   (`memunmap_pages`), after the owner's driver has ended the I/O of its own disk.
//! - A dying descriptor's buffer gives its chunk up in its release, which nothing here holds up, and
//!   the owner's removal waits for that in the same way.
//!
//! Nobody tells the pool's users of a reset of the owner's device; that is between it and its memory.

use core::ptr;

use kernel::{
    bindings, container_of,
    ffi::*,
    pci,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{Atomic, Relaxed},
        Arc,
    },
    uaccess::UserPtr,
    workqueue::{Queue, WorkItem},
};

use crate::{
    abi,
    common::{self, DeviceLock, Listening, OwnQueue},
    device::Device,
    devices,
    ffi::{self, Table},
    misc::{read_struct, write_struct, Fd, Misc},
    node,
};

static FOPS: Table<bindings::file_operations> = Table(bindings::file_operations {
    owner: crate::compat::THIS_MODULE.as_ptr(),
    unlocked_ioctl: Some(ioctl),
    // The structs are the same for 32-bit callers.
    compat_ioctl: bindings::compat_ptr_ioctl,
    llseek: Some(bindings::noop_llseek),
    // SAFETY: Null function pointers are operations that the node does not have.
    ..unsafe { core::mem::zeroed() }
});

/// The registered node, and what is heard of PCI devices. Dropped when the module is unloaded: no
/// descriptor of a provider is left then, and no buffer.
pub(crate) struct Providers {
    _node: Misc<()>,
    _listening: Listening,
    _queue: OwnQueue,
}

/// For what takes longer than the bus notifier may. Valid while [`Providers`] is.
static QUEUE: Atomic<*mut bindings::workqueue_struct> = Atomic::new(ptr::null_mut());

/// How long the bus notifier waits for importers: every bind and unbind of the machine waits behind it as
/// soon as somebody registers another notifier.
const NOTIFIER_LIMIT_MS: u32 = 2_000;

impl Providers {
    pub(crate) fn register() -> Result<Self> {
        let queue = OwnQueue::new(c"peerbuf-provider")?;
        QUEUE.store(queue.raw(), Relaxed);
        // After those importers that hear of a driver's end in the same way: a provider waits for them.
        // SAFETY: The function is there while the module is.
        let listening = unsafe { Listening::begin(device_changes, -1) }?;
        // SAFETY: The node has no parent.
        let node = unsafe { Misc::register(c"provider", ptr::null_mut(), &FOPS, ()) }?;
        Ok(Self {
            _node: node,
            _listening: listening,
            _queue: queue,
        })
    }
}

impl Drop for Providers {
    fn drop(&mut self) {
        // Those whose driver was never unbound.
        while let Some(provider) = devices::find_provider() {
            devices::remove(&provider);
        }
    }
}

/// `file_operations.unlocked_ioctl`.
unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    let arg = UserPtr::from_addr(arg as usize);
    let answer = match cmd {
        // SAFETY: The file is the one that the ioctl came by.
        abi::IOC_PROVIDER_OPEN => unsafe { open_provider(file, arg) },
        _ => Err(ENOTTY),
    };
    match answer {
        Ok(()) => 0,
        Err(e) => e.to_errno() as c_long,
    }
}

/// # Safety
///
/// `file` is an open file.
unsafe fn open_provider(file: *mut bindings::file, arg: UserPtr) -> Result {
    let mut request: abi::ProviderOpen = read_struct(arg)?;
    if request.flags != 0 || request.fd != 0 {
        return Err(EINVAL);
    }
    // SAFETY: By the caller's promise.
    unsafe { node::check_fd_flags(file, request.fd_flags)? };
    let device = open_device(common::find(&request.bdf)?)?;

    // The descriptor is published last: until then every step can be undone.
    let fd = Fd::reserve(request.fd_flags)?;
    request.fd = fd.number();
    let file = node::open_unnamed(device, request.fd_flags)?;
    if let Err(e) = write_struct(arg, &request) {
        // SAFETY: This is the file's only reference.
        unsafe { bindings::fput(file) };
        return Err(e);
    }
    // SAFETY: This is the file's only reference.
    unsafe { fd.install(file) };
    Ok(())
}

/// The provider that a PCI device is.
///
/// Errors: ENODEV (it has no driver), EOPNOTSUPP (that has published no memory), ENOSPC (all of it is
/// taken, so it is not to be seen where it is), EINTR, ENOMEM.
fn open_device(pdev: ARef<pci::Device>) -> Result<Arc<Device>> {
    let raw = common::raw(&*pdev);
    // SAFETY: It is kept.
    let dev = unsafe { &raw mut (*raw).dev };
    // SAFETY: As above. No lock is held.
    let _lock = unsafe { DeviceLock::new(dev) }?;
    // SAFETY: As above; the lock keeps the driver as it is.
    if unsafe { (*dev).driver.is_null() } {
        return Err(ENODEV);
    }
    if let Some(known) = devices::find(raw) {
        return match known.is_provider() {
            true => Ok(known),
            // One of our own, which has a node.
            false => Err(ffi::errno(bindings::EOPNOTSUPP)),
        };
    }
    // The one way to ask: among all that have published memory, the device's own is the closest to it.
    let mut client = dev;
    // SAFETY: The array has one entry. The answer comes with a reference, or is null.
    let closest = unsafe {
        let closest = bindings::pci_p2pmem_find_many(&mut client, 1);
        bindings::pci_dev_put(closest);
        closest
    };
    if !ptr::eq(closest, raw) {
        return Err(ffi::errno(bindings::EOPNOTSUPP));
    }
    // SAFETY: The lock keeps the driver, and it has published its pool, until this returns.
    let provider = unsafe { Device::provider(pdev)? };
    devices::add(&provider)?;
    Ok(provider)
}

/// A `notifier_fn_t`: the driver core says that something happens to a device, whose lock it holds.
unsafe extern "C" fn device_changes(
    _notifier: *mut bindings::notifier_block,
    action: c_ulong,
    dev: *mut c_void,
) -> c_int {
    const UNBINDS: c_ulong = bindings::bus_notifier_event_BUS_NOTIFY_UNBIND_DRIVER as c_ulong;
    const UNBOUND: c_ulong = bindings::bus_notifier_event_BUS_NOTIFY_UNBOUND_DRIVER as c_ulong;
    const REMOVED: c_ulong = bindings::bus_notifier_event_BUS_NOTIFY_REMOVED_DEVICE as c_ulong;
    match action {
        UNBOUND | REMOVED => devices::each(|device| device.peers.forget()),
        // SAFETY: The notifier is that of the PCI bus.
        UNBINDS => unsafe { unbinds(dev.cast()) },
        _ => {}
    }
    0 // NOTIFY_DONE
}

/// The driver of a device is about to be unbound, and the device's lock is held. Returns when nobody
/// can reach its memory through us, but for direct I/O that the owner waits for, and for importers that do
/// not let go in time. Those keep their chunks of the pool, and so its owner waits for them as well
/// (`memunmap_pages`), outside the notifier.
///
/// # Safety
///
/// `dev` is that of a PCI device.
unsafe fn unbinds(dev: *mut bindings::device) {
    // SAFETY: By the caller's promise.
    let pdev = unsafe { container_of!(dev, bindings::pci_dev, dev) };
    if let Some(device) = devices::find(pdev) {
        if device.is_provider() {
            if !device.remove_within(NOTIFIER_LIMIT_MS) {
                // SAFETY: A provider is there, so the queue is valid.
                let queue = unsafe { Queue::from_raw(QUEUE.load(Relaxed)) };
                // Cannot fail: a device is removed once.
                let _ = queue.enqueue::<Arc<Device>, 0>(device.clone());
            }
            devices::remove(&device);
        }
    }
}

/// The rest of a removal.
impl WorkItem<0> for Device {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.remove();
    }
}
