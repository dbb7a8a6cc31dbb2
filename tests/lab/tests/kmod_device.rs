//! Real DMA through the mappings: QEMU's `edu`, with a driver that imports dma-bufs, reads and writes buffers
//! of every layout through the host bridge. The CPU checks every byte, and that no other byte changed. Runs
//! in the guest.

use std::os::fd::{AsFd, OwnedFd};

use peerbuf_lab_suite::edu::{CHUNK, Edu, Kind};
use peerbuf_lab_suite::node::{
    MIB, Map, Node, PAGE, assert_all_free, differs, errno, fill, nvme_bdf, open_provider, pattern,
};
use peerbuf_uapi::{self as abi, PLACEMENT_DEVICE, PLACEMENT_MIXED, PLACEMENT_SYSTEM};

const GIB: u64 = 1 << 30;

fn range(offset: u64, length: u64, flags: u32) -> abi::Range {
    abi::Range {
        offset,
        length,
        flags,
        ..Default::default()
    }
}

fn map(fd: &OwnedFd, len: u64) -> Map {
    Map::new(fd.as_fd(), len as usize, true).unwrap()
}

/// The bytes that [`fill`] writes.
fn filled(at: u64, len: usize, salt: u64) -> Vec<u8> {
    let words = (at as usize..at as usize + len).step_by(8);
    words
        .flat_map(|at| pattern(salt, at).to_ne_bytes())
        .collect()
}

/// The device reads and writes `places` of a buffer, [`CHUNK`] bytes each. The CPU checks that no other byte
/// changes.
fn reaches(edu: &Edu, seen: &Map, places: &[u64]) {
    fill(seen, 0, seen.len, 1);
    for &at in places {
        assert_eq!(
            edu.read(at, CHUNK).unwrap(),
            filled(at, CHUNK, 1),
            "read at {at:#x}"
        );
        edu.write(at, &filled(at, CHUNK, 2)).unwrap();
    }
    for at in (0..seen.len).step_by(8) {
        let written = places
            .iter()
            .any(|&place| (place..place + CHUNK as u64).contains(&(at as u64)));
        let expected = pattern(if written { 2 } else { 1 }, at);
        assert_eq!(seen.read(at), expected, "at {at:#x}");
    }
}

/// The offsets of the first and the last [`CHUNK`] bytes of each part between two bounds.
fn edges(bounds: &[u64]) -> Vec<u64> {
    let chunk = CHUNK as u64;
    let mut places: Vec<u64> = bounds[..bounds.len() - 1].to_vec();
    places.extend(bounds[1..].iter().map(|end| end - chunk));
    places.sort_unstable();
    places.dedup();
    places
}

#[test]
fn each_byte_of_the_bar_is_where_the_list_says() {
    for node in Node::all() {
        let size = node.bar2().size.min(4 * MIB) / 2;
        let (fd, offset) = node.export(Some(3 * PAGE), size).unwrap();
        let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
        assert_eq!(edu.segments(), 1, "{}", node.bdf);
        let seen = map(&fd, size);
        reaches(&edu, &seen, &edges(&[0, size / 2 + PAGE, size]));
        // Another export of the same range has the same bytes: the device accessed the BAR itself.
        let first = seen.read(0);
        drop((edu, seen, fd));
        let (again, _) = node.export(Some(offset), PAGE).unwrap();
        assert_eq!(map(&again, PAGE).read(0), first);
        drop(again);
        assert_all_free(&node);
    }
}

