// SPDX-License-Identifier: GPL-2.0

//! `/dev/peerbuf/provider`: exports P2PDMA memory that another driver owns, such as the controller memory
//! buffer of an NVMe disk.
//!
//! The owner has added the memory to a pool of the P2PDMA core and published it (`pci_p2pmem_publish`), so
//! any kernel code may allocate from it. The node's permissions say which users may export it. Its one ioctl
//! opens a provider and returns a descriptor with the ioctls of a bound device's node. The exports are the
//! same buffers, except that their places come from the pool (`pool.rs`) instead of a BAR's regions.
//!
//! # Lifetimes
//!
//! - The pool, its pages and the `p2pdma_provider` exist while the owner's driver is bound. [`open_device`]
//!   checks that with the device lock held, so no unbind is in progress. Every later unbind is announced by
//!   the driver core before it begins (`BUS_NOTIFY_UNBIND_DRIVER`, with the device lock held). [`unbinds`]
//!   then does what removal does for a bound device: it refuses new exports, revokes every buffer and waits
//!   for the importers to unmap. The notifier waits two seconds at most; after that a work item goes on, and
//!   the owner's removal waits for the importers' chunks (`memunmap_pages`).
//! - Code that uses the pool either holds the lock of `Device::state` and has checked that the device is
//!   live, or holds the reservation lock and has checked that the buffer is not gone.
//! - Each page of a chunk has a reference count of its own and a reference to the pool, like the pages that
//!   `p2pmem_alloc_mmap` maps into processes: it returns to the pool when its last user is done. Direct I/O
//!   may keep pages after the chunk was dropped. The owner's removal waits for them (`memunmap_pages`), after
//!   the owner's driver has ended the I/O of its own disk.
//! - A buffer whose file is dying drops its chunk in its release, which waits for nothing here. The owner's
//!   removal waits for that chunk in the same way.
//!
//! The kernel does not tell a pool's users of a reset of the owner's device; the effect on the memory is the
//! owner's affair.

use core::ptr;

use kernel::{
    bindings, container_of,
    ffi::*,
    page::PAGE_SIZE,
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
    bar::Bar,
    common::{self, DeviceLock, Listening, OwnQueue},
    device::{Device, Source},
    devices,
    ffi::{self, Table},
    misc::{Argument, Fd, Misc},
    node,
    peers::Peers,
    pool::Chunk,
    region::{Place, Regions},
};

static FOPS: Table<bindings::file_operations> = Table(bindings::file_operations {
    owner: crate::compat::THIS_MODULE.as_ptr(),
    unlocked_ioctl: Some(ioctl),
    // The structs have the same layout for 32-bit callers.
    compat_ioctl: bindings::compat_ptr_ioctl,
    llseek: Some(bindings::noop_llseek),
    // SAFETY: A null function pointer means that the node lacks the operation.
    ..unsafe { core::mem::zeroed() }
});

/// The registered node, the bus notifier and the workqueue. Dropped at module unload, when no file of a
/// provider and no buffer is left.
pub(crate) struct Providers {
    _node: Misc<()>,
    _listening: Listening,
    _queue: OwnQueue,
}

/// Runs work that takes longer than the bus notifier may. Valid while [`Providers`] exists.
static QUEUE: Atomic<*mut bindings::workqueue_struct> = Atomic::new(ptr::null_mut());

/// How long the bus notifier waits for importers. Notifiers hold the notifier chain's lock for reading, so as
/// soon as another task registers a notifier, every bind and unbind of the machine waits.
const NOTIFIER_LIMIT_MS: u32 = 2_000;

impl Providers {
    pub(crate) fn register() -> Result<Self> {
        let queue = OwnQueue::new(c"peerbuf-provider")?;
        QUEUE.store(queue.raw(), Relaxed);
        // Low priority: importers that hear of an unbind by a notifier unmap first, and a provider waits for
        // them.
        // SAFETY: The function exists as long as the module.
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
        // Removes the providers whose driver was never unbound. No device is bound to this driver any more.
        while let Some(provider) = devices::nth(0) {
            devices::remove(&provider);
        }
    }
}

/// `file_operations.unlocked_ioctl`.
unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    let arg = UserPtr::from_addr(arg as usize);
    let answer = match cmd {
        // SAFETY: The ioctl holds the file open.
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
    let mut request = Argument::<abi::ProviderOpen>::read(arg)?;
    if request.flags != 0 || request.fd != 0 {
        return Err(EINVAL);
    }
    // SAFETY: The file is open, by the caller's promise.
    unsafe { node::check_fd_flags(file, request.fd_flags)? };
    let device = open_device(common::find(request.address)?)?;

    // The descriptor is installed last: every step before that can be undone.
    let fd = Fd::reserve(request.fd_flags)?;
    request.fd = fd.number();
    let file = node::open_unnamed(device, request.fd_flags)?;
    if let Err(e) = request.answer() {
        // SAFETY: This is the file's only reference.
        unsafe { bindings::fput(file) };
        return Err(e);
    }
    // SAFETY: This is the file's only reference.
    unsafe { fd.install(file) };
    Ok(())
}

