// SPDX-License-Identifier: GPL-2.0

//! Moving a buffer's bytes between its BAR and system memory.
//!
//! The order, all of it under the reservation lock:
//!
//! 1. whoever must not be moved under is looked for: pins, kernel mappings, importers that need
//!    system memory;
//! 2. importers are told (`invalidate_mappings`) and every fence is waited for, so nobody uses his
//!    mapping any more, though he may keep it: the old backing stays until he gives it back;
//! 3. processes lose their page table entries; they fault again;
//! 4. direct I/O that holds pages is waited for. It may need page faults to come so far that it
//!    can end, and faults need the lock, so it is given up meanwhile, and 2 to 4 done again;
//! 5. the bytes are copied, the new places take effect, the generation rises.
//!
//! While 4 waits the bytes are where they were: whoever maps or faults gets the old place. Faults
//! are slowed down then, see `exporter.rs`, so that a stream of direct I/O comes to an end. A move
//! in progress needs no fence: until the lock is given up for good, nobody sees half of it.
//!
//! Pages of system memory that somebody keeps longer than the move may take are left to him, with the bytes
//! that they have; see [`Buffer::may_leave_pages`]. He sees none of what comes after.
//!
//! A move to the BAR waits also for mappings of the BAR from before an earlier move: the same
//! bytes of the BAR would be written under them.

use core::{ops::Range, ptr};

use kernel::{bindings, ffi::c_void, page::PAGE_SIZE, prelude::*, sync::Arc};

use crate::{
    buffer::{Buffer, Held, Locked, State},
    common, ffi,
    pieces::{Piece, SystemPart},
    system::{self, Contents, System},
    wait::Wait,
};

/// Where bytes can be taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    Device,
    System,
}

impl To {
    /// Whether a piece is elsewhere.
    fn moves(self, piece: &Piece) -> bool {
        match self {
            Self::Device => piece.system.is_some() && piece.home.is_some(),
            Self::System => piece.system.is_none(),
        }
    }
}

/// On whose behalf a move is made.
#[derive(Clone, Copy)]
pub(crate) enum For {
    /// The limit is for what the move waits for. How long it copies is his business.
    Owner,
    /// Of an importer that attaches: the limit is for all of it.
    Importer,
}

/// What a move has done.
pub(crate) struct Moved {
    pub(crate) generation: u64,
    /// Bytes.
    pub(crate) copied: u64,
}

/// Moves a page-aligned `part` of a buffer, not empty and inside it.
///
/// Errors: those of `abi::Move`. On an error nothing has moved.
///
/// # Safety
///
/// `dmabuf` is one of ours and the caller keeps it. May sleep; the reservation lock is not held.
pub(crate) unsafe fn move_part(
    dmabuf: *mut bindings::dma_buf,
    part: Range<u64>,
    to: To,
    limit_ms: u32,
    for_whom: For,
) -> Result<Moved> {
    let wait = Wait::begin(limit_ms);
    // SAFETY: By the caller's promise.
    let mut buffer = unsafe { Locked::lock(dmabuf) };
    // One move at a time: another one's gap, see 4 above.
    while buffer.moving {
        // SAFETY: As above.
        buffer = unsafe { relock(buffer, dmabuf, &wait)? };
    }
    if !check(&buffer, &part, to)? {
        return Ok(Moved {
            generation: buffer.generation,
            copied: 0,
        });
    }
    buffer.moving = true;
    // SAFETY: As above.
    let (mut buffer, result) = unsafe { prepare(buffer, dmabuf, &part, to, &wait) };
    let patience = Patience {
        end: matches!(for_whom, For::Importer).then_some(&wait),
    };
    let result = result.and_then(|()| commit(&mut buffer, &part, to, patience));
    buffer.moving = false;
    let waited = wait.ns();
    buffer.counters.waited(waited);
    buffer.notify();
    result
}

/// Moves the whole of a buffer to system memory under the lock that a caller holds, who cannot give it up:
/// so direct I/O that needs a page fault to end is not waited for.
///
/// Errors: as [`move_part`].
pub(crate) fn to_system(buffer: &mut Held<'_>, limit_ms: u32) -> Result {
    let wait = Wait::begin(limit_ms);
    let whole = 0..buffer.buffer().len;
    if !check(buffer, &whole, To::System)? {
        return Ok(());
    }
    buffer.invalidate();
    if buffer.wait_fences(wait.left_jiffies())?.is_none() {
        return Err(EBUSY);
    }
    buffer.zap(&whole);
    let in_bar = |piece: &Piece| To::System.moves(piece);
    while buffer.buffer().busy_pages(buffer, &whole, in_bar) != 0 {
        if wait.left_ms() == 0 {
            return Err(EBUSY);
        }
        if ffi::signal_pending() {
            return Err(EINTR);
        }
        // SAFETY: Nothing is held here that forbids sleeping.
        unsafe { bindings::msleep(1) };
    }
    let patience = Patience { end: Some(&wait) };
    let moved = commit(buffer, &whole, To::System, patience);
    let waited = wait.ns();
    buffer.counters.waited(waited);
    moved.map(drop)
}

