//! The guarantees of peerbuf.ko, tested through its ioctls alone. Runs in the guest.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::disk::{self, SCRATCH, Slow};
use peerbuf_lab_suite::importer::{DYNAMIC, Importer, PEER, State};
use peerbuf_lab_suite::memory;
use peerbuf_lab_suite::node::{
    MIB, Map, Node, PAGE, Request, SYNC_END, SYNC_READ, SYNC_WRITE, address, assert_all_free,
    differs, errno, fill, in_child, ioctl, nvme_bdf, pattern, sync,
};
use peerbuf_lab_suite::pci::wait_until;
use peerbuf_uapi::{self as abi, probe};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

#[test]
fn node_is_for_root_only() {
    for node in Node::all() {
        let meta = node.file.metadata().unwrap();
        assert!(meta.file_type().is_char_device());
        assert_eq!(meta.permissions().mode() & 0o777, 0o600);
        assert_eq!((meta.uid(), meta.gid()), (0, 0));
    }
}

#[test]
fn query_tells_what_the_device_is() {
    let nodes = Node::all();
    let sizes: Vec<u64> = nodes.iter().map(|node| node.bar2().size).collect();
    assert_eq!(sizes, [64 * MIB, 16 * MIB, MIB], "the lab's devices");
    for node in &nodes {
        let query = node.query().unwrap();
        assert_eq!(query.features, abi::FEATURES);
        assert_eq!(u64::from(query.page_size), PAGE);
        assert_eq!((query.vendor, query.device), (0x1af4, 0x1110));
        assert_eq!(query.address, address(&node.bdf));
        // sysfs has one line per BAR: 'start end flags'.
        let resources =
            fs::read_to_string(format!("/sys/bus/pci/devices/{}/resource", node.bdf)).unwrap();
        for (bar, line) in query.bars.iter().zip(resources.lines()) {
            let field: Vec<u64> = line
                .split_whitespace()
                .map(|n| u64::from_str_radix(n.trim_start_matches("0x"), 16).unwrap())
                .collect();
            let size = if field[0] == 0 {
                0
            } else {
                field[1] - field[0] + 1
            };
            assert_eq!((bar.size, bar.free), (size, size));
            assert_eq!(bar.flags & !abi::BAR_FLAGS, 0);
            assert_eq!(bar.flags & abi::BAR_MEMORY != 0, field[2] & 0x200 != 0);
            assert_eq!(
                bar.flags & abi::BAR_PREFETCHABLE != 0,
                field[2] & 0x2000 != 0
            );
            assert_eq!(bar.flags & abi::BAR_EXPORT != 0, size >= PAGE);
            assert_eq!(bar.flags & abi::BAR_PAGES != 0, size >= 2 * MIB);
            let combines = size >= 2 * MIB && bar.flags & abi::BAR_PREFETCHABLE != 0;
            assert_eq!(bar.flags & abi::BAR_WRITE_COMBINING != 0, combines);
        }
    }
}

#[test]
fn exports_take_their_range_and_give_it_back() {
    let node = Node::largest();
    let size = node.bar2().size;
    assert_all_free(&node);

    let (exact, at) = node.export(Some(8 * MIB), MIB).unwrap();
    assert_eq!(at, 8 * MIB);
    let bar = node.bar2();
    assert_eq!((bar.free, bar.exports), (size - MIB, 1));
    assert_eq!(bar.largest_free, size - 9 * MIB);

    for (offset, length) in [
        (8 * MIB, MIB),
        (8 * MIB - PAGE, 2 * PAGE),
        (9 * MIB - PAGE, PAGE),
        (0, size),
    ] {
        assert_eq!(
            errno(node.export(Some(offset), length)),
            libc::EBUSY,
            "{offset:#x}"
        );
    }
    assert_eq!(errno(node.export(None, size - 8 * MIB)), libc::ENOSPC);
    let (before, first) = node.export(None, 8 * MIB).unwrap();
    assert_eq!(first, 0, "the lowest place where it fits");
    let (after, next) = node.export(None, PAGE).unwrap();
    assert_eq!(next, 9 * MIB);

    // A duplicate descriptor keeps the range; closing the last one frees it.
    let second = exact.try_clone().unwrap();
    drop(exact);
    assert_eq!(node.bar2().exports, 3);
    drop(second);
    assert_eq!(node.bar2().exports, 2);
    // A mapping keeps the range, too.
    let map = Map::new(after.as_fd(), PAGE as usize, true).unwrap();
    drop((before, after));
    assert_eq!(node.bar2().exports, 1);
    drop(map);
    assert_all_free(&node);
    let (whole, _) = node.export(Some(0), size).unwrap();
    assert_eq!(node.bar2().free, 0);
    drop(whole);
    assert_all_free(&node);
}

