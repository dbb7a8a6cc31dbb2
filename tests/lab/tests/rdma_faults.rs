//! A peer that disappears during a transfer, or the route to it: a process is killed, a link is
//! cut. On the kernel's soft-RoCE and on the lab's. Runs in the guest. (`rdma_pair.rs` tests a
//! cable between two guests.)

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use peerbuf::Buffer;
use peerbuf::export::udmabuf;
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::machine::{Machine, expect_what_rxe_says_of_a_killed_program, seconds};
use peerbuf_lab_suite::node::{Child, MIB, Node, assert_all_free, in_child};
use peerbuf_lab_suite::pci::wait_until;
use peerbuf_lab_suite::rdma::{ALL, bar, card, good, limit, random};
use peerbuf_rdma::{Address, Card, Connection, Operation, Registration, Remote, Status, WorkError};
use rustix::process::{Signal, set_parent_process_death_signal};

/// Time limit to detect a missing peer: the card takes some seven seconds, a busy host longer.
fn noticed_within() -> Duration {
    seconds(20)
}

/// Length of a request in bytes.
const CHUNK: u64 = MIB / 8;
/// Number of requests of a transfer, all of them in flight at the start.
const CHUNKS: usize = 16;
/// Length of the registered middle of a buffer, in bytes. Nobody may change the edges.
const LENGTH: u64 = CHUNK * CHUNKS as u64;
const EDGE: u64 = 64 << 10;
const SIZE: u64 = LENGTH + 2 * EDGE;

/// The seeds of the initial contents: the buffer of the killed process, and the survivor's.
const THEIRS: u64 = 1;
const OURS: u64 = 2;

fn buffer(kind: &str) -> Buffer {
    match kind {
        "bar" => bar(SIZE),
        _ => udmabuf::export("udmabuf", SIZE).unwrap(),
    }
}

fn registered(card: &Card, buffer: &Buffer, seed: u64) -> Registration {
    put(&buffer.whole(), &random(SIZE, seed));
    let middle = buffer.range(EDGE, LENGTH).unwrap();
    let registration = card.register(&middle, ALL).unwrap();
    registration.refresh(0, LENGTH).unwrap();
    registration
}

/// Posts the whole transfer.
fn begin(connection: &mut Connection, what: Operation, of: &Registration, remote: &Remote) {
    for n in 0..CHUNKS as u64 {
        let piece = of.slice(n * CHUNK, CHUNK).unwrap();
        let remote = remote.slice(n * CHUNK, CHUNK).unwrap();
        match what {
            Operation::Write => connection.write(&piece, &remote, None).unwrap(),
            _ => connection.read(&piece, &remote).unwrap(),
        };
    }
}

/// Which end moves the bytes, and in which direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Writes,
    Reads,
    IsWritten,
    IsRead,
}

/// A second process with its own card and buffer, which follows orders until it is killed or
/// the survivor closes the channel.
struct Other {
    child: Child,
    channel: UnixStream,
}

impl Other {
    /// Must not be called while this process has a card open: the child would inherit it and
    /// delay its release.
    fn start(kind: &str) -> Other {
        let (channel, theirs) = UnixStream::pair().unwrap();
        channel.set_read_timeout(Some(limit())).unwrap();
        let child = in_child(|| {
            set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
            Other::run(&theirs, kind);
            0
        });
        Other { child, channel }
    }

    fn run(mut channel: &UnixStream, kind: &str) {
        let card = card();
        let buffer = buffer(kind);
        let registration = registered(&card, &buffer, THEIRS);
        let end = card.endpoint(CHUNKS as u32).unwrap();
        channel.write_all(&end.address().to_bytes()).unwrap();
        let remote = registration.remote().unwrap();
        channel.write_all(&remote.to_bytes()).unwrap();
        let (address, remote) = Other::told(channel);
        let mut role = [0];
        channel.read_exact(&mut role).unwrap();
        let mut connection = end.connect(&address).unwrap();
        connection.shows(&registration);
        channel.write_all(&[0]).unwrap();
        let does = match role[0] {
            r if r == Role::IsWritten as u8 => Some(Operation::Write),
            r if r == Role::IsRead as u8 => Some(Operation::Read),
            _ => None,
        };
        if let Some(operation) = does {
            begin(&mut connection, operation, &registration, &remote);
            for _ in 0..CHUNKS {
                good(connection.wait(limit()).unwrap());
                channel.write_all(&[1]).unwrap();
            }
        }
        assert_eq!(channel.read(&mut [0]).unwrap(), 0);
    }

