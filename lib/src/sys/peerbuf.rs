//! The ioctls of `/dev/peerbuf/<BDF>` (uapi/src/abi.rs).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use peerbuf_uapi::{Export, IOC_EXPORT, IOC_QUERY, Query};

use crate::errno::Errno;

mod raw {
    nix::ioctl_readwrite_bad!(query, super::IOC_QUERY, super::Query);
    nix::ioctl_readwrite_bad!(export, super::IOC_EXPORT, super::Export);
}

/// `PEERBUF_IOC_QUERY`
pub(crate) fn query(fd: BorrowedFd<'_>) -> Result<Query, Errno> {
    let mut argument = Query {
        size: size_of::<Query>() as u32,
        ..Query::default()
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::query(fd.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument)
}

/// `PEERBUF_IOC_EXPORT`. Returns the offset of the export in its BAR and the dma-buf.
pub(crate) fn export(fd: BorrowedFd<'_>, request: Export) -> Result<(u64, OwnedFd), Errno> {
    let mut argument = Export {
        size: size_of::<Export>() as u32,
        ..request
    };
    // SAFETY: as in `query`.
    unsafe { raw::export(fd.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for us, and nobody else owns it.
    let dmabuf = unsafe { OwnedFd::from_raw_fd(argument.fd) };
    Ok((argument.offset, dmabuf))
}
