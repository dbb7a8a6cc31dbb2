//! Descriptors that are given to a library.
//!
//! Libraries differ in whether they close a descriptor that they took, or refused, and few say so. So each gets a copy
//! of its own, and what it left open is closed here.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use crate::error::SystemError;

/// A copy of a descriptor. When it is dropped it is closed, unless the library has closed it.
///
/// Another thread that gets the number anew for the same object, between the library's `close` and the drop, would lose
/// that descriptor.
#[derive(Debug)]
pub(crate) struct Given {
    number: RawFd,
    /// Device and inode.
    object: (u64, u64),
}

impl Given {
    pub(crate) fn copy_of(fd: BorrowedFd<'_>) -> Result<Given, SystemError> {
        let copy = fd
            .try_clone_to_owned()
            .map_err(|error| SystemError::new("fcntl(F_DUPFD_CLOEXEC)", "a dma-buf", &error))?;
        let object = identity(copy.as_fd())
            .map_err(|errno| SystemError::new("fstat", "a dma-buf", errno))?;
        let number = copy.into_raw_fd();
        Ok(Given { number, object })
    }

    /// For the library.
    pub(crate) fn number(&self) -> RawFd {
        self.number
    }

    /// The library owns the copy from now on.
    #[cfg(feature = "vulkan")]
    pub(crate) fn taken(self) {
        std::mem::forget(self);
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        // SAFETY: the number is asked about only, and may be of nothing.
        let now = identity(unsafe { BorrowedFd::borrow_raw(self.number) });
        if now == Ok(self.object) {
            // SAFETY: it still is the copy, which `copy_of` made.
            drop(unsafe { OwnedFd::from_raw_fd(self.number) });
        }
    }
}

fn identity(fd: BorrowedFd<'_>) -> rustix::io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}