    fn told(mut channel: &UnixStream) -> (Address, Remote) {
        let (mut address, mut remote) = ([0; 32], [0; 24]);
        channel.read_exact(&mut address).unwrap();
        channel.read_exact(&mut remote).unwrap();
        let address = Address::from_bytes(&address).unwrap();
        (address, Remote::from_bytes(&remote).unwrap())
    }

    /// Connects with the other process and gives it its role.
    fn connect(
        &mut self,
        card: &Card,
        registration: &Registration,
        role: Role,
    ) -> (Connection, Remote) {
        let (address, remote) = Other::told(&self.channel);
        let end = card.endpoint(CHUNKS as u32).unwrap();
        let ours = end.address().to_bytes();
        let connection = end.connect(&address).unwrap();
        connection.shows(registration);
        self.channel.write_all(&ours).unwrap();
        let shown = registration.remote().unwrap();
        self.channel.write_all(&shown.to_bytes()).unwrap();
        self.channel.write_all(&[role as u8]).unwrap();
        self.channel.read_exact(&mut [0]).unwrap();
        (connection, remote)
    }

    /// Waits until the other process has completed this many requests.
    fn done(&mut self, count: usize) {
        self.channel.read_exact(&mut vec![0; count]).unwrap();
    }

    /// Waits for the kill, and returns the number of further completed requests.
    fn rest(mut self) -> usize {
        assert_eq!(self.child.wait(), Err(libc::SIGKILL));
        let mut rest = Vec::new();
        self.channel.read_to_end(&mut rest).unwrap();
        rest.len()
    }

    fn kill(&self) -> Stopwatch {
        self.child.kill(libc::SIGKILL);
        Stopwatch::start()
    }

    fn end(self) {
        // (The child has a copy of this end.)
        self.channel.shutdown(Shutdown::Both).unwrap();
        assert_eq!(self.child.wait(), Ok(0));
    }
}

