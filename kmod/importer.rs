// SPDX-License-Identifier: GPL-2.0

//! `/dev/peerbuf/importer`: the node of the test importer, and the ioctls of its attachments.
//!
//! The node exists while the module is loaded. Each attachment is a file of its own: its holder can use that
//! attachment and nothing else, and closing the file releases everything. `attachment.rs` implements an
//! attachment; this file has the ioctls and the list of attachments, which the importer needs when a device's
//! driver is unbound.
//!
//! An attachment that outlives its file (`detach_ms`) holds a module reference. The work item that drops the
//! reference runs on the importer's own workqueue, and unloading the module waits for that queue.

use core::ptr;

use kernel::{
    bindings,
    dma::DataDirection,
    error::from_err_ptr,
    ffi::*,
    prelude::*,
    sync::{Arc, ArcBorrow},
    time::msecs_to_jiffies,
    types::ScopeGuard,
    uaccess::UserPtr,
    workqueue::{Queue, WorkItem},
};

use crate::{
    abi,
    attachment::{Attachment, Manner},
    common::{self, DeviceLock, DmaBuf, Listening, OwnQueue},
    ffi::{self, Table},
    misc::{Argument, Fd, Misc},
};

static NODE_FOPS: Table<bindings::file_operations> = Table(bindings::file_operations {
    owner: crate::compat::THIS_MODULE.as_ptr(),
    unlocked_ioctl: Some(node_ioctl),
    // The structs have the same layout for 32-bit callers.
    compat_ioctl: bindings::compat_ptr_ioctl,
    llseek: Some(bindings::noop_llseek),
    // SAFETY: A null function pointer means that the file lacks the operation.
    ..unsafe { core::mem::zeroed() }
});

static ATTACHMENT_FOPS: Table<bindings::file_operations> = Table(bindings::file_operations {
    owner: crate::compat::THIS_MODULE.as_ptr(),
    release: Some(release),
    unlocked_ioctl: Some(attachment_ioctl),
    compat_ioctl: bindings::compat_ptr_ioctl,
    llseek: Some(bindings::noop_llseek),
    // SAFETY: A null function pointer means that the file lacks the operation.
    ..unsafe { core::mem::zeroed() }
});

kernel::sync::global_lock! {
    // SAFETY: `Registered::new` initialises it before anyone can attach.
    unsafe(uninit) static SHARED: Mutex<Shared> = Shared {
        attachments: KVec::new(),
        queue: ptr::null_mut(),
    };
}

/// Data shared by all attachments.
struct Shared {
    /// The attachments that exist. The lock is held only to read or change the list.
    attachments: KVec<Arc<Attachment>>,
    /// Runs the late detaches. Valid while the node is registered, and after that until the queue is empty.
    queue: *mut bindings::workqueue_struct,
}

// SAFETY: A workqueue may be used from any thread.
unsafe impl Send for Shared {}

/// The registered importer. Dropped at module unload, when no file and no attachment is left. The work item
/// that dropped the last attachment may not have returned yet.
pub(crate) struct Registered {
    _node: Misc<()>,
    _listening: Listening,
    _queue: OwnQueue,
}

impl Registered {
    /// # Safety
    ///
    /// Called once.
    pub(crate) unsafe fn new() -> Result<Self> {
        // SAFETY: By the caller's promise this is the first and only call.
        unsafe { SHARED.init() };
        let queue = OwnQueue::new(c"peerbuf-importer")?;
        SHARED.lock().queue = queue.raw();
        // Priority 0 runs before exporters whose memory belongs to the same device: those wait for the unmaps
        // done here.
        // SAFETY: The function exists as long as the module.
        let listening = unsafe { Listening::begin(device_changes, 0) }?;
        // SAFETY: The node has no parent.
        let node = unsafe { Misc::register(c"importer", ptr::null_mut(), &NODE_FOPS, ()) }?;
        Ok(Self {
            _node: node,
            _listening: listening,
            _queue: queue,
        })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // A static is never dropped, so this frees the list's memory.
        SHARED.lock().attachments = KVec::new();
    }
}

/// A `notifier_fn_t` of the PCI bus. The driver core holds the lock of the device that changes.
unsafe extern "C" fn device_changes(
    _notifier: *mut bindings::notifier_block,
    action: c_ulong,
    dev: *mut c_void,
) -> c_int {
    const UNBINDS: c_ulong = bindings::bus_notifier_event_BUS_NOTIFY_UNBIND_DRIVER as c_ulong;
    // This event comes before the driver's removal begins, when the device is still intact.
    if action == UNBINDS {
        // No attachment is added meanwhile: that takes the device lock. An attachment that is already
        // detaching is awaited, too, because it unmaps for the device.
        let next = || {
            let shared = SHARED.lock();
            let mut all = shared.attachments.iter();
            let left = |a: &&Arc<Attachment>| a.dev().cast() == dev && !a.has_let_go();
            all.find(left).cloned()
        };
        while let Some(attachment) = next() {
            let _ = attachment.let_go(abi::DEVICE_GONE);
        }
    }
    0 // NOTIFY_DONE
}

