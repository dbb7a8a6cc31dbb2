#!/usr/bin/env bash
# Software:  sendfd 0.4.5 and fd-queue 1.1.0 (crates), passfd 0.1.6 beside them; socket.recv_fds() and multiprocessing
#            of Python 3.11.
# Behaviour: descriptors that come over a socket by sendfd, fd-queue or Python are inherited by every program that
#            the receiver starts later, though Rust and Python (PEP 446) open all others close-on-exec. A child that
#            lives on keeps the memory of a buffer after its owner closed it. passfd sets close-on-exec. Python's
#            subprocess closes descriptors itself.
# Seen:
#   sendfd: the child has the buffer
#   fd-queue: the child has the buffer
#   passfd: the child lacks the buffer
#   Python, opened itself: inheritable False
#   Python, socket.recv_fds: inheritable True
#   Python, multiprocessing.reduction.recv_handle: inheritable True
# Needs: cargo, python3 3.9 or later. No root.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
mkdir "$dir/src"
cat >"$dir/Cargo.toml" <<'TOML'
[package]
name = "passing"
version = "0.0.0"
edition = "2021"
[dependencies]
sendfd = "=0.4.5"
fd-queue = { version = "=1.1.0", features = ["net-fd"] }
passfd = "=0.1.6"
[profile.dev]
debug = 0
[workspace]
TOML
cat >"$dir/src/main.rs" <<'RS'
use std::{fs::File, io::{Read, Write}, os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd}, os::unix::net::UnixStream, process};
fn say(name: &str, fd: RawFd) {
    let there = process::Command::new("readlink").arg(format!("/proc/self/fd/{fd}")).output().unwrap();
    let has = String::from_utf8_lossy(&there.stdout).ends_with("/buffer\n");
    println!("{name}: the child {} the buffer", if has { "has" } else { "lacks" });
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}
fn main() {
    let buffer = File::create(std::env::args().nth(1).unwrap()).unwrap();
    let ((a, b), fd) = (UnixStream::pair().unwrap(), buffer.as_raw_fd());
    let (mut byte, mut fds) = ([0; 1], [0; 1]);
    sendfd::SendWithFd::send_with_fd(&a, b"x", &[fd]).unwrap();
    sendfd::RecvWithFd::recv_with_fd(&b, &mut byte, &mut fds).unwrap();
    say("sendfd", fds[0]);
    let (mut c, mut d) = fd_queue::UnixStream::pair().unwrap();
    fd_queue::EnqueueFd::enqueue(&mut c, &fd).unwrap();
    c.write_all(b"x").unwrap();
    c.flush().unwrap();
    d.read_exact(&mut byte).unwrap();
    say("fd-queue", fd_queue::DequeueFd::dequeue(&mut d).unwrap());
    passfd::FdPassingExt::send_fd(&a, fd).unwrap();
    say("passfd", passfd::FdPassingExt::recv_fd(&b).unwrap());
}
RS
cargo run -q --manifest-path "$dir/Cargo.toml" --target-dir "$dir/target" -- "$dir/buffer" >"$dir/seen"
python3 - >>"$dir/seen" <<'PY'
import multiprocessing as mp, multiprocessing.reduction, os, socket
fd, (a, b), (c, d) = os.memfd_create("buffer"), socket.socketpair(), mp.Pipe()
socket.send_fds(a, [b"x"], [fd])
mp.reduction.send_handle(c, fd, os.getpid())
for name, got in (("opened itself", fd), ("socket.recv_fds", socket.recv_fds(b, 1, 1)[1][0]),
                  ("multiprocessing.reduction.recv_handle", mp.reduction.recv_handle(d))):
    print(f"Python, {name}: inheritable {os.get_inheritable(got)}")
PY
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: what is received is inherited"
