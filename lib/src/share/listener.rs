//! The socket file where other processes connect.
//!
//! A process that was killed leaves its socket file behind, and `bind` refuses a path that
//! exists. The next process has to remove the file, and two processes that start together must
//! not remove each other's file. A [`Listener`] therefore takes a lock file beside the path
//! while it checks, removes and binds. On drop, it removes only its own file.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::net::{SocketAddrUnix, SocketFlags};

use super::channel::{Channel, on, seqpacket};
use crate::errno::Errno;
use crate::error::{ShareError, SystemError};
use crate::sys::fork::Process;
use peerbuf_core::Deadline;

/// Number of connections that may wait for `accept`.
const BACKLOG: i32 = 128;

/// Time limit for another process to release the lock, on bind.
const BIND_LIMIT: Duration = Duration::from_secs(5);

/// Time limit for the lock on drop. The drop continues without the lock afterwards.
const UNBIND_LIMIT: Duration = Duration::from_millis(200);

/// A socket file where other processes connect. Dropping the listener removes the socket file,
/// if the file at the path is still the listener's own.
///
/// A forked child can accept with the listener, too. Only the process that bound the path
/// removes the file.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    file: Identity,
    owner: Process,
}

impl Listener {
    /// Listens at `path`. Only this user may connect, unless the file's mode is changed.
    ///
    /// `bind` replaces a socket file whose process has died. It does not replace a socket file
    /// in use or a file of another type. If several processes start together on one path, one
    /// of them gets it. They exclude each other by a lock file, `path` with the suffix `.lock`,
    /// which exists for a moment.
    ///
    /// # Errors
    /// The call that failed: `EADDRINUSE` if the path is taken. [`ShareError::TimedOut`] if
    /// another process keeps the lock for more than five seconds.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Listener, ShareError> {
        let path = path.into();
        let address = SocketAddrUnix::new(&path).map_err(on("bind", &path))?;
        let socket = seqpacket()?;
        // Connecting needs write permission on the file, and the file gets the socket's mode.
        let owner = Mode::RUSR | Mode::WUSR;
        rustix::fs::fchmod(&socket, owner).map_err(on("fchmod", &path))?;
        let _alone = Lock::take(&path, BIND_LIMIT)?;
        let mut bound = rustix::net::bind(&socket, &address);
        if bound == Err(rustix::io::Errno::ADDRINUSE) && is_abandoned(&path) {
            rustix::fs::unlink(&path).map_err(on("unlink", &path))?;
            bound = rustix::net::bind(&socket, &address);
        }
        bound.map_err(on("bind", &path))?;
        let begun = rustix::net::listen(&socket, BACKLOG).map_err(on("listen", &path));
        let file = begun.and_then(|()| identity(&path).map_err(on("lstat", &path)));
        let file = file.inspect_err(|_| {
            // The lock is held, so this file is the one that `bind` just made.
            let _ = rustix::fs::unlink(&path);
        })?;
        // The program may change its working directory.
        let path = std::path::absolute(&path).unwrap_or(path);
        Ok(Listener {
            socket,
            path,
            file,
            owner: Process::current(),
        })
    }

    /// Waits for a process to connect.
    ///
    /// # Errors
    /// The call that failed; `EINTR` if a signal arrived. After a
    /// [shortage](ShareError::is_shortage) of descriptors or memory the peer still waits, and
    /// the next call may accept it.
    pub fn accept(&self) -> Result<Channel, ShareError> {
        let socket = rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC);
        Ok(Channel {
            socket: socket.map_err(on("accept", &self.path))?,
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if !self.owner.is_current() {
            return;
        }
        // The lock stops a process that is about to replace the file. Without the lock, a short
        // race between the check and the removal remains.
        let _alone = Lock::take(&self.path, UNBIND_LIMIT);
        // While the socket is open, the kernel gives the inode number to no other file.
        if identity(&self.path) == Ok(self.file) {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// Identity of a file: device and inode number.
type Identity = (u64, u64);

fn identity(path: &Path) -> rustix::io::Result<Identity> {
    Ok(number(&rustix::fs::lstat(path)?))
}

fn number(file: &Stat) -> Identity {
    (file.st_dev, file.st_ino)
}

/// Lock for starting and stopping to listen at a path. The lock ends with the process.
struct Lock {
    file: OwnedFd,
    path: PathBuf,
}

impl Lock {
    fn take(socket: &Path, limit: Duration) -> Result<Lock, ShareError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let deadline = Deadline::after(limit);
        loop {
            let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR);
            let file = file.map_err(on("open", &path))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    let locked = rustix::fs::fstat(&file).map_err(on("fstat", &path))?;
                    if identity(&path) == Ok(number(&locked)) {
                        return Ok(Lock { file, path });
                    }
                    // The previous holder has removed the file; the next attempt locks a new
                    // one.
                }
                Err(rustix::io::Errno::AGAIN) => std::thread::sleep(Duration::from_millis(2)),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(on("flock", &path)(errno).into()),
            }
            if deadline.is_over() {
                let what = format!(
                    "the lock {}, which another process holds while it starts or stops listening",
                    path.display()
                );
                return Err(ShareError::TimedOut { what, limit });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Remove the file first, so that no process locks a file that is about to vanish.
        // Unlock explicitly, because a child that was forked meanwhile also holds the
        // descriptor.
        let _ = rustix::fs::unlink(&self.path);
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// True for a socket file at which no process listens any more.
fn is_abandoned(path: &Path) -> bool {
    let is_socket = rustix::fs::lstat(path)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
    let refused = Errno::from(rustix::io::Errno::CONNREFUSED);
    is_socket
        && matches!(
            Channel::connect_within(path, Duration::ZERO),
            Err(ShareError::System(SystemError { errno, .. })) if errno == refused
        )
}
