//! The ioctl of a sync file (include/uapi/linux/sync_file.h).

use std::os::fd::BorrowedFd;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use crate::errno::Errno;

/// `struct sync_file_info`. Without an array for the fences the kernel returns only their number.
#[repr(C)]
#[derive(Default)]
pub struct SyncFileInfo {
    name: [u8; 32],
    /// Pending if 0, signalled if 1; a negative value is the errno of a failed fence.
    pub(crate) status: i32,
    flags: u32,
    pub(crate) num_fences: u32,
    pad: u32,
    sync_fence_info: u64,
}

const FILE_INFO: Opcode = opcode::read_write::<SyncFileInfo>(b'>', 4);

/// `SYNC_IOC_FILE_INFO`
pub(crate) fn info(fd: BorrowedFd<'_>) -> Result<SyncFileInfo, Errno> {
    let mut argument = SyncFileInfo::default();
    // SAFETY: the ioctl reads and writes this struct, which announces no array.
    let call = unsafe { Updater::<FILE_INFO, _>::new(&mut argument) };
    // SAFETY: the struct outlives the call.
    unsafe { ioctl(fd, call) }?;
    Ok(argument)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_the_kernels() {
        assert_eq!(FILE_INFO, 0xc038_3e04);
    }
}