#[test]
fn allocator_agrees_with_a_model() {
    let node = Node::largest();
    let pages = (node.bar2().size / PAGE) as usize;
    let mut rng = StdRng::seed_from_u64(7);
    let mut model = vec![false; pages];
    let mut held: Vec<(OwnedFd, usize, usize)> = Vec::new();
    let mut refused = 0;
    for _ in 0..1500 {
        if !held.is_empty() && rng.random_bool(0.45) {
            let (fd, at, len) = held.swap_remove(rng.random_range(0..held.len()));
            drop(fd);
            model[at..at + len].fill(false);
        } else {
            let len = rng.random_range(1..=pages / 24);
            let offset = rng
                .random_bool(0.5)
                .then(|| rng.random_range(0..pages - len));
            let answer = node.export(offset.map(|p| p as u64 * PAGE), len as u64 * PAGE);
            let fits = |at: usize| !model[at..at + len].contains(&true);
            let expected = match offset {
                Some(at) => fits(at).then_some(at).ok_or(libc::EBUSY),
                None => (0..=pages - len).find(|&at| fits(at)).ok_or(libc::ENOSPC),
            };
            match (answer, expected) {
                (Ok((fd, got)), Ok(at)) => {
                    assert_eq!(got, at as u64 * PAGE);
                    model[at..at + len].fill(true);
                    held.push((fd, at, len));
                }
                (Err(e), Err(code)) => {
                    assert_eq!(e.raw_os_error(), Some(code));
                    refused += 1;
                }
                (got, expected) => panic!("{got:?}, the model says {expected:?}"),
            }
        }
        let bar = node.bar2();
        assert_eq!(bar.exports as usize, held.len());
        let free = model.iter().filter(|taken| !**taken).count();
        assert_eq!(bar.free, free as u64 * PAGE);
        let longest = model
            .split(|taken| *taken)
            .map(<[bool]>::len)
            .max()
            .unwrap();
        assert_eq!(bar.largest_free, longest as u64 * PAGE);
    }
    assert!(refused > 50, "the walk must also hit refusals: {refused}");
    drop(held);
    assert_all_free(&node);
}

#[test]
fn bad_requests_get_their_errno_and_change_nothing() {
    let node = Node::largest();
    let size = node.bar2().size;
    let good = Node::request(None, MIB);
    let at = |offset, length| Node::request(Some(offset), length);
    type Change = fn(&mut Request);
    let changes: [(&str, Change, i32); 29] = [
        ("a size of zero", |r| r.export.size = 0, libc::EINVAL),
        ("a short size", |r| r.export.size -= 1, libc::EINVAL),
        ("a huge size", |r| r.export.size = u32::MAX, libc::E2BIG),
        ("bit 2", |r| r.export.flags |= 1 << 2, libc::EINVAL),
        ("clearing", |r| r.export.flags |= 1 << 8, libc::EINVAL),
        (
            "a cache mode without a name",
            |r| r.export.flags |= 2 << 4,
            libc::EINVAL,
        ),
        ("every flag", |r| r.export.flags = u32::MAX, libc::EINVAL),
        ("an alignment", |r| r.range.flags |= 21 << 24, libc::EINVAL),
        (
            "any offset, and system memory",
            |r| r.range.flags = abi::RANGE_FLAGS,
            libc::EINVAL,
        ),
        (
            "any offset, and an offset",
            |r| r.range.offset = PAGE,
            libc::EINVAL,
        ),
        ("no range", |r| r.export.nr_ranges = 0, libc::EINVAL),
        (
            "too many ranges",
            |r| r.export.nr_ranges = 1025,
            libc::EINVAL,
        ),
        (
            "2^32-1 ranges",
            |r| r.export.nr_ranges = u32::MAX,
            libc::EINVAL,
        ),
        ("no range's size", |r| r.export.range_size = 0, libc::EINVAL),
        ("a short range", |r| r.export.range_size -= 1, libc::EINVAL),
        (
            "a huge range",
            |r| r.export.range_size = u32::MAX,
            libc::E2BIG,
        ),
        ("a length on entry", |r| r.export.length = 1, libc::EINVAL),
        ("a descriptor on entry", |r| r.export.fd = 3, libc::EINVAL),
        (
            "a write-only descriptor",
            |r| r.export.fd_flags = libc::O_WRONLY as u32,
            libc::EINVAL,
        ),
        ("access mode 3", |r| r.export.fd_flags = 3, libc::EINVAL),
        (
            "an open flag that makes no sense",
            |r| r.export.fd_flags = (libc::O_RDWR | libc::O_APPEND) as u32,
            libc::EINVAL,
        ),
        ("BAR 6", |r| r.range.bar = 6, libc::EINVAL),
        ("BAR 2^32-1", |r| r.range.bar = u32::MAX, libc::EINVAL),
        ("a BAR that is absent", |r| r.range.bar = 5, libc::EINVAL),
        (
            "a BAR for system memory",
            |r| r.range.flags = abi::RANGE_SYSTEM,
            libc::EINVAL,
        ),
        ("a BAR below a page", |r| r.range.bar = 0, libc::EOPNOTSUPP),
        ("no bytes", |r| r.range.length = 0, libc::EINVAL),
        ("half a page", |r| r.range.length = PAGE / 2, libc::EINVAL),
        (
            "2^64 bytes less a page",
            |r| r.range.length = 0u64.wrapping_sub(PAGE),
            libc::EINVAL,
        ),
    ];
    let mut cases: Vec<(&str, Request, i32)> = changes
        .into_iter()
        .map(|(what, change, expected)| {
            let mut request = good;
            change(&mut request);
            (what, request, expected)
        })
        .collect();
    cases.extend([
        (
            "more than the BAR",
            Node::request(None, size + PAGE),
            libc::EINVAL,
        ),
        ("an offset within a page", at(PAGE / 2, PAGE), libc::EINVAL),
        (
            "the end beyond the BAR",
            at(size - PAGE, 2 * PAGE),
            libc::EINVAL,
        ),
        ("the start beyond the BAR", at(size, PAGE), libc::EINVAL),
        (
            "an end of 2^64",
            at(0u64.wrapping_sub(PAGE), PAGE),
            libc::EOVERFLOW,
        ),
        (
            "an end that wraps",
            at(0u64.wrapping_sub(PAGE), 4 * PAGE),
            libc::EOVERFLOW,
        ),
    ]);
    let before = node.query().unwrap();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let open = descriptors();
    for (what, request, expected) in cases {
        let mut sent = request;
        assert_eq!(errno(node.call_export(&mut sent)), expected, "{what}");
        assert_eq!(sent, request, "{what}: nothing is written back");
        assert_eq!(node.query().unwrap(), before, "{what}");
        assert_eq!(descriptors(), open, "{what}");
    }

    let mut query = abi::Query {
        size: size_of::<abi::Query>() as u32,
        flags: 1,
        ..Zeroable::zeroed()
    };
    assert_eq!(errno(node.call(abi::IOC_QUERY, &mut query)), libc::EINVAL);
    query.flags = 0;
    query.size = abi::QUERY_MIN_SIZE as u32 - 1;
    assert_eq!(errno(node.call(abi::IOC_QUERY, &mut query)), libc::EINVAL);
    for number in [0u32, 0xBB09, 0xBBFF, 0xBC00, 0x4004_BB00, u32::MAX] {
        assert_eq!(
            errno(node.call(number, &mut query)),
            libc::ENOTTY,
            "{number:#x}"
        );
    }
}

