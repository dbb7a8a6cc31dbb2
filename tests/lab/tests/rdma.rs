//! Buffers registered with soft-RoCE, and transfers over loop-back connections, on the kernel's module
//! (`--rdma stock`) and on the lab's (`--rdma dmabuf`). Runs in the guest.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use peerbuf::error::BufferError;
use peerbuf::export::{heap, memfd, udmabuf};
use peerbuf::plan::{Path, ReasonCode};
use peerbuf::share::{Channel, Copied, Publisher, Subscriber};
use peerbuf::{Access, Buffer, Errno};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::machine::is_debug_kernel;
use peerbuf_lab_suite::node::Node;
use peerbuf_lab_suite::rdma::{
    ALL, Under, bar, card, connected, device, exercise, expected, good, limit, random,
    takes_dma_bufs,
};
use peerbuf_rdma::{
    self as rdma, Card, Connection, Layer, Operation, Place, RdmaError, Registration, Remote, Rung,
    Status,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

fn buffers(size: u64) -> Vec<(&'static str, Buffer)> {
    vec![
        ("memfd", memfd::export("memfd", size).unwrap()),
        ("udmabuf", udmabuf::export("udmabuf", size).unwrap()),
        (
            "heap",
            heap::Heap::open("system")
                .unwrap()
                .export("heap", size)
                .unwrap(),
        ),
        ("bar", bar(size)),
    ]
}

#[test]
fn the_structures_are_those_of_the_header() {
    let output = Command::new("/opt/peerbuf/fixtures/verbs_layout")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let header: BTreeMap<&str, usize> = text
        .lines()
        .map(|line| {
            let (name, offset) = line.rsplit_once(' ').unwrap();
            (name, offset.parse().unwrap())
        })
        .collect();
    let ours: BTreeMap<&str, usize> = rdma::layout().into_iter().collect();
    assert_eq!(ours, header);
}

#[test]
fn the_card_is_found_and_a_wrong_name_is_not() {
    assert!(rdma::probe().unwrap().contains(&"rxe0".to_owned()));
    assert!(card().is_software());
    let RdmaError::System(error) = Card::open("mlx5_0").unwrap_err() else {
        panic!("not a system error");
    };
    assert_eq!(error.errno, Errno::NODEV);
}

#[test]
fn port_and_address_are_those_that_are_given() {
    let chosen = card();
    let place = Place::default().port(1).gid_index(chosen.gid_index());
    let given = Card::open_at("rxe0", place).unwrap();
    assert_eq!((given.port(), given.gid()), (1, chosen.gid()));
    // Ethernet has no LIDs.
    assert_eq!(given.lid(), None);
    for (place, errno) in [
        (Place::default().port(2), Errno::INVAL),
        (Place::default().gid_index(200), Errno::ADDRNOTAVAIL),
    ] {
        let RdmaError::System(error) = Card::open_at("rxe0", place).unwrap_err() else {
            panic!("not a system error");
        };
        assert_eq!(error.errno, errno, "{error}");
    }
}

#[test]
fn a_connection_is_waited_for_with_other_things() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let card = card();
    let buffer = udmabuf::export("buffer", 8192).unwrap();
    let region = card.register(&buffer.whole(), ALL).unwrap();
    let (mut here, _there) = connected(&card, 4);
    let is_readable = |connection: &Connection, timeout: Timespec| {
        let mut wanted = [PollFd::new(connection, PollFlags::IN)];
        poll(&mut wanted, Some(&timeout)).unwrap() == 1
    };
    for _ in 0..3 {
        assert_eq!(here.arm().unwrap(), None);
        assert!(!is_readable(&here, Timespec::default()));
        let (from, to) = (region.slice(0, 64).unwrap(), region.remote().unwrap());
        here.write(&from, &to.slice(4096, 64).unwrap(), None)
            .unwrap();
        let long = Timespec::try_from(limit()).unwrap();
        assert!(is_readable(&here, long));
        assert_eq!(good(here.arm().unwrap().unwrap()), 64);
    }
    // The descriptor is also readable after another handle stopped the connection.
    assert_eq!(here.arm().unwrap(), None);
    here.shows(&region);
    region.end();
    assert!(is_readable(&here, Timespec::default()));
    assert!(matches!(here.arm(), Err(RdmaError::Stopped { .. })));
}

