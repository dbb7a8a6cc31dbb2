//! The ioctls of `/dev/peerbuf/<BDF>` (uapi/src/abi.rs).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use peerbuf_uapi::{
    Attachment, BufferQuery, Export, IOC_BUFFER, IOC_EXPORT, IOC_MOVE, IOC_PROVIDER_OPEN,
    IOC_QUERY, IOC_RESTORE, IOC_REVOKE, IOC_WATCH, Move, Piece, ProviderOpen, Query, Range,
    Restore, Revoke, Watch, pci_address,
};

use rustix::fs::OFlags;

use crate::errno::Errno;
use crate::topology::PciAddress;

mod raw {
    nix::ioctl_readwrite_bad!(query, super::IOC_QUERY, super::Query);
    nix::ioctl_readwrite_bad!(export, super::IOC_EXPORT, super::Export);
    nix::ioctl_readwrite_bad!(move_buffer, super::IOC_MOVE, super::Move);
    nix::ioctl_readwrite_bad!(revoke, super::IOC_REVOKE, super::Revoke);
    nix::ioctl_readwrite_bad!(restore, super::IOC_RESTORE, super::Restore);
    nix::ioctl_readwrite_bad!(watch, super::IOC_WATCH, super::Watch);
    nix::ioctl_readwrite_bad!(buffer, super::IOC_BUFFER, super::BufferQuery);
    nix::ioctl_readwrite_bad!(open_provider, super::IOC_PROVIDER_OPEN, super::ProviderOpen);
}

/// A PCI address as the modules take it.
pub(crate) fn number(address: PciAddress) -> u64 {
    let PciAddress {
        domain,
        bus,
        device,
        function,
    } = address;
    pci_address(domain, bus, device, function)
}

/// The PCI address of a number from a module.
pub(crate) fn address(number: u64) -> PciAddress {
    PciAddress {
        domain: (number >> 16) as u32,
        bus: (number >> 8) as u8,
        device: number as u8 >> 3,
        function: number as u8 & 7,
    }
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

/// `PEERBUF_IOC_EXPORT`. Fills in the ranges' offsets and returns the dma-buf.
pub(crate) fn export(
    fd: BorrowedFd<'_>,
    argument: &mut Export,
    ranges: &mut [Range],
) -> Result<OwnedFd, Errno> {
    argument.size = size_of::<Export>() as u32;
    argument.ranges = ranges.as_mut_ptr().expose_provenance() as u64;
    argument.nr_ranges = u32::try_from(ranges.len()).map_err(|_| Errno::INVAL)?;
    argument.range_size = size_of::<Range>() as u32;
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it; the list is
    // valid for as many items of the size as the struct says.
    unsafe { raw::export(fd.as_raw_fd(), argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for the caller, who owns it
    // alone.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

/// `PEERBUF_IOC_MOVE`. After `EBUSY` the argument says what was in the way.
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
    argument.attachment_size = size_of::<Attachment>() as u32;
    argument.pieces = pieces.as_mut_ptr().expose_provenance() as u64;
    argument.nr_pieces = u32::try_from(pieces.len()).map_err(|_| Errno::INVAL)?;
    argument.piece_size = size_of::<Piece>() as u32;
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it; the lists
    // are valid for as many items as the struct says.
    unsafe { raw::buffer(fd.as_raw_fd(), argument) }.map_err(super::ioctl_errno)?;
    Ok(())
}

/// `PEERBUF_IOC_PROVIDER_OPEN`, for reading and writing.
pub(crate) fn open_provider(fd: BorrowedFd<'_>, address: PciAddress) -> Result<OwnedFd, Errno> {
    let mut argument = ProviderOpen {
        size: size_of::<ProviderOpen>() as u32,
        fd_flags: (OFlags::RDWR | OFlags::CLOEXEC).bits(),
        address: number(address),
        ..ProviderOpen::default()
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::open_provider(fd.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for the caller, who owns it
    // alone.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pci_address_is_the_same_after_it_was_a_number() {
        for (text, number_of) in [
            ("0000:00:00.0", 0),
            ("0000:04:1f.7", 0x4ff),
            ("10000:ff:02.1", 0x1_0000_ff11),
        ] {
            let parsed: PciAddress = text.parse().unwrap();
            assert_eq!(number(parsed), number_of);
            assert_eq!(address(number_of), parsed);
        }
    }
}
