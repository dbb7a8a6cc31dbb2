//! The socket: messages, descriptors, and who is at the other end.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    sockopt,
};

use super::wire;
use crate::buffer::{Buffer, BufferRange, DmaBuf};
use crate::errno::Errno;
use crate::error::{BufferError, ShareError, SystemError};

/// The most descriptors that one message may carry (`SCM_MAX_FD`, include/net/scm.h).
pub const MAX_DESCRIPTORS: usize = 253;

/// One end of a connection that buffers travel over.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// The process at the other end when the connection was made, as the kernel vouches for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process id; 0 for a process that this one's pid namespace cannot see.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Channel {
    /// Two ends of a new connection, for a process and its child. Both are closed on exec.
    ///
    /// # Errors
    /// The call that failed, such as `EMFILE`.
    pub fn pair() -> Result<(Channel, Channel), ShareError> {
        let pair = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        );
        let (one, other) = pair.map_err(system("socketpair"))?;
        Ok((Channel { socket: one }, Channel { socket: other }))
    }

    /// Takes a connected socket, such as one that was inherited.
    ///
    /// # Errors
    /// [`ShareError::WrongSocket`] for anything but a unix seqpacket socket.
    pub fn from_fd(socket: OwnedFd) -> Result<Channel, ShareError> {
        let domain = sockopt::socket_domain(&socket);
        let kind = sockopt::socket_type(&socket);
        if domain != Ok(AddressFamily::UNIX) || kind != Ok(SocketType::SEQPACKET) {
            return Err(ShareError::WrongSocket);
        }
        Ok(Channel { socket })
    }

    /// Connects to a [`Listener`].
    ///
    /// # Errors
    /// The call that failed: `ENOENT` or `ECONNREFUSED` when nobody listens there.
    pub fn connect(path: impl AsRef<Path>) -> Result<Channel, ShareError> {
        let path = path.as_ref();
        let socket = seqpacket()?;
        let address = SocketAddrUnix::new(path).map_err(on("connect", path))?;
        rustix::net::connect(&socket, &address).map_err(on("connect", path))?;
        Ok(Channel { socket })
    }

    /// Who is at the other end (`SO_PEERCRED`).
    ///
    /// # Errors
    /// The call that failed.
    pub fn peer(&self) -> Result<Peer, ShareError> {
        let peer =
            sockopt::socket_peercred(&self.socket).map_err(system("getsockopt(SO_PEERCRED)"))?;
        Ok(Peer {
            pid: peer.pid.as_raw_nonzero().get(),
            uid: peer.uid.as_raw(),
            gid: peer.gid.as_raw(),
        })
    }

    /// Hands over a range. The other end can then use it for as long as it likes, whatever
    /// happens to this one; descriptors give access to the whole buffer, not to the range alone.
    /// A [`Publisher`](super::Publisher) keeps a hold on what it hands over.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`], or the call that failed.
    pub fn send_buffer(&self, range: &BufferRange) -> Result<(), ShareError> {
        let description = wire::describe(range, super::Placement::Unknown);
        let descriptors = descriptors(range.buffer()).into_iter().flatten();
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.collect();
        let message = wire::encode(wire::Message::HandOver, &[description]);
        self.send_message(&message, &descriptors)
    }

    /// Waits for a range to be handed over.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`]; [`ShareError::Truncated`] or [`ShareError::Malformed`] for what
    /// is not an offer; [`ShareError::Buffer`] for descriptors that are not what the offer says.
    pub fn receive_buffer(&self) -> Result<BufferRange, ShareError> {
        let (message, descriptors) = self.receive_message(wire::HAND_OVER_SIZE)?;
        let description = wire::hand_over(&message)?;
        let what = wire::decode(&description)?;
        if descriptors.len() != what.descriptors() {
            let what = format!(
                "{} descriptors came with it, {} were announced",
                descriptors.len(),
                what.descriptors()
            );
            return Err(ShareError::Malformed { what });
        }
        let (offset, length) = (what.offset, what.length);
        let buffer = open_buffer(&what, &mut descriptors.into_iter())?;
        Ok(buffer.range(offset, length)?)
    }

    /// Sends a message of the application's own, with descriptors. It must not be empty.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`], or the call that failed: `EMSGSIZE` for a message larger than
    /// the socket's buffer, `EINVAL` for an empty one or more than [`MAX_DESCRIPTORS`].
    pub fn send_message(
        &self,
        message: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ShareError> {
        // An empty message looks like the end of the connection at the other end.
        if message.is_empty() {
            return Err(system("sendmsg")(rustix::io::Errno::INVAL).into());
        }
        self.send(message, descriptors, SendFlags::empty())
            .map(drop)
    }

    /// Sends now or not at all: false when there is no room.
    pub(super) fn try_send(
        &self,
        message: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<bool, ShareError> {
        self.send(message, descriptors, SendFlags::DONTWAIT)
    }

    fn send(
        &self,
        message: &[u8],
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<bool, ShareError> {
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(system("sendmsg")(rustix::io::Errno::INVAL).into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
            debug_assert!(fits);
        }
        let data = [IoSlice::new(message)];
        let flags = flags | SendFlags::NOSIGNAL;
        loop {
            match rustix::net::sendmsg(&self.socket, &data, &mut control, flags) {
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ShareError::PeerGone);
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(system("sendmsg")(errno).into()),
            }
        }
    }

    /// Waits for a message of at most `limit` bytes. Its descriptors are closed on exec, and on
    /// any error closed.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`], [`ShareError::Truncated`], or the call that failed.
    pub fn receive_message(&self, limit: usize) -> Result<(Vec<u8>, Vec<OwnedFd>), ShareError> {
        let mut message = vec![0; limit];
        let mut descriptors = Vec::new();
        let bytes = self.receive(&mut message, &mut descriptors, RecvFlags::empty())?;
        message.truncate(bytes.unwrap_or(0));
        Ok((message, descriptors))
    }

    /// Takes a message if one is there, and puts its descriptors behind those in `descriptors`.
    /// Returns its length.
    pub(super) fn try_receive(
        &self,
        message: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<Option<usize>, ShareError> {
        self.receive(message, descriptors, RecvFlags::DONTWAIT)
    }

    fn receive(
        &self,
        message: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        flags: RecvFlags,
    ) -> Result<Option<usize>, ShareError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            let mut data = [IoSliceMut::new(message)];
            match rustix::net::recvmsg(&self.socket, &mut data, &mut control, flags) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Err(ShareError::PeerGone),
                Err(rustix::io::Errno::AGAIN) if flags.contains(RecvFlags::DONTWAIT) => {
                    return Ok(None);
                }
                Err(errno) => return Err(system("recvmsg")(errno).into()),
            }
        };
        // Owned before anything is checked, so that every way out closes them.
        let before = descriptors.len();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                descriptors.reserve(rights.size_hint().0);
                descriptors.extend(rights);
            }
        }
        let error = if received.flags.contains(ReturnFlags::CTRUNC) {
            ShareError::Truncated {
                what: "descriptors are missing",
            }
        } else if received.flags.contains(ReturnFlags::TRUNC) {
            ShareError::Truncated {
                what: "it is longer than any message expected",
            }
        } else if received.bytes == 0 {
            ShareError::PeerGone
        } else {
            return Ok(Some(received.bytes));
        };
        descriptors.truncate(before);
        Err(error)
    }

    /// Ends the connection for both ends, even where another process holds this end too.
    pub(super) fn shut_down(&self) {
        // It fails only when the other end has gone, which is as good.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

/// A buffer's descriptors, in the order in which they travel.
pub(super) fn descriptors(buffer: &Buffer) -> [Option<BorrowedFd<'_>>; 2] {
    [buffer.dmabuf().map(AsFd::as_fd), buffer.host_memory()]
}

/// Makes a buffer of what was announced and of the descriptors that came, after a look at each.
pub(super) fn open_buffer(
    what: &wire::Checked<'_>,
    descriptors: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Buffer, ShareError> {
    let dmabuf = what.has_dmabuf.then(|| descriptors.next()).flatten();
    let dmabuf = dmabuf.map(DmaBuf::from_fd).transpose()?;
    let host = what.has_host_memory.then(|| descriptors.next()).flatten();
    let buffer = match (dmabuf, host) {
        (dmabuf, Some(host)) => Buffer::from_host_memory(host, dmabuf, what.provenance())?,
        (Some(dmabuf), None) => Buffer::from_dmabuf(dmabuf, what.provenance()),
        (None, None) => {
            return Err(ShareError::Malformed {
                what: "it has no descriptor".into(),
            });
        }
    };
    if buffer.size() != what.size {
        return Err(ShareError::Buffer(BufferError::OutOfRange {
            object: buffer.name().to_owned(),
            offset: 0,
            length: what.size,
            size: buffer.size(),
        }));
    }
    Ok(buffer.without_voucher())
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> OwnedFd {
        channel.socket
    }
}

/// A place in the filesystem where other processes connect. The socket file is removed when it
/// is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`. Only this user may connect, unless the file's mode is changed.
    ///
    /// A socket file that a process which died left there is replaced; one that is in use, and
    /// any other file, is not.
    ///
    /// # Errors
    /// The call that failed: `EADDRINUSE` when the path is taken.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Listener, ShareError> {
        let path = path.into();
        let socket = seqpacket()?;
        let address = SocketAddrUnix::new(&path).map_err(on("bind", &path))?;
        // Connecting needs write permission on the file, and it is made with the socket's mode.
        let owner = Mode::RUSR | Mode::WUSR;
        rustix::fs::fchmod(&socket, owner).map_err(on("fchmod", &path))?;
        let mut bound = rustix::net::bind(&socket, &address);
        if bound == Err(rustix::io::Errno::ADDRINUSE) && is_abandoned(&path) {
            rustix::fs::unlink(&path).map_err(on("unlink", &path))?;
            bound = rustix::net::bind(&socket, &address);
        }
        bound.map_err(on("bind", &path))?;
        let listener = Listener { socket, path };
        rustix::net::listen(&listener.socket, 16).map_err(on("listen", &listener.path))?;
        Ok(listener)
    }

    /// Waits for a process to connect.
    ///
    /// # Errors
    /// The call that failed; `EINTR` when a signal came.
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
        // It may have been removed by somebody else, which is as good.
        let _ = rustix::fs::unlink(&self.path);
    }
}

/// True for a socket file that nobody listens at any more.
fn is_abandoned(path: &Path) -> bool {
    let is_socket = rustix::fs::lstat(path)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
    let refused = Errno::from(rustix::io::Errno::CONNREFUSED);
    is_socket
        && matches!(
            Channel::connect(path),
            Err(ShareError::System(SystemError { errno, .. })) if errno == refused
        )
}

fn seqpacket() -> Result<OwnedFd, ShareError> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    );
    Ok(socket.map_err(system("socket"))?)
}

fn system(call: &'static str) -> impl Fn(rustix::io::Errno) -> SystemError {
    move |errno| SystemError::new(call, "a unix socket", errno)
}

fn on(call: &'static str, path: &Path) -> impl Fn(rustix::io::Errno) -> SystemError {
    move |errno| SystemError::new(call, path.display().to_string(), errno)
}
