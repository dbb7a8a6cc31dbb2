//! The ioctls of `/dev/peerbuf/<BDF>` (uapi/src/abi.rs).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use peerbuf_uapi::{
    Attachment, BufferQuery, Export, ExportRanges, IOC_BUFFER, IOC_EXPORT, IOC_EXPORT_RANGES,
    IOC_MOVE, IOC_PROVIDER_OPEN, IOC_QUERY, IOC_RESTORE, IOC_REVOKE, IOC_WATCH, Move, Piece,
    ProviderOpen, Query, Range, Restore, Revoke, Watch,
};

use rustix::fs::OFlags;

use crate::errno::Errno;

mod raw {
    nix::ioctl_readwrite_bad!(query, super::IOC_QUERY, super::Query);
    nix::ioctl_readwrite_bad!(export, super::IOC_EXPORT, super::Export);
    nix::ioctl_readwrite_bad!(export_ranges, super::IOC_EXPORT_RANGES, super::ExportRanges);
    nix::ioctl_readwrite_bad!(move_buffer, super::IOC_MOVE, super::Move);
    nix::ioctl_readwrite_bad!(revoke, super::IOC_REVOKE, super::Revoke);
    nix::ioctl_readwrite_bad!(restore, super::IOC_RESTORE, super::Restore);
    nix::ioctl_readwrite_bad!(watch, super::IOC_WATCH, super::Watch);
    nix::ioctl_readwrite_bad!(buffer, super::IOC_BUFFER, super::BufferQuery);
    nix::ioctl_readwrite_bad!(open_provider, super::IOC_PROVIDER_OPEN, super::ProviderOpen);
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
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::export(fd.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for the caller, who owns it
    // alone.
    let dmabuf = unsafe { OwnedFd::from_raw_fd(argument.fd) };
    Ok((argument.offset, dmabuf))
}

/// `PEERBUF_IOC_EXPORT_RANGES`. Fills in the ranges' offsets and returns the dma-buf.
pub(crate) fn export_ranges(
    fd: BorrowedFd<'_>,
    argument: &mut ExportRanges,
    ranges: &mut [Range],
) -> Result<OwnedFd, Errno> {
    argument.size = size_of::<ExportRanges>() as u32;
    argument.ranges = ranges.as_mut_ptr().expose_provenance() as u64;
    argument.nr_ranges = u32::try_from(ranges.len()).map_err(|_| Errno::INVAL)?;
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it; the list is
    // valid for as many items as the struct says.
    unsafe { raw::export_ranges(fd.as_raw_fd(), argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for the caller, who owns it
    // alone.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

/// `PEERBUF_IOC_MOVE`
pub(crate) fn move_buffer(fd: BorrowedFd<'_>, argument: &mut Move) -> Result<(), Errno> {
    argument.size = size_of::<Move>() as u32;
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::move_buffer(fd.as_raw_fd(), argument) }.map_err(super::ioctl_errno)?;
    Ok(())
}

/// `PEERBUF_IOC_REVOKE`
pub(crate) fn revoke(fd: BorrowedFd<'_>, argument: &mut Revoke) -> Result<(), Errno> {
    argument.size = size_of::<Revoke>() as u32;
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::revoke(fd.as_raw_fd(), argument) }.map_err(super::ioctl_errno)?;
    Ok(())
}

/// `PEERBUF_IOC_RESTORE`
pub(crate) fn restore(fd: BorrowedFd<'_>, argument: &mut Restore) -> Result<(), Errno> {
    argument.size = size_of::<Restore>() as u32;
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::restore(fd.as_raw_fd(), argument) }.map_err(super::ioctl_errno)?;
    Ok(())
}

/// `PEERBUF_IOC_WATCH`
pub(crate) fn watch(fd: BorrowedFd<'_>, argument: &mut Watch) -> Result<(), Errno> {
    argument.size = size_of::<Watch>() as u32;
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::watch(fd.as_raw_fd(), argument) }.map_err(super::ioctl_errno)?;
    Ok(())
}

/// `PEERBUF_IOC_BUFFER`. Fills the lists up to their capacity.
pub(crate) fn buffer(
    fd: BorrowedFd<'_>,
    argument: &mut BufferQuery,
    attachments: &mut [Attachment],
    pieces: &mut [Piece],
) -> Result<(), Errno> {
    argument.size = size_of::<BufferQuery>() as u32;
    argument.attachments = attachments.as_mut_ptr().expose_provenance() as u64;
    argument.nr_attachments = u32::try_from(attachments.len()).map_err(|_| Errno::INVAL)?;
    argument.pieces = pieces.as_mut_ptr().expose_provenance() as u64;
    argument.nr_pieces = u32::try_from(pieces.len()).map_err(|_| Errno::INVAL)?;
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it; the lists
    // are valid for as many items as the struct says.
    unsafe { raw::buffer(fd.as_raw_fd(), argument) }.map_err(super::ioctl_errno)?;
    Ok(())
}

/// `PEERBUF_IOC_PROVIDER_OPEN`, for reading and writing.
pub(crate) fn open_provider(fd: BorrowedFd<'_>, bdf: &str) -> Result<OwnedFd, Errno> {
    let mut argument = ProviderOpen {
        size: size_of::<ProviderOpen>() as u32,
        fd_flags: (OFlags::RDWR | OFlags::CLOEXEC).bits(),
        ..ProviderOpen::default()
    };
    let text = argument.bdf.get_mut(..bdf.len()).ok_or(Errno::INVAL)?;
    text.copy_from_slice(bdf.as_bytes());
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::open_provider(fd.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for the caller, who owns it
    // alone.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}
