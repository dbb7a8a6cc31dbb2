//! `pread` and `pwrite` between a file and mapped memory.
//!
//! The wrappers in rustix and nix take slices, and mapped memory must never be one, hence the
//! raw calls. [`DirectIo`] is the one funnel for them, so that tests can put a kernel that
//! refuses or lies in its place.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

use crate::errno::Errno;
use crate::sys::memory::Window;

/// Positioned I/O between a file and a window of mapped memory, as the system calls define it.
pub(crate) trait DirectIo {
    /// `pread`. Returns the bytes read, 0 at the end of the file.
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno>;
    /// `pwrite`. Returns the bytes written.
    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno>;
}

/// The kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel;

impl DirectIo for Kernel {
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno> {
        if !into.writable {
            return Err(Errno::FAULT);
        }
        let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::INVAL)?;
        retry(|| {
            // SAFETY: the window's bytes are mapped, writable and not referenced (invariant).
            unsafe { libc::pread64(file.as_raw_fd(), into.address.cast(), into.length, offset) }
        })
    }

    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno> {
        let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::INVAL)?;
        retry(|| {
            // SAFETY: the window's bytes are mapped (invariant), and the kernel only reads them.
            unsafe { libc::pwrite64(file.as_raw_fd(), from.address.cast(), from.length, offset) }
        })
    }
}

fn retry(mut call: impl FnMut() -> isize) -> Result<usize, Errno> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result as usize);
        }
        // Not nix's or std's enum: numbers that userspace should never see must survive.
        let errno = Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
        if errno.0 != libc::EINTR {
            return Err(errno);
        }
    }
}
