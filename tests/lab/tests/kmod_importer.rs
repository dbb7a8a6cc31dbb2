//! The guarantees of peerbuf_probe.ko, the test importer, with buffers of three exporters. Runs in the guest.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use peerbuf::Errno;
use peerbuf::import::probe::{Direction, Kind, OnInvalidate, Options, Probe, Route, Usage};
use peerbuf_lab_suite::buffers::{heap, udmabuf};
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::importer::{self, DYNAMIC, Importer, Mapping, PEER};
use peerbuf_lab_suite::memory;
use peerbuf_lab_suite::node::{Map, Node, address, errno, in_child, ioctl, nvme_bdf};
use peerbuf_lab_suite::pci::{bound_to, spare_device, wait_until};
use peerbuf_uapi::{self as abi, probe};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// Part of a BAR.
fn bar(size: u64) -> OwnedFd {
    Node::largest().export(None, size).unwrap().0
}

/// The number of exports of the device with the largest BAR.
fn exports() -> u64 {
    Node::largest().bar2().exports
}

fn took<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (call(), start.elapsed())
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Begins and ends a CPU access (`DMA_BUF_IOCTL_SYNC`).
fn cpu_access(fd: BorrowedFd<'_>, write: bool) {
    for end in [0u64, 4] {
        let mut flags = end | if write { 2 } else { 1 };
        ioctl(fd, 0x4008_6200, (&raw mut flags).addr()).unwrap();
    }
}

#[test]
fn the_node_is_roots_and_needs_no_device() {
    let meta = fs::metadata("/dev/peerbuf/importer").unwrap();
    assert!(meta.file_type().is_char_device());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert_eq!((meta.uid(), meta.gid()), (0, 0));

    for node in Node::all() {
        Node::unbind(&node.bdf);
        drop(node.file);
    }
    let buffer = udmabuf(PAGE);
    let answer = Importer::attach(buffer.as_fd(), &nvme_bdf(), 0, 0).map(|i| i.map());
    let bound: Vec<String> = fs::read_dir("/sys/bus/pci/devices")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|dir| {
            let ids = |name| fs::read_to_string(dir.join(name)).unwrap();
            ids("vendor").trim() == "0x1af4" && ids("device").trim() == "0x1110"
        })
        .map(|dir| dir.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    for bdf in bound {
        Node::bind(&bdf);
    }
    assert_eq!(answer.unwrap().unwrap().system, PAGE);
}

#[test]
fn what_an_unprivileged_process_was_given_it_may_use_and_no_more() {
    let buffer = udmabuf(MIB);
    let attachment = Importer::attach(buffer.as_fd(), &nvme_bdf(), DYNAMIC, 0).unwrap();
    let node = importer::open().unwrap();
    let status = in_child(|| {
        // SAFETY: The child only makes system calls and exits.
        let dropped = unsafe { (libc::setgid(65534), libc::setuid(65534)) };
        assert_eq!(dropped, (0, 0));
        let opened = OpenOptions::new().read(true).open("/dev/peerbuf/importer");
        assert_eq!(errno(opened), libc::EACCES);
        let refused = Importer::attach(buffer.as_fd(), &nvme_bdf(), 0, 0);
        assert_eq!(errno(refused), libc::EACCES);
        // A process that receives a descriptor may use it.
        assert_eq!(attachment.map().unwrap().bytes, MIB);
        attachment.unmap();
        let mut request = importer::request(buffer.as_fd(), &nvme_bdf(), 0);
        let at = (&raw mut request).addr();
        assert_eq!(errno(ioctl(node.as_fd(), probe::IOC_ATTACH, at)), 0);
        // An attachment gives no access to the node's ioctl: not even to attach again.
        let on_attachment = ioctl(attachment.fd.as_fd(), probe::IOC_ATTACH, at);
        assert_eq!(errno(on_attachment), libc::ENOTTY);
        0
    })
    .wait();
    assert_eq!(status, Ok(0));
}

