//! The ioctls of a dma-buf (include/uapi/linux/dma-buf.h).

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::errno::Errno;

/// `DMA_BUF_SYNC_READ`
pub(crate) const SYNC_READ: u64 = 1 << 0;
/// `DMA_BUF_SYNC_WRITE`
pub(crate) const SYNC_WRITE: u64 = 1 << 1;
/// `DMA_BUF_SYNC_END`; without it the access begins.
pub(crate) const SYNC_END: u64 = 1 << 2;

/// `struct dma_buf_sync`
#[repr(C)]
pub struct DmaBufSync {
    flags: u64,
}

mod raw {
    nix::ioctl_write_ptr!(dma_buf_sync, b'b', 0, super::DmaBufSync);
}

/// Begins or ends CPU access to a dma-buf.
pub(crate) fn sync(fd: BorrowedFd<'_>, flags: u64) -> Result<(), Errno> {
    let argument = DmaBufSync { flags };
    loop {
        // SAFETY: the argument is what the ioctl reads, and lives through the call.
        match unsafe { raw::dma_buf_sync(fd.as_raw_fd(), &argument) } {
            Ok(_) => return Ok(()),
            // The header asks callers to try again on these two.
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {}
            Err(errno) => return Err(super::ioctl_errno(errno)),
        }
    }
}
