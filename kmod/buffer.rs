// SPDX-License-Identifier: GPL-2.0

//! The movable object behind an exported dma-buf.
//!
//! The dma-buf owns its [`Buffer`]: `dma_buf.priv` is a reference, dropped by the release operation. A buffer
//! keeps the memory of its [`Device`] allocated, but not the device bound. Everything mutable is in its
//! [`State`], which the dma-buf's reservation lock guards, as importers expect. [`Held`] gives access to the
//! state.

use core::{
    cell::UnsafeCell,
    ops::{Deref, DerefMut, Range},
    ptr,
};

use kernel::{
    bindings, container_of,
    ffi::c_void,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc,
    },
    types::Opaque,
};

use crate::{
    abi,
    bar::Bar,
    counters::{Counters, Refusal},
    device::{revoked, Device},
    fences::Fences,
    ffi,
    mapping::Mapping,
    peers::Peers,
    pieces::{Piece, Pieces},
    pool::Chunk,
    system::{self, System},
    wait::Wait,
    watchers::Watchers,
};

/// A kernel mapping of the buffer.
pub(crate) struct KernelMapping {
    pub(crate) address: *mut c_void,
    /// Made by `vmap`; `vunmap` must undo it.
    pub(crate) vmapped: bool,
    /// Maps device memory.
    pub(crate) device: bool,
    /// Keeps the mapped system pages allocated.
    pub(crate) _pages: KVec<Arc<System>>,
}

/// The mutable state of a buffer. See [`Held`].
pub(crate) struct State {
    /// A move is in progress and has released the lock to wait for direct I/O.
    pub(crate) moving: bool,
    /// While revoked: the fences present at the revoke. `None` means all fences, if the list could not be
    /// allocated.
    pub(crate) marked: Option<Arc<Fences>>,
    /// The time of the revoke; see [`Wait`].
    pub(crate) revoked: Option<Wait>,
    /// Starts at 1; each move, revoke and restore increments it.
    pub(crate) generation: u64,
    /// A task waits for a change, or is about to.
    awaited: bool,
    pub(crate) pieces: Pieces,
    /// The buffer's chunks of a provider's pool. Emptied when the provider goes away.
    pub(crate) chunks: KVec<Chunk>,
    /// The importers' mappings.
    pub(crate) mappings: KVec<Mapping>,
    /// The pins of all importers together.
    pub(crate) pins: u32,
    /// The number of attachments that need system memory.
    pub(crate) need_system: u32,
    /// The kernel mapping (`vmap`), which the dma-buf core shares among importers.
    pub(crate) kernel_mapping: Option<KernelMapping>,
    pub(crate) counters: Counters,
    pub(crate) refusal: Refusal,
    pub(crate) watchers: Watchers,
}

/// What keeps a buffer in use: at the end of a revoke's time, or when a move gave up.
#[derive(Default)]
pub(crate) struct Left {
    /// The number of importers' mappings; for a move, see [`State::holders_against`].
    pub(crate) holders: usize,
    /// The number of unsignalled fences.
    pub(crate) fences: usize,
    /// The number of pages in use by direct I/O, or kept by a user.
    pub(crate) pages: usize,
    /// The pins of all importers together, which do not keep a buffer from being revoked.
    pub(crate) pins: u32,
    /// The buffer's generation at that time.
    pub(crate) generation: u64,
}

impl Left {
    /// Whether a revoke has nobody to wait for.
    pub(crate) fn nobody(&self) -> bool {
        self.holders == 0 && self.fences == 0 && self.pages == 0
    }
}

impl State {
    /// The number of importers' mappings of device memory from before the last move or revoke.
    pub(crate) fn stale_device_mappings(&self) -> usize {
        let stale =
            |mapping: &&Mapping| mapping.generation < self.generation && mapping.shows_device();
        self.mappings.iter().filter(stale).count()
    }

    /// The number of holders that keep the buffer from a move until they let go, without pins: the kernel mapping, and
    /// for a move to the BAR the importers that need system memory and the old mappings of the BAR.
    pub(crate) fn holders_against(&self, to_device: bool) -> usize {
        let kernel = usize::from(self.kernel_mapping.is_some());
        match to_device {
            true => kernel + self.need_system as usize + self.stale_device_mappings(),
            false => kernel,
        }
    }

