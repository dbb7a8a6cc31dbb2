//! The socket: messages, descriptors, and the credentials of the peer.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    sockopt,
};

use super::wire;
use crate::buffer::{Buffer, BufferRange, DmaBuf};
use crate::error::{BufferError, ShareError, SystemError};
use crate::sys;
use peerbuf_core::Deadline;

/// Default time limit of [`Channel::connect`] for a full backlog.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The most descriptors that one message may carry (`SCM_MAX_FD`, include/net/scm.h).
pub const MAX_DESCRIPTORS: usize = 253;

/// One end of a connection that carries buffers.
#[derive(Debug)]
#[doc(alias = "SCM_RIGHTS")]
#[doc(alias = "SOCK_SEQPACKET")]
pub struct Channel {
    pub(super) socket: OwnedFd,
}

/// Credentials of the peer process at connect time, as reported by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[doc(alias = "SO_PEERCRED")]
pub struct Peer {
    /// Process id in this process's PID namespace. `None` for a process outside of this
    /// namespace, such as one in another container.
    pub pid: Option<i32>,
    /// User id in this process's user namespace.
    pub uid: u32,
    /// Group id in this process's user namespace.
    pub gid: u32,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid} of user {}", self.uid),
            None => write!(f, "a process of user {} in another PID namespace", self.uid),
        }
    }
}

impl Channel {
    /// Makes a connected pair, for a process and its child. Both ends are closed on exec.
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

    /// Takes a connected socket, such as an inherited one.
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

    /// Connects to a [`Listener`](super::Listener). Waits up to ten seconds if the listener's
    /// backlog is full.
    ///
    /// # Errors
    /// The call that failed: `ENOENT` or `ECONNREFUSED` if no process listens at `path`.
    /// [`ShareError::TimedOut`] if the listener does not accept in time.
    pub fn connect(path: impl AsRef<Path>) -> Result<Channel, ShareError> {
        Channel::connect_within(path, CONNECT_LIMIT)
    }