#[test]
fn bad_requests_get_their_errno_and_change_nothing() {
    let buffer = udmabuf(PAGE);
    let plain = File::open("/proc/self/status").unwrap();
    let nvme = nvme_bdf();
    let good = importer::request(buffer.as_fd(), &nvme, DYNAMIC | PEER);
    let on_behalf_of = |address: u64| probe::Attach { address, ..good };
    let holding = probe::Attach {
        on_invalidate: probe::ON_INVALIDATE_HOLD,
        ..good
    };
    type Change = fn(&mut probe::Attach);
    let changes: [(&str, Change, i32); 15] = [
        ("a size of zero", |r| r.size = 0, libc::EINVAL),
        ("a short size", |r| r.size -= 1, libc::EINVAL),
        ("a huge size", |r| r.size = u32::MAX, libc::E2BIG),
        ("an unknown flag", |r| r.flags |= 4, libc::EINVAL),
        (
            "a read-only file",
            |r| r.fd_flags |= libc::O_RDWR as u32,
            libc::EINVAL,
        ),
        ("an unknown manner", |r| r.on_invalidate = 3, libc::EINVAL),
        (
            "a manner for those told only",
            |r| {
                r.on_invalidate = 1;
                r.flags = PEER
            },
            libc::EINVAL,
        ),
        ("a time without holding", |r| r.hold_ms = 1, libc::EINVAL),
        (
            "a long lingering",
            |r| r.detach_ms = probe::MAX_MS + 1,
            libc::EINVAL,
        ),
        ("a descriptor on entry", |r| r.fd = 3, libc::EINVAL),
        ("a time on entry", |r| r.ns = 1, libc::EINVAL),
        ("no descriptor", |r| r.dmabuf = -1, libc::EBADF),
        ("a closed descriptor", |r| r.dmabuf = 1_000_000, libc::EBADF),
        ("bit 48", |r| r.address |= 1 << 48, libc::EINVAL),
        ("a domain of 2^31", |r| r.address = 1 << 47, libc::EINVAL),
    ];
    let mut cases: Vec<(&str, probe::Attach, i32)> = changes
        .into_iter()
        .map(|(what, change, expected)| {
            let mut request = good;
            change(&mut request);
            (what, request, expected)
        })
        .collect();
    cases.push((
        "a long hold",
        probe::Attach {
            hold_ms: probe::MAX_MS + 1,
            ..holding
        },
        libc::EINVAL,
    ));
    cases.push((
        "no dma-buf",
        probe::Attach {
            dmabuf: plain.as_raw_fd(),
            ..good
        },
        libc::EINVAL,
    ));
    cases.push((
        "nobody there",
        on_behalf_of(address("0000:ff:1f.7")),
        libc::ENXIO,
    ));
    cases.push((
        "no such domain",
        on_behalf_of(address("7fff:00:00.0")),
        libc::ENXIO,
    ));
    // The host bridge has no driver; a port's driver does no DMA through the kernel; a device of peerbuf.ko
    // is not a bus master.
    cases.push(("no driver", on_behalf_of(0), libc::EUNATCH));
    let port = bound_to("pcieport").unwrap();
    cases.push(("a port", on_behalf_of(address(&port)), libc::EUNATCH));
    let ours = Node::largest().bdf;
    cases.push(("no bus master", on_behalf_of(address(&ours)), libc::EUNATCH));

    let node = importer::open().unwrap();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let open = descriptors();
    for (what, request, expected) in cases {
        let mut sent = request;
        let at = (&raw mut sent).addr();
        let answer = ioctl(node.as_fd(), probe::IOC_ATTACH, at);
        assert_eq!(errno(answer), expected, "{what}");
        assert_eq!(sent, request, "{what}: nothing is written back");
        assert_eq!(descriptors(), open, "{what}");
    }
    for number in [
        0u32,
        abi::IOC_QUERY,
        abi::IOC_EXPORT,
        probe::IOC_MAP,
        0xBC0B,
        u32::MAX,
    ] {
        let mut sent = good;
        let at = (&raw mut sent).addr();
        let answer = ioctl(node.as_fd(), number, at);
        assert_eq!(errno(answer), libc::ENOTTY, "{number:#x}");
    }
    for bad in [0usize, 1, 0xffff_8000_0000_0000, usize::MAX] {
        let answer = ioctl(node.as_fd(), probe::IOC_ATTACH, bad);
        assert_eq!(errno(answer), libc::EFAULT);
    }
}

