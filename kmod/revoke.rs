// SPDX-License-Identifier: GPL-2.0

//! Taking access to a buffer away, and giving it again.
//!
//! A revoke marks the buffer under the reservation lock, and from then on nobody gets new access:
//! map, pin and vmap answer ENODEV, page faults SIGBUS. It tells the importers, ends the
//! processor's access, and waits, as long as its caller says, until fences, mappings and direct
//! I/O are gone. Fences end what importers do with full access; unmapping ends speculative reads:
//! both are needed. The fences are those of the mark (`fences.rs`). Nothing is waited for with the
//! reservation lock held, since importers need it to unmap.

use kernel::{bindings, prelude::*};

use crate::{
    buffer::{revoked, Held, Locked, State},
    ffi, moves,
    wait::Wait,
};

/// Who still has access when the time of a revoke is over.
#[derive(Default)]
pub(crate) struct Left {
    /// Mappings that importers have.
    pub(crate) holders: usize,
    /// Whether a fence is not signalled.
    pub(crate) fences: bool,
    /// Pages that direct I/O uses.
    pub(crate) pages: usize,
    /// The generation that the buffer has now.
    pub(crate) generation: u64,
}

impl Left {
    pub(crate) fn nobody(&self) -> bool {
        self.holders == 0 && !self.fences && self.pages == 0
    }
}

/// What a revoke waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Everybody who can reach the buffer's bytes.
    Buffer,
    /// Those who can reach the BAR: the device goes away. Whoever has system pages may keep them;
    /// direct I/O on pages of the BAR is waited for by the device, for all of its buffers.
    Bar,
}

/// The longest that is waited at a time, before a look at what is left.
const SLICE_MS: u32 = 20;

/// Takes access away for the reason `why`, a `revoked::*` bit, and waits at most `limit_ms`. A process
/// that is killed stops waiting for what it has revoked; a device that goes away does not.
///
/// # Safety
///
/// `dmabuf` is one of ours and the caller keeps it. May sleep; neither the reservation lock nor
/// anything below it in the lock order is held.
pub(crate) unsafe fn revoke(
    dmabuf: *mut bindings::dma_buf,
    why: u32,
    scope: Scope,
    limit_ms: u32,
) -> Left {
    let wait = Wait::begin(limit_ms);
    // SAFETY: By the caller's promise.
    let mut buffer = unsafe { Locked::lock(dmabuf) };
    take_away(&mut buffer, why);
    // SAFETY: As above.
    unsafe { wait_locked(buffer, dmabuf, why, scope, wait) }
}

/// As [`revoke`], of what [`take_away`] has revoked: importers are not told again.
///
/// # Safety
///
/// As for [`revoke`].
pub(crate) unsafe fn wait_for(
    dmabuf: *mut bindings::dma_buf,
    why: u32,
    scope: Scope,
    limit_ms: u32,
) -> Left {
    let wait = Wait::begin(limit_ms);
    // SAFETY: By the caller's promise.
    unsafe { wait_locked(Locked::lock(dmabuf), dmabuf, why, scope, wait) }
}

/// Takes access away for the reason `why`, and tells who has it still; waits for nobody.
pub(crate) fn take_away(buffer: &mut Held<'_>, why: u32) {
    let reasons = buffer.buffer().reasons();
    if reasons == 0 {
        buffer.generation += 1;
        buffer.watchers.signal();
    }
    // A move that waits for direct I/O sees the mark when it has the lock again, and gives up.
    buffer.set_reasons(reasons | why);
    buffer.invalidate();
    let whole = 0..buffer.buffer().len;
    // After the mark no fault puts in another page, so what is zapped here stays so.
    buffer.zap(&whole);
    // After the importers were told, who may leave a fence for what they still have to end. With another
    // reason, none of what came since means anything.
    if reasons == 0 {
        buffer.revoked = Some(Wait::begin(0));
        buffer.mark_fences();
    }
}

