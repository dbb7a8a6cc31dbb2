// SPDX-License-Identifier: GPL-2.0

//! Revoke and restore: takes access to a buffer away and gives it back.
//!
//! A revoke marks the buffer with the reservation lock held. From then on map, pin and vmap return ENODEV,
//! and page faults raise SIGBUS. Then it invalidates the importers' mappings, zaps CPU mappings, and waits,
//! within the caller's limit, for fences, unmaps and direct I/O. It waits for fences, because they end an
//! importer's deliberate accesses, and for unmaps, because those end speculative reads. Only fences present
//! at the mark count (`fences.rs`). The waits run without the reservation lock, because importers need it to
//! unmap.

use kernel::{bindings, prelude::*};

use crate::{
    abi,
    buffer::{Held, Left, Locked, State},
    device::revoked,
    ffi, moves,
    wait::Wait,
};

/// The accesses that a revoke waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All accesses to the buffer's bytes.
    Buffer,
    /// Accesses to the BAR, because its device goes away. Users of system pages may keep them. The device
    /// waits for direct I/O on pages of the BAR itself, for all of its buffers at once.
    Bar,
}

/// The longest single wait before the next check.
const SLICE_MS: u32 = 20;

/// Revokes access for the reason `why`, `revoked::*` bits, and waits at most `limit_ms`. A fatal signal ends
/// the wait of an owner's revoke, but not that of a device's removal.
///
/// # Safety
///
/// `dmabuf` was made by this module and the caller keeps it. May sleep; the caller holds neither the
/// reservation lock nor any lock after it in the lock order.
pub(crate) unsafe fn revoke(
    dmabuf: *mut bindings::dma_buf,
    why: u32,
    scope: Scope,
    limit_ms: u32,
) -> Left {
    let wait = Wait::begin(limit_ms);
    // SAFETY: The caller keeps the dma-buf and does not hold its lock.
    let mut buffer = unsafe { Locked::lock(dmabuf) };
    take_away(&mut buffer, why);
    // SAFETY: `buffer` is `dmabuf` locked, and the caller keeps it.
    unsafe { wait_locked(buffer, dmabuf, why, scope, wait) }
}

/// Waits as [`revoke`] does, after a [`take_away`], without a second invalidation.
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
    // SAFETY: The caller keeps the dma-buf and does not hold its lock.
    unsafe { wait_locked(Locked::lock(dmabuf), dmabuf, why, scope, wait) }
}

/// Revokes access for the reason `why` and invalidates all mappings, without waiting.
pub(crate) fn take_away(buffer: &mut Held<'_>, why: u32) {
    let reasons = buffer.buffer().reasons();
    if reasons == 0 {
        buffer.generation += 1;
        buffer.watchers.signal(abi::EVENT_REVOKED);
    }
    // A move in its step 4 sees the mark when it has the lock again, and gives up.
    buffer.set_reasons(reasons | why);
    buffer.invalidate();
    let whole = 0..buffer.buffer().len;
    // After the mark no fault maps another page, so this zap is final.
    buffer.zap(&whole);
    // Recorded after the invalidation, in which an importer may add a fence for accesses still in flight. A
    // revoke for a second reason keeps the first list: no fence added after the first mark guards an access.
    if reasons == 0 {
        buffer.revoked = Some(Wait::begin(0));
        buffer.mark_fences();
    }
}

/// Waits until no access remains, or the time is over.
///
/// # Safety
///
/// As for [`revoke`], except that `buffer` is `dmabuf` locked.
unsafe fn wait_locked(
    mut buffer: Locked<'_>,
    dmabuf: *mut bindings::dma_buf,
    why: u32,
    scope: Scope,
    wait: Wait,
) -> Left {
    let left = loop {
        let left = count(&buffer, scope);
        let given_up = why & revoked::BY_OWNER != 0 && ffi::fatal_signal_pending();
        if left.nobody() || wait.left_ms() == 0 || given_up {
            break left;
        }
        let slice = wait.left_ms().min(SLICE_MS);
        let object = buffer.buffer();
        let marked = buffer.marked.clone();
        buffer.expect_change();
        drop(buffer);
        match marked {
            Some(marked) if left.fences != 0 => marked.wait_for_one(Wait::jiffies(slice)),
            _ => object.wait_changed(if left.holders == 0 { 1 } else { slice }),
        }
        // SAFETY: The caller keeps the dma-buf, and the lock was released above.
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
        pins: 0,
        generation: state.generation,
    }
}

/// Removes the reason `why` of a revoke. Access is restored when no reason is left, with a new generation.
/// Returns the generation.
///
/// Errors: EALREADY if the reason does not hold, ENODEV if the device is gone or the owner's revoke permanent,
/// EBUSY if accesses from before the revoke remain; ENOMEM or EINTR from replacing pages that a user keeps.
pub(crate) fn restore(buffer: &mut Held<'_>, why: u32) -> Result<u64> {
    let reasons = buffer.buffer().reasons();
    if buffer.buffer().gone() || (why == revoked::BY_OWNER && buffer.buffer().permanently_revoked())
    {
        return Err(ENODEV);
    }
    if reasons & why == 0 {
        return Err(ffi::errno(bindings::EALREADY));
    }
    let scope = match why {
        revoked::BY_OWNER => Scope::Buffer,
        _ => Scope::Bar,
    };
    let mut left = count(buffer, scope);
    if why == revoked::BY_OWNER && left.pages != 0 && left.holders == 0 && left.fences == 0 {
        // A user who merely keeps pages must not keep the owner from restoring access.
        let (object, state) = buffer.parts();
        let since = state.revoked.as_ref();
        if since.is_some_and(|since| object.may_leave_pages(state, &(0..object.len), since)) {
            moves::leave_pages(buffer)?;
            left.pages = 0;
        }
    }
    // An importer that kept its mapping must not regain the memory unawares, so the owner waits, and after an
    // error the buffer stays revoked. A reset and a suspend have waited; a suspend that could not changed nothing.
    let waited = matches!(why, revoked::BY_RESET | revoked::BY_POWER);
    if !waited && !left.nobody() {
        return Err(EBUSY);
    }
    buffer.set_reasons(reasons & !why);
    if reasons == why {
        buffer.marked = None;
        buffer.revoked = None;
        buffer.generation += 1;
        buffer.watchers.signal(abi::EVENT_RESTORED);
        buffer.notify();
    }
    Ok(buffer.generation)
}

/// Logs each importer that a revoke of the BAR waits for.
///
/// # Safety
///
/// As for [`revoke`].
pub(crate) unsafe fn name_holders(dmabuf: *mut bindings::dma_buf) {
    // SAFETY: The caller keeps the dma-buf and does not hold its lock.
    let buffer = unsafe { Locked::lock(dmabuf) };
    let exporter = buffer.buffer().device.name();
    for mapping in buffer
        .mappings
        .iter()
        .filter(|mapping| mapping.shows_device())
    {
        // SAFETY: The lock keeps the mapping, a mapping its attachment, and an attachment its device.
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
    if buffer.fences_pending() != 0 {
        pr_warn!("{exporter}: revoked, and waiting for a fence\n");
    }
}
