//! Buffers that move, are revoked and restored, and are watched. Runs in the guest.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::disk::{self, SCRATCH, Slow};
use peerbuf_lab_suite::importer::{DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::machine::{is_debug_kernel, seconds};
use peerbuf_lab_suite::memory;
use peerbuf_lab_suite::node::{
    MIB, Map, Node, PAGE, SYNC_END, SYNC_READ, SYNC_WRITE, assert_all_free, differs, errno, fill,
    in_child, nvme_bdf, pattern, sync,
};
use peerbuf_uapi::{self as abi, probe};
use peerbuf_uapi::{PLACEMENT_DEVICE, PLACEMENT_MIXED, PLACEMENT_SYSTEM};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::event::{EventfdFlags, eventfd};

fn range(length: u64, flags: u32) -> abi::Range {
    abi::Range {
        length,
        flags,
        ..Zeroable::zeroed()
    }
}

fn map(fd: &OwnedFd, len: u64) -> Map {
    Map::new(fd.as_fd(), len as usize, true).unwrap()
}

/// Number of signals of the eventfd since the last call.
fn signals(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(rustix::io::Errno::AGAIN) => 0,
        Err(e) => panic!("eventfd: {e}"),
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

#[test]
fn a_move_takes_every_byte_there_and_back() {
    for node in Node::all() {
        let len = node.bar2().size / 2;
        let (fd, _) = node.export(None, len).unwrap();
        let map = map(&fd, len);
        let len = len as usize;
        fill(&map, 0, len, 1);
        let mut generation = 1;
        for placement in [PLACEMENT_SYSTEM, PLACEMENT_DEVICE, PLACEMENT_SYSTEM] {
            let moved = node.move_to(&fd, placement).unwrap();
            generation += 1;
            assert_eq!(moved, (generation, len as u64), "{}", node.bdf);
            // The mapping made before shows the new place.
            assert_eq!(differs(&map, 0, len, generation - 1), None);
            fill(&map, 0, len, generation);
            let now = node.buffer(&fd).unwrap();
            assert_eq!(
                (now.state, now.placement, now.generation),
                (abi::STATE_LIVE, placement, generation)
            );
            // A move to the present place does nothing.
            assert_eq!(node.move_to(&fd, placement).unwrap(), (generation, 0));
        }
        let now = node.buffer(&fd).unwrap();
        assert_eq!((now.moves, now.copied), (3, 3 * len as u64));
        // The buffer keeps its range in the BAR meanwhile.
        assert_eq!(node.bar2().exports, 1);
        drop((fd, map));
        assert_all_free(&node);
    }
}

#[test]
fn what_is_left_in_the_bar_is_not_what_comes_back() {
    let node = Node::largest();
    let (fd, at) = node.export(None, MIB).unwrap();
    let seen = map(&fd, MIB);
    fill(&seen, 0, MIB as usize, 1);
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    fill(&seen, 0, MIB as usize, 2);
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    assert_eq!(differs(&seen, 0, MIB as usize, 2), None);
    drop((fd, seen));
    // The next owner of the range finds the bytes in the BAR itself.
    let (fd, _) = node.export(Some(at), MIB).unwrap();
    assert_eq!(differs(&map(&fd, MIB), 0, MIB as usize, 2), None);
}

#[test]
fn parts_move_alone_and_leave_the_rest() {
    let node = Node::largest();
    let len = 64 * PAGE;
    let (fd, at) = node.export(None, len).unwrap();
    let map = map(&fd, len);
    fill(&map, 0, len as usize, 7);
    let moved = node.move_part(&fd, PLACEMENT_SYSTEM, 3 * PAGE, 5 * PAGE, 1000);
    assert_eq!(moved.unwrap(), (2, 5 * PAGE));
    let (_, pieces) = node.buffer_lists(&fd).unwrap();
    let shape: Vec<_> = pieces
        .iter()
        .map(|piece| (piece.length / PAGE, piece.offset - at, piece.placement))
        .collect();
    assert_eq!(
        shape,
        [
            (3, 0, PLACEMENT_DEVICE),
            (5, 3 * PAGE, PLACEMENT_SYSTEM),
            (56, 8 * PAGE, PLACEMENT_DEVICE)
        ]
    );
    assert_eq!(node.buffer(&fd).unwrap().placement, PLACEMENT_MIXED);
    assert_eq!(differs(&map, 0, len as usize, 7), None);
    // A part that overlaps: bytes that are already there are not copied again.
    let moved = node.move_part(&fd, PLACEMENT_SYSTEM, 0, 4 * PAGE, 1000);
    assert_eq!(moved.unwrap(), (3, 3 * PAGE));
    // Moves back, across all boundaries.
    assert_eq!(node.move_to(&fd, PLACEMENT_DEVICE).unwrap(), (4, 8 * PAGE));
    assert_eq!(differs(&map, 0, len as usize, 7), None);
    let (_, pieces) = node.buffer_lists(&fd).unwrap();
    assert_eq!(pieces.len(), 1, "the seams are gone");
}

#[test]
fn random_moves_of_parts_agree_with_a_model() {
    let node = Node::largest();
    let pages = 96;
    let (fd, _) = node.export(None, pages * PAGE).unwrap();
    let map = map(&fd, pages * PAGE);
    let mut random = StdRng::seed_from_u64(5);
    let mut salts = vec![0; pages as usize];
    let mut places = vec![PLACEMENT_DEVICE; pages as usize];
    for page in 0..pages as usize {
        fill(&map, page * 4096, 4096, 0);
    }
    for round in 1..200 {
        let first = random.random_range(0..pages);
        let count = random.random_range(1..=pages - first);
        let to = [PLACEMENT_DEVICE, PLACEMENT_SYSTEM][random.random_range(0..2)];
        let part = first as usize..(first + count) as usize;
        let expected = places[part.clone()].iter().filter(|&&p| p != to).count() as u64;
        let moved = node.move_part(&fd, to, first * PAGE, count * PAGE, 1000);
        assert_eq!(moved.unwrap().1, expected * PAGE, "round {round}");
        places[part].fill(to);
        let page = random.random_range(0..pages as usize);
        fill(&map, page * 4096, 4096, round);
        salts[page] = round;
        for (page, &salt) in salts.iter().enumerate() {
            let first = map.read(page * 4096);
            assert_eq!(first, pattern(salt, page * 4096), "round {round}");
        }
        let (_, pieces) = node.buffer_lists(&fd).unwrap();
        let told: Vec<u32> = pieces
            .iter()
            .flat_map(|piece| vec![piece.placement; (piece.length / PAGE) as usize])
            .collect();
        assert_eq!(told, places, "round {round}");
    }
    for (page, &salt) in salts.iter().enumerate() {
        assert_eq!(differs(&map, page * 4096, 4096, salt), None);
    }
}

#[test]
fn several_ranges_are_one_buffer_in_the_callers_order() {
    let node = Node::largest();
    let mut ranges = [
        abi::Range {
            offset: 40 * PAGE,
            length: 2 * PAGE,
            ..Zeroable::zeroed()
        },
        range(3 * PAGE, abi::RANGE_SYSTEM),
        abi::Range {
            offset: 8 * PAGE,
            length: PAGE,
            ..Zeroable::zeroed()
        },
        range(4 * PAGE, abi::RANGE_ANY_OFFSET),
    ];
    let (fd, length) = node.export_ranges(0, &mut ranges).unwrap();
    assert_eq!(length, 10 * PAGE);
    assert_eq!(ranges[3].offset, 0, "the lowest place that is free");
    assert_eq!(node.bar2().exports, 3);
    let whole = map(&fd, length);
    fill(&whole, 0, length as usize, 3);
    let (_, pieces) = node.buffer_lists(&fd).unwrap();
    let offsets: Vec<u64> = pieces.iter().map(|piece| piece.offset).collect();
    assert_eq!(offsets, [40 * PAGE, u64::MAX, 8 * PAGE, 0]);
    // To system memory and back: the range without a place in the BAR stays where it is.
    assert_eq!(node.move_to(&fd, PLACEMENT_SYSTEM).unwrap(), (2, 7 * PAGE));
    assert_eq!(differs(&whole, 0, length as usize, 3), None);
    assert_eq!(node.move_to(&fd, PLACEMENT_DEVICE).unwrap(), (3, 7 * PAGE));
    assert_eq!(node.buffer(&fd).unwrap().placement, PLACEMENT_MIXED);
    assert_eq!(differs(&whole, 0, length as usize, 3), None);
    assert_eq!(
        errno(node.move_part(&fd, PLACEMENT_DEVICE, 2 * PAGE, PAGE, 100)),
        libc::EOPNOTSUPP
    );
    drop((fd, whole));
    assert_all_free(&node);
    // The bytes are in the requested ranges.
    let (fd, _) = node.export(Some(0), 64 * PAGE).unwrap();
    let bar = map(&fd, 64 * PAGE);
    for (in_bar, in_buffer) in [(40, 0), (41, 1), (8, 5), (0, 6), (3, 9)] {
        for word in (0..4096).step_by(8) {
            assert_eq!(
                bar.read(in_bar * 4096 + word),
                pattern(3, in_buffer * 4096 + word)
            );
        }
    }
}

#[test]
fn taking_much_memory_ends_with_the_process_that_wants_it() {
    let node = Node::largest();
    // The kernel clears every page, so this export takes a while.
    let length = 512 * MIB;
    let available = memory::available();
    let take = || node.export_ranges(0, &mut [range(length, abi::RANGE_SYSTEM)]);
    let began = Instant::now();
    take().unwrap();
    let whole = began.elapsed();
    let child = in_child(|| {
        loop {
            let _ = take();
        }
    });
    thread::sleep(whole / 2);
    let killed = Stopwatch::start();
    child.kill(libc::SIGKILL);
    assert_eq!(child.wait(), Err(libc::SIGKILL));
    let ended = killed.elapsed();
    assert!(
        ended < whole / 4,
        "{ended:?} after the kill, {whole:?} for all"
    );
    assert_all_free(&node);
    let now = memory::available();
    assert!(
        now + length / 2 > available,
        "{available} before, {now} now"
    );
}

#[test]
fn bad_ranges_get_their_errno_and_change_nothing() {
    let node = Node::largest();
    let before = node.query().unwrap();
    let at = |offset, length| abi::Range {
        offset,
        length,
        ..Zeroable::zeroed()
    };
    let size = before.bars[2].size;
    let cases: Vec<(&str, u32, Vec<abi::Range>, i32)> = vec![
        ("none", 0, vec![], libc::EINVAL),
        (
            "too many",
            0,
            vec![range(PAGE, abi::RANGE_ANY_OFFSET); 1025],
            libc::EINVAL,
        ),
        (
            "an empty one",
            0,
            vec![at(0, PAGE), at(PAGE, 0)],
            libc::EINVAL,
        ),
        ("off a page", 0, vec![at(8, PAGE)], libc::EINVAL),
        ("part of a page", 0, vec![at(0, 100)], libc::EINVAL),
        (
            "beyond the BAR",
            0,
            vec![at(0, PAGE), at(size, PAGE)],
            libc::EINVAL,
        ),
        (
            "overlapping",
            0,
            vec![at(0, 2 * PAGE), at(PAGE, PAGE)],
            libc::EBUSY,
        ),
        (
            "twice the same",
            0,
            vec![at(0, PAGE), at(0, PAGE)],
            libc::EBUSY,
        ),
        (
            "a place for system memory",
            0,
            vec![abi::Range {
                flags: abi::RANGE_SYSTEM,
                ..at(PAGE, PAGE)
            }],
            libc::EINVAL,
        ),
        (
            "an unknown flag",
            0,
            vec![range(PAGE, abi::RANGE_FLAGS + 1)],
            libc::EINVAL,
        ),
        (
            "an unknown export flag",
            1 << 31,
            vec![at(0, PAGE)],
            libc::EINVAL,
        ),
        (
            "a length beyond 63 bits",
            0,
            vec![
                range(1 << 62, abi::RANGE_SYSTEM),
                range(1 << 62, abi::RANGE_SYSTEM),
            ],
            libc::EINVAL,
        ),
        (
            "a length beyond 64 bits",
            0,
            vec![
                range(1 << 63, abi::RANGE_SYSTEM),
                range(1 << 63, abi::RANGE_SYSTEM),
            ],
            libc::EOVERFLOW,
        ),
        (
            "more system memory than there is",
            0,
            vec![at(0, PAGE), range(1 << 40, abi::RANGE_SYSTEM)],
            libc::ENOMEM,
        ),
    ];
    for (what, flags, mut ranges, expected) in cases {
        let sent = ranges.clone();
        assert_eq!(
            errno(node.export_ranges(flags, &mut ranges)),
            expected,
            "{what}"
        );
        assert_eq!(ranges, sent, "{what}: nothing is written back");
        assert_eq!(node.query().unwrap(), before, "{what}");
    }
}

#[test]
fn bad_moves_get_their_errno_and_change_nothing() {
    let node = Node::largest();
    let other = Node::all().remove(1);
    let (fd, _) = node.export(None, 4 * PAGE).unwrap();
    let good = abi::Move {
        size: size_of::<abi::Move>() as u32,
        fd: fd.as_raw_fd(),
        placement: PLACEMENT_SYSTEM,
        ..Zeroable::zeroed()
    };
    let memory = fs::File::open("/dev/null").unwrap();
    let cases = [
        (
            "a short struct",
            abi::Move { size: 8, ..good },
            libc::EINVAL,
        ),
        ("a flag", abi::Move { flags: 1, ..good }, libc::EINVAL),
        (
            "padding",
            abi::Move {
                reserved: 1,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "no placement",
            abi::Move {
                placement: 0,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "a mixed placement",
            abi::Move {
                placement: PLACEMENT_MIXED,
                ..good
            },
            libc::EINVAL,
        ),
        ("no descriptor", abi::Move { fd: -1, ..good }, libc::EBADF),
        (
            "no dma-buf",
            abi::Move {
                fd: memory.as_raw_fd(),
                ..good
            },
            libc::EINVAL,
        ),
        ("off a page", abi::Move { offset: 1, ..good }, libc::EINVAL),
        (
            "part of a page",
            abi::Move {
                length: 100,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "at the end",
            abi::Move {
                offset: 4 * PAGE,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "beyond the end",
            abi::Move {
                offset: PAGE,
                length: 4 * PAGE,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "an end that wraps",
            abi::Move {
                offset: PAGE,
                length: u64::MAX - PAGE + 1,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "an output that is set",
            abi::Move { copied: 1, ..good },
            libc::EINVAL,
        ),
        (
            "pins that are set",
            abi::Move { pins: 1, ..good },
            libc::EINVAL,
        ),
    ];
    for (what, request, expected) in cases {
        let mut sent = request;
        assert_eq!(
            errno(node.call(abi::IOC_MOVE, &mut sent)),
            expected,
            "{what}"
        );
        assert_eq!(sent, request, "{what}");
    }
    // Another device's node does not accept this device's buffer.
    for errno in [
        errno(other.move_to(&fd, PLACEMENT_SYSTEM)),
        errno(other.revoke(&fd, 0)),
        errno(other.restore(&fd)),
        errno(other.buffer(&fd)),
    ] {
        assert_eq!(errno, libc::EINVAL);
    }
    assert_eq!(errno(node.restore(&fd)), libc::EALREADY);
    let now = node.buffer(&fd).unwrap();
    assert_eq!((now.generation, now.moves), (1, 0));
}

#[test]
fn a_node_opened_read_only_only_looks() {
    let node = Node::largest();
    let (fd, _) = node.export(None, PAGE).unwrap();
    let file = fs::File::open(format!("/dev/peerbuf/{}", node.bdf)).unwrap();
    let looker = Node {
        file,
        bdf: node.bdf.clone(),
    };
    assert_eq!(errno(looker.move_to(&fd, PLACEMENT_SYSTEM)), libc::EACCES);
    assert_eq!(errno(looker.revoke(&fd, 0)), libc::EACCES);
    assert_eq!(errno(looker.restore(&fd)), libc::EACCES);
    assert_eq!(errno(looker.export(None, PAGE)), libc::EACCES);
    assert_eq!(
        errno(looker.export_ranges(0, &mut [range(PAGE, abi::RANGE_SYSTEM)])),
        libc::EACCES
    );
    looker.buffer(&fd).unwrap();
    looker.watch(abi::IOC_WATCH, &fd, event().as_fd()).unwrap();
    let mut request = Node::request(None, PAGE);
    request.export.fd_flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u32;
    let (seen, _) = looker.export_request(request).unwrap();
    Map::new(seen.as_fd(), 4096, false).unwrap();
    assert_eq!(errno(Map::new(seen.as_fd(), 4096, true)), libc::EACCES);
}

#[test]
fn watchers_are_told_of_each_change() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let (first, second) = (event(), event());
    node.watch(abi::IOC_WATCH, &fd, first.as_fd()).unwrap();
    let other = Node::open(&node.bdf).unwrap();
    other.watch(abi::IOC_WATCH, &fd, second.as_fd()).unwrap();
    assert_eq!((signals(&first), signals(&second)), (0, 0));
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    assert_eq!((signals(&first), signals(&second)), (1, 1));
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    assert_eq!(signals(&first), 0, "nothing has changed");
    node.revoke(&fd, 100).unwrap();
    node.restore(&fd).unwrap();
    assert_eq!((signals(&first), signals(&second)), (2, 2));
    // Another file's watch cannot be ended here.
    assert_eq!(
        errno(node.watch(abi::IOC_UNWATCH, &fd, second.as_fd())),
        libc::ENOENT
    );
    node.watch(abi::IOC_UNWATCH, &fd, first.as_fd()).unwrap();
    assert_eq!(
        errno(node.watch(abi::IOC_UNWATCH, &fd, first.as_fd())),
        libc::ENOENT
    );
    drop(other);
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    assert_eq!((signals(&first), signals(&second)), (0, 0));
    let file = fs::File::open("/dev/null").unwrap();
    assert_eq!(
        errno(node.watch(abi::IOC_WATCH, &fd, file.as_fd())),
        libc::EINVAL
    );
    // The number of watchers is limited.
    let refused = (0..5000)
        .map(|_| errno(node.watch(abi::IOC_WATCH, &fd, first.as_fd())))
        .find(|&errno| errno != 0);
    assert_eq!(refused, Some(libc::ENOSPC));
}

#[test]
fn a_watcher_hears_only_what_it_asks_for() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let watch = |events| {
        let event = event();
        node.watch_for(abi::IOC_WATCH, events, &fd, event.as_fd())
            .map(|()| event)
    };
    assert_eq!(errno(watch(0)), libc::EINVAL, "no event");
    assert_eq!(errno(watch(abi::EVENT_FLAGS + 1)), libc::EINVAL);
    let events = [abi::EVENT_MOVED, abi::EVENT_REVOKED, abi::EVENT_RESTORED]
        .map(|events| watch(events).unwrap());
    let told = || events.each_ref().map(signals);
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    assert_eq!(told(), [1, 0, 0]);
    node.revoke(&fd, 100).unwrap();
    assert_eq!(told(), [0, 1, 0]);
    node.restore(&fd).unwrap();
    assert_eq!(told(), [0, 0, 1]);
    let stranger = event();
    let unwatch = |events| node.watch_for(abi::IOC_UNWATCH, events, &fd, stranger.as_fd());
    assert_eq!(errno(unwatch(1)), libc::EINVAL, "no event to name");
    assert_eq!(errno(unwatch(0)), libc::ENOENT);
}

/// Waits for a signal of the eventfd, and clears it.
fn heard(event: &OwnedFd) -> bool {
    let mut poll = [rustix::event::PollFd::new(
        event,
        rustix::event::PollFlags::IN,
    )];
    let limit = rustix::event::Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut poll, Some(&limit)).unwrap() == 1 && signals(event) == 1
}

#[test]
fn a_refused_move_says_what_was_in_the_way_and_a_watcher_hears_when_it_is_gone() {
    let node = Node::largest();
    let fd = node.export_movable(MIB).unwrap();
    let attach = |flags| Importer::attach(fd.as_fd(), &nvme_bdf(), flags, 0).unwrap();
    let watch = |events| {
        let event = event();
        node.watch_for(abi::IOC_WATCH, events, &fd, event.as_fd())
            .unwrap();
        event
    };
    let (to_device, to_system) = (abi::EVENT_MOVABLE_TO_DEVICE, abi::EVENT_MOVABLE_TO_SYSTEM);

    // Nothing is in the way: a watcher hears so at once, and no more.
    let at_once = watch(to_system);
    assert_eq!(signals(&at_once), 1);

    // Two pins; the last one counts.
    let pinning = [attach(DYNAMIC | PEER), attach(DYNAMIC | PEER)];
    for importer in &pinning {
        importer.step(probe::IOC_PIN).unwrap();
    }
    assert_eq!(node.in_the_way(&fd, PLACEMENT_SYSTEM, 0), [0, 0, 0, 2]);
    let unpinned = watch(to_system);
    let moves_only = watch(abi::EVENT_MOVED);
    pinning[0].step(probe::IOC_UNPIN).unwrap();
    assert_eq!((signals(&unpinned), signals(&at_once)), (0, 0));
    pinning[1].step(probe::IOC_UNPIN).unwrap();
    assert!(heard(&unpinned));
    assert_eq!((signals(&at_once), signals(&moves_only)), (1, 0));
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    assert_eq!(signals(&moves_only), 1);
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    // A pin ends with its attachment, too.
    pinning[0].step(probe::IOC_PIN).unwrap();
    assert_eq!(node.in_the_way(&fd, PLACEMENT_SYSTEM, 0), [0, 0, 0, 1]);
    drop(pinning);
    assert_eq!((signals(&unpinned), signals(&at_once)), (1, 1));

    // Importers that need system memory, and a kernel mapping.
    let needy = [attach(0), attach(DYNAMIC)];
    let free = watch(to_device);
    assert_eq!(signals(&free), 0);
    assert_eq!(node.in_the_way(&fd, PLACEMENT_DEVICE, 0), [2, 0, 0, 0]);
    let [one, other] = needy;
    one.step(probe::IOC_VMAP).unwrap();
    assert_eq!(node.in_the_way(&fd, PLACEMENT_DEVICE, 0), [3, 0, 0, 0]);
    drop(other);
    one.step(probe::IOC_VUNMAP).unwrap();
    assert_eq!(signals(&free), 0);
    assert_ne!(signals(&unpinned), 0, "the kernel mapping is gone");
    drop(one);
    assert!(heard(&free));
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();

    // An old mapping of the BAR, which its importer does not give back.
    let mut request = peerbuf_lab_suite::importer::request(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER);
    request.on_invalidate = probe::ON_INVALIDATE_HOLD;
    let holder = Importer::attach_as(request).unwrap();
    holder.map().unwrap();
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    assert_eq!(node.in_the_way(&fd, PLACEMENT_DEVICE, 20), [1, 0, 0, 0]);
    assert_eq!(signals(&free), 0);
    holder.unmap();
    assert!(heard(&free));
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();

    // Fences are counted; their end is no event.
    let other = attach(DYNAMIC | PEER);
    holder.fence(probe::FENCE_BOOKKEEP, 30_000).unwrap();
    other.fence(probe::FENCE_WRITE, 30_000).unwrap();
    assert_eq!(node.in_the_way(&fd, PLACEMENT_SYSTEM, 20), [0, 2, 0, 0]);
    assert_eq!(node.revoke(&fd, 20).unwrap().fences, 2);
    for importer in [&holder, &other] {
        importer.step(probe::IOC_SIGNAL).unwrap();
    }
    assert_eq!(node.revoke(&fd, 1000).unwrap().fences, 0);
    node.restore(&fd).unwrap();
    assert_eq!((signals(&free), signals(&unpinned)), (0, 0));
    drop((holder, other, fd));
    assert_all_free(&node);
}

#[test]
fn a_permanent_revoke_is_not_restored_and_a_query_says_who_revoked() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let state = || {
        let now = node.buffer(&fd).unwrap();
        (now.state, now.reasons)
    };
    let owner = abi::REASON_OWNER;
    assert_eq!(state(), (abi::STATE_LIVE, 0));
    assert_eq!(errno(node.revoke_as(2, &fd, 0)), libc::EINVAL);
    node.revoke(&fd, 100).unwrap();
    assert_eq!(state(), (abi::STATE_REVOKED, owner));
    node.restore(&fd).unwrap();
    assert_eq!(state(), (abi::STATE_LIVE, 0));
    // A temporary revoke becomes a permanent one, not the other way round.
    node.revoke(&fd, 100).unwrap();
    let generation = node.revoke_as(abi::REVOKE_PERMANENT, &fd, 100).unwrap();
    assert_eq!(state(), (abi::STATE_GONE, owner));
    node.revoke(&fd, 100).unwrap();
    assert_eq!(state(), (abi::STATE_GONE, owner));
    assert_eq!(errno(node.restore(&fd)), libc::ENODEV);
    let now = node.buffer(&fd).unwrap().generation;
    assert_eq!(now, generation.generation, "nothing was restored");
    assert_eq!(errno(Map::new(fd.as_fd(), 4096, true)), libc::ENODEV);
    assert_eq!(errno(node.move_to(&fd, PLACEMENT_SYSTEM)), libc::ENODEV);
    let attached = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0);
    assert_eq!(errno(attached), libc::ENODEV);
    // The device's reset is over for this buffer, too, and gives it to nobody.
    let reset = format!("/sys/bus/pci/devices/{}/reset", node.bdf);
    if Path::new(&reset).exists() {
        fs::write(reset, "1").unwrap();
    }
    assert_eq!(state(), (abi::STATE_GONE, owner));
    // Its place is the buffer's until the last descriptor is closed.
    assert_eq!(node.bar2().exports, 1);
    drop(fd);
    assert_all_free(&node);
}

#[test]
fn ranges_of_different_bars_are_refused() {
    let node = Node::largest();
    let mut request = Node::request(None, PAGE);
    let other = abi::Range {
        bar: 0,
        ..request.range
    };
    let mut ranges = [request.range, other];
    request.export.ranges = ranges.as_mut_ptr().addr() as u64;
    request.export.nr_ranges = 2;
    let answer = node.call(abi::IOC_EXPORT, &mut request.export);
    assert_eq!(errno(answer), libc::EOPNOTSUPP);
    assert_eq!(
        node.query().unwrap().features & abi::FEATURE_SEVERAL_BARS,
        0
    );
    assert_all_free(&node);
}

#[test]
fn the_end_of_a_device_is_told_too() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    let event = event();
    node.watch(abi::IOC_WATCH, &fd, event.as_fd()).unwrap();
    let seen = map(&fd, MIB);
    seen.write(0, 1);
    Node::unbind(&bdf);
    assert_eq!(signals(&event), 1);
    let now = node.buffer(&fd).unwrap();
    assert_eq!((now.state, now.busy_pages), (abi::STATE_GONE, 0));
    assert_eq!(now.reasons, abi::REASON_GONE);
    assert_eq!(errno(node.move_to(&fd, PLACEMENT_DEVICE)), libc::ENODEV);
    assert_eq!(errno(node.restore(&fd)), libc::ENODEV);
    assert_eq!(
        errno(node.watch(abi::IOC_WATCH, &fd, event.as_fd())),
        libc::ENODEV
    );
    assert_eq!(in_child(|| seen.read(0) as i32).wait(), Err(libc::SIGBUS));
    Node::bind(&bdf);
    assert_eq!(node.buffer(&fd).unwrap().state, abi::STATE_GONE);
    drop((fd, seen, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn revoke_ends_access_and_restore_gives_it_again() {
    for placement in [PLACEMENT_DEVICE, PLACEMENT_SYSTEM] {
        let node = Node::largest();
        let (fd, _) = node.export(None, MIB).unwrap();
        node.move_to(&fd, placement).unwrap();
        let generation = node.buffer(&fd).unwrap().generation;
        let seen = map(&fd, MIB);
        fill(&seen, 0, MIB as usize, 4);
        let revoked = node.revoke(&fd, 1000).unwrap();
        assert_eq!(
            (
                revoked.generation,
                revoked.holders,
                revoked.fences,
                revoked.pages
            ),
            (generation + 1, 0, 0, 0)
        );
        assert_eq!(in_child(|| seen.read(0) as i32).wait(), Err(libc::SIGBUS));
        assert_eq!(errno(Map::new(fd.as_fd(), 4096, true)), libc::ENODEV);
        assert_eq!(errno(sync(&fd, SYNC_READ)), libc::ENODEV);
        assert_eq!(errno(node.move_to(&fd, PLACEMENT_SYSTEM)), libc::ENODEV);
        assert_eq!(node.buffer(&fd).unwrap().state, abi::STATE_REVOKED);
        // A second revoke: the buffer stays revoked.
        assert_eq!(node.revoke(&fd, 0).unwrap().generation, generation + 1);
        assert_eq!(node.restore(&fd).unwrap(), generation + 2);
        assert_eq!(differs(&seen, 0, MIB as usize, 4), None, "the bytes stay");
        sync(&fd, SYNC_READ).unwrap();
        sync(&fd, SYNC_READ | SYNC_END).unwrap();
    }
}

#[test]
fn direct_io_in_flight_is_waited_for_within_the_limit() {
    let node = Node::largest();
    let (fd, _) = node.export(None, 2 * MIB).unwrap();
    let seen = map(&fd, 2 * MIB);
    let disk = disk::open_direct(SCRATCH).unwrap();
    for to in [PLACEMENT_SYSTEM, PLACEMENT_DEVICE] {
        fill(&seen, 0, 2 << 20, u64::from(to));
        assert_eq!(
            disk::write_from(&disk, &seen, 0, 2 << 20, 0).unwrap(),
            2 << 20
        );
        fill(&seen, 0, 2 << 20, 99);
        thread::scope(|scope| {
            let _slow = Slow::new(MIB / 2);
            let reading = scope.spawn(|| disk::read_into(&disk, &seen, 0, 2 << 20, 0).unwrap());
            disk::await_reading();
            let began = Stopwatch::start();
            assert_eq!(
                errno(node.move_part(&fd, to, 0, 0, 200)),
                libc::EBUSY,
                "the disk has its pages"
            );
            assert!(began.elapsed() < Duration::from_secs(2));
            let revoked = node.revoke(&fd, 100).unwrap();
            assert!(revoked.pages > 0, "{revoked:?}");
            assert_eq!(errno(node.restore(&fd)), libc::EBUSY);
            assert!(!reading.is_finished());
            let revoked = node.revoke(&fd, 20_000).unwrap();
            assert_eq!(revoked.pages, 0, "{revoked:?}");
            assert_eq!(reading.join().unwrap(), 2 << 20);
            node.restore(&fd).unwrap();
        });
        // The bytes of the I/O in flight are in the right place, and move from there.
        assert_eq!(differs(&seen, 0, 2 << 20, u64::from(to)), None);
        node.move_to(&fd, to).unwrap();
        assert_eq!(differs(&seen, 0, 2 << 20, u64::from(to)), None);
    }
}

/// Makes a pipe that keeps the first page of a mapping.
fn pipe_with_page_of(map: &Map) -> std::io::PipeReader {
    let (read, write) = std::io::pipe().unwrap();
    let page = libc::iovec {
        iov_base: map.as_ptr(),
        iov_len: PAGE as usize,
    };
    // SAFETY: the page lies in the mapping, and the kernel only reads it.
    let n = unsafe { libc::vmsplice(write.as_raw_fd(), &raw const page, 1, 0) };
    assert_eq!(n, PAGE as isize, "{}", std::io::Error::last_os_error());
    read
}

/// The words of the page that a pipe keeps.
fn words(mut pipe: std::io::PipeReader) -> Vec<u64> {
    let mut bytes = vec![0; PAGE as usize];
    pipe.read_exact(&mut bytes).unwrap();
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
    bytes.chunks(8).map(word).collect()
}

#[test]
fn a_page_that_somebody_keeps_is_left_to_him_with_the_bytes_that_it_had() {
    const LIMIT_MS: u32 = 300;
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let len = 2 * MIB as usize;
    let (fd, _) = node.export(None, 2 * MIB).unwrap();
    let old = |salt| (0..PAGE as usize).step_by(8).map(move |i| pattern(salt, i));

    // A move.
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    let seen = map(&fd, 2 * MIB);
    fill(&seen, 0, len, 1);
    let pipe = pipe_with_page_of(&seen);
    drop(seen);
    let began = Instant::now();
    let moved = node
        .move_part(&fd, PLACEMENT_DEVICE, 0, 0, LIMIT_MS)
        .unwrap();
    let took = began.elapsed();
    assert_eq!(moved.1, 2 * MIB);
    assert!(
        took >= Duration::from_millis(u64::from(LIMIT_MS) - 50),
        "{took:?}"
    );
    let seen = map(&fd, 2 * MIB);
    assert_eq!(differs(&seen, 0, len, 1), None);
    fill(&seen, 0, len, 2);
    assert!(words(pipe).into_iter().eq(old(1)), "what he kept");

    // A revoke, which reports the page, and a restore.
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    let pipe = pipe_with_page_of(&seen);
    let revoked = node.revoke(&fd, LIMIT_MS).unwrap();
    assert!(revoked.pages > 0, "{revoked:?}");
    node.restore(&fd).unwrap();
    assert_eq!(node.buffer(&fd).unwrap().busy_pages, 0);
    assert_eq!(differs(&seen, 0, len, 2), None);
    fill(&seen, 0, len, 3);
    assert!(words(pipe).into_iter().eq(old(2)), "what he kept");
    assert_eq!(differs(&seen, 0, len, 3), None);

    // The unbind of the device.
    let pipe = pipe_with_page_of(&seen);
    let began = Stopwatch::start();
    Node::unbind(&bdf);
    assert!(began.elapsed() < seconds(5), "{:?}", began.elapsed());
    Node::bind(&bdf);
    assert!(words(pipe).into_iter().eq(old(3)), "what he kept");
    drop((seen, fd, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn a_move_comes_to_an_end_under_a_stream_of_direct_io() {
    let node = Node::largest();
    let len = 256 * PAGE;
    let (fd, _) = node.export(None, len).unwrap();
    let seen = map(&fd, len);
    let disk = disk::open_direct(SCRATCH).unwrap();
    let pattern_file = map(&fd, len);
    fill(&pattern_file, 0, len as usize, 6);
    disk::write_from(&disk, &seen, 0, len as usize, 0).unwrap();
    let stop = AtomicBool::new(false);
    let transfers = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let disk = disk::open_direct(SCRATCH).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let n = disk::read_into(&disk, &seen, 0, len as usize, 0).unwrap();
                    assert_eq!(n, len as usize);
                    transfers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0.. {
            // On a quiet machine the moves end before much was read.
            if round >= 40 && transfers.load(Ordering::Relaxed) > 20 {
                break;
            }
            let to = [PLACEMENT_SYSTEM, PLACEMENT_DEVICE][round % 2];
            let moved = node.move_to(&fd, to);
            if moved.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            assert_eq!(moved.unwrap().1, len, "round {round}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(differs(&seen, 0, len as usize, 6), None);
}

#[test]
fn no_byte_is_lost_when_processes_write_through_moves() {
    let node = Node::largest();
    let len = 64 * PAGE;
    let (fd, _) = node.export(None, len).unwrap();
    let seen = map(&fd, len);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // Each writer owns every third word, counts in it, and finds its last value.
        for writer in 0..3usize {
            let (seen, stop) = (&seen, &stop);
            scope.spawn(move || {
                let words: Vec<usize> =
                    (0..len as usize / 8).skip(writer).step_by(3 * 61).collect();
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    for &word in &words {
                        let found = seen.read(word * 8);
                        assert!(
                            count == 0 || found == count,
                            "word {word}: {found} for {count}"
                        );
                        seen.write(word * 8, count + 1);
                    }
                    count += 1;
                }
                assert!(count > 10, "{count}");
            });
        }
        for round in 0..150u64 {
            let to = [PLACEMENT_SYSTEM, PLACEMENT_DEVICE][round as usize % 2];
            let half = (round % 3) * (len / 4);
            let moved = node.move_part(&fd, to, half, len / 4, 5000);
            if moved.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            moved.unwrap();
            if round % 10 == 9 {
                node.move_to(&fd, to).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// System memory comes in blocks of up to 2 MiB, and a block counts as in use as a whole.
/// Mapped pages do not delay a move of another part.
#[test]
fn single_pages_come_back_from_a_block_whose_rest_is_mapped() {
    let node = Node::largest();
    let len = 6 * MIB;
    let (fd, _) = node.export(None, len).unwrap();
    let seen = map(&fd, len);
    let pages = (len / PAGE) as usize;
    let touch = || (0..pages).for_each(|i| assert_eq!(seen.read(i * PAGE as usize), i as u64));
    for i in 0..pages {
        seen.write(i * PAGE as usize, i as u64);
    }
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    for page in [0, 1, 511, 512, 700, 1023, 1535] {
        // Every page has an entry in this process's page table.
        touch();
        let moved = node.move_part(&fd, PLACEMENT_DEVICE, page * PAGE, PAGE, 1000);
        assert_eq!(moved.unwrap().1, PAGE, "page {page}");
    }
    touch();
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    touch();
}

#[test]
fn fdinfo_of_a_node_tells_what_the_query_tells() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", node.file.as_raw_fd())).unwrap();
    let inode = rustix::fs::fstat(&fd).unwrap().st_ino;
    let expected =
        format!("buffer:\t{inode} bar 2 length {MIB} placement system state live generation 2\n");
    assert!(text.contains(&expected), "{text}");
    assert!(text.contains("moves 1 "), "{text}");
    // Debugfs lists the same buffers below each device's name, and the devices without buffers.
    let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC, 0);
    assert!(importer.is_err(), "it may not move for an importer");
    let fdinfo =
        fs::read_to_string(format!("/proc/self/fdinfo/{}", node.file.as_raw_fd())).unwrap();
    let ours = &fdinfo[fdinfo.find("buffer:").unwrap()..];
    assert!(ours.contains("refusals 1"), "{ours}");
    let all = fs::read_to_string("/sys/kernel/debug/peerbuf/buffers").unwrap();
    assert!(
        all.contains(&format!("device:\t{}\n{ours}", node.bdf)),
        "{all}"
    );
    for other in Node::all() {
        assert!(all.contains(&format!("device:\t{}\n", other.bdf)), "{all}");
    }
}

#[test]
fn cpu_access_guards_serve_both_places() {
    let node = Node::largest();
    let (fd, _) = node.export(None, PAGE).unwrap();
    let seen = map(&fd, PAGE);
    for to in [PLACEMENT_SYSTEM, PLACEMENT_DEVICE] {
        sync(&fd, SYNC_WRITE).unwrap();
        seen.write(8, u64::from(to));
        sync(&fd, SYNC_WRITE | SYNC_END).unwrap();
        node.move_to(&fd, to).unwrap();
        sync(&fd, SYNC_READ).unwrap();
        assert_eq!(seen.read(8), u64::from(to));
        sync(&fd, SYNC_READ | SYNC_END).unwrap();
    }
}

/// The kernel's record of its `dma_sync_sg_for_cpu` calls, while this value lives. The
/// instrumented kernel keeps none.
struct Synced;

impl Synced {
    const EVENTS: &str = "/sys/kernel/tracing/events/dma/dma_sync_sg_for_cpu/enable";

    fn record() -> Option<Self> {
        if !Path::new(Self::EVENTS).exists() {
            let mount = ["-t", "tracefs", "none", "/sys/kernel/tracing"];
            Command::new("mount").args(mount).status().unwrap();
        }
        if !Path::new(Self::EVENTS).exists() {
            assert!(is_debug_kernel());
            return None;
        }
        fs::write("/sys/kernel/tracing/trace", "").unwrap();
        fs::write(Self::EVENTS, "1").unwrap();
        Some(Self)
    }

    /// Number of calls for a device.
    fn count(&self, bdf: &str) -> usize {
        let text = fs::read_to_string("/sys/kernel/tracing/trace").unwrap();
        let calls = text.lines().filter(|l| l.contains("dma_sync_sg_for_cpu:"));
        calls.filter(|l| l.contains(bdf)).count()
    }
}

impl Drop for Synced {
    fn drop(&mut self) {
        let _ = fs::write(Self::EVENTS, "0");
    }
}

#[test]
fn cpu_access_waits_for_the_device_before_its_bytes_are_synchronised() {
    let Some(synced) = Synced::record() else {
        return;
    };
    let node = Node::largest();
    let nvme = nvme_bdf();
    let fd = node.export_movable(MIB).unwrap();
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    let importer = Importer::attach(fd.as_fd(), &nvme, DYNAMIC, 0).unwrap();
    importer.map().unwrap();
    importer.fence(probe::FENCE_WRITE, 20_000).unwrap();
    thread::scope(|scope| {
        let access = scope.spawn(|| sync(&fd, SYNC_READ));
        thread::sleep(Duration::from_millis(500));
        let early = synced.count(&nvme);
        importer.step(probe::IOC_SIGNAL).unwrap();
        access.join().unwrap().unwrap();
        assert_eq!(early, 0, "a device may still have been writing");
    });
    assert!(synced.count(&nvme) > 0);
}

#[test]
fn revokes_moves_and_unbinding_race() {
    let bdf = Node::largest().bdf;
    for round in 0..6u64 {
        let node = Node::open(&bdf).unwrap();
        let (fd, _) = node.export(None, MIB).unwrap();
        let seen = map(&fd, MIB);
        seen.write(0, round);
        thread::scope(|scope| {
            let (node, fd) = (&node, &fd);
            let until = Instant::now() + Duration::from_millis(300);
            for to in [PLACEMENT_SYSTEM, PLACEMENT_DEVICE] {
                scope.spawn(move || {
                    while Instant::now() < until + Duration::from_millis(100) {
                        let answer = errno(node.move_to(fd, to));
                        assert!([0, libc::ENODEV, libc::EBUSY].contains(&answer), "{answer}");
                    }
                });
            }
            scope.spawn(move || {
                while Instant::now() < until + Duration::from_millis(100) {
                    node.revoke(fd, 10).unwrap();
                    let answer = errno(node.restore(fd));
                    assert!([0, libc::ENODEV].contains(&answer), "{answer}");
                }
            });
            thread::sleep(Duration::from_millis(100 + 30 * round));
            Node::unbind(&bdf);
        });
        assert_eq!(node.buffer(&fd).unwrap().state, abi::STATE_GONE);
        Node::bind(&bdf);
        drop((fd, seen, node));
        assert_all_free(&Node::open(&bdf).unwrap());
    }
}

#[test]
fn the_crate_says_it_all() {
    use peerbuf::Access;
    use peerbuf::export::peerbuf as crate_;
    use peerbuf::export::peerbuf::{MoveTo, Placement, RangeRequest, RangesRequest, State};
    const LIMIT: Duration = Duration::from_secs(5);
    let node = Node::largest();
    let device = crate_::Device::open(node.bdf.parse().unwrap()).unwrap();
    let request = RangesRequest {
        bar: 2,
        ranges: vec![
            RangeRequest::Bar {
                offset: Some(16 * PAGE),
                length: PAGE,
            },
            RangeRequest::System { length: PAGE },
            RangeRequest::Bar {
                offset: None,
                length: 2 * PAGE,
            },
        ],
        may_move: true,
        devices_read: false,
        uncached: false,
        access: Access::ReadWrite,
    };
    let buffer = device.export_ranges(&request).unwrap();
    assert_eq!(buffer.size(), 4 * PAGE);
    let dmabuf = buffer.dmabuf().unwrap();
    let watch = device.watch(dmabuf).unwrap();
    assert_eq!(watch.wait(Duration::from_millis(20)).unwrap(), 0);
    peerbuf_lab_suite::bytes::put(&buffer.whole(), &[7; 4 * PAGE as usize]);
    let moved = device.move_buffer(dmabuf, MoveTo::System, LIMIT).unwrap();
    assert_eq!((moved.generation, moved.copied), (2, 3 * PAGE));
    assert_eq!(watch.wait(LIMIT).unwrap(), 1);
    let moved = device
        .move_part(dmabuf, 0..PAGE, MoveTo::Device, LIMIT)
        .unwrap();
    assert_eq!((moved.generation, moved.copied), (3, PAGE));
    let status = device.status(dmabuf).unwrap();
    assert_eq!(status.state, State::Live);
    assert_eq!(status.placement, Placement::Mixed);
    assert_eq!((status.moves, status.copied), (2, 4 * PAGE));
    let homes: Vec<_> = status.pieces.iter().map(|piece| piece.home).collect();
    assert_eq!(homes, [Some(16 * PAGE), None, Some(0)]);
    assert_eq!(
        peerbuf_lab_suite::bytes::get(&buffer.whole()),
        [7; 4 * PAGE as usize]
    );
    let revoked = device.revoke(dmabuf, LIMIT).unwrap();
    assert!(revoked.is_complete(), "{revoked:?}");
    let status = device.status(dmabuf).unwrap();
    assert_eq!(status.state, State::Revoked);
    assert!(status.reasons.owner && !status.reasons.gone, "{status:?}");
    assert_eq!(device.restore(dmabuf).unwrap(), 5);
    assert_eq!(watch.wait(LIMIT).unwrap(), 3);
    let error = device.restore(dmabuf).unwrap_err().to_string();
    assert!(
        error.contains("PEERBUF_IOC_RESTORE") && error.contains("EALREADY"),
        "{error}"
    );
    // The error says that the memory is in use.
    let length = 2 * MIB;
    let ranges = vec![RangeRequest::System { length }];
    let request = RangesRequest {
        ranges: [
            vec![RangeRequest::Bar {
                offset: None,
                length,
            }],
            ranges,
        ]
        .concat(),
        ..request
    };
    let buffer = device.export_ranges(&request).unwrap();
    let dmabuf = buffer.dmabuf().unwrap();
    let disk = disk::open_direct(SCRATCH).unwrap();
    let seen = Map::new(dmabuf.as_fd(), length as usize, true).unwrap();
    let _slow = Slow::new(MIB / 2);
    thread::scope(|scope| {
        let reading = scope.spawn(|| disk::read_into(&disk, &seen, 0, 2 << 20, 0).unwrap());
        disk::await_reading();
        let busy = device.move_buffer(dmabuf, MoveTo::System, Duration::from_millis(50));
        let error = busy.unwrap_err();
        let was = error.in_the_way.unwrap();
        assert!(was.pages != 0, "{error}");
        assert_eq!((was.holders, was.fences, was.pins), (0, 0, 0), "{error}");
        let error = error.to_string();
        assert!(
            error.contains("EBUSY")
                && error.contains("in the way: ")
                && error.contains("of its pages"),
            "{error}"
        );
        reading.join().unwrap();
    });
}
