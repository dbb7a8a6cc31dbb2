//! Registrations longer than 4 GiB: on a BAR of 8 GiB, of which the host allocates only touched pages, and on
//! memory. Runs in the guest. A number truncated to 32 bits would access other bytes, 4 GiB lower or at the
//! start, so the tests check those, too.

use peerbuf::export::memfd;
use peerbuf::{Buffer, BufferRange, DmaBuf};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::node::{Node, PAGE, assert_all_free};
use peerbuf_lab_suite::rdma::{
    ALL, Under, bar, card, connected, exercise, expected, good, limit, random,
};
use peerbuf_rdma::Card;
use peerbuf_uapi as abi;

const GIB: u64 = 1 << 30;
const BOUND: u64 = 4 * GIB;
const SIZE: u64 = 8 * GIB;

fn node() -> Node {
    let node = Node::largest();
    assert_eq!(node.bar2().size, SIZE, "run with --bar-size 8G");
    node
}

/// `length` bytes at `at`, with a page on either side as far as the buffer reaches.
fn around(buffer: &Buffer, at: u64, length: u64) -> BufferRange {
    let begin = at.saturating_sub(PAGE);
    let end = (at + length + PAGE).min(buffer.size());
    buffer.range(begin, end - begin).unwrap()
}

/// The bytes that truncated numbers would access instead of the part of a range beyond 4 GiB.
fn shadow(range: &BufferRange) -> BufferRange {
    let end = range.offset() + range.len();
    let begin = range.offset().max(BOUND);
    around(range.buffer(), begin - BOUND, end - begin)
}

/// Runs [`exercise`] on each rung that can register such a buffer.
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

    // Across the boundary of the ranges, and beyond 4 GiB, which is at 2 GiB in the BAR.
    for (seed, at) in [(1, 3 * GIB - PAGE), (2, BOUND)] {
        let there = buffer.range(at, 2 * PAGE).unwrap();
        let there = card.register(&there, ALL).unwrap();
        let source = memfd::export("source", 2 * PAGE).unwrap().whole();
        put(&source, &random(2 * PAGE, seed));
        let source = card.register(&source, None).unwrap();
        let (mut here, _peer) = connected(&card, 4);
        let piece = source.slice(0, 2 * PAGE).unwrap();
        here.write(&piece, &there.remote().unwrap(), None).unwrap();
        good(here.wait(limit()).unwrap());
        there.deliver(0, 2 * PAGE).unwrap();
    }
    drop((buffer, card));
    // Compared with an export of the range itself.
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
