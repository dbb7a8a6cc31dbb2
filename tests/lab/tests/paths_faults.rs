//! What goes wrong in the middle of a transfer, through the crate: each is an error that names the cause and the
//! place, and says truly what has arrived; a second transfer goes on from there. Runs in the guest.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use peerbuf::error::TransferError;
use peerbuf::export::udmabuf;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::plan::Direction;
use peerbuf::transfer::{Piece, Queue, Receipt, Watch};
use peerbuf::{Access, Buffer};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::disk::{SCRATCH, Slow};
use peerbuf_lab_suite::machine;
use peerbuf_lab_suite::modules::load;
use peerbuf_lab_suite::node::{MIB, Node};
use peerbuf_lab_suite::pci::wait_until;
use peerbuf_lab_suite::transfer::{
    BOTH, LARGE, PIECE, bar, cross, crossed, device, fill, first, importer, in_the_middle, random,
    transfer,
};

const NVME: &str = "/mnt/nvme";

fn run(command: &str) -> String {
    let done = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(done.status.success(), "{command}: {done:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// Runs a command when dropped.
struct Afterwards(String);

impl Drop for Afterwards {
    fn drop(&mut self) {
        let _ = Command::new("sh").args(["-c", &self.0]).status();
    }
}

/// A filesystem on a disk, as long as this lives.
fn mounted(disk: &str, at: &str) -> Afterwards {
    run(&format!("mkdir -p {at} && mount -t ext4 {disk} {at}"));
    Afterwards(format!("umount {at}"))
}

/// Memory of a card, and memory of the host.
fn buffers() -> [Buffer; 2] {
    let card = bar(&device(&Node::largest()), LARGE);
    [card, udmabuf::export("memory", LARGE).unwrap()]
}

/// A transfer that stopped: what was told.
struct Stop {
    errno: &'static str,
    call: &'static str,
    object: String,
    /// Where in the file.
    offset: u64,
    length: u64,
    arrived: u64,
    prefix: u64,
}

fn stop(result: Result<Receipt, TransferError>) -> Stop {
    let error = result.unwrap_err();
    let TransferError::Stopped {
        cause,
        offset,
        length,
        arrived,
        wanted,
        prefix,
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(*wanted, LARGE, "{error}");
    assert!(prefix <= arrived && arrived < wanted, "{error}");
    Stop {
        errno: cause.errno.name().unwrap(),
        call: cause.call,
        object: cause.object.clone(),
        offset: *offset,
        length: *length,
        arrived: *arrived,
        prefix: *prefix,
    }
}

/// The call of an ordinary transfer.
fn call(direction: Direction) -> &'static str {
    match direction {
        Direction::DiskToBuffer => "pread",
        Direction::BufferToDisk => "pwrite",
    }
}

/// A buffer, a file, and the bytes that go from one to the other by a [`crossed`] transfer.
struct Both<'a> {
    buffer: &'a Buffer,
    file: &'a File,
    direction: Direction,
    /// The bytes in the order in which they are to arrive, which is that of the file.
    wanted: Vec<u8>,
}

impl<'a> Both<'a> {
    fn new(buffer: &'a Buffer, file: &'a File, direction: Direction) -> Both<'a> {
        let (held, on_disk) = (random(LARGE), random(LARGE));
        put(&buffer.whole(), &held);
        fill(file, &on_disk);
        let wanted = match direction {
            Direction::DiskToBuffer => on_disk,
            Direction::BufferToDisk => cross(&held),
        };
        Both {
            buffer,
            file,
            direction,
            wanted,
        }
    }

    /// So many bytes have arrived.
    fn assert_arrived(&self, prefix: u64) {
        let target = match self.direction {
            Direction::DiskToBuffer => cross(&get(&self.buffer.whole())),
            Direction::BufferToDisk => first(self.file, prefix).unwrap(),
        };
        let prefix = prefix as usize;
        let as_wanted = target[..prefix] == self.wanted[..prefix];
        assert!(as_wanted, "{}, {prefix} bytes", self.direction);
    }

    /// Carries what comes after the first `prefix` bytes.
    fn go_on(&self, importer: &FileImporter, prefix: u64) {
        let (rest, watch) = (crossed(prefix), Watch::default());
        let receipt = transfer(importer, self.buffer, self.direction, &rest, &watch).unwrap();
        assert_eq!(
            (receipt.bytes, watch.bytes()),
            (LARGE - prefix, LARGE - prefix)
        );
        self.assert_arrived(LARGE);
    }
}

/// A device mapper's disk over the scratch disk, of which 4 KiB can be made bad.
struct Mapped {
    node: String,
    _remove: Afterwards,
}

