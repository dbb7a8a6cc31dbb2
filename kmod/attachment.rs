// SPDX-License-Identifier: GPL-2.0

//! One attachment of the test importer: a dma-buf attached on behalf of a PCI device.
//!
//! An attachment acts as an importing driver: it maps, unmaps, pins, adds fences, maps into the kernel's
//! address space (vmap), and handles invalidations. It behaves as the kernel's own importers do
//! (`drivers/infiniband/core/umem_dmabuf.c` above all), except where its creator asked for misbehaviour; then
//! it misbehaves as a driver may, too late but not never. It neither starts DMA nor reads a byte.
//!
//! # The device
//!
//! The device belongs to another driver. A DMA mapping for it may exist only while that driver is bound:
//! unmapping needs the IOMMU domain and the device's IOMMU group, and both may go with the driver. So an
//! attachment is made with the device lock held, after a check that the device has a driver. Before the
//! driver's removal begins, also with the device lock held, the driver core calls the importer's notifier
//! (`BUS_NOTIFY_UNBIND_DRIVER`), which detaches the device's attachments ([`Attachment::let_go`]). This
//! covers hot-unplug, too, where the device loses its driver first. After that, the reference to the device
//! serves only to keep its address unique, until the file is closed.
//!
//! # Lock order
//!
//! Outermost first:
//!
//! 1. the device lock, held by the driver core, or while attaching;
//! 2. [`Attachment::control`]: serialises all ioctls except the query and the signal;
//! 3. the reservation lock of the dma-buf: guards [`State`];
//! 4. [`Attachment::seen`], held only to read or write it.
//!
//! An invalidation arrives with the third lock held. The fence is an atomic pointer that is taken in one
//! step, so it can be signalled while other tasks hold any of these locks and wait for it.

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

/// Accepts peer memory, and can be invalidated.
static PEER: Table<bindings::dma_buf_attach_ops> = Table(bindings::dma_buf_attach_ops {
    allow_peer2peer: true,
    invalidate_mappings: Some(invalidate),
});

/// Can be invalidated, but does not accept peer memory.
static SYSTEM: Table<bindings::dma_buf_attach_ops> = Table(bindings::dma_buf_attach_ops {
    allow_peer2peer: false,
    invalidate_mappings: Some(invalidate),
});

/// Accepts peer memory and cannot be invalidated, so it must pin.
static DEAF: Table<bindings::dma_buf_attach_ops> = Table(bindings::dma_buf_attach_ops {
    allow_peer2peer: true,
    invalidate_mappings: None,
});

/// A fence needs no operations beyond the two mandatory ones. The kernel stops using the table when the fence
/// signals, and each fence signals before its attachment drops its module reference.
static FENCE_OPS: Table<bindings::dma_fence_ops> = Table(bindings::dma_fence_ops {
    get_driver_name: Some(fence_name),
    get_timeline_name: Some(fence_name),
    // SAFETY: A null function pointer means that the fence lacks the operation.
    ..unsafe { core::mem::zeroed() }
});

unsafe extern "C" fn fence_name(_fence: *mut bindings::dma_fence) -> *const c_char {
    c"peerbuf-importer".as_char_ptr()
}

/// An attachment's behaviour; `importer.rs` has validated it.
pub(crate) struct Manner {
    /// `abi::DYNAMIC`, `abi::PEER`.
    pub(crate) flags: u32,
    /// `abi::ON_INVALIDATE_*`.
    pub(crate) on_invalidate: u32,
    /// Delay of the unmap after an invalidation; zero means until an explicit unmap.
    pub(crate) hold_ms: u32,
    /// Delay of the detach after the file's release.
    pub(crate) detach_ms: u32,
}

impl Manner {
    /// The importer operations; null for a static attachment.
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

    /// Whether it has operations, but none for invalidation.
    fn is_deaf(&self) -> bool {
        self.flags == abi::PEER
    }
}

/// The state that the reservation lock guards. The fields are cells because an exporter may move the buffer,
/// and so call [`invalidate`], inside pin or map, with the lock held.
struct State {
    /// `None` before attach and after detach.
    attach: Cell<Option<NonNull<bindings::dma_buf_attachment>>>,
    /// The mapping's table, or null.
    sgt: Cell<*mut bindings::sg_table>,
    direction: Cell<bindings::dma_data_direction>,
    /// The user has mapped and not unmapped since, so a mapping may be remade after an invalidation.
    wanted: Cell<bool>,
    pinned: Cell<bool>,
}

impl State {
    fn attach(&self) -> Option<*mut bindings::dma_buf_attachment> {
        self.attach.get().map(NonNull::as_ptr)
    }
}