/// Whether there is anything to move. The errors are those that waiting does not help against.
fn check(state: &Held<'_>, part: &Range<u64>, to: To) -> Result<bool> {
    if state.buffer().revoked() {
        return Err(ENODEV);
    }
    if to == To::Device
        && state
            .pieces
            .within(part)
            .all(|(piece, _)| piece.home.is_none())
    {
        return Err(ffi::errno(bindings::EOPNOTSUPP));
    }
    if !state.pieces.within(part).any(|(piece, _)| to.moves(piece)) {
        return Ok(false);
    }
    if state.pins != 0
        || state.kernel_mapping.is_some()
        || (to == To::Device && state.need_system != 0)
    {
        return Err(EBUSY);
    }
    Ok(true)
}

/// Gives the lock up until something has changed, for a moment at most, and takes it again.
///
/// Errors: EBUSY when the time is over, EINTR on a signal.
///
/// # Safety
///
/// `buffer` is locked for `dmabuf`, which the caller keeps.
unsafe fn relock<'a>(
    mut buffer: Locked<'a>,
    dmabuf: *mut bindings::dma_buf,
    wait: &Wait,
) -> Result<Locked<'a>> {
    let object = buffer.buffer();
    buffer.expect_change();
    drop(buffer);
    if wait.left_ms() == 0 {
        return Err(EBUSY);
    }
    if ffi::signal_pending() {
        return Err(EINTR);
    }
    // Direct I/O ends without telling anybody here, so a short time.
    object.wait_changed(1);
    // SAFETY: By the caller's promise; the lock was given up above.
    Ok(unsafe { Locked::lock(dmabuf) })
}

/// Steps 2 to 4 of the module's comment: after it nobody uses the part. The lock is held before
/// and after, whatever the result, but not all the time.
///
/// # Safety
///
/// As for [`relock`].
unsafe fn prepare<'a>(
    mut buffer: Locked<'a>,
    dmabuf: *mut bindings::dma_buf,
    part: &Range<u64>,
    to: To,
    wait: &Wait,
) -> (Locked<'a>, Result) {
    let mut told_at = None;
    loop {
        // Those who mapped since the last time have not been told.
        if told_at != Some(buffer.counters.maps) {
            told_at = Some(buffer.counters.maps);
            buffer.invalidate();
        }
        match buffer.wait_fences(wait.left_jiffies()) {
            Ok(Some(())) => {}
            Ok(None) => return (buffer, Err(EBUSY)),
            Err(e) => return (buffer, Err(e)),
        }
        buffer.zap(&whole_blocks(&buffer, part));
        let object = buffer.buffer();
        let in_use = object.busy_pages(&buffer, part, |piece| to.moves(piece));
        let stale = to == To::Device && buffer.has_stale_device_mapping();
        if in_use == 0 && !stale {
            return (buffer, Ok(()));
        }
        if !stale && wait.left_ms() == 0 && object.may_leave_pages(&buffer, part, wait) {
            return (buffer, Ok(()));
        }
        // SAFETY: By the caller's promise.
        buffer = match unsafe { relock(buffer, dmabuf, wait) } {
            Ok(buffer) => buffer,
            // SAFETY: As above; `relock` has given the lock up.
            Err(e) => return (unsafe { Locked::lock(dmabuf) }, Err(e)),
        };
        match check(&buffer, part, to) {
            Ok(true) => {}
            // Only this move could have changed the places.
            Ok(false) => return (buffer, Ok(())),
            Err(e) => return (buffer, Err(e)),
        }
    }
}

/// `part`, and what is in one block of system memory with it: page table entries of the rest would
/// look like uses of the part.
fn whole_blocks(buffer: &Held<'_>, part: &Range<u64>) -> Range<u64> {
    let mut whole = part.clone();
    for (start, piece) in buffer.pieces.placed() {
        let (from, to) = (part.start.max(start), part.end.min(start + piece.len));
        let pages = piece.system_pages();
        if from >= to || pages.is_empty() {
            continue;
        }
        let page = |at: u64| pages[(at - start) as usize / PAGE_SIZE];
        let (before, _) = system::beside(page(from));
        let (_, after) = system::beside(page(to - 1));
        whole.start = whole.start.min(from.saturating_sub(before));
        whole.end = whole.end.max(to + after);
    }
    whole.end = whole.end.min(buffer.buffer().len);
    whole
}

