//! The ioctls of `/dev/peerbuf/importer` and of the attachments made with it (uapi/src/probe.rs).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use peerbuf_uapi::probe::{
    Attach, Fence, IOC_ATTACH, IOC_DETACH, IOC_FENCE, IOC_MAP, IOC_PIN, IOC_QUERY, IOC_SIGNAL,
    IOC_UNMAP, IOC_UNPIN, IOC_VMAP, IOC_VUNMAP, Map, Query, Step as Plain,
};

use crate::errno::Errno;

mod raw {
    nix::ioctl_readwrite_bad!(attach, super::IOC_ATTACH, super::Attach);
    nix::ioctl_readwrite_bad!(map, super::IOC_MAP, super::Map);
    nix::ioctl_readwrite_bad!(unmap, super::IOC_UNMAP, super::Plain);
    nix::ioctl_readwrite_bad!(pin, super::IOC_PIN, super::Plain);
    nix::ioctl_readwrite_bad!(unpin, super::IOC_UNPIN, super::Plain);
    nix::ioctl_readwrite_bad!(fence, super::IOC_FENCE, super::Fence);
    nix::ioctl_readwrite_bad!(signal, super::IOC_SIGNAL, super::Plain);
    nix::ioctl_readwrite_bad!(vmap, super::IOC_VMAP, super::Plain);
    nix::ioctl_readwrite_bad!(vunmap, super::IOC_VUNMAP, super::Plain);
    nix::ioctl_readwrite_bad!(detach, super::IOC_DETACH, super::Plain);
    nix::ioctl_readwrite_bad!(query, super::IOC_QUERY, super::Query);
}

/// The ioctls that take a [`Plain`].
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

/// `PEERBUF_PROBE_IOC_ATTACH`. Returns the attachment, and the duration of attaching in
/// nanoseconds.
pub(crate) fn attach(
    importer: BorrowedFd<'_>,
    dmabuf: BorrowedFd<'_>,
    request: Attach,
) -> Result<(OwnedFd, u64), Errno> {
    let mut argument = Attach {
        size: size_of::<Attach>() as u32,
        dmabuf: dmabuf.as_raw_fd(),
        ..request
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::attach(importer.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for the caller, who owns it
    // alone.
    let attachment = unsafe { OwnedFd::from_raw_fd(argument.fd) };
    Ok((attachment, argument.ns))
}

/// `PEERBUF_PROBE_IOC_MAP`. Returns its duration in nanoseconds.
pub(crate) fn map(attachment: BorrowedFd<'_>, direction: u32) -> Result<u64, Errno> {
    let mut argument = Map {
        size: size_of::<Map>() as u32,
        direction,
        ..Map::default()
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::map(attachment.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument.ns)
}

/// One of the ioctls that take a [`Plain`]. Returns its duration in nanoseconds.
pub(crate) fn step(attachment: BorrowedFd<'_>, step: Step) -> Result<u64, Errno> {
    let mut argument = Plain {
        size: size_of::<Plain>() as u32,
        ..Plain::default()
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
    // SAFETY: each of these ioctls takes this struct, with its size in it.
    unsafe { call(attachment.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument.ns)
}

/// `PEERBUF_PROBE_IOC_FENCE`
pub(crate) fn fence(attachment: BorrowedFd<'_>, usage: u32, timeout_ms: u32) -> Result<(), Errno> {
    let mut argument = Fence {
        size: size_of::<Fence>() as u32,
        flags: 0,
        usage,
        timeout_ms,
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::fence(attachment.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(())
}

/// `PEERBUF_PROBE_IOC_QUERY`
pub(crate) fn query(attachment: BorrowedFd<'_>) -> Result<Query, Errno> {
    let mut argument = Query {
        size: size_of::<Query>() as u32,
        ..Query::default()
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::query(attachment.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument)
}
