//! The credentials of a unix socket's peer (`SO_PEERCRED`, net/core/sock.c).
//!
//! rustix's version of this call returns a process id that cannot be 0. The kernel returns 0
//! for a process that is not in the caller's PID namespace.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

use crate::errno::Errno;

/// Process id, user id and group id. The process id is 0 if this PID namespace has none.
pub(crate) fn credentials(socket: BorrowedFd<'_>) -> Result<(i32, u32, u32), Errno> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `peer`, which has that size, and any
    // bytes make valid integers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok((peer.pid, peer.uid, peer.gid)),
        _ => Err(Errno::from(&std::io::Error::last_os_error())),
    }
}
