//! The guarantees of publishing (`peerbuf::share`), with real processes.
//!
//! The other processes run this program again, as the test `other_process`. Standard input is
//! their end of the connection.

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use peerbuf::buffer::{Kind, Provenance};
use peerbuf::error::{BufferError, ExportError, ShareError};
use peerbuf::export::memfd;
use peerbuf::share::{
    Backing, BufferId, Channel, Copied, CutOff, Event, Grant, Lease, Listener, Peer, Publisher,
    Subscriber,
};
use peerbuf::{Access, Buffer};
use rustix::process::{Pid, Signal};

const SIZE: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_millis(1500);
/// Time limit that must not be reached.
const LONG: Duration = Duration::from_secs(20);

fn put(buffer: &Buffer, at: u64, word: u64) {
    let range = buffer.range(at, 8).unwrap();
    range.write_bytes(&word.to_ne_bytes()).unwrap();
}

fn get(buffer: &Buffer, at: u64) -> u64 {
    let mut word = [0; 8];
    buffer.range(at, 8).unwrap().read_bytes(&mut word).unwrap();
    u64::from_ne_bytes(word)
}

fn all(buffer: &Buffer) -> Vec<u8> {
    buffer.whole().to_vec().unwrap()
}

/// A process that is killed at the end of the test.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a process with this role, connected to the publisher.
fn start(publisher: &mut Publisher, role: &str) -> Process {
    let (ours, theirs) = Channel::pair().unwrap();
    publisher.add(ours).unwrap();
    let exe = std::env::current_exe().unwrap();
    let child = Command::new(exe)
        .args(["other_process", "--exact", "--ignored", "--nocapture"])
        .env("PEERBUF_TEST_ROLE", role)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Process(child)
}

/// Serves until `done` returns true.
fn serve(publisher: &mut Publisher, mut done: impl FnMut(&mut Publisher) -> bool) {
    let begun = Instant::now();
    while !done(publisher) {
        assert!(begun.elapsed() < LONG, "it never happened");
        publisher.serve_for(Duration::from_millis(1)).unwrap();
    }
}

fn events(publisher: &mut Publisher) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = publisher.next_event(Some(Duration::ZERO)).unwrap() {
        events.push(event);
    }
    events
}

/// The memory of each generation, which stays reachable after the generation ended.
type Old = Arc<Mutex<Vec<Buffer>>>;

/// A backing whose generations stay reachable through separate descriptors.
fn watched() -> (impl Backing + 'static, Old) {
    let old = Old::default();
    let kept = Arc::clone(&old);
    let backing = Copied::new(move |order| {
        let name = format!("generation {}", order.generation);
        let buffer = memfd::export(&name, SIZE)?;
        let memory = buffer.host_memory().unwrap().try_clone_to_owned().unwrap();
        let provenance = Provenance {
            name,
            ..buffer.provenance().clone()
        };
        assert_eq!(provenance.kind, Kind::Memfd);
        let again = Buffer::from_host_memory(memory, None, provenance)?;
        kept.lock().unwrap().push(again);
        Ok(buffer)
    });
    (backing.unwrap(), old)
}

/// The words that the processes write: each counts its writes at its own place, with the
/// generation of the last write beside the count.
const STOP: u64 = 0;
fn place(writer: u64) -> u64 {
    4096 * (1 + writer)
}

