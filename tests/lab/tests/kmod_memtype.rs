//! The memory type of the CPU's mappings: each page has that of its place. Runs in the guest.

use std::fs;
use std::os::fd::AsFd;

use peerbuf::Access;
use peerbuf::export::peerbuf::{Device, RangeRequest, RangesRequest};
use peerbuf_lab_suite::memtype::{MemoryType, listed, of_page};
use peerbuf_lab_suite::node::{
    Map, Node, PAGE, SYNC_END, SYNC_READ, SYNC_WRITE, assert_all_free, differs, fill, sync,
};
use peerbuf_uapi::{self as abi, PLACEMENT_DEVICE, PLACEMENT_SYSTEM};

const PAGES: usize = 8;

/// The type of each page.
fn types(map: &Map) -> Vec<MemoryType> {
    (0..map.len)
        .step_by(PAGE as usize)
        .map(|at| {
            map.read(at);
            of_page(map, at)
        })
        .collect()
}

#[test]
fn each_page_of_a_mixed_mapping_has_the_memory_type_of_its_place() {
    // With struct pages, and without.
    for node in Node::all() {
        let (fd, _) = node.export(None, PAGES as u64 * PAGE).unwrap();
        let seen = Map::new(fd.as_fd(), PAGES * PAGE as usize, true).unwrap();
        let device = types(&seen)[0];
        assert_ne!(device, MemoryType::Cached, "{}", node.bdf);
        assert_eq!(types(&seen), vec![device; PAGES]);
        let mut expected = vec![device; PAGES];
        for (placement, from, count, there) in [
            (PLACEMENT_SYSTEM, 2, 3, MemoryType::Cached),
            (PLACEMENT_SYSTEM, 7, 1, MemoryType::Cached),
            (PLACEMENT_DEVICE, 3, 1, device),
        ] {
            node.move_part(&fd, placement, from as u64 * PAGE, count * PAGE, 5000)
                .unwrap();
            expected[from..from + count as usize].fill(there);
            assert_eq!(types(&seen), expected, "{}", node.bdf);
        }
        // What changes the pages' permissions leaves their types, and new pages have theirs.
        for protection in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
            // SAFETY: The test's own mapping, which is only read meanwhile.
            let done = unsafe { libc::mprotect(seen.as_ptr(), seen.len, protection) };
            assert_eq!(done, 0);
            assert_eq!(types(&seen), expected, "{}", node.bdf);
        }
        node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
        assert_eq!(types(&seen), vec![MemoryType::Cached; PAGES]);
        node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
        assert_eq!(types(&seen), vec![device; PAGES]);
        drop((seen, fd));
        assert_all_free(&node);
    }
}

/// The physical address of a node's BAR 2.
fn start(bdf: &str) -> u64 {
    let text = fs::read_to_string(format!("/sys/bus/pci/devices/{bdf}/resource")).unwrap();
    let field = text.lines().nth(2).unwrap().split(' ').next().unwrap();
    u64::from_str_radix(field.trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn a_prefetchable_bar_is_write_combining_unless_asked_otherwise() {
    let mut combining = 0;
    for node in Node::all() {
        let bar = node.bar2();
        let combines = bar.flags & abi::BAR_WRITE_COMBINING != 0;
        combining += u32::from(combines);
        // The kernel's own mapping of the BAR is of the same type, as the list says.
        let expected = match combines {
            true => ("write-combining", MemoryType::WriteCombining),
            false => ("uncached-minus", MemoryType::Uncached),
        };
        let list = listed(start(&node.bdf));
        assert!(!list.is_empty(), "{}", node.bdf);
        assert!(
            list.iter().all(|name| name == expected.0),
            "{}: {list:?}",
            node.bdf
        );
        for (flags, memory) in [
            (0, expected.1),
            (abi::EXPORT_UNCACHED, MemoryType::Uncached),
        ] {
            let mut request = Node::request(None, PAGES as u64 * PAGE);
            request.export.flags |= flags;
            let (fd, _) = node.export_request(request).unwrap();
            let seen = Map::new(fd.as_fd(), PAGES * PAGE as usize, true).unwrap();
            assert_eq!(types(&seen), vec![memory; PAGES], "{}", node.bdf);
            // What one mapping wrote another one reads after the end of the access.
            sync(&fd, SYNC_WRITE).unwrap();
            fill(&seen, 0, seen.len, 3);
            sync(&fd, SYNC_WRITE | SYNC_END).unwrap();
            let other = Map::new(fd.as_fd(), seen.len, false).unwrap();
            sync(&fd, SYNC_READ).unwrap();
            assert_eq!(differs(&other, 0, other.len, 3), None);
            sync(&fd, SYNC_READ | SYNC_END).unwrap();
        }
        assert_all_free(&node);
    }
    assert_eq!(combining, 2, "two of the lab's BARs have struct pages");
}

#[test]
fn the_list_has_no_entry_of_a_device_that_is_not_bound() {
    let node = Node::largest();
    let (bdf, start) = (node.bdf.clone(), start(&node.bdf));
    drop(node);
    for _ in 0..2 {
        assert!(!listed(start).is_empty());
        Node::unbind(&bdf);
        assert_eq!(listed(start), [""; 0]);
        Node::bind(&bdf);
    }
}

#[test]
fn the_crate_asks_for_uncached_mappings() {
    let node = Node::largest();
    let device = Device::open(node.bdf.parse().unwrap()).unwrap();
    assert!(
        device
            .query()
            .unwrap()
            .exportable()
            .unwrap()
            .write_combining
    );
    for (uncached, memory) in [
        (false, MemoryType::WriteCombining),
        (true, MemoryType::Uncached),
    ] {
        let request = RangesRequest {
            bar: 2,
            ranges: vec![RangeRequest::Bar {
                offset: None,
                length: PAGE,
            }],
            may_move: false,
            devices_read: false,
            uncached,
            access: Access::ReadWrite,
        };
        let buffer = device.export_ranges(&request).unwrap();
        let fd = buffer.dmabuf().unwrap().as_fd();
        assert_eq!(types(&Map::new(fd, PAGE as usize, true).unwrap()), [memory]);
    }
}
