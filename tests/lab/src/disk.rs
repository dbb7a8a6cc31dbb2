//! The raw scratch disk of the guest, and ways to make it slow.

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

/// The second namespace of the NVMe disk: nothing is on it that somebody needs.
pub const SCRATCH: &str = "/dev/nvme0n2";

/// Opens a file or disk for direct I/O.
///
/// # Errors
///
/// What `open` answers.
pub fn open_direct(path: impl AsRef<Path>) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

/// `pread` into a mapping; the count.
///
/// # Errors
///
/// What the kernel answers.
pub fn read_into(file: &File, map: &Map, at: usize, len: usize, offset: i64) -> io::Result<usize> {
    assert!(at + len <= map.len);
    // SAFETY: The range lies in the mapping, by the check.
    let n = unsafe { libc::pread(file.as_raw_fd(), map.as_ptr().byte_add(at), len, offset) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `pwrite` from a mapping; the count.
///
/// # Errors
///
/// What the kernel answers.
pub fn write_from(file: &File, map: &Map, at: usize, len: usize, offset: i64) -> io::Result<usize> {
    assert!(at + len <= map.len);
    // SAFETY: The range lies in the mapping, by the check.
    let n = unsafe { libc::pwrite(file.as_raw_fd(), map.as_ptr().byte_add(at), len, offset) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Waits until [`SCRATCH`] is reading, and then for the rest of the request's pages to be taken, which on a
/// busy host is no matter of a fixed time.
///
/// # Panics
///
/// When the kernel does not tell, or nothing is read.
pub fn await_reading() {
    let reads = || {
        let text = fs::read_to_string("/sys/block/nvme0n2/inflight").unwrap();
        text.split_whitespace().next() != Some("0")
    };
    wait_until("the disk reads", reads);
    thread::sleep(Duration::from_millis(200));
}

/// While it lives the disk behind [`SCRATCH`] reads and writes at most at the given rate: it keeps
/// the requests that it was handed, and so their pages, waiting.
///
/// (The block layer's own limit, `io.max`, would do as well, if setting it did not make lockdep
/// complain now and then: Linux 7.2 allocates with `blkcg_mutex` held.)
pub struct Slow(());

/// How the lab calls that disk.
const ID: &str = "scratch-disk";

impl Slow {
    /// Limits to `rate` bytes a second, of which a tenth may come at once.
    ///
    /// # Panics
    ///
    /// As [`Machine::new`] does: also while somebody else asks for events.
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