#[test]
fn a_wait_without_an_end_ends_with_the_completion() {
    let card = card();
    let buffer = memfd::export("buffer", 8192).unwrap();
    let region = card.register(&buffer.whole(), ALL).unwrap();
    let (mut here, _there) = connected(&card, 4);
    let (from, to) = (region.slice(0, 64).unwrap(), region.remote().unwrap());
    here.write(&from, &to.slice(4096, 64).unwrap(), None)
        .unwrap();
    assert_eq!(good(here.wait(Duration::MAX).unwrap()), 64);
    // Receives that nothing arrives for.
    let posted = [(); 2].map(|()| here.receive(None).unwrap());
    let drained = here.drain(Duration::MAX).unwrap();
    let ids: Vec<_> = drained.iter().map(|completion| completion.id).collect();
    assert_eq!(ids, posted);
    for completion in drained {
        assert_eq!(completion.result.unwrap_err().status, Status::FLUSHED);
    }
}

#[test]
fn each_rung_carries_every_byte_of_every_kind_of_buffer() {
    let card = card();
    for (kind, buffer) in buffers(256 << 10) {
        let expected = expected(kind);
        for rung in Rung::ALL {
            let whole = buffer.whole();
            let result = card.register_by(&whole, ALL, &[rung]);
            assert_eq!(
                result.is_ok(),
                expected.contains(&rung),
                "{kind} by {rung}: {result:?}"
            );
            let Ok(registration) = result else { continue };
            assert_eq!(registration.rung(), rung);
            exercise(
                &card,
                &Under {
                    registration,
                    range: whole.clone(),
                    around: whole,
                },
            );
        }
    }
}

#[test]
fn the_best_rung_is_taken_and_the_better_ones_say_why_not() {
    let card = card();
    for (kind, buffer) in buffers(64 << 10) {
        let registration = card.register(&buffer.whole(), ALL).unwrap();
        assert_eq!(registration.rung(), expected(kind)[0], "{kind}");
        let tried: Vec<Rung> = registration.attempts().iter().map(|a| a.rung).collect();
        let better = Rung::ALL
            .into_iter()
            .take_while(|r| *r != registration.rung());
        assert_eq!(tried, better.collect::<Vec<_>>(), "{kind}");
        let attempt = |rung| {
            registration
                .attempts()
                .iter()
                .find(|a| a.rung == rung)
                .unwrap()
        };
        let library = attempt(Rung::DmaBufByLibrary);
        if kind == "memfd" {
            assert_eq!(
                (library.layer, library.code),
                (Layer::Buffer, ReasonCode::NoDmaBuf)
            );
            continue;
        }
        assert_eq!(library.errno, Some(Errno::OPNOTSUPP));
        assert!(library.evidence.contains("ibv_reg_dmabuf_mr"), "{library}");
        assert!(library.evidence.contains("EOPNOTSUPP"), "{library}");
        if takes_dma_bufs() {
            assert_eq!(library.layer, Layer::Library, "{kind}");
        } else {
            let kernel = attempt(Rung::DmaBufByKernel);
            assert_eq!(kernel.errno, Some(Errno::OPNOTSUPP), "{kind}");
            assert_eq!(
                (library.layer, kernel.layer),
                (Layer::Driver, Layer::Driver)
            );
        }
        let plan = registration.plan();
        let path = match (kind, takes_dma_bufs()) {
            ("udmabuf", _) | ("heap", true) => Path::SharedHostMemory,
            _ => Path::StagedCopy,
        };
        assert_eq!(plan.path, path, "{kind}: {plan}");
        assert!(!plan.reasons.is_empty(), "{kind}");
    }
}

#[test]
fn offsets_and_lengths_are_the_ranges_at_every_edge_of_a_page() {
    let card = card();
    for (kind, buffer) in buffers(64 << 10) {
        for rung in expected(kind) {
            for (offset, length) in [
                (0, 1),
                (1, 4095),
                (4095, 2),
                (4096, 4096),
                (4097, 8191),
                (12287, 8194),
                ((64 << 10) - 1, 1),
            ] {
                let range = buffer.range(offset, length).unwrap();
                let registration = card.register_by(&range, ALL, &[rung]).unwrap();
                exercise(
                    &card,
                    &Under {
                        registration,
                        range,
                        around: buffer.whole(),
                    },
                );
            }
        }
    }
}

