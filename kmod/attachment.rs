// SPDX-License-Identifier: GPL-2.0

//! One attachment of the importer: a dma-buf, attached on behalf of a PCI device.
//!
//! It plays the part of a driver that imports: it maps, is told that the mapping is stale, unmaps,
//! pins, leaves fences, maps into the kernel's address space. It does what the kernel's own
//! importers do (`drivers/infiniband/core/umem_dmabuf.c` above all), except where it was asked to
//! misbehave, and then in the ways that a driver may: too late, but not never. No DMA is ever
//! started, and no byte looked at.
//!
//! # The device
//!
//! The device belongs to another driver. A DMA mapping of it may exist only while that driver is
//! bound: with the driver, the IOMMU domain and the device's place in its group may go, and
//! unmapping needs both. So an attachment is made under the device's lock, after a look that it has a
//! driver; and before that driver's removal begins, also under the device's lock, the driver core
//! tells the importer (`BUS_NOTIFY_UNBIND_DRIVER`), which then lets go of the device's attachments
//! ([`Attachment::let_go`]). A device that is unplugged loses its driver first, so that this covers it
//! too. The reference to the device is for its address alone, until the file is closed.
//!
//! # Locks, outermost first
//!
//! 1. the device's lock, where the driver core or the attaching holds it;
//! 2. [`Attachment::control`]: one call at a time, except for the query and the signalling;
//! 3. the reservation lock of the dma-buf: [`State`];
//! 4. [`Attachment::seen`], for as long as it takes to read or write it.
//!
//! An invalidation comes in with the third held. The fence is a pointer that is taken in one step,
//! so that it can be signalled while somebody waits for it with any of these locks held.

use core::{cell::Cell, ptr, ptr::NonNull};

use kernel::{
    bindings, container_of,
    dma::DataDirection,
    error::{from_err_ptr, to_result},
    ffi::*,
    impl_has_delayed_work, new_delayed_work, new_mutex, pci,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{Atomic, Full, Relaxed},
        Arc, ArcBorrow, Mutex,
    },
    time::{msecs_to_jiffies, Instant, Monotonic},
    types::Opaque,
    workqueue::{self, DelayedWork, HasWork, Work, WorkItem},
};

use crate::{
    abi,
    common::{self, DmaBuf},
    ffi::{self, Table},
    route::Report,
};

/// Takes peer memory, and can be told that it went away.
static PEER: Table<bindings::dma_buf_attach_ops> = Table(bindings::dma_buf_attach_ops {
    allow_peer2peer: true,
    invalidate_mappings: Some(invalidate),
});

/// Can be told, but cannot use peer memory.
static SYSTEM: Table<bindings::dma_buf_attach_ops> = Table(bindings::dma_buf_attach_ops {
    allow_peer2peer: false,
    invalidate_mappings: Some(invalidate),
});

/// Takes peer memory and cannot be told, so it has to pin.
static DEAF: Table<bindings::dma_buf_attach_ops> = Table(bindings::dma_buf_attach_ops {
    allow_peer2peer: true,
    invalidate_mappings: None,
});

/// No operation is needed beyond the two that every fence must have. The kernel forgets the table
/// when the fence signals, and each has signalled before its attachment lets the module go.
static FENCE_OPS: Table<bindings::dma_fence_ops> = Table(bindings::dma_fence_ops {
    get_driver_name: Some(fence_name),
    get_timeline_name: Some(fence_name),
    // SAFETY: Null function pointers are operations that the fence does not have.
    ..unsafe { core::mem::zeroed() }
});

unsafe extern "C" fn fence_name(_fence: *mut bindings::dma_fence) -> *const c_char {
    c"peerbuf-importer".as_char_ptr()
}

