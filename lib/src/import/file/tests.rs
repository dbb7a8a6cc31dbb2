//! Tests of transfers on emulated device memory, with fake kernels that refuse and lie.
//!
//! The tests need a directory with direct I/O, and say so if the build directory has none.

use crate::buffer::Kind;
use std::error::Error;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, symlink};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use super::*;
use crate::buffer::{Buffer, Provenance, Stage};
use crate::errno::Errno;
use crate::export::memfd;
use crate::sys::direct::fake::{Behaviour, Fake};
use crate::topology::Sysfs;

fn directory() -> Option<PathBuf> {
    let directory = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned();
    let file = unnamed_file(&directory).unwrap();
    if FileImporter::from_fd(file.into(), "")
        .unwrap()
        .alignment()
        .is_none()
    {
        eprintln!("skipped: {} has no direct I/O", directory.display());
        return None;
    }
    Some(directory)
}

fn file_with(bytes: &[u8]) -> Option<File> {
    let file = unnamed_file(&directory()?).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    Some(file)
}

/// With an NVMe disk for the file, whatever it is really on.
fn importer(file: &File, behaviour: Behaviour) -> (FileImporter, Arc<Fake>) {
    // Beside the test, because nothing would remove it from elsewhere.
    static ONE_DISK: LazyLock<Disks> = LazyLock::new(|| {
        let disks = Disks(std::env::current_exe().unwrap().with_extension("one-disk"));
        disks.add("0000:01:00.0");
        disks
    });
    on(file, behaviour, &ONE_DISK, ONE_DISK.disk("0000:01:00.0"))
}

/// With the volume over these disks for the file.
fn on_disks(file: &File, behaviour: Behaviour, disks: &Disks) -> (FileImporter, Arc<Fake>) {
    on(file, behaviour, disks, disks.volume())
}

/// `device` is the directory of the block device in sysfs.
fn on(
    file: &File,
    behaviour: Behaviour,
    disks: &Disks,
    device: PathBuf,
) -> (FileImporter, Arc<Fake>) {
    let fake = Arc::new(Fake::new(behaviour));
    let file = file.try_clone().unwrap();
    let mut importer = FileImporter::from_fd(file.into(), "the file").unwrap();
    let endpoint = Arc::get_mut(&mut importer.endpoint).unwrap();
    endpoint.sysfs = Sysfs::at(&disks.0);
    disks.number(endpoint.number, device);
    importer.io = fake.clone();
    (importer, fake)
}

/// A sysfs with disks, and a volume over all of them.
struct Disks(PathBuf);

impl Disks {
    fn volume(&self) -> PathBuf {
        self.0.join("devices/virtual/block/dm-0")
    }

    fn slaves(&self) -> PathBuf {
        self.volume().join("slaves")
    }

    fn disk(&self, function: &str) -> PathBuf {
        let device = self.0.join("devices/pci0000:00").join(function);
        device.join(format!("nvme/of-{function}"))
    }

    /// What is there already stays.
    fn add(&self, function: &str) {
        let device = self.0.join("devices/pci0000:00").join(function);
        let disk = self.disk(function);
        let functions = self.0.join("bus/pci/devices");
        for directory in [&disk, &functions, &self.slaves()] {
            fs::create_dir_all(directory).unwrap();
        }
        let _ = symlink(device, functions.join(function));
        let _ = symlink(&disk, self.slaves().join(function));
    }

    fn remove(&self, function: &str) {
        fs::remove_file(self.slaves().join(function)).unwrap();
    }

    fn number(&self, (major, minor): (u32, u32), device: PathBuf) {
        let numbers = self.0.join("dev/block");
        fs::create_dir_all(&numbers).unwrap();
        let _ = symlink(device, numbers.join(format!("{major}:{minor}")));
    }
}

/// Memory that claims to be a BAR of a device that no other test uses, so that no proof is
/// shared.
fn device_memory(length: u64) -> Buffer {
    static NEXT: AtomicU8 = AtomicU8::new(0);
    let bus = NEXT.fetch_add(1, Ordering::Relaxed);
    let device = PciAddress {
        domain: 0xffff,
        bus,
        device: 0,
        function: 0,
    };
    memory_of(device, Kind::Bar, Some(2), length)
}

fn memory_of(device: PciAddress, kind: Kind, bar: Option<u8>, length: u64) -> Buffer {
    let memory = memfd::sealed("a BAR", length).unwrap();
    let provenance = Provenance {
        kind,
        device: Some(device),
        bar,
        name: "a BAR".into(),
    };
    Buffer::from_host_memory(memory, None, provenance).unwrap()
}

fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::fill(&mut bytes[..]);
    bytes
}

fn get(range: &BufferRange) -> Vec<u8> {
    range.to_vec().unwrap()
}

fn put(range: &BufferRange, bytes: &[u8]) {
    range.write_bytes(bytes).unwrap();
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn codes(plan: &Plan) -> Vec<(Path, ReasonCode)> {
    plan.reasons
        .iter()
        .map(|reason| (reason.path, reason.code))
        .collect()
}

/// Sizes around those of blocks, pages, requests and chunks.
const SIZES: &[usize] = &[
    0,
    1,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    70_001,
    (256 << 10) + 1,
    (4 << 20) + 4097,
];

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn every_size_arrives_whole_on_every_path_and_touches_nothing_else() {
    for &size in SIZES {
        let bytes = random(size);
        let Some(source) = file_with(&bytes) else {
            return;
        };
        let host = memfd::export("memory", (size + 8192) as u64).unwrap();
        let refused = Behaviour::Fails(Errno::INVAL);
        for (buffer, behaviour) in [
            (device_memory((size + 8192) as u64), Behaviour::Works),
            (device_memory((size + 8192) as u64), refused),
            (host, Behaviour::Works),
        ] {
            // The range is larger than the file, and a guard follows it.
            put(&buffer.whole(), &vec![0xaa; size + 8192]);
            let (importer, _) = importer(&source, behaviour);
            let block = u64::from(importer.alignment().unwrap().1);
            let range = buffer.range(0, size as u64 + 100).unwrap();
            let receipt = importer.attach(&range).unwrap().read(0).unwrap();
            assert_eq!(receipt.bytes, size as u64);
            let all = get(&buffer.whole());
            assert!(all[..size] == bytes, "{size} bytes, {}", receipt.plan);
            assert!(
                all[size..].iter().all(|&byte| byte == 0xaa),
                "{size} bytes, {}",
                receipt.plan
            );
            check_account(&receipt, &buffer, behaviour, size as u64, block);

            let sink = file_with(&[]).unwrap();
            let (importer, _) = self::importer(&sink, behaviour);
            let range = buffer.range(0, size as u64).unwrap();
            let receipt = importer.attach(&range).unwrap().write(0).unwrap();
            assert!(content(&sink) == bytes, "{size} bytes, {}", receipt.plan);
            check_account(&receipt, &buffer, behaviour, size as u64, block);
        }
    }
}

fn check_account(receipt: &Receipt, buffer: &Buffer, behaviour: Behaviour, size: u64, block: u64) {
    let is_device = buffer.provenance().kind == Kind::Bar;
    let (path, host_bytes) = match behaviour {
        _ if size < block => (Path::StagedCopy, size),
        Behaviour::Works if is_device => (Path::PeerToPeer, size % block),
        Behaviour::Works => (Path::SharedHostMemory, size),
        _ => (Path::StagedCopy, size),
    };
    assert_eq!(
        (receipt.plan.path, receipt.host_bytes),
        (path, host_bytes),
        "{size} bytes"
    );
    assert_eq!(receipt.bytes, size);
    // Each path that is better than the one taken has a reason against it.
    let better = match path {
        Path::PeerToPeer => 0,
        Path::SharedHostMemory => 1,
        Path::StagedCopy => 2,
    };
    assert_eq!(receipt.plan.reasons.len(), better, "{}", receipt.plan);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_write_into_the_middle_of_a_file_leaves_the_rest() {
    let Some(file) = file_with(&[1; 20_000]) else {
        return;
    };
    let buffer = device_memory(8192);
    put(&buffer.whole(), &[2; 8192]);
    let (importer, _) = importer(&file, Behaviour::Works);
    let range = buffer.range(0, 5000).unwrap();
    importer.attach(&range).unwrap().write(4096).unwrap();
    let mut expected = vec![1; 20_000];
    expected[4096..9096].fill(2);
    assert!(content(&file) == expected);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_refusal_by_the_kernel_is_told_from_other_errors() {
    let Some(file) = file_with(&random(100_000)) else {
        return;
    };
    for (errno, code) in [
        (Errno::INVAL, ReasonCode::KernelRefused),
        (Errno::REMOTEIO, ReasonCode::KernelRefused),
        (Errno::NOTSUPP, ReasonCode::KernelRefused),
        (Errno::FAULT, ReasonCode::NoStructPages),
        (Errno::IO, ReasonCode::DeviceError),
    ] {
        let buffer = device_memory(65536);
        let (importer, _) = importer(&file, Behaviour::Fails(errno));
        let mut attachment = importer.attach(&buffer.whole()).unwrap();
        for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
            let plan = attachment.plan(direction, 0).unwrap();
            let expected = [
                (Path::PeerToPeer, code),
                (Path::SharedHostMemory, ReasonCode::NotHostMemory),
            ];
            assert_eq!(codes(&plan), expected);
            let evidence = &plan.reasons[0].evidence;
            let device = buffer.provenance().device.unwrap().to_string();
            for word in [errno.name().unwrap(), &direction.to_string(), &device] {
                assert!(
                    evidence.contains(word),
                    "{evidence:?} does not say {word:?}"
                );
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn bytes_that_do_not_arrive_are_caught_in_the_direction_that_loses_them() {
    let bytes = random(200_000);
    let Some(source) = file_with(&bytes) else {
        return;
    };
    for lost in [Direction::DiskToBuffer, Direction::BufferToDisk] {
        for behaviour in [Behaviour::Loses(lost), Behaviour::Cuts(lost, 512)] {
            let buffer = device_memory(200_000);
            let (importer, _) = importer(&source, behaviour);
            let mut attachment = importer.attach(&buffer.whole()).unwrap();
            for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
                let plan = attachment.plan(direction, 0).unwrap();
                if direction != lost {
                    assert_eq!(plan.path, Path::PeerToPeer, "{behaviour:?}: {plan}");
                    continue;
                }
                assert_eq!(
                    plan.reasons[0].code,
                    ReasonCode::ProofFailed,
                    "{behaviour:?}"
                );
                assert!(plan.reasons[0].evidence.contains(&lost.to_string()));
                let first = if behaviour == Behaviour::Loses(lost) {
                    "byte 0 "
                } else {
                    "byte 512 "
                };
                assert!(plan.reasons[0].evidence.contains(first), "{plan}");
            }
            // The data still arrive.
            let receipt = attachment.read(0).unwrap();
            assert_eq!(receipt.bytes, 200_000);
            assert!(get(&buffer.whole()) == bytes);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn bytes_of_an_earlier_transfer_prove_nothing() {
    let Some(file) = file_with(&random(200_000)) else {
        return;
    };
    for bytes in [random(200_000), vec![0; 200_000]] {
        let buffer = device_memory(200_000);
        buffer.whole().write_bytes(&bytes).unwrap();
        let (importer, _) = importer(&file, Behaviour::WritesTheFirst);
        let mut attachment = importer.attach(&buffer.whole()).unwrap();
        let plan = attachment.plan(Direction::BufferToDisk, 0).unwrap();
        assert_eq!(plan.reasons[0].code, ReasonCode::ProofFailed, "{plan}");
        assert!(get(&buffer.whole()) == bytes);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_bus_that_answers_with_a_constant_proves_nothing() {
    let Some(file) = file_with(&random(70_000)) else {
        return;
    };
    for byte in [0, 0xff] {
        let buffer = device_memory(65536);
        // The buffer's contents must not make the answer look right.
        put(&buffer.whole(), &[byte; 65536]);
        let (importer, _) = importer(&file, Behaviour::WritesOnly(byte));
        let plan = importer
            .attach(&buffer.whole())
            .unwrap()
            .plan(Direction::BufferToDisk, 0);
        assert_eq!(plan.unwrap().reasons[0].code, ReasonCode::ProofFailed);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_proof_changes_neither_the_buffer_nor_the_file() {
    let bytes = random(300_000);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    for behaviour in [
        Behaviour::Works,
        Behaviour::Fails(Errno::INVAL),
        Behaviour::Loses(Direction::DiskToBuffer),
        Behaviour::Loses(Direction::BufferToDisk),
    ] {
        let buffer = device_memory(300_000);
        let held = random(300_000);
        put(&buffer.whole(), &held);
        let (importer, fake) = importer(&file, behaviour);
        let mut attachment = importer.attach(&buffer.whole()).unwrap();
        attachment.plan(Direction::DiskToBuffer, 0).unwrap();
        attachment.plan(Direction::BufferToDisk, 0).unwrap();
        assert!(fake.calls() >= 2, "nothing was tried");
        assert!(get(&buffer.whole()) == held, "{behaviour:?}");
        assert!(content(&file) == bytes, "{behaviour:?}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_pair_is_proved_once_for_each_direction_until_the_proofs_are_forgotten() {
    let Some(file) = file_with(&random(65536)) else {
        return;
    };
    let buffer = device_memory(65536);
    let (importer, fake) = importer(&file, Behaviour::Works);
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    attachment.plan(Direction::DiskToBuffer, 0).unwrap();
    assert_eq!(fake.calls(), 1);
    attachment.plan(Direction::DiskToBuffer, 0).unwrap();
    assert_eq!(fake.calls(), 1);
    attachment.plan(Direction::BufferToDisk, 0).unwrap();
    assert_eq!(fake.calls(), 2);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_device_named_by_another_process_gets_no_credit_for_what_was_proved_of_it() {
    let Some(file) = file_with(&random(65536)) else {
        return;
    };
    let honest = device_memory(65536);
    let (importer, fake) = importer(&file, Behaviour::Works);
    importer
        .attach(&honest.whole())
        .unwrap()
        .plan(Direction::DiskToBuffer, 0)
        .unwrap();
    let calls = fake.calls();
    let memory = memfd::sealed("claims to be the BAR", 65536).unwrap();
    let claimed = Buffer::from_host_memory(memory, None, honest.provenance().clone()).unwrap();
    let claimed = claimed.without_voucher().whole();
    importer
        .attach(&claimed)
        .unwrap()
        .plan(Direction::DiskToBuffer, 0)
        .unwrap();
    assert!(
        fake.calls() > calls,
        "the proof of another buffer was believed"
    );
}

/// The plan for a buffer of the file, and the number of calls on device memory that it took.
fn planned(
    importer: &FileImporter,
    fake: &Fake,
    buffer: &Buffer,
    direction: Direction,
) -> (Plan, u32) {
    let before = fake.calls();
    let plan = importer
        .attach(&buffer.whole())
        .unwrap()
        .plan(direction, 0)
        .unwrap();
    (plan, fake.calls() - before)
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_refusal_of_one_bar_or_exporter_says_nothing_of_another() {
    let Some(file) = file_with(&random(65536)) else {
        return;
    };
    let small = device_memory(65536);
    let device = small.provenance().device.unwrap();
    let (importer, fake) = importer(&file, Behaviour::Fails(Errno::FAULT));
    let direction = Direction::DiskToBuffer;
    let (plan, _) = planned(&importer, &fake, &small, direction);
    assert_eq!(plan.reasons[0].code, ReasonCode::NoStructPages);
    fake.behaviour.set(Behaviour::Works);
    for (kind, bar) in [(Kind::Bar, Some(4)), (Kind::Vfio, Some(2))] {
        let other = memory_of(device, kind, bar, 65536);
        let (plan, _) = planned(&importer, &fake, &other, direction);
        assert_eq!(plan.path, Path::PeerToPeer, "{kind:?} {bar:?}: {plan}");
    }
    // The refusal still holds for the refused memory.
    let (plan, calls) = planned(&importer, &fake, &small, direction);
    assert_eq!((plan.path, calls), (Path::StagedCopy, 0));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_foreign_buffer_is_not_said_to_be_in_device_memory() {
    let Some(file) = file_with(&random(65536)) else {
        return;
    };
    let device = "ffff:fe:00.0".parse().unwrap();
    for (kind, code) in [
        (Kind::Other, ReasonCode::PlacementUnknown),
        (Kind::Drm, ReasonCode::PlacementUnknown),
        (Kind::Vfio, ReasonCode::NotHostMemory),
    ] {
        let buffer = memory_of(device, kind, None, 65536);
        let (importer, fake) = importer(&file, Behaviour::Fails(Errno::FAULT));
        let (plan, _) = planned(&importer, &fake, &buffer, Direction::DiskToBuffer);
        let expected = [
            (Path::PeerToPeer, ReasonCode::NoStructPages),
            (Path::SharedHostMemory, code),
        ];
        assert_eq!(codes(&plan), expected, "{kind:?}: {plan}");
        let device_memory = plan.reasons[1].evidence.contains("in device memory");
        assert_eq!(device_memory, code == ReasonCode::NotHostMemory, "{plan}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "a system call that Miri does not have")]
fn a_file_of_no_disk_names_its_filesystem() {
    let memory = memfd::sealed("a file in memory", 10_000).unwrap();
    let importer = FileImporter::from_fd(memory, "a file").unwrap();
    assert_eq!(
        importer.endpoint.describe(None),
        "the tmpfs of a file, whose disk the kernel does not tell"
    );
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_proof_is_about_one_disk_and_goes_with_it() {
    let bytes = random(65536);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    let sysfs = tempfile::tempdir().unwrap();
    let disks = Disks(sysfs.path().to_owned());
    let (one, other) = ("0000:01:00.0", "0000:02:00.0");
    disks.add(one);
    let (importer, fake) = on_disks(&file, Behaviour::Works, &disks);
    let buffer = device_memory(65536);
    for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
        let plan = || planned(&importer, &fake, &buffer, direction);
        let is_proved = |anew: bool| {
            let (plan, tried) = plan();
            assert_eq!((plan.path, tried > 0), (Path::PeerToPeer, anew), "{plan}");
        };
        is_proved(true);
        is_proved(false);
        // The volume grows while it is in use, and moves to its new disk.
        disks.add(other);
        let (several, tried) = plan();
        assert_eq!(codes(&several)[0].1, ReasonCode::SeveralDisks, "{several}");
        assert!(several.reasons[0].evidence.contains("2 disks"), "{several}");
        assert_eq!((several.path, tried), (Path::StagedCopy, 0));
        disks.remove(one);
        is_proved(true);
        is_proved(false);
        disks.remove(other);
        disks.add(one);
    }
    fs::remove_dir_all(sysfs.path().join("dev")).unwrap();
    let (unknown, tried) = planned(&importer, &fake, &buffer, Direction::DiskToBuffer);
    assert_eq!(codes(&unknown)[0].1, ReasonCode::SeveralDisks, "{unknown}");
    assert_eq!(tried, 0);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn what_failed_for_a_want_that_passes_is_tried_again() {
    let Some(file) = file_with(&random(65536)) else {
        return;
    };
    for errno in [Errno(12), Errno::AGAIN, Errno::BUSY, Errno::IO] {
        for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
            let buffer = device_memory(65536);
            let (importer, fake) = importer(&file, Behaviour::Fails(errno));
            let (plan, _) = planned(&importer, &fake, &buffer, direction);
            assert_eq!(plan.path, Path::StagedCopy, "{errno}");
            fake.behaviour.set(Behaviour::Works);
            let (plan, _) = planned(&importer, &fake, &buffer, direction);
            assert_eq!(plan.path, Path::PeerToPeer, "{errno}: {plan}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_transfer_that_fails_makes_the_proof_void() {
    let bytes = random(65536);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    let buffer = device_memory(65536);
    let (importer, fake) = importer(&file, Behaviour::Works);
    for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
        fake.behaviour.set(Behaviour::Works);
        let mut attachment = importer.attach(&buffer.whole()).unwrap();
        attachment.plan(direction, 0).unwrap();
        // The path breaks: first with an error, then without one.
        fake.behaviour.set(Behaviour::Fails(Errno::REMOTEIO));
        let receipt = match direction {
            Direction::DiskToBuffer => attachment.read(0).unwrap(),
            Direction::BufferToDisk => attachment.write(0).unwrap(),
        };
        assert_eq!(receipt.plan.path, Path::StagedCopy);
        fake.behaviour.set(Behaviour::Loses(direction));
        let receipt = match direction {
            Direction::DiskToBuffer => attachment.read(0).unwrap(),
            Direction::BufferToDisk => attachment.write(0).unwrap(),
        };
        let code = receipt.plan.reasons[0].code;
        assert_eq!(code, ReasonCode::ProofFailed, "{direction}");
        assert!(get(&buffer.whole()) == bytes && content(&file) == bytes);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn the_caller_says_when_paths_are_proved() {
    let bytes = random(65536);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
        let buffer = device_memory(65536);
        put(&buffer.whole(), &bytes);
        let policy = |policy| {
            let (importer, fake) = importer(&file, Behaviour::Works);
            (importer.with_proofs(policy), fake)
        };
        // A policy of never touches nothing and does not use an unproved path.
        let (never, fake) = policy(ProofPolicy::Never);
        let (plan, calls) = planned(&never, &fake, &buffer, direction);
        assert_eq!((plan.path, calls), (Path::StagedCopy, 0));
        let unproved = [ReasonCode::ReadUnproved, ReasonCode::WriteUnproved];
        assert!(unproved.contains(&plan.reasons[0].code), "{plan}");
        assert!(plan.reasons[0].evidence.contains("Never"), "{plan}");
        // This policy uses a proof that another importer made.
        let (first, fake) = policy(ProofPolicy::First);
        assert_eq!(planned(&first, &fake, &buffer, direction).1, 1);
        assert_eq!(planned(&first, &fake, &buffer, direction).1, 0);
        let (plan, _) = planned(&never, &fake, &buffer, direction);
        assert_eq!(plan.path, Path::PeerToPeer);
        // This policy notices a path that breaks without an error.
        let (every, fake) = policy(ProofPolicy::Every);
        assert_eq!(planned(&every, &fake, &buffer, direction).1, 1);
        fake.behaviour.set(Behaviour::Loses(direction));
        let (plan, _) = planned(&every, &fake, &buffer, direction);
        assert_eq!(plan.reasons[0].code, ReasonCode::ProofFailed);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_process_that_is_killed_in_a_proof_leaves_a_source_as_it_was() {
    let Some(file) = file_with(&random(400_000)) else {
        return;
    };
    let buffer = device_memory(400_000);
    // Part of the buffer is zero, as usual for buffers.
    let mut held = random(400_000);
    held[150_000..250_000].fill(0);
    put(&buffer.whole(), &held);
    let (importer, fake) = importer(&file, Behaviour::Works);
    let (seen, expected) = (buffer.clone(), held.clone());
    fake.at_call.set(Some(Box::new(move |_| {
        assert!(get(&seen.whole()) == expected, "killed now, it is lost");
    })));
    importer.attach(&buffer.whole()).unwrap().write(0).unwrap();
    assert!(fake.calls() >= 3, "start and end were not proved");
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_read_only_source_is_proved_with_its_own_bytes_or_not_at_all() {
    let Some(file) = file_with(&random(65536)) else {
        return;
    };
    for (held, path) in [
        (random(65536), Path::PeerToPeer),
        (vec![0; 65536], Path::StagedCopy),
    ] {
        let writable = device_memory(65536);
        put(&writable.whole(), &held);
        let memory = writable.host_memory().unwrap();
        let link = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let memory = File::open(link).unwrap().into();
        let provenance = writable.provenance().clone();
        let buffer = Buffer::from_host_memory(memory, None, provenance).unwrap();
        assert!(!buffer.is_writable());
        let (importer, fake) = importer(&file, Behaviour::Works);
        let (plan, _) = planned(&importer, &fake, &buffer, Direction::BufferToDisk);
        assert_eq!(plan.path, path, "{plan}");
        if path == Path::StagedCopy {
            assert_eq!(plan.reasons[0].code, ReasonCode::WriteUnproved);
        }
        assert!(get(&writable.whole()) == held);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_process_that_is_killed_in_a_read_has_touched_only_what_the_read_overwrites() {
    let Some(file) = file_with(&random(70_000)) else {
        return;
    };
    let buffer = device_memory(1 << 20);
    let held = random(1 << 20);
    put(&buffer.whole(), &held);
    let (importer, fake) = importer(&file, Behaviour::Works);
    let seen = buffer.clone();
    fake.at_call.set(Some(Box::new(move |_| {
        assert!(get(&seen.whole())[70_000..] == held[70_000..]);
    })));
    let receipt = importer.attach(&buffer.whole()).unwrap().read(0).unwrap();
    assert_eq!(
        (receipt.plan.path, receipt.bytes),
        (Path::PeerToPeer, 70_000)
    );
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn holes_and_zeros_do_not_count_as_bytes_that_arrived() {
    // The CPU fills a hole, so a path that loses everything would seem to work.
    let Some(file) = file_with(&[]) else { return };
    file.set_len(1 << 20).unwrap();
    let buffer = device_memory(65536);
    let (importer, _) = importer(&file, Behaviour::LosesAllButHoles);
    let plan = importer
        .attach(&buffer.whole())
        .unwrap()
        .plan(Direction::DiskToBuffer, 0)
        .unwrap();
    assert_eq!(plan.reasons[0].code, ReasonCode::ProofFailed, "{plan}");
    let (importer, _) = self::importer(&file, Behaviour::Works);
    let buffer = device_memory(65536);
    let receipt = importer.attach(&buffer.whole()).unwrap().read(0).unwrap();
    assert_eq!(
        (receipt.plan.path, receipt.bytes),
        (Path::PeerToPeer, 65536)
    );
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_path_that_stops_working_is_left_and_the_bytes_arrive_all_the_same() {
    let bytes = random(9 << 20);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    let buffer = device_memory(9 << 20);
    // Three calls prove the path, one carries a request, and the next one fails.
    let (importer, _) = importer(&file, Behaviour::FailsAfter(4, Errno::REMOTEIO));
    let receipt = importer.attach(&buffer.whole()).unwrap().read(0).unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy);
    let copied = (9 << 20) - engine::REQUEST;
    let account = (receipt.bytes, receipt.host_bytes, receipt.copied);
    assert_eq!(account, (9 << 20, copied, copied));
    assert!(receipt.plan.reasons[0].evidence.contains("EREMOTEIO"));
    assert!(get(&buffer.whole()) == bytes);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_misaligned_transfer_names_the_alignment_and_arrives() {
    let bytes = random(100_000);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    for buffer in [
        device_memory(65536),
        memfd::export("memory", 65536).unwrap(),
    ] {
        let (importer, _) = importer(&file, Behaviour::Works);
        let (memory, block) = importer.alignment().unwrap();
        let range = buffer.range(0, 10_000).unwrap();
        let receipt = importer.attach(&range).unwrap().read(7).unwrap();
        let reason = receipt
            .plan
            .reasons
            .iter()
            .find(|r| r.code == ReasonCode::Misaligned);
        let evidence = &reason.unwrap().evidence;
        assert!(evidence.contains("offset 7 ") && evidence.contains(&block.to_string()));
        assert!(get(&range) == bytes[7..10_007]);

        if memory > 1 {
            let range = buffer.range(1, 10_000).unwrap();
            let receipt = importer.attach(&range).unwrap().read(0).unwrap();
            let reason = receipt
                .plan
                .reasons
                .iter()
                .find(|r| r.code == ReasonCode::Misaligned);
            assert!(reason.unwrap().evidence.contains(&memory.to_string()));
            assert!(get(&range) == bytes[..10_000]);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_transfer_shorter_than_a_block_names_the_block_and_arrives() {
    let bytes = random(4096);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    for (buffer, path) in [
        (device_memory(65536), Path::PeerToPeer),
        (
            memfd::export("memory", 65536).unwrap(),
            Path::SharedHostMemory,
        ),
    ] {
        let (importer, _) = importer(&file, Behaviour::Works);
        let (_, block) = importer.alignment().unwrap();
        let range = buffer.range(0, 100).unwrap();
        let receipt = importer.attach(&range).unwrap().read(0).unwrap();
        let is_short = |reason: &&Reason| reason.code == ReasonCode::BelowBlockSize;
        let reason = receipt.plan.reasons.iter().find(is_short).unwrap();
        assert_eq!(reason.path, path);
        assert!(
            reason.evidence.starts_with("100 bytes ")
                && reason.evidence.ends_with(&format!(" {block}")),
            "{}",
            reason.evidence
        );
        assert!(get(&range) == bytes[..100]);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_caller_who_insists_on_a_path_is_told_why_it_is_not_possible() {
    let Some(file) = file_with(&random(65536)) else {
        return;
    };
    let buffer = device_memory(65536);
    let (importer, _) = importer(&file, Behaviour::Fails(Errno::INVAL));
    let mut attachment = importer
        .attach(&buffer.whole())
        .unwrap()
        .require(Path::PeerToPeer);
    let error = attachment.read(0).unwrap_err();
    assert!(matches!(error, TransferError::PathTooPoor { .. }));
    assert!(error.to_string().contains("EINVAL"), "{error}");
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn reading_at_and_after_the_end_of_a_file_gives_what_there_is() {
    let bytes = random(6000);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    let (importer, _) = importer(&file, Behaviour::Works);
    let buffer = memfd::export("memory", 8192).unwrap();
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    for (offset, left) in [(0, 6000), (4096, 1904), (6000, 0), (1 << 40, 0)] {
        assert_eq!(
            attachment.read(offset).unwrap().bytes,
            left,
            "from {offset}"
        );
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_file_that_is_open_for_reading_is_not_written() {
    let Some(directory) = directory() else { return };
    let path = directory.join(format!("read-only-{}", std::process::id()));
    std::fs::write(&path, random(10_000)).unwrap();
    let file = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let importer = FileImporter::from_fd(file.into(), "the file").unwrap();
    let buffer = memfd::export("memory", 8192).unwrap();
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    assert_eq!(attachment.read(0).unwrap().bytes, 8192);
    assert!(matches!(
        attachment.write(0),
        Err(TransferError::ReadOnly { .. })
    ));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_file_without_direct_io_is_staged_and_says_so() {
    let memory = memfd::sealed("a file in memory", 10_000).unwrap();
    let importer = FileImporter::from_fd(memory, "a file in memory").unwrap();
    let buffer = memfd::export("memory", 8192).unwrap();
    let receipt = importer.attach(&buffer.whole()).unwrap().read(0).unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy);
    let expected = [
        (Path::PeerToPeer, ReasonCode::NotDeviceMemory),
        (Path::SharedHostMemory, ReasonCode::NoDirectIo),
    ];
    assert_eq!(codes(&receipt.plan), expected);
    assert_eq!((receipt.bytes, receipt.host_bytes), (8192, 8192));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn what_is_no_file_is_refused() {
    assert!(matches!(
        FileImporter::open("/dev/null"),
        Err(TransferError::NotAFile { .. })
    ));
    assert!(matches!(
        FileImporter::open("/"),
        Err(TransferError::NotAFile { .. })
    ));
    assert!(matches!(
        FileImporter::open_for("/", Access::ReadWrite),
        Err(TransferError::System(_))
    ));
    let error = FileImporter::open("/nonexistent").unwrap_err().to_string();
    assert_eq!(
        error,
        "open on /nonexistent: ENOENT (No such file or directory)"
    );
}

/// Memory that only the copies of its owner reach.
struct Theirs(Arc<Mutex<Vec<u8>>>);

impl Stage for Theirs {
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.0.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        into.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }
}

/// A buffer that cannot be mapped as a whole, because it exceeds every address space.
fn unmappable() -> Buffer {
    let provenance = device_memory(4096).provenance().clone();
    let memory = memfd::sealed("their memory", 1 << 50).unwrap();
    Buffer::from_host_memory(memory, None, provenance).unwrap()
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_buffer_that_cannot_be_mapped_goes_by_its_owners_copies() {
    const SIZE: usize = (1 << 20) + 4097;
    let bytes = random(SIZE);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    let (bare, theirs) = (unmappable(), Arc::new(Mutex::new(vec![0; SIZE])));
    let (importer, _) = importer(&file, Behaviour::Works);
    // The attach succeeds, and the plan's error names the remedy.
    let mut attachment = importer.attach(&bare.whole()).unwrap();
    let error = attachment.plan(Direction::DiskToBuffer, 0).unwrap_err();
    assert!(error.to_string().contains("mmap"), "{error}");

    let buffer = bare.with_stage(Theirs(theirs.clone()));
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    let plan = attachment.plan(Direction::DiskToBuffer, 0).unwrap();
    let expected = [
        (Path::PeerToPeer, ReasonCode::NotMappable),
        (Path::SharedHostMemory, ReasonCode::NotHostMemory),
    ];
    assert_eq!(codes(&plan), expected, "{plan}");
    let receipt = attachment.read(0).unwrap();
    assert_eq!(
        (receipt.bytes, receipt.host_bytes),
        (SIZE as u64, SIZE as u64)
    );
    assert!(*theirs.lock().unwrap() == bytes);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn a_proof_looks_at_the_bytes_by_the_owners_copies() {
    let bytes = random(65536);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    let buffer = device_memory(65536);
    let (importer, fake) = importer(&file, Behaviour::Works);
    // The mapping leads to other memory than the owner's copies, so those copies see none of
    // the bytes that the disk wrote.
    let theirs = Arc::new(Mutex::new(vec![0; 65536]));
    let elsewhere = buffer.clone().with_stage(Theirs(theirs.clone()));
    let (plan, calls) = planned(&importer, &fake, &elsewhere, Direction::DiskToBuffer);
    assert_eq!((plan.reasons[0].code, calls), (ReasonCode::ProofFailed, 1));
    importer
        .attach(&elsewhere.whole())
        .unwrap()
        .read(0)
        .unwrap();
    assert!(*theirs.lock().unwrap() == bytes);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri minutes")]
fn an_attachment_outlives_its_importer_and_goes_to_another_thread() {
    let bytes = random(65536);
    let Some(file) = file_with(&bytes) else {
        return;
    };
    let buffer = device_memory(65536);
    let (importer, _) = importer(&file, Behaviour::Works);
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    drop((importer, file));
    let receipt = std::thread::spawn(move || attachment.read(0)).join();
    assert_eq!(receipt.unwrap().unwrap().plan.path, Path::PeerToPeer);
    assert!(get(&buffer.whole()) == bytes);
}