/// Waits until nobody has access any more, or the time is over.
///
/// # Safety
///
/// As for [`revoke`], but that `buffer` is `dmabuf` locked.
unsafe fn wait_locked(
    mut buffer: Locked<'_>,
    dmabuf: *mut bindings::dma_buf,
    why: u32,
    scope: Scope,
    wait: Wait,
) -> Left {
    let left = loop {
        let left = count(&buffer, scope);
        let given_up = why == revoked::BY_OWNER && ffi::fatal_signal_pending();
        if left.nobody() || wait.left_ms() == 0 || given_up {
            break left;
        }
        let slice = wait.left_ms().min(SLICE_MS);
        let object = buffer.buffer();
        let marked = buffer.marked.clone();
        buffer.expect_change();
        drop(buffer);
        match marked {
            Some(marked) if left.fences => marked.wait_for_one(Wait::jiffies(slice)),
            _ => object.wait_changed(if left.holders == 0 { 1 } else { slice }),
        }
        // SAFETY: By the caller's promise; the lock was given up above.
        buffer = unsafe { Locked::lock(dmabuf) };
    };
    let waited = wait.ns();
    buffer.counters.waited(waited);
    left
}

fn count(buffer: &Held<'_>, scope: Scope) -> Left {
    let state: &State = buffer;
    let (holders, pages) = match scope {
        Scope::Buffer => {
            let object = buffer.buffer();
            let whole = 0..object.len;
            (state.holders(), object.busy_pages(state, &whole, |_| true))
        }
        Scope::Bar => (state.device_holders(), 0),
    };
    Left {
        holders,
        fences: buffer.fences_pending(),
        pages,
        generation: state.generation,
    }
}

/// Takes a reason for revoking away; without any left there is access again, with a new
/// generation, which is returned.
///
/// Errors: EALREADY where the reason does not hold, ENODEV where the device is gone, EBUSY where
/// somebody still has access from before; ENOMEM, EINTR where pages that somebody keeps were to be
/// replaced.
pub(crate) fn restore(buffer: &mut Held<'_>, why: u32) -> Result<u64> {
    let reasons = buffer.buffer().reasons();
    if buffer.buffer().gone() {
        return Err(ENODEV);
    }
    if reasons & why == 0 {
        return Err(ffi::errno(bindings::EALREADY));
    }
    let mut left = count(buffer, Scope::Buffer);
    if why == revoked::BY_OWNER && left.pages != 0 && left.holders == 0 && !left.fences {
        // Pages that somebody just keeps do not keep the owner from giving access again.
        let (object, state) = buffer.parts();
        let since = state.revoked.as_ref();
        if since.is_some_and(|since| object.may_leave_pages(state, &(0..object.len), since)) {
            moves::leave_pages(buffer)?;
            left.pages = 0;
        }
    }
    // Who kept his mapping through a reset had the BAR taken from under him and must not have it
    // back unawares; that is for the one who resets to wait for.
    if why == revoked::BY_OWNER && !left.nobody() {
        return Err(EBUSY);
    }
    buffer.set_reasons(reasons & !why);
    if reasons == why {
        buffer.marked = None;
        buffer.revoked = None;
        buffer.generation += 1;
        buffer.watchers.signal();
        buffer.notify();
    }
    Ok(buffer.generation)
}

/// Says in the log who has what a revoke of the BAR waits for.
///
/// # Safety
///
/// As for [`revoke`].
pub(crate) unsafe fn name_holders(dmabuf: *mut bindings::dma_buf) {
    // SAFETY: By the caller's promise.
    let buffer = unsafe { Locked::lock(dmabuf) };
    let exporter = buffer.buffer().device.name();
    for mapping in buffer
        .mappings
        .iter()
        .filter(|mapping| mapping.shows_device())
    {
        // SAFETY: Who has a mapping is attached, which keeps its device; the lock keeps the mapping.
        let importer: &kernel::device::Device =
            unsafe { kernel::device::Device::from_raw((*mapping.attachment).dev) };
        pr_warn!(
            "{exporter}: revoked, and waiting for {} to unmap it\n",
            importer.name()
        );
    }
    if buffer
        .kernel_mapping
        .as_ref()
        .is_some_and(|mapping| mapping.device)
    {
        pr_warn!("{exporter}: revoked, and waiting for the end of a kernel mapping\n");
    }
    if buffer.fences_pending() {
        pr_warn!("{exporter}: revoked, and waiting for a fence\n");
    }
}
