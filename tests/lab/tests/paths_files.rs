//! Files, disks and proofs of paths, through the crate: what direct I/O waits for, and how long a proof is
//! valid. Runs in the guest, where the disk and the card can be peers.

use std::fs::{self, File};
use std::io::Seek;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path as FilePath;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use peerbuf::error::{BufferError, TransferError};
use peerbuf::export::peerbuf::{Device, MoveTo, Request};
use peerbuf::export::udmabuf;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::plan::{Direction, Path, Plan, ProofPolicy, ReasonCode, forget_proofs};
use peerbuf::transfer::{Piece, Queue, Watch};
use peerbuf::{Access, Buffer};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::importer::{DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::machine;
use peerbuf_lab_suite::modules::load;
use peerbuf_lab_suite::node::{MIB, Node};
use peerbuf_lab_suite::transfer::{
    BOTH, LARGE, bar, cross, device, fill, first, importer, in_the_middle, random,
};
use peerbuf_uapi::probe;

const NVME: &str = "/mnt/nvme";
/// The raw namespace that tests may overwrite, one at a time.
const RAW: &str = "/dev/nvme0n2";
static OVERWRITES_RAW: Mutex<()> = Mutex::new(());

fn export(device: &Device, offset: Option<u64>, access: Access) -> Buffer {
    let request = Request {
        bar: 2,
        offset,
        length: MIB,
        access,
    };
    device.export(request).unwrap()
}

fn device_memory(device: &Device) -> Buffer {
    let buffer = export(device, None, Access::ReadWrite);
    put(&buffer.whole(), &random(MIB));
    buffer
}

fn file() -> File {
    let file = unnamed_file(FilePath::new(NVME)).unwrap();
    file.write_all_at(&random(MIB), 0).unwrap();
    file.sync_all().unwrap();
    file
}

fn path(file: &FileImporter, buffer: &Buffer, direction: Direction) -> Path {
    let mut attachment = file.attach(&buffer.whole()).unwrap();
    attachment.plan(direction, 0).unwrap().path
}

fn is_busy(buffer: &Buffer) -> bool {
    let dmabuf = buffer.dmabuf().unwrap();
    match dmabuf.wait(Access::ReadWrite, Duration::ZERO) {
        Ok(()) => false,
        Err(BufferError::TimedOut { .. }) => true,
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn direct_io_waits_for_the_fences_of_the_buffer() {
    let node = Node::largest();
    let file = file();
    let file = importer(&file);
    let disk = file.disk_functions()[0].to_string();
    let device = device(&node);
    let memory = udmabuf::export("memory", MIB).unwrap();
    for (buffer, expected) in [
        (device_memory(&device), Path::PeerToPeer),
        (memory, Path::SharedHostMemory),
    ] {
        // CPU copies of a proof would wait, too, so the proofs are made before.
        for direction in BOTH {
            assert_eq!(path(&file, &buffer, direction), expected);
        }
        let fd = buffer.dmabuf().unwrap().as_fd();
        let other = Importer::attach(fd, &disk, DYNAMIC | PEER, 0).unwrap();
        let mut attachment = file.attach(&buffer.whole()).unwrap();
        // Writers wait for all fences, readers for those of writers.
        for (direction, usage, waits) in [
            (Direction::DiskToBuffer, probe::FENCE_WRITE, true),
            (Direction::DiskToBuffer, probe::FENCE_READ, true),
            (Direction::BufferToDisk, probe::FENCE_WRITE, true),
            (Direction::BufferToDisk, probe::FENCE_READ, false),
        ] {
            // Much longer than the transfer takes.
            let limit = if waits { 3_000 } else { 30_000 };
            other.fence(usage, limit).unwrap();
            assert!(is_busy(&buffer));
            let receipt = match direction {
                Direction::DiskToBuffer => attachment.read(0).unwrap(),
                Direction::BufferToDisk => attachment.write(0).unwrap(),
            };
            assert_eq!(receipt.plan.path, expected, "{direction}: {}", receipt.plan);
            assert_eq!(is_busy(&buffer), !waits, "{direction}, usage {usage}");
            if !waits {
                other.step(probe::IOC_SIGNAL).unwrap();
            }
            assert!(!is_busy(&buffer));
        }
    }
}

#[test]
fn a_proof_is_not_believed_of_a_device_that_was_bound_anew() {
    // A device that other tests do not use.
    let node = Node::all().remove(1);
    let file = file();
    let first = importer(&file);
    let never = importer(&file).with_proofs(ProofPolicy::Never);
    for direction in BOTH {
        forget_proofs();
        let buffer = device_memory(&device(&node));
        assert_eq!(path(&never, &buffer, direction), Path::StagedCopy);
        assert_eq!(path(&first, &buffer, direction), Path::PeerToPeer);
        assert_eq!(path(&never, &buffer, direction), Path::PeerToPeer);
        drop(buffer);
        Node::unbind(&node.bdf);
        machine::give_to_peerbuf(&node.bdf);
        let buffer = device_memory(&device(&node));
        assert_eq!(path(&never, &buffer, direction), Path::StagedCopy);
        assert_eq!(path(&first, &buffer, direction), Path::PeerToPeer);
    }
}

#[test]
fn what_was_proved_in_system_memory_is_not_believed_of_the_bar() {
    let device = device(&Node::largest());
    let file = file();
    let first = importer(&file);
    let never = importer(&file).with_proofs(ProofPolicy::Never);
    let buffer = device_memory(&device);
    let limit = Duration::from_secs(10);
    for direction in BOTH {
        forget_proofs();
        let dmabuf = buffer.dmabuf().unwrap();
        device.move_buffer(dmabuf, MoveTo::System, limit).unwrap();
        let in_system = path(&first, &buffer, direction);
        assert_ne!(in_system, Path::PeerToPeer);
        assert_eq!(path(&never, &buffer, direction), in_system);
        device.move_buffer(dmabuf, MoveTo::Device, limit).unwrap();
        assert_eq!(path(&never, &buffer, direction), Path::StagedCopy);
        assert_eq!(path(&first, &buffer, direction), Path::PeerToPeer);
    }
}

#[test]
fn a_read_only_export_reaches_the_disk_without_a_pattern_in_it() {
    let device = device(&Node::largest());
    let bytes = random(MIB);
    let at = Some(8 * MIB);
    put(&export(&device, at, Access::ReadWrite).whole(), &bytes);
    let buffer = export(&device, at, Access::Read);
    forget_proofs();
    let file = file();
    let importer = importer(&file);
    let receipt = importer.attach(&buffer.whole()).unwrap().write(0).unwrap();
    assert_eq!(receipt.plan.path, Path::PeerToPeer, "{}", receipt.plan);
    assert!(get(&buffer.whole()) == bytes);
    let mut found = vec![0; MIB as usize];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == bytes);
}

#[test]
fn a_disk_tells_its_size_and_leaves_the_position_of_who_gave_it() {
    let mut raw = File::open(RAW).unwrap();
    raw.seek(std::io::SeekFrom::Start(4096)).unwrap();
    let file = FileImporter::from_fd(raw.try_clone().unwrap().into(), RAW).unwrap();
    let sectors = fs::read_to_string("/sys/class/block/nvme0n2/size").unwrap();
    let sectors: u64 = sectors.trim().parse().unwrap();
    assert_eq!(file.size().unwrap(), 512 * sectors);
    let buffer = udmabuf::export("memory", MIB).unwrap();
    file.attach(&buffer.whole()).unwrap().read(0).unwrap();
    assert_eq!(raw.stream_position().unwrap(), 4096);
}

fn run(command: &str) {
    let done = Command::new("sh").args(["-c", command]).status().unwrap();
    assert!(done.success(), "{command}");
}

/// Runs a command when dropped.
struct Afterwards(&'static str);

impl Drop for Afterwards {
    fn drop(&mut self) {
        let _ = Command::new("sh").args(["-c", self.0]).status();
    }
}

/// The reason against peer to peer; `None` if the path is peer to peer.
fn why_not(plan: &Plan) -> Option<ReasonCode> {
    let mut reasons = plan.reasons.iter();
    let against = reasons.find(|reason| reason.path == Path::PeerToPeer);
    assert_eq!(against.is_none(), plan.path == Path::PeerToPeer, "{plan}");
    against.map(|reason| reason.code)
}

#[test]
fn a_layer_that_refuses_is_named_with_what_to_do() {
    load("brd");
    let buffer = device_memory(&device(&Node::largest()));
    let file = FileImporter::open("/dev/ram0").unwrap();
    let mut attachment = file.attach(&buffer.whole()).unwrap();
    let plan = attachment.plan(Direction::DiskToBuffer, 0).unwrap();
    let reason = &plan.reasons[0];
    assert_eq!(reason.code, ReasonCode::BlockLayer, "{plan}");
    let said = "it is ram0 (a ram disk) that takes no memory of a device";
    assert!(reason.evidence.contains(said), "{plan}");
    assert!(!reason.evidence.contains("the pair"), "{plan}");
    assert!(!reason.code.remedy().contains("switch"), "{plan}");
    // The bytes arrive all the same.
    let receipt = attachment.read(0).unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy, "{}", receipt.plan);
}

#[test]
fn a_hole_that_ext2_fills_through_the_page_cache_is_no_peer_to_peer_write() {
    let _raw = OVERWRITES_RAW
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    run(
        "mkfs.ext2 -q -F /dev/nvme0n2 && mkdir -p /mnt/ext2 && mount -t ext2 /dev/nvme0n2 /mnt/ext2",
    );
    let _mount = Afterwards("umount /mnt/ext2");
    let file = File::create_new("/mnt/ext2/holes").unwrap();
    // Bytes, a hole, bytes.
    for at in [0, 2 * MIB] {
        file.write_all_at(&random(MIB), at).unwrap();
    }
    file.sync_all().unwrap();
    let buffer = device_memory(&device(&Node::largest()));
    let bytes = get(&buffer.whole());
    let importer = importer(&file);
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    for (at, why) in [
        (0, None),
        (MIB, Some(ReasonCode::NoDirectIo)),
        // The hole is filled now.
        (MIB, None),
        (MIB + MIB / 2, None),
        // A read at the end of the file, and beyond.
        (3 * MIB, None),
    ] {
        let receipt = attachment.write(at).unwrap();
        assert_eq!(why_not(&receipt.plan), why, "at {at}: {}", receipt.plan);
        let through_memory = if why.is_some() { MIB } else { 0 };
        assert_eq!(receipt.host_bytes, through_memory);
        let mut found = vec![0; MIB as usize];
        file.read_exact_at(&mut found, at).unwrap();
        assert!(found == bytes, "at {at}");
    }
}

#[test]
fn where_io_uring_is_forbidden_threads_do_it_and_the_receipt_tells() {
    const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";
    let file = file();
    let buffer = udmabuf::export("memory", MIB).unwrap();
    let read = || {
        // A separate importer, because an importer with a ring keeps it.
        let receipt = importer(&file)
            .attach(&buffer.whole())
            .unwrap()
            .read(0)
            .unwrap();
        assert_eq!((receipt.bytes, receipt.copied), (MIB, 0));
        receipt.queue
    };
    assert_eq!(read(), Queue::IoUring);
    fs::write(SWITCH, "2").unwrap();
    let queue = read();
    fs::write(SWITCH, "0").unwrap();
    let Queue::Threads { why } = queue else {
        panic!("{queue}");
    };
    assert_eq!(
        (why.call, why.errno.name()),
        ("io_uring_setup", Some("EPERM"))
    );
    let mut expected = vec![0; MIB as usize];
    file.read_exact_at(&mut expected, 0).unwrap();
    assert!(get(&buffer.whole()) == expected);
}

/// A buffer in the BAR and a file, with random bytes each.
fn large(device: &Device, length: u64) -> (Buffer, File, Vec<u8>, Vec<u8>) {
    let (held, on_disk) = (random(length), random(length));
    let buffer = bar(device, length);
    put(&buffer.whole(), &held);
    let file = unnamed_file(FilePath::new(NVME)).unwrap();
    fill(&file, &on_disk);
    (buffer, file, held, on_disk)
}

#[test]
fn a_transfer_goes_on_where_the_buffer_has_moved_to_and_the_receipt_tells() {
    let device = device(&Node::largest());
    let (buffer, file, held, on_disk) = large(&device, LARGE);
    let importer = importer(&file);
    let dmabuf = buffer.dmabuf().unwrap();
    let limit = Duration::from_secs(30);
    let (in_bar, in_system) = (MoveTo::Device, MoveTo::System);
    for (direction, from, to) in [
        (Direction::DiskToBuffer, in_bar, in_system),
        (Direction::DiskToBuffer, in_system, in_bar),
        (Direction::BufferToDisk, in_bar, in_system),
        (Direction::BufferToDisk, in_system, in_bar),
    ] {
        // A transfer that was over first is tried again.
        let mut tries = 0..100;
        let receipt = loop {
            tries.next().expect("a move in mid-transfer");
            device.move_buffer(dmabuf, from, limit).unwrap();
            if direction == Direction::DiskToBuffer {
                put(&buffer.whole(), &held);
            } else {
                file.write_all_at(&on_disk, 0).unwrap();
                file.sync_all().unwrap();
                put(&buffer.whole(), &held);
            }
            // Without the proofs, whose bytes nobody counts.
            importer
                .attach(&buffer.whole())
                .unwrap()
                .plan(direction, 0)
                .unwrap();
            let (receipt, moved) = in_the_middle(&importer, &buffer, direction, || {
                device.move_buffer(dmabuf, to, limit)
            });
            moved.unwrap();
            let receipt = receipt.unwrap();
            assert_eq!(receipt.bytes, LARGE);
            match direction {
                Direction::DiskToBuffer => {
                    let now = first(&file, LARGE).unwrap();
                    assert!(
                        get(&buffer.whole()) == cross(&now),
                        "{direction}: {}",
                        receipt.plan
                    );
                }
                Direction::BufferToDisk => {
                    let now = first(&file, LARGE).unwrap();
                    assert!(now == cross(&held), "{direction}: {}", receipt.plan);
                }
            }
            if receipt.moves > 0 {
                break receipt;
            }
            // Before the move, all of it.
            let began_in_device = receipt.plan.path == Path::PeerToPeer;
            assert_eq!(began_in_device, from == in_bar, "{}", receipt.plan);
        };
        // It is not known of any byte whether it was carried before the move, so all were carried again.
        let (path, through_memory) = match to == in_bar {
            true => (Path::PeerToPeer, 0),
            false => (Path::SharedHostMemory, LARGE),
        };
        assert_eq!(receipt.plan.path, path, "{}", receipt.plan);
        assert_eq!(
            (receipt.host_bytes, receipt.copied),
            (through_memory, 0),
            "{receipt:?}"
        );
    }
}

#[test]
fn what_was_carried_long_before_a_move_stays_in_the_account_of_its_path() {
    /// After so many bytes the module is asked where the buffer is.
    const LOOK: u64 = 64 * MIB;
    const LENGTH: u64 = 24 * MIB;
    const TIMES: u64 = 4;
    let device = device(&Node::largest());
    let (buffer, _, bytes, _) = large(&device, LENGTH);
    let file = unnamed_file(FilePath::new(NVME)).unwrap();
    let importer = importer(&file);
    assert_eq!(
        path(&importer, &buffer, Direction::BufferToDisk),
        Path::PeerToPeer
    );
    // The whole buffer, to several places of the file.
    let pieces: Vec<Piece> = (0..TIMES)
        .map(|index| Piece {
            file_offset: index * LENGTH,
            offset: 0,
            length: LENGTH,
        })
        .collect();
    let dmabuf = buffer.dmabuf().unwrap();
    let limit = Duration::from_secs(60);
    let mut tries = 0..20;
    let receipt = loop {
        tries.next().expect("a move after the first look");
        device.move_buffer(dmabuf, MoveTo::Device, limit).unwrap();
        file.set_len(0).unwrap();
        let watch = Watch::default();
        let receipt = std::thread::scope(|scope| {
            let transfer = scope.spawn(|| {
                let attachment = importer.attach(&buffer.whole()).unwrap();
                attachment.watched_by(&watch).write_many(&pieces).unwrap()
            });
            while watch.bytes() < LOOK && !transfer.is_finished() {
                std::thread::yield_now();
            }
            device.move_buffer(dmabuf, MoveTo::System, limit).unwrap();
            transfer.join().unwrap()
        });
        let written = fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert_eq!(written.len() as u64, TIMES * LENGTH);
        assert!(
            written
                .chunks(LENGTH as usize)
                .all(|copy| copy == bytes.as_slice()),
            "{receipt:?}"
        );
        if receipt.moves > 0 {
            break receipt;
        }
    };
    assert_eq!(receipt.plan.path, Path::SharedHostMemory);
    assert_eq!((receipt.bytes, receipt.copied), (TIMES * LENGTH, 0));
    let peer_to_peer = receipt.bytes - receipt.host_bytes;
    assert!(
        (LOOK..TIMES * LENGTH).contains(&peer_to_peer),
        "{peer_to_peer} bytes: {receipt:?}"
    );
}

#[test]
fn a_buffer_that_is_taken_away_in_mid_transfer_is_an_error_and_not_a_signal() {
    let device = device(&Node::largest());
    for direction in BOTH {
        let (buffer, file, held, on_disk) = large(&device, LARGE);
        let importer = importer(&file);
        let dmabuf = buffer.dmabuf().unwrap();
        let limit = Duration::from_secs(30);
        // A transfer that was over first is tried again.
        let mut tries = 0..100;
        let error = loop {
            tries.next().expect("a revoke in mid-transfer");
            let (receipt, revoked) = in_the_middle(&importer, &buffer, direction, || {
                device.revoke(dmabuf, limit).unwrap()
            });
            assert!(revoked.is_complete(), "{revoked:?}");
            match receipt {
                Err(error) => break error,
                Ok(_) => drop(device.restore(dmabuf).unwrap()),
            }
        };
        let TransferError::Stopped {
            cause,
            arrived,
            wanted,
            prefix,
            offset,
            ..
        } = &error
        else {
            panic!("{direction}: {error}");
        };
        assert_eq!(cause.errno.name(), Some("ENODEV"), "{error}");
        assert!(
            cause.object.contains("to which access was taken away"),
            "{error}"
        );
        assert!(
            prefix <= arrived && arrived < wanted && *wanted == LARGE,
            "{error}"
        );
        assert_eq!(offset, prefix, "{error}");
        // What is said to have arrived is there.
        device.restore(dmabuf).unwrap();
        let now = first(&file, LARGE).unwrap();
        let (from, now) = match direction {
            Direction::DiskToBuffer => (cross(&on_disk), get(&buffer.whole())),
            Direction::BufferToDisk => (held, cross(&now)),
        };
        let at = (LARGE - prefix) as usize;
        assert!(now[at..] == from[at..], "{direction}: {error}");
        // A transfer that begins without access is refused, too.
        device.revoke(dmabuf, limit).unwrap();
        let mut attachment = importer.attach(&buffer.whole()).unwrap();
        let refused = attachment.read(0).unwrap_err();
        assert!(
            refused.to_string().contains("access was taken away"),
            "{refused}"
        );
    }
}
