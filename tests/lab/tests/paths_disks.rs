//! Files on filesystems, on volumes, on disks: which way each goes, as docs/stacks.md has it. A proof is about one disk,
//! so a file on several is not read and written peer to peer. Runs in the guest, with a second NVMe disk in the slot
//! of a card: both disks and the largest card can be peers.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path as FilePath, PathBuf};
use std::process::Command;

use peerbuf::export::memfd;
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::plan::{Direction, Path, Plan, ReasonCode};
use peerbuf::transfer::Receipt;
use peerbuf::{Access, Buffer};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::disk::{self, SCRATCH};
use peerbuf_lab_suite::machine::{Machine, give_to_peerbuf};
use peerbuf_lab_suite::modules::load;
use peerbuf_lab_suite::node::{Map, Node};
use peerbuf_lab_suite::pci::wait_until;
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// The part of each disk that is used, in sectors.
const PART: u64 = 40 * MIB / 512;
const BOTH: [Direction; 2] = [Direction::DiskToBuffer, Direction::BufferToDisk];
const AT: &str = "/mnt/volume";

fn run(command: &str) {
    let done = Command::new("sh").args(["-c", command]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command}: {said}");
}

/// The largest card, the scratch disk, and a second disk.
struct Disks {
    machine: Machine,
    /// The card whose slot the second disk has.
    bdf: String,
    second: &'static FilePath,
}

impl Disks {
    fn new() -> Disks {
        let bdf = Node::all().remove(1).bdf;
        let mut machine = Machine::new();
        machine.unplug("bar1");
        let second = machine.plug_disk();
        Disks {
            machine,
            bdf,
            second,
        }
    }

    fn members(&self) -> [&FilePath; 2] {
        [FilePath::new(SCRATCH), self.second]
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        self.machine.unplug("nvme1");
        self.machine.plug("bar1", &self.bdf).unwrap();
        give_to_peerbuf(&self.bdf);
    }
}

/// Sectors that a disk has read and written (Documentation/block/stat.rst).
fn sectors(disk: &FilePath) -> u64 {
    let name = disk.file_name().unwrap().to_str().unwrap();
    let text = fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    let fields: Vec<u64> = text
        .split_whitespace()
        .map(|field| field.parse().unwrap())
        .collect();
    fields[2] + fields[6]
}

/// A block device over disks.
struct Volume {
    node: PathBuf,
    remove: String,
}

impl Volume {
    fn mapped(table: &str) -> Volume {
        load("dm-mod");
        run(&format!(
            "printf '{table}' | dmsetup create --noudevsync volume"
        ));
        let volume = Volume {
            node: node("dm-"),
            remove: "dmsetup remove --noudevsync volume".into(),
        };
        wait_until("the volume is there", || volume.node.exists());
        volume
    }

    fn disk(node: &FilePath) -> Volume {
        Volume {
            node: node.to_owned(),
            remove: "true".into(),
        }
    }

    /// A file of a filesystem on a disk, as a disk.
    fn loop_device(disk: &FilePath) -> Volume {
        load("loop");
        run(&format!(
            "mkfs.ext4 -q -F {} && mkdir -p /mnt/below && mount {} /mnt/below && truncate -s 64M /mnt/below/image && \
             losetup /dev/loop0 /mnt/below/image",
            disk.display(),
            disk.display()
        ));
        Volume {
            node: "/dev/loop0".into(),
            remove: "losetup -d /dev/loop0 && umount /mnt/below".into(),
        }
    }

    /// Compressed memory.
    fn zram() -> Volume {
        load("zram");
        run("echo 64M > /sys/block/zram0/disksize");
        Volume {
            node: "/dev/zram0".into(),
            remove: "echo 1 > /sys/block/zram0/reset".into(),
        }
    }

