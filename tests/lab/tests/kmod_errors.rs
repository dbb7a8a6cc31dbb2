//! Events of a bound device: recovery from an error that the port above reports (injected by
//! the kernel's `aer_inject`), and suspend. Runs in the guest, on the stock kernel: the debug
//! kernel has neither AER nor suspend.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;

use peerbuf::topology::PciAddress;
use peerbuf_lab_suite::disk::{self, SCRATCH};
use peerbuf_lab_suite::importer::{self, DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::machine;
use peerbuf_lab_suite::node::{MIB, Map, Node, assert_all_free, errno, nvme_bdf};
use peerbuf_lab_suite::pci::wait_until;
use peerbuf_uapi::{self as abi, probe};

/// `PCI_ERR_UNC_*`, with their default severity.
const FATAL: u32 = 1 << 4; // Data Link Protocol Error
const NON_FATAL: u32 = 1 << 15; // Completer Abort

/// The upstream port of the switch above the device.
fn upstream_port(bdf: &str) -> PathBuf {
    let path = fs::canonicalize(machine::device(bdf)).unwrap();
    path.parent().unwrap().parent().unwrap().to_owned()
}

/// Makes a device report an error (`struct aer_error_inj` of `drivers/pci/pcie/aer_inject.c`).
fn inject(bdf: &str, status: u32) {
    let address: PciAddress = bdf.parse().unwrap();
    let mut error = [0; 32];
    error[..3].copy_from_slice(&[address.bus, address.device, address.function]);
    error[4..8].copy_from_slice(&status.to_ne_bytes());
    error[28..].copy_from_slice(&address.domain.to_ne_bytes());
    let node = OpenOptions::new().write(true).open("/dev/aer_inject");
    node.unwrap().write_all(&error).unwrap();
}

#[test]
fn an_error_revokes_and_a_recovered_device_has_a_new_generation() {
    let done = Command::new("modprobe").arg("aer_inject").status().unwrap();
    assert!(done.success());
    let node = Node::largest();
    let port = upstream_port(&node.bdf);
    let port = port.file_name().unwrap().to_str().unwrap();
    let (fd, _) = node.export(None, 2 * MIB).unwrap();
    let (kept, _) = node.export(None, MIB).unwrap();
    node.revoke(&kept, 100).unwrap();
    let seen = Map::new(fd.as_fd(), 2 << 20, true).unwrap();
    let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    let mut generation = 1;
    for (n, status) in [NON_FATAL, FATAL, FATAL].into_iter().enumerate() {
        let n = n as u32;
        seen.write(0, u64::from(n) + 1);
        assert_eq!(importer.map().unwrap().bus, 2 * MIB);
        inject(port, status);
        generation += 2;
        // Until the error is reported, the buffer is live and has the old generation.
        wait_until("the device has recovered", || {
            let now = node.buffer(&fd).unwrap();
            now.state == abi::STATE_LIVE && now.generation == generation
        });
        let state = importer.state();
        assert_eq!((state.invalidations, state.mapped), (n + 1, 0), "{state:?}");
        // The CPU and the disk reach the memory again. QEMU keeps its bytes.
        assert_eq!(seen.read(0), u64::from(n) + 1);
        wait_until("the disk has recovered", || {
            disk::open_direct(SCRATCH).is_ok()
        });
        let disk = disk::open_direct(SCRATCH).unwrap();
        assert_eq!(
            disk::read_into(&disk, &seen, 0, 2 << 20, 0).unwrap(),
            2 << 20
        );
        // A buffer that its owner had revoked stays revoked.
        let now = node.buffer(&kept).unwrap();
        assert_eq!(now.state, abi::STATE_REVOKED);
        assert_eq!(now.reasons, abi::REASON_OWNER, "the error is over");
        let command = fs::read(machine::device(&node.bdf).join("config")).unwrap()[4];
        assert_eq!(command & 0b110, 0b010, "memory decoding, no bus mastering");
        wait_until("new exports are taken", || match node.export(None, MIB) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(errno(Err::<(), _>(error)), libc::EAGAIN);
                false
            }
        });
    }
    node.restore(&kept).unwrap();
    drop((importer, seen, fd, kept));
    assert_all_free(&node);
}

/// Starts two suspends of the system, with an importer on one card that does not unmap, so that
/// this card refuses. Returns whether the other card was asleep at that time, which is so if
/// the kernel found it later.
fn refused_suspend(state: &str, sleeps: &Node, refuses: &Node) -> bool {
    let (fd, _) = sleeps.export(None, MIB).unwrap();
    let (kept, _) = sleeps.export(None, MIB).unwrap();
    sleeps.revoke(&kept, 100).unwrap();
    let seen = Map::new(fd.as_fd(), 1 << 20, true).unwrap();
    let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
    let (held, _) = refuses.export(None, MIB).unwrap();
    let mut holder = importer::request(held.as_fd(), &nvme_bdf(), DYNAMIC | PEER);
    holder.on_invalidate = probe::ON_INVALIDATE_HOLD;
    holder.hold_ms = probe::MAX_MS;
    let holder = Importer::attach_as(holder).unwrap();
    holder.map().unwrap();

    let mut slept = false;
    for n in 1..=2 {
        seen.write(0, u64::from(n));
        importer.map().unwrap();
        assert_eq!(errno(fs::write("/sys/power/state", state)), libc::EBUSY);
        let now = |node: &Node, fd| {
            let now = node.buffer(fd).unwrap();
            assert_eq!(now.state, abi::STATE_LIVE, "{}", node.bdf);
            now.generation
        };
        assert_eq!(now(refuses, &held), 1 + 2 * u64::from(n));
        let (generation, state) = (now(sleeps, &fd), importer.state());
        slept = generation != 1;
        if slept {
            assert_eq!(generation, 1 + 2 * u64::from(n));
            assert_eq!((state.invalidations, state.mapped), (n, 0), "{state:?}");
        } else {
            assert_eq!((state.invalidations, state.mapped), (0, 1), "{state:?}");
            importer.unmap();
        }
        assert_eq!(seen.read(0), u64::from(n));
        assert_eq!(sleeps.buffer(&kept).unwrap().state, abi::STATE_REVOKED);
        drop(sleeps.export(None, MIB).unwrap());
    }
    assert_eq!(holder.state().mapped, 1);
    sleeps.restore(&kept).unwrap();
    drop((importer, holder, seen, fd, kept, held));
    assert_all_free(sleeps);
    wait_until("the holder lets go", || refuses.bar2().exports == 0);
    slept
}

/// The guest's root is on a virtio device that does not survive a suspend, so each suspend here
/// must fail before it reaches that device. The kernel suspends the device found last first,
/// and one card refuses.
#[test]
fn a_suspend_revokes_or_is_refused_and_gives_access_again() {
    sleeps("freeze");
}

/// As a suspend: the devices are frozen before the image of memory is made.
#[test]
fn a_hibernation_revokes_or_is_refused_and_gives_access_again() {
    sleeps("disk");
}

fn sleeps(state: &str) {
    fs::write("/sys/power/pm_async", "0").unwrap();
    fs::write("/sys/power/pm_test", "devices").unwrap();
    let mut nodes = Node::all();
    nodes.retain(|node| node.bar2().size >= 4 * MIB);
    let [one, other] = &nodes[..] else {
        panic!("{} cards of 4 MiB", nodes.len());
    };
    // The order of discovery depends on earlier unplugs.
    let slept = [[one, other], [other, one]].map(|[one, other]| refused_suspend(state, one, other));
    assert_eq!(slept.iter().filter(|slept| **slept).count(), 1, "{slept:?}");
}
