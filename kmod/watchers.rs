// SPDX-License-Identifier: GPL-2.0

//! The eventfds to signal when a buffer changes.

use core::ptr;

use kernel::{bindings, error::from_err_ptr, prelude::*};

/// An eventfd, and the open file of the node through which it was added. Closing that file removes the
/// watcher.
struct Watcher {
    ctx: *mut bindings::eventfd_ctx,
    owner: *mut bindings::file,
    /// The `abi::EVENT_*` of which it hears.
    events: u64,
}

impl Watcher {
    /// Errors: EBADF, EINVAL if `eventfd` is not an eventfd.
    fn new(eventfd: i32, owner: *mut bindings::file, events: u64) -> Result<Self> {
        // SAFETY: The call accepts any number.
        let ctx = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(eventfd) })?;
        Ok(Self { ctx, owner, events })
    }

    /// Adds 1 to the eventfd if it hears of one of `events`.
    fn signal(&self, events: u64) {
        if self.events & events != 0 {
            // SAFETY: The watcher owns a reference. The mask is for callers inside a wake-up of an eventfd;
            // none is here.
            unsafe { bindings::eventfd_signal_mask(self.ctx, 0) };
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // SAFETY: `new` took the reference.
        unsafe { bindings::eventfd_ctx_put(self.ctx) };
    }
}

/// A buffer's watchers.
pub(crate) struct Watchers(KVec<Watcher>);

// SAFETY: The pointers are not tied to a thread, and `owner` is only compared.
unsafe impl Send for Watchers {}

impl Watchers {
    /// A limit above any sensible use, which bounds the kernel memory that a caller can take.
    const MOST: usize = 1024;

    pub(crate) const fn new() -> Self {
        Self(KVec::new())
    }

    /// Adds a watcher of `events`, and signals it if one of them holds `already`. Errors: EBADF, EINVAL (not an
    /// eventfd), ENOSPC (too many), ENOMEM.
    pub(crate) fn add(
        &mut self,
        eventfd: i32,
        owner: *mut bindings::file,
        events: u64,
        already: u64,
    ) -> Result {
        let watcher = Watcher::new(eventfd, owner, events)?;
        if self.0.len() >= Self::MOST {
            return Err(ENOSPC);
        }
        self.0.reserve(1, GFP_KERNEL_ACCOUNT)?;
        watcher.signal(already);
        Ok(self.0.push(watcher, GFP_KERNEL_ACCOUNT)?)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Removes a watcher. Errors: EBADF, EINVAL (not an eventfd), ENOENT.
    pub(crate) fn remove(&mut self, eventfd: i32, owner: *mut bindings::file) -> Result {
        let wanted = Watcher::new(eventfd, owner, 0)?;
        let same = |has: &Watcher| ptr::eq(has.ctx, wanted.ctx) && ptr::eq(has.owner, wanted.owner);
        let index = self.0.iter().position(same).ok_or(ENOENT)?;
        let _ = self.0.remove(index);
        Ok(())
    }

    /// Removes all watchers of an open file, which is being closed.
    pub(crate) fn remove_all(&mut self, owner: *mut bindings::file) {
        self.0.retain(|has| !ptr::eq(has.owner, owner));
    }

    /// Signals the watchers that hear of one of `events`.
    pub(crate) fn signal(&self, events: u64) {
        self.0.iter().for_each(|watcher| watcher.signal(events));
    }
}