/// How an attachment behaves; checked by the importer.
pub(crate) struct Manner {
    /// `abi::DYNAMIC`, `abi::PEER`.
    pub(crate) flags: u32,
    /// `abi::ON_INVALIDATE_*`.
    pub(crate) on_invalidate: u32,
    /// Zero: until told.
    pub(crate) hold_ms: u32,
    /// How long it outlives its file.
    pub(crate) detach_ms: u32,
}

impl Manner {
    /// Null for a static attachment.
    fn ops(&self) -> *const bindings::dma_buf_attach_ops {
        match self.flags {
            0 => ptr::null(),
            abi::DYNAMIC => &SYSTEM.0,
            abi::PEER => &DEAF.0,
            _ => &PEER.0,
        }
    }

    fn is_static(&self) -> bool {
        self.flags == 0
    }

    /// Has operations, but none to be told by.
    fn is_deaf(&self) -> bool {
        self.flags == abi::PEER
    }
}

/// What the reservation lock guards. Cells, because an exporter may move the buffer, and so call
/// [`invalidate`], while it is asked to pin or to map it with the lock held.
struct State {
    /// Taken out when the attachment lets go.
    attach: Cell<Option<NonNull<bindings::dma_buf_attachment>>>,
    /// The mapping, or null.
    sgt: Cell<*mut bindings::sg_table>,
    direction: Cell<bindings::dma_data_direction>,
    /// A mapping was asked for and not given up since, so it may be made again.
    wanted: Cell<bool>,
    pinned: Cell<bool>,
}

impl State {
    fn attach(&self) -> Option<*mut bindings::dma_buf_attachment> {
        self.attach.get().map(NonNull::as_ptr)
    }
}

/// What [`Attachment::control`] guards.
struct Control {
    /// The mapping in the kernel's address space.
    vmap: Option<bindings::iosys_map>,
    /// The last fence's number.
    seqno: u64,
}

/// An attachment; see the top of this file.
#[pin_data]
pub(crate) struct Attachment {
    pdev: ARef<pci::Device>,
    dmabuf: DmaBuf,
    manner: Manner,
    #[pin]
    control: Mutex<Control>,
    /// Guarded by the dma-buf's reservation lock.
    state: State,
    /// What the query answers, kept up to date by whoever changes something.
    #[pin]
    seen: Mutex<abi::Query>,
    /// The fence that has not signalled, with a reference; or null. Whoever takes it signals it.
    fence: Atomic<*mut bindings::dma_fence>,
    fence_context: u64,
    /// Not zero once it has let go.
    has_let_go: Atomic<i32>,
    /// Signals the fence when its time is over.
    #[pin]
    fence_timer: Opaque<bindings::timer_list>,
    /// Unmaps what was held, or maps again.
    #[pin]
    later: DelayedWork<Self, 1>,
    /// Lets go of an attachment whose file is closed.
    #[pin]
    late_detach: DelayedWork<Self, 2>,
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self, 1> for Attachment { self.later }
    impl HasDelayedWork<Self, 2> for Attachment { self.late_detach }
}

// SAFETY: The pointers are to objects that are kept until the attachment is dropped or lets go, and
// that any thread may use, like the cells, under the locks named with the fields.
unsafe impl Send for Attachment {}
// SAFETY: As for `Send`.
unsafe impl Sync for Attachment {}

/// ENOTCONN, for which the kernel's Rust code has no constant.
fn not_connected() -> Error {
    ffi::errno(bindings::ENOTCONN)
}

/// Nanoseconds that a call took, and its result.
fn timed<T>(call: impl FnOnce() -> T) -> (T, u64) {
    let start = Instant::<Monotonic>::now();
    let result = call();
    (result, start.elapsed().as_nanos() as u64)
}

