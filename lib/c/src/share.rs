//! Sharing buffers with other processes.

use std::ffi::{OsStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::buffer::{Buffer, Held};
use crate::failure::{Code, Failure};
use crate::foreign::{bytes, descriptor, limit, make, place, run, text};
use crate::handle::{self, free, get};

/// One end of a connection for buffers.
pub struct Channel(peerbuf::share::Channel);

/// A path at which other processes connect.
pub struct Listener(peerbuf::share::Listener);

/// A connection to a publisher.
pub struct Subscriber(peerbuf::share::Subscriber);

/// The peer's process when the connection was made, as reported by the kernel.
#[repr(C)]
pub struct Peer {
    /// Process ID; 0 for a process in another PID namespace.
    pub pid: i32,
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
}

/// Makes a connected pair of channels, for a process and its child.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_channel_pair(
    one: Option<&mut MaybeUninit<*mut Channel>>,
    other: Option<&mut MaybeUninit<*mut Channel>>,
) -> Code {
    run(|| {
        let one = place("one end", one)?;
        let other = place("the other end", other)?;
        one.write(std::ptr::null_mut());
        other.write(std::ptr::null_mut());
        let (ours, theirs) = peerbuf::share::Channel::pair()?;
        one.write(handle::keep(Channel(ours)));
        other.write(handle::keep(Channel(theirs)));
        Ok(())
    })
}

/// Connects to a listener at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_channel_connect(
    path: *const c_char,
    channel: Option<&mut MaybeUninit<*mut Channel>>,
) -> Code {
    make(channel, || {
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let path = OsStr::from_bytes(unsafe { bytes("the path", path) }?);
        Ok(Channel(peerbuf::share::Channel::connect(path)?))
    })
}

/// Takes a connected unix socket of type SOCK_SEQPACKET. The caller keeps the descriptor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_channel_from_descriptor(
    fd: c_int,
    channel: Option<&mut MaybeUninit<*mut Channel>>,
) -> Code {
    make(channel, || {
        // SAFETY: the caller's descriptor is open or negative, as the crate's documentation demands.
        let fd = unsafe { descriptor(fd) }?;
        Ok(Channel(peerbuf::share::Channel::from_fd(fd)?))
    })
}

/// Returns the channel's descriptor, for poll. The channel still owns and closes it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_channel_descriptor(
    channel: *const Channel,
    fd: Option<&mut MaybeUninit<c_int>>,
) -> Code {
    run(|| {
        let channel = get(channel)?;
        place("the descriptor", fd)?.write(channel.0.as_fd().as_raw_fd());
        Ok(())
    })
}

/// Returns the peer's process.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_channel_peer(
    channel: *const Channel,
    peer: Option<&mut MaybeUninit<Peer>>,
) -> Code {
    run(|| {
        let known = get(channel)?.0.peer()?;
        place("the peer", peer)?.write(Peer {
            pid: known.pid.unwrap_or(0),
            uid: known.uid,
            gid: known.gid,
        });
        Ok(())
    })
}

/// Sends a range of a buffer. `length` may be PEERBUF_ANY. The receiver gets access to the whole buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_send(
    channel: *const Channel,
    buffer: *const Buffer,
    offset: u64,
    length: u64,
) -> Code {
    run(|| {
        let (channel, buffer) = (get(channel)?, get(buffer)?);
        Ok(channel.0.send_buffer(&buffer.range(offset, length)?)?)
    })
}

/// Waits for a range from the peer, up to `milliseconds`; forever if negative. `offset` and `length` are the
/// range in the buffer; each may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_receive(
    channel: *const Channel,
    milliseconds: i64,
    buffer: Option<&mut MaybeUninit<*mut Buffer>>,
    offset: Option<&mut MaybeUninit<u64>>,
    length: Option<&mut MaybeUninit<u64>>,
) -> Code {
    make(buffer, || {
        let channel = get(channel)?;
        let range = match limit(milliseconds) {
            Some(limit) => channel.0.receive_buffer_within(limit)?,
            None => channel.0.receive_buffer()?,
        };
        offset.map(|place| place.write(range.offset()));
        length.map(|place| place.write(range.len()));
        Ok(Buffer::own(range.buffer().clone()))
    })
}