/// The provider for a PCI device.
///
/// Errors: ENODEV (the device has no driver), EOPNOTSUPP (its driver has published no memory), ENOSPC (the
/// pool is used up, so its address cannot be found), EINTR, ENOMEM.
fn open_device(pdev: ARef<pci::Device>) -> Result<Arc<Device>> {
    let raw = common::raw(&*pdev);
    // SAFETY: The reference keeps the device.
    let dev = unsafe { &raw mut (*raw).dev };
    // SAFETY: The reference keeps the device. No lock is held.
    let _lock = unsafe { DeviceLock::new(dev) }?;
    // SAFETY: The reference keeps the device, and the lock its driver.
    if unsafe { (*dev).driver.is_null() } {
        return Err(ENODEV);
    }
    // The P2PDMA core has no direct query. But of all devices with published memory, a device is closest to
    // itself.
    let mut client = dev;
    // SAFETY: The array has one entry. The result is null or a reference, which is put.
    let closest = unsafe {
        let closest = bindings::pci_p2pmem_find_many(&mut client, 1);
        bindings::pci_dev_put(closest);
        closest
    };
    // A device that is bound to this driver publishes nothing: it has a node of its own.
    if !ptr::eq(closest, raw) {
        return Err(ffi::errno(bindings::EOPNOTSUPP));
    }
    if let Some(known) = devices::find(raw) {
        return Ok(known);
    }
    // Only an allocation from the pool reveals the pool's address.
    // SAFETY: The lock keeps the driver bound until this returns, and the driver has published its pool.
    let chunk = unsafe { Chunk::take(raw, PAGE_SIZE as u64)? };
    let (paddr, _) = chunk.place();
    let mut bars = [Bar::ABSENT; abi::NUM_BARS];
    for (index, bar) in (0..).zip(bars.iter_mut()) {
        // SAFETY: The device is valid, and `index` is below `NUM_BARS`.
        *bar = unsafe { Bar::describe(raw, index) };
        if paddr.wrapping_sub(bar.start) < bar.size {
            // SAFETY: The driver is bound, and the chunk lies in this BAR.
            *bar = unsafe { bar.of_provider(raw, index, &chunk) };
        }
    }
    // `unbinds` removes the device before its driver is unbound.
    let provider = Device::new(pdev, bars, &Pool)?;
    devices::add(&provider)?;
    Ok(provider)
}

/// A `notifier_fn_t` of the PCI bus. The driver core holds the lock of the device that changes.
unsafe extern "C" fn device_changes(
    _notifier: *mut bindings::notifier_block,
    action: c_ulong,
    dev: *mut c_void,
) -> c_int {
    const UNBINDS: c_ulong = bindings::bus_notifier_event_BUS_NOTIFY_UNBIND_DRIVER as c_ulong;
    const UNBOUND: c_ulong = bindings::bus_notifier_event_BUS_NOTIFY_UNBOUND_DRIVER as c_ulong;
    const REMOVED: c_ulong = bindings::bus_notifier_event_BUS_NOTIFY_REMOVED_DEVICE as c_ulong;
    match action {
        UNBOUND | REMOVED => devices::each(|device| device.peers.iter().for_each(Peers::forget)),
        // SAFETY: The notifier is registered on the PCI bus, so `dev` is a PCI device's.
        UNBINDS => unsafe { unbinds(dev.cast()) },
        _ => {}
    }
    0 // NOTIFY_DONE
}

/// Tells the source of a device's memory that the device's driver is about to be unbound.
///
/// # Safety
///
/// `dev` is the `struct device` of a PCI device.
unsafe fn unbinds(dev: *mut bindings::device) {
    // SAFETY: `dev` is part of a `struct pci_dev`, by the caller's promise.
    let pdev = unsafe { container_of!(dev, bindings::pci_dev, dev) };
    if let Some(device) = devices::find(pdev) {
        device.source.unbinds(&device);
    }
}

/// The P2PDMA pool that the device's own driver has published, as a source of memory.
struct Pool;

impl Source for Pool {
    fn take(
        &self,
        device: &Device,
        bar: &Bar,
        want: (Place, u64),
        _regions: &mut Regions,
        chunks: &mut KVec<Chunk>,
    ) -> Result<u64> {
        let (Place::Any, len) = want else {
            return Err(EINVAL);
        };
        // SAFETY: The device is live, by the caller's check, so its driver is bound, and has a pool.
        let chunk = unsafe { Chunk::take(common::raw(device.pci()), len)? };
        let offset = chunk.place().0.wrapping_sub(bar.start);
        // A pool may have memory of several BARs.
        if offset >= bar.size {
            return Err(ENOSPC);
        }
        chunks.push(chunk, GFP_KERNEL)?;
        Ok(offset)
    }

    /// Removes the device. On return no importer can access its memory through this module, with two exceptions:
    /// direct I/O, for which the owner waits, and importers that do not unmap in time. The latter keep their
    /// chunks of the pool, so its owner waits for them, too (`memunmap_pages`), outside the notifier.
    fn unbinds(&self, device: &Arc<Device>) {
        if !device.remove_within(NOTIFIER_LIMIT_MS) {
            // SAFETY: A provider exists, so the queue is valid.
            let queue = unsafe { Queue::from_raw(QUEUE.load(Relaxed)) };
            // Cannot fail: a device is removed once, so the work is queued once.
            let _ = queue.enqueue::<Arc<Device>, 0>(device.clone());
        }
        devices::remove(device);
    }
}

/// Completes a removal that took longer than the notifier may wait.
impl WorkItem<0> for Device {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.remove();
    }
}