/// The other process, in one of its roles. The tests start it.
#[test]
#[ignore = "the other process of the tests in this file, which start it"]
fn other_process() {
    let role = std::env::var("PEERBUF_TEST_ROLE").expect("a role");
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let subscriber = Subscriber::new(Channel::from_fd(socket).unwrap()).unwrap();
    let (role, number) = role.split_once(' ').unwrap();
    let at = place(number.parse().unwrap());
    match role {
        // Writes as fast as possible, and checks that none of its writes is lost.
        "write" => {
            let mut count = 0;
            loop {
                let lease = subscriber.buffer("b").unwrap();
                assert_eq!(get(&lease, at), count, "lost in {lease}");
                while lease.wanted_back().is_none() {
                    count += 1;
                    put(&lease, at, count);
                    put(&lease, at + 8, lease.generation());
                    if get(&lease, STOP) == 1 {
                        return;
                    }
                }
            }
        }
        // Writes and never returns the buffer.
        "keep" => {
            let lease = subscriber.buffer("b").unwrap();
            let mut mapping = lease.range(at, 8).unwrap().map(Access::ReadWrite).unwrap();
            for count in 1u64.. {
                let mut cpu = mapping.begin_cpu_access(Access::Write).unwrap();
                cpu.write_at(0, &count.to_ne_bytes()).unwrap();
            }
        }
        other => panic!("unknown role {other}"),
    }
}

/// Waits until this many processes write.
fn wait_for_writers(publisher: &mut Publisher, id: BufferId, writers: u64) {
    serve(publisher, |publisher| {
        let buffer = publisher.buffer(id).unwrap();
        (0..writers).all(|writer| get(buffer, place(writer)) > 0)
    });
}

fn stop(publisher: &mut Publisher, id: BufferId, mut processes: Vec<Process>) {
    put(publisher.buffer(id).unwrap(), STOP, 1);
    for process in &mut processes {
        let mut status = None;
        serve(publisher, |_| {
            status = process.0.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success(), "a subscriber lost bytes");
    }
}

#[test]
fn a_move_ends_all_use_of_the_old_generation_and_keeps_every_byte() {
    let (backing, old) = watched();
    let mut publisher = Publisher::new().unwrap();
    let id = publisher.publish("b", backing).unwrap();
    let processes = vec![
        start(&mut publisher, "write 0"),
        start(&mut publisher, "write 1"),
    ];
    wait_for_writers(&mut publisher, id, 2);
    for generation in 2..40 {
        let moved = publisher.migrate(id, LONG).unwrap();
        assert_eq!(moved.generation, generation);
        assert_eq!((moved.released, moved.lost.len()), (2, 0), "{moved:?}");
        let last = old.lock().unwrap()[generation as usize - 2].clone();
        let given_up = all(&last);
        // Each process writes to each generation, so that none of the moves is idle.
        for writer in 0..2 {
            assert_eq!(get(&last, place(writer) + 8), generation - 1);
        }
        serve(&mut publisher, |publisher| {
            let now = publisher.buffer(id).unwrap();
            (0..2).all(|writer| get(now, place(writer) + 8) == generation)
        });
        assert_eq!(
            all(&last),
            given_up,
            "somebody wrote to generation {}",
            generation - 1
        );
    }
    stop(&mut publisher, id, processes);
    let left = events(&mut publisher);
    assert!(
        left.iter()
            .all(|event| matches!(event, Event::Joined { .. } | Event::Left { .. })),
        "{left:?}"
    );
}

/// One subscriber misbehaves beside two that do not. The publisher cuts this subscriber off in
/// time, and its writes do not reach the next generation.
fn is_cut_off(misbehave: impl FnOnce(&mut Publisher, &Process) -> bool) {
    let (backing, old) = watched();
    let mut publisher = Publisher::new().unwrap();
    let id = publisher.publish("b", backing).unwrap();
    let processes = vec![
        start(&mut publisher, "write 0"),
        start(&mut publisher, "write 1"),
    ];
    let bad = start(&mut publisher, "keep 2");
    wait_for_writers(&mut publisher, id, 3);
    events(&mut publisher);
    let has_memory = misbehave(&mut publisher, &bad);

    let begun = Instant::now();
    let moved = publisher.migrate(id, LIMIT).unwrap();
    let took = begun.elapsed();
    assert!(took < LONG, "{took:?}");
    assert_eq!(moved.released, 2, "{moved:?}");
    assert!(moved.isolated);
    assert!(!publisher.is_tainted(id));

    // The old memory is separate: the subscriber continues to write there, and nowhere else.
    bad.signal(Signal::CONT);
    let first = old.lock().unwrap()[0].clone();
    let at = place(2);
    let now = get(publisher.buffer(id).unwrap(), at);
    if has_memory {
        let before = get(&first, at);
        serve(&mut publisher, |_| get(&first, at) > before);
    }
    assert_eq!(get(publisher.buffer(id).unwrap(), at), now);
    // The others do not notice, in this move or the next.
    for _ in 0..3 {
        let moved = publisher.migrate(id, LIMIT).unwrap();
        assert_eq!((moved.released, moved.lost.len()), (2, 0), "{moved:?}");
        wait_for_writers(&mut publisher, id, 2);
    }
    stop(&mut publisher, id, processes);
}

fn cut_offs(publisher: &mut Publisher) -> Vec<CutOff> {
    let why = |event| match event {
        Event::CutOff { why, .. } => Some(why),
        _ => None,
    };
    events(publisher).into_iter().filter_map(why).collect()
}

#[test]
fn a_subscriber_that_never_gives_back_is_cut_off_in_time() {
    is_cut_off(|_, _| true);
}

#[test]
fn a_subscriber_that_is_stopped_is_cut_off_in_time_and_harmless_when_it_goes_on() {
    is_cut_off(|_, bad| {
        bad.signal(Signal::STOP);
        true
    });
}

#[test]
fn a_subscriber_that_is_killed_delays_nobody() {
    is_cut_off(|publisher, bad| {
        bad.signal(Signal::KILL);
        let mut left = Vec::new();
        serve(publisher, |publisher| {
            left.extend(events(publisher));
            !left.is_empty()
        });
        assert!(
            matches!(&left[..], [Event::Left { held, .. }] if held.len() == 1),
            "{left:?}"
        );
        false
    });
}

/// The messages that wait on a connection that nobody else reads, each as the numbers of its
/// type and of its records.
fn waiting(channel: &Channel) -> Vec<[u32; 2]> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut found = Vec::new();
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    while poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&at_once)) == Ok(1) {
        let (message, _) = channel.receive_message(100_000).unwrap();
        let word = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap());
        found.push([word(12), word(20)]);
    }
    found
}