#[test]
fn bad_calls_on_an_attachment_get_their_errno_and_change_nothing() {
    let buffer = udmabuf(PAGE);
    let attachment = Importer::attach(buffer.as_fd(), &nvme_bdf(), DYNAMIC, 0).unwrap();
    let fd = attachment.fd.as_fd();
    let before = attachment.query();
    let call = |number: u32, words: [u32; 30]| {
        let mut sent = words;
        let answer = ioctl(fd, number, (&raw mut sent).addr());
        assert_eq!(sent, words, "{number:#x}: nothing is written back");
        errno(answer)
    };
    let words = |first: &[u32]| {
        let mut words = [0; 30];
        words[..first.len()].copy_from_slice(first);
        words
    };
    // size, flags, then fields; the fields that must be zero or small.
    let map = probe::IOC_MAP;
    assert_eq!(call(map, words(&[23])), libc::EINVAL, "a short size");
    assert_eq!(call(map, words(&[24, 1])), libc::EINVAL, "a flag");
    assert_eq!(call(map, words(&[24, 0, 3])), libc::EINVAL, "DMA_NONE");
    assert_eq!(call(map, words(&[24, 0, 0, 1])), libc::EINVAL, "padding");
    assert_eq!(call(map, words(&[24, 0, 0, 0, 1])), libc::EINVAL, "a time");
    let longer = words(&[28, 0, 0, 0, 0, 0, 1]);
    assert_eq!(call(map, longer), libc::E2BIG, "what a later version means");
    for number in probe::IOC_UNMAP..=probe::IOC_DETACH {
        if number == probe::IOC_FENCE {
            continue;
        }
        assert_eq!(call(number, words(&[15])), libc::EINVAL, "{number:#x}");
        assert_eq!(call(number, words(&[16, 1])), libc::EINVAL, "{number:#x}");
        assert_eq!(
            call(number, words(&[16, 0, 1])),
            libc::EINVAL,
            "{number:#x}"
        );
    }
    let fence = probe::IOC_FENCE;
    assert_eq!(call(fence, words(&[16, 1, 0, 10])), libc::EINVAL, "a flag");
    assert_eq!(call(fence, words(&[16, 0, 4, 10])), libc::EINVAL, "a usage");
    assert_eq!(call(fence, words(&[16, 0, 0, 0])), libc::EINVAL, "no time");
    let long = words(&[16, 0, 0, probe::MAX_MS + 1]);
    assert_eq!(call(fence, long), libc::EINVAL, "a long time");
    let query = probe::IOC_QUERY;
    assert_eq!(call(query, words(&[15])), libc::EINVAL, "a short size");
    assert_eq!(call(query, words(&[104, 1])), libc::EINVAL, "a flag");
    let mut later = words(&[108]);
    later[26] = 1;
    assert_eq!(
        call(query, later),
        libc::E2BIG,
        "what a later version means"
    );
    // A shorter query gets a shorter answer.
    let mut short = words(&[16]);
    short[4..].fill(7);
    let mut sent = short;
    ioctl(fd, query, (&raw mut sent).addr()).unwrap();
    assert_eq!((&sent[..1], &sent[4..]), (&short[..1], &short[4..]));
    for number in [0xBB00, 0xBC0B, probe::IOC_ATTACH, 0xBCFF] {
        assert_eq!(call(number, words(&[16])), libc::ENOTTY, "{number:#x}");
    }
    assert_eq!(attachment.query(), before);

    // Steps without their precondition.
    for number in [
        probe::IOC_UNMAP,
        probe::IOC_UNPIN,
        probe::IOC_SIGNAL,
        probe::IOC_VUNMAP,
    ] {
        assert_eq!(errno(attachment.step(number)), libc::ENOENT, "{number:#x}");
    }
    attachment.map().unwrap();
    assert_eq!(errno(attachment.map()), libc::EBUSY);
    attachment.step(probe::IOC_PIN).unwrap();
    assert_eq!(errno(attachment.step(probe::IOC_PIN)), libc::EBUSY);
    attachment.step(probe::IOC_VMAP).unwrap();
    assert_eq!(errno(attachment.step(probe::IOC_VMAP)), libc::EBUSY);
    attachment.fence(probe::FENCE_READ, 20_000).unwrap();
    let again = attachment.fence(probe::FENCE_READ, 20_000);
    assert_eq!(errno(again), libc::EBUSY);
    let all = probe::MAPPED | probe::PINNED | probe::VMAPPED | probe::FENCED;
    assert_eq!(attachment.query().state, all);
    attachment.step(probe::IOC_DETACH).unwrap();
    assert_eq!(attachment.query().state, probe::DETACHED);
    for number in [
        probe::IOC_PIN,
        probe::IOC_UNPIN,
        probe::IOC_VMAP,
        probe::IOC_DETACH,
    ] {
        assert_eq!(
            errno(attachment.step(number)),
            libc::ENOTCONN,
            "{number:#x}"
        );
    }
    assert_eq!(errno(attachment.map()), libc::ENOTCONN);
    let fence = attachment.fence(probe::FENCE_READ, 10);
    assert_eq!(errno(fence), libc::ENOTCONN);
    // No one waits for this fence.
    let ((), waited) = took(|| cpu_access(buffer.as_fd(), true));
    assert!(waited < ms(5000), "{waited:?}");
}

#[test]
fn an_answer_that_cannot_be_delivered_leaves_nothing_behind() {
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let buffer = bar(MIB);
    let nvme = nvme_bdf();
    let attachment = Importer::attach(buffer.as_fd(), &nvme, DYNAMIC | PEER, 0).unwrap();
    // A request in memory that can be read but not written.
    let mut memory = tempfile::tempfile().unwrap();
    let request = importer::request(buffer.as_fd(), &nvme, DYNAMIC | PEER);
    memory.write_all(bytemuck::bytes_of(&request)).unwrap();
    let map_request = probe::Map {
        size: size_of::<probe::Map>() as u32,
        ..Default::default()
    };
    memory.write_all(bytemuck::bytes_of(&map_request)).unwrap();
    memory.set_len(PAGE).unwrap();
    let page = Map::new(memory.as_fd(), PAGE as usize, false).unwrap();
    let node = importer::open().unwrap();
    let open = descriptors();

    let at = page.as_ptr().addr();
    let answer = ioctl(node.as_fd(), probe::IOC_ATTACH, at);
    assert_eq!(errno(answer), libc::EFAULT);
    assert_eq!(descriptors(), open);
    let at = at + size_of_val(&request);
    let answer = ioctl(attachment.fd.as_fd(), probe::IOC_MAP, at);
    assert_eq!(errno(answer), libc::EFAULT);
    assert_eq!(attachment.query().state, 0, "not mapped");
    assert_eq!(attachment.query().maps, 0);
    drop((attachment, buffer));
    assert_eq!(
        exports(),
        0,
        "the one that could not be delivered is gone, too"
    );
}