#[test]
fn a_copy_that_fails_is_told_with_the_request_that_it_belongs_to() {
    const LENGTH: u64 = 4096;
    let card = card();
    let source = memfd::export("source", LENGTH).unwrap();
    put(&source.whole(), &random(LENGTH, 1));
    let source = card.register(&source.whole(), ALL).unwrap();
    let remote = source.remote().unwrap();
    let buffer = bar(LENGTH);
    let staged = card.register_by(&buffer.whole(), None, &[Rung::Staged]);
    let piece = staged.unwrap().slice(0, LENGTH).unwrap();
    let (mut here, _there) = connected(&card, 4);
    let id = here.read(&piece, &remote).unwrap();
    // From now on the CPU has no access to the buffer.
    device().revoke(buffer.dmabuf().unwrap(), limit()).unwrap();
    let done = here.wait(limit()).unwrap();
    assert_eq!((done.id, done.operation), (id, Operation::Read));
    let error = done.result.unwrap_err();
    assert_eq!((error.status, error.cut_off), (Status::SUCCESS, false));
    let copy = error.copy.as_ref().and_then(BufferError::errno);
    assert_eq!(copy, Some(Errno::NODEV), "{error}");
    // The connection itself is intact.
    assert_eq!(here.in_flight(), 0);
    let piece = source.slice(0, LENGTH).unwrap();
    here.write(&piece, &remote, None).unwrap();
    assert_eq!(good(here.wait(limit()).unwrap()), LENGTH);
}

#[test]
fn a_registration_above_the_limit_on_locked_memory_names_the_limit() {
    let card = card();
    let buffer = memfd::export("large", 8 << 20).unwrap();
    let before = getrlimit(Resource::Memlock);
    let low = Rlimit {
        current: Some(1 << 20),
        ..before
    };
    // The limit belongs to the process; only this thread loses the capability, so the limit applies to it
    // alone.
    let attempts = std::thread::spawn(move || {
        let mut own = capabilities(None).unwrap();
        own.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, own).unwrap();
        setrlimit(Resource::Memlock, low).unwrap();
        let ways = [Rung::SharedMemory, Rung::Staged];
        match card.register_by(&buffer.whole(), ALL, &ways) {
            Err(RdmaError::NotRegistered { attempts, .. }) => attempts,
            other => panic!("{other:?}"),
        }
    });
    let attempts = attempts.join().unwrap();
    setrlimit(Resource::Memlock, before).unwrap();
    assert_eq!(attempts.len(), 2);
    for attempt in attempts {
        assert_eq!(attempt.errno, Some(Errno::NOMEM), "{attempt}");
        let text = attempt.to_string();
        assert!(text.contains("may lock 1048576 bytes"), "{text}");
        assert!(text.contains("RLIMIT_MEMLOCK"), "{text}");
    }
}

/// The card's status for a write, after which the connection is unusable.
fn written(connection: &mut Connection, from: &Registration, to: &Remote) -> Status {
    let piece = from.slice(0, to.len()).unwrap();
    connection.write(&piece, to, None).unwrap();
    let completion = connection.wait(limit()).unwrap();
    completion.result.unwrap_err().status
}

