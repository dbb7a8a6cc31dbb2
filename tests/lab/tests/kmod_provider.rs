//! P2PDMA memory of another driver: the controller memory buffer of the NVMe disk, which stays bound to the
//! kernel's own driver. Runs in the guest.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, sleep};
use std::time::Duration;

use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::disk::{SCRATCH, Unmounted, open_direct, read_into, write_from};
use peerbuf_lab_suite::edu::Edu;
use peerbuf_lab_suite::importer::{self, DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::{
    MIB, Map, Node, PAGE, address, differs, errno, fill, in_child, nvme_bdf, open_provider,
    open_provider_at,
};
use peerbuf_lab_suite::pci::wait_until;
use peerbuf_uapi::{self as abi, probe};

const LEN: u64 = 2 * MIB;

/// Free bytes of the disk's pool.
fn available(bdf: &str) -> u64 {
    let path = format!("/sys/bus/pci/devices/{bdf}/p2pmem/available");
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// Waits for pages that the block layer frees a moment after its I/O completed.
fn assert_available(bdf: &str, bytes: u64) {
    let start = Stopwatch::start();
    while available(bdf) != bytes && start.elapsed() < Duration::from_secs(10) {
        sleep(Duration::from_millis(10));
    }
    assert_eq!(available(bdf), bytes);
}

fn map(fd: &OwnedFd, len: u64) -> Map {
    Map::new(fd.as_fd(), len as usize, true).unwrap()
}

#[test]
fn every_byte_of_lent_memory_goes_every_way_and_is_given_back() {
    let bdf = nvme_bdf();
    let before = available(&bdf);
    let provider = open_provider(&bdf).unwrap();
    let (fd, offset) = provider.export(None, LEN).unwrap();
    assert_eq!(available(&bdf), before - LEN);
    assert!(offset + LEN <= provider.bar2().size);
    assert_eq!(provider.bar2().exports, 1);
    let seen = map(&fd, LEN);
    let words = || (0..LEN as usize).step_by(8);
    assert!(words().all(|at| seen.read(at) == 0), "it begins as zeroes");

    // The CPU writes, the disk's DMA engine reads, and the disk writes back to another export.
    fill(&seen, 0, LEN as usize, 1);
    let disk = open_direct(SCRATCH).unwrap();
    let len = LEN as usize;
    assert_eq!(write_from(&disk, &seen, 0, len, 0).unwrap(), len);
    let (other, other_offset) = provider.export(None, LEN).unwrap();
    assert!(other_offset >= offset + LEN || other_offset + LEN <= offset);
    let other_seen = map(&other, LEN);
    assert_eq!(read_into(&disk, &other_seen, 0, len, 0).unwrap(), len);
    assert_eq!(differs(&other_seen, 0, len, 1), None);

    // An importer; here it is the disk itself, the owner of the memory.
    let importer = Importer::attach(fd.as_fd(), &bdf, DYNAMIC | PEER, 0).unwrap();
    importer.map().unwrap();
    let state = importer.query();
    assert_eq!(
        (state.bytes, state.bus_bytes + state.bridge_bytes),
        (LEN, LEN)
    );
    assert_eq!(state.provider, address(&bdf));

    // To system memory and back, in whole and in part.
    let query = |fd| provider.buffer(fd).unwrap();
    provider.move_to(&fd, abi::PLACEMENT_SYSTEM).unwrap();
    assert_eq!(importer.state().mapped, 0);
    assert_eq!(query(&fd).placement, abi::PLACEMENT_SYSTEM);
    assert_eq!(differs(&seen, 0, len, 1), None);
    fill(&seen, 0, len, 2);
    importer.map().unwrap();
    assert_eq!(importer.query().system_bytes, LEN);
    importer.unmap();
    let part = (PAGE, 7 * PAGE);
    provider
        .move_part(&fd, abi::PLACEMENT_DEVICE, part.0, part.1, 1000)
        .unwrap();
    assert_eq!(query(&fd).placement, abi::PLACEMENT_MIXED);
    assert_eq!(differs(&seen, 0, len, 2), None);
    provider.move_to(&fd, abi::PLACEMENT_DEVICE).unwrap();
    assert_eq!(differs(&seen, 0, len, 2), None);
    assert_eq!(write_from(&disk, &seen, 0, len, 0).unwrap(), len);
    assert_eq!(read_into(&disk, &other_seen, 0, len, 0).unwrap(), len);
    assert_eq!(differs(&other_seen, 0, len, 2), None);

    // Its range stays reserved while it is elsewhere, and is freed at its end.
    assert_eq!(available(&bdf), before - 2 * LEN);
    drop((importer, seen, other_seen, fd, other, provider));
    assert_available(&bdf, before);
}

#[test]
fn who_cannot_use_peer_memory_gets_it_in_system_memory() {
    let bdf = nvme_bdf();
    let before = available(&bdf);
    let provider = open_provider(&bdf).unwrap();
    let (fixed, _) = provider.export(None, PAGE).unwrap();
    let refused = Importer::attach(fixed.as_fd(), &bdf, DYNAMIC, 0);
    assert_eq!(errno(refused), libc::EOPNOTSUPP);
    let movable = provider.export_movable(LEN).unwrap();
    let seen = map(&movable, LEN);
    fill(&seen, 0, LEN as usize, 3);
    let importer = Importer::attach(movable.as_fd(), &bdf, 0, 0).unwrap();
    importer.map().unwrap();
    assert_eq!(importer.query().system_bytes, LEN);
    assert_eq!(differs(&seen, 0, LEN as usize, 3), None);
    drop((importer, seen, movable, fixed, provider));
    assert_available(&bdf, before);
}

#[test]
fn bad_requests_get_their_errno_and_take_nothing() {
    let bdf = nvme_bdf();
    let before = available(&bdf);
    let provider = open_provider(&bdf).unwrap();
    let pool = provider.export(Some(0), PAGE);
    assert_eq!(errno(pool), libc::EINVAL, "the pool chooses the place");
    assert_eq!(errno(provider.export(None, 0)), libc::EINVAL);
    assert_eq!(errno(provider.export(None, PAGE + 1)), libc::EINVAL);
    assert_eq!(errno(provider.export(None, before + PAGE)), libc::ENOSPC);
    let mut other_bar = Node::request(None, PAGE);
    other_bar.range.bar = 0;
    assert_ne!(errno(provider.export_request(other_bar)), 0);
    // The first half of a failed request is freed.
    let range = |length| abi::Range {
        length,
        flags: abi::RANGE_ANY_OFFSET,
        ..Default::default()
    };
    let ranges = provider.export_ranges(0, &mut [range(MIB), range(before)]);
    assert_eq!(errno(ranges), libc::ENOSPC);
    assert_available(&bdf, before);

    for (who, expected) in [
        ("0000:00:1f.7", libc::ENXIO),
        // The host bridge has no driver; a device of peerbuf.ko has a node; the network card's driver
        // publishes no memory.
        ("0000:00:00.0", libc::ENODEV),
        (&*Node::largest().bdf, libc::EOPNOTSUPP),
        (&*modules::find_pci(0x1af4, 0x1000), libc::EOPNOTSUPP),
    ] {
        assert_eq!(errno(open_provider(who)), expected, "{who}");
    }
    for no_address in [1 << 47, 1 << 48, u64::MAX] {
        let answer = open_provider_at(no_address, "none");
        assert_eq!(errno(answer), libc::EINVAL, "{no_address:#x}");
    }
    let user = in_child(|| {
        // SAFETY: The child has one thread.
        assert_eq!(unsafe { libc::setuid(1000) }, 0);
        errno(open_provider(&nvme_bdf()))
    });
    assert_eq!(user.wait(), Ok(libc::EACCES));
}

#[test]
fn a_mixed_buffer_of_lent_and_system_memory_holds_its_order() {
    let bdf = nvme_bdf();
    let before = available(&bdf);
    let provider = open_provider(&bdf).unwrap();
    let mut ranges = [
        abi::RANGE_ANY_OFFSET,
        abi::RANGE_SYSTEM,
        abi::RANGE_ANY_OFFSET,
    ]
    .map(|flags| abi::Range {
        length: MIB,
        flags,
        ..Default::default()
    });
    let (fd, len) = provider.export_ranges(0, &mut ranges).unwrap();
    assert_eq!(len, 3 * MIB);
    let seen = map(&fd, len);
    fill(&seen, 0, len as usize, 4);
    let importer = Importer::attach(fd.as_fd(), &bdf, DYNAMIC | PEER, 0).unwrap();
    importer.map().unwrap();
    let state = importer.query();
    assert_eq!((state.bytes, state.system_bytes), (len, MIB));
    provider.move_to(&fd, abi::PLACEMENT_SYSTEM).unwrap();
    assert_eq!(differs(&seen, 0, len as usize, 4), None);
    drop((importer, seen, fd, provider));
    assert_available(&bdf, before);
}

#[test]
fn unbinding_the_owner_revokes_what_it_lends() {
    let disk = Unmounted::new();
    let bdf = disk.bdf.clone();
    let whole = available(&bdf);
    for round in 0..3 {
        let provider = open_provider(&bdf).unwrap();
        let (fd, _) = provider.export(None, LEN).unwrap();
        let moved = provider.export(None, LEN).unwrap().0;
        let (seen, moved_seen) = (map(&fd, LEN), map(&moved, LEN));
        fill(&seen, 0, LEN as usize, round);
        fill(&moved_seen, 0, LEN as usize, round);
        provider.move_to(&moved, abi::PLACEMENT_SYSTEM).unwrap();
        // An importer that unmaps when invalidated, and a late one.
        let importer = Importer::attach(fd.as_fd(), &bdf, DYNAMIC | PEER, 0).unwrap();
        importer.map().unwrap();
        let late = Importer::attach(fd.as_fd(), &bdf, DYNAMIC | PEER, 300).unwrap();
        late.map().unwrap();

        disk.unbind();
        for fd in [&fd, &moved] {
            assert_eq!(provider.buffer(fd).unwrap().state, abi::STATE_GONE);
        }
        for importer in [&importer, &late] {
            assert_eq!(importer.state().mapped, 0);
        }
        for seen in [&seen, &moved_seen] {
            let read = in_child(|| seen.read(0) as i32);
            assert_eq!(read.wait(), Err(libc::SIGBUS));
        }
        assert_eq!(errno(provider.export(None, PAGE)), libc::ENODEV);
        assert_eq!(
            errno(provider.move_to(&fd, abi::PLACEMENT_SYSTEM)),
            libc::ENODEV
        );
        assert_eq!(errno(open_provider(&bdf)), libc::ENODEV);

        disk.bind();
        assert_eq!(available(&bdf), whole, "round {round}");
        assert_eq!(errno(provider.export(None, PAGE)), libc::ENODEV);
        let anew = open_provider(&bdf).unwrap();
        anew.export(None, PAGE).unwrap();
    }
    assert_available(&bdf, whole);
}

#[test]
fn an_importer_that_does_not_let_go_holds_up_the_owner_and_not_the_bus() {
    let disk = Unmounted::new();
    let bdf = disk.bdf.clone();
    let whole = available(&bdf);
    let provider = open_provider(&bdf).unwrap();
    let (fd, _) = provider.export(None, LEN).unwrap();
    // For another device, since the owner's own attachments end with its driver. It holds the mapping until
    // told.
    let mut request = importer::request(fd.as_fd(), &Edu::bdf(), DYNAMIC | PEER);
    request.on_invalidate = probe::ON_INVALIDATE_HOLD;
    let holder = Importer::attach_as(request);
    if std::env::var("PEERBUF_LAB_TOPOLOGY").as_deref() == Ok("switch") {
        // No other device has a route to the disk, so only the owner can hold its memory.
        assert_eq!(errno(holder), libc::EREMOTEIO);
        return;
    }
    let holder = holder.unwrap();
    holder.map().unwrap();
    thread::scope(|scope| {
        // Dropped before the scope ends, also if the test fails.
        let holder = holder;
        let (tell, told) = mpsc::channel();
        let disk = &disk;
        scope.spawn(move || {
            tell.send(fs::read_link("/proc/thread-self").unwrap())
                .unwrap();
            disk.unbind();
        });
        let stack = Path::new("/proc").join(told.recv().unwrap()).join("stack");
        // After the bus notifier the owner's removal itself waits for memory in use.
        wait_until("the owner waits by itself", || {
            fs::read_to_string(&stack)
                .unwrap()
                .contains("memunmap_pages")
        });
        assert_eq!(provider.buffer(&fd).unwrap().state, abi::STATE_GONE);
        holder.unmap();
    });
    disk.bind();
    assert_eq!(available(&bdf), whole);
}

#[test]
fn unbinding_the_owner_while_its_disk_works_on_what_it_lends() {
    let disk = Unmounted::new();
    let bdf = disk.bdf.clone();
    let whole = available(&bdf);
    for round in 0..4u64 {
        let provider = open_provider(&bdf).unwrap();
        let (fd, _) = provider.export(None, LEN).unwrap();
        // Reads until the disk goes away.
        let reader = in_child(|| {
            let seen = map(&fd, LEN);
            let file = open_direct(SCRATCH).unwrap();
            let mut done = 0;
            while read_into(&file, &seen, 0, LEN as usize, 0).is_ok_and(|n| n > 0) {
                done += 1;
            }
            i32::from(done == 0)
        });
        sleep(Duration::from_millis(150 + 40 * round));
        // In every other round, only the I/O refers to the buffer.
        let fd = (round % 2 == 0).then_some(fd);
        disk.unbind();
        assert_eq!(reader.wait(), Ok(0), "round {round}");
        drop(fd);
        disk.bind();
        assert_eq!(available(&bdf), whole, "round {round}");
    }
}

#[test]
fn the_crate_lends_too() {
    use peerbuf::Access;
    use peerbuf::buffer::Kind;
    use peerbuf::export::{peerbuf as module, provider};

    let bdf = nvme_bdf();
    let before = available(&bdf);
    assert_eq!(provider::probe().unwrap(), [bdf.parse().unwrap()]);
    let device = provider::open(bdf.parse().unwrap()).unwrap();
    let info = device.query().unwrap();
    let bar = info.exportable().unwrap();
    assert_eq!((bar.index, bar.free, bar.pages), (2, before, true));
    let request = module::Request {
        bar: bar.index,
        offset: None,
        length: LEN,
        access: Access::ReadWrite,
    };
    let buffer = device.export(request).unwrap();
    assert_eq!(buffer.provenance().kind, Kind::Provider);
    let status = device.status(buffer.dmabuf().unwrap()).unwrap();
    assert_eq!(status.placement, module::Placement::Device);
    let full = device.export(module::Request {
        length: before,
        ..request
    });
    let said = full.unwrap_err().to_string();
    assert!(
        said.contains("ENOSPC") && said.contains("are free"),
        "{said}"
    );
    let card = provider::open(Node::largest().bdf.parse().unwrap());
    assert!(card.unwrap_err().to_string().contains("EOPNOTSUPP"));
    drop((buffer, device));
    assert_available(&bdf, before);
}
