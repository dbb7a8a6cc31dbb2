//! The ioctl of `/dev/dma_heap/*` (include/uapi/linux/dma-heap.h).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::OFlags;

use crate::errno::Errno;

/// `struct dma_heap_allocation_data`
#[repr(C)]
pub struct AllocationData {
    len: u64,
    fd: u32,
    fd_flags: u32,
    heap_flags: u64,
}

mod raw {
    nix::ioctl_readwrite!(dma_heap_alloc, b'H', 0, super::AllocationData);
}

/// `DMA_HEAP_IOCTL_ALLOC`
pub(crate) fn allocate(heap: BorrowedFd<'_>, length: u64) -> Result<OwnedFd, Errno> {
    let mut argument = AllocationData {
        len: length,
        fd: 0,
        fd_flags: (OFlags::RDWR | OFlags::CLOEXEC).bits(),
        heap_flags: 0,
    };
    // SAFETY: the argument is the struct that the ioctl takes.
    unsafe { raw::dma_heap_alloc(heap.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for the caller, who owns it
    // alone.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd as i32) })
}