#[test]
fn wrong_keys_and_ranges_are_refused_and_others_unharmed() {
    let card = card();
    let target = udmabuf::export("target", 64 << 10).unwrap();
    put(&target.whole(), &random(64 << 10, 1));
    let part = target.range(4096, 8192).unwrap();
    let registration = card.register(&part, ALL).unwrap();
    let source = memfd::export("source", 64 << 10).unwrap();
    let source = card.register(&source.whole(), None).unwrap();
    assert!(matches!(source.remote(), Err(RdmaError::NotShared { .. })));
    let (mut unharmed, _its_peer) = connected(&card, 4);

    let right = registration.remote().unwrap();
    let forged = |address: u64, length: u64, key_flip: u8| {
        let mut bytes = right.to_bytes();
        bytes[..8].copy_from_slice(&address.to_be_bytes());
        bytes[8..16].copy_from_slice(&length.to_be_bytes());
        bytes[19] ^= key_flip;
        Remote::from_bytes(&bytes).unwrap()
    };
    let read_only = card.register(&part, Some(Access::Read)).unwrap();
    for (what, remote) in [
        ("another key", forged(4096, 16, 1)),
        ("before it", forged(4095, 16, 0)),
        ("behind it", forged(4096 + 8192 - 15, 16, 0)),
        ("far away", forged(1 << 40, 16, 0)),
        (
            "not for writing",
            read_only.remote().unwrap().slice(0, 16).unwrap(),
        ),
    ] {
        let (mut here, _there) = connected(&card, 4);
        assert_eq!(
            written(&mut here, &source, &remote),
            Status::REMOTE_ACCESS,
            "{what}"
        );
        // Requests posted to it now are flushed.
        let piece = source.slice(0, 16).unwrap();
        here.write(&piece, &right.slice(0, 16).unwrap(), None)
            .unwrap();
        assert_eq!(
            here.wait(limit()).unwrap().result.unwrap_err().status,
            Status::FLUSHED
        );
    }
    let gone = {
        let registration = card.register(&part, ALL).unwrap();
        registration.remote().unwrap().slice(0, 16).unwrap()
    };
    let (mut here, _there) = connected(&card, 4);
    assert_eq!(
        written(&mut here, &source, &gone),
        Status::REMOTE_ACCESS,
        "deregistered"
    );

    assert_eq!(get(&target.whole()), random(64 << 10, 1));
    let piece = source.slice(0, 16).unwrap();
    unharmed
        .write(&piece, &right.slice(0, 16).unwrap(), None)
        .unwrap();
    assert_eq!(good(unharmed.wait(limit()).unwrap()), 16);

    // Refused before it reaches the card.
    let refused = unharmed.write(&piece, &right.slice(0, 17).unwrap(), None);
    assert!(matches!(refused, Err(RdmaError::Mismatch { .. })));
    let elsewhere = Card::open("rxe0").unwrap();
    let (mut foreign, _its_peer) = connected(&elsewhere, 4);
    let refused = foreign.write(&piece, &right.slice(0, 16).unwrap(), None);
    assert!(matches!(refused, Err(RdmaError::Mismatch { .. })));
    assert!(matches!(
        right.slice(8192, 1),
        Err(BufferError::OutOfRange { .. })
    ));
    assert!(matches!(
        registration.slice(8000, 193),
        Err(BufferError::OutOfRange { .. })
    ));
    assert!(matches!(
        card.register(&target.range(5, 0).unwrap(), None),
        Err(RdmaError::Empty { .. })
    ));
}

#[test]
fn a_registration_of_a_revoked_buffer_is_refused_before_the_card_sees_it() {
    let (card, device) = (card(), device());
    let buffer = bar(64 << 10);
    let dmabuf = buffer.dmabuf().unwrap();
    let other = memfd::export("other", 4096).unwrap();
    let other = card.register(&other.whole(), ALL).unwrap();
    let (mut here, _there) = connected(&card, 4);
    for rung in expected("bar") {
        let registration = card.register_by(&buffer.whole(), ALL, &[rung]).unwrap();
        let generation = registration.generation().unwrap();
        registration.check().unwrap();
        assert!(device.revoke(dmabuf, limit()).unwrap().is_complete());
        let piece = registration.slice(0, 4096).unwrap();
        for _ in 0..2 {
            let refused = here
                .write(&piece, &other.remote().unwrap(), None)
                .unwrap_err();
            assert!(
                matches!(refused, RdmaError::Stale { .. }),
                "{rung}: {refused}"
            );
            assert!(matches!(
                here.receive(Some(&piece)),
                Err(RdmaError::Stale { .. })
            ));
            assert_eq!(here.in_flight(), 0);
            // Restoring access does not revalidate an old registration.
            let _ = device.restore(dmabuf);
        }
        let again = card.register_by(&buffer.whole(), ALL, &[rung]).unwrap();
        assert!(again.generation().unwrap() > generation);
        let piece = again.slice(0, 4096).unwrap();
        here.write(&piece, &other.remote().unwrap(), None).unwrap();
        good(here.wait(limit()).unwrap());
    }
}

