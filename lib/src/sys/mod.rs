//! The only `unsafe` of the crate: one module per kernel interface, each with a safe face.
#![allow(unsafe_code)]

pub(crate) mod block;
pub(crate) mod direct;
pub(crate) mod dmabuf;
pub(crate) mod heap;
pub(crate) mod importer;
pub(crate) mod iommufd;
#[cfg(feature = "libfabric")]
pub(crate) mod libfabric;
pub(crate) mod memory;
pub(crate) mod peerbuf;
pub(crate) mod sync_file;
pub(crate) mod udmabuf;
pub(crate) mod uverbs;
pub(crate) mod v4l2;
pub(crate) mod verbs;
pub(crate) mod vfio;

use crate::errno::Errno;

/// The number behind an ioctl's error. nix has no name for those that the kernel keeps to
/// itself, so they are read again from the C library.
fn ioctl_errno(errno: nix::errno::Errno) -> Errno {
    match errno {
        nix::errno::Errno::UnknownErrno => Errno(nix::errno::Errno::last_raw()),
        known => Errno(known as i32),
    }
}
