//! Handing buffers over a socket: the arrival of valid messages, and the refusal of invalid
//! ones.

use std::os::fd::{AsFd, OwnedFd};

use peerbuf::BufferRange;
use peerbuf::error::{BufferError, ShareError};
use peerbuf::export::memfd;
use peerbuf::share::{Channel, Listener, MAX_DESCRIPTORS};
use std::time::{Duration, Instant};

fn put(range: &BufferRange, bytes: &[u8]) {
    range.write_bytes(bytes).unwrap();
}

fn get(range: &BufferRange) -> Vec<u8> {
    range.to_vec().unwrap()
}

/// The bytes and descriptors of a real offer, for tests that modify them.
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
    assert_eq!(peer.pid, Some(std::process::id() as i32));
    assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
}

#[test]
fn a_peer_that_has_gone_is_reported_as_gone() {
    let buffer = memfd::export("weights", 4096).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    drop(theirs);
    assert_eq!(ours.send_buffer(&buffer.whole()), Err(ShareError::PeerGone));
    assert_eq!(ours.receive_buffer().unwrap_err(), ShareError::PeerGone);
    // With unread data at the peer's end, the kernel reports the close differently.
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
    // A killed process leaves a socket file without a listener.
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

#[test]
fn what_is_reported_as_sent_arrives_also_from_a_socket_that_does_not_wait() {
    let buffer = memfd::export("weights", 4096).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    rustix::io::ioctl_fionbio(&ours, true).unwrap();
    let mut sent = 0;
    for number in 0..5000 {
        let result = match number % 2 {
            0 => ours.send_message(b"a message", &[]),
            _ => ours.send_buffer(&buffer.whole()),
        };
        match result {
            Ok(()) => sent += 1,
            Err(ShareError::System(error)) => {
                assert_eq!(
                    (error.call, error.errno),
                    ("sendmsg", peerbuf::Errno::AGAIN)
                );
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(sent > 0 && sent < 5000, "{sent}");
    drop(ours);
    for number in 0..sent {
        let arrived = theirs.receive_message(4096);
        assert!(arrived.is_ok(), "message {number} of {sent}: {arrived:?}");
    }
    assert_eq!(
        theirs.receive_message(4096).unwrap_err(),
        ShareError::PeerGone
    );
}

#[test]
fn a_message_is_waited_for_until_the_limit_and_not_longer() {
    let (ours, theirs) = Channel::pair().unwrap();
    let limit = Duration::from_millis(20);
    let begun = Instant::now();
    let late = theirs.receive_buffer_within(limit).unwrap_err();
    assert!(matches!(late, ShareError::TimedOut { .. }), "{late}");
    assert!(begun.elapsed() >= limit);
    let sender = std::thread::spawn(move || {
        std::thread::sleep(limit);
        ours.send_buffer(&memfd::export("weights", 4096).unwrap().whole())
    });
    // `Duration::MAX` is a valid limit.
    let received = theirs.receive_buffer_within(Duration::MAX).unwrap();
    assert_eq!(received.len(), 4096);
    sender.join().unwrap().unwrap();
    let gone = theirs.receive_message_within(4096, Duration::MAX);
    assert_eq!(gone.unwrap_err(), ShareError::PeerGone);
}

/// A socket file without a listener, as a killed process leaves it.
fn leave_behind(path: &std::path::Path) {
    drop(std::os::unix::net::UnixListener::bind(path).unwrap());
}

#[test]
fn one_of_those_that_start_together_on_an_abandoned_path_gets_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    for round in 0..100 {
        if round % 2 == 0 {
            leave_behind(&path);
        }
        let together = std::sync::Barrier::new(3);
        let listeners: Vec<_> = std::thread::scope(|scope| {
            let start = || {
                together.wait();
                Listener::bind(&path)
            };
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(start)).collect();
            let joined = threads.into_iter().map(|thread| thread.join().unwrap());
            joined.collect()
        });
        let got = listeners.iter().filter(|listener| listener.is_ok()).count();
        assert_eq!(got, 1, "round {round}: {listeners:?}");
        Channel::connect(&path).unwrap();
        drop(listeners);
        let left: Vec<_> = directory.path().read_dir().unwrap().collect();
        assert!(left.is_empty(), "round {round}: {left:?}");
    }
}

#[test]
fn a_listener_leaves_the_file_of_another_where_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let first = Listener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = Listener::bind(&path).unwrap();
    drop(first);
    let client = Channel::connect(&path).unwrap();
    let server = second.accept().unwrap();
    server.send_message(b"still here", &[]).unwrap();
    assert_eq!(client.receive_message(100).unwrap().0, b"still here");
    drop(second);
    assert!(!path.exists());
}

#[test]
fn connecting_to_one_that_accepts_nobody_has_a_limit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = Listener::bind(&path).unwrap();
    let limit = Duration::from_millis(50);
    let mut waiting = Vec::new();
    let (refused, took) = loop {
        let begun = Instant::now();
        match Channel::connect_within(&path, limit) {
            Ok(channel) => waiting.push(channel),
            Err(refused) => break (refused, begun.elapsed()),
        }
        assert!(waiting.len() < 10_000);
    };
    assert!(matches!(refused, ShareError::TimedOut { .. }), "{refused}");
    assert!(took >= limit && took < Duration::from_secs(10), "{took:?}");
    assert!(refused.to_string().contains("socket"), "{refused}");
    // A free place in the backlog is taken, however long the limit.
    let accepting = std::thread::spawn(move || {
        std::thread::sleep(limit);
        listener.accept().map(|_| listener)
    });
    Channel::connect_within(&path, Duration::MAX).unwrap();
    accepting.join().unwrap().unwrap();
}
