//! Every call with failing allocations and failing user memory, at each place in the call. Runs in the guest,
//! on the debug kernel.
//!
//! `/proc/thread-self/fail-nth` makes the nth fault point of the next system call fail. A fault
//! point is an allocation (slab or pages) or a copy from or to user memory. Each call is made
//! with n = 1, 2, 3 and so on until n exceeds its fault points, and many times for each n:
//! kmemleak, which scans at the end, misses the last fifty or so blocks of a size. A fault may
//! have no effect, if the kernel has an alternative (a smaller block, a reserve), or cause
//! ENOMEM or EFAULT, and nothing else. After that, the same call without a fault succeeds.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytemuck::Zeroable;
use peerbuf_lab_suite::importer::{self, DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::machine::expect;
use peerbuf_lab_suite::memory;
use peerbuf_lab_suite::node::{
    Map, Node, PAGE, SYNC_END, SYNC_WRITE, assert_all_free, errno, ioctl, nvme_bdf, pattern, sync,
};
use peerbuf_uapi::{self as abi, probe};
use peerbuf_uapi::{PLACEMENT_DEVICE, PLACEMENT_SYSTEM};
use rustix::event::{EventfdFlags, eventfd};

/// The number of times that each place fails.
const ROUNDS: u32 = 64;

/// The number of times that the buffer is compared before and after, which takes longer than the call.
const LOOKS: u32 = 4;

/// A number of pages for which the module allocates several large blocks and single pages.
const MANY: u64 = 12 * 16 + 3;

/// The faults of this thread.
struct Faults(File);

impl Faults {
    fn new() -> Self {
        let set = |name: &str, value: &str| {
            fs::write(Path::new("/sys/kernel/debug").join(name), value).expect(name);
        };
        // Allocations that may sleep fail, too, and allocations of any size.
        set("failslab/ignore-gfp-wait", "N");
        set("fail_page_alloc/ignore-gfp-wait", "N");
        set("fail_page_alloc/ignore-gfp-highmem", "N");
        set("fail_page_alloc/min-order", "0");
        // kmemleak's own allocations may fail.
        expect("kmemleak: Cannot allocate a scan area");
        for kind in ["failslab", "fail_page_alloc", "fail_usercopy"] {
            set(&format!("{kind}/verbose"), "0");
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth");
        Self(file.expect("a kernel with fault injection"))
    }

    /// Makes a call with its `n`th place failing. Returns its result, and whether there was such a place.
    fn nth<T>(&self, n: u32, call: impl FnOnce() -> T) -> (T, bool) {
        let text = n.to_string();
        self.0.write_at(text.as_bytes(), 0).expect("fail-nth");
        let answer = call();
        let mut left = [0; 16];
        // If this read fails, the place was in the read.
        let hit = self.0.read_at(&mut left, 0).is_ok() && left[0] == b'0';
        while self.0.write_at(b"0", 0).is_err() {}
        (answer, hit)
    }
}

/// The lowest free descriptor number: one higher after a leak.
fn lowest_fd() -> RawFd {
    // SAFETY: The descriptor is open, and the duplicate is closed again.
    unsafe {
        let fd = libc::dup(2);
        assert_eq!(libc::close(fd), 0);
        fd
    }
}

/// Bytes of memory that are free or in known use by others. The difference to the total is memory allocated
/// by page, such as a leak of pages.
fn free_memory() -> u64 {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let known = ["MemFree:", "Buffers:", "Cached:", "AnonPages:", "Slab:"];
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?;
            let kib: u64 = words.next()?.parse().ok()?;
            known.contains(&name).then_some(kib << 10)
        })
        .sum()
}

