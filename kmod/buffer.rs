// SPDX-License-Identifier: GPL-2.0

//! The movable object behind an exported dma-buf.
//!
//! A [`Buffer`] is owned by its dma-buf (`dma_buf.priv` is a reference, dropped by the release
//! operation) and keeps its [`Device`] structure, though not the device, alive. All that changes
//! is its [`State`], guarded by the dma-buf's reservation lock, as importers expect; [`Held`] is
//! the way to it.

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
    device::Device,
    fences::Fences,
    ffi,
    mapping::Mapping,
    pieces::{Piece, Pieces},
    pool::Chunk,
    system::{self, System},
    wait::Wait,
    watchers::Watchers,
};

/// Reasons for which access is taken away; more than one may hold.
pub(crate) mod revoked {
    /// The owner asked for it.
    pub(crate) const BY_OWNER: u32 = 1 << 0;
    /// The device is being reset.
    pub(crate) const BY_RESET: u32 = 1 << 1;
    /// The device is gone, for good.
    pub(crate) const GONE: u32 = 1 << 2;
}

/// A kernel mapping of the buffer.
pub(crate) struct KernelMapping {
    pub(crate) address: *mut c_void,
    /// Made by `vmap`, so undone by `vunmap`.
    pub(crate) vmapped: bool,
    /// Shows device memory.
    pub(crate) device: bool,
    /// The system pages that it shows.
    pub(crate) _pages: KVec<Arc<System>>,
}

/// What changes in a buffer. See [`Held`].
pub(crate) struct State {
    /// A move is under way, and waits for direct I/O with the lock given up.
    pub(crate) moving: bool,
    /// While access is taken away: the fences that there were then. `None` for all that there are, where
    /// there was no memory for a list.
    pub(crate) marked: Option<Arc<Fences>>,
    /// When access was taken away; see [`Wait`].
    pub(crate) revoked: Option<Wait>,
    /// Raised by each move, revoke and restore, from 1.
    pub(crate) generation: u64,
    /// Somebody waits for a change, or is about to.
    awaited: bool,
    pub(crate) pieces: Pieces,
    /// What it has of a provider's pool. Emptied when the provider goes.
    pub(crate) chunks: KVec<Chunk>,
    /// The mappings that importers have.
    pub(crate) mappings: KVec<Mapping>,
    /// Pins of all importers.
    pub(crate) pins: u32,
    /// Attachments that need system memory.
    pub(crate) need_system: u32,
    /// The kernel mapping that the dma-buf core shares among importers.
    pub(crate) kernel_mapping: Option<KernelMapping>,
    pub(crate) counters: Counters,
    pub(crate) refusal: Refusal,
    pub(crate) watchers: Watchers,
}

impl State {
    /// Whether an importer still has a mapping of device memory from before the last move or
    /// revoke.
    pub(crate) fn has_stale_device_mapping(&self) -> bool {
        let stale =
            |mapping: &Mapping| mapping.generation < self.generation && mapping.shows_device();
        self.mappings.iter().any(stale)
    }

    /// How many mappings of device memory importers have, counting the kernel's as one.
    pub(crate) fn device_holders(&self) -> usize {
        let importers = self
            .mappings
            .iter()
            .filter(|mapping| mapping.shows_device());
        let kernel = self.kernel_mapping.as_ref();
        importers.count() + usize::from(kernel.is_some_and(|mapping| mapping.device))
    }

    /// How many mappings of whatever memory importers have, counting the kernel's as one.
    pub(crate) fn holders(&self) -> usize {
        self.mappings.len() + usize::from(self.kernel_mapping.is_some())
    }
}

/// How long a move or a revoke waits for pages of system memory on which a device may be at work. Longer
/// than what a disk takes for what it has accepted.
const PATIENCE_NS: u64 = 10_000_000_000;

/// An export.
#[pin_data]
pub(crate) struct Buffer {
    pub(crate) device: Arc<Device>,
    /// Index of the BAR, below `NUM_BARS`.
    pub(crate) bar: usize,
    /// The buffer's length in bytes.
    pub(crate) len: u64,
    /// Whether it may move to system memory for importers that need it there.
    pub(crate) may_move: bool,
    /// Whether devices may only read it.
    pub(crate) devices_read: bool,
    /// Whether any byte has a place in the BAR.
    pub(crate) has_home: bool,
    /// Done, for an instant, whenever somebody may have stopped waiting: a mapping came back, a move
    /// has ended. Waiters look again. (`kernel::sync::Completion` cannot be waited for with a
    /// limit.)
    #[pin]
    changed: Opaque<bindings::completion>,
    /// `revoked::*` bits; zero while there is access. Written with the reservation lock held;
    /// whoever decides by it holds that lock until what was decided is done. Reads without the
    /// lock are advisory.
    revoked: Atomic<i32>,
    /// A CPU mapping was made at some time, so pages may be in use.
    cpu_mapped: Atomic<i32>,
    state: UnsafeCell<State>,
}

