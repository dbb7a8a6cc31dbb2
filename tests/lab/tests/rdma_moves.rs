//! Registrations that end early: by the program, or by the publisher of a lent buffer that moves while cards
//! work on it. On the kernel's soft-RoCE and on the lab's. Runs in the guest.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::wait::WaitStatus;
use peerbuf::Access;
use peerbuf::error::ShareError;
use peerbuf::export::peerbuf::Device;
use peerbuf::export::{memfd, udmabuf};
use peerbuf::share::{Backing, BufferId, Channel, Copied, Movable, Publisher, Subscriber};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::node::Node;
use peerbuf_rdma::{Card, Connection, Follower, Link, Operation, RdmaError, Span, Status};
use rand::{Rng, RngExt};

const LIMIT: Duration = Duration::from_secs(60);
const ALL: Option<Access> = Some(Access::ReadWrite);
const MIB: u64 = 1 << 20;

fn card() -> Card {
    Card::open("rxe0").unwrap()
}

fn connected(card: &Card, depth: u32) -> (Connection, Connection) {
    let ends = [card.endpoint(depth).unwrap(), card.endpoint(depth).unwrap()];
    let [a, b] = [0, 1].map(|n| ends[n].address());
    let [first, second] = ends;
    (first.connect(&b).unwrap(), second.connect(&a).unwrap())
}

fn random(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

fn in_bar(length: u64) -> Movable {
    let device = Device::open(Node::largest().bdf.parse().unwrap()).unwrap();
    Movable::new(Arc::new(device), 2, length).unwrap()
}

/// A publisher on its own thread, which moves its buffers on request.
struct Lender {
    orders: mpsc::Sender<(usize, Duration)>,
    /// The generation after each move.
    moved: Mutex<mpsc::Receiver<u64>>,
    thread: JoinHandle<()>,
}

impl Lender {
    /// Publishes the backings as "0", "1" and so on.
    fn start(backings: Vec<Box<dyn Backing>>) -> (Lender, Arc<Subscriber>) {
        let (ours, theirs) = Channel::pair().unwrap();
        let (orders, next) = mpsc::channel::<(usize, Duration)>();
        let (tell, moved) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut publisher = Publisher::new().unwrap();
            publisher.add(ours).unwrap();
            let publish = |(n, backing)| publisher.publish(&format!("{n}"), backing).unwrap();
            let ids: Vec<BufferId> = backings.into_iter().enumerate().map(publish).collect();
            loop {
                match next.try_recv() {
                    Ok((n, limit)) => {
                        let moved = publisher.migrate(ids[n], limit).unwrap();
                        assert!(moved.lost.is_empty(), "{moved:?}");
                        tell.send(moved.generation).unwrap();
                    }
                    Err(mpsc::TryRecvError::Empty) => {
                        publisher.serve_for(Duration::from_millis(2)).unwrap();
                    }
                    Err(mpsc::TryRecvError::Disconnected) => return,
                }
            }
        });
        let lender = Lender {
            orders,
            moved: Mutex::new(moved),
            thread,
        };
        (lender, Arc::new(Subscriber::new(theirs).unwrap()))
    }

    fn order(&self, buffer: usize, limit: Duration) {
        self.orders.send((buffer, limit)).unwrap();
    }

    /// Waits for the end of the next move; `None` on a timeout.
    fn moved(&self, limit: Duration) -> Option<u64> {
        self.moved.lock().unwrap().recv_timeout(limit).ok()
    }

    fn end(self) {
        drop(self.orders);
        self.thread.join().unwrap();
    }
}