/// Every byte of a value, with `more` bytes after it, `last` being the last one.
fn longer<T: bytemuck::Pod>(value: &T, more: usize, last: u8) -> Vec<u8> {
    let mut bytes = bytemuck::bytes_of(value).to_vec();
    bytes.resize(bytes.len() + more, 0);
    let len = bytes.len();
    bytes[..4].copy_from_slice(&(len as u32).to_ne_bytes());
    *bytes.last_mut().unwrap() |= last;
    bytes
}

#[test]
fn longer_structs_of_a_later_version_are_taken_if_the_rest_is_zero() {
    let node = Node::largest();
    let (fd, _) = node.export(None, PAGE).unwrap();
    let dmabuf = fd.as_raw_fd();
    let ioctl = |number: u32, bytes: &mut [u8]| {
        errno(ioctl(node.file.as_fd(), number, bytes.as_mut_ptr().addr()))
    };
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let watch = abi::Watch {
        fd: dmabuf,
        eventfd: event.as_raw_fd(),
        ..Zeroable::zeroed()
    };
    let revoke = abi::Revoke {
        fd: dmabuf,
        ..Zeroable::zeroed()
    };
    let restore = abi::Restore {
        fd: dmabuf,
        ..Zeroable::zeroed()
    };
    let request = abi::Move {
        fd: dmabuf,
        placement: abi::PLACEMENT_SYSTEM,
        ..Zeroable::zeroed()
    };
    let query = abi::BufferQuery {
        fd: dmabuf,
        ..Zeroable::zeroed()
    };
    let open = abi::Watch { events: 1, ..watch };
    type Bytes<'a> = &'a dyn Fn(usize, u8) -> Vec<u8>;
    let calls: [(u32, Bytes<'_>); 7] = [
        (abi::IOC_QUERY, &|more, last| {
            longer(&abi::Query::zeroed(), more, last)
        }),
        (abi::IOC_MOVE, &|more, last| longer(&request, more, last)),
        (abi::IOC_WATCH, &|more, last| longer(&open, more, last)),
        (abi::IOC_UNWATCH, &|more, last| longer(&watch, more, last)),
        (abi::IOC_REVOKE, &|more, last| longer(&revoke, more, last)),
        (abi::IOC_RESTORE, &|more, last| longer(&restore, more, last)),
        (abi::IOC_BUFFER, &|more, last| longer(&query, more, last)),
    ];
    for (number, bytes) in calls {
        for more in [1, 8, 100] {
            let mut unknown = bytes(more, 1);
            let sent = unknown.clone();
            assert_eq!(ioctl(number, &mut unknown), libc::E2BIG, "{number:#x}");
            assert_eq!(unknown, sent, "{number:#x}: nothing is written back");
        }
        let mut known = bytes(100, 0);
        assert_eq!(ioctl(number, &mut known), 0, "{number:#x}");
        let end = known.len() - 100;
        assert!(known[end..].iter().all(|&byte| byte == 0), "{number:#x}");
        // A page is the limit.
        let page = bytes(PAGE as usize - end + 1, 0);
        assert_eq!(ioctl(number, &mut page.clone()), libc::E2BIG);
    }
    drop(fd);
    assert_all_free(&node);

    let mut export = Node::request(None, MIB);
    let mut ranges = [export.range; 2].map(|range| (range, [0u64; 2]));
    ranges[1].1[1] = 1;
    export.export.ranges = ranges.as_mut_ptr().addr() as u64;
    export.export.nr_ranges = 2;
    export.export.range_size = size_of_val(&ranges[0]) as u32;
    let mut unknown = longer(&export.export, 16, 1);
    assert_eq!(ioctl(abi::IOC_EXPORT, &mut unknown), libc::E2BIG);
    // So is what a later version means by a longer range.
    let mut known = longer(&export.export, 16, 0);
    assert_eq!(ioctl(abi::IOC_EXPORT, &mut known), libc::E2BIG);
    assert_all_free(&node);
    ranges[1].1[1] = 0;
    assert_eq!(ioctl(abi::IOC_EXPORT, &mut known), 0);
    assert_eq!(node.bar2().exports, 2);
    assert_ne!(ranges[0].0.offset, ranges[1].0.offset);
    let made: abi::Export = bytemuck::pod_read_unaligned(&known[..size_of::<abi::Export>()]);
    assert_eq!(made.length, 2 * MIB);
    // SAFETY: The ioctl has just made this descriptor.
    drop(unsafe { OwnedFd::from_raw_fd(made.fd) });
    assert_all_free(&node);
}

#[test]
fn a_shorter_struct_gets_a_shorter_answer() {
    let node = Node::largest();
    let (fd, _) = node.export(None, 3 * PAGE).unwrap();
    // The answer of a shorter struct is the beginning of that of the whole; nothing after it is written.
    let cut = |number: u32, request: &[u8], sizes: std::ops::RangeInclusive<usize>| {
        let ask = |size: usize| {
            let mut bytes = request.to_vec();
            bytes[..4].copy_from_slice(&(size as u32).to_ne_bytes());
            bytes[size..].fill(0xaa);
            let at = bytes.as_mut_ptr().addr();
            errno_or(ioctl(node.file.as_fd(), number, at), bytes)
        };
        let whole = ask(request.len()).unwrap();
        for size in sizes.clone() {
            let answer = ask(size).unwrap();
            assert_eq!(answer[4..size], whole[4..size], "{number:#x}, {size} bytes");
            assert!(answer[size..].iter().all(|&byte| byte == 0xaa));
        }
        assert_eq!(ask(sizes.start() - 1), Err(libc::EINVAL), "{number:#x}");
    };
    let query = abi::Query::zeroed();
    let bytes = bytemuck::bytes_of(&query);
    cut(abi::IOC_QUERY, bytes, abi::QUERY_MIN_SIZE..=bytes.len());
    let query = abi::BufferQuery {
        fd: fd.as_raw_fd(),
        ..Zeroable::zeroed()
    };
    let bytes = bytemuck::bytes_of(&query);
    let sizes = abi::BUFFER_QUERY_MIN_SIZE..=bytes.len();
    cut(abi::IOC_BUFFER, bytes, sizes);
    let request = abi::Move {
        fd: fd.as_raw_fd(),
        placement: abi::PLACEMENT_DEVICE,
        ..Zeroable::zeroed()
    };
    let bytes = bytemuck::bytes_of(&request);
    cut(abi::IOC_MOVE, bytes, abi::MOVE_MIN_SIZE..=bytes.len());

    // So do entries of arrays.
    let mut pieces = [[abi::Piece::zeroed(); 2]; 2];
    let mut query = abi::BufferQuery {
        size: size_of::<abi::BufferQuery>() as u32,
        fd: fd.as_raw_fd(),
        pieces: pieces.as_mut_ptr().addr() as u64,
        nr_pieces: 2,
        piece_size: 2 * size_of::<abi::Piece>() as u32,
        ..Zeroable::zeroed()
    };
    node.call(abi::IOC_BUFFER, &mut query).unwrap();
    assert_eq!(query.nr_pieces, 1);
    assert_eq!((pieces[0][0].length, pieces[0][0].bar), (3 * PAGE, 2));
    query.nr_pieces = 2;
    query.piece_size = size_of::<abi::Piece>() as u32 - 1;
    assert_eq!(errno(node.call(abi::IOC_BUFFER, &mut query)), libc::EINVAL);
    query.piece_size = u32::MAX;
    assert_eq!(errno(node.call(abi::IOC_BUFFER, &mut query)), libc::E2BIG);
    drop(fd);
    assert_all_free(&node);
}

/// The value, or the errno of the failed call.
fn errno_or<T>(result: std::io::Result<i32>, value: T) -> Result<T, i32> {
    match errno(result) {
        0 => Ok(value),
        errno => Err(errno),
    }
}

#[test]
fn an_answer_that_cannot_be_delivered_leaves_nothing_behind() {
    let node = Node::largest();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let open = descriptors();
    for number in [abi::IOC_QUERY, abi::IOC_EXPORT] {
        for bad in [0usize, 1, 0xffff_8000_0000_0000, usize::MAX] {
            assert_eq!(errno(ioctl(node.file.as_fd(), number, bad)), libc::EFAULT);
        }
    }
    // A request in memory that can be read but not written.
    let mut request = Node::request(None, MIB);
    request.export.ranges = (&raw mut request.range).addr() as u64;
    let memory = tempfile::tempfile().unwrap();
    (&memory)
        .write_all(bytemuck::bytes_of(&request.export))
        .unwrap();
    memory.set_len(PAGE).unwrap();
    let map = Map::new(memory.as_fd(), PAGE as usize, false).unwrap();
    assert_eq!(
        errno(ioctl(
            node.file.as_fd(),
            abi::IOC_EXPORT,
            map.as_ptr().addr()
        )),
        libc::EFAULT
    );
    assert_all_free(&node);
    assert_eq!(descriptors(), open + 1, "the temporary file only");
}

#[test]
fn running_out_of_descriptors_leaves_nothing_behind() {
    let node = Node::largest();
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
            match node.export(None, PAGE) {
                Ok(export) => held.push(export),
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::EMFILE));
                    assert_eq!(node.bar2().exports as usize, held.len());
                    return i32::from(held.is_empty());
                }
            }
        }
    })
    .wait();
    assert_eq!(status, Ok(0));
    assert_all_free(&node);
}

