//! The guest's raw scratch disk, and a way to slow it down.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::machine::Machine;
use crate::node::Map;
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