#[test]
fn a_follower_gives_its_buffer_back_and_registers_what_it_has_become() {
    let card = card();
    let made = Copied::new(|_| udmabuf::export("lent", MIB)).unwrap();
    let (lender, subscriber) = Lender::start(vec![Box::new(in_bar(MIB)), Box::new(made)]);
    for n in 0..2 {
        let follower = Follower::new(&card, &subscriber, &n.to_string(), ALL).unwrap();
        let bytes = random(MIB);
        let source = memfd::export("source", MIB).unwrap().whole();
        put(&source, &bytes);
        let source = card.register(&source, None).unwrap();
        let piece = source.slice(0, MIB).unwrap();
        for generation in 1..5 {
            let registration = follower.registration(LIMIT).unwrap();
            assert_eq!(registration.generation(), Some(generation));
            if generation == 1 {
                let (mut here, _there) = connected(&card, 4);
                here.write(&piece, &registration.remote().unwrap(), None)
                    .unwrap();
                here.wait(LIMIT).unwrap().result.unwrap();
                registration.deliver(0, MIB).unwrap();
            }
            assert!(get(&registration.range().unwrap()) == bytes);
            lender.order(n, LIMIT);
            // Refused before it reaches the card, while the move waits for this registration.
            let begun = Stopwatch::start();
            while registration.check().is_ok() {
                assert!(begun.elapsed() < LIMIT);
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(
                lender.moved(Duration::ZERO).is_none(),
                "moved with a registration"
            );
            let (mut here, _there) = connected(&card, 4);
            let refused = here.receive(Some(&registration.slice(0, 1).unwrap()));
            assert!(
                matches!(refused, Err(RdmaError::Stale { .. })),
                "{refused:?}"
            );
            drop(registration);
            assert_eq!(lender.moved(LIMIT), Some(generation + 1));
        }
        assert_eq!(follower.cut_off(), 0);
    }
    lender.end();
}

#[test]
fn work_that_does_not_end_is_cut_off_reported_and_the_buffer_moves_in_time() {
    let card = card();
    let (lender, subscriber) = Lender::start(vec![Box::new(in_bar(MIB))]);
    let follower = Follower::new(&card, &subscriber, "0", ALL).unwrap();
    let bytes = random(MIB);
    let registration = follower.registration(LIMIT).unwrap();
    put(&registration.range().unwrap(), &bytes);
    let (mut here, mut there) = connected(&card, 4);
    // A receive that no one sends to.
    let piece = registration.slice(0, 4096).unwrap();
    let first = here.receive(Some(&piece)).unwrap();
    let second = here.receive(Some(&piece)).unwrap();
    // A receive into another buffer, which is stopped with the connection.
    let other = memfd::export("other", 4096).unwrap().whole();
    let other = card.register(&other, None).unwrap();
    let third = here.receive(Some(&other.slice(0, 4096).unwrap())).unwrap();
    lender.order(0, Duration::from_secs(4));
    let waiting = here.wait(LIMIT).unwrap();
    let mut back = vec![waiting];
    while let Ok(completion) = here.wait(Duration::from_secs(5)) {
        back.push(completion);
    }
    assert!(matches!(here.wait(LIMIT), Err(RdmaError::Stopped { .. })));
    let ids: Vec<_> = back.iter().map(|completion| completion.id).collect();
    assert_eq!(ids, [first, second, third]);
    for completion in back {
        let error = completion.result.unwrap_err();
        assert_eq!(
            (error.operation, error.status, error.cut_off),
            (Operation::Receive, Status::FLUSHED, true)
        );
        assert!(
            error.to_string().contains("to return the buffer"),
            "{error}"
        );
    }
    assert_eq!(lender.moved(LIMIT), Some(2));
    assert_eq!(follower.cut_off(), 1);
    // Everything that refers to the registration is stale or stopped.
    assert!(matches!(registration.check(), Err(RdmaError::Stale { .. })));
    assert!(matches!(registration.range(), Err(RdmaError::Stale { .. })));
    assert!(matches!(here.receive(None), Err(RdmaError::Stopped { .. })));
    drop((registration, piece, here));
    let next = follower.registration(LIMIT).unwrap();
    assert!(get(&next.range().unwrap()) == bytes);
    // The peer's connection still exists, but has no peer.
    let other = other.slice(0, 64).unwrap();
    there.send(&other, None).unwrap();
    let error = there.wait(LIMIT).unwrap().result.unwrap_err();
    assert_eq!((error.status, error.cut_off), (Status::UNANSWERED, false));
    lender.end();
}

#[test]
fn a_registration_ends_in_the_middle_of_a_message_of_either_end() {
    const LENGTH: u64 = 8 * MIB;
    const WRITES: usize = 14;
    let card = card();
    let source = memfd::export("source", LENGTH).unwrap().whole();
    put(&source, &vec![0x5a; LENGTH as usize]);
    // The registration ends locally, and at the peer.
    for ended in ["source", "target"] {
        let target = memfd::export("target", LENGTH).unwrap().whole();
        let from = card.register(&source, None).unwrap();
        let to = card.register(&target, ALL).unwrap();
        let (mut here, there) = connected(&card, 16);
        there.shows(&to);
        let piece = from.slice(0, LENGTH).unwrap();
        for _ in 0..WRITES {
            here.write(&piece, &to.remote().unwrap(), None).unwrap();
        }
        let begun = Stopwatch::start();
        while get(&target.slice(0, 64).unwrap()) != [0x5a; 64] {
            assert!(begun.elapsed() < LIMIT, "nothing arrives");
        }
        let begun = Stopwatch::start();
        match ended {
            "source" => from.end(),
            _ => to.end(),
        }
        // (Unless stopped, soft-RoCE waits up to 50 s for a message that has partly arrived.)
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(30), "{ended}: {took:?}");
        // From now on no card writes to the target.
        if ended == "target" {
            put(&target, &vec![0; LENGTH as usize]);
        }
        let results: Vec<_> = (0..WRITES)
            .map(|_| here.wait(LIMIT).unwrap().result)
            .collect();
        let done = results.iter().take_while(|result| result.is_ok()).count();
        assert!(done < WRITES, "{ended}: all of it had arrived");
        let status = match ended {
            "source" => Status::FLUSHED,
            _ => Status::UNANSWERED,
        };
        for (n, result) in results[done..].iter().enumerate() {
            let error = result.as_ref().unwrap_err();
            let expected = if n == 0 { status } else { Status::FLUSHED };
            assert_eq!((error.status, error.cut_off), (expected, ended == "source"));
        }
        if ended == "target" {
            assert!(get(&target).iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn both_buffers_move_at_random_while_bytes_go_to_and_fro_and_none_is_lost() {
    const LENGTH: u64 = 2 * MIB + 4096 + 5;
    const SIZE: u64 = 3 * MIB;
    let card = card();
    let made = Copied::new(|_| udmabuf::export("there", SIZE)).unwrap();
    let backings: [fn() -> Box<dyn Backing>; 1] = [|| Box::new(in_bar(SIZE))];
    let there = [backings[0](), Box::new(made)];
    for there in there {
        let (lender, subscriber) = Lender::start(vec![backings[0](), there]);
        let [here, there] =
            ["0", "1"].map(|name| Follower::new(&card, &subscriber, name, ALL).unwrap());
        let done = AtomicBool::new(false);
        let moves = std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                let mut moves = 0;
                let mut rng = rand::rng();
                while !done.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(rng.random_range(1..60)));
                    lender.order(rng.random_range(0..2), Duration::from_secs(10));
                    lender.moved(LIMIT).unwrap();
                    moves += 1;
                }
                moves
            });
            for round in 0..6 {
                round_trip(&card, &here, &there, LENGTH, round);
            }
            done.store(true, Ordering::Relaxed);
            mover.join().unwrap()
        });
        assert!(moves >= 3, "{moves} moves, too few to say anything");
        let generations = here.generations() + there.generations();
        assert!(generations >= moves, "{generations} after {moves} moves");
        drop((here, there));
        lender.end();
    }
}

