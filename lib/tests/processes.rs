//! Sharing across `fork`, across PID namespaces, and with too few descriptors.
//!
//! The other processes run this program again, as the test `other_process`.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::not_run;
use nix::libc;
use peerbuf::error::{BufferError, ShareError};
use peerbuf::export::memfd;
use peerbuf::share::{
    Backing, Channel, Copied, Event, Grant, Listener, Peer, Publisher, Subscriber,
};
use peerbuf::{Access, Buffer, Deadline};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

mod common;

const SIZE: u64 = 64 << 10;
/// Time limit for expected events.
const LONG: Duration = Duration::from_secs(20);
/// Waiting time for events that must not happen.
const SHORT: Duration = Duration::from_millis(100);

fn memory() -> impl Backing + 'static {
    Copied::new(|order| memfd::export(&format!("generation {}", order.generation), SIZE)).unwrap()
}

fn put(buffer: &Buffer, word: u64) {
    let range = buffer.range(0, 8).unwrap();
    range.write_bytes(&word.to_ne_bytes()).unwrap();
}

fn get(buffer: &Buffer) -> u64 {
    let mut word = [0; 8];
    buffer.range(0, 8).unwrap().read_bytes(&mut word).unwrap();
    u64::from_ne_bytes(word)
}

/// A process that is killed at the end of the test.
struct Process(Child);

impl Process {
    /// The lines with `ours:` that the process and its children print.
    fn said(&mut self) -> impl Iterator<Item = String> + use<> {
        let out: ChildStdout = self.0.stdout.take().unwrap();
        let lines = BufReader::new(out).lines().map_while(Result::ok);
        lines.filter_map(|line| line.split_once("ours: ").map(|(_, said)| said.to_owned()))
    }

    fn succeeds(&mut self) {
        let deadline = Deadline::after(LONG);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return assert!(status.success(), "{status}");
            }
            assert!(!deadline.is_over(), "it never ended");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a line from this process to the test that started it.
fn say(words: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("\nours: {words}\n").as_bytes())
        .unwrap();
    out.flush().unwrap();
}

/// Starts this program again, through `prefix`, in the role `role`.
fn start(prefix: &[&str], role: &str, socket: &Path, stdin: Stdio) -> Process {
    let exe = std::env::current_exe().unwrap();
    let arguments = ["other_process", "--exact", "--ignored", "--nocapture"];
    let words = prefix.iter().copied().chain([exe.to_str().unwrap()]);
    let mut words = words.chain(arguments);
    let child = Command::new(words.next().unwrap())
        .args(words)
        .env("PEERBUF_TEST_ROLE", role)
        .env("PEERBUF_TEST_SOCKET", socket)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .spawn();
    Process(child.unwrap())
}

/// The other process, in one of its roles. The tests start it.
#[test]
#[ignore = "the other process of the tests in this file, which start it"]
fn other_process() {
    let role = std::env::var("PEERBUF_TEST_ROLE").expect("a role");
    let socket = PathBuf::from(std::env::var("PEERBUF_TEST_SOCKET").expect("a socket"));
    match role.as_str() {
        "publish to strangers" => publish_to_strangers(&socket),
        "publish in want" => publish_in_want(&socket),
        "receive in want" => receive_in_want(),
        "publish to the silent" => publish_to_the_silent(),
        "subscribe and leave a child" => subscribe_and_leave_a_child(),
        "subscribe beside a child" => subscribe_beside_a_child(),
        "publish beside a child" => publish_beside_a_child(&socket),
        "publish with async beside a child" => publish_with_async_beside_a_child(),
        other => panic!("unknown role {other}"),
    }
}

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Directory {
        Directory(tempfile::tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("socket")
    }
}