/// `file_operations.unlocked_ioctl` of the node.
unsafe extern "C" fn node_ioctl(_file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    let arg = UserPtr::from_addr(arg as usize);
    answer(match cmd {
        abi::IOC_ATTACH => attach(arg),
        _ => Err(ENOTTY),
    })
}

fn answer(result: Result) -> c_long {
    match result {
        Ok(()) => 0,
        Err(e) => e.to_errno() as c_long,
    }
}

fn attach(arg: UserPtr) -> Result {
    let mut request = Argument::<abi::Attach>::read(arg)?;
    let dynamic = request.flags & abi::DYNAMIC != 0;
    let holds = request.on_invalidate == abi::ON_INVALIDATE_HOLD;
    if request.flags & !abi::FLAGS != 0
        || request.fd_flags & !bindings::O_CLOEXEC != 0
        || request.on_invalidate > abi::ON_INVALIDATE_HOLD
        || (request.on_invalidate != 0 && !dynamic)
        || (request.hold_ms != 0 && !holds)
        || request.hold_ms > abi::MAX_MS
        || request.detach_ms > abi::MAX_MS
        || request.fd != 0
        || request.ns != 0
    {
        return Err(EINVAL);
    }
    let pdev = common::find(request.address)?;
    let dmabuf = DmaBuf::get(request.dmabuf)?;
    let manner = Manner {
        flags: request.flags,
        on_invalidate: request.on_invalidate,
        hold_ms: request.hold_ms,
        detach_ms: request.detach_ms,
    };
    let (attachment, ns) = attached(Attachment::new(pdev, dmabuf, manner)?)?;

    // The descriptor is installed last: every step before that can be undone.
    let fd = Fd::reserve(request.fd_flags)?;
    request.ns = ns;
    request.fd = fd.number();
    // SAFETY: The operations are static, and expect this private data.
    let file = from_err_ptr(unsafe {
        ffi::anon_inode_getfile(
            c"[peerbuf-attachment]".as_char_ptr(),
            &ATTACHMENT_FOPS.0,
            Arc::as_ptr(&attachment).cast_mut().cast(),
            bindings::O_RDWR as c_int,
        )
    })?;
    // The file owns the attachment now; its release detaches it.
    let _ = Arc::into_raw(attachment.dismiss());
    if let Err(e) = request.answer() {
        // SAFETY: This is the file's only reference.
        unsafe { bindings::fput(file) };
        return Err(e);
    }
    // SAFETY: This is the file's only reference.
    unsafe { fd.install(file) };
    Ok(())
}

/// Detaches an attachment that has no file yet, when dropped.
type Guard = ScopeGuard<Arc<Attachment>, fn(Arc<Attachment>)>;

/// Attaches, if the device's driver does DMA through the kernel; returns how many nanoseconds that took.
fn attached(attachment: Arc<Attachment>) -> Result<(Guard, u64)> {
    // SAFETY: The attachment keeps the device.
    let _lock = unsafe { DeviceLock::new(attachment.dev()) }?;
    // SAFETY: The attachment keeps the device; the lock keeps the driver as it is.
    if !unsafe { can_import(attachment.dev()) } {
        return Err(ffi::errno(bindings::EUNATCH));
    }
    // Added to the list first: nothing may fail once it is attached.
    SHARED
        .lock()
        .attachments
        .push(attachment.clone(), GFP_KERNEL)?;
    let guard: Guard = ScopeGuard::new_with_data(attachment, give_up);
    // SAFETY: The device lock is held. The attachment is in the list, where the notifier finds it, and the
    // guard, or the file that takes over from it, detaches it.
    let ns = unsafe { guard.as_arc_borrow().attach() }?;
    Ok((guard, ns))
}

/// Whether a device may be an importer: its driver is bound and does DMA through the kernel's DMA API. A
/// driver that manages DMA itself (`vfio-pci`) changes the device's IOMMU domain while it is bound, and a
/// device without bus mastering cannot do DMA.
///
/// # Safety
///
/// `dev` is a PCI device whose lock is held.
unsafe fn can_import(dev: *mut bindings::device) -> bool {
    // SAFETY: `dev` is part of a `struct pci_dev`, by the caller's promise. The driver core sets `dev.driver`
    // before the PCI probe ends; with the device lock held, both drivers stay until the removal is over.
    unsafe {
        let pdev = kernel::container_of!(dev, bindings::pci_dev, dev);
        let driver = (*pdev).driver;
        !(*dev).driver.is_null()
            && !driver.is_null()
            && !(*driver).driver_managed_dma
            && (*pdev).is_busmaster() != 0
    }
}

