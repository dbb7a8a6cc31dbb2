//! Each rung of the ladder, through the crate: the one chosen for each file and buffer, and that the bytes
//! arrive. Runs in the guest, in each topology.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path as FilePath;
use std::process::Command;

use peerbuf::error::{ExportError, TransferError};
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::{heap::Heap, udmabuf};
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::plan::{Direction, Path, Plan, ReasonCode};
use peerbuf::{Access, Buffer};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::demo::topology;
use peerbuf_lab_suite::node::Node;

const NVME: &str = "/mnt/nvme";
/// The raw namespace that tests may overwrite. Each test uses its own part.
const RAW: &str = "/dev/nvme0n2";
const MIB: u64 = 1 << 20;

fn device_memory(length: u64) -> Buffer {
    let device = Device::open(Node::largest().bdf.parse().unwrap()).unwrap();
    let access = Access::ReadWrite;
    device
        .export(Request {
            bar: 2,
            offset: None,
            length,
            access,
        })
        .unwrap()
}

fn random(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rand::fill(&mut bytes[..]);
    bytes
}

fn file_with(bytes: &[u8]) -> File {
    let file = unnamed_file(FilePath::new(NVME)).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.sync_all().unwrap();
    file
}

fn importer(file: &File) -> FileImporter {
    FileImporter::from_fd(file.try_clone().unwrap().into(), "the file").unwrap()
}

/// The expected path of a file on the disk, or of the disk itself once it is proved.
fn expected() -> (Path, Option<ReasonCode>) {
    match topology().as_str() {
        "switch" | "host-bridge" => (Path::PeerToPeer, None),
        "refused" => (Path::StagedCopy, Some(ReasonCode::KernelRefused)),
        "lying" => (Path::StagedCopy, Some(ReasonCode::ProofFailed)),
        other => panic!("what does {other} promise?"),
    }
}

fn check(plan: &Plan, direction: Direction) {
    let (path, code) = expected();
    assert_eq!(plan.path, path, "{plan}");
    assert_eq!(
        plan.reasons.first().map(|reason| reason.code),
        code,
        "{plan}"
    );
    if code.is_some() {
        assert!(
            plan.reasons[0].evidence.contains(&direction.to_string()),
            "{plan}"
        );
    }
}

#[test]
fn each_direction_is_judged_by_itself() {
    for direction in [Direction::BufferToDisk, Direction::DiskToBuffer] {
        peerbuf::plan::forget_proofs();
        let file = file_with(&random(MIB));
        let buffer = device_memory(MIB);
        let importer = importer(&file);
        check(
            &importer
                .attach(&buffer.whole())
                .unwrap()
                .plan(direction, 0)
                .unwrap(),
            direction,
        );
    }
}

#[test]
fn bytes_at_an_offset_in_the_buffer_and_the_file_arrive() {
    let bytes = random(3 * MIB);
    let file = file_with(&bytes);
    let buffer = device_memory(4 * MIB);
    put(&buffer.whole(), &vec![0xaa; 4 << 20]);
    let range = buffer.range(MIB + 4096, MIB + 1000).unwrap();
    let receipt = importer(&file).attach(&range).unwrap().read(8192).unwrap();
    check(&receipt.plan, Direction::DiskToBuffer);
    let all = get(&buffer.whole());
    let (from, to) = ((MIB + 4096) as usize, (2 * MIB + 5096) as usize);
    assert!(all[from..to] == bytes[8192..8192 + (MIB + 1000) as usize]);
    assert!(
        all[..from]
            .iter()
            .chain(&all[to..])
            .all(|&byte| byte == 0xaa)
    );

    let sink = file_with(&[]);
    let receipt = importer(&sink).attach(&range).unwrap().write(4096).unwrap();
    check(&receipt.plan, Direction::BufferToDisk);
    let mut found = vec![0; (MIB + 1000) as usize];
    sink.read_exact_at(&mut found, 4096).unwrap();
    assert!(found == all[from..to]);
    assert_eq!(sink.metadata().unwrap().len(), 4096 + MIB + 1000);
}