/// Forks. The child does `work` and ends, without dropping anything else.
fn in_a_child(work: impl FnOnce()) {
    // SAFETY: the C library's memory is whole in its child, which ends by `_exit`.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let done = catch_unwind(AssertUnwindSafe(work));
            // SAFETY: ends the process and nothing else.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let ended = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(ended, WaitStatus::Exited(child, 0), "the child failed");
        }
    }
}

#[test]
fn a_child_gets_errors_at_once_and_takes_nothing_from_its_parent() {
    let card = card();
    let (lender, subscriber) = Lender::start(vec![Box::new(in_bar(MIB))]);
    let follower = Follower::new(&card, &subscriber, "0", ALL).unwrap();
    let bytes = random(MIB);
    let source = memfd::export("source", MIB).unwrap().whole();
    put(&source, &bytes);
    let source = card.register(&source, None).unwrap();
    let held = follower.registration(LIMIT).unwrap();
    let (here, there) = connected(&card, 4);
    there.shows(&held);
    let mut all = Some((follower, source, held, here, there, card));
    in_a_child(|| {
        let (follower, source, held, mut here, there, card) = all.take().unwrap();
        let begun = Stopwatch::start();
        match follower.registration(Duration::MAX) {
            Err(RdmaError::Share(error)) => {
                assert!(matches!(*error, ShareError::Inherited { .. }), "{error}");
            }
            other => panic!("{other:?}"),
        }
        drop(follower);
        assert!(begun.elapsed() < LIMIT);
        let inherited = |error| matches!(error, RdmaError::Inherited { .. });
        let piece = source.slice(0, MIB).unwrap();
        let remote = held.remote().unwrap();
        assert!(inherited(here.write(&piece, &remote, None).unwrap_err()));
        assert!(inherited(here.receive(None).unwrap_err()));
        assert!(inherited(here.wait(Duration::MAX).unwrap_err()));
        assert!(inherited(held.deliver(0, MIB).unwrap_err()));
        assert!(inherited(card.endpoint(4).unwrap_err()));
        let range = memfd::export("child's", MIB).unwrap().whole();
        assert!(inherited(card.register(&range, None).unwrap_err()));
        held.end();
        drop((piece, source, held, here, there, card));
    });
    let (follower, source, held, mut here, there, _card) = all.take().unwrap();
    let piece = source.slice(0, MIB).unwrap();
    here.write(&piece, &held.remote().unwrap(), None).unwrap();
    here.wait(LIMIT).unwrap().result.unwrap();
    held.deliver(0, MIB).unwrap();
    assert!(get(&held.range().unwrap()) == bytes);
    // The parent's thread still follows.
    lender.order(0, LIMIT);
    drop((held, here, there));
    assert_eq!(lender.moved(LIMIT), Some(2));
    let next = follower.registration(LIMIT).unwrap();
    assert_eq!((next.generation(), follower.cut_off()), (Some(2), 0));
    drop((next, follower));
    lender.end();
}

