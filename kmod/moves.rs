// SPDX-License-Identifier: GPL-2.0

//! Moves a buffer's bytes between its BAR and system memory.
//!
//! Steps of a move, with the reservation lock held:
//!
//! 1. Check for users under which the buffer cannot move: pins, kernel mappings, importers that need system
//!    memory.
//! 2. Invalidate the importers' mappings (`invalidate_mappings`) and wait for every fence. No importer uses
//!    its old mapping after that; it may keep the mapping, which keeps the old backing allocated until the
//!    unmap.
//! 3. Zap the CPU mappings. Later accesses fault.
//! 4. Wait for direct I/O that holds pages. Such I/O may need page faults to make progress, and faults need
//!    the lock, so the move releases the lock for the wait, and then repeats steps 2 to 4.
//! 5. Copy the bytes, switch to the new places, increment the generation.
//!
//! During the wait in step 4 the bytes stay in the old place, which new mappings and faults use. Faults are
//! slowed down then (see `exporter.rs`), so that a stream of direct I/O comes to an end. A move needs no
//! fence of its own: while it copies it holds the lock, so no one sees half of it.
//!
//! A user may keep system pages for longer than the move's time limit. The move then leaves those pages, with
//! the old bytes, to their user, who does not see later changes; see [`Buffer::may_leave_pages`].
//!
//! A move to the BAR also waits for mappings of the BAR from before an earlier move, because it would
//! overwrite the bytes under them.

use core::{ops::Range, ptr};

use kernel::{bindings, ffi::c_void, page::PAGE_SIZE, prelude::*, sync::Arc};

use crate::{
    abi,
    buffer::{Buffer, Held, Left, Locked, State},
    common, ffi,
    pieces::{Piece, SystemPart},
    system::{self, Contents, System},
    wait::Wait,
};

/// The destination of a move.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    Device,
    System,
}

impl To {
    /// Whether a move would change the placement of `piece`.
    fn moves(self, piece: &Piece) -> bool {
        match self {
            Self::Device => piece.system.is_some() && piece.home.is_some(),
            Self::System => piece.system.is_none(),
        }
    }
}

/// The party for which the buffer moves.
#[derive(Clone, Copy)]
pub(crate) enum For {
    /// The buffer's owner. The time limit covers the waits; the copy may take longer.
    Owner,
    /// An importer that attaches. The time limit covers the copy, too.
    Importer,
}

/// The result of a move.
pub(crate) struct Moved {
    pub(crate) generation: u64,
    /// Bytes.
    pub(crate) copied: u64,
}

/// Moves `part` of a buffer: page-aligned, not empty, inside the buffer.
///
/// Errors: those of `abi::Move`. On an error nothing has moved; on EBUSY `left` says what was in the way, all zero if
/// that was another move.
///
/// # Safety
///
/// `dmabuf` was made by this module and the caller keeps it. May sleep; the caller does not hold the
/// reservation lock.
pub(crate) unsafe fn move_part(
    dmabuf: *mut bindings::dma_buf,
    part: Range<u64>,
    to: To,
    limit_ms: u32,
    for_whom: For,
    left: &mut Left,
) -> Result<Moved> {
    let wait = Wait::begin(limit_ms);
    // SAFETY: The caller keeps the dma-buf and does not hold its lock.
    let mut buffer = unsafe { Locked::lock(dmabuf) };
    // One move at a time: another move may be in its step 4, without the lock.
    while buffer.moving {
        // SAFETY: `buffer` is locked for `dmabuf`, which the caller keeps.
        buffer = unsafe { relock(buffer, dmabuf, &wait)? };
    }
    match check(&buffer, &part, to) {
        Ok(true) => {}
        Ok(false) => {
            return Ok(Moved {
                generation: buffer.generation,
                copied: 0,
            })
        }
        Err(e) => {
            *left = in_the_way(&buffer, &part, to);
            return Err(e);
        }
    }
    buffer.moving = true;
    // SAFETY: `buffer` is locked for `dmabuf`, which the caller keeps.
    let (mut buffer, result) = unsafe { prepare(buffer, dmabuf, &part, to, &wait) };
    let patience = Patience {
        end: matches!(for_whom, For::Importer).then_some(&wait),
    };
    let result = result.and_then(|()| commit(&mut buffer, &part, to, patience));
    if result.is_err() {
        *left = in_the_way(&buffer, &part, to);
    }
    buffer.moving = false;
    let waited = wait.ns();
    buffer.counters.waited(waited);
    buffer.notify();
    result
}

/// What is in the way of a move now. The lock is held since the move gave up, or was taken again at once.
fn in_the_way(buffer: &Held<'_>, part: &Range<u64>, to: To) -> Left {
    let object = buffer.buffer();
    Left {
        holders: buffer.holders_against(to == To::Device),
        fences: buffer.fences_pending(),
        pages: object.busy_pages(buffer, part, |piece| to.moves(piece)),
        pins: buffer.pins,
        generation: buffer.generation,
    }
}

/// Moves the whole buffer to system memory with the caller's lock held throughout. So direct I/O that needs a
/// page fault to end fails the move (EBUSY).
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
        // SAFETY: The callers hold only locks that allow sleeping.
        unsafe { bindings::msleep(1) };
    }
    let patience = Patience { end: Some(&wait) };
    let moved = commit(buffer, &whole, To::System, patience);
    let waited = wait.ns();
    buffer.counters.waited(waited);
    moved.map(drop)
}