#[test]
fn writing_a_raw_device_stays_staged_unless_a_scratch_range_is_named() {
    peerbuf::plan::forget_proofs();
    let (at, length) = (16 * MIB, MIB);
    let bytes = random(length);
    let buffer = device_memory(length);
    put(&buffer.whole(), &bytes);
    let raw = || FileImporter::open_for(RAW, Access::ReadWrite).unwrap();
    let on_disk = || {
        let mut found = vec![0; length as usize];
        File::open(RAW)
            .unwrap()
            .read_exact_at(&mut found, at)
            .unwrap();
        found
    };
    let around = |offset| {
        let mut found = vec![0; 4096];
        File::open(RAW)
            .unwrap()
            .read_exact_at(&mut found, offset)
            .unwrap();
        found
    };
    let before = [around(at - 4096), around(at + length), around(0)];

    let receipt = raw().attach(&buffer.whole()).unwrap().write(at).unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy);
    assert_eq!(
        receipt.plan.reasons[0].code,
        ReasonCode::WriteUnproved,
        "{}",
        receipt.plan
    );
    assert!(on_disk() == bytes);

    let bytes = random(length);
    put(&buffer.whole(), &bytes);
    let scratch = raw().with_scratch_range(24 * MIB..25 * MIB);
    let receipt = scratch.attach(&buffer.whole()).unwrap().write(at).unwrap();
    check(&receipt.plan, Direction::BufferToDisk);
    scratch.sync().unwrap();
    assert!(on_disk() == bytes);
    assert_eq!([around(at - 4096), around(at + length), around(0)], before);
}

#[test]
fn reading_a_raw_device_is_proved_with_what_is_on_it() {
    peerbuf::plan::forget_proofs();
    let at = 32 * MIB;
    let bytes = random(MIB);
    let raw = OpenOptions::new().write(true).open(RAW).unwrap();
    raw.write_all_at(&bytes, at).unwrap();
    raw.sync_all().unwrap();
    let buffer = device_memory(MIB);
    let receipt = FileImporter::open(RAW)
        .unwrap()
        .attach(&buffer.whole())
        .unwrap()
        .read(at)
        .unwrap();
    check(&receipt.plan, Direction::DiskToBuffer);
    assert!(get(&buffer.whole()) == bytes);
}

#[test]
fn a_file_that_is_all_hole_is_no_proof_and_arrives() {
    peerbuf::plan::forget_proofs();
    let file = file_with(&[]);
    file.set_len(MIB).unwrap();
    let buffer = device_memory(MIB);
    put(&buffer.whole(), &random(MIB));
    let receipt = importer(&file)
        .attach(&buffer.whole())
        .unwrap()
        .read(0)
        .unwrap();
    check(&receipt.plan, Direction::DiskToBuffer);
    assert!(get(&buffer.whole()).iter().all(|&byte| byte == 0));
}

#[test]
fn a_proof_puts_back_what_the_buffer_held() {
    let file = file_with(&random(MIB));
    let buffer = device_memory(MIB);
    let bytes = random(MIB);
    put(&buffer.whole(), &bytes);
    let importer = importer(&file);
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
        peerbuf::plan::forget_proofs();
        attachment.plan(direction, 0).unwrap();
        assert!(get(&buffer.whole()) == bytes, "{direction}");
    }
}

#[test]
fn a_filesystem_in_memory_gets_staged_copies() {
    let file = unnamed_file(FilePath::new("/dev/shm")).unwrap();
    let bytes = random(MIB);
    file.write_all_at(&bytes, 0).unwrap();
    let buffer = device_memory(MIB);
    let receipt = importer(&file)
        .attach(&buffer.whole())
        .unwrap()
        .read(0)
        .unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy);
    assert_eq!(
        receipt.plan.reasons[0].code,
        ReasonCode::NoDirectIo,
        "{}",
        receipt.plan
    );
    assert!(get(&buffer.whole()) == bytes);
}

