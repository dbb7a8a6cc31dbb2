//! The only `unsafe` of the crate: one module per interface, each with a safe face.
#![allow(unsafe_code)]

pub(crate) mod domain;
#[cfg(feature = "libfabric")]
pub(crate) mod libfabric;
pub(crate) mod uverbs;
pub(crate) mod verbs;

use peerbuf::Errno;

/// The number behind an ioctl's error. nix has no name for those that the kernel keeps to
/// itself, so they are read again from the C library.
fn ioctl_errno(errno: nix::errno::Errno) -> Errno {
    match errno {
        nix::errno::Errno::UnknownErrno => Errno(nix::errno::Errno::last_raw()),
        known => Errno(known as i32),
    }
}