impl Attachment {
    /// Describes an attachment that is not made yet; see [`Attachment::attach`].
    pub(crate) fn new(
        pdev: ARef<pci::Device>,
        dmabuf: DmaBuf,
        manner: Manner,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                pdev,
                dmabuf,
                manner,
                control <- new_mutex!(Control { vmap: None, seqno: 0 }),
                state: State {
                    attach: Cell::new(None),
                    sgt: Cell::new(ptr::null_mut()),
                    direction: Cell::new(DataDirection::None.into()),
                    wanted: Cell::new(false),
                    pinned: Cell::new(false),
                },
                seen <- new_mutex!(abi::Query {
                    size: size_of::<abi::Query>() as u32,
                    ..Default::default()
                }),
                fence: Atomic::new(ptr::null_mut()),
                // SAFETY: It only counts.
                fence_context: unsafe { bindings::dma_fence_context_alloc(1) },
                has_let_go: Atomic::new(0),
                fence_timer <- Opaque::ffi_init(|slot: *mut bindings::timer_list| {
                    // SAFETY: `slot` is valid for writes, and pinned.
                    unsafe {
                        bindings::timer_init_key(
                            slot,
                            Some(fence_is_late),
                            0,
                            c"peerbuf-fence".as_char_ptr(),
                            kernel::static_lock_class!().as_ptr(),
                        )
                    };
                }),
                later <- new_delayed_work!("peerbuf::Attachment::later"),
                late_detach <- new_delayed_work!("peerbuf::Attachment::late_detach"),
            }),
            GFP_KERNEL,
        )
    }

    /// Attaches, and says how long the dma-buf core and the exporter took. Called once.
    ///
    /// # Safety
    ///
    /// The caller holds the lock of the device, which has a driver, and has seen to it that
    /// [`Attachment::let_go`] is called before that driver is removed. It is called in any case
    /// before `self` is dropped.
    pub(crate) unsafe fn attach(self: ArcBorrow<'_, Self>) -> Result<u64> {
        let priv_: *const Self = &*self;
        let dev = self.dev();
        // SAFETY: Both are valid, and the operations are static. `priv_` is valid until the
        // attachment is detached, since `let_go` is called before `self` is dropped.
        let (attach, ns) = timed(|| unsafe {
            bindings::dma_buf_dynamic_attach(
                self.dmabuf.raw(),
                dev,
                self.manner.ops(),
                priv_.cast_mut().cast(),
            )
        });
        let attach = from_err_ptr(attach)?;
        self.lock().attach.set(NonNull::new(attach));
        Ok(ns)
    }

    /// The device on whose behalf it is attached.
    pub(crate) fn dev(&self) -> *mut bindings::device {
        // SAFETY: It is the address of a field of a valid `struct pci_dev`.
        unsafe { &raw mut (*self.pdev()).dev }
    }

    fn resv(&self) -> *mut bindings::dma_resv {
        // SAFETY: The reference keeps it.
        unsafe { (*self.dmabuf.raw()).resv }
    }

    fn pdev(&self) -> *mut bindings::pci_dev {
        common::raw(&*self.pdev)
    }

    pub(crate) fn detach_ms(&self) -> u32 {
        self.manner.detach_ms
    }

    /// Whether it has let go, or is about to.
    pub(crate) fn is_gone(&self) -> bool {
        self.seen.lock().state & abi::DETACHED != 0
    }

    /// Answers `abi::IOC_QUERY`.
    pub(crate) fn query(&self) -> abi::Query {
        let mut answer = *self.seen.lock();
        if !self.fence.load(Relaxed).is_null() {
            answer.state |= abi::FENCED;
        }
        answer
    }

    fn note(&self, set: u32, clear: u32) {
        let mut seen = self.seen.lock();
        seen.state = seen.state & !clear | set;
    }

    fn lock(&self) -> LockedState<'_> {
        // SAFETY: The dma-buf is valid, and its lock is not held. Without an acquire context this
        // cannot fail.
        unsafe { bindings::dma_resv_lock(self.resv(), ptr::null_mut()) };
        LockedState(self)
    }

    /// Maps. Errors: those of `abi::Map`.
    pub(crate) fn map(&self, direction: bindings::dma_data_direction) -> Result<u64> {
        let _control = self.control.lock();
        let state = self.lock();
        if state.attach().is_none() {
            return Err(not_connected());
        }
        if !state.sgt.get().is_null() {
            return Err(EBUSY);
        }
        if self.manner.is_deaf() && !state.pinned.get() {
            return Err(EINVAL);
        }
        let ns = self.map_locked(&state, direction)?;
        state.wanted.set(true);
        Ok(ns)
    }

    /// Makes a mapping where there is none.
    fn map_locked(&self, state: &State, direction: bindings::dma_data_direction) -> Result<u64> {
        let attach = state.attach().ok_or_else(not_connected)?;
        // SAFETY: The attachment is valid until it is taken out of the state, and the caller holds
        // the reservation lock. The same for what follows.
        let (sgt, ns) = timed(|| unsafe { bindings::dma_buf_map_attachment(attach, direction) });
        let sgt = from_err_ptr(sgt)?;
        // The addresses are there, the bytes maybe not yet. The core waits for static importers.
        if !self.manner.is_static() {
            // SAFETY: As above.
            let left = unsafe {
                bindings::dma_resv_wait_timeout(
                    self.resv(),
                    bindings::dma_resv_usage_DMA_RESV_USAGE_KERNEL,
                    true,
                    msecs_to_jiffies(30_000),
                )
            };
            if left <= 0 {
                // SAFETY: As above.
                unsafe { bindings::dma_buf_unmap_attachment(attach, sgt, direction) };
                return Err(match left {
                    0 => ETIMEDOUT,
                    e => Error::from_errno(e as c_int),
                });
            }
        }
        state.sgt.set(sgt);
        state.direction.set(direction);
        // SAFETY: The mapping was just made. The device has its driver: `let_go`, which comes before
        // that driver's removal, takes the attachment out under this lock.
        let report = unsafe { Report::of(self.pdev(), sgt) };
        let mut seen = self.seen.lock();
        seen.state = seen.state & !abi::STALE | abi::MAPPED;
        seen.segments = report.segments;
        seen.bytes = report.bytes();
        seen.system_bytes = report.system;
        seen.bus_bytes = report.bus;
        seen.bridge_bytes = report.bridge;
        seen.other_bytes = report.other;
        seen.provider = report.provider;
        seen.maps += 1;
        seen.map_ns = ns;
        Ok(ns)
    }

    /// Unmaps what the user had mapped. ENOENT where there is nothing.
    pub(crate) fn unmap(&self) -> Result<u64> {
        let _control = self.control.lock();
        let state = self.lock();
        // Even if it is gone at the moment: it is not to come back.
        state.wanted.set(false);
        self.unmap_locked(&state).ok_or(ENOENT)
    }

    fn unmap_locked(&self, state: &State) -> Option<u64> {
        if state.sgt.get().is_null() {
            return None;
        }
        let attach = state.attach()?;
        // SAFETY: The table came from mapping this attachment, both are valid, and the caller holds
        // the reservation lock.
        let ((), ns) = timed(|| unsafe {
            bindings::dma_buf_unmap_attachment(attach, state.sgt.get(), state.direction.get())
        });
        state.sgt.set(ptr::null_mut());
        self.note(0, abi::MAPPED | abi::STALE);
        Some(ns)
    }

    /// Called by the exporter, with the reservation lock held.
    fn invalidated(self: ArcBorrow<'_, Self>) {
        let state = &self.state;
        self.seen.lock().invalidations += 1;
        if state.sgt.get().is_null() {
            return;
        }
        let delay = match self.manner.on_invalidate {
            abi::ON_INVALIDATE_HOLD => {
                self.note(abi::STALE, 0);
                match self.manner.hold_ms {
                    0 => return,
                    ms => msecs_to_jiffies(ms),
                }
            }
            // As InfiniBand's importer does it: the unmapping is part of the call.
            abi::ON_INVALIDATE_REMAP => {
                self.unmap_locked(state);
                0
            }
            _ => {
                self.unmap_locked(state);
                return;
            }
        };
        // A new mapping is not made in the call, during which the exporter is between two states:
        // amdgpu and mlx5 map again when their device next needs the buffer.
        // If it is queued already, it will see the state as it is then.
        let _ = workqueue::system_unbound().enqueue_delayed::<Arc<Self>, 1>(self.into(), delay);
    }

    /// Some time after an invalidation.
    fn catch_up(&self) {
        let state = self.lock();
        if self.manner.on_invalidate == abi::ON_INVALIDATE_HOLD {
            // It may have been unmapped and mapped again by the user meanwhile.
            if self.seen.lock().state & abi::STALE != 0 {
                self.unmap_locked(&state);
            }
        } else if state.wanted.get() && state.sgt.get().is_null() && state.attach().is_some() {
            let direction = state.direction.get();
            let answer = self.map_locked(&state, direction);
            let mut seen = self.seen.lock();
            match answer {
                Ok(_) => {
                    seen.remaps += 1;
                    seen.remap_error = 0;
                }
                Err(e) => seen.remap_error = e.to_errno().unsigned_abs(),
            }
        }
    }

    /// Errors: those of `abi::IOC_PIN`.
    pub(crate) fn pin(&self) -> Result<u64> {
        let _control = self.control.lock();
        let state = self.lock();
        let attach = state.attach().ok_or_else(not_connected)?;
        if self.manner.is_static() {
            return Err(EINVAL);
        }
        if state.pinned.get() {
            return Err(EBUSY);
        }
        // SAFETY: The attachment is valid and has operations; the reservation lock is held.
        let (answer, ns) = timed(|| unsafe { bindings::dma_buf_pin(attach) });
        to_result(answer)?;
        state.pinned.set(true);
        self.note(abi::PINNED, 0);
        Ok(ns)
    }

    /// Errors: those of `abi::IOC_UNPIN`.
    pub(crate) fn unpin(&self) -> Result<u64> {
        let _control = self.control.lock();
        let state = self.lock();
        if state.attach().is_none() {
            return Err(not_connected());
        }
        if self.manner.is_deaf() && !state.sgt.get().is_null() {
            return Err(EBUSY);
        }
        self.unpin_locked(&state).ok_or(ENOENT)
    }

    fn unpin_locked(&self, state: &State) -> Option<u64> {
        if !state.pinned.get() {
            return None;
        }
        let attach = state.attach()?;
        // SAFETY: The attachment is valid and pinned; the caller holds the reservation lock.
        let ((), ns) = timed(|| unsafe { bindings::dma_buf_unpin(attach) });
        state.pinned.set(false);
        self.note(0, abi::PINNED);
        Some(ns)
    }

    /// Errors: those of `abi::IOC_VMAP`.
    ///
    /// The core says WARN when an exporter cannot do it, which a caller of this must not be able to
    /// bring about at will. So it is tried only where a mapping for the device shows that the
    /// buffer is to be had, all of it in one place; the lock keeps it so. What is left is an
    /// exporter that runs out of memory, or that would have to move what is pinned.
    pub(crate) fn vmap(&self) -> Result<u64> {
        let mut control = self.control.lock();
        if control.vmap.is_some() {
            return Err(EBUSY);
        }
        let state = self.lock();
        let attach = state.attach().ok_or_else(not_connected)?;
        // SAFETY: The dma-buf is valid.
        if unsafe { (*(*self.dmabuf.raw()).ops).vmap }.is_none() {
            return Err(EINVAL);
        }
        let direction = DataDirection::Bidirectional.into();
        // SAFETY: The attachment is valid and the reservation lock held; the device has its driver,
        // as in `map_locked`.
        let report = unsafe {
            let sgt = from_err_ptr(bindings::dma_buf_map_attachment(attach, direction))?;
            let report = Report::of(self.pdev(), sgt);
            bindings::dma_buf_unmap_attachment(attach, sgt, direction);
            report
        };
        if report.system != 0 && report.system != report.bytes() {
            return Err(ffi::errno(bindings::EOPNOTSUPP));
        }
        let mut map = bindings::iosys_map::default();
        // SAFETY: The dma-buf is valid and its reservation lock is held.
        let (answer, ns) = timed(|| unsafe { bindings::dma_buf_vmap(self.dmabuf.raw(), &mut map) });
        to_result(answer)?;
        drop(state);
        let iomem = if map.is_iomem { abi::VMAP_IOMEM } else { 0 };
        control.vmap = Some(map);
        self.note(abi::VMAPPED | iomem, 0);
        Ok(ns)
    }

    /// Errors: those of `abi::IOC_VUNMAP`.
    pub(crate) fn vunmap(&self) -> Result<u64> {
        self.vunmap_locked(&mut self.control.lock()).ok_or(ENOENT)
    }

    fn vunmap_locked(&self, control: &mut Control) -> Option<u64> {
        let mut map = control.vmap.take()?;
        // SAFETY: The mapping came from the dma-buf, which is valid and whose reservation lock is
        // not held.
        let ((), ns) =
            timed(|| unsafe { bindings::dma_buf_vunmap_unlocked(self.dmabuf.raw(), &mut map) });
        self.note(0, abi::VMAPPED | abi::VMAP_IOMEM);
        Some(ns)
    }

    /// Leaves a fence. Errors: those of `abi::Fence`.
    pub(crate) fn leave_fence(&self, usage: u32, timeout_ms: u32) -> Result {
        let mut control = self.control.lock();
        if self.is_gone() {
            return Err(not_connected());
        }
        if !self.fence.load(Relaxed).is_null() {
            return Err(EBUSY);
        }
        let fence = KBox::into_raw(KBox::new(
            Opaque::<bindings::dma_fence>::uninit(),
            GFP_KERNEL,
        )?);
        let fence: *mut bindings::dma_fence = fence.cast();
        control.seqno += 1;
        // SAFETY: There is room for a fence. Without a lock of ours it uses its own. It is freed by
        // the kernel, by `kfree`, with its last reference.
        unsafe {
            bindings::dma_fence_init(
                fence,
                &FENCE_OPS.0,
                ptr::null_mut(),
                self.fence_context,
                control.seqno,
            )
        };
        // The time of an earlier fence must not end this one.
        // SAFETY: Initialised with `self`; its function takes no lock.
        unsafe { bindings::timer_delete_sync(self.fence_timer.get()) };
        {
            let _state = self.lock();
            // SAFETY: The reservation object is valid and locked, and the fence is initialised.
            let added = unsafe {
                let resv = self.resv();
                to_result(bindings::dma_resv_reserve_fences(resv, 1))
                    .map(|()| bindings::dma_resv_add_fence(resv, fence, usage))
            };
            if let Err(e) = added {
                // SAFETY: Nobody else knows the fence, and this is its only reference.
                unsafe {
                    bindings::dma_fence_signal(fence);
                    ffi::peerbuf_dma_fence_put(fence);
                }
                return Err(e);
            }
        }
        // The only reference that `dma_fence_init` gave goes into the field.
        self.fence.store(fence, kernel::sync::atomic::Release);
        // SAFETY: The timer is initialised, and `let_go` ends it before `self` is dropped.
        unsafe {
            let now = (&raw const bindings::jiffies).read_volatile();
            bindings::mod_timer(
                self.fence_timer.get(),
                now.wrapping_add(msecs_to_jiffies(timeout_ms)),
            )
        };
        Ok(())
    }

    /// Signals the fence. ENOENT where there is none. Takes no lock.
    pub(crate) fn signal(&self) -> Result<u64> {
        let fence = self.fence.xchg(ptr::null_mut(), Full);
        if fence.is_null() {
            return Err(ENOENT);
        }
        // SAFETY: The field's reference is ours now.
        let ((), ns) = timed(|| unsafe { bindings::dma_fence_signal(fence) });
        // SAFETY: As above.
        unsafe { ffi::peerbuf_dma_fence_put(fence) };
        Ok(ns)
    }

    /// Whether it has let go, and is not just about to.
    pub(crate) fn has_let_go(&self) -> bool {
        self.has_let_go.load(Relaxed) != 0
    }

    /// Lets go of the buffer and of the device, whatever it was told to hold. Nothing happens if it
    /// has done so before; returns how long the detaching took.
    ///
    /// `why` is zero or `abi::DEVICE_GONE`. May sleep, for as long as others hold the
    /// reservation lock.
    pub(crate) fn let_go(&self, why: u32) -> Result<u64> {
        // Others may be waiting for the fence with locks held that are needed below.
        self.note(abi::DETACHED | why, 0);
        let _ = self.signal();
        let mut control = self.control.lock();
        // Once more: this lock was given up by whoever left a fence meanwhile, and none comes after.
        let _ = self.signal();
        let attach = {
            let state = self.lock();
            state.wanted.set(false);
            self.unmap_locked(&state);
            self.unpin_locked(&state);
            state.attach.take()
        };
        self.vunmap_locked(&mut control);
        let Some(attach) = attach else {
            // Before, or it was never made.
            self.has_let_go.store(1, Relaxed);
            return Err(not_connected());
        };
        // SAFETY: It is an attachment of this dma-buf, nobody else detaches it, and the reservation
        // lock is not held.
        let ((), ns) =
            timed(|| unsafe { bindings::dma_buf_detach(self.dmabuf.raw(), attach.as_ptr()) });
        // From here on nobody invalidates, so nothing is queued any more.
        // SAFETY: Both are initialised. What they run takes neither of the locks held here: the
        // work takes the reservation lock, the timer none.
        unsafe {
            let this: *const Self = self;
            let work = Work::raw_get(<Self as HasWork<Self, 1>>::raw_get_work(this.cast_mut()));
            if bindings::cancel_delayed_work_sync(container_of!(work, bindings::delayed_work, work))
            {
                // It was queued and will not run, so the reference that it had is ours.
                drop(Arc::from_raw(this));
            }
            bindings::timer_delete_sync(self.fence_timer.get());
        }
        self.has_let_go.store(1, Relaxed);
        Ok(ns)
    }
}