#[test]
fn read_only_exports_cannot_be_written() {
    let node = Node::largest();
    let mut request = Node::request(Some(0), MIB);
    request.export.fd_flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u32;
    let (fd, _) = node.export_request(request).unwrap();
    assert_eq!(
        errno(Map::new(fd.as_fd(), MIB as usize, true)),
        libc::EACCES
    );
    let map = Map::new(fd.as_fd(), MIB as usize, false).unwrap();
    // SAFETY: Changes the protection of a mapping to which no reference exists.
    let raised =
        unsafe { libc::mprotect(map.as_ptr(), map.len, libc::PROT_READ | libc::PROT_WRITE) };
    assert_eq!(
        (raised, std::io::Error::last_os_error().raw_os_error()),
        (-1, Some(libc::EACCES))
    );
    let disk = disk::open_direct(SCRATCH).unwrap();
    assert_eq!(
        errno(disk::read_into(&disk, &map, 0, 65536, 0)),
        libc::EFAULT
    );
    map.read(0);
}

#[test]
fn mappings_stay_within_the_buffer() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let len = MIB as usize;
    let private = Map::with(fd.as_fd(), len, 0, true, libc::MAP_PRIVATE);
    assert_eq!(errno(private), libc::EINVAL);
    assert_eq!(
        errno(Map::new(fd.as_fd(), len + PAGE as usize, true)),
        libc::EINVAL
    );
    let beyond = Map::with(fd.as_fd(), len, PAGE as i64, true, libc::MAP_SHARED);
    assert_eq!(errno(beyond), libc::EINVAL);
    let map = Map::new(fd.as_fd(), len, true).unwrap();
    // SAFETY: The call must fail; if it does not, the mapping is still valid.
    let grown = unsafe { libc::mremap(map.as_ptr(), len, 2 * len, libc::MREMAP_MAYMOVE) };
    assert_eq!(grown, libc::MAP_FAILED);
    // Parts of the buffer, mapped apart, are the same bytes.
    fill(&map, 0, len, 1);
    let half = Map::with(
        fd.as_fd(),
        len / 2,
        (len / 2) as i64,
        false,
        libc::MAP_SHARED,
    )
    .unwrap();
    for i in (0..len / 2).step_by(8) {
        assert_eq!(half.read(i), pattern(1, len / 2 + i));
    }
}