/// Closes and frees a channel. Null does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_channel_free(channel: *mut Channel) -> Code {
    run(|| free(channel))
}

/// Listens at `path`. Only the same user may connect, unless the file's mode is changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_listen(
    path: *const c_char,
    listener: Option<&mut MaybeUninit<*mut Listener>>,
) -> Code {
    make(listener, || {
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let path = OsStr::from_bytes(unsafe { bytes("the path", path) }?);
        Ok(Listener(peerbuf::share::Listener::bind(path)?))
    })
}

/// Waits for a process to connect.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_accept(
    listener: *const Listener,
    channel: Option<&mut MaybeUninit<*mut Channel>>,
) -> Code {
    make(channel, || Ok(Channel(get(listener)?.0.accept()?)))
}

/// Frees a listener, and removes its socket file. Null does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_listener_free(listener: *mut Listener) -> Code {
    run(|| free(listener))
}

/// Connects to the publisher at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_subscribe(
    path: *const c_char,
    subscriber: Option<&mut MaybeUninit<*mut Subscriber>>,
) -> Code {
    make(subscriber, || {
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let path = OsStr::from_bytes(unsafe { bytes("the path", path) }?);
        Ok(Subscriber(peerbuf::share::Subscriber::connect(path)?))
    })
}

/// Subscribes over a connected unix socket of type SOCK_SEQPACKET. The caller keeps and closes the
/// descriptor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_subscribe_descriptor(
    fd: c_int,
    subscriber: Option<&mut MaybeUninit<*mut Subscriber>>,
) -> Code {
    make(subscriber, || {
        // SAFETY: the caller's descriptor is open or negative, as the crate's documentation demands.
        let fd = unsafe { descriptor(fd) }?;
        let channel = peerbuf::share::Channel::from_fd(fd)?;
        Ok(Subscriber(peerbuf::share::Subscriber::new(channel)?))
    })
}

/// Borrows the buffer published as `name`. Waits for it up to `milliseconds`; forever if negative. The buffer
/// returns to the publisher when it and its mappings are freed; a publisher that moves the buffer waits for
/// that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_borrow(
    subscriber: *const Subscriber,
    name: *const c_char,
    milliseconds: i64,
    buffer: Option<&mut MaybeUninit<*mut Buffer>>,
) -> Code {
    make(buffer, || {
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let name = unsafe { text("the name", name) }?;
        let subscriber = get(subscriber)?;
        let lease = match limit(milliseconds) {
            Some(limit) => subscriber.0.buffer_within(name, limit)?,
            None => subscriber.0.buffer(name)?,
        };
        Ok(Buffer(Held::Lent(lease)))
    })
}

/// Waits up to `milliseconds` until the publisher wants a lent buffer back; 0 does not wait. `wanted` tells
/// whether it does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_wanted_back(
    buffer: *const Buffer,
    milliseconds: u32,
    wanted: Option<&mut MaybeUninit<bool>>,
) -> Code {
    run(|| {
        let buffer = get(buffer)?;
        let Held::Lent(lease) = &buffer.0 else {
            let message = format!("{} is not lent", buffer.get());
            return Err(Failure::new(Code::Argument, message));
        };
        let limit = Duration::from_millis(milliseconds.into());
        let until = lease.wait_until_wanted(limit);
        place("the answer", wanted)?.write(until.is_some());
        Ok(())
    })
}

/// Frees a subscriber. Its borrowed buffers stay mapped, but the publisher does not wait for them. Null does
/// nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_subscriber_free(subscriber: *mut Subscriber) -> Code {
    run(|| free(subscriber))
}