    /// The `abi::EVENT_MOVABLE_*` of the moves that no holder and no pin prevents.
    pub(crate) fn movable(&self) -> u64 {
        let event = |to_device, event| match self.pins == 0 && self.holders_against(to_device) == 0
        {
            true => event,
            false => 0,
        };
        event(true, abi::EVENT_MOVABLE_TO_DEVICE) | event(false, abi::EVENT_MOVABLE_TO_SYSTEM)
    }

    /// The number of mappings of device memory, the kernel mapping included.
    pub(crate) fn device_holders(&self) -> usize {
        let importers = self
            .mappings
            .iter()
            .filter(|mapping| mapping.shows_device());
        let kernel = self.kernel_mapping.as_ref();
        importers.count() + usize::from(kernel.is_some_and(|mapping| mapping.device))
    }

    /// The number of mappings, the kernel mapping included.
    pub(crate) fn holders(&self) -> usize {
        self.mappings.len() + usize::from(self.kernel_mapping.is_some())
    }
}

/// How long a move or a revoke waits for pinned system pages: longer than a disk takes to complete the
/// requests it has accepted.
const PATIENCE_NS: u64 = 10_000_000_000;

/// An export.
#[pin_data]
pub(crate) struct Buffer {
    pub(crate) device: Arc<Device>,
    /// Index of the BAR, below `NUM_BARS`.
    pub(crate) bar: usize,
    /// The buffer's length in bytes.
    pub(crate) len: u64,
    /// Whether the buffer may move to system memory for importers that need it there.
    pub(crate) may_move: bool,
    /// Whether devices may only read the buffer.
    pub(crate) devices_read: bool,
    /// Whether CPU mappings of the BAR are write-combining; otherwise they are uncached.
    pub(crate) combines_writes: bool,
    /// Whether any byte has a place in the BAR.
    pub(crate) has_home: bool,
    /// Completed at each event that a waiter may wait for (an unmap, the end of a move);
    /// [`Held::expect_change`] reinitialises it. Waiters check their condition again.
    /// (`kernel::sync::Completion` has no wait with a timeout.)
    #[pin]
    changed: Opaque<bindings::completion>,
    /// `revoked::*` bits; zero while there is access. Written with the reservation lock held. A task that
    /// decides by the value holds the lock until it has acted on the decision. Without the lock the value is
    /// only a hint.
    revoked: Atomic<i32>,
    /// A CPU mapping existed at some time, so pages may be in use.
    cpu_mapped: Atomic<i32>,
    state: UnsafeCell<State>,
}