/// The acknowledgement of this many offers, made from the subscriber's hello.
fn accepted(hello: &[u8], offers: u64) -> Vec<u8> {
    let mut message = hello.to_vec();
    message[12] = 7;
    message[20] = 1;
    for word in [offers, 0, 0] {
        message.extend(word.to_ne_bytes());
    }
    message[16] = message.len() as u8;
    message
}

#[test]
fn a_subscriber_is_asked_what_arrived_also_when_what_was_to_follow_is_gone() {
    const LAST_OFFER: u32 = 9;
    let hello = {
        let (ours, theirs) = Channel::pair().unwrap();
        let _subscriber = Subscriber::new(theirs).unwrap();
        ours.receive_message(4096).unwrap().0
    };
    let memory = memfd::export("b", 4096).unwrap();
    let mut publisher = Publisher::new().unwrap().with_batches_of(1);
    let first = publisher.publish("first", watched().0).unwrap();
    let names: Vec<String> = (0..600).map(|n| format!("buffer {n}")).collect();
    let all = names.iter().map(|name| {
        let memory = memory.clone();
        let backing = Copied::new(move |_| Ok(memory.clone())).unwrap();
        (name.as_str(), Box::new(backing) as Box<dyn Backing>)
    });
    let (ours, theirs) = Channel::pair().unwrap();
    publisher.add(ours).unwrap();
    theirs.send_message(&hello, &[]).unwrap();
    // The subscriber reads once, and has a whole window from then on.
    serve(&mut publisher, |publisher| publisher.holders(first) == 1);
    assert_eq!(waiting(&theirs), [[LAST_OFFER, 1]]);
    theirs.send_message(&accepted(&hello, 1), &[]).unwrap();
    serve(&mut publisher, |publisher| publisher.accepted(first) == 1);
    let ids = publisher.publish_all(all).unwrap();
    // Fills the subscriber's socket, because it does not read.
    publisher.serve_for(Duration::from_millis(50)).unwrap();
    let sent = publisher.unaccepted();
    assert!(sent > 0 && sent < ids.len(), "{sent} of {}", ids.len());
    for id in ids {
        if publisher.holders(id) == 0 {
            publisher.withdraw(id, LIMIT).unwrap();
        }
    }
    let mut messages = waiting(&theirs);
    assert_eq!(messages.len(), sent);
    publisher.serve_for(Duration::from_millis(50)).unwrap();
    let after = waiting(&theirs);
    assert!(after.is_empty() || after == [[LAST_OFFER, 0]], "{after:?}");
    messages.extend(after);
    assert_eq!(messages.last().unwrap()[0], LAST_OFFER);
}