#[test]
fn a_udmabuf_shares_its_pages_with_the_disk() {
    let bytes = random(MIB + 100);
    let file = file_with(&bytes);
    let buffer = udmabuf::export("memory", 2 * MIB).unwrap();
    assert_eq!(buffer.dmabuf().unwrap().exporter(), "udmabuf");
    let range = buffer.range(4096, MIB + 100).unwrap();
    let receipt = importer(&file).attach(&range).unwrap().read(0).unwrap();
    assert_eq!(receipt.plan.path, Path::SharedHostMemory);
    // The same bytes through the dma-buf alone, as a device sees them.
    let dmabuf = buffer.dmabuf().unwrap().try_clone().unwrap();
    let other = Buffer::from_dmabuf(dmabuf, buffer.provenance().clone());
    assert!(get(&other.range(4096, MIB + 100).unwrap()) == bytes);
}

#[test]
fn a_dma_buf_without_pages_is_staged_and_says_why() {
    // A udmabuf without its memfd: its own mapping has no struct pages.
    let bytes = random(MIB);
    let file = file_with(&bytes);
    let whole = udmabuf::export("memory", MIB).unwrap();
    let dmabuf = whole.dmabuf().unwrap().try_clone().unwrap();
    let mut provenance = whole.provenance().clone();
    provenance.kind = peerbuf::buffer::Kind::Other;
    let buffer = Buffer::from_dmabuf(dmabuf, provenance);
    let receipt = importer(&file)
        .attach(&buffer.whole())
        .unwrap()
        .read(0)
        .unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy);
    assert_eq!(
        receipt.plan.reasons[0].code,
        ReasonCode::NoStructPages,
        "{}",
        receipt.plan
    );
    assert!(get(&whole.whole()) == bytes);
}

/// The driver's size limit for udmabufs, restored on drop.
struct SizeLimit(String);

impl SizeLimit {
    const FILE: &str = "/sys/module/udmabuf/parameters/size_limit_mb";

    fn set(mib: &str) -> Self {
        let before = std::fs::read_to_string(Self::FILE).unwrap();
        std::fs::write(Self::FILE, mib).unwrap();
        Self(before)
    }
}

impl Drop for SizeLimit {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::FILE, &self.0);
    }
}

#[test]
fn a_udmabuf_beyond_the_limit_or_off_a_page_says_which() {
    let _limit = SizeLimit::set("64");
    udmabuf::export("memory", 64 * MIB).unwrap();
    let error = udmabuf::export("memory", 65 * MIB).unwrap_err().to_string();
    assert!(error.contains("64 MiB in"), "{error}");
    assert!(error.contains("size_limit_mb"), "{error}");
    let error = udmabuf::export("memory", 1000).unwrap_err();
    assert!(matches!(error, ExportError::Unsuitable { value: 1000, .. }));
    assert!(udmabuf::export("memory", 0).is_err());
}

#[test]
fn a_udmabuf_beyond_the_machines_memory_is_refused_and_nobody_is_killed() {
    // The initial value in Linux 7.3.
    let _limit = SizeLimit::set("2147483647");
    let error = udmabuf::export("memory", 4 << 30).unwrap_err().to_string();
    assert!(error.contains("MemAvailable"), "{error}");
    assert!(!error.contains("2147483647"), "{error}");
    // The limit also counts the holes of a memfd.
    let empty = peerbuf::export::memfd::export("memory", 4 << 30).unwrap();
    let error = udmabuf::export_list("list", &[empty.whole()]).unwrap_err();
    assert!(error.to_string().contains("MemAvailable"), "{error}");
    udmabuf::export_list("list", &[empty.range(0, MIB).unwrap()]).unwrap();
}

/// Set in the environment when this test program runs in a cgroup with a limit.
const IN_CGROUP: &str = "PEERBUF_IN_CGROUP";
/// The cgroup's directory. One test at a time has it.
const CGROUP: &str = "/sys/fs/cgroup/peerbuf-limited";