/// Makes `call` fail at each of its places, on what `prepare` makes, and compares `state` before and after.
/// Asserts that there are at least `least` places.
fn each_place<S, T: PartialEq + Debug>(
    what: &str,
    least: u32,
    prepare: impl Fn() -> S,
    call: impl Fn(&mut S) -> io::Result<()>,
    state: impl Fn(&S) -> T,
) {
    let faults = Faults::new();
    // Excludes the growth of the slab caches.
    let run = |stage: &mut S| call(stage).unwrap_or_else(|e| panic!("{what} without a fault: {e}"));
    for _ in 0..5 {
        run(&mut prepare());
    }
    let free = free_memory();
    let mut answers: BTreeMap<i32, u32> = BTreeMap::new();
    let mut places = 0;
    let mut stage = prepare();
    for n in 1.. {
        let mut hits = 0;
        let mut harmless = 0;
        for round in 0..ROUNDS {
            let before = (round < LOOKS).then(|| state(&stage));
            let (answer, hit) = faults.nth(n, || call(&mut stage));
            hits += u32::from(hit);
            let answer = errno(answer);
            if hit {
                *answers.entry(answer).or_default() += 1;
            }
            match answer {
                // The call succeeded in spite of the fault. Prepares again, because the call
                // has had its effect.
                0 => {
                    drop(stage);
                    stage = prepare();
                    harmless += 1;
                }
                libc::ENOMEM | libc::EFAULT => {
                    assert!(hit, "{what}, place {n}: {answer} without a fault");
                    if let Some(before) = before {
                        assert_eq!(state(&stage), before, "{what}, place {n}: {answer}");
                    }
                }
                answer => panic!("{what}, place {n}: errno {answer}"),
            }
            // Either the kernel had an alternative, or n exceeds the places; but some calls allocate only
            // occasionally.
            if harmless == 10 {
                break;
            }
        }
        run(&mut stage);
        drop(stage);
        stage = prepare();
        if hits == 0 {
            break;
        }
        places = n;
    }
    drop(stage);
    let answers: Vec<String> = answers
        .iter()
        .map(|(errno, count)| format!("errno {errno}: {count}"))
        .collect();
    println!("{what}: {places} places; {}", answers.join(", "));
    assert!(places >= least, "{what}: {places} places");
    let lost = free.saturating_sub(free_memory());
    // A third of a leak at one place, because the kernel's own records of allocations grow, too.
    let bound = MANY * PAGE * u64::from(ROUNDS) / 3;
    assert!(lost < bound, "{what}: {lost} bytes are gone");
}

fn range(pages: u64, flags: u32) -> abi::Range {
    abi::Range {
        length: pages * PAGE,
        flags,
        ..Zeroable::zeroed()
    }
}

/// A buffer with ranges of each kind, in several pieces.
fn mixed(node: &Node) -> OwnedFd {
    let mut ranges = [
        range(20, abi::RANGE_ANY_OFFSET),
        range(MANY, abi::RANGE_SYSTEM),
        range(MANY, abi::RANGE_ANY_OFFSET),
        range(1, abi::RANGE_SYSTEM),
    ];
    node.export_ranges(abi::EXPORT_MAY_MOVE, &mut ranges)
        .unwrap()
        .0
}

/// A buffer's state, except for counters that a failed call may change: invalidations and the longest wait.
fn still(node: &Node, fd: &OwnedFd) -> abi::BufferQuery {
    abi::BufferQuery {
        invalidations: 0,
        maps: 0,
        longest_wait_ns: 0,
        busy_pages: 0,
        refusals: 0,
        refused_device: [0; 64],
        refused_reason: 0,
        refused_errno: 0,
        ..node.buffer(fd).unwrap()
    }
}

fn attach(fd: &OwnedFd, flags: u32) -> Importer {
    Importer::attach(fd.as_fd(), &nvme_bdf(), flags, 0).unwrap()
}

/// A node, one of its buffers, and an attachment.
type Attached = (Node, OwnedFd, Importer);

fn attached(make: impl Fn(&Node) -> OwnedFd, flags: u32) -> Attached {
    let node = Node::largest();
    let fd = make(&node);
    let importer = attach(&fd, flags);
    (node, fd, importer)
}

fn all_of(stage: &Attached) -> (abi::BufferQuery, probe::Query, RawFd) {
    let (node, fd, importer) = stage;
    (still(node, fd), importer.query(), lowest_fd())
}

fn finish() {
    // Flushes KASAN's quarantine, which is not a leak.
    memory::in_use("");
    assert_all_free(&Node::largest());
}