/// Detaches, and removes the attachment from the list.
fn give_up(attachment: Arc<Attachment>) {
    let _ = attachment.let_go(0);
    let mut shared = SHARED.lock();
    let place = shared
        .attachments
        .iter()
        .position(|a| Arc::ptr_eq(a, &attachment));
    if let Some(place) = place {
        let ours = shared.attachments.remove(place);
        drop(shared);
        drop(ours);
    }
}

/// `file_operations.release` of an attachment.
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `attach` put the reference there, and release consumes it.
    let attachment: Arc<Attachment> =
        unsafe { Arc::from_raw((*file).private_data.cast_const().cast()) };
    let delay = attachment.detach_ms();
    if delay == 0 || attachment.is_gone() {
        give_up(attachment);
        return 0;
    }
    let queue = SHARED.lock().queue;
    // SAFETY: The file holds a module reference until this function has returned. The queue is valid while
    // the module has a reference, and the work item drops the reference taken here.
    unsafe {
        bindings::__module_get(crate::compat::THIS_MODULE.as_ptr());
        // Cannot fail: only release queues the work, and a file is released once.
        let _ = Queue::from_raw(queue)
            .enqueue_delayed::<Arc<Attachment>, 2>(attachment, msecs_to_jiffies(delay));
    }
    0
}

/// The late detach of an attachment that outlives its file.
impl WorkItem<2> for Attachment {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        give_up(this);
        // SAFETY: `release` took the reference. Module unload waits until the queue that runs this work is
        // empty.
        unsafe { bindings::module_put(crate::compat::THIS_MODULE.as_ptr()) };
    }
}

/// `file_operations.unlocked_ioctl` of an attachment.
unsafe extern "C" fn attachment_ioctl(
    file: *mut bindings::file,
    cmd: c_uint,
    arg: c_ulong,
) -> c_long {
    // SAFETY: `attach` put a reference there, which lives as long as the file.
    let this =
        unsafe { ArcBorrow::<Attachment>::from_raw((*file).private_data.cast_const().cast()) };
    let arg = UserPtr::from_addr(arg as usize);
    answer(match cmd {
        abi::IOC_MAP => map(&this, arg),
        abi::IOC_UNMAP => step(arg, || this.unmap()),
        abi::IOC_PIN => step(arg, || this.pin()),
        abi::IOC_UNPIN => step(arg, || this.unpin()),
        abi::IOC_FENCE => leave_fence(&this, arg),
        abi::IOC_SIGNAL => step(arg, || this.signal()),
        abi::IOC_VMAP => step(arg, || this.vmap()),
        abi::IOC_VUNMAP => step(arg, || this.vunmap()),
        abi::IOC_DETACH => step(arg, || this.let_go(0)),
        abi::IOC_QUERY => query(&this, arg),
        _ => Err(ENOTTY),
    })
}

fn step(arg: UserPtr, act: impl FnOnce() -> Result<u64>) -> Result {
    let mut step = Argument::begin(arg, |step: &abi::Step| step.flags == 0 && step.ns == 0)?;
    step.ns = act()?;
    step.deliver();
    Ok(())
}

fn map(this: &Attachment, arg: UserPtr) -> Result {
    let mut request = Argument::begin(arg, |request: &abi::Map| {
        request.flags == 0
            && request.direction <= abi::FROM_DEVICE
            && request.reserved == 0
            && request.ns == 0
    })?;
    let direction = match request.direction {
        abi::TO_DEVICE => DataDirection::ToDevice,
        abi::FROM_DEVICE => DataDirection::FromDevice,
        _ => DataDirection::Bidirectional,
    };
    request.ns = this.map(direction.into())?;
    request.deliver();
    Ok(())
}

fn leave_fence(this: &Attachment, arg: UserPtr) -> Result {
    let request = Argument::<abi::Fence>::read(arg)?;
    if request.flags != 0
        || request.usage > abi::FENCE_BOOKKEEP
        || request.timeout_ms == 0
        || request.timeout_ms > abi::MAX_MS
    {
        return Err(EINVAL);
    }
    this.leave_fence(request.usage, request.timeout_ms)
}

fn query(this: &Attachment, arg: UserPtr) -> Result {
    let mut query = Argument::<abi::Query>::read(arg)?;
    if query.flags != 0 {
        return Err(EINVAL);
    }
    *query = abi::Query {
        size: query.size,
        ..this.query()
    };
    query.answer()
}
