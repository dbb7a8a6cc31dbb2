//! The ioctl of `/dev/udmabuf` (include/uapi/linux/udmabuf.h).

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

mod raw {
    nix::ioctl_write_ptr!(udmabuf_create, b'u', 0x42, super::UdmabufCreate);
}

/// Makes a dma-buf of the first `size` bytes of a sealed memfd.
pub(crate) fn create(
    udmabuf: BorrowedFd<'_>,
    memfd: BorrowedFd<'_>,
    size: u64,
) -> Result<OwnedFd, Errno> {
    let argument = UdmabufCreate {
        memfd: memfd.as_raw_fd() as u32,
        flags: FLAGS_CLOEXEC,
        offset: 0,
        size,
    };
    // SAFETY: the argument is what the ioctl reads, and lives through the call.
    let fd = unsafe { raw::udmabuf_create(udmabuf.as_raw_fd(), &argument) }
        .map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl returns a descriptor that it has opened for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