#[test]
fn running_out_of_descriptors_leaves_nothing_behind() {
    let buffer = bar(MIB);
    let status = in_child(|| {
        let limit = libc::rlimit {
            rlim_cur: 24,
            rlim_max: 24,
        };
        // SAFETY: The struct is valid.
        let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        assert_eq!(set, 0);
        let mut held = Vec::new();
        loop {
            match Importer::attach(buffer.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0) {
                Ok(importer) => held.push(importer),
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::EMFILE));
                    return i32::from(held.is_empty());
                }
            }
        }
    })
    .wait();
    assert_eq!(status, Ok(0));
    drop(buffer);
    assert_eq!(exports(), 0);
}

#[test]
fn every_kind_of_importer_maps_system_memory() {
    let probe = Probe::open().unwrap();
    let nvme = nvme_bdf().parse().unwrap();
    for (name, fd) in [("udmabuf", udmabuf(3 * MIB)), ("system", heap(3 * MIB))] {
        let dmabuf = peerbuf::DmaBuf::from_fd(fd).unwrap();
        for kind in [Kind::Peer, Kind::System, Kind::Pinning, Kind::Static] {
            let options = Options {
                kind,
                ..Options::default()
            };
            let attachment = probe.attach(&dmabuf, nvme, options).unwrap();
            assert!(attachment.took() > Duration::ZERO);
            if kind == Kind::Pinning {
                let refused = attachment.map(Direction::Bidirectional).unwrap_err();
                assert!(refused.to_string().contains("EINVAL"), "{refused}");
            }
            let pinned = attachment.pin();
            assert_eq!(pinned.is_ok(), kind != Kind::Static, "{name} {kind:?}");
            for direction in [
                Direction::Bidirectional,
                Direction::ToDevice,
                Direction::FromDevice,
            ] {
                let mapping = attachment.map(direction).unwrap();
                assert_eq!(mapping.route(), Route::System, "{name} {kind:?}");
                assert_eq!(mapping.bytes, 3 * MIB);
                assert!(!mapping.has_peer_memory() && mapping.provider.is_none());
                assert!((1..=768).contains(&mapping.segments));
                assert!(mapping.took > Duration::ZERO);
                let unpinned = attachment.unpin();
                match kind {
                    // An importer that cannot be invalidated must not unpin first.
                    Kind::Pinning => {
                        let refused = unpinned.unwrap_err().to_string();
                        assert!(refused.contains("EBUSY"), "{refused}");
                    }
                    Kind::Static => assert!(unpinned.is_err()),
                    _ => drop(attachment.pin().unwrap()),
                }
                attachment.unmap().unwrap();
            }
            let report = attachment.report().unwrap();
            assert_eq!((report.maps, report.mapped), (3, false));
            assert_eq!(report.pinned, kind != Kind::Static);
            assert_eq!(report.mapping.unwrap().bytes, 3 * MIB);
            attachment.detach().unwrap();
            assert!(attachment.report().unwrap().detached);
        }
    }
}

#[test]
fn kernel_mappings_are_made_and_taken_away() {
    for fd in [udmabuf(MIB), heap(MIB)] {
        let one = Importer::attach(fd.as_fd(), &nvme_bdf(), 0, 0).unwrap();
        let other = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC, 0).unwrap();
        one.step(probe::IOC_VMAP).unwrap();
        other.step(probe::IOC_VMAP).unwrap();
        assert_eq!(one.query().state, probe::VMAPPED, "system memory");
        one.step(probe::IOC_VUNMAP).unwrap();
        assert_eq!(one.query().state, 0);
        one.step(probe::IOC_VMAP).unwrap();
        // Closing the file releases the rest.
    }
}