#[test]
fn ranges_are_in_the_callers_order_and_a_transfer_may_cross_from_one_to_the_next() {
    let node = Node::largest();
    // The third range follows the second in the BAR, too, so one entry may cover both.
    let of_the_bar = [
        range(9 * MIB, MIB, 0),
        range(MIB, 2 * PAGE, 0),
        range(MIB + 2 * PAGE, PAGE, 0),
        range(5 * MIB, MIB / 2, 0),
    ];
    let (first, second, third) = (MIB, MIB + 2 * PAGE, MIB + 3 * PAGE);
    // Half in one range, half in the next.
    let across = first - PAGE / 2;
    let system = [range(0, 3 * PAGE, abi::RANGE_SYSTEM)];
    let mut ranges = [&of_the_bar[..], &system].concat();
    let (fd, len) = node.export_ranges(0, &mut ranges).unwrap();
    let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
    let places = [0, across, second, third, len - 4 * PAGE, len - PAGE];
    reaches(&edu, &map(&fd, len), &places);
    drop((edu, fd));

    let (fd, len) = node.export_ranges(0, &mut of_the_bar.clone()).unwrap();
    let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
    assert!(edu.segments() >= 3, "{}", edu.segments());
    let seen = map(&fd, len);
    let places = [0, across, first + PAGE, second, third, len - PAGE];
    reaches(&edu, &seen, &places);
    drop((edu, seen, fd));
    // A separate export of the second range has the bytes that the device wrote.
    let (part, _) = node.export(Some(MIB), 2 * PAGE).unwrap();
    let seen = map(&part, 2 * PAGE);
    assert_eq!(
        seen.read(PAGE as usize),
        pattern(2, (first + PAGE) as usize)
    );
    drop((seen, part));
    assert_all_free(&node);
}

#[test]
fn a_buffer_that_moves_is_reached_in_each_place() {
    const LEN: u64 = 64 * PAGE;
    let node = Node::largest();
    let (fd, _) = node.export(None, LEN).unwrap();
    let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
    let seen = map(&fd, LEN);
    let mut told = 0;
    for (placement, from, pages) in [
        (PLACEMENT_SYSTEM, 0, 64),
        (PLACEMENT_DEVICE, 0, 64),
        // A part in the middle, and a part outside it.
        (PLACEMENT_SYSTEM, 9, 5),
        (PLACEMENT_SYSTEM, 40, 20),
        (PLACEMENT_DEVICE, 12, 30),
    ] {
        node.move_part(&fd, placement, from * PAGE, pages * PAGE, 5000)
            .unwrap_or_else(|e| panic!("{placement} {from} {pages}: {e}"));
        told += 1;
        assert_eq!(edu.stale(), told);
        edu.remap().unwrap();
        let (_, pieces) = node.buffer_lists(&fd).unwrap();
        let mut bounds: Vec<u64> = pieces.iter().map(|piece| piece.offset).collect();
        bounds.push(LEN);
        reaches(&edu, &seen, &edges(&bounds));
    }
    assert_eq!(node.buffer(&fd).unwrap().placement, PLACEMENT_MIXED);
    drop((edu, seen, fd));
    assert_all_free(&node);
}

#[test]
fn who_takes_no_peer_memory_reaches_the_same_bytes() {
    const LEN: u64 = 16 * PAGE;
    let node = Node::largest();
    for kind in [Kind::Dynamic, Kind::Static] {
        let (fixed, _) = node.export(None, LEN).unwrap();
        assert_eq!(
            errno(Edu::import(fixed.as_fd(), kind)),
            libc::EOPNOTSUPP,
            "{kind:?}"
        );
        drop(fixed);
        let fd = node.export_movable(LEN).unwrap();
        let seen = map(&fd, LEN);
        fill(&seen, 0, LEN as usize, 7);
        let edu = Edu::import(fd.as_fd(), kind).unwrap();
        assert_eq!(node.buffer(&fd).unwrap().placement, PLACEMENT_SYSTEM);
        assert_eq!(
            edu.read(5 * PAGE, CHUNK).unwrap(),
            filled(5 * PAGE, CHUNK, 7)
        );
        reaches(&edu, &seen, &edges(&[0, 3 * PAGE, LEN]));
        drop((edu, seen, fd));
        assert_all_free(&node);
    }
}

