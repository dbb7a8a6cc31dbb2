//! The ioctls of `/dev/udmabuf` (include/uapi/linux/udmabuf.h).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::errno::Errno;

/// `UDMABUF_FLAGS_CLOEXEC`
const FLAGS_CLOEXEC: u32 = 0x01;

/// `struct udmabuf_create`
#[repr(C)]
pub struct UdmabufCreate {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

/// `struct udmabuf_create_list`, without the items that follow it.
#[repr(C)]
pub struct UdmabufCreateList {
    flags: u32,
    count: u32,
}

mod raw {
    nix::ioctl_write_ptr!(udmabuf_create, b'u', 0x42, super::UdmabufCreate);
    nix::ioctl_write_ptr!(udmabuf_create_list, b'u', 0x43, super::UdmabufCreateList);
}

/// Part of a sealed memfd. Offset and size are in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece<'f> {
    pub(crate) memfd: BorrowedFd<'f>,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// Makes a dma-buf from part of a sealed memfd.
pub(crate) fn create(udmabuf: BorrowedFd<'_>, piece: Piece<'_>) -> Result<OwnedFd, Errno> {
    let argument = UdmabufCreate {
        memfd: piece.memfd.as_raw_fd() as u32,
        flags: FLAGS_CLOEXEC,
        offset: piece.offset,
        size: piece.size,
    };
    // SAFETY: the argument is what the ioctl reads, and lives through the call.
    let fd = unsafe { raw::udmabuf_create(udmabuf.as_raw_fd(), &argument) }
        .map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl returns a descriptor that it has opened for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a dma-buf from pieces, in this order.
pub(crate) fn create_list(udmabuf: BorrowedFd<'_>, pieces: &[Piece<'_>]) -> Result<OwnedFd, Errno> {
    let count = u32::try_from(pieces.len()).map_err(|_| Errno::INVAL)?;
    // The head, and three words per item: memfd and padding, offset, size.
    let mut words: Vec<u64> = vec![bytemuck::cast([FLAGS_CLOEXEC, count])];
    for piece in pieces {
        let memfd = bytemuck::cast([piece.memfd.as_raw_fd() as u32, 0]);
        words.extend([memfd, piece.offset, piece.size]);
    }
    // SAFETY: `count` items follow the head, in memory that is aligned for them and lives
    // through the call.
    let fd = unsafe { raw::udmabuf_create_list(udmabuf.as_raw_fd(), words.as_ptr().cast()) }
        .map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl returns a descriptor that it has opened for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
