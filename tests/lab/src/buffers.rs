//! Buffers of the kernel's own exporters, in system memory.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use crate::node::ioctl;

/// A buffer of /dev/udmabuf, which supports neither move nor pin nor revoke.
pub fn udmabuf(size: u64) -> OwnedFd {
    let buffer = peerbuf::export::udmabuf::export("test", size).unwrap();
    buffer.dmabuf().unwrap().try_clone().unwrap().into()
}

/// A buffer of the dma-heap `system`.
pub fn heap(size: u64) -> OwnedFd {
    #[repr(C)]
    struct Allocation {
        len: u64,
        fd: u32,
        fd_flags: u32,
        heap_flags: u64,
    }
    const DMA_HEAP_IOCTL_ALLOC: u32 = 0xc018_4800;
    let heap = File::open("/dev/dma_heap/system").unwrap();
    let mut allocation = Allocation {
        len: size,
        fd: 0,
        fd_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
        heap_flags: 0,
    };
    let at = (&raw mut allocation).addr();
    ioctl(heap.as_fd(), DMA_HEAP_IOCTL_ALLOC, at).unwrap();
    // SAFETY: The ioctl has just made this descriptor.
    unsafe { OwnedFd::from_raw_fd(allocation.fd as i32) }
}