    /// An array without a superblock, made by sysfs: the guest has no mdadm.
    fn raid(level: &str, members: [&FilePath; 2]) -> Volume {
        load("md-mod");
        load(level);
        let sysfs = |file: &str, value: &str| {
            let file = format!("/sys/block/md127/md/{file}");
            fs::write(&file, value).unwrap_or_else(|error| panic!("{value} to {file}: {error}"));
        };
        fs::write("/sys/module/md_mod/parameters/new_array", "md127").unwrap();
        let volume = Volume {
            node: node("md127"),
            remove: "echo clear > /sys/block/md127/md/array_state".into(),
        };
        sysfs("metadata_version", "none");
        sysfs("level", level);
        sysfs("raid_disks", &members.len().to_string());
        sysfs("chunk_size", "524288");
        sysfs("component_size", &(PART / 2).to_string());
        for (slot, member) in members.iter().enumerate() {
            let number = fs::metadata(member).unwrap().rdev();
            let (major, minor) = (libc::major(number), libc::minor(number));
            sysfs("new_dev", &format!("{major}:{minor}"));
            let name = member.file_name().unwrap().to_str().unwrap();
            sysfs(&format!("dev-{name}/size"), &(PART / 2).to_string());
            sysfs(&format!("dev-{name}/slot"), &slot.to_string());
        }
        sysfs("array_state", "active");
        volume
    }

    fn mounted(self) -> Mounted {
        self.mounted_as("ext4 -F", "defaults")
    }

    /// With a filesystem of this type, and what its mkfs and its mount want.
    fn mounted_as(self, filesystem: &str, options: &str) -> Mounted {
        let node = self.node.display();
        run(&format!(
            "mkfs.{filesystem} -q {node} && mkdir -p {AT} && mount -o {options} {node} {AT}"
        ));
        Mounted {
            _unmount: Afterwards(format!("umount {AT}")),
            volume: self,
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        run(&self.remove);
    }
}

/// The block device whose name begins so.
fn node(prefix: &str) -> PathBuf {
    let mut names = fs::read_dir("/sys/class/block")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let name = names.find(|name| name.starts_with(prefix)).unwrap();
    FilePath::new("/dev").join(name)
}

/// A filesystem on a volume, at [`AT`].
struct Mounted {
    _unmount: Afterwards,
    volume: Volume,
}

/// Runs a command when dropped.
struct Afterwards(String);

impl Drop for Afterwards {
    fn drop(&mut self) {
        run(&self.0);
    }
}

const SIZE: u64 = 8 * MIB;

fn random() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    rand::fill(&mut bytes[..]);
    bytes
}

fn device_memory() -> Buffer {
    let device = Device::open(Node::largest().bdf.parse().unwrap()).unwrap();
    let request = Request {
        bar: 2,
        offset: None,
        length: SIZE,
        access: Access::ReadWrite,
    };
    let buffer = device.export(request).unwrap();
    put(&buffer.whole(), &random());
    buffer
}

fn file(directory: &str, bytes: &[u8]) -> File {
    let file = unnamed_file(FilePath::new(directory)).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.sync_all().unwrap();
    file
}

fn importer(file: &File) -> FileImporter {
    FileImporter::from_fd(file.try_clone().unwrap().into(), "the file").unwrap()
}

/// The reason against peer to peer; `None` if the path is peer to peer.
fn why_not(plan: &Plan) -> Option<ReasonCode> {
    let mut reasons = plan.reasons.iter();
    let against = reasons.find(|reason| reason.path == Path::PeerToPeer);
    assert_eq!(against.is_none(), plan.path == Path::PeerToPeer, "{plan}");
    against.map(|reason| reason.code)
}

