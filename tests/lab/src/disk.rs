//! The guest's NVMe disk: its raw scratch namespace, and ways to slow it down and to take it away.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::clock::Stopwatch;
use crate::machine::{Machine, device};
use crate::node::{Map, nvme_bdf};
use crate::pci::wait_until;

/// The second namespace of the NVMe disk, whose contents no one needs.
pub const SCRATCH: &str = "/dev/nvme0n2";

/// Opens a file or disk for direct I/O.
///
/// # Errors
///
/// The error of `open`.
pub fn open_direct(path: impl AsRef<Path>) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

/// `pread` into a mapping; returns the count.
///
/// # Errors
///
/// The kernel's error.
pub fn read_into(file: &File, map: &Map, at: usize, len: usize, offset: i64) -> io::Result<usize> {
    assert!(at + len <= map.len);
    // SAFETY: The range lies in the mapping, by the check.
    let n = unsafe { libc::pread(file.as_raw_fd(), map.as_ptr().byte_add(at), len, offset) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `pwrite` from a mapping; returns the count.
///
/// # Errors
///
/// The kernel's error.
pub fn write_from(file: &File, map: &Map, at: usize, len: usize, offset: i64) -> io::Result<usize> {
    assert!(at + len <= map.len);
    // SAFETY: The range lies in the mapping, by the check.
    let n = unsafe { libc::pwrite(file.as_raw_fd(), map.as_ptr().byte_add(at), len, offset) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Waits until [`SCRATCH`] is reading, and until the rest of the request's pages are pinned, which takes an
/// unknown time on a busy host.
///
/// # Panics
///
/// If the kernel does not report it, or nothing is read.
pub fn await_reading() {
    let reads = || {
        let text = fs::read_to_string("/sys/block/nvme0n2/inflight").unwrap();
        text.split_whitespace().next() != Some("0")
    };
    wait_until("the disk reads", reads);
    thread::sleep(Duration::from_millis(200));
}

/// Limits the rate of the disk behind [`SCRATCH`] while it lives: the disk keeps submitted requests waiting,
/// and with them their pages.
///
/// (The block layer's own limit, `io.max`, would work, but setting it sometimes triggers a
/// lockdep report: Linux 7.2 allocates with `blkcg_mutex` held.)
pub struct Slow(());

/// The lab's name of the scratch disk.
const ID: &str = "scratch-disk";

impl Slow {
    /// Limits the disk to `rate` bytes a second, with bursts of a tenth of that.
    ///
    /// # Panics
    ///
    /// As [`Machine::new`], also if another process requests events at the time.
    pub fn new(rate: u64) -> Self {
        Machine::new().slow(ID, rate).expect("a slow disk");
        Self(())
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        Machine::new().slow(ID, 0).expect("a quick disk");
    }
}

/// The disk without its mounted filesystem, so that it can go away. Dropping it brings the disk back and mounts
/// the filesystem again.
pub struct Unmounted {
    /// Its PCI address.
    pub bdf: String,
}

impl Unmounted {
    /// Unmounts the filesystem.
    ///
    /// # Panics
    ///
    /// If it is in use.
    #[expect(clippy::new_without_default, reason = "it is no value")]
    pub fn new() -> Self {
        let done = Command::new("umount").arg("/mnt/nvme").status().unwrap();
        assert!(done.success(), "umount /mnt/nvme");
        Self { bdf: nvme_bdf() }
    }

    /// Takes the disk from its driver.
    ///
    /// # Panics
    ///
    /// If the driver has no such disk.
    pub fn unbind(&self) {
        fs::write("/sys/bus/pci/drivers/nvme/unbind", &self.bdf).unwrap();
    }

    /// Brings the disk back, with its namespaces in the old order.
    ///
    /// # Panics
    ///
    /// If it does not come back.
    pub fn bind(&self) {
        loop {
            match device(&self.bdf).exists() {
                true => fs::write("/sys/bus/pci/drivers/nvme/bind", &self.bdf).unwrap(),
                false => fs::write("/sys/bus/pci/rescan", "1").unwrap(),
            }
            let start = Stopwatch::start();
            while !(Path::new("/dev/nvme0n1").exists() && Path::new(SCRATCH).exists()) {
                assert!(start.elapsed() < Duration::from_secs(60), "no disk");
                thread::sleep(Duration::from_millis(20));
            }
            // The kernel scans both namespaces at once and numbers them in the order of completion. The
            // scratch disk's name must not go to the namespace with the filesystem.
            let namespace = fs::read_to_string("/sys/block/nvme0n1/nsid").unwrap();
            if namespace.trim() == "1" {
                break;
            }
            self.unbind();
        }
    }
}

impl Drop for Unmounted {
    fn drop(&mut self) {
        if !Path::new("/sys/bus/pci/drivers/nvme")
            .join(&self.bdf)
            .exists()
        {
            self.bind();
        }
        let mount = ["-t", "ext4", "/dev/nvme0n1", "/mnt/nvme"];
        let mounted = Command::new("mount").args(mount).status().unwrap();
        assert!(mounted.success(), "mount /mnt/nvme");
    }
}