#[test]
fn a_subscriber_that_sends_rubbish_is_cut_off_at_once() {
    let (backing, _old) = watched();
    let mut publisher = Publisher::new().unwrap();
    let id = publisher.publish("b", backing).unwrap();
    let processes = vec![
        start(&mut publisher, "write 0"),
        start(&mut publisher, "write 1"),
    ];
    wait_for_writers(&mut publisher, id, 2);
    // A message of each type from a real subscriber and a real publisher, to be sent back.
    let hello = {
        let (ours, theirs) = Channel::pair().unwrap();
        let _subscriber = Subscriber::new(theirs).unwrap();
        ours.receive_message(4096).unwrap().0
    };
    let offer = |channel: &Channel| channel.receive_message(100_000).unwrap().0;
    type Rubbish<'r> = &'r dyn Fn(&Channel);
    let rubbish: [(&str, Rubbish<'_>); 7] = [
        ("magic", &|channel| {
            channel.send_message(b"rubbish", &[]).unwrap()
        }),
        ("longer", &|channel| {
            channel.send_message(&[7; 100_000], &[]).unwrap()
        }),
        ("must be the first", &|channel| {
            channel.send_message(&hello, &[]).unwrap()
        }),
        ("does not send", &|channel| {
            let offer = offer(channel);
            channel.send_message(&offer, &[]).unwrap();
        }),
        ("descriptors", &|channel| {
            channel
                .send_message(&hello, &[std::io::stdin().as_fd()])
                .unwrap();
        }),
        ("version is 9", &|channel| {
            let mut message = hello.clone();
            message[8] = 9;
            channel.send_message(&message, &[]).unwrap();
        }),
        ("not offered", &|channel| {
            channel.send_message(&accepted(&hello, 77), &[]).unwrap();
        }),
    ];
    for (words, send) in rubbish {
        let (ours, theirs) = Channel::pair().unwrap();
        publisher.add(ours).unwrap();
        theirs.send_message(&hello, &[]).unwrap();
        let holders = publisher.holders(id);
        serve(&mut publisher, |publisher| publisher.holders(id) > holders);
        events(&mut publisher);
        send(&theirs);
        let mut cut = Vec::new();
        serve(&mut publisher, |publisher| {
            cut.extend(cut_offs(publisher));
            !cut.is_empty()
        });
        let [CutOff::Rubbish(why)] = &cut[..] else {
            panic!("{cut:?}")
        };
        assert!(
            why.to_string().contains(words),
            "{why} does not say {words}"
        );
        assert!(publisher.is_tainted(id), "it had the buffer");
        // The publisher does not wait for the cut-off subscriber.
        let moved = publisher.migrate(id, LONG).unwrap();
        assert_eq!((moved.released, moved.isolated), (2, true), "after {words}");
        wait_for_writers(&mut publisher, id, 2);
    }
    stop(&mut publisher, id, processes);
}

#[test]
fn a_subscriber_that_reads_nothing_holds_up_neither_others_nor_new_buffers() {
    let mut publisher = Publisher::new().unwrap();
    let (ours, silent) = Channel::pair().unwrap();
    publisher.add(ours).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    publisher.add(ours).unwrap();
    let subscriber = Subscriber::new(theirs).unwrap();
    silent.send_message(&greeting(), &[]).unwrap();
    serve(&mut publisher, |publisher| {
        publisher.subscribers().count() == 2
    });
    let one = memfd::export("one", 4096).unwrap();
    let mut ids = Vec::new();
    for number in 0..2000 {
        let buffer = one.clone();
        let backing = Copied::new(move |_| Ok(buffer.clone())).unwrap();
        ids.push(publisher.publish(&format!("b{number}"), backing).unwrap());
    }
    serve(&mut publisher, |publisher| {
        // The silent subscriber has all descriptors in flight that it may have, and no more.
        ids.iter()
            .filter(|id| publisher.accepted(**id) == 1)
            .count()
            == ids.len()
    });
    let waiting = ids.iter().filter(|id| publisher.holders(**id) == 2).count();
    assert!((1..600).contains(&waiting), "{waiting}");
    assert_eq!(subscriber.names().len(), 2000);
    assert!(subscriber.buffer("b1999").is_ok());
}

fn greeting() -> Vec<u8> {
    let (ours, theirs) = Channel::pair().unwrap();
    let _subscriber = Subscriber::new(theirs).unwrap();
    ours.receive_message(4096).unwrap().0
}

#[test]
fn a_publisher_that_is_killed_leaves_a_clear_error_and_valid_memory() {
    // The publisher is the other process here: this program runs again, as the test
    // `publishing_process`.
    let path = std::env::temp_dir().join(format!("peerbuf-orphan-{}", std::process::id()));
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["publishing_process", "--exact", "--ignored", "--nocapture"])
        .env("PEERBUF_TEST_SOCKET", &path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let process = Process(child);
    let begun = Instant::now();
    let subscriber = loop {
        match Subscriber::connect(&path) {
            Ok(subscriber) => break subscriber,
            Err(error) => assert!(begun.elapsed() < LONG, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let lease = subscriber.buffer("b").unwrap();
    put(&lease, 0, 5);
    process.signal(Signal::KILL);
    let waiting = Instant::now();
    assert_eq!(lease.wait_until_wanted(LONG), None);
    assert_eq!(subscriber.buffer("b").unwrap_err(), ShareError::PeerGone);
    assert!(waiting.elapsed() < LONG / 2);
    assert_eq!(subscriber.ended(), Some(ShareError::PeerGone));
    drop(process);
    put(&lease, 8, 6);
    assert_eq!((get(&lease, 0), get(&lease, 8)), (5, 6));
    // The socket file stays behind, and the next publisher replaces it.
    drop(Listener::bind(&path).unwrap());
}

#[test]
#[ignore = "the other process of a test in this file, which starts it"]
fn publishing_process() {
    let path = std::env::var("PEERBUF_TEST_SOCKET").expect("a socket");
    let mut publisher = Publisher::bind(path).unwrap();
    publisher.publish("b", watched().0).unwrap();
    publisher.serve_for(LONG).unwrap();
}

/// A publisher with one subscriber in this process.
fn pair() -> (Publisher, Subscriber) {
    let (ours, theirs) = Channel::pair().unwrap();
    let mut publisher = Publisher::new().unwrap();
    publisher.add(ours).unwrap();
    (publisher, Subscriber::new(theirs).unwrap())
}

fn lease(publisher: &mut Publisher, subscriber: &Subscriber, name: &str) -> Lease {
    let mut found = None;
    serve(publisher, |_| {
        match subscriber.buffer_within(name, Duration::ZERO) {
            Ok(lease) => found = Some(lease),
            Err(ShareError::TimedOut { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn a_buffer_is_given_back_with_its_last_mapping_and_not_before() {
    let (mut publisher, subscriber) = pair();
    let id = publisher.publish("b", watched().0).unwrap();
    let first = lease(&mut publisher, &subscriber, "b");
    let mut mapping = first.range(0, 8).unwrap().map(Access::ReadWrite).unwrap();
    let second = first.clone();
    drop(first);
    let thread = std::thread::spawn(move || {
        assert!(second.wait_until_wanted(LONG).is_some());
        drop(second);
        std::thread::sleep(Duration::from_millis(100));
        let mut cpu = mapping.begin_cpu_access(Access::Write).unwrap();
        cpu.write_at(0, &9u64.to_ne_bytes()).unwrap();
    });
    let moved = publisher.migrate(id, LONG).unwrap();
    assert_eq!((moved.released, moved.lost.len()), (1, 0));
    assert!(moved.drain >= Duration::from_millis(100), "{moved:?}");
    assert_eq!(get(publisher.buffer(id).unwrap(), 0), 9);
    thread.join().unwrap();
}

#[test]
fn a_lent_buffer_is_not_the_borrowers_to_hand_over() {
    let (mut publisher, subscriber) = pair();
    let id = publisher.publish("b", watched().0).unwrap();
    let lent = lease(&mut publisher, &subscriber, "b");
    let (ours, theirs) = Channel::pair().unwrap();
    for range in [lent.whole(), lent.range(8, 8).unwrap()] {
        let refused = ours.send_buffer(&range).unwrap_err();
        assert!(matches!(refused, ShareError::Lent { .. }), "{refused}");
    }
    // The owner may send the buffer. The refused calls have sent nothing.
    let owned = publisher.buffer(id).unwrap().range(16, 8).unwrap();
    ours.send_buffer(&owned).unwrap();
    assert_eq!(theirs.receive_buffer_within(LONG).unwrap().offset(), 16);
}

#[test]
fn a_publisher_that_uses_a_generation_itself_cannot_move_it() {
    let mut publisher = Publisher::new().unwrap();
    let id = publisher.publish("b", watched().0).unwrap();
    let own = publisher.buffer(id).unwrap().clone();
    let refused = publisher.migrate(id, LIMIT).unwrap_err();
    assert_eq!(refused, ShareError::StillInUse { name: "b".into() });
    drop(own);
    assert_eq!(publisher.migrate(id, LIMIT).unwrap().generation, 2);
}

#[test]
fn a_move_that_fails_offers_the_old_memory_again() {
    let backing = Copied::new(move |order| {
        let size = if order.generation == 2 {
            SIZE / 2
        } else {
            SIZE
        };
        memfd::export("b", size)
    });
    let (mut publisher, subscriber) = pair();
    let id = publisher.publish("b", backing.unwrap()).unwrap();
    put(&lease(&mut publisher, &subscriber, "b"), 0, 3);
    let refused = publisher.migrate(id, LONG).unwrap_err();
    assert!(matches!(refused, ShareError::Backing { .. }), "{refused}");
    let again = lease(&mut publisher, &subscriber, "b");
    assert_eq!((again.generation(), get(&again, 0)), (2, 3));
    drop(again);
    publisher.migrate(id, LONG).unwrap();
    let again = lease(&mut publisher, &subscriber, "b");
    assert_eq!((again.generation(), get(&again, 0)), (3, 3));
}

#[test]
fn after_a_cut_off_a_move_that_fails_offers_nothing() {
    let fails = Arc::new(Mutex::new(true));
    let switch = Arc::clone(&fails);
    let backing = Copied::new(move |order| {
        let generation = order.generation;
        if generation > 1 && *switch.lock().unwrap() {
            return Err(ExportError::Unsuitable {
                what: "the day",
                value: generation,
                must: "another".into(),
            });
        }
        memfd::export("b", SIZE)
    });
    let (mut publisher, bad) = pair();
    let id = publisher.publish("b", backing.unwrap()).unwrap();
    let kept = lease(&mut publisher, &bad, "b");
    assert!(publisher.migrate(id, Duration::ZERO).is_err());
    let (ours, theirs) = Channel::pair().unwrap();
    publisher.add(ours).unwrap();
    let good = Subscriber::new(theirs).unwrap();
    publisher.serve_for(Duration::from_millis(50)).unwrap();
    let refused = good.buffer_within("b", Duration::ZERO).unwrap_err();
    assert!(matches!(refused, ShareError::TimedOut { .. }), "{refused}");
    assert_eq!(
        bad.buffer("b").unwrap_err(),
        ShareError::CutOff {
            why: "it did not return a buffer in time"
        }
    );
    put(&kept, 0, 8);
    *fails.lock().unwrap() = false;
    assert!(publisher.migrate(id, LONG).unwrap().isolated);
    put(&kept, 0, 9);
    assert_eq!(get(&lease(&mut publisher, &good, "b"), 0), 8);
}

#[test]
fn the_policy_decides_who_gets_what_and_read_only_is_enforced() {
    let (mut publisher, subscriber) = pair();
    publisher = publisher.with_policy(|peer: &Peer, name: &str, _: &Buffer| {
        assert_eq!(peer.pid, Some(std::process::id() as i32));
        match name {
            "open" => Grant::ReadWrite,
            "shown" => Grant::ReadOnly,
            _ => Grant::Nothing,
        }
    });
    for name in ["open", "shown", "secret"] {
        publisher.publish(name, watched().0).unwrap();
    }
    let open = lease(&mut publisher, &subscriber, "open");
    assert!(open.is_writable());
    let shown = lease(&mut publisher, &subscriber, "shown");
    assert!(!shown.is_writable());
    let refused = shown.whole().map(Access::ReadWrite).unwrap_err();
    assert!(matches!(refused, BufferError::Access { .. }), "{refused}");
    assert_eq!(get(&shown, 0), 0);
    // Read-only does not rely on the library: the kernel refuses direct writes.
    let memory = shown.host_memory().unwrap();
    assert!(rustix::io::pwrite(memory, &[1], 0).is_err());
    let mode = rustix::fs::fstat(memory).unwrap().st_mode & 0o777;
    assert_eq!(mode, 0o600);
    let mut names = subscriber.names();
    names.sort();
    assert_eq!(names, ["open", "shown"]);
}

#[test]
fn names_are_unique_and_fit() {
    let mut publisher = Publisher::new().unwrap();
    publisher.publish("b", watched().0).unwrap();
    for name in ["b", "", "a\u{1b}", &"x".repeat(65)] {
        let refused = publisher.publish(name, watched().0).unwrap_err();
        assert!(matches!(refused, ShareError::Name { .. }), "{refused}");
    }
    publisher.publish(&"x".repeat(64), watched().0).unwrap();
}

#[test]
fn a_buffer_that_is_withdrawn_is_gone_for_good() {
    let (mut publisher, subscriber) = pair();
    let id = publisher.publish("b", watched().0).unwrap();
    drop(lease(&mut publisher, &subscriber, "b"));
    publisher.withdraw(id, LONG).unwrap();
    assert!(subscriber.names().is_empty());
    assert!(matches!(
        publisher.migrate(id, LIMIT),
        Err(ShareError::Unknown { .. })
    ));
    // The name is free again.
    publisher.publish("b", watched().0).unwrap();
    lease(&mut publisher, &subscriber, "b");
}

#[test]
fn a_subscriber_that_leaves_in_order_taints_nothing() {
    let (mut publisher, subscriber) = pair();
    let id = publisher.publish("b", watched().0).unwrap();
    drop(lease(&mut publisher, &subscriber, "b"));
    drop(subscriber);
    serve(&mut publisher, |publisher| {
        publisher.subscribers().count() == 0
    });
    assert!(!publisher.is_tainted(id));
    assert!(!publisher.migrate(id, LIMIT).unwrap().isolated);
}

#[test]
fn buffers_that_move_together_share_one_time_limit_and_fail_by_themselves() {
    let (mut publisher, subscriber) = pair();
    let mut ids = Vec::new();
    for name in ["a", "b", "c", "d"] {
        ids.push(publisher.publish(name, watched().0).unwrap());
    }
    let leases: Vec<Lease> = ["a", "b", "c"]
        .iter()
        .map(|name| lease(&mut publisher, &subscriber, name))
        .collect();
    let own = publisher.buffer(ids[3]).unwrap().clone();
    let thread = std::thread::spawn(move || {
        for lease in leases {
            assert!(lease.wait_until_wanted(LONG).is_some());
            put(&lease, 0, 4);
        }
    });
    let moved = publisher.migrate_all(&[ids[2], ids[0], ids[3], ids[1], ids[0]], LONG);
    thread.join().unwrap();
    for (result, works) in moved.iter().zip([true, true, false, true, false]) {
        match result {
            Ok(moved) => assert!(works && moved.generation == 2 && moved.released == 1),
            Err(error) => assert!(
                !works && matches!(error, ShareError::StillInUse { .. }),
                "{error}"
            ),
        }
    }
    drop(own);
    for (name, generation) in [("a", 2), ("b", 2), ("c", 2), ("d", 1)] {
        let lease = lease(&mut publisher, &subscriber, name);
        assert_eq!(lease.generation(), generation);
        assert_eq!(get(&lease, 0), if name == "d" { 0 } else { 4 });
    }
}

#[test]
fn who_connects_and_does_not_greet_is_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let limit = Duration::from_millis(50);
    let mut publisher = Publisher::bind(&path).unwrap().with_greeting_limit(limit);
    publisher.publish("b", watched().0).unwrap();
    // An added channel has no such limit.
    let (ours, _theirs) = Channel::pair().unwrap();
    publisher.add(ours).unwrap();
    // A program that expects a hand-over gets an error with the reason.
    let confused = Channel::connect(&path).unwrap();
    let mut cut = Vec::new();
    serve(&mut publisher, |publisher| {
        cut.extend(cut_offs(publisher));
        !cut.is_empty()
    });
    assert_eq!(cut, [CutOff::Silent { limit }]);
    let error = confused.receive_buffer_within(LONG).unwrap_err();
    assert!(matches!(error, ShareError::CutOff { .. }), "{error}");
    assert!(error.to_string().contains("Subscriber::connect"), "{error}");
    // A hello in time counts, even if the publisher reads it late.
    let late = Channel::connect(&path).unwrap();
    publisher.serve_for(Duration::from_millis(5)).unwrap();
    late.send_message(&greeting(), &[]).unwrap();
    std::thread::sleep(2 * limit);
    let mut all = Vec::new();
    serve(&mut publisher, |publisher| {
        all.extend(events(publisher));
        !all.is_empty()
    });
    assert!(matches!(all[..], [Event::Joined { .. }]), "{all:?}");
}

#[test]
fn no_time_limit_is_too_long() {
    let (mut publisher, subscriber) = pair();
    let id = publisher.publish("b", watched().0).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let lease = subscriber.buffer_within("b", Duration::MAX).unwrap();
        tell.send(()).unwrap();
        let limit = lease.wait_until_wanted(Duration::MAX).unwrap() - Instant::now();
        assert!(limit > Duration::from_secs(24 * 3600));
        drop(lease);
        // The second and last lease.
        let lease = subscriber.buffer_within("b", Duration::MAX).unwrap();
        tell.send(()).unwrap();
        assert_eq!(lease.wait_until_wanted(Duration::MAX), None);
    });
    let joined = publisher.next_event(Some(Duration::MAX)).unwrap();
    assert!(matches!(joined, Some(Event::Joined { .. })), "{joined:?}");
    serve(&mut publisher, |publisher| publisher.accepted(id) == 1);
    // The connection has the offer, but the subscriber's program may not have asked for the
    // buffer yet.
    told.recv().unwrap();
    assert_eq!(publisher.migrate(id, Duration::MAX).unwrap().released, 1);
    serve(&mut publisher, |publisher| publisher.accepted(id) == 1);
    told.recv().unwrap();
    drop(publisher);
    thread.join().unwrap();
    let mut publisher = Publisher::new().unwrap();
    let id = publisher.publish("b", watched().0).unwrap();
    publisher.withdraw(id, Duration::MAX).unwrap();
}