    /// Like [`Channel::connect`], with this time limit.
    ///
    /// # Errors
    /// As [`Channel::connect`].
    pub fn connect_within(path: impl AsRef<Path>, limit: Duration) -> Result<Channel, ShareError> {
        let path = path.as_ref();
        let deadline = Deadline::after(limit);
        let socket = seqpacket()?;
        let address = SocketAddrUnix::new(path).map_err(on("connect", path))?;
        loop {
            // The kernel reads zero as no limit.
            let left = deadline.left().max(Duration::from_millis(1));
            let left = deadline.instant().map(|_| left);
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, left)
                .map_err(on("setsockopt(SO_SNDTIMEO)", path))?;
            match rustix::net::connect(&socket, &address) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) if deadline.is_over() => {
                    let path = path.display();
                    let what = format!("a free place in the listen queue of {path}");
                    return Err(ShareError::TimedOut { what, limit });
                }
                Err(rustix::io::Errno::AGAIN) => {}
                Err(errno) => return Err(on("connect", path)(errno).into()),
            }
        }
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)
            .map_err(on("setsockopt(SO_SNDTIMEO)", path))?;
        Ok(Channel { socket })
    }

    /// The credentials of the peer process (`SO_PEERCRED`).
    ///
    /// # Errors
    /// The call that failed.
    pub fn peer(&self) -> Result<Peer, ShareError> {
        let credentials = sys::peer::credentials(self.socket.as_fd());
        let (pid, uid, gid) = credentials
            .map_err(|errno| SystemError::new("getsockopt(SO_PEERCRED)", "a unix socket", errno))?;
        Ok(Peer {
            pid: (pid != 0).then_some(pid),
            uid,
            gid,
        })
    }

    /// Gives a range to the peer for good. The peer can use the range after this process has
    /// exited. The descriptors give access to the whole buffer, not only to the range. Use a
    /// [`Publisher`](super::Publisher) to keep control of a buffer.
    ///
    /// # Errors
    /// As [`Channel::send_message`]; [`ShareError::Lent`] for a buffer that a publisher lent to
    /// this process.
    pub fn send_buffer(&self, range: &BufferRange) -> Result<(), ShareError> {
        if range.buffer().lease().is_some() {
            let name = range.buffer().to_string();
            return Err(ShareError::Lent { name });
        }
        let description = wire::describe(range, super::Placement::Unknown);
        let descriptors = descriptors(range.buffer()).into_iter().flatten();
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.collect();
        let message = wire::encode(wire::Message::HandOver, &[description]);
        self.send_message(&message, &descriptors)
    }

    /// Waits for the peer to hand over a range.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`]; [`ShareError::Truncated`] or [`ShareError::Malformed`] for a
    /// message that does not hand over a range; [`ShareError::Buffer`] for descriptors that do
    /// not match the message; [`ShareError::CutOff`] if the peer is a
    /// [`Publisher`](super::Publisher), which lends to subscribers and hands nothing over.
    pub fn receive_buffer(&self) -> Result<BufferRange, ShareError> {
        taken(self.receive_message(wire::HAND_OVER_SIZE)?)
    }

    /// Like [`Channel::receive_buffer`], with a time limit.
    ///
    /// # Errors
    /// The same, and [`ShareError::TimedOut`].
    pub fn receive_buffer_within(&self, limit: Duration) -> Result<BufferRange, ShareError> {
        taken(self.receive_message_within(wire::HAND_OVER_SIZE, limit)?)
    }

    /// Sends a message of the application, with descriptors. `message` must not be empty. Waits
    /// for room in the socket unless the socket is non-blocking (`O_NONBLOCK`).
    ///
    /// # Errors
    /// [`ShareError::PeerGone`], or the call that failed: `EMSGSIZE` for a message larger than
    /// the socket's buffer, `EINVAL` for an empty message or more than [`MAX_DESCRIPTORS`]
    /// descriptors, `EAGAIN` if a non-blocking socket has no room. Nothing was sent in these
    /// cases.
    pub fn send_message(
        &self,
        message: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ShareError> {
        // The peer would read an empty message as the end of the connection.
        if message.is_empty() {
            return Err(system("sendmsg")(rustix::io::Errno::INVAL).into());
        }
        self.send(message, descriptors, SendFlags::empty())
            .map(drop)
    }

    /// Sends without waiting; false if the socket has no room.
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
                Err(rustix::io::Errno::AGAIN) if flags.contains(SendFlags::DONTWAIT) => {
                    return Ok(false);
                }
                Err(errno) => return Err(system("sendmsg")(errno).into()),
            }
        }
    }

    /// Waits for a message of at most `limit` bytes. The received descriptors are closed on
    /// exec. On an error they are closed at once.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`], [`ShareError::Truncated`], or the call that failed: `EAGAIN`
    /// if a non-blocking socket has no message.
    pub fn receive_message(&self, limit: usize) -> Result<(Vec<u8>, Vec<OwnedFd>), ShareError> {
        let mut message = vec![0; limit];
        let mut descriptors = Vec::new();
        let bytes = self.receive(&mut message, &mut descriptors, RecvFlags::empty())?;
        message.truncate(bytes.unwrap_or(0));
        Ok((message, descriptors))
    }

    /// Like [`Channel::receive_message`], with a time limit.
    ///
    /// # Errors
    /// The same, and [`ShareError::TimedOut`].
    pub fn receive_message_within(
        &self,
        limit: usize,
        time_limit: Duration,
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), ShareError> {
        let deadline = Deadline::after(time_limit);
        let mut message = vec![0; limit];
        let mut descriptors = Vec::new();
        loop {
            if let Some(bytes) = self.try_receive(&mut message, &mut descriptors)? {
                message.truncate(bytes);
                return Ok((message, descriptors));
            }
            if deadline.is_over() {
                let what = "a message from the peer".into();
                let limit = time_limit;
                return Err(ShareError::TimedOut { what, limit });
            }
            let mut waiting = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut waiting, deadline.timespec().as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(system("poll")(errno).into()),
            }
        }
    }

    /// Takes a message if one has arrived, and appends its descriptors to `descriptors`.
    /// Returns the message's length in bytes.
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
        // The descriptors have owners before any check, so that every return path closes them.
        let before = descriptors.len();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                descriptors.reserve(rights.size_hint().0);
                descriptors.extend(rights);
            }
        }
        let error = if received.flags.contains(ReturnFlags::CTRUNC) {
            // The descriptors that arrived are still open, so this call fails for the same
            // reason as the missing ones did.
            let what = match rustix::io::fcntl_dupfd_cloexec(&self.socket, 0) {
                Err(rustix::io::Errno::MFILE) => {
                    "descriptors are missing, because this process reached its limit of open files \
                     (RLIMIT_NOFILE)"
                }
                Err(rustix::io::Errno::NFILE) => {
                    "descriptors are missing, because the system reached its limit of open files \
                     (/proc/sys/fs/file-max)"
                }
                _ => "descriptors are missing",
            };
            ShareError::Truncated { what }
        } else if received.flags.contains(ReturnFlags::TRUNC) {
            ShareError::Truncated {
                what: "it is longer than the longest valid message",
            }
        } else if received.bytes == 0 {
            ShareError::PeerGone
        } else {
            return Ok(Some(received.bytes));
        };
        descriptors.truncate(before);
        Err(error)
    }

    /// Ends the connection for both ends, even if another process holds this end too.
    pub(super) fn shut_down(&self) {
        // The call fails only if the peer has gone.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

/// The range that a message hands over.
fn taken((message, descriptors): (Vec<u8>, Vec<OwnedFd>)) -> Result<BufferRange, ShareError> {
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

/// A buffer's descriptors, in the order of the message.
pub(super) fn descriptors(buffer: &Buffer) -> [Option<BorrowedFd<'_>>; 2] {
    [buffer.dmabuf().map(AsFd::as_fd), buffer.host_memory()]
}

/// Makes a buffer from its description and its descriptors, after a check of each descriptor.
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

pub(super) fn seqpacket() -> Result<OwnedFd, ShareError> {
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

pub(super) fn on(call: &'static str, path: &Path) -> impl Fn(rustix::io::Errno) -> SystemError {
    move |errno| SystemError::new(call, path.display().to_string(), errno)
}