// SAFETY: No field is tied to a thread; the fields' comments say how the pointers are used.
unsafe impl Send for Buffer {}
// SAFETY: `state` is reached only through `Held`; the other fields are constant, atomic or a completion.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of the memory in `pieces` and `chunks`, which the caller has allocated; `flags` are
    /// `abi::EXPORT_*`. ENOMEM.
    pub(crate) fn new(
        device: Arc<Device>,
        bar: usize,
        flags: u32,
        pieces: Pieces,
        chunks: KVec<Chunk>,
    ) -> Result<Arc<Self>> {
        let has_home = pieces.iter().any(|piece| piece.home.is_some());
        let combining = device.bars[bar].flags & abi::BAR_WRITE_COMBINING != 0;
        let len = pieces.bytes();
        Arc::pin_init(
            pin_init!(Self {
                device,
                bar,
                len,
                may_move: flags & abi::EXPORT_MAY_MOVE != 0,
                devices_read: flags & abi::EXPORT_DEVICES_READ != 0,
                combines_writes: combining && flags & abi::EXPORT_UNCACHED == 0,
                has_home,
                changed <- Opaque::ffi_init(|slot: *mut bindings::completion| {
                    // SAFETY: `slot` is valid for writes, and pinned.
                    unsafe { bindings::init_completion(slot) };
                }),
                revoked: Atomic::new(0),
                cpu_mapped: Atomic::new(0),
                state: UnsafeCell::new(State {
                    moving: false,
                    marked: None,
                    revoked: None,
                    generation: 1,
                    awaited: false,
                    pieces,
                    chunks,
                    mappings: KVec::new(),
                    pins: 0,
                    need_system: 0,
                    kernel_mapping: None,
                    counters: Counters::default(),
                    refusal: Refusal::NOBODY,
                    watchers: Watchers::new(),
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Whether the buffer is revoked. Reliable only while the reservation lock is held.
    pub(crate) fn revoked(&self) -> bool {
        self.revoked.load(Relaxed) != 0
    }

    /// The reasons of the revoke: `revoked::*` bits. Reliable only while the reservation lock is held.
    pub(crate) fn reasons(&self) -> u32 {
        self.revoked.load(Relaxed) as u32
    }

    /// Whether the buffer is revoked permanently. Reliable only while the reservation lock is held.
    pub(crate) fn permanently_revoked(&self) -> bool {
        self.reasons() & (revoked::GONE | revoked::PERMANENTLY) != 0
    }

    /// Whether the device is gone. Reliable only while the reservation lock is held.
    pub(crate) fn gone(&self) -> bool {
        self.reasons() & revoked::GONE != 0
    }

    /// Records that a process has mapped the buffer.
    pub(crate) fn set_cpu_mapped(&self) {
        self.cpu_mapped.store(1, Relaxed);
    }

    /// Whether pages can be in use: true once a process has mapped the buffer.
    pub(crate) fn may_have_busy_pages(&self) -> bool {
        self.cpu_mapped.load(Relaxed) != 0
    }

    /// Whether CPU mappings have struct pages in every placement.
    pub(crate) fn has_pages(&self) -> bool {
        !self.has_home || self.bar().pages.is_some()
    }

    /// The BAR in which the buffer has its places.
    pub(crate) fn bar(&self) -> &Bar {
        &self.device.bars[self.bar]
    }

    /// The devices known to reach that BAR.
    pub(crate) fn peers(&self) -> &Peers {
        &self.device.peers[self.bar]
    }

    /// Waits until the next change, at most `ms`. The caller does not hold the reservation lock, so the
    /// awaited condition may no longer hold afterwards: check it again. If two tasks wait, one may miss a
    /// wake-up, so `ms` must be short.
    pub(crate) fn wait_changed(&self, ms: u32) {
        // SAFETY: Initialised with the buffer; the caller may sleep.
        unsafe {
            let jiffies = bindings::__msecs_to_jiffies(ms.max(1));
            bindings::wait_for_completion_timeout(self.changed.get(), jiffies);
        }
    }

    /// The number of pages in `part` that a page table entry or an I/O request uses, in the pieces for which
    /// `which` returns true: pages of the BAR while the device is there, and system pages. The caller holds
    /// the reservation lock.
    pub(crate) fn busy_pages(
        &self,
        state: &State,
        part: &Range<u64>,
        which: impl Fn(&Piece) -> bool,
    ) -> usize {
        if !self.may_have_busy_pages() {
            return 0;
        }
        state
            .pieces
            .within(part)
            .filter(|(piece, _)| which(piece))
            .map(|(piece, common)| self.busy(piece, common))
            .sum()
    }

    /// Whether a move may leave the pages in use in `part` to their users, who then keep the old bytes.
    ///
    /// A user can keep pages forever (a pipe, a forgotten registration), and that must not keep the buffer
    /// from moving. So the answer is yes if all pages in use are system pages, and either none of them is
    /// pinned, so no device accesses them, or `waited` exceeds the limit. The caller holds the reservation
    /// lock.
    pub(crate) fn may_leave_pages(&self, state: &State, part: &Range<u64>, waited: &Wait) -> bool {
        if self.busy_pages(state, part, |piece| piece.system.is_none()) != 0 {
            return false;
        }
        let pinned = |(piece, common): (&Piece, Range<u64>)| {
            let pages = piece.system_pages();
            let page = |at: u64| at as usize / PAGE_SIZE;
            !pages.is_empty() && system::any_pinned(&pages[page(common.start)..page(common.end)])
        };
        waited.ns() >= PATIENCE_NS || !state.pieces.within(part).any(pinned)
    }

    /// As [`Buffer::busy_pages`], for a range relative to the start of one piece.
    fn busy(&self, piece: &Piece, range: Range<u64>) -> usize {
        match (piece.home, &piece.system, &self.bar().pages) {
            (_, Some(_), _) => {
                let page = |at: u64| at as usize / PAGE_SIZE;
                system::busy(&piece.system_pages()[page(range.start)..page(range.end)])
            }
            // A device that is gone has no struct pages any more. While it is not gone and the lock is held,
            // the pages stay: removal revokes the buffer before they go.
            (Some(home), None, Some(pages)) if !self.gone() => {
                pages.busy(home + range.start, range.end - range.start)
            }
            _ => 0,
        }
    }
}

/// A buffer whose reservation lock is held, by the caller of a dma-buf operation or by a [`Locked`].
///
/// # Invariants
///
/// `dmabuf` was made by this module, and this task holds its reservation lock as long as this object lives.
pub(crate) struct Held<'a> {
    dmabuf: *mut bindings::dma_buf,
    buffer: &'a Buffer,
}

impl<'a> Held<'a> {
    /// # Safety
    ///
    /// `dmabuf` was made by this module and stays valid for `'a`. This task holds its reservation lock for
    /// `'a`.
    pub(crate) unsafe fn new(dmabuf: *mut bindings::dma_buf) -> Self {
        // SAFETY: The dma-buf is valid, by the caller's promise.
        unsafe { ffi::peerbuf_dma_resv_assert_held((*dmabuf).resv) };
        // INVARIANT: The caller holds the lock for `'a`.
        Self {
            dmabuf,
            // SAFETY: `priv_` is the reference that the export put there.
            buffer: unsafe { &*(*dmabuf).priv_.cast::<Buffer>() },
        }
    }

    pub(crate) fn buffer(&self) -> &'a Buffer {
        self.buffer
    }

    pub(crate) fn dmabuf(&self) -> *mut bindings::dma_buf {
        self.dmabuf
    }

    /// Sets the reasons of the revoke.
    pub(crate) fn set_reasons(&mut self, reasons: u32) {
        self.buffer.revoked.store(reasons as i32, Relaxed);
    }

    /// The buffer and its state.
    pub(crate) fn parts(&mut self) -> (&'a Buffer, &mut State) {
        (self.buffer, &mut *self)
    }

    /// Wakes the tasks in [`Buffer::wait_changed`]: a condition may have become true.
    pub(crate) fn notify(&mut self) {
        if core::mem::take(&mut self.awaited) {
            // SAFETY: Initialised with the buffer.
            unsafe { bindings::complete_all(self.buffer.changed.get()) };
        }
    }

    /// Makes a change by which a holder lets go. Wakes the tasks that wait for it, and signals the watchers of moves
    /// that have become possible. The lock, held throughout, makes the holder's going and the signal one step: a
    /// watcher that is added finds the holder or hears of its end.
    pub(crate) fn let_go(&mut self, change: impl FnOnce(&mut State)) {
        // Without watchers this costs nothing: an unmap is a fast path.
        let watched = !self.watchers.is_empty();
        let before = if watched { self.movable() } else { 0 };
        change(self);
        if watched {
            self.watchers.signal(self.movable() & !before);
        }
        self.notify();
    }

    /// The attachments, newest first. The pointers are valid while the lock is held.
    pub(crate) fn attachments(
        &self,
    ) -> impl Iterator<Item = *mut bindings::dma_buf_attachment> + '_ {
        // SAFETY: By the type invariant the dma-buf is valid.
        let head = unsafe { &raw mut (*self.dmabuf).attachments };
        // SAFETY: The lock guards the list.
        let mut node = unsafe { (*head).next };
        core::iter::from_fn(move || {
            if node == head {
                return None;
            }
            // SAFETY: Each entry but the head is part of an attachment.
            let attachment = unsafe { container_of!(node, bindings::dma_buf_attachment, node) };
            // SAFETY: The entry is part of an attachment, and the lock guards the list.
            node = unsafe { (*node).next };
            Some(attachment)
        })
    }

    /// Prepares for [`Buffer::wait_changed`]: it waits for the first event after this call.
    pub(crate) fn expect_change(&mut self) {
        self.awaited = true;
        // SAFETY: The completion was initialised with the buffer. Waiters that are already woken stay woken.
        unsafe { ffi::peerbuf_reinit_completion(self.buffer.changed.get()) };
    }

    /// Invalidates every importer's mappings. An importer may unmap inside its callback, which borrows the
    /// state, so no reference to the state may be live: the exclusive borrow of `self` ensures that.
    pub(crate) fn invalidate(&mut self) {
        self.counters.invalidations += 1;
        // SAFETY: By the type invariant the lock is held, which the call demands.
        unsafe { bindings::dma_buf_invalidate_mappings(self.dmabuf) };
    }

    /// Waits for all fences, at most `jiffies`. `None` on a timeout; EINTR on a signal.
    pub(crate) fn wait_fences(&self, jiffies: usize) -> Result<Option<()>> {
        // The usage BOOKKEEP includes all others.
        // SAFETY: By the type invariant the dma-buf is valid.
        let left = unsafe {
            bindings::dma_resv_wait_timeout(
                (*self.dmabuf).resv,
                bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP,
                true,
                jiffies,
            )
        };
        match left {
            0 => Ok(None),
            1.. => Ok(Some(())),
            _ => Err(EINTR),
        }
    }

    /// Records the present fences for [`Held::fences_pending`].
    pub(crate) fn mark_fences(&mut self) {
        // SAFETY: By the type invariant the lock is held.
        self.marked = unsafe { Fences::of((*self.dmabuf).resv) }.ok();
    }

    /// The number of fences that are unsignalled, of those recorded at the revoke if there are any.
    pub(crate) fn fences_pending(&self) -> usize {
        if let Some(marked) = &self.marked {
            return marked.pending();
        }
        // SAFETY: By the type invariant the lock is held.
        if let Ok(all) = unsafe { Fences::of((*self.dmabuf).resv) } {
            return all.pending();
        }
        let usage = bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP;
        // SAFETY: By the type invariant the dma-buf is valid.
        usize::from(!unsafe { bindings::dma_resv_test_signaled((*self.dmabuf).resv, usage) })
    }

    /// Removes the pages of `part` from all CPU mappings. Later accesses fault.
    pub(crate) fn zap(&self, part: &Range<u64>) {
        // SAFETY: The dma-buf's file and its mapping are valid. `i_mmap_rwsem` nests inside the reservation
        // lock; see the lock order in main.rs.
        unsafe {
            bindings::unmap_mapping_range(
                (*(*self.dmabuf).file).f_mapping,
                part.start as i64,
                (part.end - part.start) as i64,
                1,
            )
        };
    }
}

impl Deref for Held<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        // SAFETY: By the type invariant this task holds the lock that guards the state.
        unsafe { &*self.buffer.state.get() }
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut State {
        // SAFETY: By the type invariant this task holds the lock; the exclusive borrow of `self` makes the
        // reference unique.
        unsafe { &mut *self.buffer.state.get() }
    }
}

/// A buffer whose reservation lock this object holds and releases on drop.
pub(crate) struct Locked<'a>(Held<'a>);