/// The state that [`Attachment::control`] guards.
struct Control {
    /// The mapping in the kernel's address space.
    vmap: Option<bindings::iosys_map>,
    /// The sequence number of the last fence.
    seqno: u64,
}

/// An attachment; see the head of this file.
#[pin_data]
pub(crate) struct Attachment {
    pdev: ARef<pci::Device>,
    dmabuf: DmaBuf,
    manner: Manner,
    #[pin]
    control: Mutex<Control>,
    /// Guarded by the dma-buf's reservation lock.
    state: State,
    /// The query's answer; every change updates it.
    #[pin]
    seen: Mutex<abi::Query>,
    /// The unsignalled fence, with a reference; or null. The taker of the pointer signals the fence.
    fence: Atomic<*mut bindings::dma_fence>,
    fence_context: u64,
    /// Nonzero once the attachment is detached.
    has_let_go: Atomic<i32>,
    /// Signals the fence after its timeout.
    #[pin]
    fence_timer: Opaque<bindings::timer_list>,
    /// Unmaps a mapping held after an invalidation, or maps again.
    #[pin]
    later: DelayedWork<Self, 1>,
    /// Detaches an attachment whose file is closed.
    #[pin]
    late_detach: DelayedWork<Self, 2>,
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self, 1> for Attachment { self.later }
    impl HasDelayedWork<Self, 2> for Attachment { self.late_detach }
}

// SAFETY: The pointers refer to objects that live until the attachment is dropped or detached and that any
// thread may use. The cells are used only with the lock named at their field held.
unsafe impl Send for Attachment {}
// SAFETY: Shared state is atomic or guarded by the lock named at its field.
unsafe impl Sync for Attachment {}

/// ENOTCONN, for which the kernel's Rust code has no constant.
fn not_connected() -> Error {
    ffi::errno(bindings::ENOTCONN)
}

/// Runs `call`; returns its result and the nanoseconds it took.
fn timed<T>(call: impl FnOnce() -> T) -> (T, u64) {
    let start = Instant::<Monotonic>::now();
    let result = call();
    (result, start.elapsed().as_nanos() as u64)
}