impl Mapped {
    /// In sectors.
    const LENGTH: u64 = 65536;

    fn new() -> Mapped {
        load("dm-mod");
        let length = Mapped::LENGTH;
        run(&format!(
            "echo '0 {length} linear {SCRATCH} 0' | dmsetup create --noudevsync faulty"
        ));
        let remove = Afterwards("dmsetup remove --noudevsync faulty".into());
        let names = "grep -lx faulty /sys/class/block/dm-*/dm/name";
        let node = format!("/dev/{}", run(names).split('/').nth(4).unwrap());
        Mapped {
            node,
            _remove: remove,
        }
    }

    fn load(&self, table: &str) {
        run(&format!(
            "dmsetup suspend --noudevsync faulty && printf '{table}' | dmsetup load faulty && \
             dmsetup resume --noudevsync faulty"
        ));
    }

    /// Makes these 4 KiB bad, in sectors.
    fn spoil(&self, at: u64) {
        let (length, after) = (Mapped::LENGTH, at + 8);
        self.load(&format!(
            "0 {at} linear {SCRATCH} 0\\n{at} 8 error\\n{after} {} linear {SCRATCH} {after}\\n",
            length - after
        ));
    }

    fn mend(&self) {
        self.load(&format!("0 {} linear {SCRATCH} 0\\n", Mapped::LENGTH));
    }
}

#[test]
fn a_bad_place_in_the_middle_of_a_file_is_told_and_the_rest_follows_when_it_is_mended() {
    const BAD: u64 = 2 * MIB + 8192;
    let disk = Mapped::new();
    run(&format!("mkfs.ext4 -q -F -b 4096 {}", disk.node));
    let _mount = mounted(&disk.node, "/mnt/faulty");
    let file = File::create_new("/mnt/faulty/file").unwrap();
    let importer = FileImporter::open_for("/mnt/faulty/file", Access::ReadWrite).unwrap();
    for buffer in buffers() {
        for direction in BOTH {
            let both = Both::new(&buffer, &file, direction);
            let block = run(&format!(
                "debugfs -R 'bmap /file {}' {} 2>/dev/null",
                BAD / 4096,
                disk.node
            ));
            let mut attachment = importer.attach(&buffer.whole()).unwrap();
            attachment.plan(direction, 0).unwrap();
            disk.spoil(block.trim().parse::<u64>().unwrap() * 8);
            let watch = Watch::default();
            let failed = transfer(&importer, &buffer, direction, &crossed(0), &watch);
            let stop = stop(failed);
            disk.mend();
            assert_eq!((stop.errno, stop.call), ("EIO", call(direction)));
            assert!(stop.object.contains("/mnt/faulty/file"), "{}", stop.object);
            let bad = stop.offset..stop.offset + stop.length;
            assert!(bad.contains(&BAD) && stop.length <= PIECE, "{bad:?}");
            assert!(stop.prefix <= BAD / PIECE * PIECE, "{}", stop.prefix);
            assert_eq!(watch.bytes(), stop.arrived);
            both.assert_arrived(stop.prefix);
            both.go_on(&importer, stop.prefix);
        }
    }
}

#[test]
fn a_full_filesystem_is_told_and_the_rest_follows_when_there_is_room() {
    run(&format!(
        "mkfs.ext4 -q -F -b 4096 -O ^has_journal {SCRATCH} 8M"
    ));
    let _mount = mounted(SCRATCH, "/mnt/full");
    for buffer in buffers() {
        let direction = Direction::BufferToDisk;
        fill(&File::create("/mnt/full/other").unwrap(), &random(LARGE));
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.open("/mnt/full/file").unwrap();
        let held = random(LARGE);
        put(&buffer.whole(), &held);
        let both = Both {
            buffer: &buffer,
            file: &file,
            direction,
            wanted: cross(&held),
        };
        let importer = FileImporter::open_for("/mnt/full/file", Access::ReadWrite).unwrap();
        let watch = Watch::default();
        let stop = stop(transfer(&importer, &buffer, direction, &crossed(0), &watch));
        assert_eq!((stop.errno, stop.call), ("ENOSPC", "pwrite"));
        assert!(stop.object.contains("/mnt/full/file"), "{}", stop.object);
        assert_eq!(watch.bytes(), stop.arrived);
        assert!(stop.arrived > 0);
        both.assert_arrived(stop.prefix);
        fs::remove_file("/mnt/full/other").unwrap();
        both.go_on(&importer, stop.prefix);
        fs::remove_file("/mnt/full/file").unwrap();
    }
}

