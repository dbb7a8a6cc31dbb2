//! Registrations past 4 GiB: on a BAR of 8 GiB, of which the host has only what is touched, and on
//! memory. Runs in the guest. A number that is cut to 32 bits somewhere would name other bytes, 4 GiB
//! below or at the beginning: those are looked at, too.

use peerbuf::error::RdmaError;
use peerbuf::export::memfd;
use peerbuf::import::rdma::{Card, Remote, Rung, Status};
use peerbuf::{Buffer, BufferRange, DmaBuf};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::node::{Node, PAGE, assert_all_free};
use peerbuf_lab_suite::rdma::{
    ALL, LIMIT, Under, bar, card, connected, exercise, expected, good, random, takes_dma_bufs,
};
use peerbuf_uapi as abi;

const GIB: u64 = 1 << 30;
const BOUND: u64 = 4 * GIB;
const SIZE: u64 = 8 * GIB;

fn node() -> Node {
    let node = Node::largest();
    assert_eq!(node.bar2().size, SIZE, "run with --bar-size 8G");
    node
}

/// `length` bytes from `at` on, and a page on either side, as far as they are in the buffer.
fn around(buffer: &Buffer, at: u64, length: u64) -> BufferRange {
    let begin = at.saturating_sub(PAGE);
    let end = (at + length + PAGE).min(buffer.size());
    buffer.range(begin, end - begin).unwrap()
}

/// What numbers cut to 32 bits would make of the part of a range that is past 4 GiB.
fn shadow(range: &BufferRange) -> BufferRange {
    let end = range.offset() + range.len();
    let begin = range.offset().max(BOUND);
    around(range.buffer(), begin - BOUND, end - begin)
}

/// By each way in which such a buffer can be registered.
fn exercise_past_the_bound(card: &Card, buffer: &Buffer, kind: &str, ranges: &[(u64, u64)]) {
    for rung in expected(kind) {
        for &(offset, length) in ranges {
            let range = buffer.range(offset, length).unwrap();
            let shadow = shadow(&range);
            put(&shadow, &random(shadow.len(), 100));
            let registration = card.register_by(&range, ALL, &[rung]).unwrap();
            let around = around(buffer, offset, length);
            let under = Under {
                registration,
                range,
                around,
            };
            exercise(card, &under);
            assert!(
                get(&shadow) == random(shadow.len(), 100),
                "{kind} by {rung}: {length} bytes at {offset:#x} change those 4 GiB below"
            );
        }
    }
}

#[test]
fn ranges_past_4_gib_carry_every_byte() {
    let node = node();
    let card = card();
    for (kind, buffer) in [
        ("bar", bar(SIZE)),
        ("memfd", memfd::export("sparse", SIZE).unwrap()),
    ] {
        let ranges = [
            (BOUND - PAGE - 1, 2 * PAGE + 3),
            (BOUND, 1),
            (5 * GIB + PAGE - 1, PAGE + 2),
            (SIZE - (64 << 10), 64 << 10),
            (SIZE - 1, 1),
        ];
        exercise_past_the_bound(&card, &buffer, kind, &ranges);
    }
    drop(card);
    assert_all_free(&node);
}

#[test]
fn a_buffer_of_several_ranges_is_used_past_4_gib() {
    let node = node();
    let card = card();
    let range = |offset, length| abi::Range {
        offset,
        length,
        ..Default::default()
    };
    let provenance = bar(PAGE).provenance().clone();
    let mut ranges = [range(4 * GIB, 3 * GIB), range(GIB, 2 * GIB)];
    let (fd, length) = node.export_ranges(0, &mut ranges).unwrap();
    assert_eq!(length, 5 * GIB);
    let buffer = Buffer::from_dmabuf(DmaBuf::from_fd(fd).unwrap(), provenance);
    let past = [
        (BOUND - PAGE - 1, 2 * PAGE + 3),
        (length - PAGE - 1, PAGE + 1),
    ];
    exercise_past_the_bound(&card, &buffer, "bar", &past);

    // Across the place where the ranges meet, and past 4 GiB, which is 2 GiB in the BAR.
    for (seed, at) in [(1, 3 * GIB - PAGE), (2, BOUND)] {
        let there = buffer.range(at, 2 * PAGE).unwrap();
        let there = card.register(&there, ALL).unwrap();
        let source = memfd::export("source", 2 * PAGE).unwrap().whole();
        put(&source, &random(2 * PAGE, seed));
        let source = card.register(&source, None).unwrap();
        let (mut here, _peer) = connected(&card, 4);
        let piece = source.slice(0, 2 * PAGE).unwrap();
        here.write(&piece, &there.remote().unwrap(), None).unwrap();
        good(here.wait(LIMIT).unwrap());
        there.deliver(0, 2 * PAGE).unwrap();
    }
    drop((buffer, card));
    // As an export of the place itself shows it.
    let provenance = bar(PAGE).provenance().clone();
    for (seed, part, at) in [(1, 0, 7 * GIB - PAGE), (1, 1, GIB), (2, 0, 2 * GIB)] {
        let (fd, _) = node.export(Some(at), PAGE).unwrap();
        let seen = Buffer::from_dmabuf(DmaBuf::from_fd(fd).unwrap(), provenance.clone());
        let at_part = (part * PAGE) as usize..((part + 1) * PAGE) as usize;
        assert!(
            get(&seen.whole()) == random(2 * PAGE, seed)[at_part],
            "{at:#x}"
        );
    }
    assert_all_free(&node);
}