#[test]
fn a_bar_is_reached_by_the_route_that_the_switch_gives() {
    let node = Node::largest();
    let buffer = node.export(None, MIB).unwrap().0;
    let importer = Importer::attach(buffer.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    let expected = Mapping {
        segments: 1,
        bytes: MIB,
        bus: MIB,
        provider: node.bdf.clone(),
        ..Mapping::default()
    };
    assert_eq!(importer.map().unwrap(), expected);
    // There is no route to other devices: this CPU's host bridge is not trusted.
    let far = bound_to("virtio-pci").unwrap();
    let far = Importer::attach(buffer.as_fd(), &far, DYNAMIC | PEER, 0);
    assert_eq!(errno(far), libc::EREMOTEIO);
}

#[test]
fn those_that_must_wait_for_a_fence_do() {
    let fd = udmabuf(MIB);
    let nvme = nvme_bdf();
    let leaver = Importer::attach(fd.as_fd(), &nvme, DYNAMIC, 0).unwrap();
    let told = Importer::attach(fd.as_fd(), &nvme, DYNAMIC, 0).unwrap();
    let still = Importer::attach(fd.as_fd(), &nvme, 0, 0).unwrap();
    let map = |importer: &Importer| {
        let ((), waited) = took(|| drop(importer.map().unwrap()));
        importer.unmap();
        waited
    };
    // The waiters: a map of either kind, a CPU read, a CPU write.
    for (usage, [maps, reads, writes]) in [
        (probe::FENCE_KERNEL, [true, true, true]),
        (probe::FENCE_WRITE, [false, true, true]),
        (probe::FENCE_READ, [false, false, true]),
        (probe::FENCE_BOOKKEEP, [false, false, false]),
    ] {
        let waits: [(&str, bool, &dyn Fn() -> Duration); 4] = [
            ("dynamic map", maps, &|| map(&told)),
            ("static map", maps, &|| map(&still)),
            ("read", reads, &|| took(|| cpu_access(fd.as_fd(), false)).1),
            ("write", writes, &|| took(|| cpu_access(fd.as_fd(), true)).1),
        ];
        for (what, expected, wait) in waits {
            // The fence's timeout must end every expected wait.
            let limit = if expected { 250 } else { 20_000 };
            leaver.fence(usage, limit).unwrap();
            let waited = wait();
            assert_eq!(waited >= ms(200), expected, "{what} {usage}: {waited:?}");
            assert!(waited < ms(10_000), "{what} {usage}: {waited:?}");
            let fenced = leaver.query().state & probe::FENCED != 0;
            assert_eq!(fenced, !expected, "{what} {usage}");
            let signalled = leaver.step(probe::IOC_SIGNAL);
            assert_eq!(errno(signalled), if expected { libc::ENOENT } else { 0 });
        }
    }
    // Signalled before its timeout; the timeout of an old fence does not signal a new one.
    leaver.fence(probe::FENCE_KERNEL, 20_000).unwrap();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| map(&told));
        thread::sleep(ms(100));
        leaver.step(probe::IOC_SIGNAL).unwrap();
        let waited = waiter.join().unwrap();
        assert!(waited < ms(10_000), "{waited:?}");
    });
    leaver.fence(probe::FENCE_KERNEL, 20_000).unwrap();
    thread::sleep(ms(500));
    assert_ne!(leaver.query().state & probe::FENCED, 0);
    // Closing signals, too.
    drop(leaver);
    assert!(map(&told) < ms(10_000));
}

#[test]
fn a_signal_ends_the_wait_for_a_fence() {
    let fd = udmabuf(MIB);
    let leaver = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC, 0).unwrap();
    leaver.fence(probe::FENCE_KERNEL, 20_000).unwrap();
    for flags in [DYNAMIC, 0] {
        let waiter = Importer::attach(fd.as_fd(), &nvme_bdf(), flags, 0).unwrap();
        let child = in_child(|| errno(waiter.map()));
        thread::sleep(ms(150));
        child.kill(libc::SIGKILL);
        let (end, waited) = took(|| child.wait());
        assert_eq!(end, Err(libc::SIGKILL));
        assert!(waited < ms(5000), "{waited:?}");
        assert_eq!(waiter.query().maps, 0);
    }
}

#[test]
fn a_mapping_is_held_until_told() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let mut request = importer::request(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER);
    request.on_invalidate = probe::ON_INVALIDATE_HOLD;
    let holder = Importer::attach_as(request).unwrap();
    holder.map().unwrap();
    let lawful = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    lawful.map().unwrap();
    thread::scope(|scope| {
        let unbinding = scope.spawn(|| Node::unbind(&bdf));
        let stale = probe::MAPPED | probe::STALE;
        wait_until("told", || holder.query().state == stale);
        wait_until("told, too", || lawful.query().state == 0);
        thread::sleep(ms(400));
        assert!(!unbinding.is_finished(), "it waits for the mapping");
        holder.unmap();
        unbinding.join().unwrap();
    });
    assert_eq!((holder.query().state, holder.query().invalidations), (0, 1));
    assert_eq!(lawful.query().invalidations, 1);
    assert_eq!(errno(holder.map()), libc::ENODEV);
    Node::bind(&bdf);
}

#[test]
fn who_attaches_for_a_device_that_is_going_can_be_killed() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let mut request = importer::request(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER);
    request.on_invalidate = probe::ON_INVALIDATE_HOLD;
    let (told, telling) = std::io::pipe().unwrap();
    // The child holds what the unbind waits for, and waits for the unbind.
    let child = in_child(|| {
        let holder = Importer::attach_as(request).unwrap();
        holder.map().unwrap();
        (&telling).write_all(b"!").unwrap();
        wait_until("told", || holder.query().state & probe::STALE != 0);
        errno(Importer::attach(fd.as_fd(), &bdf, DYNAMIC | PEER, 0))
    });
    (&told).read_exact(&mut [0]).unwrap();
    thread::scope(|scope| {
        let unbinding = scope.spawn(|| Node::unbind(&bdf));
        thread::sleep(ms(800));
        assert!(!unbinding.is_finished(), "it waits for the mapping");
        child.kill(libc::SIGKILL);
        let (end, waited) = took(|| child.wait());
        assert_eq!(end, Err(libc::SIGKILL));
        assert!(waited < ms(10_000), "{waited:?}");
        unbinding.join().unwrap();
    });
    Node::bind(&bdf);
}

