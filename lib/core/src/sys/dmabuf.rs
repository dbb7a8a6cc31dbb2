//! The ioctls of a dma-buf (include/uapi/linux/dma-buf.h).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl, opcode};

use crate::errno::Errno;

/// `DMA_BUF_SYNC_READ`
pub(crate) const SYNC_READ: u64 = 1 << 0;
/// `DMA_BUF_SYNC_WRITE`
pub(crate) const SYNC_WRITE: u64 = 1 << 1;
/// `DMA_BUF_SYNC_END`; without this flag the access begins.
pub(crate) const SYNC_END: u64 = 1 << 2;

/// `DMA_BUF_NAME_LEN`, including the NUL.
pub(crate) const NAME_LENGTH: usize = 32;

/// `struct dma_buf_sync`
#[repr(C)]
struct DmaBufSync {
    flags: u64,
}

/// `struct dma_buf_export_sync_file` and `struct dma_buf_import_sync_file`
#[repr(C)]
struct DmaBufSyncFile {
    flags: u32,
    fd: i32,
}

const SYNC: Opcode = opcode::write::<DmaBufSync>(b'b', 0);
const SET_NAME: Opcode = opcode::write::<u64>(b'b', 1);
const EXPORT_SYNC_FILE: Opcode = opcode::read_write::<DmaBufSyncFile>(b'b', 2);
const IMPORT_SYNC_FILE: Opcode = opcode::write::<DmaBufSyncFile>(b'b', 3);

/// Begins or ends CPU access to a dma-buf.
pub(crate) fn sync(fd: BorrowedFd<'_>, flags: u64) -> Result<(), Errno> {
    loop {
        // SAFETY: the ioctl reads this struct.
        let call = unsafe { Setter::<SYNC, _>::new(DmaBufSync { flags }) };
        // SAFETY: the struct outlives the call; the ioctl changes no memory of this process.
        match unsafe { ioctl(fd, call) } {
            // The header tells callers to retry on these two.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            result => return Ok(result?),
        }
    }
}

/// `DMA_BUF_SET_NAME`. The kernel refuses more than [`NAME_LENGTH`] bytes including the NUL.
pub(crate) fn set_name(fd: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    // SAFETY: the argument is the text itself, which lives through the call. (The header declares a number,
    // which only serves to compute the opcode.)
    let call = unsafe { IntegerSetter::<SET_NAME>::new_pointer(name.as_ptr().cast_mut().cast()) };
    // SAFETY: the kernel reads up to the NUL.
    Ok(unsafe { ioctl(fd, call) }?)
}

/// `DMA_BUF_IOCTL_EXPORT_SYNC_FILE`, with [`SYNC_READ`] for the writers' fences or [`SYNC_WRITE`] for all
/// fences.
pub(crate) fn export_sync_file(fd: BorrowedFd<'_>, flags: u64) -> Result<OwnedFd, Errno> {
    let mut argument = DmaBufSyncFile {
        flags: flags as u32,
        fd: -1,
    };
    // SAFETY: the ioctl reads and writes this struct.
    let call = unsafe { Updater::<EXPORT_SYNC_FILE, _>::new(&mut argument) };
    // SAFETY: the struct outlives the call.
    unsafe { ioctl(fd, call) }?;
    // SAFETY: on success the ioctl has opened this descriptor for this process, and no one else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

/// `DMA_BUF_IOCTL_IMPORT_SYNC_FILE`, with [`SYNC_READ`] or [`SYNC_WRITE`] for the access of the fence's work.
pub(crate) fn import_sync_file(
    fd: BorrowedFd<'_>,
    sync_file: BorrowedFd<'_>,
    flags: u64,
) -> Result<(), Errno> {
    let argument = DmaBufSyncFile {
        flags: flags as u32,
        fd: sync_file.as_raw_fd(),
    };
    // SAFETY: the ioctl reads this struct.
    let call = unsafe { Setter::<IMPORT_SYNC_FILE, _>::new(argument) };
    // SAFETY: the struct outlives the call; the ioctl changes no memory of this process.
    Ok(unsafe { ioctl(fd, call) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_kernels() {
        let numbers = [SYNC, SET_NAME, EXPORT_SYNC_FILE, IMPORT_SYNC_FILE];
        assert_eq!(
            numbers,
            [0x4008_6200, 0x4008_6201, 0xc008_6202, 0x4008_6203]
        );
    }
}