/// The card's resources in use.
fn resources() -> String {
    let output = Command::new("rdma").args(["resource", "show"]).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The reference count of peerbuf.ko. The module cannot be unloaded while the count is above
/// zero.
fn module_users() -> String {
    let count = fs::read_to_string("/sys/module/peerbuf/refcnt").unwrap();
    count.trim().to_owned()
}

/// Asserts that the first request got no answer, and that the requests after it were flushed.
fn assert_unanswered(errors: &[WorkError]) {
    for (n, error) in errors.iter().enumerate() {
        let status = if n == 0 {
            Status::UNANSWERED
        } else {
            Status::FLUSHED
        };
        assert_eq!((error.status, error.cut_off), (status, false), "{n}");
    }
    let text = errors[0].to_string();
    assert!(text.contains("does not answer"), "{text}");
}

/// Kills the other process after `after` completed requests, its own or this process's. Returns
/// the number of requests that are known to be complete, or `None` if the kill came too late:
/// on a busy machine all of them may complete before this process runs again.
fn killed_in_mid_transfer(
    mut other: Other,
    card: &Card,
    registration: &Registration,
    role: Role,
    after: usize,
) -> Option<usize> {
    let (mut here, remote) = other.connect(card, registration, role);
    let noticed = |here: &mut Connection, left: usize, killed: Stopwatch| {
        let mut done = 0;
        let mut errors = Vec::new();
        for _ in 0..left {
            match here.wait(noticed_within()).unwrap().result {
                Ok(_) => done += 1,
                Err(error) => errors.push(error),
            }
            assert!(killed.elapsed() < noticed_within(), "{role:?}: {errors:?}");
        }
        if !errors.is_empty() {
            assert_unanswered(&errors);
            eprintln!("{role:?}: noticed after {:?}", killed.elapsed());
        }
        done
    };
    let done = match role {
        Role::Writes | Role::Reads => {
            let operation = match role {
                Role::Writes => Operation::Write,
                _ => Operation::Read,
            };
            begin(&mut here, operation, registration, &remote);
            for _ in 0..after {
                good(here.wait(limit()).unwrap());
            }
            let killed = other.kill();
            let done = after + noticed(&mut here, CHUNKS - after, killed);
            assert_eq!(other.rest(), 0);
            if done == CHUNKS {
                return None;
            }
            done
        }
        Role::IsWritten | Role::IsRead => {
            other.done(after);
            other.kill();
            let done = after + other.rest();
            if done == CHUNKS {
                return None;
            }
            if role == Role::IsWritten {
                // For a staged buffer, copies the bytes into it before a request copies from
                // there.
                registration.deliver(0, LENGTH).unwrap();
            }
            // The peer does not answer this end's own requests.
            let piece = registration.slice(0, 64).unwrap();
            here.send(&piece, None).unwrap();
            assert_eq!(noticed(&mut here, 1, Stopwatch::start()), 0);
            done
        }
    };
    assert_eq!(here.in_flight(), 0);
    Some(done)
}

/// Asserts that the survivor's buffer has only contents that an aborted transfer may leave.
fn check(buffer: &Buffer, role: Role, done: usize) {
    let old = random(SIZE, OURS);
    let now = get(&buffer.whole());
    if matches!(role, Role::Writes | Role::IsRead) {
        assert!(now == old, "{role:?}");
        return;
    }
    let new = random(SIZE, THEIRS);
    let (begin, end) = (EDGE as usize, (EDGE + LENGTH) as usize);
    let known = begin + done * CHUNK as usize;
    assert!(now[..begin] == old[..begin], "{role:?}: before it");
    assert!(now[begin..known] == new[begin..known], "{role:?}: done");
    let neither = (known..end).find(|&at| now[at] != old[at] && now[at] != new[at]);
    assert_eq!(neither, None, "{role:?}: from neither");
    assert!(now[known..end] != new[known..end], "{role:?}: all arrived");
    assert!(now[end..] == old[end..], "{role:?}: behind it");
}

/// Maximum number of attempts after a late kill.
const TRIES: usize = 10;

/// Uses a new connection of the same registration in both directions.
fn works_again(mut other: Other, card: &Card, buffer: &Buffer, registration: &Registration) {
    const COUNT: u64 = CHUNK + 4099;
    let (mut here, remote) = other.connect(card, registration, Role::Writes);
    let bytes = random(COUNT, 3);
    put(&buffer.range(EDGE + 5, COUNT).unwrap(), &bytes);
    let piece = registration.slice(5, COUNT).unwrap();
    let there = remote.slice(77, COUNT).unwrap();
    here.write(&piece, &there, None).unwrap();
    assert_eq!(good(here.wait(limit()).unwrap()), COUNT);
    let back = 4 * CHUNK + 1;
    here.read(&registration.slice(back, COUNT).unwrap(), &there)
        .unwrap();
    assert_eq!(good(here.wait(limit()).unwrap()), COUNT);
    assert!(get(&buffer.range(EDGE + back, COUNT).unwrap()) == bytes);
    drop(here);
    other.end();
}

#[test]
fn a_process_killed_in_mid_transfer_costs_the_other_an_error_and_nothing_else() {
    expect_what_rxe_says_of_a_killed_program();
    // Opens the objects that the library opens once.
    drop(card());
    let nothing = (descriptors(), resources(), module_users());
    for kind in ["bar", "udmabuf"] {
        for (role, after) in [
            (Role::Writes, 2),
            (Role::Reads, 1),
            (Role::IsWritten, 3),
            (Role::IsRead, 1),
        ] {
            let in_time = (0..TRIES).any(|_| {
                let [first, second] = [Other::start(kind), Other::start(kind)];
                let card = card();
                let buffer = buffer(kind);
                let registration = registered(&card, &buffer, OURS);
                let done = killed_in_mid_transfer(first, &card, &registration, role, after);
                if let Some(done) = done {
                    check(&buffer, role, done);
                }
                registration.check().unwrap();
                works_again(second, &card, &buffer, &registration);
                drop((registration, buffer, card));
                wait_until("the killed process' resources", || resources() == nothing.1);
                assert_all_free(&Node::largest());
                wait_until("the module's users", || module_users() == nothing.2);
                assert_eq!(descriptors(), nothing.0, "{kind}: {role:?}");
                done.is_some()
            });
            assert!(
                in_time,
                "{kind}: {role:?}: killed when all was done, {TRIES} times"
            );
        }
    }
    assert_eq!(nothing.2, "0");
}

/// Both ends of a connection on one card.
fn connected(card: &Card) -> (Connection, Connection) {
    peerbuf_lab_suite::rdma::connected(card, CHUNKS as u32)
}

/// The guest's network interface, under soft-RoCE.
fn interface() -> String {
    let all = fs::read_dir("/sys/class/net").unwrap();
    let mut all = all.map(|entry| entry.unwrap());
    let card = all.find(|entry| entry.path().join("device").exists());
    card.unwrap().file_name().into_string().unwrap()
}

fn ip(arguments: &[&str]) {
    let done = Command::new("/bin/busybox")
        .arg("ip")
        .args(arguments)
        .output();
    let done = done.unwrap();
    assert!(done.status.success(), "ip {arguments:?}: {done:?}");
}

/// Begins a transfer between two ends on one card, and calls `cut` in the middle. Returns the
/// number of completed requests, the errors of the others, and the time from the cut to the
/// last completion.
fn cut_in_mid_transfer(card: &Card, cut: impl FnOnce()) -> (usize, Vec<WorkError>, Duration) {
    let [from, to] = ["udmabuf", "udmabuf"].map(buffer);
    let ours = registered(card, &from, OURS);
    let theirs = registered(card, &to, THEIRS);
    let (mut here, _there) = connected(card);
    begin(
        &mut here,
        Operation::Write,
        &ours,
        &theirs.remote().unwrap(),
    );
    good(here.wait(limit()).unwrap());
    cut();
    let since = Stopwatch::start();
    let rest = (1..CHUNKS).map(|_| here.wait(noticed_within()).unwrap().result);
    let (good, bad): (Vec<_>, Vec<_>) = rest.partition(Result::is_ok);
    let took = since.elapsed();
    let done = 1 + good.len();
    let (begin, end) = (EDGE as usize, (EDGE + LENGTH) as usize);
    let known = begin + done * CHUNK as usize;
    let now = get(&to.whole());
    let (old, new) = (random(SIZE, THEIRS), random(SIZE, OURS));
    assert!(now[begin..known] == new[begin..known], "done");
    assert!(now[..begin] == old[..begin], "before it");
    assert!(now[end..] == old[end..], "behind it");
    assert!(get(&from.whole()) == new, "the source");
    let errors = bad.into_iter().filter_map(Result::err).collect();
    (done, errors, took)
}

/// The error of a new connection while there is no route.
fn assert_no_connection(card: &Card) {
    wait_until("the port is down", || card.endpoint(1).is_err());
    let error = card.endpoint(1).unwrap_err().to_string();
    for what in ["ibv_query_port", "rxe0", "ENETDOWN"] {
        assert!(error.contains(what), "{error}");
    }
}

fn assert_it_works_again(card: &Card) {
    wait_until("the port is up", || card.endpoint(1).is_ok());
    let (done, errors, _) = cut_in_mid_transfer(card, || ());
    assert_eq!((done, errors), (CHUNKS, Vec::new()));
}

#[test]
fn without_a_cable_one_card_still_reaches_itself_and_others_are_refused() {
    let mut machine = Machine::new();
    let card = card();
    let (done, errors, _) = cut_in_mid_transfer(&card, || machine.link("net0", false).unwrap());
    assert_eq!((done, errors), (CHUNKS, Vec::new()));
    assert_no_connection(&card);
    machine.link("net0", true).unwrap();
    assert_it_works_again(&card);
}

#[test]
fn an_interface_that_is_switched_off_ends_connections_at_once() {
    let name = interface();
    let card = card();
    for _ in 0..TRIES {
        let down = || ip(&["link", "set", &name, "down"]);
        let (done, errors, took) = cut_in_mid_transfer(&card, down);
        // Soft-RoCE flushes the failed request together with the others.
        for error in errors {
            assert_eq!((error.status, error.cut_off), (Status::FLUSHED, false));
            assert!(error.to_string().contains("network"), "{error}");
        }
        assert_no_connection(&card);
        ip(&["link", "set", &name, "up"]);
        ip(&["route", "add", "default", "via", "10.0.2.2"]);
        assert_it_works_again(&card);
        if done < CHUNKS {
            assert!(took < seconds(5), "{took:?}");
            return;
        }
    }
    panic!("switched off when all was done, {TRIES} times");
}