/// Connects a subscriber to a publisher that may not listen yet.
fn connect(socket: &Path) -> Subscriber {
    let deadline = Deadline::after(LONG);
    loop {
        match Subscriber::connect(socket) {
            Ok(subscriber) => return subscriber,
            Err(error) => assert!(!deadline.is_over(), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The command that starts a program in a new PID namespace, as root or in a user namespace. If
/// neither works, names `test` on standard error.
fn new_pid_namespace(test: &str) -> Option<&'static [&'static str]> {
    let ways: [&[&str]; 2] = [
        &["unshare", "--pid", "--fork", "--kill-child"],
        &[
            "unshare",
            "--user",
            "--map-root-user",
            "--pid",
            "--fork",
            "--kill-child",
        ],
    ];
    let works = |way: &&&[&str]| {
        let done = Command::new(way[0]).args(&way[1..]).arg("true").output();
        done.is_ok_and(|done| done.status.success())
    };
    let way = ways.iter().find(works).copied();
    if way.is_none() {
        not_run(test, "`unshare --pid` fails, also with `--user`");
    }
    way
}

fn publish_to_strangers(socket: &Path) {
    let policy = |peer: &Peer, name: &str, _: &Buffer| {
        say(&peer.to_string());
        match (name, peer.pid) {
            ("for all", _) | ("for the known", Some(_)) => Grant::ReadWrite,
            _ => Grant::Nothing,
        }
    };
    let mut publisher = Publisher::bind(socket).unwrap().with_policy(policy);
    publisher.publish("for the known", memory()).unwrap();
    publisher.publish("for all", memory()).unwrap();
    publisher.serve_for(LONG).unwrap();
}

#[test]
fn a_subscriber_of_another_pid_namespace_is_served_as_the_policy_says() {
    let test = "a_subscriber_of_another_pid_namespace_is_served_as_the_policy_says";
    let Some(prefix) = new_pid_namespace(test) else {
        return;
    };
    let directory = Directory::new();
    let socket = directory.socket();
    let mut publisher = start(prefix, "publish to strangers", &socket, Stdio::null());
    for _ in 0..2 {
        // A client that disconnects at once disturbs nobody.
        drop(connect(&socket));
        let subscriber = connect(&socket);
        put(&subscriber.buffer_within("for all", LONG).unwrap(), 1);
        assert_eq!(subscriber.names(), ["for all"]);
    }
    let words = publisher.said().next().unwrap();
    assert!(words.contains("in another PID namespace"), "{words}");
}

/// Sets the limit so that no further descriptor can be opened. Returns the previous limit.
fn exhaust() -> Rlimit {
    let before = getrlimit(Resource::Nofile);
    let next = rustix::io::dup(std::io::stdout()).unwrap().as_raw_fd();
    let current = Some(next as u64);
    setrlimit(Resource::Nofile, Rlimit { current, ..before }).unwrap();
    before
}

fn publish_in_want(socket: &Path) {
    let mut publisher = Publisher::bind(socket).unwrap();
    publisher.publish("b", memory()).unwrap();
    let before = exhaust();
    say("exhausted");
    let begun = Instant::now();
    let mut events = Vec::new();
    while begun.elapsed() < Duration::from_millis(500) || events.is_empty() {
        events.extend(publisher.next_event(Some(SHORT)).unwrap());
    }
    let [Event::NotAccepted { why }] = &events[..] else {
        panic!("{events:?}");
    };
    assert!(why.is_shortage(), "{why}");
    setrlimit(Resource::Nofile, before).unwrap();
    let joined = publisher.next_event(Some(LONG)).unwrap();
    assert!(matches!(joined, Some(Event::Joined { .. })), "{joined:?}");
    let left = publisher.next_event(Some(LONG)).unwrap();
    assert!(matches!(left, Some(Event::Left { .. })), "{left:?}");
}

#[test]
fn a_publisher_that_ran_out_of_descriptors_listens_again_when_it_has_some() {
    let directory = Directory::new();
    let socket = directory.socket();
    let mut publisher = start(&[], "publish in want", &socket, Stdio::null());
    let mut said = publisher.said();
    assert_eq!(said.next().unwrap(), "exhausted");
    let subscriber = connect(&socket);
    put(&subscriber.buffer_within("b", LONG).unwrap(), 1);
    drop(subscriber);
    publisher.succeeds();
}

/// The kernel delivers a message without the descriptors for which the process has no room.
fn receive_in_want() {
    let (ours, theirs) = Channel::pair().unwrap();
    let buffer = memfd::export("b", SIZE).unwrap();
    ours.send_buffer(&buffer.whole()).unwrap();
    let before = exhaust();
    let error = theirs.receive_buffer_within(LONG).unwrap_err();
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
    ours.send_buffer(&buffer.whole()).unwrap();
    assert_eq!(theirs.receive_buffer_within(LONG).unwrap().len(), SIZE);
}

#[test]
fn descriptors_that_do_not_arrive_are_told_with_the_limit_that_was_reached() {
    let directory = Directory::new();
    let socket = directory.socket();
    start(&[], "receive in want", &socket, Stdio::null()).succeeds();
}

/// The hello message of a subscriber.
fn greeting() -> Vec<u8> {
    let (ours, theirs) = Channel::pair().unwrap();
    let _subscriber = Subscriber::new(theirs).unwrap();
    ours.receive_message(4096).unwrap().0
}

/// The kernel limits the descriptors in flight of a user, except for processes that may change
/// limits.
fn publish_to_the_silent() {
    use rustix::thread::CapabilitySet;
    // The capabilities of this thread, which sends the messages.
    let mut own = rustix::thread::capabilities(None).unwrap();
    own.effective -= CapabilitySet::SYS_RESOURCE | CapabilitySet::SYS_ADMIN;
    rustix::thread::set_capabilities(None, own).unwrap();
    let before = getrlimit(Resource::Nofile);
    let current = Some(1024);
    setrlimit(Resource::Nofile, Rlimit { current, ..before }).unwrap();

    let mut publisher = Publisher::new().unwrap();
    let greeting = greeting();
    let add = |publisher: &mut Publisher| {
        let (ours, theirs) = Channel::pair().unwrap();
        publisher.add(ours).unwrap();
        theirs
    };
    let silent: Vec<Channel> = (0..20).map(|_| add(&mut publisher)).collect();
    for silent in &silent {
        silent.send_message(&greeting, &[]).unwrap();
    }
    let memory = memfd::export("b", 4096).unwrap();
    let names: Vec<String> = (0..800).map(|n| format!("buffer {n}")).collect();
    let all = names.iter().map(|name| {
        let memory = memory.clone();
        let backing = Copied::new(move |_| Ok(memory.clone())).unwrap();
        (name.as_str(), Box::new(backing) as Box<dyn Backing>)
    });
    publisher.publish_all(all).unwrap();
    publisher.serve_for(SHORT).unwrap();
    let subscriber = Subscriber::new(add(&mut publisher)).unwrap();
    let deadline = Deadline::after(LONG);
    while subscriber.names().len() < names.len() {
        assert!(
            !deadline.is_over(),
            "{} of {} offers arrived",
            subscriber.names().len(),
            names.len()
        );
        publisher.serve_for(Duration::from_millis(1)).unwrap();
    }
}

#[test]
fn subscribers_that_never_read_leave_descriptors_for_those_that_do() {
    let directory = Directory::new();
    let socket = directory.socket();
    let mut publisher = start(&[], "publish to the silent", &socket, Stdio::null());
    publisher.succeeds();
}

/// Forks. The child runs `work`, reports its result, and exits without dropping anything else.
/// Returns the child's process id in the parent.
fn fork(work: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the C library keeps its memory consistent across fork, and the child ends by
    // `_exit`.
    match unsafe { libc::fork() } {
        0 => {
            let done = catch_unwind(AssertUnwindSafe(work));
            let why = done
                .as_ref()
                .err()
                .map(|why| match why.downcast_ref::<String>() {
                    Some(why) => why.replace('\n', " "),
                    None => "a panic".into(),
                });
            say(why.as_deref().unwrap_or("the child is fine"));
            // SAFETY: the call ends the process and has no other effect.
            unsafe { libc::_exit(i32::from(why.is_some())) }
        }
        child => child,
    }
}

fn wait(child: libc::pid_t) {
    let mut status = 0;
    // SAFETY: `status` is valid during the call.
    let ended = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!((ended, status), (child, 0), "the child failed");
}

fn of_stdin() -> Subscriber {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    Subscriber::new(Channel::from_fd(socket).unwrap()).unwrap()
}

fn is_inherited<T: std::fmt::Debug>(result: Result<T, ShareError>) {
    assert!(
        matches!(result, Err(ShareError::Inherited { .. })),
        "{result:?}"
    );
}

fn subscribe_and_leave_a_child() {
    let subscriber = of_stdin();
    let lease = subscriber.buffer("b").unwrap();
    let mut mapping = lease.whole().map(Access::ReadWrite).unwrap();
    mapping.write_bytes(&7u64.to_ne_bytes()).unwrap();
    let parent = std::process::id();
    fork(|| {
        // The parent ends, and the publisher does not notice.
        while std::os::unix::process::parent_id() == parent {
            std::thread::sleep(Duration::from_millis(1));
        }
        let begun = Instant::now();
        is_inherited(subscriber.buffer("b"));
        is_inherited(subscriber.buffer_within("b", LONG));
        assert!(subscriber.names().is_empty());
        is_inherited(Err::<(), _>(subscriber.ended().unwrap()));
        assert!(lease.wanted_back().is_some());
        assert!(lease.wait_until_wanted(LONG).is_some());
        let refused = lease.whole().map(Access::Read).unwrap_err();
        assert!(
            matches!(refused, BufferError::Inherited { .. }),
            "{refused}"
        );
        let refused = mapping.read_bytes(&mut [0; 8]).unwrap_err();
        assert!(
            matches!(refused, BufferError::Inherited { .. }),
            "{refused}"
        );
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.contains("generation 1"), "{maps}");
        // Another mapping may be at the old address, and must stay.
        drop(mapping);
        drop(lease);
        drop(subscriber);
        assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
    });
    // SAFETY: the call ends the process, as a crash would, and has no other effect.
    unsafe { libc::_exit(0) }
}

/// Makes a publisher with one subscriber in a process with this role.
fn publish_to(role: &str) -> (Publisher, peerbuf::share::BufferId, Process) {
    let (ours, theirs) = Channel::pair().unwrap();
    let mut publisher = Publisher::new().unwrap();
    publisher.add(ours).unwrap();
    let id = publisher.publish("b", memory()).unwrap();
    let theirs = Stdio::from(OwnedFd::from(theirs));
    let process = start(&[], role, Path::new(""), theirs);
    (publisher, id, process)
}

/// Serves until the process or its child prints a line.
fn hear<S>(publisher: &mut Publisher, mut said: S) -> (String, S)
where
    S: Iterator<Item = String> + Send + 'static,
{
    let heard = std::thread::spawn(move || (said.next().expect("they said nothing"), said));
    let deadline = Deadline::after(LONG);
    while !heard.is_finished() {
        assert!(!deadline.is_over(), "they said nothing");
        publisher.serve_for(Duration::from_millis(1)).unwrap();
    }
    heard.join().unwrap()
}

#[test]
fn a_child_of_a_subscriber_that_is_gone_gets_errors_and_no_old_bytes() {
    let (mut publisher, id, mut process) = publish_to("subscribe and leave a child");
    let said = process.said();
    assert_eq!(hear(&mut publisher, said).0, "the child is fine");
    let moved = publisher.migrate(id, SHORT).unwrap();
    assert_eq!(moved.generation, 2);
    assert_eq!(get(publisher.buffer(id).unwrap()), 7);
}

fn subscribe_beside_a_child() {
    let subscriber = of_stdin();
    let lease = subscriber.buffer("b").unwrap();
    let mapping = lease.whole().map(Access::ReadWrite).unwrap();
    // The child drops everything.
    let mut all = Some((mapping, lease, subscriber));
    let child = fork(|| drop(all.take()));
    wait(child);
    let (mut mapping, lease, subscriber) = all.take().unwrap();
    say("let go");
    assert!(lease.wait_until_wanted(LONG).is_some());
    std::thread::sleep(SHORT);
    mapping.write_bytes(&9u64.to_ne_bytes()).unwrap();
    drop((lease, mapping));
    let lease = subscriber.buffer_within("b", LONG).unwrap();
    assert_eq!((lease.generation(), get(&lease)), (2, 9));
}

#[test]
fn a_child_that_lets_go_gives_nothing_back_for_its_parent() {
    let (mut publisher, id, mut process) = publish_to("subscribe beside a child");
    let mut said = process.said();
    for words in ["the child is fine", "let go"] {
        let heard;
        (heard, said) = hear(&mut publisher, said);
        assert_eq!(heard, words);
    }
    publisher.serve_for(SHORT).unwrap();
    assert_eq!(publisher.holders(id), 1);
    let moved = publisher.migrate(id, LONG).unwrap();
    assert_eq!((moved.released, moved.lost.len()), (1, 0), "{moved:?}");
    assert!(moved.drain >= SHORT, "{moved:?}");
    let deadline = Deadline::after(LONG);
    while process.0.try_wait().unwrap().is_none() {
        assert!(!deadline.is_over(), "it never ended");
        publisher.serve_for(Duration::from_millis(1)).unwrap();
    }
    process.succeeds();
}

fn publish_beside_a_child(socket: &Path) {
    let mut publisher = Publisher::bind(socket).unwrap();
    let id = publisher.publish("b", memory()).unwrap();
    let listening = socket.with_extension("other");
    let listener = Listener::bind(&listening).unwrap();
    let mut all = Some((publisher, listener));
    let child = fork(|| {
        let (mut publisher, listener) = all.take().unwrap();
        is_inherited(publisher.next_event(Some(LONG)));
        is_inherited(publisher.serve_once());
        is_inherited(publisher.publish("c", memory()));
        is_inherited(publisher.migrate(id, LONG));
        is_inherited(publisher.migrate_all(&[id], LONG).pop().unwrap());
        is_inherited(publisher.withdraw(id, LONG));
        is_inherited(publisher.add(Channel::pair().unwrap().0));
        drop((publisher, listener));
    });
    wait(child);
    assert!(socket.exists() && listening.exists());
    let (mut publisher, listener) = all.take().unwrap();
    let subscriber = Subscriber::connect(socket).unwrap();
    let deadline = Deadline::after(LONG);
    while publisher.accepted(id) == 0 {
        assert!(!deadline.is_over(), "nobody was served");
        publisher.serve_for(Duration::from_millis(1)).unwrap();
    }
    drop((publisher, listener, subscriber));
    assert!(!socket.exists() && !listening.exists());
}

#[test]
fn a_child_of_a_publisher_gets_errors_and_takes_nothing_from_its_parent() {
    let directory = Directory::new();
    let socket = directory.socket();
    start(&[], "publish beside a child", &socket, Stdio::null()).succeeds();
}

fn publish_with_async_beside_a_child() {
    use peerbuf::share::tokio::{Publisher, Subscriber};
    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.build().unwrap()
    }
    let (ours, theirs) = Channel::pair().unwrap();
    let (publisher, subscriber, id) = runtime().block_on(async {
        let blocking = peerbuf::share::Publisher::new().unwrap();
        let publisher = Publisher::serve(blocking).unwrap();
        publisher.add(ours).await.unwrap();
        let id = publisher.publish("b", memory()).await.unwrap();
        (publisher, Subscriber::new(theirs).unwrap(), id)
    });
    let lease = runtime().block_on(subscriber.buffer("b")).unwrap();
    let mut all = Some((publisher, subscriber, lease));
    let child = fork(|| {
        let (publisher, subscriber, lease) = all.take().unwrap();
        runtime().block_on(async {
            is_inherited(publisher.migrate(id, LONG).await);
            is_inherited(publisher.next_event().await);
            is_inherited(subscriber.buffer("b").await);
            assert!(lease.wanted().await.is_some());
        });
        drop((lease, subscriber, publisher));
    });
    wait(child);
    let (publisher, subscriber, lease) = all.take().unwrap();
    drop(lease);
    runtime().block_on(async {
        let moved = publisher.migrate(id, LONG).await.unwrap();
        assert_eq!((moved.released, moved.lost.len()), (1, 0));
        assert_eq!(subscriber.buffer("b").await.unwrap().generation(), 2);
    });
}

#[test]
fn a_child_of_a_publisher_with_async_gets_errors_and_takes_nothing_from_its_parent() {
    let role = "publish with async beside a child";
    start(&[], role, Path::new(""), Stdio::null()).succeeds();
}
