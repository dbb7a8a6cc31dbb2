//! A device goes away while every kind of access to it is in progress. Runs in the guest.
//!
//! The device goes by an unbind, by an unplug (QEMU's `device_del`: the slot's button) or by a reset;
//! unloading the module is refused. In progress are loads and stores of a process, system calls on mappings,
//! direct I/O that a disk has accepted, importers of every kind (some unmap late, or only on request),
//! fences, a kernel mapping, and a move that has invalidated the mappings and waits for direct I/O.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::disk::{self, SCRATCH, Slow};
use peerbuf_lab_suite::importer::{self, DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::machine::{Machine, give_to_peerbuf, is_debug_kernel};
use peerbuf_lab_suite::node::{
    MIB, Map, Node, PAGE, SYNC_READ, SYNC_WRITE, assert_all_free, errno, in_child, nvme_bdf, sync,
};
use peerbuf_lab_suite::pci::wait_until;
use peerbuf_uapi::{self as abi, probe};
use peerbuf_uapi::{PLACEMENT_DEVICE, PLACEMENT_SYSTEM};
use rustix::event::{EventfdFlags, eventfd};

/// Time limit: the delay of the slowest access, plus four times that for a busy host. (A slot's
/// button takes effect after 5 s.)
fn limit() -> Duration {
    Duration::from_secs(if is_debug_kernel() { 60 } else { 20 })
}

/// The delay of a late importer.
const LATE_MS: u32 = 700;

/// The buffers in use when the device goes.
struct Busy {
    node: Node,
    /// The CPU accesses and watches this buffer.
    touched: OwnedFd,
    /// A disk reads into this buffer.
    read: OwnedFd,
    /// This buffer is being moved.
    moved: OwnedFd,
    /// This buffer has importers of every kind.
    imported: OwnedFd,
    /// This buffer is in system memory, because of an importer that needs it there.
    settled: OwnedFd,
}

impl Busy {
    fn new(bdf: &str) -> Self {
        let node = Node::open(bdf).unwrap();
        let buffer = |size| node.export(None, size).unwrap().0;
        Self {
            touched: buffer(MIB),
            read: buffer(2 * MIB),
            moved: buffer(2 * MIB),
            imported: buffer(MIB),
            settled: node.export_movable(MIB).unwrap(),
            node,
        }
    }

    fn all(&self) -> [&OwnedFd; 5] {
        [
            &self.touched,
            &self.read,
            &self.moved,
            &self.imported,
            &self.settled,
        ]
    }
}

fn attach(fd: &OwnedFd, flags: u32, on_invalidate: u32, hold_ms: u32) -> Importer {
    let mut request = importer::request(fd.as_fd(), &nvme_bdf(), flags);
    request.on_invalidate = on_invalidate;
    request.hold_ms = hold_ms;
    Importer::attach_as(request).unwrap()
}

fn map(fd: &OwnedFd, size: u64) -> Map {
    Map::new(fd.as_fd(), size as usize, true).unwrap()
}

/// Makes threads stop, also if the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Makes the kernel read a mapping; returns its errno.
fn kernel_reads(map: &Map, at: usize) -> i32 {
    let (read, write) = std::io::pipe().unwrap();
    // SAFETY: The range lies in the mapping, which only the kernel reads here.
    let n = unsafe { libc::write(write.as_raw_fd(), map.as_ptr().byte_add(at), 512) };
    drop(read);
    match n {
        512 => 0,
        _ => std::io::Error::last_os_error().raw_os_error().unwrap(),
    }
}

/// Starts all accesses, then makes the device go by `go`, which returns whether access is restored.
fn with_everything_under_way(bdf: &str, go: impl FnOnce(&Busy) -> bool) {
    let busy = Busy::new(bdf);
    let Busy { node, .. } = &busy;
    let stop = AtomicBool::new(false);
    let touches = AtomicU64::new(0);
    let (touched, read, moved) = (
        map(&busy.touched, MIB),
        map(&busy.read, 2 * MIB),
        map(&busy.moved, 2 * MIB),
    );
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    node.watch(abi::IOC_WATCH, &busy.touched, event.as_fd())
        .unwrap();

    let told = probe::ON_INVALIDATE_UNMAP;
    let (remaps, holds) = (probe::ON_INVALIDATE_REMAP, probe::ON_INVALIDATE_HOLD);
    let good = attach(&busy.imported, DYNAMIC | PEER, told, 0);
    let again = attach(&busy.imported, DYNAMIC | PEER, remaps, 0);
    let late = attach(&busy.imported, DYNAMIC | PEER, holds, LATE_MS);
    let stubborn = attach(&busy.imported, DYNAMIC | PEER, holds, 0);
    // The kernel mapping is of system memory, so nothing waits for its end.
    let kernel = attach(&busy.settled, DYNAMIC, told, 0);
    let settled = attach(&busy.settled, 0, told, 0);
    for importer in [&good, &again, &late, &stubborn, &settled] {
        importer.map().unwrap();
    }
    good.step(probe::IOC_PIN).unwrap();
    again.fence(probe::FENCE_BOOKKEEP, LATE_MS).unwrap();
    kernel.step(probe::IOC_VMAP).unwrap();

    // A separate process, since a load from a revoked mapping kills it.
    let loader = in_child(|| {
        for word in 0.. {
            let at = word * 8 % (64 * PAGE as usize);
            // An earlier program may have left all ones in the BAR.
            touched.write(at, touched.read(at).wrapping_add(1));
        }
        0
    });
    // So slow that the move still waits when the device begins to go, even on a busy host.
    let rate = if is_debug_kernel() { MIB / 4 } else { MIB / 2 };
    let _slow = Slow::new(rate);
    let restored = thread::scope(|scope| {
        let (stop, touches, busy) = (&stop, &touches, &busy);
        let (touched, read, moved) = (&touched, &read, &moved);
        let node = &busy.node;
        let stopping = Stop(stop);
        // System calls on the mapping: they continue throughout, with EFAULT while access is revoked.
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let at = touches.fetch_add(1, Ordering::Relaxed) as usize * 4096 % (1 << 20);
                let answer = kernel_reads(touched, at);
                assert!([0, libc::EFAULT].contains(&answer), "{answer}");
            }
        });
        // An accepted request of the disk, which takes some seconds.
        let reading = scope.spawn(move || {
            let disk = disk::open_direct(SCRATCH).unwrap();
            let first = disk::read_into(&disk, read, 0, 2 << 20, 0);
            (first, disk::read_into(&disk, moved, 0, 2 << 20, 0))
        });
        wait_until("the disk reads", || {
            node.buffer(&busy.read).unwrap().busy_pages >= 256
        });
        // The move finds pages in use by the disk's next request, and waits for it halfway.
        let held = scope.spawn(move || {
            let disk = disk::open_direct(SCRATCH).unwrap();
            disk::write_from(&disk, moved, 0, 2 << 20, 4 << 20)
        });
        wait_until("the disk writes", || {
            node.buffer(&busy.moved).unwrap().busy_pages >= 256
        });
        let before = node.buffer(&busy.moved).unwrap().invalidations;
        let moving =
            scope.spawn(move || errno(node.move_part(&busy.moved, PLACEMENT_SYSTEM, 0, 0, 60_000)));
        wait_until("the move has told the importers", || {
            node.buffer(&busy.moved).unwrap().invalidations > before
        });
        // An importer that unmaps only on request, some time after the deadline.
        let pause = Duration::from_millis(u64::from(LATE_MS));
        let stubborn = &stubborn;
        scope.spawn(move || {
            wait_until("its mapping is stale", || {
                stubborn.query().state & probe::STALE != 0
            });
            thread::sleep(pause);
            stubborn.unmap();
        });

        let began = Stopwatch::start();
        let restored = go(busy);
        let took = began.elapsed();
        assert!(took < limit(), "{took:?}");

        assert_eq!(
            moving.join().unwrap(),
            libc::ENODEV,
            "it was revoked meanwhile"
        );
        if !restored {
            // No one can access the device any more; accesses in flight have ended.
            for fd in busy.all() {
                let query = node.buffer(fd).unwrap();
                assert_eq!(query.state, abi::STATE_GONE);
                let stale = node.buffer_lists(fd).unwrap().0;
                let device = query.placement == PLACEMENT_DEVICE;
                assert!(!device || stale.iter().all(|a| a.mapped == 0), "{stale:?}");
                assert!(!device || query.busy_pages == 0, "{query:?}");
            }
            for importer in [&good, &again, &late, stubborn] {
                assert_eq!(importer.query().state & probe::MAPPED, 0);
                assert_eq!(errno(importer.map()), libc::ENODEV);
            }
            assert_eq!(kernel_reads(touched, 0), libc::EFAULT);
            for fd in busy.all() {
                assert_eq!(errno(sync(fd, SYNC_READ)), libc::ENODEV);
                assert_eq!(errno(Map::new(fd.as_fd(), 4096, false)), libc::ENODEV);
                assert_eq!(errno(node.move_to(fd, PLACEMENT_SYSTEM)), libc::ENODEV);
            }
            assert_eq!(errno(node.export(None, PAGE)), libc::ENODEV);
        } else {
            assert_eq!(node.buffer(&busy.touched).unwrap().state, abi::STATE_LIVE);
            assert_eq!(kernel_reads(touched, 0), 0);
            good.map().unwrap();
            sync(&busy.touched, SYNC_WRITE).unwrap();
        }
        drop(stopping);
        // Each of the disk's requests was either completed or refused as a whole.
        for answer in [reading.join().unwrap().0, held.join().unwrap()] {
            assert!([0, libc::EFAULT].contains(&errno(answer)));
        }
        restored
    });
    assert!(touches.load(Ordering::Relaxed) > 10);
    if restored {
        loader.kill(libc::SIGKILL);
    }
    let end = loader.wait();
    assert!(
        [Err(libc::SIGBUS), Err(libc::SIGKILL)].contains(&end),
        "{end:?}"
    );
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).expect("the watcher was told");
    // System memory does not belong to the device: its users may keep it.
    assert_eq!(settled.state().mapped, 1);
    kernel.step(probe::IOC_VUNMAP).unwrap();
    settled.unmap();
}

