//! What goes wrong in the middle of a transfer, through the crate: an error that names the cause and the place, and
//! says truly what has arrived. Runs in the guest.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use peerbuf::Access;
use peerbuf::error::TransferError;
use peerbuf::export::udmabuf;
use peerbuf::import::file::FileImporter;
use peerbuf::plan::Direction;
use peerbuf::transfer::Piece;
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::node::MIB;
use peerbuf_lab_suite::pci::wait_until;
use peerbuf_lab_suite::transfer::random;

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
