//! Importers of every kind on buffers that move: the memory that each gets, the invalidations,
//! and the waits. Runs in the guest.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::importer::{self, DYNAMIC, Importer, Mapping, PEER};
use peerbuf_lab_suite::machine::seconds;
use peerbuf_lab_suite::node::{
    MIB, Map, Node, PAGE, assert_all_free, differs, errno, fill, in_child, nvme_bdf,
};
use peerbuf_lab_suite::pci::spare_device;
use peerbuf_uapi::{self as abi, probe};
use peerbuf_uapi::{PLACEMENT_DEVICE, PLACEMENT_MIXED, PLACEMENT_SYSTEM};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Attaches with these flags. The importer unmaps at once on an invalidation.
fn attach(fd: &OwnedFd, flags: u32) -> io::Result<Importer> {
    Importer::attach(fd.as_fd(), &nvme_bdf(), flags, 0)
}

/// Like [`attach`], with a `probe::ON_INVALIDATE_*` reaction.
fn attach_that(fd: &OwnedFd, flags: u32, on_invalidate: u32) -> Importer {
    let mut request = importer::request(fd.as_fd(), &nvme_bdf(), flags);
    request.on_invalidate = on_invalidate;
    if on_invalidate == probe::ON_INVALIDATE_HOLD {
        request.hold_ms = probe::MAX_MS;
    }
    Importer::attach_as(request).unwrap()
}

fn placement(node: &Node, fd: &OwnedFd) -> u32 {
    node.buffer(fd).unwrap().placement
}

fn system(bytes: u64) -> impl Fn(&Mapping) -> bool {
    move |mapping| (mapping.bytes, mapping.system) == (bytes, bytes)
}

#[test]
fn who_cannot_use_the_bar_gets_system_memory() {
    let node = Node::largest();
    for flags in [0, DYNAMIC, PEER] {
        let fd = node.export_movable(MIB).unwrap();
        let seen = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
        fill(&seen, 0, MIB as usize, 1);
        let importer = attach(&fd, flags).unwrap();
        assert_eq!(placement(&node, &fd), PLACEMENT_SYSTEM, "{flags}");
        assert_eq!(differs(&seen, 0, MIB as usize, 1), None);
        if flags == PEER {
            importer.step(probe::IOC_PIN).unwrap();
        }
        let mapping = importer.map().unwrap();
        assert!(system(MIB)(&mapping), "{mapping:?}");
        let (attachments, _) = node.buffer_lists(&fd).unwrap();
        assert_eq!(attachments.len(), 1);
        let listed = attachments[0];
        assert!(listed.device.starts_with(nvme_bdf().as_bytes()));
        assert_eq!(listed.mapped, 1);
        assert_ne!(listed.flags & abi::ATTACHMENT_NEEDS_SYSTEM, 0);
        // The restriction lasts as long as the attachment, mapped or not.
        importer.unmap();
        if flags == PEER {
            importer.step(probe::IOC_UNPIN).unwrap();
        }
        assert_eq!(errno(node.move_to(&fd, PLACEMENT_DEVICE)), libc::EBUSY);
        drop(importer);
        node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
        assert_eq!(differs(&seen, 0, MIB as usize, 1), None);
        assert_eq!(node.buffer(&fd).unwrap().refusals, 0);
    }
}

#[test]
fn a_refusal_says_who_and_why() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    for (count, flags, reason) in [
        (1, 0, abi::REFUSED_NOT_PEER),
        (2, DYNAMIC, abi::REFUSED_NOT_PEER),
        (3, PEER, abi::REFUSED_NOT_REVOCABLE),
    ] {
        assert_eq!(errno(attach(&fd, flags)), libc::EOPNOTSUPP);
        let query = node.buffer(&fd).unwrap();
        assert_eq!((query.refusals, query.refused_reason), (count, reason));
        assert_eq!(query.refused_errno, libc::EOPNOTSUPP as u32);
        assert!(query.refused_device.starts_with(nvme_bdf().as_bytes()));
        assert_eq!(query.nr_attachments, 0);
    }
    assert_eq!(placement(&node, &fd), PLACEMENT_DEVICE);
    // System memory has no BAR, so no importer lacks a route.
    let mut range = [abi::Range {
        length: MIB,
        flags: abi::RANGE_SYSTEM,
        ..Zeroable::zeroed()
    }];
    let (fd, _) = node.export_ranges(0, &mut range).unwrap();
    for flags in [0, DYNAMIC, PEER, DYNAMIC | PEER] {
        let importer = attach(&fd, flags).unwrap();
        if flags == PEER {
            importer.step(probe::IOC_PIN).unwrap();
        }
        assert!(system(MIB)(&importer.map().unwrap()));
    }
}