#[test]
fn a_mapping_is_held_for_a_time() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let holder = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 600).unwrap();
    holder.map().unwrap();
    let ((), waited) = took(|| Node::unbind(&bdf));
    assert!(waited >= ms(550) && waited < ms(10_000), "{waited:?}");
    assert_eq!(holder.query().state, 0);
    Node::bind(&bdf);
    // The file is closed while the importer holds the mapping: the mapping is released at once.
    let (fd, _) = Node::open(&bdf).unwrap().export(None, MIB).unwrap();
    let holder = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 30_000).unwrap();
    holder.map().unwrap();
    thread::scope(|scope| {
        let unbinding = scope.spawn(|| took(|| Node::unbind(&bdf)).1);
        wait_until("told", || holder.query().invalidations == 1);
        drop(holder);
        let waited = unbinding.join().unwrap();
        assert!(waited < ms(10_000), "{waited:?}");
    });
    Node::bind(&bdf);
}

#[test]
fn who_maps_again_by_itself_learns_that_it_may_not() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let probe = Probe::open().unwrap();
    let dmabuf = peerbuf::DmaBuf::from_fd(fd).unwrap();
    let options = Options {
        on_invalidate: OnInvalidate::Remap,
        ..Options::default()
    };
    let attach = || probe.attach(&dmabuf, nvme_bdf().parse().unwrap(), options);
    let mapped = attach().unwrap();
    mapped.map(Direction::Bidirectional).unwrap();
    let given_up = attach().unwrap();
    given_up.map(Direction::Bidirectional).unwrap();
    given_up.unmap().unwrap();
    Node::unbind(&bdf);
    let error = || mapped.report().unwrap().remap_error;
    wait_until("it tried", || error() == Some(Errno::NODEV));
    let report = mapped.report().unwrap();
    assert_eq!(
        (report.invalidations, report.maps, report.remaps),
        (1, 1, 0)
    );
    // Only an importer that had a mapping maps again.
    let report = given_up.report().unwrap();
    assert_eq!((report.invalidations, report.remap_error), (1, None));
    Node::bind(&bdf);
}

#[test]
fn who_maps_again_by_itself_follows_a_move() {
    let node = Node::largest();
    let fd = node.export_movable(MIB).unwrap();
    let mut request = importer::request(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER);
    request.on_invalidate = probe::ON_INVALIDATE_REMAP;
    let follower = Importer::attach_as(request).unwrap();
    request.on_invalidate = probe::ON_INVALIDATE_HOLD;
    let holder = Importer::attach_as(request).unwrap();
    assert_eq!(follower.map().unwrap().bus, MIB);
    assert_eq!(holder.map().unwrap().bus, MIB);
    for (round, placement) in [abi::PLACEMENT_SYSTEM, abi::PLACEMENT_DEVICE]
        .into_iter()
        .enumerate()
    {
        node.move_to(&fd, placement).unwrap();
        let remaps = round as u64 + 1;
        wait_until("it follows", || follower.query().remaps == remaps);
        let found = follower.query();
        let in_bar = placement == abi::PLACEMENT_DEVICE;
        assert_eq!(found.bus_bytes, if in_bar { MIB } else { 0 });
        assert_eq!(found.system_bytes, if in_bar { 0 } else { MIB });
        assert_eq!((found.invalidations, found.maps), (remaps, remaps + 1));
        assert_eq!((found.remap_error, found.state), (0, probe::MAPPED));
        // The other importer keeps its mapping of the BAR until told, and the move back waits for that.
        let stale = probe::MAPPED | probe::STALE;
        assert_eq!(holder.query().state, if in_bar { 0 } else { stale });
        holder.unmap();
    }
}

#[test]
fn an_attachment_outlives_its_file_as_long_as_it_was_told() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let mut request = importer::request(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER);
    request.detach_ms = 700;
    let lingering = Importer::attach_as(request).unwrap();
    lingering.map().unwrap();
    let start = Instant::now();
    drop((lingering, fd));
    assert_eq!(exports(), 1);
    wait_until("it lets go", || exports() == 0);
    assert!(start.elapsed() >= ms(650), "{:?}", start.elapsed());

    // After an invalidation the importer behaves, with or without a file.
    let (fd, _) = node.export(None, MIB).unwrap();
    request.dmabuf = fd.as_raw_fd();
    request.detach_ms = 20_000;
    let lingering = Importer::attach_as(request).unwrap();
    lingering.map().unwrap();
    drop(lingering);
    let ((), waited) = took(|| Node::unbind(&bdf));
    assert!(waited < ms(10_000), "{waited:?}");
    Node::bind(&bdf);
    // An attachment told to hold can be told to detach.
    let (fd, _) = Node::open(&bdf).unwrap().export(None, MIB).unwrap();
    request.dmabuf = fd.as_raw_fd();
    let lingering = Importer::attach_as(request).unwrap();
    lingering.step(probe::IOC_DETACH).unwrap();
    drop((lingering, fd));
    assert_eq!(exports(), 0);
}