#[test]
fn a_wait_without_an_end_ends_when_the_buffer_has_moved() {
    let card = card();
    let (lender, subscriber) = Lender::start(vec![Box::new(in_bar(MIB))]);
    let follower = Follower::new(&card, &subscriber, "0", ALL).unwrap();
    let registration = follower.registration(Duration::MAX).unwrap();
    lender.order(0, LIMIT);
    let begun = Stopwatch::start();
    while registration.check().is_ok() {
        assert!(begun.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(1));
    }
    let next = std::thread::scope(|scope| {
        let next = scope.spawn(|| follower.registration(Duration::MAX).unwrap());
        drop(registration);
        next.join().unwrap()
    });
    assert_eq!(next.generation(), Some(2));
    assert_eq!(lender.moved(LIMIT), Some(2));
    drop((next, follower));
    lender.end();
}

/// The peer's half of a link, and the objects it keeps.
struct Other {
    _connection: Connection,
    registration: peerbuf_rdma::Registration,
}

fn link(card: &Card, there: &Follower) -> Result<(Link, Other), RdmaError> {
    let registration = there.registration(LIMIT)?;
    let (connection, other) = connected(card, 4);
    other.shows(&registration);
    let link = Link {
        connection,
        remote: registration.remote()?,
        limit: LIMIT,
    };
    let other = Other {
        _connection: other,
        registration,
    };
    Ok((link, other))
}

