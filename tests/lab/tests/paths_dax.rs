//! Files in persistent memory, which a part of the guest's memory stands in for (`memmap=`): the processor moves their
//! bytes, with direct access (DAX) or without, and no plan says otherwise. Runs in the guest.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path as FilePath;
use std::process::Command;

use peerbuf::import::file::FileImporter;
use peerbuf::plan::{Direction, Path, ReasonCode};
use peerbuf_lab_suite::bytes::get;
use peerbuf_lab_suite::modules::load;
use peerbuf_lab_suite::node::Node;
use peerbuf_lab_suite::pci::wait_until;
use peerbuf_lab_suite::transfer::{bar, device, importer, random};

const MIB: u64 = 1 << 20;
const DISK: &str = "/dev/pmem0";
const AT: &str = "/mnt/pmem";

/// A mounted filesystem on the persistent memory.
struct Mounted;

impl Mounted {
    fn new(option: &str) -> Mounted {
        load("nd_e820");
        load("nd_pmem");
        wait_until("persistent memory", || FilePath::new(DISK).exists());
        let line = format!(
            "mkfs.ext4 -q -F -b 4096 {DISK} && mkdir -p {AT} && mount -o {option} {DISK} {AT}"
        );
        let done = Command::new("sh").args(["-c", &line]).status().unwrap();
        assert!(done.success(), "{line}");
        Mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(AT).status();
    }
}

/// Reads a file into a BAR and writes it back, by the processor, with this reason against peer to peer.
fn goes_by_the_processor(option: &str, code: ReasonCode, said: &str) {
    let _mounted = Mounted::new(option);
    let path = format!("{AT}/file");
    let bytes = random(MIB);
    fs::write(&path, &bytes).unwrap();
    let buffer = bar(&device(&Node::largest()), MIB);
    let mut attachment = FileImporter::open(&path)
        .unwrap()
        .attach(&buffer.whole())
        .unwrap();
    for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
        let plan = attachment.plan(direction, 0).unwrap();
        assert_eq!(
            (plan.path, plan.reasons[0].code),
            (Path::StagedCopy, code),
            "{plan}"
        );
        assert!(plan.reasons[0].evidence.contains(said), "{plan}");
    }
    let receipt = attachment.read(0).unwrap();
    assert_eq!((receipt.bytes, receipt.host_bytes), (MIB, MIB));
    assert!(get(&buffer.whole()) == bytes);
    let mut options = OpenOptions::new();
    let back = options.read(true).write(true).create_new(true);
    let back = back.open(format!("{AT}/back")).unwrap();
    let receipt = importer(&back)
        .attach(&buffer.whole())
        .unwrap()
        .write(0)
        .unwrap();
    assert_eq!((receipt.bytes, receipt.host_bytes), (MIB, MIB));
    let mut found = vec![0; MIB as usize];
    back.read_exact_at(&mut found, 0).unwrap();
    assert!(found == bytes);
}

#[test]
fn a_file_with_direct_access_is_copied_by_the_processor_and_the_plan_says_so() {
    goes_by_the_processor("dax=always", ReasonCode::NoDirectIo, "(DAX)");
}

#[test]
fn persistent_memory_without_direct_access_is_the_layer_that_refuses() {
    goes_by_the_processor("dax=never", ReasonCode::BlockLayer, "pmem0");
}
