//! A kernel that bounces all DMA (`swiotlb=force`, as encrypted guests do): a bounce buffer takes 256 KiB at
//! most, and device memory cannot be bounced. Real DMA by QEMU's `edu`, through the host bridge. Runs in the
//! guest.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use peerbuf_lab_suite::edu::{CHUNK, Edu, Kind};
use peerbuf_lab_suite::node::{
    MIB, Map, Node, PAGE, SYNC_END, SYNC_READ, SYNC_WRITE, assert_all_free, differs, errno, fill,
    pattern, sync,
};
use peerbuf_uapi::{self as abi, PLACEMENT_DEVICE, PLACEMENT_SYSTEM};

/// The longest bounce buffer (`IO_TLB_SEGSIZE` slots of `IO_TLB_SIZE` bytes).
const LIMIT: u64 = 256 << 10;

/// Bytes of bounce buffers in use.
fn bounced() -> u64 {
    let text = fs::read_to_string("/sys/kernel/debug/swiotlb/io_tlb_used").unwrap();
    text.trim().parse::<u64>().unwrap() * 2048
}

/// The bytes that [`fill`] writes.
fn filled(at: u64, len: usize, salt: u64) -> Vec<u8> {
    let words = (at as usize..at as usize + len).step_by(8);
    words
        .flat_map(|at| pattern(salt, at).to_ne_bytes())
        .collect()
}

/// `len` bytes travel in both directions between the device and the CPU, by way of bounce buffers. The CPU
/// brackets its accesses, as it must: the device has a copy.
fn reaches(edu: &Edu, fd: &OwnedFd, len: u64) {
    assert!(
        u64::from(edu.segments()) >= len / LIMIT,
        "{}",
        edu.segments()
    );
    let seen = Map::new(fd.as_fd(), len as usize, true).unwrap();
    sync(fd, SYNC_WRITE).unwrap();
    fill(&seen, 0, seen.len, 1);
    sync(fd, SYNC_WRITE | SYNC_END).unwrap();
    let places = [0, LIMIT - PAGE, LIMIT, len / 2, len - PAGE];
    for at in places {
        assert_eq!(
            edu.read(at, CHUNK).unwrap(),
            filled(at, CHUNK, 1),
            "{at:#x}"
        );
        edu.write(at, &filled(at, CHUNK, 2)).unwrap();
    }
    sync(fd, SYNC_READ).unwrap();
    for at in (0..seen.len).step_by(8) {
        let written = places
            .iter()
            .any(|&place| (place..place + CHUNK as u64).contains(&(at as u64)));
        assert_eq!(
            seen.read(at),
            pattern(if written { 2 } else { 1 }, at),
            "{at:#x}"
        );
    }
    sync(fd, SYNC_READ | SYNC_END).unwrap();
}

#[test]
fn memory_that_moved_for_an_importer_is_bounced_in_parts_that_fit() {
    const LEN: u64 = 4 * MIB;
    let node = Node::largest();
    for kind in [Kind::Dynamic, Kind::Static] {
        let before = bounced();
        let fd = node.export_movable(LEN).unwrap();
        let edu = Edu::import(fd.as_fd(), kind).unwrap();
        assert_eq!(node.buffer(&fd).unwrap().placement, PLACEMENT_SYSTEM);
        assert_eq!(bounced() - before, LEN, "run with --boot swiotlb=force");
        reaches(&edu, &fd, LEN);
        drop((edu, fd));
        assert_eq!(bounced(), before);
        assert_all_free(&node);
    }
}

#[test]
fn a_buffer_that_was_mixed_is_bounced_in_parts_that_fit() {
    let node = Node::largest();
    let range = |length: u64, flags: u32| abi::Range {
        length,
        flags,
        ..Default::default()
    };
    let mut ranges = [
        range(MIB, abi::RANGE_ANY_OFFSET),
        range(2 * MIB, abi::RANGE_SYSTEM),
        range(3 * PAGE, abi::RANGE_ANY_OFFSET),
    ];
    let (fd, len) = node
        .export_ranges(abi::EXPORT_MAY_MOVE, &mut ranges)
        .unwrap();
    let seen = Map::new(fd.as_fd(), len as usize, true).unwrap();
    fill(&seen, 0, len as usize, 5);
    let edu = Edu::import(fd.as_fd(), Kind::Dynamic).unwrap();
    assert_eq!(
        edu.read(len - PAGE, CHUNK).unwrap(),
        filled(len - PAGE, CHUNK, 5)
    );
    assert_eq!(differs(&seen, 0, len as usize, 5), None);
    reaches(&edu, &fd, len);
    drop((edu, seen, fd));
    assert_all_free(&node);
}

#[test]
fn a_peer_whose_dma_is_bounced_has_no_route_to_the_bar() {
    const LEN: u64 = MIB;
    let node = Node::largest();
    let (fixed, _) = node.export(None, LEN).unwrap();
    let refused = errno(Edu::import(fixed.as_fd(), Kind::Peer));
    assert_eq!(refused, libc::EREMOTEIO);
    let query = node.buffer(&fixed).unwrap();
    assert_eq!(query.refused_reason, abi::REFUSED_NO_ROUTE);
    assert_eq!(query.placement, PLACEMENT_DEVICE);
    drop(fixed);

    let fd = node.export_movable(LEN).unwrap();
    let edu = Edu::import(fd.as_fd(), Kind::Peer).unwrap();
    assert_eq!(node.buffer(&fd).unwrap().placement, PLACEMENT_SYSTEM);
    reaches(&edu, &fd, LEN);
    drop((edu, fd));
    assert_all_free(&node);
}

#[test]
fn more_than_there_are_bounce_buffers_is_refused_and_takes_none() {
    let node = Node::largest();
    let before = bounced();
    // There are 64 MiB of them by default.
    let mut ranges = [abi::Range {
        length: 80 * MIB,
        flags: abi::RANGE_SYSTEM,
        ..Default::default()
    }];
    let (fd, _) = node.export_ranges(0, &mut ranges).unwrap();
    assert_eq!(errno(Edu::import(fd.as_fd(), Kind::Dynamic)), libc::EIO);
    assert_eq!(bounced(), before);
    assert_eq!(node.buffer(&fd).unwrap().maps, 0);
    drop(fd);
    assert_all_free(&node);
}
