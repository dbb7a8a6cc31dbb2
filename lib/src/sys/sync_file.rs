//! The ioctl of a sync file (include/uapi/linux/sync_file.h).

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::errno::Errno;

/// `struct sync_file_info`. With no room for the fences themselves the kernel gives their number.
#[repr(C)]
#[derive(Default)]
pub struct SyncFileInfo {
    name: [u8; 32],
    /// 0 pending, 1 signalled, negative: the errno of the fence that failed.
    pub(crate) status: i32,
    flags: u32,
    pub(crate) num_fences: u32,
    pad: u32,
    sync_fence_info: u64,
}

mod raw {
    nix::ioctl_readwrite!(sync_ioc_file_info, b'>', 4, super::SyncFileInfo);
}

/// `SYNC_IOC_FILE_INFO`
pub(crate) fn info(fd: BorrowedFd<'_>) -> Result<SyncFileInfo, Errno> {
    let mut argument = SyncFileInfo::default();
    // SAFETY: the argument is the struct that the ioctl takes, and says that no array follows.
    unsafe { raw::sync_ioc_file_info(fd.as_raw_fd(), &mut argument) }
        .map_err(super::ioctl_errno)?;
    Ok(argument)
}
