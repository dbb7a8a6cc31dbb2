//! The memory type of the CPU's mappings: each page has that of its place. Runs in the guest.

use std::os::fd::AsFd;

use peerbuf_lab_suite::memtype::{MemoryType, of_page};
use peerbuf_lab_suite::node::{Map, Node, PAGE, assert_all_free};
use peerbuf_uapi::{PLACEMENT_DEVICE, PLACEMENT_SYSTEM};

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