/// The state, with the reservation lock held.
struct LockedState<'a>(&'a Attachment);

impl core::ops::Deref for LockedState<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.0.state
    }
}

impl Drop for LockedState<'_> {
    fn drop(&mut self) {
        // SAFETY: `Attachment::lock` has taken it.
        unsafe { bindings::dma_resv_unlock(self.0.resv()) };
    }
}

/// `dma_buf_attach_ops.invalidate_mappings`. The reservation lock is held by the caller.
unsafe extern "C" fn invalidate(attach: *mut bindings::dma_buf_attachment) {
    // SAFETY: `importer_priv` was put there by `attach`: a pointer into an `Arc` that is kept until
    // the attachment is detached.
    let this =
        unsafe { ArcBorrow::<Attachment>::from_raw((*attach).importer_priv.cast_const().cast()) };
    this.invalidated();
}

/// The fence's time is over. In the timer interrupt.
unsafe extern "C" fn fence_is_late(timer: *mut bindings::timer_list) {
    let field = Opaque::<bindings::timer_list>::cast_from(timer);
    // SAFETY: The timer is part of an attachment, which `let_go` keeps until the timer has ended.
    let this = unsafe { &*container_of!(field, Attachment, fence_timer) };
    let _ = this.signal();
}

impl WorkItem<1> for Attachment {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.catch_up();
    }
}