#[test]
fn system_pages_under_an_old_mapping_are_nobody_elses() {
    const LEN: u64 = 4 * MIB;
    let node = Node::largest();
    let (fd, _) = node.export(None, LEN).unwrap();
    let seen = map(&fd, LEN);
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
    let places = edges(&[0, LEN / 2, LEN]);
    reaches(&edu, &seen, &places);
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    assert_eq!(edu.stale(), 1);
    fill(&seen, 0, LEN as usize, 3);
    // An allocation of the same kind would get these pages if they were free, and overwrite them.
    let mut ranges = [range(0, 4 * LEN, abi::RANGE_SYSTEM)];
    let (other, _) = node.export_ranges(0, &mut ranges).unwrap();
    let others = map(&other, 4 * LEN);
    fill(&others, 0, others.len, 5);
    for &at in &places {
        assert_eq!(
            edu.read(at, CHUNK).unwrap(),
            filled(at, CHUNK, 2),
            "at {at:#x}"
        );
        edu.write(at, &filled(at, CHUNK, 4)).unwrap();
    }
    assert_eq!(differs(&others, 0, others.len, 5), None);
    drop((others, other));
    assert_eq!(differs(&seen, 0, LEN as usize, 3), None);
    edu.remap().unwrap();
    assert_eq!(edu.read(0, CHUNK).unwrap(), filled(0, CHUNK, 3));
    drop((edu, seen, fd));
    assert_all_free(&node);
}

#[test]
fn the_place_in_the_bar_under_an_old_mapping_is_nobody_elses() {
    const LEN: u64 = 8 * PAGE;
    let node = Node::largest();
    let (fd, offset) = node.export(None, LEN).unwrap();
    let seen = map(&fd, LEN);
    let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    fill(&seen, 0, LEN as usize, 1);
    edu.write(PAGE, &filled(PAGE, CHUNK, 9)).unwrap();
    assert_eq!(differs(&seen, 0, LEN as usize, 1), None);
    drop((seen, fd));
    // No descriptor of the buffer is left, but the device can still access its range.
    assert_eq!(errno(node.export(Some(offset), PAGE)), libc::EBUSY);
    assert_eq!(edu.read(PAGE, CHUNK).unwrap(), filled(PAGE, CHUNK, 9));
    drop(edu);
    let (again, _) = node.export(Some(offset), LEN).unwrap();
    assert_eq!(
        map(&again, LEN).read(PAGE as usize),
        pattern(9, PAGE as usize)
    );
    drop(again);
    assert_all_free(&node);
}

#[test]
fn memory_that_another_driver_lends_is_reached_where_it_is() {
    let provider = open_provider(&nvme_bdf()).unwrap();
    let mut ranges = [
        range(0, 4 * PAGE, abi::RANGE_ANY_OFFSET),
        range(0, 2 * PAGE, abi::RANGE_SYSTEM),
    ];
    let (fd, len) = provider.export_ranges(0, &mut ranges).unwrap();
    let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
    reaches(&edu, &map(&fd, len), &edges(&[0, 4 * PAGE, len]));
}

#[test]
fn bytes_past_4_gib_are_not_those_below() {
    let node = Node::largest();
    assert_eq!(node.bar2().size, 8 * GIB, "run with --bar-size 8G");
    let mut ranges = [
        range(3 * GIB, 5 * GIB, 0),
        range(0, MIB, abi::RANGE_SYSTEM),
        range(0, GIB, 0),
    ];
    let (fd, _) = node.export_ranges(0, &mut ranges).unwrap();
    let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
    let window = |at: u64| {
        let flags = libc::MAP_SHARED;
        Map::with(fd.as_fd(), MIB as usize, at as i64, true, flags).unwrap()
    };
    // Offsets 4 GiB apart, and offsets behind them.
    let places = [0, GIB, 4 * GIB, 5 * GIB - MIB, 5 * GIB, 5 * GIB + MIB];
    let windows = places.map(window);
    for (salt, map) in (1..).zip(&windows) {
        fill(map, 0, MIB as usize, salt);
    }
    for ((salt, map), at) in (1..).zip(&windows).zip(places) {
        let last = MIB - CHUNK as u64;
        assert_eq!(
            edu.read(at + last, CHUNK).unwrap(),
            filled(last, CHUNK, salt),
            "{at:#x}"
        );
        edu.write(at, &filled(0, CHUNK, salt + 100)).unwrap();
        assert_eq!(differs(map, 0, CHUNK, salt + 100), None, "{at:#x}");
        fill(map, 0, CHUNK, salt);
    }
    for (salt, map) in (1..).zip(&windows) {
        assert_eq!(differs(map, 0, MIB as usize, salt), None, "{salt}");
    }
}
