//! The place in the filesystem where other processes connect.
//!
//! A process that was killed leaves its socket file behind, and `bind` refuses a path that is
//! taken. Whoever starts next has to remove the file, and two that start together must not remove
//! each other's. So every [`Listener`] takes a lock beside the path while it looks, removes and
//! binds, and removes at its end only a file that is its own.

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

/// How many may wait to be accepted.
const BACKLOG: i32 = 128;

/// How long another process may take to begin or to end listening at the same path.
const BIND_LIMIT: Duration = Duration::from_secs(5);

/// The same for one that ends: it does without the lock then.
const UNBIND_LIMIT: Duration = Duration::from_millis(200);

/// A place in the filesystem where other processes connect. When it is dropped it removes its
/// socket file, if that is still the one at the path.
///
/// A child that was forked from this process can accept with it, too; only the process that bound
/// it removes the file.
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
    /// A socket file that a process which died left there is replaced; one that is in use, and
    /// any other file, is not. When several start together on one path, one of them gets it. They
    /// see each other by a lock file, `path` with `.lock` behind it, which is there for a moment.
    ///
    /// # Errors
    /// The call that failed: `EADDRINUSE` when the path is taken. [`ShareError::TimedOut`] when
    /// somebody keeps the lock for more than five seconds.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Listener, ShareError> {
        let path = path.into();
        let address = SocketAddrUnix::new(&path).map_err(on("bind", &path))?;
        let socket = seqpacket()?;
        // Connecting needs write permission on the file, and it is made with the socket's mode.
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
            // Under the lock, so it is the one that was just made.
            let _ = rustix::fs::unlink(&path);
        })?;
        // The program may change its directory.
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
    /// The call that failed; `EINTR` when a signal came. After a
    /// [shortage](ShareError::is_shortage) of descriptors or memory the newcomer still waits, and
    /// the next call may get it.
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
        // Whoever is about to replace the file waits. Where there is no lock to be had, the look at
        // the file leaves only a moment.
        let _alone = Lock::take(&self.path, UNBIND_LIMIT);
        // While the socket is open its file's number is not given to another.
        if identity(&self.path) == Ok(self.file) {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// Which file it is: device and number.
type Identity = (u64, u64);

fn identity(path: &Path) -> rustix::io::Result<Identity> {
    Ok(number(&rustix::fs::lstat(path)?))
}

fn number(file: &Stat) -> Identity {
    (file.st_dev, file.st_ino)
}

/// The right to begin and to end listening at a path. It goes with the process.
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
                    // Whoever had it has removed the file; the next one is to be locked.
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
        // The file goes first, so that nobody locks one that is about to go. Unlocked by hand: a
        // child that was forked meanwhile has the descriptor, too.
        let _ = rustix::fs::unlink(&self.path);
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// True for a socket file that nobody listens at any more.
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