// SAFETY: Nothing is tied to a thread; the pointers are used as their fields say.
unsafe impl Send for Buffer {}
// SAFETY: `state` is reached by `Held` only; the rest does not change, or is a completion.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Describes the memory that the caller has taken, in order; `flags` are `abi::EXPORT_*`. ENOMEM.
    pub(crate) fn new(
        device: Arc<Device>,
        bar: usize,
        flags: u32,
        pieces: Pieces,
        chunks: KVec<Chunk>,
    ) -> Result<Arc<Self>> {
        let has_home = pieces.iter().any(|piece| piece.home.is_some());
        let len = pieces.bytes();
        Arc::pin_init(
            pin_init!(Self {
                device,
                bar,
                len,
                may_move: flags & abi::EXPORT_MAY_MOVE != 0,
                devices_read: flags & abi::EXPORT_DEVICES_READ != 0,
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
                    refusal: Refusal::default(),
                    watchers: Watchers::new(),
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Whether access was taken away. Binding only while the reservation lock is held.
    pub(crate) fn revoked(&self) -> bool {
        self.revoked.load(Relaxed) != 0
    }

    /// Why access is taken away: `revoked::*` bits. Binding as [`Buffer::revoked`] is.
    pub(crate) fn reasons(&self) -> u32 {
        self.revoked.load(Relaxed) as u32
    }

    /// Whether access was taken away for good. Binding as [`Buffer::revoked`] is.
    pub(crate) fn gone(&self) -> bool {
        self.reasons() & revoked::GONE != 0
    }

    /// Notes that a process has mapped the buffer.
    pub(crate) fn set_cpu_mapped(&self) {
        self.cpu_mapped.store(1, Relaxed);
    }

    /// Whether pages can be in use: only once a process has mapped the buffer.
    pub(crate) fn may_have_busy_pages(&self) -> bool {
        self.cpu_mapped.load(Relaxed) != 0
    }

    /// Whether CPU mappings have struct pages wherever the bytes are.
    pub(crate) fn has_pages(&self) -> bool {
        !self.has_home || self.bar().pages.is_some()
    }

    /// The BAR that the buffer has its places in.
    pub(crate) fn bar(&self) -> &Bar {
        &self.device.bars[self.bar]
    }

    /// Waits until something changes, or for `ms`. The reservation lock is not held, so what was
    /// waited for may be undone again: look. A wake-up may get lost if two wait at once, so the
    /// limit is to be short.
    pub(crate) fn wait_changed(&self, ms: u32) {
        // SAFETY: Initialised with the buffer; the caller may sleep.
        unsafe {
            let jiffies = bindings::__msecs_to_jiffies(ms.max(1));
            bindings::wait_for_completion_timeout(self.changed.get(), jiffies);
        }
    }

    /// Pages of a part of the buffer that a page table or an I/O request uses, where `which` says
    /// yes to the piece: of the BAR, as long as the device is there, and of system memory. The
    /// reservation lock is held.
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

    /// Whether the pages of a part that are in use may be left to their users, with the bytes that they
    /// have: they are system memory, and nobody's device is at work on them, or has been for as long as
    /// `waited` says at least. Whoever pins pages can keep them for ever: a pipe, a registration that
    /// somebody has forgotten; that is not to keep the buffer from moving. The reservation lock is held.
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

    /// As [`Buffer::busy_pages`], for a range of a piece, from its beginning.
    fn busy(&self, piece: &Piece, range: Range<u64>) -> usize {
        match (piece.home, &piece.system, &self.bar().pages) {
            (_, Some(_), _) => {
                let page = |at: u64| at as usize / PAGE_SIZE;
                system::busy(&piece.system_pages()[page(range.start)..page(range.end)])
            }
            // Once the device is gone there are no struct pages to look at. Not gone, under the
            // lock, means that they stay: removal marks before they go.
            (Some(home), None, Some(pages)) if !self.gone() => {
                pages.busy(home + range.start, range.end - range.start)
            }
            _ => 0,
        }
    }
}

/// A buffer whose reservation lock is held, by whoever called in or by a [`Locked`].
///
/// # Invariants
///
/// `dmabuf` is one of ours, and this task holds its reservation lock as long as this object lives.
pub(crate) struct Held<'a> {
    dmabuf: *mut bindings::dma_buf,
    buffer: &'a Buffer,
}

impl<'a> Held<'a> {
    /// # Safety
    ///
    /// `dmabuf` is one of ours and stays for `'a`, and so does this task's hold on its reservation lock.
    pub(crate) unsafe fn new(dmabuf: *mut bindings::dma_buf) -> Self {
        // SAFETY: By the caller's promise.
        unsafe { ffi::peerbuf_dma_resv_assert_held((*dmabuf).resv) };
        // INVARIANT: By the caller's promise.
        Self {
            dmabuf,
            // SAFETY: `priv_` is the reference put there when it was exported.
            buffer: unsafe { &*(*dmabuf).priv_.cast::<Buffer>() },
        }
    }

    pub(crate) fn buffer(&self) -> &'a Buffer {
        self.buffer
    }

    pub(crate) fn dmabuf(&self) -> *mut bindings::dma_buf {
        self.dmabuf
    }

    /// Says for which reasons access is taken away.
    pub(crate) fn set_reasons(&mut self, reasons: u32) {
        self.buffer.revoked.store(reasons as i32, Relaxed);
    }

    /// The state and the buffer that it belongs to.
    pub(crate) fn parts(&mut self) -> (&'a Buffer, &mut State) {
        (self.buffer, &mut *self)
    }

    /// Something may have come true that others wait for with [`Buffer::wait_changed`].
    pub(crate) fn notify(&mut self) {
        if core::mem::take(&mut self.awaited) {
            // SAFETY: Initialised with the buffer.
            unsafe { bindings::complete_all(self.buffer.changed.get()) };
        }
    }

    /// The attachments, newest first. The pointers are valid while the lock is held.
    pub(crate) fn attachments(
        &self,
    ) -> impl Iterator<Item = *mut bindings::dma_buf_attachment> + '_ {
        // SAFETY: By the type invariant.
        let head = unsafe { &raw mut (*self.dmabuf).attachments };
        // SAFETY: The lock keeps the list as it is.
        let mut node = unsafe { (*head).next };
        core::iter::from_fn(move || {
            if node == head {
                return None;
            }
            // SAFETY: Each entry but the head is part of an attachment.
            let attachment = unsafe { container_of!(node, bindings::dma_buf_attachment, node) };
            // SAFETY: As above.
            node = unsafe { (*node).next };
            Some(attachment)
        })
    }

    /// What comes next is what [`Buffer::wait_changed`] waits for.
    pub(crate) fn expect_change(&mut self) {
        self.awaited = true;
        // SAFETY: Initialised with the buffer. Waiters that are woken already stay so.
        unsafe { ffi::peerbuf_reinit_completion(self.buffer.changed.get()) };
    }

    /// Tells every importer that its mappings are stale. Importers may unmap from within, so no
    /// reference to the state may be held across: the borrow of `self` sees to it.
    pub(crate) fn invalidate(&mut self) {
        self.counters.invalidations += 1;
        // SAFETY: By the type invariant.
        unsafe { bindings::dma_buf_invalidate_mappings(self.dmabuf) };
    }

    /// Waits for every fence that there is, at most `jiffies`. `None` if they are not signalled by
    /// then; EINTR on a signal.
    pub(crate) fn wait_fences(&self, jiffies: usize) -> Result<Option<()>> {
        // BOOKKEEP is the usage that includes all others.
        // SAFETY: By the type invariant.
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

    /// Notes the fences that there are, for [`Held::fences_pending`].
    pub(crate) fn mark_fences(&mut self) {
        // SAFETY: By the type invariant.
        self.marked = unsafe { Fences::of((*self.dmabuf).resv) }.ok();
    }

    /// Whether a fence of those that counted when access was taken away is not signalled.
    pub(crate) fn fences_pending(&self) -> bool {
        if let Some(marked) = &self.marked {
            return marked.pending();
        }
        let usage = bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP;
        // SAFETY: By the type invariant.
        !unsafe { bindings::dma_resv_test_signaled((*self.dmabuf).resv, usage) }
    }

    /// Takes the pages of a part out of every process's mapping. They fault again.
    pub(crate) fn zap(&self, part: &Range<u64>) {
        // SAFETY: The file is valid, and its mapping with it. The order of locks is as main.rs
        // says: `i_mmap_rwsem` comes below the reservation lock.
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
        // SAFETY: By the type invariant this task holds the lock that guards it.
        unsafe { &*self.buffer.state.get() }
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut State {
        // SAFETY: By the type invariant; the borrow of `self` makes it the only one in this call.
        unsafe { &mut *self.buffer.state.get() }
    }
}

/// A buffer whose reservation lock this object lets go when it is dropped.
pub(crate) struct Locked<'a>(Held<'a>);

impl<'a> Locked<'a> {
    /// Takes the lock.
    ///
    /// # Safety
    ///
    /// `dmabuf` is one of ours and stays for `'a`; the task does not hold its reservation lock.
    pub(crate) unsafe fn lock(dmabuf: *mut bindings::dma_buf) -> Self {
        // Without an acquire context this cannot fail: it only waits.
        // SAFETY: By the caller's promise.
        unsafe { bindings::dma_resv_lock((*dmabuf).resv, ptr::null_mut()) };
        // SAFETY: By the caller's promise, and the lock was taken.
        unsafe { Self::taken(dmabuf) }
    }

    /// As [`Locked::lock`], of a lock that this task has taken already, and hands over.
    ///
    /// # Safety
    ///
    /// `dmabuf` is one of ours and stays for `'a`; the task holds its reservation lock.
    pub(crate) unsafe fn taken(dmabuf: *mut bindings::dma_buf) -> Self {
        // SAFETY: By the caller's promise; the lock is held until this is dropped.
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
        // SAFETY: The lock is held, and was this object's to let go.
        unsafe { bindings::dma_resv_unlock((*self.0.dmabuf).resv) };
    }
}
