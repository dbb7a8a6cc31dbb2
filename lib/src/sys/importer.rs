//! The ioctls of `/dev/peerbuf/importer` and of the attachments made with it (uapi/src/abi.rs).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use peerbuf_uapi::{
    IOC_IMPORT_ATTACH, IOC_IMPORT_DETACH, IOC_IMPORT_FENCE, IOC_IMPORT_MAP, IOC_IMPORT_PIN,
    IOC_IMPORT_QUERY, IOC_IMPORT_SIGNAL, IOC_IMPORT_UNMAP, IOC_IMPORT_UNPIN, IOC_IMPORT_VMAP,
    IOC_IMPORT_VUNMAP, ImportAttach, ImportFence, ImportMap, ImportQuery, ImportStep,
};

use crate::errno::Errno;

mod raw {
    nix::ioctl_readwrite_bad!(attach, super::IOC_IMPORT_ATTACH, super::ImportAttach);
    nix::ioctl_readwrite_bad!(map, super::IOC_IMPORT_MAP, super::ImportMap);
    nix::ioctl_readwrite_bad!(unmap, super::IOC_IMPORT_UNMAP, super::ImportStep);
    nix::ioctl_readwrite_bad!(pin, super::IOC_IMPORT_PIN, super::ImportStep);
    nix::ioctl_readwrite_bad!(unpin, super::IOC_IMPORT_UNPIN, super::ImportStep);
    nix::ioctl_readwrite_bad!(fence, super::IOC_IMPORT_FENCE, super::ImportFence);
    nix::ioctl_readwrite_bad!(signal, super::IOC_IMPORT_SIGNAL, super::ImportStep);
    nix::ioctl_readwrite_bad!(vmap, super::IOC_IMPORT_VMAP, super::ImportStep);
    nix::ioctl_readwrite_bad!(vunmap, super::IOC_IMPORT_VUNMAP, super::ImportStep);
    nix::ioctl_readwrite_bad!(detach, super::IOC_IMPORT_DETACH, super::ImportStep);
    nix::ioctl_readwrite_bad!(query, super::IOC_IMPORT_QUERY, super::ImportQuery);
}

/// The ioctls that take an [`ImportStep`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    Unmap,
    Pin,
    Unpin,
    Signal,
    Vmap,
    Vunmap,
    Detach,
}

/// `PEERBUF_IOC_IMPORT_ATTACH`. Returns the attachment and the nanoseconds that attaching took.
pub(crate) fn attach(
    importer: BorrowedFd<'_>,
    dmabuf: BorrowedFd<'_>,
    request: ImportAttach,
) -> Result<(OwnedFd, u64), Errno> {
    let mut argument = ImportAttach {
        size: size_of::<ImportAttach>() as u32,
        dmabuf: dmabuf.as_raw_fd(),
        ..request
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::attach(importer.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for us, and nobody else owns it.
    let attachment = unsafe { OwnedFd::from_raw_fd(argument.fd) };
    Ok((attachment, argument.ns))
}

/// `PEERBUF_IOC_IMPORT_MAP`. Returns the nanoseconds that it took.
pub(crate) fn map(attachment: BorrowedFd<'_>, direction: u32) -> Result<u64, Errno> {
    let mut argument = ImportMap {
        size: size_of::<ImportMap>() as u32,
        direction,
        ..ImportMap::default()
    };
    // SAFETY: as in `attach`.
    unsafe { raw::map(attachment.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument.ns)
}

/// One of the ioctls that only do something. Returns the nanoseconds that it took.
pub(crate) fn step(attachment: BorrowedFd<'_>, step: Step) -> Result<u64, Errno> {
    let mut argument = ImportStep {
        size: size_of::<ImportStep>() as u32,
        ..ImportStep::default()
    };
    let call = match step {
        Step::Unmap => raw::unmap,
        Step::Pin => raw::pin,
        Step::Unpin => raw::unpin,
        Step::Signal => raw::signal,
        Step::Vmap => raw::vmap,
        Step::Vunmap => raw::vunmap,
        Step::Detach => raw::detach,
    };
    // SAFETY: as in `attach`; all of these take this struct.
    unsafe { call(attachment.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument.ns)
}

/// `PEERBUF_IOC_IMPORT_FENCE`
pub(crate) fn fence(attachment: BorrowedFd<'_>, usage: u32, timeout_ms: u32) -> Result<(), Errno> {
    let mut argument = ImportFence {
        size: size_of::<ImportFence>() as u32,
        flags: 0,
        usage,
        timeout_ms,
    };
    // SAFETY: as in `attach`.
    unsafe { raw::fence(attachment.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(())
}

/// `PEERBUF_IOC_IMPORT_QUERY`
pub(crate) fn query(attachment: BorrowedFd<'_>) -> Result<ImportQuery, Errno> {
    let mut argument = ImportQuery {
        size: size_of::<ImportQuery>() as u32,
        ..ImportQuery::default()
    };
    // SAFETY: as in `attach`.
    unsafe { raw::query(attachment.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument)
}