fn nothing_is_left(bdf: &str) {
    assert_all_free(&Node::open(bdf).unwrap());
    wait_until("nobody uses the module", || {
        let users = fs::read_to_string("/sys/module/peerbuf/refcnt").unwrap();
        users.trim() == "0"
    });
}

#[test]
fn unbinding_with_everything_under_way() {
    let bdf = Node::largest().bdf;
    for _ in 0..2 {
        with_everything_under_way(&bdf, |_| {
            Node::unbind(&bdf);
            false
        });
        Node::bind(&bdf);
        nothing_is_left(&bdf);
    }
}

#[test]
fn being_unplugged_with_everything_under_way() {
    let bdf = Node::largest().bdf;
    for _ in 0..2 {
        with_everything_under_way(&bdf, |_| {
            Machine::new().unplug("bar0");
            false
        });
        Machine::new().plug("bar0", &bdf).unwrap();
        give_to_peerbuf(&bdf);
        nothing_is_left(&bdf);
    }
}

#[test]
fn a_reset_with_everything_under_way() {
    let bdf = Node::largest().bdf;
    for _ in 0..2 {
        with_everything_under_way(&bdf, |_| {
            fs::write(format!("/sys/bus/pci/devices/{bdf}/reset"), "1").unwrap();
            true
        });
        nothing_is_left(&bdf);
    }
}

#[test]
fn unloading_is_refused_with_everything_under_way() {
    let bdf = Node::largest().bdf;
    with_everything_under_way(&bdf, |busy| {
        let refused = Command::new("rmmod").arg("peerbuf").output().unwrap();
        assert!(!refused.status.success());
        // The refused unload has changed nothing.
        let query = busy.node.buffer(&busy.imported).unwrap();
        assert_eq!((query.state, query.generation), (abi::STATE_LIVE, 1));
        Node::unbind(&bdf);
        false
    });
    Node::bind(&bdf);
    nothing_is_left(&bdf);
}