#[test]
fn a_pinned_buffer_refuses_who_would_move_it() {
    let node = Node::largest();
    let fd = node.export_movable(MIB).unwrap();
    let peer = attach(&fd, DYNAMIC | PEER).unwrap();
    peer.step(probe::IOC_PIN).unwrap();
    assert_eq!(errno(node.move_to(&fd, PLACEMENT_SYSTEM)), libc::EBUSY);
    assert_eq!(errno(attach(&fd, 0)), libc::EBUSY);
    let query = node.buffer(&fd).unwrap();
    assert_eq!(query.refused_reason, abi::REFUSED_MOVE_FAILED);
    assert_eq!((query.pins, query.moves, query.generation), (1, 0, 1));
    let (attachments, _) = node.buffer_lists(&fd).unwrap();
    assert_eq!(attachments[0].pinned, 1);
    // A pin does not prevent a revoke, because the device may go away at any time.
    assert!(peer.map().unwrap().system == 0);
    assert_eq!(node.revoke(&fd, 1000).unwrap().holders, 0);
    assert_eq!(peer.state().invalidations, 1);
    node.restore(&fd).unwrap();
    peer.step(probe::IOC_UNPIN).unwrap();
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    assert_eq!(node.buffer(&fd).unwrap().pins, 0);
    // The pins of an importer that goes without an unpin are removed.
    peer.step(probe::IOC_PIN).unwrap();
    drop(peer);
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
}

/// Tries to load a module that attaches the buffer, pins it and never unpins it. Returns true
/// if the module could be loaded; the module is unloaded again.
fn forgetful(fd: &OwnedFd, parameters: &[&str]) -> bool {
    let bdf = nvme_bdf();
    let hex = |digits: &str| u32::from_str_radix(digits, 16).unwrap();
    let (bus, slot, function) = (hex(&bdf[5..7]), hex(&bdf[8..10]), hex(&bdf[11..12]));
    let loaded = Command::new("insmod")
        .arg("/opt/peerbuf/fixtures/forgetful.ko")
        .args([
            format!("bus={bus}"),
            format!("devfn={}", slot << 3 | function),
        ])
        // The loader has the buffer as standard input.
        .arg("fd=0")
        .args(parameters)
        .stdin(fd.try_clone().unwrap())
        .status();
    let loaded = loaded.unwrap().success();
    if loaded {
        let removed = Command::new("rmmod").arg("forgetful").status();
        assert!(removed.unwrap().success());
    }
    loaded
}

#[test]
fn the_pins_of_an_importer_that_forgets_them_end_when_it_detaches() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    assert!(forgetful(&fd, &["pins=3"]));
    let query = node.buffer(&fd).unwrap();
    assert_eq!((query.nr_attachments, query.pins), (0, 0));
    // Other importers keep their pins.
    let peer = attach(&fd, DYNAMIC | PEER).unwrap();
    peer.step(probe::IOC_PIN).unwrap();
    assert_eq!(errno(node.move_to(&fd, PLACEMENT_SYSTEM)), libc::EBUSY);
    peer.step(probe::IOC_UNPIN).unwrap();
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
}