#[test]
fn two_exports_never_share_a_byte() {
    let node = Node::largest();
    let (low_fd, a) = node.export(None, MIB).unwrap();
    let (high_fd, b) = node.export(None, MIB).unwrap();
    assert_eq!((a, b), (0, MIB));
    let low = Map::new(low_fd.as_fd(), MIB as usize, true).unwrap();
    let high = Map::new(high_fd.as_fd(), MIB as usize, true).unwrap();
    fill(&low, 0, MIB as usize, 11);
    fill(&high, 0, MIB as usize, 22);
    assert_eq!(differs(&low, 0, MIB as usize, 11), None);
    assert_eq!(differs(&high, 0, MIB as usize, 22), None);
    drop((low, high, low_fd, high_fd));
    // One export over both ranges has the same bytes at the same offsets.
    let (both, _) = node.export(Some(0), 2 * MIB).unwrap();
    let both = Map::new(both.as_fd(), 2 * MIB as usize, false).unwrap();
    assert_eq!(differs(&both, 0, MIB as usize, 11), None);
    for i in (0..MIB as usize).step_by(8) {
        assert_eq!(both.read(MIB as usize + i), pattern(22, i));
    }
}

#[test]
fn direct_io_moves_every_byte_both_ways() {
    let disk = disk::open_direct(SCRATCH).unwrap();
    for node in Node::all().iter().take(2) {
        let (fd, _) = node.export(Some(3 * PAGE), 4 * MIB).unwrap();
        let map = Map::new(fd.as_fd(), 4 * MIB as usize, true).unwrap();
        // Aligned and unaligned offsets, short and long lengths.
        for (at, len) in [
            (0, 512),
            (512, 4096),
            (4096, 65536),
            (1536, 1 << 20),
            (0, 4 << 20),
        ] {
            sync(&fd, SYNC_WRITE).unwrap();
            fill(&map, at, len, len as u64);
            sync(&fd, SYNC_WRITE | SYNC_END).unwrap();
            assert_eq!(disk::write_from(&disk, &map, at, len, 0).unwrap(), len);
            fill(&map, at, len, 99);
            sync(&fd, SYNC_WRITE).unwrap();
            sync(&fd, SYNC_WRITE | SYNC_END).unwrap();
            assert_eq!(disk::read_into(&disk, &map, at, len, 0).unwrap(), len);
            sync(&fd, SYNC_READ).unwrap();
            assert_eq!(differs(&map, at, len, len as u64), None, "{at} {len}");
            sync(&fd, SYNC_READ | SYNC_END).unwrap();
        }
        drop((fd, map));
        assert_all_free(node);
    }
}