#[test]
fn an_attachment_that_lingers_keeps_its_module() {
    let fd = udmabuf(PAGE);
    let mut request = importer::request(fd.as_fd(), &nvme_bdf(), 0);
    request.detach_ms = 1500;
    drop(Importer::attach_as(request).unwrap());
    let users = || {
        let text = fs::read_to_string("/sys/module/peerbuf_probe/refcnt").unwrap();
        text.trim().parse::<i32>().unwrap()
    };
    assert!(users() >= 1);
    assert!(!done("rmmod", "peerbuf_probe"));
    // The fence of the previous test has a timeout of twenty seconds.
    let waiting = Stopwatch::start();
    while users() != 0 {
        assert!(waiting.elapsed() < ms(40_000), "{} users", users());
        thread::sleep(ms(20));
    }
    assert!(done("rmmod", "peerbuf_probe"));
    assert!(done("insmod", "/opt/peerbuf/modules/peerbuf_probe.ko"));
}

/// Whether a command on a module succeeded.
fn done(command: &str, module: &str) -> bool {
    let ended = Command::new(command).arg(module).output().unwrap();
    ended.status.success()
}

#[test]
fn exporter_and_importer_are_loaded_each_without_the_other() {
    let node = |name: &str| fs::exists(format!("/dev/peerbuf/{name}")).unwrap();
    let bdf = Node::largest().bdf;
    assert!(done("rmmod", "peerbuf"));
    wait_until("no exporter", || !node("provider") && !node(&bdf));
    let buffer = udmabuf(PAGE);
    let importer = Importer::attach(buffer.as_fd(), &nvme_bdf(), DYNAMIC, 0).unwrap();
    importer.map().unwrap();
    drop(importer);
    assert!(done("insmod", "/opt/peerbuf/modules/peerbuf.ko"));
    wait_until("the devices", || Node::all().len() == 3);

    assert!(done("rmmod", "peerbuf_probe"));
    wait_until("no importer", || !node("importer"));
    let buffer = bar(MIB);
    let map = Map::new(buffer.as_fd(), MIB as usize, true).unwrap();
    map.write(0, 5);
    assert_eq!(map.read(0), 5);
    let missing = Probe::open().unwrap_err().to_string();
    assert!(missing.contains("load peerbuf_probe.ko"), "{missing}");
    assert!(done("insmod", "/opt/peerbuf/modules/peerbuf_probe.ko"));
    wait_until("the importer", || node("importer"));
}

#[test]
fn a_killed_process_leaves_nothing_behind() {
    let node = Node::largest();
    for round in 0..10 {
        let child = in_child(|| {
            let (fd, _) = node.export(None, MIB).unwrap();
            let importer =
                Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 30_000).unwrap();
            importer.map().unwrap();
            importer.step(probe::IOC_PIN).unwrap();
            importer.fence(probe::FENCE_BOOKKEEP, 30_000).unwrap();
            loop {
                importer.unmap();
                importer.map().unwrap();
            }
        });
        thread::sleep(ms(15 * round));
        child.kill(libc::SIGKILL);
        assert_eq!(child.wait(), Err(libc::SIGKILL));
        assert_eq!(exports(), 0);
    }
}

#[test]
fn sixty_four_importers_are_told_each() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let importers: Vec<_> = (0..64)
        .map(|_| Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap())
        .collect();
    for importer in &importers {
        importer.map().unwrap();
    }
    Node::unbind(&bdf);
    for importer in &importers {
        assert_eq!(
            (importer.query().invalidations, importer.query().state),
            (1, 0)
        );
    }
    Node::bind(&bdf);
}

#[test]
fn a_driver_does_not_go_before_an_attachment_that_is_letting_go_by_itself() {
    let hold = ms(3000);
    let spare = spare_device();
    let buffer = udmabuf(4 * PAGE);
    let importer = Importer::attach(buffer.as_fd(), &spare, DYNAMIC, 0).unwrap();
    importer.map().unwrap();
    let [fencing, mapping] =
        [(); 2].map(|()| Importer::attach(buffer.as_fd(), &nvme_bdf(), DYNAMIC, 0).unwrap());
    fencing
        .fence(probe::FENCE_KERNEL, hold.as_millis() as u32)
        .unwrap();
    let began = Instant::now();
    thread::scope(|scope| {
        // Waits for the fence with the reservation lock held, which the detach needs.
        scope.spawn(|| mapping.map().unwrap());
        thread::sleep(ms(300));
        scope.spawn(move || drop(importer));
        thread::sleep(ms(300));
        fs::write("/sys/bus/pci/drivers/ahci/unbind", &spare).unwrap();
        let took = began.elapsed();
        assert!(took > hold - ms(200), "{took:?}: it was still mapped");
    });
    fs::write("/sys/bus/pci/drivers/ahci/bind", &spare).unwrap();
}

