//! The raw scratch disk of the guest, and ways to make it slow.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::node::Map;

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

/// While it lives, this process and its new children read and write [`SCRATCH`] at most at the
/// given rate: the block layer holds accepted requests, and so their pages, back.
pub struct Slow(());

const GROUP: &str = "/sys/fs/cgroup/lab-slow";

impl Slow {
    /// Limits to `rate` bytes a second.
    pub fn new(rate: u64) -> Self {
        if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            let mounted = std::process::Command::new("mount")
                .args(["-t", "cgroup2", "none", "/sys/fs/cgroup"])
                .status()
                .expect("mount");
            assert!(mounted.success(), "mount cgroup2");
        }
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+io").expect("the io controller");
        fs::create_dir_all(GROUP).expect("a control group");
        let disk = fs::metadata(SCRATCH).expect(SCRATCH);
        assert!(disk.file_type().is_block_device());
        let (major, minor) = (libc::major(disk.rdev()), libc::minor(disk.rdev()));
        let limit = format!("{major}:{minor} rbps={rate} wbps={rate}");
        fs::write(format!("{GROUP}/io.max"), limit).expect("io.max");
        fs::write(format!("{GROUP}/cgroup.procs"), "0").expect("cgroup.procs");
        Self(())
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = fs::write("/sys/fs/cgroup/cgroup.procs", "0");
    }
}
