//! The ioctls of block devices (include/uapi/linux/fs.h).

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::errno::Errno;

mod raw {
    // The ioctl number contains the size of a `size_t`, but the kernel writes a `u64`.
    nix::ioctl_read_bad!(
        blkgetsize64,
        nix::request_code_read!(0x12, 114, size_of::<usize>()),
        u64
    );
}

/// `BLKGETSIZE64`: the size in bytes.
pub(crate) fn size(device: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut size = 0;
    // SAFETY: the kernel writes a u64, which lives through the call.
    unsafe { raw::blkgetsize64(device.as_raw_fd(), &raw mut size) }.map_err(super::ioctl_errno)?;
    Ok(size)
}