#[test]
fn importers_of_every_kind_share_a_buffer() {
    let node = Node::largest();
    let fd = node.export_movable(MIB).unwrap();
    let peer = attach_that(&fd, DYNAMIC | PEER, probe::ON_INVALIDATE_REMAP);
    let mapping = peer.map().unwrap();
    assert_eq!((mapping.bus, mapping.system), (MIB, 0));
    // A static importer attaches: the peer is invalidated, and finds the bytes in system
    // memory.
    let fixed = attach(&fd, 0).unwrap();
    assert!(system(MIB)(&fixed.map().unwrap()));
    assert_eq!(peer.state().invalidations, 1);
    let settled = |wanted: &dyn Fn(&Mapping) -> bool| {
        let waiting = Stopwatch::start();
        while !(peer.state().mapped == 1 && wanted(&peer.mapping())) {
            assert!(
                waiting.elapsed() < Duration::from_secs(5),
                "{:?}",
                peer.query()
            );
            thread::sleep(Duration::from_millis(5));
        }
    };
    settled(&system(MIB));
    let dynamic = attach(&fd, DYNAMIC).unwrap();
    assert!(system(MIB)(&dynamic.map().unwrap()));
    drop(dynamic);
    assert_eq!(errno(node.move_to(&fd, PLACEMENT_DEVICE)), libc::EBUSY);
    drop(fixed);
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    settled(&|mapping| mapping.bus == MIB);
    let query = node.buffer(&fd).unwrap();
    assert_eq!(query.moves, 2);
    assert!(query.invalidations >= 2 && query.maps >= 4, "{query:?}");
}

#[test]
fn an_old_mapping_keeps_its_memory_and_holds_up_the_way_back() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let holder = attach_that(&fd, DYNAMIC | PEER, probe::ON_INVALIDATE_HOLD);
    assert_eq!(holder.map().unwrap().bus, MIB);
    // A move to system memory works: the range in the BAR that the holder still reaches is
    // unused.
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    let (attachments, _) = node.buffer_lists(&fd).unwrap();
    assert_ne!(attachments[0].flags & abi::ATTACHMENT_STALE, 0);
    assert_eq!((attachments[0].mapped, attachments[0].generation), (1, 1));
    let began = Instant::now();
    let back = node.move_part(&fd, PLACEMENT_DEVICE, 0, 0, 150);
    assert_eq!(errno(back), libc::EBUSY);
    assert!(began.elapsed() >= Duration::from_millis(150));
    holder.unmap();
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    // In system memory nothing appears under an old mapping, because each move takes new pages.
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    assert!(system(MIB)(&holder.map().unwrap()));
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    assert_eq!(holder.state().mapped, 1);
    node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
    holder.unmap();
}

#[test]
fn moves_wait_for_fences_of_every_usage() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let importer = attach(&fd, DYNAMIC | PEER).unwrap();
    for usage in [
        probe::FENCE_KERNEL,
        probe::FENCE_WRITE,
        probe::FENCE_READ,
        probe::FENCE_BOOKKEEP,
    ] {
        importer.map().unwrap();
        importer.fence(usage, 30_000).unwrap();
        let answer = errno(node.move_part(&fd, PLACEMENT_SYSTEM, 0, 0, 100));
        assert_eq!(answer, libc::EBUSY, "usage {usage}");
        let revoked = node.revoke(&fd, 50).unwrap();
        assert_eq!(revoked.fences, 1, "usage {usage}");
        assert_eq!(errno(node.restore(&fd)), libc::EBUSY);
        importer.step(probe::IOC_SIGNAL).unwrap();
        node.revoke(&fd, 1000).unwrap();
        node.restore(&fd).unwrap();
        // A fence that signals during the wait.
        importer.fence(usage, 200).unwrap();
        let began = Instant::now();
        node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
        let waited = began.elapsed();
        assert!(waited >= Duration::from_millis(100), "{waited:?}");
        node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    }
    let query = node.buffer(&fd).unwrap();
    assert!(query.longest_wait_ns > 80_000_000, "{query:?}");
}

/// Two importers that add fences in turn, so that one fence is always unsignalled, until this
/// is dropped or 20 seconds have passed.
struct Fencing {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Fencing {
    /// The duration of a fence. The next one comes before its end.
    const MS: u32 = 400;