fn peerbuf(cache: &tempfile::TempDir, arguments: &[&str]) -> (bool, Value) {
    let output = Command::new("peerbuf")
        .args(arguments)
        .arg("--json")
        .env("XDG_CACHE_HOME", cache.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    // `why` gives an object for each pair of functions.
    let objects = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
    let all: Result<Vec<Value>, _> = objects.collect();
    let all = all.unwrap_or_else(|error| panic!("{arguments:?}: {error}: {text}{said}"));
    (output.status.success(), Value::Array(all))
}

/// Whether the command says the same as the library: of several disks, that there are such.
fn check_command(card: &str, disks: usize) {
    let cache = &tempfile::tempdir().unwrap();
    let several = disks > 1;
    let (_, why) = peerbuf(cache, &["why", AT, card]);
    assert_eq!(why.as_array().unwrap().len(), disks, "{why}");
    assert_eq!(why.to_string().contains("several-disks"), several, "{why}");
    let (_, doctor) = peerbuf(cache, &["doctor"]);
    let mounts = doctor[0]["mounts"].as_array().unwrap();
    let mount = mounts.iter().find(|mount| mount["at"] == AT).unwrap();
    assert_eq!(
        mount.to_string().contains("several-disks"),
        several,
        "{mount}"
    );
    let (proved, proof) = peerbuf(cache, &["prove", AT, card]);
    assert_eq!(proved, !several, "{proof}");
    assert_eq!(
        proof.to_string().contains("several-disks"),
        several,
        "{proof}"
    );
    let kept = fs::read_dir(cache.path()).unwrap().count();
    assert_eq!(kept > 0, !several, "{proof}");
}

/// Whether the kernel reads from a block device into a card's memory.
fn passes_peers(volume: &FilePath) -> bool {
    let node = Node::largest();
    let (fd, _) = node.export(None, MIB).unwrap();
    let map = Map::new(fd.as_fd(), MIB as usize, true).unwrap();
    let volume = disk::open_direct(volume).unwrap();
    match disk::read_into(&volume, &map, 0, MIB as usize, 0) {
        Ok(read) => read as u64 == MIB,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EREMOTEIO), "{error}");
            false
        }
    }
}