#[test]
fn a_file_that_shrinks_in_mid_transfer_ends_where_it_ends_now() {
    // Within a block.
    const LEFT: u64 = MIB + 1000;
    let file = unnamed_file(Path::new(NVME)).unwrap();
    let importer = importer(&file);
    for buffer in buffers() {
        let mut tries = 0..100;
        let (both, read) = loop {
            tries.next().expect("an end in mid-transfer");
            let both = Both::new(&buffer, &file, Direction::DiskToBuffer);
            let (result, ()) = in_the_middle(&importer, &buffer, Direction::DiskToBuffer, || {
                file.set_len(LEFT).unwrap();
            });
            match result {
                Err(TransferError::ShortRead {
                    object,
                    read,
                    wanted,
                }) => {
                    assert_eq!((object.as_str(), wanted), ("the file", LARGE));
                    break (both, read);
                }
                other => assert_eq!(other.unwrap().bytes, LARGE),
            }
        };
        // What was read before the end moved has arrived, too.
        assert!((LEFT..LARGE).contains(&read), "{read}");
        both.assert_arrived(read);
        // The same by a transfer that may be shorter: it says so.
        let (held, on_disk) = (random(LARGE), random(LARGE));
        put(&buffer.whole(), &held);
        fill(&file, &on_disk);
        file.set_len(LEFT).unwrap();
        let receipt = importer.attach(&buffer.whole()).unwrap().read(0).unwrap();
        assert_eq!(receipt.bytes, LEFT);
        let (now, left) = (get(&buffer.whole()), LEFT as usize);
        assert!(now[..left] == on_disk[..left] && now[left..] == held[left..]);
    }
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn signals_in_mid_transfer_interrupt_calls_and_no_byte_is_lost() {
    const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";
    let handler: extern "C" fn(libc::c_int) = count;
    // Not SA_RESTART: calls that wait end with EINTR.
    // SAFETY: zeros are a valid action: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // SAFETY: the handler only counts.
    let set = unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    let _quick = Afterwards(format!("echo 0 > {SWITCH}"));
    let disk = File::options()
        .read(true)
        .write(true)
        .open(SCRATCH)
        .unwrap();
    for (forbidden, depth) in [("0", 32), ("0", 1), ("2", 32)] {
        for buffer in buffers() {
            for direction in BOTH {
                let both = Both::new(&buffer, &disk, direction);
                fs::write(SWITCH, forbidden).unwrap();
                let importer = FileImporter::open_for(SCRATCH, Access::ReadWrite).unwrap();
                let importer = importer.with_depth(depth);
                let importer = importer.with_scratch_range(8 * MIB..9 * MIB);
                let mut attachment = importer.attach(&buffer.whole()).unwrap();
                attachment.plan(direction, 0).unwrap();
                let _slow = Slow::new(8 * MIB);
                let before = SIGNALS.load(Ordering::Relaxed);
                let receipt = thread::scope(|scope| {
                    let (me, thread) = mpsc::channel();
                    let (importer, buffer) = (&importer, &buffer);
                    let carried = scope.spawn(move || {
                        // SAFETY: it has no conditions.
                        me.send(unsafe { libc::pthread_self() }).unwrap();
                        let watch = Watch::default();
                        transfer(importer, buffer, direction, &crossed(0), &watch)
                    });
                    let thread = thread.recv().unwrap();
                    while !carried.is_finished() {
                        // SAFETY: the thread was not joined.
                        unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                        thread::sleep(Duration::from_micros(300));
                    }
                    carried.join().unwrap().unwrap()
                });
                let signals = SIGNALS.load(Ordering::Relaxed) - before;
                let what = format!("{direction}, {forbidden}, {depth}: {}", receipt.plan);
                assert!(signals > 10, "{signals} signals: {what}");
                assert_eq!((receipt.bytes, receipt.copied), (LARGE, 0), "{what}");
                match (forbidden, depth) {
                    (_, 1) => assert_eq!(receipt.queue, Queue::Calls, "{what}"),
                    ("0", _) => assert_eq!(receipt.queue, Queue::IoUring, "{what}"),
                    _ => assert!(matches!(receipt.queue, Queue::Threads { .. }), "{what}"),
                }
                both.assert_arrived(LARGE);
            }
        }
    }
}

#[test]
fn a_card_that_is_unbound_in_mid_transfer_is_an_error_and_not_a_signal() {
    let node = Node::largest();
    let bdf = node.bdf.clone();
    for direction in BOTH {
        let file = unnamed_file(Path::new(NVME)).unwrap();
        let importer = importer(&file);
        let mut tries = 0..100;
        let (stop, wanted, buffer) = loop {
            tries.next().expect("an unbinding in mid-transfer");
            let buffer = bar(&device(&Node::largest()), LARGE);
            let both = Both::new(&buffer, &file, direction);
            let (result, ()) = in_the_middle(&importer, &buffer, direction, || Node::unbind(&bdf));
            machine::give_to_peerbuf(&bdf);
            let wanted = both.wanted;
            match result {
                Err(error) => break (stop(Err(error)), wanted, buffer),
                Ok(receipt) => assert_eq!(receipt.bytes, LARGE),
            }
        };
        assert_eq!(stop.errno, "ENODEV");
        assert!(
            stop.object.contains("unbound or removed"),
            "{}",
            stop.object
        );
        assert_eq!(stop.offset, stop.prefix);
        if direction == Direction::BufferToDisk {
            let prefix = stop.prefix as usize;
            assert!(first(&file, LARGE).unwrap()[..prefix] == wanted[..prefix]);
        }
        drop(buffer);
    }
}

/// A disk in memory of 16 MiB, on which the 4 KiB from `bad` can be neither read nor written.
struct Faulty(&'static Path);

impl Faulty {
    fn new(bad: u64) -> Faulty {
        let loaded = Command::new("modprobe")
            .args(["null_blk", "nr_devices=0"])
            .status();
        assert!(loaded.unwrap().success(), "modprobe null_blk");
        if !Path::new("/sys/kernel/config/nullb").exists() {
            let mounted = Command::new("mount")
                .args(["-t", "configfs", "none", "/sys/kernel/config"])
                .status();
            assert!(mounted.unwrap().success(), "mount configfs");
        }
        let disk = Path::new("/sys/kernel/config/nullb/nullb7");
        fs::create_dir(disk).unwrap();
        let sector = bad / 512;
        for (name, value) in [
            ("size", "16"),
            ("blocksize", "512"),
            ("memory_backed", "1"),
            ("badblocks", &format!("+{sector}-{}", sector + 7)),
            ("power", "1"),
        ] {
            fs::write(disk.join(name), value).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        wait_until("the disk is there", || Path::new(Faulty::NODE).exists());
        Faulty(disk)
    }

    const NODE: &str = "/dev/nullb7";
}

impl Drop for Faulty {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.0);
    }
}

#[test]
fn a_fault_of_the_disk_is_told_with_its_place_and_what_arrived() {
    const BAD: u64 = 5 * MIB + 8192;
    const PIECE: u64 = 64 << 10;
    let _faulty = Faulty::new(BAD);
    let disk = FileImporter::open_for(Faulty::NODE, Access::ReadWrite).unwrap();
    let buffer = udmabuf::export("memory", 8 * MIB).unwrap();
    let bytes = random(8 * MIB);
    put(&buffer.whole(), &bytes);
    let pieces: Vec<Piece> = (0..8 * MIB / PIECE)
        .map(|index| Piece {
            file_offset: index * PIECE,
            // In the buffer in reverse order, so that no piece follows another.
            offset: 8 * MIB - (index + 1) * PIECE,
            length: PIECE,
        })
        .collect();
    for direction in [Direction::BufferToDisk, Direction::DiskToBuffer] {
        if direction == Direction::DiskToBuffer {
            put(&buffer.whole(), &vec![0; 8 * MIB as usize]);
        }
        let mut attachment = disk.attach(&buffer.whole()).unwrap();
        let error = match direction {
            Direction::BufferToDisk => attachment.write_many(&pieces),
            Direction::DiskToBuffer => attachment.read_many(&pieces),
        };
        let error = error.unwrap_err();
        let TransferError::Stopped {
            cause,
            offset,
            length,
            arrived,
            wanted,
            prefix,
        } = &error
        else {
            panic!("{direction}: {error}");
        };
        assert_eq!(cause.errno.name(), Some("EIO"), "{error}");
        assert!((*offset..offset + length).contains(&BAD), "{error}");
        assert!(
            *prefix <= BAD / PIECE * PIECE && prefix <= arrived && arrived < wanted,
            "{error}"
        );
        assert_eq!(*wanted, 8 * MIB);
        // The CPU's own reads match the bytes reported as arrived.
        let at = (8 * MIB - prefix) as usize;
        assert!(get(&buffer.whole())[at..] == bytes[at..], "{direction}");
        let mut first = vec![0; PIECE as usize];
        File::open(Faulty::NODE)
            .unwrap()
            .read_exact_at(&mut first, 0)
            .unwrap();
        assert!(
            *prefix == 0 || first == bytes[(8 * MIB - PIECE) as usize..],
            "{direction}"
        );
    }
}