#[test]
fn a_registered_dma_buf_does_not_move_and_a_staged_one_does() {
    let (card, device) = (card(), device());
    let node = Node::largest();
    let fd = node.export_movable(64 << 10).unwrap();
    let dmabuf = peerbuf::DmaBuf::from_fd(fd).unwrap();
    let provenance = bar(4096).provenance().clone();
    let buffer = Buffer::from_dmabuf(dmabuf, provenance);
    let dmabuf = buffer.dmabuf().unwrap();
    let other = memfd::export("other", 64 << 10).unwrap();
    let from = card.register(&other.whole(), ALL).unwrap();
    let (mut here, _there) = connected(&card, 4);
    for rung in expected("bar") {
        let registration = card.register_by(&buffer.whole(), ALL, &[rung]).unwrap();
        let to = peerbuf::export::peerbuf::MoveTo::System;
        let moved = device.move_buffer(dmabuf, to, Duration::from_millis(100));
        if rung.is_dma_buf() {
            assert_eq!(moved.unwrap_err().cause.errno, Errno::BUSY);
        } else {
            moved.unwrap();
        }
        registration.check().unwrap();
        put(&other.whole(), &random(64 << 10, 3));
        let piece = from.slice(0, 64 << 10).unwrap();
        here.write(&piece, &registration.remote().unwrap(), None)
            .unwrap();
        good(here.wait(limit()).unwrap());
        registration.deliver(0, 64 << 10).unwrap();
        assert!(get(&buffer.whole()) == random(64 << 10, 3), "{rung}");
    }
}

#[test]
fn a_lent_buffer_that_is_lent_no_more_is_stale() {
    let (ours, theirs) = Channel::pair().unwrap();
    let mut publisher = Publisher::new().unwrap();
    publisher.add(ours).unwrap();
    let backing = Copied::new(|_| memfd::export("lent", 4096)).unwrap();
    publisher.publish("lent", backing).unwrap();
    let subscriber = std::thread::spawn(move || Subscriber::new(theirs).unwrap());
    publisher.serve_for(Duration::from_millis(200)).unwrap();
    let subscriber = subscriber.join().unwrap();
    let lease = subscriber.buffer_within("lent", limit()).unwrap();
    let card = card();
    let registration = card.register(&lease.whole(), ALL).unwrap();
    assert_eq!(registration.generation(), Some(1));
    registration.check().unwrap();
    drop(subscriber);
    assert!(matches!(registration.check(), Err(RdmaError::Stale { .. })));
}

#[test]
fn things_can_be_dropped_in_any_order_with_work_in_flight() {
    let card = card();
    let target = udmabuf::export("target", 1 << 20).unwrap();
    for order in 0..4 {
        let source = udmabuf::export("source", 1 << 20).unwrap();
        let from = card.register(&source.whole(), None).unwrap();
        let to = card.register(&target.whole(), ALL).unwrap();
        let (mut here, there) = connected(&card, 16);
        for _ in 0..8 {
            let piece = from.slice(0, 1 << 20).unwrap();
            here.write(&piece, &to.remote().unwrap(), None).unwrap();
        }
        match order {
            // The registrations first: work in flight keeps the local ones.
            0 => {
                drop((source, from));
                good(here.wait(limit()).unwrap());
                drop((to, here, there));
            }
            // The peer's first: later requests are refused.
            1 => {
                drop(to);
                while here.wait(limit()).unwrap().result.is_ok() {
                    assert_ne!(here.in_flight(), 0, "a write without a registration");
                }
                drop((there, here, from, source));
            }
            // The connection first.
            2 => drop((here, there, from, to, source)),
            // An orderly stop: each request completes once.
            _ => {
                let back = here.drain(limit()).unwrap();
                assert_eq!(back.len(), 8);
                assert_eq!(here.in_flight(), 0);
            }
        }
    }
}

#[test]
fn ten_thousand_registrations_leave_nothing_behind() {
    let card = card();
    let buffer = udmabuf::export("buffer", 64 << 10).unwrap();
    let in_bar = bar(64 << 10);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let regions = || {
        let output = Command::new("rdma")
            .args(["resource", "show", "mr"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().lines().count()
    };
    let resident = || {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<u64>().unwrap()
    };
    let round = |n: u64| {
        let range = buffer.range(n % 4096, 8192 + n % 31).unwrap();
        drop(card.register(&range, ALL).unwrap());
        drop(
            card.register(&in_bar.range(n % 4096, 4096).unwrap(), ALL)
                .unwrap(),
        );
    };
    (0..500).for_each(round);
    // On the debug kernel kmemleak detects the leaks of a few hundred rounds.
    let rounds = if is_debug_kernel() { 500 } else { 5000 };
    let (fds, mrs, pages) = (descriptors(), regions(), resident());
    (0..rounds).for_each(round);
    assert_eq!((descriptors(), regions()), (fds, mrs));
    assert!(
        resident() <= pages + 64,
        "{} pages, {pages} before",
        resident()
    );
}