#[test]
fn a_file_on_several_disks_is_staged_and_one_on_one_disk_is_proved() {
    let disks = Disks::new();
    let [first, second] = disks.members();
    let (one, other) = (first.display(), second.display());
    let striped = format!("0 {} striped 2 1024 {one} 0 {other} 0\\n", 2 * PART);
    type Make<'a> = &'a dyn Fn() -> Volume;
    let volumes: [(&str, &[&FilePath], Make<'_>); 4] = [
        ("plain", &[second], &|| Volume::disk(second)),
        ("linear", &[second], &|| {
            Volume::mapped(&format!("0 {PART} linear {other} 0\\n"))
        }),
        ("striped", &[first, second], &|| Volume::mapped(&striped)),
        ("raid0", &[first, second], &|| {
            Volume::raid("raid0", disks.members())
        }),
    ];
    let card = Node::largest().bdf;
    for (name, members, make) in volumes {
        let volume = make();
        let passes = passes_peers(&volume.node);
        eprintln!("{name}: passes peers' memory: {passes}");
        let _mounted = volume.mounted();
        let bytes = random();
        let file = file(AT, &bytes);
        let importer = importer(&file);
        let buffer = device_memory();
        for direction in BOTH {
            let count = || -> Vec<u64> { members.iter().map(|disk| sectors(disk)).collect() };
            let since = |before: &[u64]| -> Vec<u64> {
                count()
                    .iter()
                    .zip(before)
                    .map(|(now, then)| now - then)
                    .collect()
            };
            let before = count();
            let mut attachment = importer.attach(&buffer.whole()).unwrap();
            let plan = attachment.plan(direction, 0).unwrap();
            let proof = since(&before);
            let before = count();
            let receipt = match direction {
                Direction::DiskToBuffer => attachment.read(0).unwrap(),
                Direction::BufferToDisk => attachment.write(0).unwrap(),
            };
            let transfer = since(&before);
            let moved = format!(
                "{name}, {direction}: {proof:?} sectors during the plan, {transfer:?} during the transfer, {plan}"
            );
            eprintln!("{moved}");
            let why = match (members.len(), passes) {
                (1, true) => None,
                (1, false) => Some(ReasonCode::BlockLayer),
                _ => Some(ReasonCode::SeveralDisks),
            };
            assert_eq!(
                (why_not(&plan), why_not(&receipt.plan)),
                (why, why),
                "{moved}"
            );
            let tried = |moved: &u64| (*moved > 0) == (members.len() == 1);
            assert!(proof.iter().all(tried), "{moved}");
            assert!(transfer.iter().sum::<u64>() >= SIZE / 512, "{moved}");
            let mut found = vec![0; SIZE as usize];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(get(&buffer.whole()) == found && found == bytes, "{name}");
        }
        // By the layer, as far as Linux 7.3 was tried: md does, and mapped devices do not.
        assert_eq!(passes, ["plain", "raid0"].contains(&name), "{name}");
        if passes {
            check_command(&card, members.len());
        }
        drop((importer, file));
    }
}

#[test]
fn a_volume_that_grows_while_it_is_in_use_is_not_believed_to_be_one_disk() {
    let disks = Disks::new();
    let [first, second] = disks.members().map(FilePath::display);
    let mounted = Volume::mapped(&format!("0 {PART} linear {second} 0\\n")).mounted();
    let bytes = random();
    let file = file(AT, &bytes);
    let importer = importer(&file);
    let buffer = device_memory();
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    for direction in BOTH {
        let plan = attachment.plan(direction, 0).unwrap();
        assert_ne!(why_not(&plan), Some(ReasonCode::SeveralDisks), "{plan}");
    }
    run(&format!(
        "printf '0 {PART} linear {second} 0\\n{PART} {PART} linear {first} 0\\n' | dmsetup load volume && \
         dmsetup suspend volume && dmsetup resume --noudevsync volume && resize2fs {}",
        mounted.volume.node.display()
    ));
    for direction in BOTH {
        let receipt = match direction {
            Direction::DiskToBuffer => attachment.read(0).unwrap(),
            Direction::BufferToDisk => attachment.write(0).unwrap(),
        };
        let why = why_not(&receipt.plan);
        assert_eq!(why, Some(ReasonCode::SeveralDisks), "{}", receipt.plan);
    }
    assert!(get(&buffer.whole()) == bytes);
}

#[test]
fn a_file_whose_disk_the_kernel_does_not_tell_is_staged() {
    load("overlay");
    let disks = Disks::new();
    let _mounted = Volume::raid("raid0", disks.members()).mounted();
    run(&format!(
        "mkdir -p {AT}/lower {AT}/upper {AT}/work /mnt/overlay && mount -t overlay -o \
         lowerdir={AT}/lower,upperdir={AT}/upper,workdir={AT}/work,xino=on none /mnt/overlay"
    ));
    let _overlay = Afterwards("umount /mnt/overlay".into());
    let bytes = random();
    let file = file("/mnt/overlay", &bytes);
    let importer = importer(&file);
    let buffer = device_memory();
    for direction in BOTH {
        let mut attachment = importer.attach(&buffer.whole()).unwrap();
        let receipt = match direction {
            Direction::DiskToBuffer => attachment.read(0).unwrap(),
            Direction::BufferToDisk => attachment.write(0).unwrap(),
        };
        let why = why_not(&receipt.plan);
        assert_eq!(why, Some(ReasonCode::SeveralDisks), "{}", receipt.plan);
        let evidence = receipt.plan.reasons[0].evidence.as_str();
        assert!(evidence.contains("the overlay of the file"), "{evidence}");
    }
    assert!(get(&buffer.whole()) == bytes);
}

/// The page in docs.
const PAGE: &str = include_str!("../../../docs/stacks.md");

/// A path, and why it is no better one, as a cell of the table.
fn cell(receipt: &Receipt, best: Path, notes: &mut Vec<String>) -> String {
    let plan = &receipt.plan;
    if plan.path == best {
        return best.to_string();
    }
    let mut reasons = plan.reasons.iter();
    let reason = reasons.find(|reason| reason.path == best).unwrap();
    let known = notes.iter().position(|note| *note == reason.evidence);
    let number = known.unwrap_or_else(|| {
        notes.push(reason.evidence.clone());
        notes.len() - 1
    });
    format!("{}, {} [{}]", plan.path, reason.code, number + 1)
}

/// Reads a file of this stack into a card's memory, and into the host's; a line of the table.
fn line(stack: &str, file: &FilePath, notes: &mut Vec<String>) -> String {
    let bytes = random();
    fs::write(file, &bytes).unwrap();
    run("sync");
    let importer = FileImporter::open(file).unwrap();
    let memory = memfd::export("memory", SIZE).unwrap();
    let cells = [
        (device_memory(), Path::PeerToPeer),
        (memory, Path::SharedHostMemory),
    ];
    let cells = cells.map(|(buffer, best)| {
        let receipt = importer.attach(&buffer.whole()).unwrap().read(0).unwrap();
        assert!(get(&buffer.whole()) == bytes, "{stack}: {}", receipt.plan);
        cell(&receipt, best, notes)
    });
    format!("| {stack} | {} |", cells.join(" | "))
}

#[test]
fn the_docs_have_the_way_of_a_file_on_each_stack_as_it_is() {
    let disks = Disks::new();
    let [first, second] = disks.members();
    let (one, other) = (first.display(), second.display());
    let mapped = |target: &str| Volume::mapped(&format!("0 {PART} {target} 0\\n"));
    let key = "5e".repeat(32);
    type Make<'a> = Box<dyn Fn() -> Volume + 'a>;
    let disk = || -> Make<'_> { Box::new(|| Volume::disk(first)) };
    let stacks: [(&str, Make<'_>, &str, &str); 13] = [
        ("ext4", disk(), "ext4 -F", "defaults"),
        ("ext4, `data=journal`", disk(), "ext4 -F", "data=journal"),
        ("ext2", disk(), "ext2 -F", "defaults"),
        ("XFS", disk(), "xfs -f --unsupported", "defaults"),
        ("btrfs", disk(), "btrfs -f", "defaults"),
        ("btrfs, `nodatasum`", disk(), "btrfs -f", "nodatasum"),
        (
            "ext4 on a linear volume (LVM, device mapper)",
            Box::new(|| mapped(&format!("linear {other}"))),
            "ext4 -F",
            "defaults",
        ),
        (
            "ext4 on a striped volume of two disks",
            Box::new(|| {
                Volume::mapped(&format!(
                    "0 {} striped 2 1024 {one} 0 {other} 0\\n",
                    2 * PART
                ))
            }),
            "ext4 -F",
            "defaults",
        ),
        (
            "ext4 on an encrypted volume (dm-crypt)",
            Box::new(|| {
                load("dm-crypt");
                mapped(&format!("crypt aes-xts-plain64 {key} 0 {other}"))
            }),
            "ext4 -F",
            "defaults",
        ),
        (
            "ext4 on md, RAID 0",
            Box::new(|| Volume::raid("raid0", disks.members())),
            "ext4 -F",
            "defaults",
        ),
        (
            "ext4 on md, RAID 1",
            Box::new(|| Volume::raid("raid1", disks.members())),
            "ext4 -F",
            "defaults",
        ),
        (
            "ext4 on a loop device",
            Box::new(|| Volume::loop_device(first)),
            "ext4 -F",
            "defaults",
        ),
        (
            "ext4 on zram",
            Box::new(Volume::zram),
            "ext4 -F",
            "defaults",
        ),
    ];
    let (mut lines, mut notes) = (Vec::new(), Vec::new());
    for (name, make, filesystem, options) in stacks {
        let _mounted = make().mounted_as(filesystem, options);
        let file = FilePath::new(AT).join("file");
        lines.push(line(name, &file, &mut notes));
    }
    load("overlay");
    {
        let _mounted = Volume::disk(first).mounted();
        run(&format!(
            "mkdir -p {AT}/lower {AT}/upper {AT}/work /mnt/overlay && mount -t overlay -o \
             lowerdir={AT}/lower,upperdir={AT}/upper,workdir={AT}/work none /mnt/overlay"
        ));
        let _overlay = Afterwards("umount /mnt/overlay".into());
        let file = FilePath::new("/mnt/overlay/file");
        lines.push(line("an overlay of ext4", file, &mut notes));
    }
    {
        run("mkdir -p /mnt/tmpfs && mount -t tmpfs none /mnt/tmpfs");
        let _tmpfs = Afterwards("umount /mnt/tmpfs".into());
        let file = FilePath::new("/mnt/tmpfs/file");
        lines.push(line("tmpfs", file, &mut notes));
    }
    let notes = notes.iter().enumerate();
    let notes = notes.map(|(number, note)| format!("- [{}] {note}", number + 1));
    let table = [lines, notes.collect()].map(|lines| lines.join("\n"));
    let all = table.join("\n\n");
    assert!(
        PAGE.contains(&all),
        "docs/stacks.md is not true any more. Its table is to be:\n{all}"
    );
}
