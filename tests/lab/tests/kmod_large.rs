//! Buffers longer than 4 GiB, on a BAR of 8 GiB of which the host allocates only touched pages. Runs in the
//! guest. Each test writes different words 4 GiB apart, which would reveal an offset truncated to 32 bits.

use std::os::fd::{AsFd, OwnedFd};

use peerbuf_lab_suite::disk::{SCRATCH, open_direct, read_into, write_from};
use peerbuf_lab_suite::importer::{DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::node::{
    MIB, Map, Node, PAGE, assert_all_free, differs, errno, fill, nvme_bdf,
};
use peerbuf_uapi as abi;

const GIB: u64 = 1 << 30;
const BOUND: u64 = 4 * GIB;

/// A window of a buffer.
fn window(fd: &OwnedFd, offset: u64, len: u64) -> Map {
    Map::with(
        fd.as_fd(),
        len as usize,
        offset as i64,
        true,
        libc::MAP_SHARED,
    )
    .unwrap()
}

fn card() -> Node {
    let node = Node::largest();
    assert_eq!(node.bar2().size, 8 * GIB, "run with --bar-size 8G");
    node
}

#[test]
fn the_processor_and_the_disk_reach_bytes_past_4_gib() {
    let node = card();
    let (fd, offset) = node.export(Some(0), 6 * GIB).unwrap();
    assert_eq!(offset, 0);
    // A window across 4 GiB, and one at the offset that a truncation would access.
    let len = MIB as usize;
    let across = window(&fd, BOUND - MIB / 2, MIB);
    let (low, high) = (window(&fd, 0, MIB), window(&fd, 5 * GIB, MIB));
    for (salt, map) in [(1, &low), (2, &across), (3, &high)] {
        fill(map, 0, len, salt);
    }
    let disk = open_direct(SCRATCH).unwrap();
    for (at, map) in [(0, &across), (MIB as i64, &high)] {
        assert_eq!(write_from(&disk, map, 0, len, at).unwrap(), len);
    }
    // Read back, each to the other's place.
    assert_eq!(read_into(&disk, &high, 0, len, 0).unwrap(), len);
    assert_eq!(read_into(&disk, &across, 0, len, MIB as i64).unwrap(), len);
    for (salt, map) in [(1, &low), (3, &across), (2, &high)] {
        assert_eq!(differs(map, 0, len, salt), None, "{salt}");
    }
    // An export of the range itself has the same bytes.
    drop((low, across, high, fd));
    let (fd, _) = node.export(Some(BOUND), MIB / 2).unwrap();
    let seen = window(&fd, 0, MIB / 2);
    let half = len / 2;
    let word = |i: usize| peerbuf_lab_suite::node::pattern(3, half + i);
    assert!((0..half).step_by(8).all(|i| seen.read(i) == word(i)));
    drop((seen, fd));
    assert_all_free(&node);
}

#[test]
fn an_importer_gets_every_byte_of_a_list_past_4_gib() {
    let node = card();
    let (fd, _) = node.export(None, 6 * GIB).unwrap();
    let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    importer.map().unwrap();
    let state = importer.query();
    assert_eq!((state.bytes, state.bus_bytes), (6 * GIB, 6 * GIB));
    // An entry's length has 32 bits.
    assert_eq!(state.segments, 2);
    drop((importer, fd));

    // System memory after 5 GiB of the BAR, in one list.
    let range = |flags, offset, length| abi::Range {
        offset,
        length,
        flags,
        ..Default::default()
    };
    let mut ranges = [
        range(0, 3 * GIB, 5 * GIB),
        range(abi::RANGE_SYSTEM, 0, MIB),
        range(0, 0, GIB),
    ];
    let (fd, len) = node.export_ranges(0, &mut ranges).unwrap();
    assert_eq!(len, 6 * GIB + MIB);
    let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    importer.map().unwrap();
    let state = importer.query();
    assert_eq!((state.bytes, state.system_bytes), (len, MIB));
    assert_eq!(state.bus_bytes, 6 * GIB);
    drop((importer, fd));
    assert_all_free(&node);
}

#[test]
fn ranges_whose_sum_passes_4_gib_hold_the_callers_order() {
    let node = card();
    let range = |offset, length| abi::Range {
        offset,
        length,
        ..Default::default()
    };
    let mut ranges = [range(4 * GIB, 3 * GIB), range(GIB, 2 * GIB)];
    let (fd, len) = node.export_ranges(0, &mut ranges).unwrap();
    assert_eq!(len, 5 * GIB);
    // At the boundary of the ranges, and beyond 4 GiB in the buffer, which is at 2 GiB in the BAR.
    for (salt, at) in [(1, 3 * GIB - PAGE), (2, 3 * GIB), (3, 4 * GIB), (4, 0)] {
        fill(&window(&fd, at, PAGE), 0, PAGE as usize, salt);
    }
    drop(fd);
    for (salt, at) in [(1, 7 * GIB - PAGE), (2, GIB), (3, 2 * GIB), (4, 4 * GIB)] {
        let (fd, _) = node.export(Some(at), PAGE).unwrap();
        let seen = window(&fd, 0, PAGE);
        assert_eq!(differs(&seen, 0, PAGE as usize, salt), None, "{at:#x}");
    }
    assert_all_free(&node);
    // Invalid sums and ends beyond 4 GiB.
    for (offset, length, expected) in [
        (Some(7 * GIB), GIB + PAGE, libc::EINVAL),
        (Some(8 * GIB), PAGE, libc::EINVAL),
        (None, 8 * GIB + PAGE, libc::EINVAL),
        (Some(u64::MAX - PAGE + 1), 2 * PAGE, libc::EOVERFLOW),
    ] {
        assert_eq!(errno(node.export(offset, length)), expected, "{offset:?}");
    }
    let mut overlap = [range(5 * GIB, 2 * GIB), range(6 * GIB, PAGE)];
    assert_eq!(errno(node.export_ranges(0, &mut overlap)), libc::EBUSY);
    assert_all_free(&node);
}

#[test]
fn a_part_past_4_gib_moves_alone() {
    let node = card();
    let (fd, _) = node.export(Some(0), 8 * GIB).unwrap();
    let at = BOUND - MIB;
    let (part, low) = (window(&fd, at, 2 * MIB), window(&fd, 0, 2 * MIB));
    let high = window(&fd, 7 * GIB, 2 * MIB);
    let len = 2 * MIB as usize;
    for (salt, map) in [(1, &part), (2, &low), (3, &high)] {
        fill(map, 0, len, salt);
    }
    let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    for round in 0..2 {
        let to = |placement| node.move_part(&fd, placement, at, 2 * MIB, 5000).unwrap();
        assert_eq!(to(abi::PLACEMENT_SYSTEM).1, 2 * MIB);
        let (_, pieces) = node.buffer_lists(&fd).unwrap();
        let found: Vec<_> = pieces.iter().map(|p| (p.offset, p.length)).collect();
        let after = at + 2 * MIB;
        let expected = [(0, at), (at, 2 * MIB), (after, 8 * GIB - after)];
        assert_eq!(found, expected);
        importer.map().unwrap();
        let state = importer.query();
        assert_eq!((state.bytes, state.system_bytes), (8 * GIB, 2 * MIB));
        assert_eq!(differs(&part, 0, len, 1 + round), None);
        fill(&part, 0, len, 2 + round);
        assert_eq!(to(abi::PLACEMENT_DEVICE).1, 2 * MIB);
        assert_eq!(importer.state().mapped, 0);
        for (salt, map) in [(2 + round, &part), (2, &low), (3, &high)] {
            assert_eq!(differs(map, 0, len, salt), None, "{salt}");
        }
    }
    drop((importer, part, low, high, fd));
    assert_all_free(&node);
}
