//! The memory that the machine can still give, for exporters whose kernel driver has no limit:
//! udmabuf since Linux 7.3, where `size_limit_mb` is unlimited by default. Pages of a dma-buf
//! are pinned, so a request beyond the available memory ends in the OOM killer instead of an
//! error.
//!
//! The result is a snapshot: other processes may take the memory afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::ExportError;

/// Refuses `bytes` of pinned memory if the machine, or a cgroup of this process, has less
/// available. A limit that cannot be read is ignored.
///
/// # Errors
/// [`ExportError::Unsuitable`], with the available memory and its source.
pub(super) fn check(bytes: u64) -> Result<(), ExportError> {
    check_in(Path::new("/"), bytes)
}

/// [`check`] for a machine whose `/proc` and cgroups are below `root`.
fn check_in(root: &Path, bytes: u64) -> Result<(), ExportError> {
    let machine = available(root).map(|room| {
        let whose = "the memory that is free on this machine (MemAvailable in /proc/meminfo)";
        (room, whose.to_owned())
    });
    let least = machine
        .into_iter()
        .chain(cgroups(root))
        .min_by_key(|(room, _)| *room);
    match least {
        Some((room, whose)) if bytes > room => Err(ExportError::Unsuitable {
            what: "the memory that the buffer would pin, in bytes,",
            value: bytes,
            must: format!("at most {room}, {whose}"),
        }),
        _ => Ok(()),
    }
}

/// `MemAvailable` in bytes. Swap does not count, because pinned pages cannot be swapped out.
fn available(root: &Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The bytes that each cgroup (version 2) of this process may still use, from the process's own
/// cgroup up to the topmost visible one, each with a description.
fn cgroups(root: &Path) -> Vec<(u64, String)> {
    let Some(own) = own_cgroup(root) else {
        return Vec::new();
    };
    let mount = root.join("sys/fs/cgroup");
    let mut rooms = Vec::new();
    let mut path = Some(own.as_path());
    while let Some(below) = path {
        let directory = mount.join(below);
        if let Some(room) = cgroup_room(&directory) {
            let file = Path::new("/sys/fs/cgroup").join(below).join("memory.max");
            let whose = format!("what its cgroup may still use ({})", file.display());
            rooms.push((room, whose));
        }
        path = below.parent();
    }
    rooms
}

/// The cgroup of this process, relative to the cgroup mount.
fn own_cgroup(root: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}

/// The limit minus the usage. Cached files do not count, because the kernel reclaims them.
fn cgroup_room(directory: &Path) -> Option<u64> {
    let number = |file: &str| -> Option<u64> {
        let text = fs::read_to_string(directory.join(file)).ok()?;
        text.trim().parse().ok()
    };
    // Without a limit the file contains `max`.
    let limit = number("memory.max")?;
    let used = number("memory.current")?;
    let statistics = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
    let files: u64 = statistics
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| ["inactive_file", "active_file"].contains(name))
        .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A root with 100 MiB available, and a process in the cgroup `a/b`.
    fn machine() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write("proc/meminfo", "MemFree: 1 kB\nMemAvailable:   102400 kB\n");
        write("proc/self/cgroup", "0::/a/b\n");
        write("sys/fs/cgroup/a/b/memory.max", "max\n");
        write("sys/fs/cgroup/a/b/memory.current", "1048576\n");
        root
    }

    fn refusal(root: &Path, bytes: u64) -> String {
        check_in(root, bytes).unwrap_err().to_string()
    }

    #[test]
    fn what_is_available_may_be_pinned_and_no_more() {
        let root = machine();
        check_in(root.path(), 100 * MIB).unwrap();
        let text = refusal(root.path(), 100 * MIB + 4096);
        assert!(text.contains("at most 104857600, "), "{text}");
        assert!(text.contains("MemAvailable"), "{text}");
    }

    #[test]
    fn a_limit_of_a_cgroup_above_counts_less_what_is_used_but_for_cached_files() {
        let root = machine();
        let above = root.path().join("sys/fs/cgroup/a");
        fs::write(above.join("memory.max"), "67108864\n").unwrap();
        fs::write(above.join("memory.current"), "50331648\n").unwrap();
        let text = "anon 1\ninactive_file 8388608\nactive_file 8388608\nfile 99999999\n";
        fs::write(above.join("memory.stat"), text).unwrap();
        check_in(root.path(), 32 * MIB).unwrap();
        let text = refusal(root.path(), 33 * MIB);
        assert!(text.contains("at most 33554432, "), "{text}");
        assert!(text.contains("/sys/fs/cgroup/a/memory.max"), "{text}");
    }

    #[test]
    fn a_machine_that_says_nothing_refuses_nothing() {
        let root = tempfile::tempdir().unwrap();
        check_in(root.path(), u64::MAX).unwrap();
        let root = machine();
        fs::write(root.path().join("proc/meminfo"), "rubbish\n").unwrap();
        fs::write(root.path().join("proc/self/cgroup"), "4:memory:/a\n").unwrap();
        check_in(root.path(), u64::MAX).unwrap();
    }
}
