// SPDX-License-Identifier: GPL-2.0

//! The eventfds of those who want to know when a buffer changes.

use core::ptr;

use kernel::{bindings, error::from_err_ptr, prelude::*};

/// An eventfd that is signalled, and the open file of the node by which it was asked for: it ends
/// with that.
struct Watcher {
    ctx: *mut bindings::eventfd_ctx,
    owner: *mut bindings::file,
}

impl Watcher {
    /// Errors: EBADF, EINVAL where `eventfd` is something else.
    fn new(eventfd: i32, owner: *mut bindings::file) -> Result<Self> {
        // SAFETY: It checks what the number stands for.
        let ctx = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(eventfd) })?;
        Ok(Self { ctx, owner })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // SAFETY: `new` has taken the reference.
        unsafe { bindings::eventfd_ctx_put(self.ctx) };
    }
}

/// The watchers of a buffer.
pub(crate) struct Watchers(KVec<Watcher>);

// SAFETY: The pointers are not tied to a thread; `owner` is never followed.
unsafe impl Send for Watchers {}

impl Watchers {
    /// So many that nobody honest is refused, and that the kernel's memory is safe.
    const MOST: usize = 1024;

    pub(crate) const fn new() -> Self {
        Self(KVec::new())
    }

    /// Errors: EBADF, EINVAL (no eventfd), ENOSPC (too many), ENOMEM.
    pub(crate) fn add(&mut self, eventfd: i32, owner: *mut bindings::file) -> Result {
        let watcher = Watcher::new(eventfd, owner)?;
        if self.0.len() >= Self::MOST {
            return Err(ENOSPC);
        }
        Ok(self.0.push(watcher, GFP_KERNEL_ACCOUNT)?)
    }

    /// Errors: EBADF, EINVAL (no eventfd), ENOENT.
    pub(crate) fn remove(&mut self, eventfd: i32, owner: *mut bindings::file) -> Result {
        let wanted = Watcher::new(eventfd, owner)?;
        let same = |has: &Watcher| ptr::eq(has.ctx, wanted.ctx) && ptr::eq(has.owner, wanted.owner);
        let index = self.0.iter().position(same).ok_or(ENOENT)?;
        let _ = self.0.remove(index);
        Ok(())
    }

    /// Ends all that was asked for by an open file, which is being closed.
    pub(crate) fn remove_all(&mut self, owner: *mut bindings::file) {
        self.0.retain(|has| !ptr::eq(has.owner, owner));
    }

    /// Adds 1 to each eventfd.
    pub(crate) fn signal(&self) {
        for watcher in &self.0 {
            // SAFETY: The watcher has a reference. Nothing here waits on an eventfd, which is
            // what the mask would be for.
            unsafe { bindings::eventfd_signal_mask(watcher.ctx, 0) };
        }
    }
}