/// Step 5: nobody uses the part, and the lock is held throughout.
fn commit(
    buffer: &mut Held<'_>,
    part: &Range<u64>,
    to: To,
    patience: Patience<'_>,
) -> Result<Moved> {
    let (object, state) = buffer.parts();
    // All that can fail comes before anything changes. The list of pieces is made anew, so that
    // an error leaves the old one.
    let mut pieces = state.pieces.cut(part)?;
    let mut copied = 0;
    let mut start = 0;
    for piece in pieces.iter_mut() {
        let inside = part.start <= start && start < part.end;
        start += piece.len;
        if !inside || !to.moves(piece) {
            continue;
        }
        match to {
            To::System => {
                let pages = System::alloc(piece.len, Contents::Old)?;
                copy_out(object, piece, &pages, patience)?;
                piece.system = Some(SystemPart { pages, first: 0 });
            }
            To::Device => {
                copy_in(object, piece, patience)?;
                piece.system = None;
            }
        }
        copied += piece.len;
    }
    pieces.join();
    patience.check(object)?;
    state.pieces = pieces;
    state.generation += 1;
    state.counters.moves += 1;
    state.counters.copied += copied;
    state.watchers.signal();
    Ok(Moved {
        generation: state.generation,
        copied,
    })
}

/// Gives a buffer other pages for those of its system memory that somebody uses: he keeps them, with the
/// bytes that they have. Nobody has access by the buffer, and the lock is held. Errors: ENOMEM, EINTR where
/// the task is being killed.
pub(crate) fn leave_pages(buffer: &mut Held<'_>) -> Result {
    for i in 0..buffer.pieces.len() {
        let state: &mut State = buffer;
        let piece = &state.pieces[i];
        if system::busy(piece.system_pages()) == 0 {
            continue;
        }
        let pages = System::alloc(piece.len, Contents::Old)?;
        for (&from, &to) in piece.system_pages().iter().zip(pages.pages()) {
            // SAFETY: Both are pages, mapped in the kernel, and different.
            unsafe {
                let (from, to) = (system::address(from), system::address(to));
                ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), PAGE_SIZE);
                ffi::peerbuf_cond_resched();
            }
        }
        state.pieces[i].system = Some(SystemPart { pages, first: 0 });
    }
    Ok(())
}

/// The most bytes that are copied without letting others run.
const STEP: usize = 1 << 20;

/// What may end copying before its end. The lock is held for all of it.
#[derive(Clone, Copy)]
struct Patience<'a> {
    /// When it is to end by itself, if ever: a process that only attaches must not keep the others from the
    /// buffer for as long as it likes.
    end: Option<&'a Wait>,
}

impl Patience<'_> {
    /// EINTR where the task is being killed, ENODEV where the device was pulled out, EBUSY when the time is
    /// over.
    fn check(self, object: &Buffer) -> Result {
        if ffi::fatal_signal_pending() {
            return Err(EINTR);
        }
        if self.end.is_some_and(|end| end.left_ms() == 0) {
            return Err(EBUSY);
        }
        // A device that was pulled out answers reads with ones and drops writes, without an error.
        // SAFETY: The device structure is kept by ours.
        if !unsafe { bindings::pci_device_is_present(common::raw(object.device.pci())) } {
            return Err(ENODEV);
        }
        Ok(())
    }
}

/// Calls `copy(address in the BAR's kernel mapping, address in system memory, bytes)` for the
/// whole of a piece whose place is `home`.
fn each_run(
    object: &Buffer,
    home: u64,
    pages: &[*mut bindings::page],
    patience: Patience<'_>,
    copy: impl Fn(*mut c_void, *mut c_void, usize),
) -> Result {
    let bar = object.bar();
    let mut at = 0;
    while at < pages.len() {
        patience.check(object)?;
        let address = system::address(pages[at]);
        // As many pages as follow each other. The structures of neighbours are neighbours, too,
        // on every kernel with P2PDMA (SPARSEMEM_VMEMMAP).
        let follows =
            |(i, &page): &(usize, &*mut bindings::page)| page == pages[at].wrapping_add(*i);
        let run = pages[at..]
            .iter()
            .enumerate()
            .take(STEP / PAGE_SIZE)
            .take_while(follows)
            .count();
        let io = bar.kernel_address(home + (at * PAGE_SIZE) as u64)?;
        copy(io, address, run * PAGE_SIZE);
        at += run;
        // SAFETY: Nothing is held here that forbids sleeping.
        unsafe { ffi::peerbuf_cond_resched() };
    }
    Ok(())
}

fn copy_out(object: &Buffer, piece: &Piece, to: &Arc<System>, patience: Patience<'_>) -> Result {
    let home = piece.home.ok_or(EINVAL)?;
    each_run(object, home, to.pages(), patience, |io, memory, len| {
        // SAFETY: Both are `len` bytes long, the lock is held and the buffer not revoked, so the
        // device is bound and the mapping of its BAR valid.
        unsafe { bindings::memcpy_fromio(memory, io, len) };
    })
}

fn copy_in(object: &Buffer, piece: &Piece, patience: Patience<'_>) -> Result {
    let home = piece.home.ok_or(EINVAL)?;
    each_run(
        object,
        home,
        piece.system_pages(),
        patience,
        |io, memory, len| {
            // SAFETY: As in `copy_out`.
            unsafe { bindings::memcpy_toio(io, memory, len) };
        },
    )?;
    // The writes are posted: a peer may come by another way.
    object.bar().flush(home);
    Ok(())
}