impl Attachment {
    /// A new object, not yet attached; see [`Attachment::attach`].
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
                    provider: abi::PROVIDER_NONE,
                    ..Default::default()
                }),
                fence: Atomic::new(ptr::null_mut()),
                // SAFETY: Increments a counter.
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

    /// Attaches; returns how many nanoseconds the dma-buf core and the exporter took. Called once.
    ///
    /// # Safety
    ///
    /// The caller holds the lock of the device, which has a driver, and ensures that [`Attachment::let_go`]
    /// is called before that driver is removed, and in any case before `self` is dropped.
    pub(crate) unsafe fn attach(self: ArcBorrow<'_, Self>) -> Result<u64> {
        let priv_: *const Self = &*self;
        let dev = self.dev();
        // SAFETY: The dma-buf and the device are valid, and the operations are static. `priv_` is valid until
        // the detach, since `let_go` is called before `self` is dropped.
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

    /// The device for which the buffer is attached.
    pub(crate) fn dev(&self) -> *mut bindings::device {
        // SAFETY: The address of a field of a valid `struct pci_dev`.
        unsafe { &raw mut (*self.pdev()).dev }
    }

    fn resv(&self) -> *mut bindings::dma_resv {
        // SAFETY: The reference keeps the dma-buf.
        unsafe { (*self.dmabuf.raw()).resv }
    }

    fn pdev(&self) -> *mut bindings::pci_dev {
        common::raw(&*self.pdev)
    }

    pub(crate) fn detach_ms(&self) -> u32 {
        self.manner.detach_ms
    }

    /// Whether a detach has begun or is over.
    pub(crate) fn is_gone(&self) -> bool {
        self.seen.lock().state & abi::DETACHED != 0
    }

    /// The answer to `abi::IOC_QUERY`.
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
        // SAFETY: The dma-buf is valid, and this task does not hold its lock. Without an acquire context the
        // call cannot fail.
        unsafe { bindings::dma_resv_lock(self.resv(), ptr::null_mut()) };
        LockedState(self)
    }

    /// Maps the buffer. Errors: those of `abi::Map`.
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

    /// Makes a mapping; there is none.
    fn map_locked(&self, state: &State, direction: bindings::dma_data_direction) -> Result<u64> {
        let attach = state.attach().ok_or_else(not_connected)?;
        // SAFETY: The attachment is valid until it is taken out of the state, and the caller holds the
        // reservation lock.
        let (sgt, ns) = timed(|| unsafe { bindings::dma_buf_map_attachment(attach, direction) });
        let sgt = from_err_ptr(sgt)?;
        // The addresses are valid, but a move may still be copying the bytes. For static importers the core
        // waits.
        if !self.manner.is_static() {
            // SAFETY: The reservation object is valid, and the caller holds its lock.
            let left = unsafe {
                bindings::dma_resv_wait_timeout(
                    self.resv(),
                    bindings::dma_resv_usage_DMA_RESV_USAGE_KERNEL,
                    true,
                    msecs_to_jiffies(30_000),
                )
            };
            if left <= 0 {
                // SAFETY: The table was mapped above, and the caller holds the reservation lock.
                unsafe { bindings::dma_buf_unmap_attachment(attach, sgt, direction) };
                return Err(match left {
                    0 => ETIMEDOUT,
                    e => Error::from_errno(e as c_int),
                });
            }
        }
        state.sgt.set(sgt);
        state.direction.set(direction);
        // SAFETY: The mapping was made above. The device still has its driver: `let_go`, which comes before
        // the driver's removal, takes the attachment out of the state with this lock held.
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

    /// Unmaps the user's mapping. ENOENT if there is none.
    pub(crate) fn unmap(&self) -> Result<u64> {
        let _control = self.control.lock();
        let state = self.lock();
        // Cleared even if an invalidation has unmapped it: it must not be mapped again.
        state.wanted.set(false);
        self.unmap_locked(&state).ok_or(ENOENT)
    }

    fn unmap_locked(&self, state: &State) -> Option<u64> {
        if state.sgt.get().is_null() {
            return None;
        }
        let attach = state.attach()?;
        // SAFETY: The table was mapped for this attachment, both are valid, and the caller holds the
        // reservation lock.
        let ((), ns) = timed(|| unsafe {
            bindings::dma_buf_unmap_attachment(attach, state.sgt.get(), state.direction.get())
        });
        state.sgt.set(ptr::null_mut());
        self.note(0, abi::MAPPED | abi::STALE);
        Some(ns)
    }

    /// Handles an invalidation. The exporter holds the reservation lock.
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
            // Like InfiniBand's importer, it unmaps within the callback.
            abi::ON_INVALIDATE_REMAP => {
                self.unmap_locked(state);
                0
            }
            _ => {
                self.unmap_locked(state);
                return;
            }
        };
        // It does not map again within the callback, while the exporter is between two placements: amdgpu and
        // mlx5 map again when their device next needs the buffer. If the work is already queued, it will see
        // the state as it is when it runs.
        let _ = workqueue::system_unbound().enqueue_delayed::<Arc<Self>, 1>(self.into(), delay);
    }

    /// The delayed part of an invalidation.
    fn catch_up(&self) {
        let state = self.lock();
        if self.manner.on_invalidate == abi::ON_INVALIDATE_HOLD {
            // The user may have unmapped and mapped again meanwhile.
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

    /// Pins the buffer. Errors: those of `abi::IOC_PIN`.
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

    /// Unpins the buffer. Errors: those of `abi::IOC_UNPIN`.
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

    /// Maps the buffer into the kernel's address space. Errors: those of `abi::IOC_VMAP`.
    ///
    /// The core WARNs if an exporter's vmap fails, and a caller must not be able to cause that at will. So
    /// the function first maps the buffer for the device, which shows that the buffer is accessible and
    /// entirely in one place; the lock keeps it so. The remaining failures are an exporter out of memory, or
    /// one that would have to move a pinned buffer.
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
        // SAFETY: The attachment is valid and the reservation lock held; so the device has its driver, since
        // `let_go` takes the attachment out of the state, with this lock held, before the driver's removal.
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

    /// Undoes [`Attachment::vmap`]. Errors: those of `abi::IOC_VUNMAP`.
    pub(crate) fn vunmap(&self) -> Result<u64> {
        self.vunmap_locked(&mut self.control.lock()).ok_or(ENOENT)
    }

    fn vunmap_locked(&self, control: &mut Control) -> Option<u64> {
        let mut map = control.vmap.take()?;
        // SAFETY: The mapping came from the dma-buf, which is valid, and this task does not hold its
        // reservation lock.
        let ((), ns) =
            timed(|| unsafe { bindings::dma_buf_vunmap_unlocked(self.dmabuf.raw(), &mut map) });
        self.note(0, abi::VMAPPED | abi::VMAP_IOMEM);
        Some(ns)
    }

    /// Adds an unsignalled fence to the dma-buf. Errors: those of `abi::Fence`.
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
        // SAFETY: The memory has room for a fence. With a null lock the fence uses its own. The kernel frees
        // the fence with `kfree` after its last reference.
        unsafe {
            bindings::dma_fence_init(
                fence,
                &FENCE_OPS.0,
                ptr::null_mut(),
                self.fence_context,
                control.seqno,
            )
        };
        // An earlier fence's timer must not signal this fence.
        // SAFETY: The timer was initialised with `self`; its function takes no lock.
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
                // SAFETY: No one else knows the fence, and this is its only reference.
                unsafe {
                    bindings::dma_fence_signal(fence);
                    ffi::peerbuf_dma_fence_put(fence);
                }
                return Err(e);
            }
        }
        // The reference from `dma_fence_init` moves into the field.
        self.fence.store(fence, kernel::sync::atomic::Release);
        // SAFETY: The timer is initialised, and `let_go` deletes it before `self` is dropped.
        unsafe {
            let now = (&raw const bindings::jiffies).read_volatile();
            bindings::mod_timer(
                self.fence_timer.get(),
                now.wrapping_add(msecs_to_jiffies(timeout_ms)),
            )
        };
        Ok(())
    }

    /// Signals the fence. ENOENT if there is none. Takes no lock.
    pub(crate) fn signal(&self) -> Result<u64> {
        let fence = self.fence.xchg(ptr::null_mut(), Full);
        if fence.is_null() {
            return Err(ENOENT);
        }
        // SAFETY: The exchange moved the field's reference to this function.
        let ((), ns) = timed(|| unsafe { bindings::dma_fence_signal(fence) });
        // SAFETY: The reference is this function's, and is not used afterwards.
        unsafe { ffi::peerbuf_dma_fence_put(fence) };
        Ok(ns)
    }

    /// Whether the detach is over.
    pub(crate) fn has_let_go(&self) -> bool {
        self.has_let_go.load(Relaxed) != 0
    }

    /// Unmaps, unpins and detaches, whatever the attachment was told to hold. Returns the nanoseconds of the
    /// detach. A second call does nothing (ENOTCONN).
    ///
    /// `why` is zero or `abi::DEVICE_GONE`. Sleeps as long as other tasks hold the reservation lock.
    pub(crate) fn let_go(&self, why: u32) -> Result<u64> {
        // Signals first: other tasks may wait for the fence with locks held that are needed below.
        self.note(abi::DETACHED | why, 0);
        let _ = self.signal();
        let mut control = self.control.lock();
        // Signals again: a task may have added a fence before this lock was free. No fence is added after
        // this.
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
            // Already detached, or never attached.
            self.has_let_go.store(1, Relaxed);
            return Err(not_connected());
        };
        // SAFETY: The attachment belongs to this dma-buf, no one else detaches it, and this task does not
        // hold the reservation lock.
        let ((), ns) =
            timed(|| unsafe { bindings::dma_buf_detach(self.dmabuf.raw(), attach.as_ptr()) });
        // After the detach nothing invalidates, so nothing is queued any more.
        // SAFETY: Both are initialised. Neither needs a lock held here: the work takes the reservation lock,
        // the timer function none.
        unsafe {
            let this: *const Self = self;
            let work = Work::raw_get(<Self as HasWork<Self, 1>>::raw_get_work(this.cast_mut()));
            if bindings::cancel_delayed_work_sync(container_of!(work, bindings::delayed_work, work))
            {
                // The work was queued and will not run, so its reference is ours.
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
        // SAFETY: `Attachment::lock` took the lock.
        unsafe { bindings::dma_resv_unlock(self.0.resv()) };
    }
}

/// `dma_buf_attach_ops.invalidate_mappings`. The exporter holds the reservation lock.
unsafe extern "C" fn invalidate(attach: *mut bindings::dma_buf_attachment) {
    // SAFETY: `attach` set `importer_priv` to a pointer into an `Arc`, which is kept until the detach.
    let this =
        unsafe { ArcBorrow::<Attachment>::from_raw((*attach).importer_priv.cast_const().cast()) };
    this.invalidated();
}

/// The function of the fence's timer; runs in softirq context.
unsafe extern "C" fn fence_is_late(timer: *mut bindings::timer_list) {
    let field = Opaque::<bindings::timer_list>::cast_from(timer);
    // SAFETY: The timer is part of an attachment, and `let_go` deletes the timer before the attachment is
    // freed.
    let this = unsafe { &*container_of!(field, Attachment, fence_timer) };
    let _ = this.signal();
}

impl WorkItem<1> for Attachment {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.catch_up();
    }
}