/// What one connection says of a write of as many bytes as `to` has.
fn write(card: &Card, to: &Remote) -> Result<u64, Status> {
    let source = memfd::export("source", to.len()).unwrap().whole();
    put(&source, &vec![0xee; to.len() as usize]);
    let source = card.register(&source, None).unwrap();
    let (mut here, _peer) = connected(card, 4);
    let piece = source.slice(0, to.len()).unwrap();
    here.write(&piece, to, None).unwrap();
    let done = here.wait(LIMIT).unwrap();
    done.result.map_err(|error| error.status)
}

/// The same memory as `of`, by other numbers.
fn forged(of: &Remote, address: u64, length: u64) -> Remote {
    let mut bytes = of.to_bytes();
    bytes[..8].copy_from_slice(&address.to_be_bytes());
    bytes[8..16].copy_from_slice(&length.to_be_bytes());
    Remote::from_bytes(&bytes).unwrap()
}

#[test]
fn a_registration_longer_than_4_gib_is_used_to_its_last_byte_and_no_further() {
    const PIECE: u64 = 32 << 10;
    let node = node();
    let card = card();
    if !takes_dma_bufs() {
        // All of it would be system memory, pinned.
        return;
    }
    let buffer = bar(SIZE);
    let size = buffer.size();
    let all = card.register(&buffer.whole(), ALL).unwrap();
    assert_eq!((all.rung(), all.len()), (Rung::DmaBufByKernel, size));
    let remote = all.remote().unwrap();
    assert_eq!(remote.len(), size);
    let places = [0, PIECE, BOUND - PIECE, BOUND, size - PIECE];
    let at = |n: usize| buffer.range(places[n], PIECE).unwrap();
    let other = memfd::export("other end", PIECE).unwrap().whole();
    let mine = card.register(&other, ALL).unwrap();
    let piece = mine.slice(0, PIECE).unwrap();
    let (mut here, mut there) = connected(&card, 16);

    // From afar, each place with bytes of its own; all are there after the last.
    for (seed, place) in (1..).zip(places) {
        put(&other, &random(PIECE, seed));
        let to = remote.slice(place, PIECE).unwrap();
        here.write(&piece, &to, None).unwrap();
        assert_eq!(good(here.wait(LIMIT).unwrap()), PIECE);
    }
    let holds = |seeds: [u64; 5], what: &str| {
        for (n, seed) in seeds.into_iter().enumerate() {
            assert!(get(&at(n)) == random(PIECE, seed), "{what}: place {n}");
        }
    };
    holds([1, 2, 3, 4, 5], "written");
    for (seed, place) in (1..).zip(places) {
        let from = remote.slice(place, PIECE).unwrap();
        here.read(&piece, &from).unwrap();
        good(here.wait(LIMIT).unwrap());
        assert!(get(&other) == random(PIECE, seed), "read at {place:#x}");
    }
    // By this end: from the last pages to the first, and across the bound to the last.
    for (from, to, length) in [
        (size - PIECE, 0, PIECE),
        (BOUND - PIECE / 2, size - PIECE, PIECE),
    ] {
        let from = all.slice(from, length).unwrap();
        there
            .write(&from, &remote.slice(to, length).unwrap(), None)
            .unwrap();
        assert_eq!(good(there.wait(LIMIT).unwrap()), length);
    }
    let half = PIECE as usize / 2;
    let across = [&random(PIECE, 3)[half..], &random(PIECE, 4)[..half]].concat();
    assert!(get(&at(4)) == across);
    put(&at(4), &random(PIECE, 6));
    let last = remote.slice(size - PIECE, PIECE).unwrap();
    there
        .read(&all.slice(BOUND - PIECE, PIECE).unwrap(), &last)
        .unwrap();
    good(there.wait(LIMIT).unwrap());
    holds([5, 2, 6, 4, 6], "by this end");

    // What would be inside if a number were cut to 32 bits.
    for (what, address, length) in [
        ("over the end", size - 8, 16),
        ("behind the end", size, 16),
        ("far behind it", size + BOUND, 16),
        ("at the last address", u64::MAX - 16, 16),
    ] {
        let refused = write(&card, &forged(&remote, address, length));
        assert_eq!(refused, Err(Status::REMOTE_ACCESS), "{what}");
    }
    let long = all.slice(0, BOUND + 16).unwrap();
    let refused = here.write(&long, &remote.slice(0, BOUND + 16).unwrap(), None);
    assert!(
        matches!(refused, Err(RdmaError::Mismatch { .. })),
        "{refused:?}"
    );
    holds([5, 2, 6, 4, 6], "refused");

    // One that begins in the middle.
    let middle = buffer.range(2 * GIB, 5 * GIB).unwrap();
    let part = card.register(&middle, ALL).unwrap();
    let remote = part.remote().unwrap();
    for (what, address) in [("before it", 2 * GIB - 16), ("behind it", 7 * GIB)] {
        let refused = write(&card, &forged(&remote, address, 16));
        assert_eq!(refused, Err(Status::REMOTE_ACCESS), "{what}");
    }
    let seen = buffer.range(7 * GIB - 17, 18).unwrap();
    put(&seen, &[0; 18]);
    let end = remote.slice(5 * GIB - 16, 16).unwrap();
    assert_eq!(write(&card, &end), Ok(16));
    let mut expected = [0xee; 18];
    (expected[0], expected[17]) = (0, 0);
    assert_eq!(get(&seen), expected);
    holds([5, 2, 6, 4, 6], "by a part");
    drop((all, part, middle, seen, long, piece, mine));
    drop((here, there, card, buffer));
    assert_all_free(&node);
}