#[test]
fn a_storm_of_calls_on_shared_attachments_ends_well() {
    let largest = Node::largest().bdf;
    let spare = spare_device();
    let end = Instant::now() + Duration::from_secs(4);
    let storm = |salt: u64| {
        let mut rng = StdRng::seed_from_u64(salt);
        let mut calls = 0u32;
        // At least this many calls, however slow the machine is.
        while Instant::now() < end || calls <= 300 {
            let buffer = match rng.random_range(0..3) {
                0 => udmabuf(4 * PAGE),
                1 => heap(4 * PAGE),
                _ => match Node::open(&largest).and_then(|node| node.export(None, 16 * PAGE)) {
                    Ok((fd, _)) => fd,
                    Err(_) => continue,
                },
            };
            let bdf = if rng.random_bool(0.5) {
                &spare
            } else {
                &nvme_bdf()
            };
            let mut request = importer::request(buffer.as_fd(), bdf, rng.random_range(0..4));
            if request.flags & DYNAMIC != 0 {
                request.on_invalidate = rng.random_range(0..3);
            }
            if request.on_invalidate == probe::ON_INVALIDATE_HOLD {
                request.hold_ms = rng.random_range(1..30);
            }
            request.detach_ms = rng.random_range(0..3) * 10;
            let Ok(attachment) = Importer::attach_as(request) else {
                continue;
            };
            let seeds: [u64; 2] = rng.random();
            thread::scope(|scope| {
                for seed in seeds {
                    let attachment = &attachment;
                    scope.spawn(move || {
                        let mut rng = StdRng::seed_from_u64(seed);
                        for _ in 0..30 {
                            let _ = match rng.random_range(0..10) {
                                0..3 => attachment.map_for(rng.random_range(0..3)),
                                3 => attachment
                                    .fence(rng.random_range(0..4), rng.random_range(1..20))
                                    .map(|()| 0),
                                4 => Ok(attachment.query().maps),
                                // A detach ends the round, so it is rare.
                                5 if rng.random_bool(0.1) => attachment.step(probe::IOC_DETACH),
                                6..8 => attachment.step(probe::IOC_UNMAP),
                                _ => attachment.step(
                                    [
                                        probe::IOC_PIN,
                                        probe::IOC_UNPIN,
                                        probe::IOC_SIGNAL,
                                        probe::IOC_VMAP,
                                        probe::IOC_VUNMAP,
                                    ][rng.random_range(0..5)],
                                ),
                            };
                        }
                    });
                }
            });
            calls += 60;
        }
    };
    thread::scope(|scope| {
        let storms: Vec<_> = (0..3)
            .map(|salt| scope.spawn(move || storm(salt)))
            .collect();
        let mut rng = StdRng::seed_from_u64(5);
        while storms.iter().any(|storm| !storm.is_finished()) {
            thread::sleep(ms(rng.random_range(10..60)));
            Node::unbind(&largest);
            Node::bind(&largest);
            if rng.random_bool(0.2) {
                fs::write("/sys/bus/pci/drivers/ahci/unbind", &spare).unwrap();
                fs::write("/sys/bus/pci/drivers/ahci/bind", &spare).unwrap();
            }
        }
    });
    // Late detaches take a moment.
    wait_until("nothing is left", || exports() == 0);
}

#[test]
fn attaching_mapping_and_fencing_leak_nothing() {
    let fd = udmabuf(PAGE);
    let round = || {
        let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC, 0).unwrap();
        importer.map().unwrap();
        importer.fence(probe::FENCE_READ, 1000).unwrap();
        importer.step(probe::IOC_SIGNAL).unwrap();
    };
    for _ in 0..200 {
        round();
    }
    let before = memory::in_use("");
    for _ in 0..4000 {
        round();
    }
    // A fence is freed after an RCU grace period.
    wait_until("an attachment or a fence is some 200 bytes", || {
        memory::in_use("").saturating_sub(before) < 400 << 10
    });
}

#[test]
fn the_crate_says_what_is_missing() {
    let fd = peerbuf::DmaBuf::from_fd(udmabuf(PAGE)).unwrap();
    let probe = Probe::open().unwrap();
    let refused = |device: &str, options| {
        let device = device.parse().unwrap();
        probe.attach(&fd, device, options).unwrap_err().to_string()
    };
    let nobody = refused("0000:ff:1f.7", Options::default());
    assert!(
        nobody.contains("udmabuf for 0000:ff:1f.7: ENXIO"),
        "{nobody}"
    );
    assert!(nobody.contains("no such PCI device"), "{nobody}");
    let driverless = refused("0000:00:00.0", Options::default());
    assert!(driverless.contains("no driver"), "{driverless}");
    let deaf = Options {
        kind: Kind::Static,
        on_invalidate: OnInvalidate::Hold(None),
        ..Options::default()
    };
    assert!(refused(&nvme_bdf(), deaf).contains("EINVAL"));
    let attachment = probe.attach(&fd, nvme_bdf().parse().unwrap(), Options::default());
    let attachment = attachment.unwrap();
    attachment.fence(Usage::Write, ms(10_000)).unwrap();
    assert!(attachment.report().unwrap().fenced);
    attachment.signal().unwrap();
    attachment.vmap().unwrap();
    assert_eq!(attachment.report().unwrap().vmapped, Some(false));
    attachment.vunmap().unwrap();
    assert_eq!(attachment.report().unwrap().mapping, None);
}
