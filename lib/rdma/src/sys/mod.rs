//! All `unsafe` code of the crate: one module per interface, each with a safe API.
#![allow(unsafe_code)]

pub(crate) mod domain;
#[cfg(feature = "libfabric")]
pub(crate) mod libfabric;
pub(crate) mod uverbs;
pub(crate) mod verbs;

use peerbuf::Errno;

/// The error number of a failed ioctl. nix has no name for kernel-internal numbers, so they are read from
/// `errno` again.
fn ioctl_errno(errno: nix::errno::Errno) -> Errno {
    match errno {
        nix::errno::Errno::UnknownErrno => Errno(nix::errno::Errno::last_raw()),
        known => Errno(known as i32),
    }
}