/// Runs the test of this name again, in a cgroup of 96 MiB. True in that process, where the test itself is to be done.
fn in_cgroup(test: &str) -> bool {
    if std::env::var_os(IN_CGROUP).is_some() {
        return true;
    }
    let root = FilePath::new("/sys/fs/cgroup");
    if !root.join("cgroup.procs").exists() {
        let mounted = Command::new("mount")
            .args(["-t", "cgroup2", "none", "/sys/fs/cgroup"])
            .status();
        assert!(mounted.unwrap().success());
    }
    std::fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
    std::fs::create_dir(CGROUP).unwrap();
    std::fs::write(format!("{CGROUP}/memory.max"), "100663296").unwrap();
    let status = Command::new("sh")
        .arg("-c")
        .arg(format!(
            "echo $$ >{CGROUP}/cgroup.procs && exec \"$0\" --exact \"$1\""
        ))
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(IN_CGROUP, "1")
        .status()
        .unwrap();
    std::fs::remove_dir(CGROUP).unwrap();
    assert!(status.success(), "{status}");
    false
}

#[test]
fn a_udmabuf_beyond_the_cgroups_limit_is_refused_and_nobody_is_killed() {
    let _limit = SizeLimit::set("2147483647");
    if in_cgroup("a_udmabuf_beyond_the_cgroups_limit_is_refused_and_nobody_is_killed") {
        udmabuf::export("memory", 16 * MIB).unwrap();
        let error = udmabuf::export("memory", 128 * MIB)
            .unwrap_err()
            .to_string();
        let file = format!("{CGROUP}/memory.max");
        assert!(error.contains(&file), "{error}");
    }
}

#[test]
fn a_dma_heaps_memory_is_charged_to_no_cgroup_and_a_udmabufs_to_its_makers() {
    if in_cgroup("a_dma_heaps_memory_is_charged_to_no_cgroup_and_a_udmabufs_to_its_makers") {
        let charged = || -> u64 {
            let text = std::fs::read_to_string(format!("{CGROUP}/memory.current")).unwrap();
            text.trim().parse().unwrap()
        };
        let before = charged();
        // More than the limit of the cgroup.
        let heap = Heap::open("system").unwrap();
        let _held = heap.export("heap", 128 * MIB).unwrap();
        assert!(charged() < before + 16 * MIB, "{before}, {}", charged());
        // Without a write to it.
        let _counted = udmabuf::export("memory", 32 * MIB).unwrap();
        assert!(charged() >= before + 32 * MIB, "{before}, {}", charged());
    }
}

#[test]
fn a_refused_export_says_what_there_is() {
    let device = Device::open(Node::largest().bdf.parse().unwrap()).unwrap();
    let export = |bar, offset, length| {
        let access = Access::ReadWrite;
        device
            .export(Request {
                bar,
                offset,
                length,
                access,
            })
            .unwrap_err()
            .to_string()
    };
    assert!(export(2, None, 1 << 40).contains("the BAR has 67108864 bytes"));
    let held = device_memory(4096);
    assert!(export(2, None, 64 << 20).contains("ENOSPC"));
    drop(held);
    assert!(export(2, Some(0), 1000).contains("multiples of 4096"));
    assert!(export(2, Some(64 << 20), 4096).contains("the BAR has 67108864 bytes"));
    assert!(export(5, None, 4096).contains("the memory BARs of this device are"));
    assert!(export(2, None, 0).contains("the length is 0"));
}

#[test]
fn a_read_only_export_can_be_written_to_disk_and_not_overwritten() {
    let device = Device::open(Node::largest().bdf.parse().unwrap()).unwrap();
    let request = Request {
        bar: 2,
        offset: None,
        length: MIB,
        access: Access::Read,
    };
    let buffer = device.export(request).unwrap();
    assert!(!buffer.is_writable());
    assert!(buffer.whole().map(Access::ReadWrite).is_err());
    let file = file_with(&random(MIB));
    let importer = importer(&file);
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    assert!(matches!(attachment.read(0), Err(TransferError::Buffer(_))));
    attachment.write(0).unwrap();
    let mut found = vec![0; MIB as usize];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == get(&buffer.whole()));
}