#[test]
fn a_bar_too_small_for_struct_pages_is_exported_without_them() {
    let node = Node::all().pop().unwrap();
    let bar = node.bar2();
    assert_eq!((bar.size, bar.flags & abi::BAR_PAGES), (MIB, 0));
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(Some(PAGE), 64 * PAGE).unwrap();
    let len = 64 * PAGE as usize;
    let map = Map::new(fd.as_fd(), len, true).unwrap();
    sync(&fd, SYNC_WRITE).unwrap();
    fill(&map, 0, len, 8);
    sync(&fd, SYNC_WRITE | SYNC_END).unwrap();
    let again = Map::new(fd.as_fd(), len, false).unwrap();
    assert_eq!(differs(&again, 0, len, 8), None);
    // Memory without struct pages cannot be pinned; the bytes do not change.
    let disk = disk::open_direct(SCRATCH).unwrap();
    assert_eq!(
        errno(disk::write_from(&disk, &map, 0, len, 0)),
        libc::EFAULT
    );
    assert_eq!(errno(disk::read_into(&disk, &map, 0, len, 0)), libc::EFAULT);
    assert_eq!(differs(&map, 0, len, 8), None);

    Node::unbind(&bdf);
    assert_eq!(in_child(|| map.read(0) as i32).wait(), Err(libc::SIGBUS));
    Node::bind(&bdf);
    drop((fd, map, again, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn direct_io_that_outlives_its_descriptor_keeps_the_range() {
    use io_uring::{IoUring, opcode, types};
    let node = Node::largest();
    let disk = disk::open_direct(SCRATCH).unwrap();
    let _slow = Slow::new(MIB / 2);
    let mut ring = IoUring::new(4).unwrap();

    let (fd, at) = node.export(None, 2 * MIB).unwrap();
    let map = Map::new(fd.as_fd(), 2 * MIB as usize, true).unwrap();
    let read = opcode::Read::new(types::Fd(disk.as_raw_fd()), map.as_ptr().cast(), 2 << 20)
        .offset(0)
        .build();
    // SAFETY: The kernel holds the request's pages by itself, which is what the test checks.
    unsafe { ring.submission().push(&read).unwrap() };
    ring.submit().unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(ring.completion().is_empty(), "the disk is meant to be slow");

    drop((fd, map));
    let bar = node.bar2();
    assert_eq!(
        (bar.exports, bar.free),
        (1, bar.size - 2 * MIB),
        "still in use by the disk"
    );
    assert_eq!(errno(node.export(Some(at), PAGE)), libc::EBUSY);
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), 2 << 20);
    assert_all_free(&node);
    drop(node.export(Some(at), PAGE).unwrap());
}

#[test]
fn a_killed_process_leaves_nothing_behind() {
    let node = Node::largest();
    for round in 0..20 {
        let child = in_child(|| {
            let (fd, _) = node.export(None, MIB).unwrap();
            let map = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
            let disk = disk::open_direct(SCRATCH).unwrap();
            loop {
                disk::read_into(&disk, &map, 0, 1 << 20, 0).unwrap();
                disk::write_from(&disk, &map, 0, 1 << 20, MIB as i64).unwrap();
            }
        });
        thread::sleep(Duration::from_millis(7 * round));
        child.kill(libc::SIGKILL);
        assert_eq!(child.wait(), Err(libc::SIGKILL));
        assert_all_free(&node);
    }
}

#[test]
fn a_child_keeps_the_buffer_of_its_parent() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let map = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
    map.write(0, 1);
    let child = in_child(|| {
        while map.read(0) != 2 {
            thread::yield_now();
        }
        map.write(8, 3);
        0
    });
    drop(fd);
    assert_eq!(node.bar2().exports, 1);
    map.write(0, 2);
    assert_eq!(child.wait(), Ok(0));
    assert_eq!(map.read(8), 3);
    drop(map);
    assert_all_free(&node);
}

