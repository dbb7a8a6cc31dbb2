//! Handing buffers over a socket: what arrives, and what is refused.

use std::os::fd::{AsFd, OwnedFd};

use peerbuf::BufferRange;
use peerbuf::error::{BufferError, ShareError};
use peerbuf::export::memfd;
use peerbuf::share::{Channel, Listener, MAX_DESCRIPTORS};

fn put(range: &BufferRange, bytes: &[u8]) {
    range.write_bytes(bytes).unwrap();
}

fn get(range: &BufferRange) -> Vec<u8> {
    range.to_vec().unwrap()
}

/// The bytes and descriptors of a real offer, to be spoilt.
fn offer(range: &BufferRange) -> (Vec<u8>, Vec<OwnedFd>) {
    let (ours, theirs) = Channel::pair().unwrap();
    ours.send_buffer(range).unwrap();
    theirs.receive_message(4096).unwrap()
}

fn send(message: &[u8], descriptors: &[&OwnedFd]) -> Result<BufferRange, ShareError> {
    let (ours, theirs) = Channel::pair().unwrap();
    let descriptors: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
    ours.send_message(message, &descriptors).unwrap();
    theirs.receive_buffer()
}

#[test]
fn a_range_arrives_with_its_offset_and_shows_the_same_bytes() {
    let buffer = memfd::export("weights", 1 << 20).unwrap();
    let range = buffer.range(5000, 300).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    ours.send_buffer(&range).unwrap();
    let received = theirs.receive_buffer().unwrap();
    assert_eq!((received.offset(), received.len()), (5000, 300));
    assert_eq!(received.buffer().provenance(), buffer.provenance());
    put(&range, &[7; 300]);
    assert_eq!(get(&received), [7; 300]);
    put(&received, &[8; 300]);
    assert_eq!(get(&range), [8; 300]);
}

#[test]
fn the_kernel_says_who_is_at_the_other_end() {
    let (ours, _theirs) = Channel::pair().unwrap();
    let peer = ours.peer().unwrap();
    assert_eq!(peer.pid as u32, std::process::id());
    assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
}

#[test]
fn a_peer_that_has_gone_is_reported_as_gone() {
    let buffer = memfd::export("weights", 4096).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    drop(theirs);
    assert_eq!(ours.send_buffer(&buffer.whole()), Err(ShareError::PeerGone));
    assert_eq!(ours.receive_buffer().unwrap_err(), ShareError::PeerGone);
    // With something unread at its end, the kernel reports it otherwise.
    let (ours, theirs) = Channel::pair().unwrap();
    ours.send_buffer(&buffer.whole()).unwrap();
    drop(theirs);
    assert_eq!(ours.receive_buffer().unwrap_err(), ShareError::PeerGone);
}

#[test]
fn the_wrong_number_of_descriptors_is_refused() {
    let buffer = memfd::export("weights", 4096).unwrap();
    let (message, fds) = offer(&buffer.whole());
    assert!(send(&message, &[&fds[0]]).is_ok());
    for wrong in [&[][..], &[&fds[0], &fds[0]]] {
        let refused = send(&message, wrong);
        assert!(
            matches!(refused, Err(ShareError::Malformed { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn a_descriptor_of_something_else_is_refused() {
    let buffer = memfd::export("weights", 4096).unwrap();
    let (message, _) = offer(&buffer.whole());
    let file = std::fs::File::open("/proc/self/exe").unwrap().into();
    let refused = send(&message, &[&file]).unwrap_err();
    assert!(
        matches!(refused, ShareError::Buffer(BufferError::NotSealed { .. })),
        "{refused}"
    );
}

#[test]
fn a_buffer_of_another_size_than_announced_is_refused() {
    let (message, _) = offer(&memfd::export("large", 8192).unwrap().whole());
    let (_, small) = offer(&memfd::export("small", 4096).unwrap().whole());
    let refused = send(&message, &[&small[0]]).unwrap_err();
    assert!(
        matches!(refused, ShareError::Buffer(BufferError::OutOfRange { .. })),
        "{refused}"
    );
}

#[test]
fn a_message_that_is_too_long_is_refused() {
    let (mut message, fds) = offer(&memfd::export("weights", 4096).unwrap().whole());
    message.push(0);
    let refused = send(&message, &[&fds[0]]).unwrap_err();
    assert!(matches!(refused, ShareError::Truncated { .. }), "{refused}");
}

#[test]
fn more_descriptors_than_a_message_holds_are_not_sent() {
    let (ours, _theirs) = Channel::pair().unwrap();
    let socket = ours.as_fd();
    assert!(ours.send_message(b"x", &[socket; MAX_DESCRIPTORS]).is_ok());
    assert!(
        ours.send_message(b"x", &[socket; MAX_DESCRIPTORS + 1])
            .is_err()
    );
    assert!(ours.send_message(b"", &[]).is_err());
}

#[test]
fn only_a_unix_seqpacket_socket_makes_a_channel() {
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(
        Channel::from_fd(stream.into()).unwrap_err(),
        ShareError::WrongSocket
    );
    let file = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(
        Channel::from_fd(file.into()).unwrap_err(),
        ShareError::WrongSocket
    );
}

fn socket_path(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("peerbuf-{name}-{}", std::process::id()))
}

#[test]
fn a_listener_hands_out_buffers_to_its_user_and_leaves_no_file() {
    let path = socket_path("listener");
    let listener = Listener::bind(&path).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let client = Channel::connect(&path).unwrap();
    let server = listener.accept().unwrap();
    server
        .send_buffer(&memfd::export("weights", 4096).unwrap().whole())
        .unwrap();
    assert_eq!(client.receive_buffer().unwrap().buffer().name(), "weights");
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_socket_file_is_replaced_only_when_nobody_listens_there() {
    let path = socket_path("taken");
    let listener = Listener::bind(&path).unwrap();
    assert!(
        Listener::bind(&path).is_err(),
        "a socket in use was replaced"
    );
    drop(listener);
    // What a process that was killed leaves behind: a file without a listener.
    let stream = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert!(
        Listener::bind(&path).is_err(),
        "a socket of another kind in use was replaced"
    );
    drop(stream);
    assert!(path.exists());
    drop(Listener::bind(&path).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(Listener::bind(&path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn descriptors_that_arrive_do_not_survive_exec() {
    let buffer = memfd::export("weights", 4096).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    ours.send_buffer(&buffer.whole()).unwrap();
    let received = theirs.receive_buffer().unwrap();
    let memory = received.buffer().host_memory().unwrap();
    let flags = rustix::io::fcntl_getfd(memory).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}