fn round_trip(card: &Card, here: &Follower, there: &Follower, length: u64, round: u64) {
    let (offset, at) = (round * 37, round * 4099);
    let span = Span { offset, at, length };
    let bytes = random(length);
    // Each lease is short, so that the buffer can move between any two steps.
    let range = |of: &Follower, offset| {
        let registration = of.registration(LIMIT).unwrap();
        registration.range().unwrap().slice(offset, length).unwrap()
    };
    put(&range(here, offset), &bytes);
    let mut kept = None;
    let mut connect = || {
        // Drops the old registration first, because it keeps the buffer.
        kept = None;
        let (link, other) = link(card, there)?;
        kept = Some(other);
        Ok::<Link, RdmaError>(link)
    };
    let mut over = connect().unwrap();
    let done = here.write(&mut over, span, |_| connect()).unwrap();
    assert_eq!(done.bytes, length);
    drop(over);
    let other = kept.take().unwrap();
    other.registration.deliver(at, length).unwrap();
    drop(other);
    assert!(get(&range(there, at)) == bytes, "round {round}: written");
    put(&range(here, offset), &random(length));
    let mut kept = None;
    let mut connect = || {
        kept = None;
        let (link, other) = link(card, there)?;
        other.registration.refresh(at, length)?;
        kept = Some(other);
        Ok::<Link, RdmaError>(link)
    };
    let mut over = connect().unwrap();
    let done = here.read(&mut over, span, |_| connect()).unwrap();
    assert_eq!(done.bytes, length);
    drop((over, kept));
    assert!(get(&range(here, offset)) == bytes, "round {round}: read");
}

#[test]
fn what_was_cut_off_is_retried_or_reported_as_the_caller_chooses() {
    const LENGTH: u64 = 4 * MIB;
    let card = card();
    let made = Copied::new(|_| udmabuf::export("here", LENGTH)).unwrap();
    let (lender, subscriber) = Lender::start(vec![Box::new(made)]);
    let here = Follower::new(&card, &subscriber, "0", None).unwrap();
    let bytes = random(LENGTH);
    put(&here.registration(LIMIT).unwrap().range().unwrap(), &bytes);
    let target = memfd::export("target", LENGTH).unwrap().whole();
    let to = card.register(&target, ALL).unwrap();
    let span = Span {
        offset: 0,
        at: 0,
        length: LENGTH,
    };
    for retry in [false, true] {
        put(&target, &vec![0; LENGTH as usize]);
        // This end sends before the peer is connected, so nothing completes by itself.
        let ends = [card.endpoint(4).unwrap(), card.endpoint(4).unwrap()];
        let [first, second] = ends;
        let over = |connection| Link {
            connection,
            remote: to.remote().unwrap(),
            limit: if retry { Duration::MAX } else { LIMIT },
        };
        let mut link = over(first.connect(&second.address()).unwrap());
        lender.order(0, Duration::from_secs(4));
        let mut kept = Vec::new();
        let mut why = Vec::new();
        let result = here.write(&mut link, span, |error| {
            why.push(error.clone());
            if !retry {
                return Err(error);
            }
            let (here, there) = connected(&card, 4);
            kept.push(there);
            Ok(over(here))
        });
        assert!(!why.is_empty());
        match &why[0] {
            RdmaError::Work(error) => assert!(error.cut_off, "{error}"),
            RdmaError::Stopped { .. } => {}
            other => panic!("{other}"),
        }
        lender.moved(LIMIT).unwrap();
        if retry {
            let done = result.unwrap();
            assert_eq!((done.bytes, done.retries), (LENGTH, why.len() as u32));
            assert!(get(&target) == bytes);
        } else {
            assert_eq!(result, Err(why.remove(0)));
        }
        drop(second);
    }
    lender.end();
}