    fn start(fd: &OwnedFd) -> Self {
        let importers = [0, 1].map(|_| attach(fd, DYNAMIC | PEER).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let end = Instant::now() + Duration::from_secs(20);
            for importer in importers.iter().cycle() {
                if stopped.load(Ordering::Relaxed) || Instant::now() > end {
                    return;
                }
                match errno(importer.fence(probe::FENCE_BOOKKEEP, Self::MS)) {
                    0 | libc::EBUSY => {}
                    other => panic!("{other}"),
                }
                thread::sleep(Duration::from_millis(u64::from(Self::MS) / 4));
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Fencing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

#[test]
fn fences_that_come_after_the_mark_hold_nobody_up() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let limit = seconds(5);
    // A revoke by the owner, and a restore.
    let fencing = Fencing::start(&fd);
    thread::sleep(Duration::from_millis(200));
    let began = Stopwatch::start();
    let revoked = node.revoke(&fd, 20_000).unwrap();
    assert_eq!((revoked.holders, revoked.fences), (0, 0), "{revoked:?}");
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
    thread::sleep(Duration::from_millis(u64::from(Fencing::MS)));
    node.restore(&fd).unwrap();
    // A reset, and the unbind.
    let began = Stopwatch::start();
    fs::write(format!("/sys/bus/pci/devices/{bdf}/reset"), "1").unwrap();
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
    let began = Stopwatch::start();
    Node::unbind(&bdf);
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
    Node::bind(&bdf);
    drop((fencing, fd, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn a_fence_from_before_the_mark_is_waited_for_by_every_reason() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let importer = attach(&fd, DYNAMIC | PEER).unwrap();
    let began = Instant::now();
    importer.fence(probe::FENCE_READ, 1500).unwrap();
    assert_eq!(node.revoke(&fd, 50).unwrap().fences, 1);
    assert_eq!(errno(node.restore(&fd)), libc::EBUSY);
    Node::unbind(&bdf);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1400), "{took:?}");
    Node::bind(&bdf);
    drop((importer, fd, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

/// Timeout of a fence that the test signals: shorter than the time after which a map gives up.
const LONG_MS: u32 = 20_000;

#[test]
fn a_buffer_that_is_held_up_holds_up_no_other() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (held, _) = node.export(None, MIB).unwrap();
    let importer = attach(&held, DYNAMIC | PEER).unwrap();
    importer.fence(probe::FENCE_BOOKKEEP, LONG_MS).unwrap();
    let pause = Duration::from_millis(300);
    thread::scope(|scope| {
        let (node, held) = (&node, &held);
        // A move waits for the fence with the buffer's lock held. The node's fdinfo, the list
        // of all buffers and the close of a node wait for that lock.
        let moving = scope.spawn(move || node.move_part(held, PLACEMENT_SYSTEM, 0, 0, 2 * LONG_MS));
        thread::sleep(pause);
        let file = format!("/proc/self/fdinfo/{}", node.file.as_raw_fd());
        scope.spawn(move || fs::read_to_string(file).unwrap());
        scope.spawn(|| fs::read_to_string("/sys/kernel/debug/peerbuf/buffers").unwrap());
        let another = Node::open(&bdf).unwrap();
        scope.spawn(move || drop(another));
        thread::sleep(pause);

        node.query().unwrap();
        let (fd, _) = node.export(None, MIB).unwrap();
        node.buffer(&fd).unwrap();
        node.move_to(&fd, PLACEMENT_SYSTEM).unwrap();
        drop(fd);
        // The driver core reports every unbind on the machine to the module.
        let spare = spare_device();
        for action in ["unbind", "bind"] {
            fs::write(format!("/sys/bus/pci/drivers/ahci/{action}"), &spare).unwrap();
        }
        assert!(!moving.is_finished(), "all that waited for the fence");
        importer.step(probe::IOC_SIGNAL).unwrap();
    });
    assert_eq!(
        placement(&node, &held),
        PLACEMENT_SYSTEM,
        "it moved in the end"
    );
}

#[test]
fn a_fault_on_a_buffer_that_is_held_up_ends_with_a_signal() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let [fencing, mapping] = [(); 2].map(|()| attach(&fd, DYNAMIC | PEER).unwrap());
    fencing.fence(probe::FENCE_KERNEL, LONG_MS).unwrap();
    let map = Map::new(fd.as_fd(), MIB as usize, false).unwrap();
    let pause = Duration::from_millis(300);
    thread::scope(|scope| {
        // This map waits for the fence with the buffer's lock held.
        let waiting = scope.spawn(|| mapping.map().unwrap());
        thread::sleep(pause);
        let child = in_child(|| map.read(0) as i32);
        thread::sleep(pause);
        assert_eq!(child.has_ended(), None);
        child.kill(libc::SIGTERM);
        assert_eq!(child.wait(), Err(libc::SIGTERM));
        assert!(!waiting.is_finished(), "the signal waited for the fence");
        // A fault here must not keep this process's memory map locked.
        scope.spawn(|| map.read(0));
        thread::sleep(pause);
        drop(Map::new(fd.as_fd(), MIB as usize, false).unwrap());
        assert!(!waiting.is_finished(), "a mapping waited for the fence");
        fencing.step(probe::IOC_SIGNAL).unwrap();
    });
}

#[test]
fn revoke_names_who_does_not_let_go() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let holder = attach_that(&fd, DYNAMIC | PEER, probe::ON_INVALIDATE_HOLD);
    let good = attach(&fd, DYNAMIC | PEER).unwrap();
    holder.map().unwrap();
    good.map().unwrap();
    let began = Stopwatch::start();
    let revoked = node.revoke(&fd, 200).unwrap();
    assert_eq!((revoked.holders, revoked.fences, revoked.pages), (1, 0, 0));
    assert!(began.elapsed() < Duration::from_secs(2));
    let (attachments, _) = node.buffer_lists(&fd).unwrap();
    let holding: Vec<u64> = attachments.iter().map(|a| a.mapped).collect();
    assert_eq!(holding.iter().sum::<u64>(), 1, "{attachments:?}");
    // Nobody gets access meanwhile.
    assert_eq!(errno(good.map()), libc::ENODEV);
    assert_eq!(errno(attach(&fd, DYNAMIC | PEER)), libc::ENODEV);
    assert_eq!(errno(good.step(probe::IOC_PIN)), libc::ENODEV);
    assert_eq!(errno(node.restore(&fd)), libc::EBUSY);
    holder.unmap();
    assert_eq!(node.revoke(&fd, 1000).unwrap().holders, 0);
    node.restore(&fd).unwrap();
    good.map().unwrap();
}

#[test]
fn who_waits_long_for_a_revoke_can_be_killed() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let holder = attach_that(&fd, DYNAMIC | PEER, probe::ON_INVALIDATE_HOLD);
    holder.map().unwrap();
    let child = in_child(|| node.revoke(&fd, u32::MAX).unwrap().holders as i32);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(node.buffer(&fd).unwrap().state, abi::STATE_REVOKED);
    child.kill(libc::SIGKILL);
    let began = Stopwatch::start();
    assert_eq!(child.wait(), Err(libc::SIGKILL));
    assert!(began.elapsed() < Duration::from_secs(5));
    // The buffer stays revoked: nobody gets new access.
    assert_eq!(errno(node.restore(&fd)), libc::EBUSY);
    holder.unmap();
    node.restore(&fd).unwrap();
}

#[test]
fn revoke_counts_system_memory_too() {
    let node = Node::largest();
    let fd = node.export_movable(MIB).unwrap();
    let fixed = attach(&fd, 0).unwrap();
    fixed.map().unwrap();
    // A static importer cannot be invalidated, so the revoke reports it.
    assert_eq!(node.revoke(&fd, 100).unwrap().holders, 1);
    fixed.unmap();
    assert_eq!(node.revoke(&fd, 100).unwrap().holders, 0);
    assert_eq!(errno(fixed.map()), libc::ENODEV);
    node.restore(&fd).unwrap();
    assert!(system(MIB)(&fixed.map().unwrap()));
}

#[test]
fn kernel_mappings_are_of_system_memory_and_keep_the_buffer_there() {
    let node = Node::largest();
    // The core warns of every error of an exporter's `vmap`. This exporter has no `vmap`, so
    // there is no warning.
    let (fixed, _) = node.export(None, MIB).unwrap();
    let importer = attach(&fixed, DYNAMIC | PEER).unwrap();
    assert_eq!(errno(importer.step(probe::IOC_VMAP)), libc::EINVAL);
    assert_eq!(node.buffer(&fixed).unwrap().vmaps, 0);

    let fd = node.export_movable(MIB).unwrap();
    let map = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
    map.write(8, 0x5eed);
    let importer = attach(&fd, DYNAMIC | PEER).unwrap();
    importer.map().unwrap();
    assert_eq!(placement(&node, &fd), PLACEMENT_DEVICE);
    importer.step(probe::IOC_VMAP).unwrap();
    // The importer was invalidated.
    assert_eq!(importer.query().state, probe::VMAPPED);
    let query = node.buffer(&fd).unwrap();
    assert_eq!((query.placement, query.vmaps), (PLACEMENT_SYSTEM, 1));
    assert_eq!(map.read(8), 0x5eed);
    map.write(8, 0xfeed);
    assert_eq!(errno(node.move_to(&fd, PLACEMENT_DEVICE)), libc::EBUSY);
    assert_eq!(node.revoke(&fd, 50).unwrap().holders, 1);
    importer.step(probe::IOC_VUNMAP).unwrap();
    assert_eq!(node.revoke(&fd, 50).unwrap().holders, 0);
    node.restore(&fd).unwrap();
    node.move_to(&fd, PLACEMENT_DEVICE).unwrap();
    assert_eq!(map.read(8), 0xfeed);
}

#[test]
fn devices_only_read_what_was_exported_for_that() {
    let node = Node::largest();
    let mut request = Node::request(None, MIB);
    request.export.flags |= abi::EXPORT_DEVICES_READ;
    let bar = node.export_request(request).unwrap().0;
    let mut ranges = [abi::Range {
        length: MIB,
        flags: abi::RANGE_SYSTEM,
        ..Zeroable::zeroed()
    }];
    let system = node.export_ranges(abi::EXPORT_DEVICES_READ, &mut ranges);
    for fd in [bar, system.unwrap().0] {
        let importer = attach(&fd, DYNAMIC | PEER).unwrap();
        for writes in [probe::BIDIRECTIONAL, probe::FROM_DEVICE] {
            assert_eq!(errno(importer.map_for(writes)), libc::EACCES);
        }
        importer.map_for(probe::TO_DEVICE).unwrap();
        importer.unmap();
        assert_eq!(errno(importer.step(probe::IOC_VMAP)), libc::EINVAL);
        // The CPU's access is limited by the descriptor.
        Map::new(fd.as_fd(), MIB as usize, true)
            .unwrap()
            .write(0, 1);
    }
}

#[test]
fn a_device_below_a_pci_one_has_no_route() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    assert!(!forgetful(&fd, &["below=1"]));
    let query = node.buffer(&fd).unwrap();
    assert_eq!(query.refused_reason, abi::REFUSED_NO_ROUTE);
    assert_eq!(query.refused_errno, libc::EREMOTEIO as u32);
    assert_eq!(query.nr_attachments, 0);
}

#[test]
fn a_mixed_buffer_is_one_scatter_list() {
    let node = Node::largest();
    let part = |length, flags| abi::Range {
        length: length * PAGE,
        flags,
        ..Zeroable::zeroed()
    };
    let mut ranges = [
        part(2, abi::RANGE_ANY_OFFSET),
        part(3, abi::RANGE_SYSTEM),
        part(1, abi::RANGE_ANY_OFFSET),
        part(4, abi::RANGE_ANY_OFFSET),
        part(8, abi::RANGE_SYSTEM),
    ];
    let (fd, length) = node
        .export_ranges(abi::EXPORT_MAY_MOVE, &mut ranges)
        .unwrap();
    assert_eq!(placement(&node, &fd), PLACEMENT_MIXED);
    let peer = attach(&fd, DYNAMIC | PEER).unwrap();
    let mapping = peer.map().unwrap();
    assert_eq!(
        (mapping.bytes, mapping.bus, mapping.system),
        (length, 7 * PAGE, 11 * PAGE)
    );
    assert!(mapping.segments >= 4, "{mapping:?}");
    peer.unmap();
    // Moves of parts, as the importer sees them. The sums agree with the module's query.
    let mut random = StdRng::seed_from_u64(11);
    let pages = length / PAGE;
    for round in 0..60 {
        let first = random.random_range(0..pages);
        let count = random.random_range(1..=pages - first);
        let to = [PLACEMENT_DEVICE, PLACEMENT_SYSTEM][round % 2];
        let moved = node.move_part(&fd, to, first * PAGE, count * PAGE, 1000);
        assert!([0, libc::EOPNOTSUPP].contains(&errno(moved)));
        let (_, pieces) = node.buffer_lists(&fd).unwrap();
        let device: u64 = pieces
            .iter()
            .filter(|piece| piece.placement == PLACEMENT_DEVICE)
            .map(|piece| piece.length)
            .sum();
        let mapping = peer.map().unwrap();
        assert_eq!(
            (mapping.bytes, mapping.bus, mapping.system),
            (length, device, length - device),
            "round {round}"
        );
        peer.unmap();
    }
    // An importer that cannot use the BAR gets the whole buffer in system memory.
    let fixed = attach(&fd, 0).unwrap();
    assert!(system(length)(&fixed.map().unwrap()));
}

#[test]
fn unbinding_leaves_system_memory_to_those_who_have_it() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let fd = node.export_movable(MIB).unwrap();
    let fixed = attach(&fd, 0).unwrap();
    fixed.map().unwrap();
    let began = Stopwatch::start();
    Node::unbind(&bdf);
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "it is nobody's BAR"
    );
    assert_eq!(fixed.state().mapped, 1);
    fixed.unmap();
    assert_eq!(errno(fixed.map()), libc::ENODEV);
    Node::bind(&bdf);
    drop((fixed, fd, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn all_are_told_before_any_is_waited_for() {
    const LATE: Duration = Duration::from_millis(800);
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let exports: [OwnedFd; 6] = std::array::from_fn(|_| node.export(None, PAGE).unwrap().0);
    let late = |fd: &OwnedFd| {
        let late_ms = LATE.as_millis() as u32;
        Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, late_ms).unwrap()
    };
    let importers: Vec<Importer> = exports.iter().map(late).collect();
    let in_the_time_of_one = |what: &str, end: &dyn Fn()| {
        for importer in &importers {
            importer.map().unwrap();
        }
        let (began, own) = (Instant::now(), Stopwatch::start());
        end();
        let took = began.elapsed();
        assert!(took >= LATE / 2, "{what} waited for nobody: {took:?}");
        let took = own.elapsed();
        assert!(took < LATE * 3, "{what} took {took:?}");
        for importer in &importers {
            let state = importer.state();
            assert_eq!(state.mapped, 0, "{what}");
        }
    };
    let reset = format!("/sys/bus/pci/devices/{bdf}/reset");
    in_the_time_of_one("a reset", &|| std::fs::write(&reset, "1").unwrap());
    in_the_time_of_one("an unbind", &|| Node::unbind(&bdf));
    assert!(importers.iter().all(|it| it.state().invalidations == 2));
    Node::bind(&bdf);
    drop((importers, exports, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn a_reset_revokes_first_and_gives_access_again_after() {
    use peerbuf_lab_suite::disk::{self, SCRATCH, Slow};
    let node = Node::largest();
    let reset = format!("/sys/bus/pci/devices/{}/reset", node.bdf);
    let (fd, _) = node.export(None, 2 * MIB).unwrap();
    let (kept, _) = node.export(None, MIB).unwrap();
    node.revoke(&kept, 100).unwrap();
    let seen = Map::new(fd.as_fd(), 2 << 20, true).unwrap();
    seen.write(0, 1);
    let good = attach(&fd, DYNAMIC | PEER).unwrap();
    good.map().unwrap();
    std::fs::write(&reset, "1").unwrap();
    assert_eq!((good.state().invalidations, good.state().mapped), (1, 0));
    let query = node.buffer(&fd).unwrap();
    assert_eq!((query.state, query.generation), (abi::STATE_LIVE, 3));
    assert_eq!(good.map().unwrap().bus, 2 * MIB);
    seen.write(8, 2);
    assert_eq!(seen.read(8), 2);
    // A buffer that its owner had revoked stays revoked.
    assert_eq!(node.buffer(&kept).unwrap().state, abi::STATE_REVOKED);
    node.restore(&kept).unwrap();
    drop(node.export(None, MIB).unwrap());
    // Direct I/O in flight and a slow importer: the reset waits for both.
    let disk = disk::open_direct(SCRATCH).unwrap();
    let mut late = importer::request(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER);
    late.on_invalidate = probe::ON_INVALIDATE_HOLD;
    late.hold_ms = 300;
    let late = Importer::attach_as(late).unwrap();
    late.map().unwrap();
    let _slow = Slow::new(MIB);
    thread::scope(|scope| {
        let reading = scope.spawn(|| disk::read_into(&disk, &seen, 0, 2 << 20, 0).unwrap());
        disk::await_reading();
        let began = Instant::now();
        std::fs::write(&reset, "1").unwrap();
        assert!(began.elapsed() >= Duration::from_millis(250));
        assert_eq!(late.state().mapped, 0);
        assert_eq!(node.buffer(&fd).unwrap().state, abi::STATE_LIVE);
        assert_eq!(reading.join().unwrap(), 2 << 20);
    });
}

#[test]
fn everything_races_with_everything() {
    let bdf = Node::largest().bdf;
    for round in 0..4u64 {
        let node = Node::open(&bdf).unwrap();
        let fd = node.export_movable(16 * PAGE).unwrap();
        let until = Instant::now() + Duration::from_millis(1500);
        thread::scope(|scope| {
            let (node, fd) = (&node, &fd);
            for (flags, seed) in [
                (0, 1),
                (DYNAMIC, 2),
                (DYNAMIC | PEER, 3),
                (DYNAMIC | PEER, 4),
            ] {
                scope.spawn(move || {
                    let mut random = StdRng::seed_from_u64(seed + round);
                    while Instant::now() < until {
                        let mut request = importer::request(fd.as_fd(), &nvme_bdf(), flags);
                        if flags & DYNAMIC != 0 {
                            request.on_invalidate = random.random_range(0..3);
                        }
                        if request.on_invalidate == probe::ON_INVALIDATE_HOLD {
                            request.hold_ms = random.random_range(1..30);
                        }
                        let Ok(importer) = Importer::attach_as(request) else {
                            continue;
                        };
                        for _ in 0..random.random_range(0..8) {
                            let _ = match random.random_range(0..5) {
                                0 => importer.map_for(random.random_range(0..3)),
                                1 => importer.step(probe::IOC_UNMAP),
                                2 if flags & DYNAMIC != 0 => importer.step(probe::IOC_PIN),
                                3 if flags & DYNAMIC != 0 => importer.step(probe::IOC_UNPIN),
                                _ => importer
                                    .fence(random.random_range(0..4), random.random_range(1..10))
                                    .map(|()| 0),
                            };
                        }
                    }
                });
            }
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(round);
                while Instant::now() < until {
                    let to = random.random_range(PLACEMENT_DEVICE..=PLACEMENT_SYSTEM);
                    let first = random.random_range(0..16);
                    let count = random.random_range(1..=16 - first);
                    let moved = node.move_part(fd, to, first * PAGE, count * PAGE, 50);
                    let answer = errno(moved);
                    assert!([0, libc::EBUSY, libc::ENODEV].contains(&answer), "{answer}");
                }
            });
            scope.spawn(move || {
                while Instant::now() < until {
                    node.revoke(fd, 20).unwrap();
                    while errno(node.restore(fd)) == libc::EBUSY && Instant::now() < until {
                        node.revoke(fd, 20).unwrap();
                    }
                    thread::sleep(Duration::from_millis(10));
                }
            });
            scope.spawn(move || {
                let seen = Map::new(fd.as_fd(), 16 * PAGE as usize, true);
                // A revoke at this moment leaves nothing to map.
                let Ok(seen) = seen else { return };
                while Instant::now() < until {
                    // A load would raise SIGBUS at times. A system call gets EFAULT instead.
                    let mut pipe = [0; 2];
                    // SAFETY: A new pipe, and a range of the mapping that the kernel checks.
                    unsafe {
                        libc::pipe2(pipe.as_mut_ptr(), libc::O_NONBLOCK);
                        libc::write(pipe[1], seen.as_ptr(), 4096);
                        libc::read(pipe[0], seen.as_ptr().byte_add(8192), 4096);
                        libc::close(pipe[0]);
                        libc::close(pipe[1]);
                    }
                }
            });
            if round % 2 == 1 {
                thread::sleep(Duration::from_millis(400));
                Node::unbind(&bdf);
                Node::bind(&bdf);
            }
        });
        drop((fd, node));
        assert_all_free(&Node::open(&bdf).unwrap());
    }
}