/// Whether there is anything to move. Its errors are those that no wait removes.
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

/// Releases the lock until the next change, for a moment at most, and takes it again.
///
/// Errors: EBUSY after the time limit, EINTR on a signal.
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
    // The end of direct I/O causes no wake-up, so wait only 1 ms.
    object.wait_changed(1);
    // SAFETY: The caller keeps the dma-buf, and the lock was released above.
    Ok(unsafe { Locked::lock(dmabuf) })
}

/// Steps 2 to 4 of the module's comment. On success no one uses the part. The lock is held on entry and on
/// return, also on an error, but not throughout.
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
        // Mappings made since the last invalidation have not been invalidated.
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
        let stale = to == To::Device && buffer.stale_device_mappings() != 0;
        if in_use == 0 && !stale {
            return (buffer, Ok(()));
        }
        if !stale && wait.left_ms() == 0 && object.may_leave_pages(&buffer, part, wait) {
            return (buffer, Ok(()));
        }
        // SAFETY: `buffer` is locked for `dmabuf`, which the caller keeps.
        buffer = match unsafe { relock(buffer, dmabuf, wait) } {
            Ok(buffer) => buffer,
            // SAFETY: The caller keeps the dma-buf; `relock` has released the lock.
            Err(e) => return (unsafe { Locked::lock(dmabuf) }, Err(e)),
        };
        match check(&buffer, part, to) {
            Ok(true) => {}
            // Cannot happen: no other move changes the placement meanwhile.
            Ok(false) => return (buffer, Ok(())),
            Err(e) => return (buffer, Err(e)),
        }
    }
}

/// `part`, extended to whole blocks of system memory: a page table entry elsewhere in a block would count as
/// a use of the part.
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

/// Step 5. No one uses the part, and the lock is held throughout.
fn commit(
    buffer: &mut Held<'_>,
    part: &Range<u64>,
    to: To,
    patience: Patience<'_>,
) -> Result<Moved> {
    let (object, state) = buffer.parts();
    // Everything that can fail comes before the first change. The move builds a new list of pieces, so an
    // error leaves the old one in place.
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
    state.watchers.signal(abi::EVENT_MOVED);
    Ok(Moved {
        generation: state.generation,
        copied,
    })
}

/// Replaces the system pages that are in use by copies. Their users keep the old pages, with the old bytes.
/// The buffer is revoked, and the lock is held. Errors: ENOMEM; EINTR if the task is being killed.
pub(crate) fn leave_pages(buffer: &mut Held<'_>) -> Result {
    for i in 0..buffer.pieces.len() {
        let state: &mut State = buffer;
        let piece = &state.pieces[i];
        if system::busy(piece.system_pages()) == 0 {
            continue;
        }
        let pages = System::alloc(piece.len, Contents::Old)?;
        for (&from, &to) in piece.system_pages().iter().zip(pages.pages()) {
            // SAFETY: Both are pages in the kernel's linear mapping, and they differ.
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

/// Bytes copied between two calls of `cond_resched`.
const STEP: usize = 1 << 20;

/// Conditions that abort a copy. The lock is held during the whole copy.
#[derive(Clone, Copy)]
struct Patience<'a> {
    /// The time limit, if there is one. A process that only attaches must not block the buffer's other users
    /// for an arbitrary time.
    end: Option<&'a Wait>,
}

impl Patience<'_> {
    /// Errors: EINTR if the task is being killed, ENODEV if the device was pulled out, EBUSY after the time
    /// limit.
    fn check(self, object: &Buffer) -> Result {
        if ffi::fatal_signal_pending() {
            return Err(EINTR);
        }
        if self.end.is_some_and(|end| end.left_ms() == 0) {
            return Err(EBUSY);
        }
        // A device that was pulled out answers reads with ones and drops writes, without an error.
        // SAFETY: Our `Device` keeps the PCI device.
        if !unsafe { bindings::pci_device_is_present(common::raw(object.device.pci())) } {
            return Err(ENODEV);
        }
        Ok(())
    }
}

/// Calls `copy(address in the BAR's kernel mapping, address in system memory, bytes)` for each contiguous run
/// of a piece whose offset in the BAR is `home`.
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
        // Counts consecutive pages. Consecutive pages have consecutive page structures on every kernel with
        // P2PDMA (SPARSEMEM_VMEMMAP).
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
        // SAFETY: The callers hold only locks that allow sleeping.
        unsafe { ffi::peerbuf_cond_resched() };
    }
    Ok(())
}

fn copy_out(object: &Buffer, piece: &Piece, to: &Arc<System>, patience: Patience<'_>) -> Result {
    let home = piece.home.ok_or(EINVAL)?;
    each_run(object, home, to.pages(), patience, |io, memory, len| {
        // SAFETY: Both ranges are `len` bytes long. The lock is held and the buffer is not revoked, so the
        // device is bound and the mapping of its BAR is valid.
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
            // SAFETY: Both ranges are `len` bytes long. The lock is held and the buffer is not revoked, so
            // the device is bound and the mapping of its BAR is valid.
            unsafe { bindings::memcpy_toio(io, memory, len) };
        },
    )?;
    // The writes are posted, and a peer's reads may take another path.
    object.bar().flush(home);
    Ok(())
}
