//! The ioctls of a dma-buf (include/uapi/linux/dma-buf.h).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::errno::Errno;

/// `DMA_BUF_SYNC_READ`
pub(crate) const SYNC_READ: u64 = 1 << 0;
/// `DMA_BUF_SYNC_WRITE`
pub(crate) const SYNC_WRITE: u64 = 1 << 1;
/// `DMA_BUF_SYNC_END`; without it the access begins.
pub(crate) const SYNC_END: u64 = 1 << 2;

/// `DMA_BUF_NAME_LEN`, with the NUL.
pub(crate) const NAME_LENGTH: usize = 32;

/// `struct dma_buf_sync`
#[repr(C)]
pub struct DmaBufSync {
    flags: u64,
}

/// `struct dma_buf_export_sync_file` and `struct dma_buf_import_sync_file`
#[repr(C)]
pub struct DmaBufSyncFile {
    flags: u32,
    fd: i32,
}

mod raw {
    nix::ioctl_write_ptr!(dma_buf_sync, b'b', 0, super::DmaBufSync);
    // Not the macro that its type in the header asks for: the argument is the text itself.
    nix::ioctl_write_ptr_bad!(
        dma_buf_set_name,
        nix::request_code_write!(b'b', 1, size_of::<u64>()),
        std::ffi::c_char
    );
    nix::ioctl_readwrite!(dma_buf_export_sync_file, b'b', 2, super::DmaBufSyncFile);
    nix::ioctl_write_ptr!(dma_buf_import_sync_file, b'b', 3, super::DmaBufSyncFile);
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

/// `DMA_BUF_SET_NAME`. The kernel refuses more than [`NAME_LENGTH`] bytes with the NUL.
pub(crate) fn set_name(fd: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    // SAFETY: the kernel reads up to the NUL, and the text lives through the call.
    let result = unsafe { raw::dma_buf_set_name(fd.as_raw_fd(), name.as_ptr()) };
    result.map(drop).map_err(super::ioctl_errno)
}

/// `DMA_BUF_IOCTL_EXPORT_SYNC_FILE`, with [`SYNC_READ`] for the writers' fences or
/// [`SYNC_WRITE`] for everybody's.
pub(crate) fn export_sync_file(fd: BorrowedFd<'_>, flags: u64) -> Result<OwnedFd, Errno> {
    let mut argument = DmaBufSyncFile {
        flags: flags as u32,
        fd: -1,
    };
    // SAFETY: the argument is the struct that the ioctl takes.
    unsafe { raw::dma_buf_export_sync_file(fd.as_raw_fd(), &mut argument) }
        .map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for us, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

/// `DMA_BUF_IOCTL_IMPORT_SYNC_FILE`, with [`SYNC_READ`] or [`SYNC_WRITE`] for what the fence's
/// work does with the buffer.
pub(crate) fn import_sync_file(
    fd: BorrowedFd<'_>,
    sync_file: BorrowedFd<'_>,
    flags: u64,
) -> Result<(), Errno> {
    let argument = DmaBufSyncFile {
        flags: flags as u32,
        fd: sync_file.as_raw_fd(),
    };
    // SAFETY: the argument is what the ioctl reads, and lives through the call.
    unsafe { raw::dma_buf_import_sync_file(fd.as_raw_fd(), &argument) }
        .map(drop)
        .map_err(super::ioctl_errno)
}