#[test]
fn the_module_cannot_be_unloaded_under_a_buffer() {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let bdf = node.bdf.clone();
    drop(node);
    let refused = Command::new("rmmod").arg("peerbuf").output().unwrap();
    assert!(!refused.status.success(), "a dma-buf holds the module");
    let map = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
    map.write(0, 5);
    assert_eq!(map.read(0), 5);
    drop((fd, map));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn importers_get_peer_memory_or_a_refusal() {
    let node = Node::largest();
    let nvme = nvme_bdf();
    let (fd, _) = node.export(Some(5 * PAGE), 3 * MIB).unwrap();
    // Without permission to move, importers that cannot use the BAR are refused.
    for flags in [0, DYNAMIC, PEER] {
        let refused = Importer::attach(fd.as_fd(), &nvme, flags, 0).map(|_| ());
        assert_eq!(errno(refused), libc::EOPNOTSUPP, "flags {flags}");
    }
    let importer = Importer::attach(fd.as_fd(), &nvme, DYNAMIC | PEER, 0).unwrap();
    let mapping = importer.map().unwrap();
    assert_eq!((mapping.segments, mapping.bytes), (1, 3 * MIB));
    importer.unmap();
    assert_eq!(
        importer.map().unwrap(),
        mapping,
        "a fresh table, the same memory"
    );
    assert_eq!(
        importer.state(),
        State {
            invalidations: 0,
            mapped: 1
        }
    );
    // The attachment keeps the buffer.
    drop(fd);
    assert_eq!(node.bar2().exports, 1);
    drop(importer);
    assert_all_free(&node);
}

#[test]
fn mapping_and_unmapping_leaks_nothing() {
    // The caches for a scatter list with one entry.
    let objects = || memory::in_use("-32") / 32;
    const ROUNDS: u64 = 20_000;
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    let before = objects();
    for _ in 0..ROUNDS {
        importer.map().unwrap();
        importer.unmap();
    }
    let more = objects().saturating_sub(before);
    assert!(
        more < ROUNDS / 4,
        "{more} objects more after {ROUNDS} mappings"
    );
}

#[test]
fn unbinding_revokes_what_was_given_out() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let map = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
    let untouched = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
    fill(&map, 0, MIB as usize, 3);
    let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    importer.map().unwrap();
    // This importer unmaps late, and the unbind waits for it.
    let late = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 700).unwrap();
    late.map().unwrap();

    let started = Instant::now();
    Node::unbind(&bdf);
    assert!(
        started.elapsed() >= Duration::from_millis(650),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(
        importer.state(),
        State {
            invalidations: 1,
            mapped: 0
        }
    );
    assert_eq!(
        late.state(),
        State {
            invalidations: 1,
            mapped: 0
        }
    );

    assert!(!fs::exists(format!("/dev/peerbuf/{bdf}")).unwrap());
    assert_eq!(errno(node.query()), libc::ENODEV);
    assert_eq!(errno(node.export(None, PAGE)), libc::ENODEV);
    assert_eq!(errno(importer.map()), libc::ENODEV);
    let again = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).map(|_| ());
    assert_eq!(errno(again), libc::ENODEV);
    assert_eq!(errno(sync(&fd, SYNC_READ)), libc::ENODEV);
    assert_eq!(errno(sync(&fd, SYNC_WRITE | SYNC_END)), libc::ENODEV);
    assert_eq!(
        errno(Map::new(fd.as_fd(), MIB as usize, true)),
        libc::ENODEV
    );
    for map in [&map, &untouched] {
        assert_eq!(in_child(|| map.read(0) as i32).wait(), Err(libc::SIGBUS));
        assert_eq!(
            in_child(|| {
                map.write(0, 0);
                0
            })
            .wait(),
            Err(libc::SIGBUS)
        );
    }
    let disk = disk::open_direct(SCRATCH).unwrap();
    assert_eq!(
        errno(disk::read_into(&disk, &map, 0, 65536, 0)),
        libc::EFAULT
    );
    assert_eq!(
        errno(disk::write_from(&disk, &map, 0, 65536, 0)),
        libc::EFAULT
    );

    // Bound again, it works; revoked buffers stay revoked.
    Node::bind(&bdf);
    let fresh = Node::open(&bdf).unwrap();
    assert_all_free(&fresh);
    assert_eq!(errno(node.query()), libc::ENODEV);
    assert_eq!(errno(sync(&fd, SYNC_READ)), libc::ENODEV);
    let (new_fd, _) = fresh.export(None, MIB).unwrap();
    let new = Map::new(new_fd.as_fd(), MIB as usize, true).unwrap();
    fill(&new, 0, MIB as usize, 4);
    drop((fd, map, untouched, importer, late, node));
    assert_eq!(differs(&new, 0, MIB as usize, 4), None);
    drop((new, new_fd));
    assert_all_free(&fresh);
}

/// The command register in a device's configuration space.
fn command(bdf: &str) -> u16 {
    let space = fs::read(format!("/sys/bus/pci/devices/{bdf}/config")).unwrap();
    u16::from_le_bytes([space[4], space[5]])
}

fn set_command(bdf: &str, command: u16) {
    let path = format!("/sys/bus/pci/devices/{bdf}/config");
    let space = File::options().write(true).open(path).unwrap();
    space.write_all_at(&command.to_le_bytes(), 4).unwrap();
}

#[test]
fn bus_mastering_is_off_when_the_device_is_bound_and_when_it_is_not_any_more() {
    const MEMORY: u16 = 1 << 1;
    const MASTER: u16 = 1 << 2;
    let bdf = Node::largest().bdf;
    Node::unbind(&bdf);
    set_command(&bdf, MEMORY | MASTER);
    Node::bind(&bdf);
    assert_eq!(command(&bdf) & (MEMORY | MASTER), MEMORY);
    // A process may enable bus mastering meanwhile; the next driver gets the device with it disabled.
    set_command(&bdf, MEMORY | MASTER);
    Node::unbind(&bdf);
    assert_eq!(command(&bdf) & MASTER, 0);
    Node::bind(&bdf);
}

/// The driver that `struct pci_dev` names, as the last word of the device's line.
fn driver_in_proc(bdf: &str) -> String {
    let digits = bdf.split_once(':').unwrap().1;
    let (bus, rest) = digits.split_once(':').unwrap();
    let (slot, function) = rest.split_once('.').unwrap();
    let number = |text| u8::from_str_radix(text, 16).unwrap();
    let devfn = number(slot) << 3 | number(function);
    let name = format!("{bus}{devfn:02x}\t");
    let list = fs::read_to_string("/proc/bus/pci/devices").unwrap();
    let line = list.lines().find(|line| line.starts_with(&name)).unwrap();
    line.rsplit('\t').next().unwrap().trim().to_owned()
}