#[test]
fn exporting() {
    type Stage = (Node, Option<OwnedFd>);
    let prepare = || (Node::largest(), None);
    let state = |stage: &Stage| (stage.0.bar2(), lowest_fd());
    let one = |stage: &mut Stage| {
        stage.1 = Some(stage.0.export(None, PAGE)?.0);
        Ok(())
    };
    each_place("EXPORT", 8, prepare, one, state);
    let several = |stage: &mut Stage| {
        let mut ranges = [
            range(2, abi::RANGE_ANY_OFFSET),
            range(MANY, abi::RANGE_SYSTEM),
            range(1, abi::RANGE_ANY_OFFSET),
        ];
        stage.1 = Some(stage.0.export_ranges(0, &mut ranges)?.0);
        Ok(())
    };
    each_place("EXPORT of several ranges", 20, prepare, several, state);
    finish();
}

#[test]
fn opening_and_asking() {
    type Stage = (CString, Option<OwnedFd>);
    let path = format!("/dev/peerbuf/{}", Node::largest().bdf);
    let opening = |path: &str| {
        each_place(
            path,
            2,
            || (CString::new(path).unwrap(), None),
            |stage: &mut Stage| {
                // SAFETY: The path is a C string.
                let fd = unsafe { libc::open(stage.0.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: It was opened just now.
                stage.1 = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                Ok(())
            },
            |_| lowest_fd(),
        );
    };
    opening(&path);
    opening("/dev/peerbuf/importer");
    let node = Node::largest();
    each_place("QUERY", 3, || (), |()| node.query().map(drop), |()| ());
    let buffer = mixed(&node);
    let importers = [attach(&buffer, DYNAMIC | PEER), attach(&buffer, 0)];
    importers[1].map().unwrap();
    let mut attachments = [abi::Attachment::zeroed(); 8];
    let mut pieces = [abi::Piece::zeroed(); 8];
    let request = abi::BufferQuery {
        size: size_of::<abi::BufferQuery>() as u32,
        fd: buffer.as_raw_fd(),
        attachments: attachments.as_mut_ptr().addr() as u64,
        pieces: pieces.as_mut_ptr().addr() as u64,
        nr_attachments: 8,
        attachment_size: size_of::<abi::Attachment>() as u32,
        nr_pieces: 8,
        piece_size: size_of::<abi::Piece>() as u32,
        ..Zeroable::zeroed()
    };
    let ask = |&mut mut request: &mut abi::BufferQuery| {
        node.call(abi::IOC_BUFFER, &mut request).map(drop)
    };
    each_place("BUFFER", 6, || request, ask, |_| still(&node, &buffer));
    drop((importers, buffer));
    finish();
}

#[test]
fn moving() {
    type Stage = (Node, OwnedFd, Map);
    let pages = 20 + MANY + MANY + 1;
    let prepare = |to: u32| {
        move || {
            let node = Node::largest();
            let fd = mixed(&node);
            // Every byte begins in the place that the move leaves.
            node.move_to(&fd, PLACEMENT_DEVICE + PLACEMENT_SYSTEM - to)
                .unwrap();
            let map = Map::new(fd.as_fd(), (pages * PAGE) as usize, true).unwrap();
            for page in 0..pages as usize {
                map.write(page * 4096, pattern(7, page));
            }
            (node, fd, map)
        }
    };
    let state = |stage: &Stage| {
        let lost = (0..pages as usize).find(|&i| stage.2.read(i * 4096) != pattern(7, i));
        (still(&stage.0, &stage.1), lost)
    };
    for (what, to) in [
        ("MOVE to system memory", PLACEMENT_SYSTEM),
        ("MOVE to the BAR", PLACEMENT_DEVICE),
    ] {
        let whole = |stage: &mut Stage| stage.0.move_to(&stage.1, to).map(drop);
        each_place(what, 6, prepare(to), whole, state);
    }
    let part = |stage: &mut Stage| {
        let part = (3 * PAGE, (pages - 9) * PAGE);
        stage
            .0
            .move_part(&stage.1, PLACEMENT_SYSTEM, part.0, part.1, 5000)
            .map(drop)
    };
    each_place("MOVE of a part", 6, prepare(PLACEMENT_SYSTEM), part, state);
    finish();
}

#[test]
fn revoking_and_watching() {
    type Stage = (Node, OwnedFd, OwnedFd);
    let prepare = || {
        let node = Node::largest();
        let (fd, _) = node.export(None, PAGE).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        (node, fd, event)
    };
    let state = |stage: &Stage| (still(&stage.0, &stage.1), lowest_fd());
    let revoke = |stage: &mut Stage| stage.0.revoke(&stage.1, 100).map(drop);
    each_place("REVOKE", 3, prepare, revoke, state);
    let revoked = || {
        let stage = prepare();
        stage.0.revoke(&stage.1, 100).unwrap();
        stage
    };
    let restore = |stage: &mut Stage| stage.0.restore(&stage.1).map(drop);
    each_place("RESTORE", 3, revoked, restore, state);
    let watch = |stage: &mut Stage| stage.0.watch(abi::IOC_WATCH, &stage.1, stage.2.as_fd());
    each_place("WATCH", 3, prepare, watch, state);
    let watched = || {
        let mut stage = prepare();
        watch(&mut stage).unwrap();
        stage
    };
    let unwatch = |stage: &mut Stage| stage.0.watch(abi::IOC_UNWATCH, &stage.1, stage.2.as_fd());
    each_place("UNWATCH", 2, watched, unwatch, state);
    finish();
}

#[test]
fn attaching() {
    type Stage = (Node, OwnedFd, Option<OwnedFd>, File, probe::Attach);
    let prepare = |flags: u32| {
        move || {
            let node = Node::largest();
            let fd = mixed(&node);
            let request = importer::request(fd.as_fd(), &nvme_bdf(), flags);
            (node, fd, None, importer::open().unwrap(), request)
        }
    };
    let call = |stage: &mut Stage| {
        let mut request = stage.4;
        let at = (&raw mut request).addr();
        ioctl(stage.3.as_fd(), probe::IOC_ATTACH, at)?;
        // SAFETY: The call has just made it.
        stage.2 = Some(unsafe { OwnedFd::from_raw_fd(request.fd) });
        Ok(())
    };
    let state = |stage: &Stage| (still(&stage.0, &stage.1), lowest_fd());
    each_place("ATTACH", 8, prepare(DYNAMIC | PEER), call, state);
    // For an importer that needs system memory the buffer moves, and may have moved when a later step fails.
    // A move back shows that no importer needs it there any more.
    let at_home = |stage: &Stage| {
        let (node, fd) = (&stage.0, &stage.1);
        node.move_to(fd, PLACEMENT_DEVICE).unwrap();
        let now = still(node, fd);
        (now.placement, now.nr_attachments, now.pins, lowest_fd())
    };
    each_place("ATTACH with a move", 14, prepare(0), call, at_home);
    finish();
}

#[test]
fn mapping() {
    let scattered = |node: &Node| {
        let at = |page: u64| abi::Range {
            offset: page * PAGE,
            length: 2 * PAGE,
            ..Zeroable::zeroed()
        };
        let mut ranges = [at(0), at(4), at(2), at(8)];
        node.export_ranges(0, &mut ranges).unwrap().0
    };
    let system = |node: &Node| {
        let mut ranges = [range(MANY, abi::RANGE_SYSTEM), range(3, abi::RANGE_SYSTEM)];
        node.export_ranges(0, &mut ranges).unwrap().0
    };
    let map = |stage: &mut Attached| stage.2.map_for(probe::BIDIRECTIONAL).map(drop);
    type Make<'a> = &'a dyn Fn(&Node) -> OwnedFd;
    let makes: [(&str, Make<'_>); 3] = [
        ("the BAR", &scattered),
        ("system memory", &system),
        ("both", &mixed),
    ];
    for (what, make) in makes {
        let prepare = || attached(make, DYNAMIC | PEER);
        each_place(&format!("MAP of {what}"), 6, prepare, map, all_of);
    }
    // The core pins for a static importer.
    let prepare = || attached(system, 0);
    each_place("MAP of a static one", 6, prepare, map, all_of);
    // The core WARNs if an exporter returns ENOMEM.
    expect("dma_buf_vmap");
    let prepare = || attached(system, DYNAMIC | PEER);
    let vmap = |stage: &mut Attached| stage.2.step(probe::IOC_VMAP).map(drop);
    each_place("VMAP of system memory", 8, prepare, vmap, all_of);
    finish();
}

#[test]
fn the_other_steps_of_an_importer() {
    let step = |number: u32| move |stage: &mut Attached| stage.2.step(number).map(drop);
    let done = |numbers: &'static [u32]| {
        move || {
            let stage = attached(mixed, DYNAMIC | PEER);
            for &number in numbers {
                match number {
                    probe::IOC_MAP => drop(stage.2.map().unwrap()),
                    probe::IOC_FENCE => {
                        stage.2.fence(probe::FENCE_READ, 20_000).unwrap();
                    }
                    number => drop(stage.2.step(number).unwrap()),
                }
            }
            stage
        }
    };
    let steps: [(&str, u32, &'static [u32]); 5] = [
        ("UNMAP", probe::IOC_UNMAP, &[probe::IOC_MAP]),
        ("PIN", probe::IOC_PIN, &[]),
        ("UNPIN", probe::IOC_UNPIN, &[probe::IOC_PIN]),
        ("SIGNAL", probe::IOC_SIGNAL, &[probe::IOC_FENCE]),
        (
            "DETACH",
            probe::IOC_DETACH,
            &[probe::IOC_MAP, probe::IOC_PIN, probe::IOC_FENCE],
        ),
    ];
    for (what, number, before) in steps {
        each_place(what, 3, done(before), step(number), all_of);
    }
    let fence = |stage: &mut Attached| stage.2.fence(probe::FENCE_WRITE, 20_000);
    each_place("FENCE", 4, done(&[]), fence, all_of);
    let query = |stage: &mut Attached| {
        let mut query = probe::Query {
            size: size_of::<probe::Query>() as u32,
            ..Default::default()
        };
        let at = (&raw mut query).addr();
        ioctl(stage.2.fd.as_fd(), probe::IOC_QUERY, at).map(drop)
    };
    each_place("IMPORT_QUERY", 3, done(&[]), query, all_of);
    finish();
}

#[test]
fn the_processors_access() {
    type Stage = (Node, OwnedFd, Option<Map>);
    let prepare = || {
        let node = Node::largest();
        let fd = mixed(&node);
        (node, fd, None)
    };
    let state = |stage: &Stage| (still(&stage.0, &stage.1), lowest_fd());
    let map = |stage: &mut Stage| {
        stage.2 = Some(Map::new(stage.1.as_fd(), 8 * 4096, true)?);
        Ok(())
    };
    each_place("mmap", 1, prepare, map, state);
    let guard = |stage: &mut Stage| {
        sync(&stage.1, SYNC_WRITE)?;
        sync(&stage.1, SYNC_WRITE | SYNC_END).map(drop)
    };
    each_place("SYNC", 2, prepare, guard, state);
    // A system call that reads the mapping, so the fault is taken in the kernel. It begins at an address
    // without page tables, which are then allocated, too.
    let table = 2 << 20;
    let mapped = || {
        let node = Node::largest();
        let (fd, _) = node.export(None, 2 * table).unwrap();
        let map = Map::new(fd.as_fd(), 2 * table as usize, true).unwrap();
        (node, fd, Some(map))
    };
    let null = OpenOptions::new().write(true).open("/dev/random").unwrap();
    let touch = |stage: &mut Stage| {
        let map = stage.2.as_ref().expect("it is mapped");
        let at = map.as_ptr().addr().next_multiple_of(table as usize) - map.as_ptr().addr();
        // SAFETY: The range lies in the mapping, which the kernel reads.
        match unsafe { libc::write(null.as_raw_fd(), map.as_ptr().byte_add(at), 64) } {
            64 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    each_place("a page fault", 2, mapped, touch, state);
    finish();
}
