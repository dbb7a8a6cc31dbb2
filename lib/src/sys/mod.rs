//! The only `unsafe` of the crate: one module per kernel interface, each with a safe interface.
#![allow(unsafe_code)]

pub(crate) mod block;
pub(crate) mod direct;
pub(crate) mod extents;
#[cfg(any(feature = "gpu", feature = "vulkan"))]
pub(crate) mod given;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod heap;
#[cfg(feature = "module")]
pub(crate) mod importer;
#[cfg(feature = "vfio")]
pub(crate) mod iommufd;
#[cfg(feature = "share")]
pub(crate) mod peer;
#[cfg(feature = "module")]
pub(crate) mod peerbuf;
pub(crate) mod request;
#[cfg(feature = "io-uring")]
pub(crate) mod ring;
pub(crate) mod udmabuf;
#[cfg(feature = "v4l2")]
pub(crate) mod v4l2;
#[cfg(feature = "vfio")]
pub(crate) mod vfio;
#[cfg(feature = "vulkan")]
pub(crate) mod vulkan;

use crate::errno::Errno;

#[cfg(any(feature = "io-uring", feature = "share"))]
pub(crate) use peerbuf_core::fork;
pub(crate) use peerbuf_core::memory;

/// The error number of an ioctl. nix has no name for the kernel's internal errors, so this
/// function reads them again from the C library.
fn ioctl_errno(errno: nix::errno::Errno) -> Errno {
    match errno {
        nix::errno::Errno::UnknownErrno => Errno(nix::errno::Errno::last_raw()),
        known => Errno(known as i32),
    }
}