impl<'a> Locked<'a> {
    /// Takes the lock.
    ///
    /// # Safety
    ///
    /// `dmabuf` was made by this module and stays valid for `'a`. The task does not hold its reservation
    /// lock.
    pub(crate) unsafe fn lock(dmabuf: *mut bindings::dma_buf) -> Self {
        // Cannot fail: without an acquire context the call only waits.
        // SAFETY: The dma-buf is valid and this task does not hold its lock, by the caller's promise.
        unsafe { bindings::dma_resv_lock((*dmabuf).resv, ptr::null_mut()) };
        // SAFETY: The dma-buf stays valid, by the caller's promise, and the lock was taken above.
        unsafe { Self::taken(dmabuf) }
    }

    /// Takes over a reservation lock that this task already holds.
    ///
    /// # Safety
    ///
    /// `dmabuf` was made by this module and stays valid for `'a`. The task holds its reservation lock, and
    /// this object releases it.
    pub(crate) unsafe fn taken(dmabuf: *mut bindings::dma_buf) -> Self {
        // SAFETY: By the caller's promise; the lock is held until this object is dropped.
        Self(unsafe { Held::new(dmabuf) })
    }
}

impl<'a> Deref for Locked<'a> {
    type Target = Held<'a>;

    fn deref(&self) -> &Held<'a> {
        &self.0
    }
}

impl<'a> DerefMut for Locked<'a> {
    fn deref_mut(&mut self) -> &mut Held<'a> {
        &mut self.0
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // SAFETY: This object holds the lock.
        unsafe { bindings::dma_resv_unlock((*self.0.dmabuf).resv) };
    }
}