#[test]
fn a_device_has_its_driver_until_no_importer_reaches_it() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, MIB).unwrap();
    let late = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 60_000).unwrap();
    late.map().unwrap();
    assert_eq!(driver_in_proc(&bdf), "peerbuf");
    thread::scope(|scope| {
        let unbinding = scope.spawn(|| Node::unbind(&bdf));
        wait_until("it is told", || late.query().state & probe::STALE != 0);
        thread::sleep(Duration::from_millis(300));
        let driver = driver_in_proc(&bdf);
        late.unmap();
        unbinding.join().unwrap();
        assert_eq!(driver, "peerbuf", "while an importer has a mapping");
    });
    assert_eq!(driver_in_proc(&bdf), "");
    Node::bind(&bdf);
    drop((fd, late, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn unbinding_names_the_importer_that_it_waits_for() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let nvme = nvme_bdf();
    let (fd, _) = node.export(None, MIB).unwrap();
    let late = Importer::attach(fd.as_fd(), &nvme, DYNAMIC | PEER, 11_000).unwrap();
    late.map().unwrap();
    // CPU access ends at once, even if an importer is late.
    let map = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
    let reader = in_child(|| {
        let end = Instant::now() + Duration::from_secs(8);
        while Instant::now() < end {
            map.read(0);
            thread::sleep(Duration::from_millis(10));
        }
        0
    });
    Node::unbind(&bdf);
    assert_eq!(reader.wait(), Err(libc::SIGBUS));
    drop(map);
    let log = Command::new("dmesg").output().unwrap();
    let expected = format!("{bdf}: revoked, and waiting for {nvme} to unmap it");
    assert!(
        String::from_utf8_lossy(&log.stdout).contains(&expected),
        "{expected}"
    );
    Node::bind(&bdf);
    drop((fd, late, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn unbinding_waits_for_direct_io_in_flight() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    let (fd, _) = node.export(None, 2 * MIB).unwrap();
    let map = Map::new(fd.as_fd(), 2 * MIB as usize, true).unwrap();
    let slow = Slow::new(MIB / 2);
    let reader = in_child(|| {
        let disk = disk::open_direct(SCRATCH).unwrap();
        let count = disk::read_into(&disk, &map, 0, 2 << 20, 0).unwrap();
        i32::from(count != 2 << 20)
    });
    disk::await_reading();
    let (started, own) = (Instant::now(), Stopwatch::start());
    Node::unbind(&bdf);
    let took = started.elapsed();
    assert!(
        took >= Duration::from_millis(500),
        "there was I/O to wait for: {took:?}"
    );
    let took = own.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    // The request was accepted before, so it was completed.
    assert_eq!(reader.wait(), Ok(0));
    drop(slow);
    Node::bind(&bdf);
    drop((fd, map, node));
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn unbinding_races_with_everything() {
    let bdf = Node::largest().bdf;
    let stop = AtomicBool::new(false);
    // Threads that export, map, attach and do I/O in a loop. A load or store in a revoked mapping would kill
    // the process, so only the kernel accesses the bytes: its I/O fails with EFAULT.
    thread::scope(|scope| {
        let work = |salt: u64| {
            let mut rng = StdRng::seed_from_u64(salt);
            let disk = disk::open_direct(SCRATCH).unwrap();
            let mut done = 0u32;
            while !stop.load(Ordering::Relaxed) {
                let Ok(node) = Node::open(&bdf) else { continue };
                let len = PAGE * rng.random_range(1..128);
                let Ok((fd, _)) = node.export(None, len) else {
                    continue;
                };
                let Ok(map) = Map::new(fd.as_fd(), len as usize, true) else {
                    continue;
                };
                let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0);
                if let Ok(importer) = &importer {
                    let _ = importer.map();
                }
                let _ = disk::read_into(&disk, &map, 0, len as usize, 0);
                let _ = sync(&fd, SYNC_WRITE);
                let _ = disk::write_from(&disk, &map, 0, len as usize, 0);
                let _ = sync(&fd, SYNC_WRITE | SYNC_END);
                let _ = node.query();
                done += 1;
            }
            done
        };
        let workers: Vec<_> = (0..4).map(|salt| scope.spawn(move || work(salt))).collect();
        let mut rng = StdRng::seed_from_u64(99);
        for _ in 0..25 {
            thread::sleep(Duration::from_millis(rng.random_range(5..120)));
            Node::unbind(&bdf);
            Node::bind(&bdf);
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            assert!(worker.join().unwrap() > 20, "each worker got work done");
        }
    });
    assert_all_free(&Node::open(&bdf).unwrap());
}

#[test]
fn a_c_program_with_only_the_header_does_it_all() {
    for node in Node::all().iter().take(2) {
        for program in ["direct_io", "direct_io-static"] {
            let run = Command::new(format!("/opt/peerbuf/fixtures/{program}"))
                .args([
                    &format!("/dev/peerbuf/{}", node.bdf),
                    "2",
                    "/mnt/nvme/from-c",
                ])
                .output()
                .unwrap();
            assert!(
                run.status.success(),
                "{}",
                String::from_utf8_lossy(&run.stdout)
            );
        }
        assert_all_free(node);
    }
    File::open("/mnt/nvme/from-c").unwrap();
    fs::remove_file("/mnt/nvme/from-c").unwrap();
}
