//! Directories and the disks they are on.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::plan::topology::{BlockDevice, Layer, Sysfs};

/// A mounted filesystem.
#[derive(Debug, Clone)]
pub struct Mount {
    pub at: PathBuf,
    pub kind: String,
    pub disk: Option<BlockDevice>,
    /// What is between the filesystem and its disks, from the top; empty if it is on no block device.
    pub layers: Vec<Layer>,
}

/// The kernel's filesystems that hold no files of anybody's.
const PSEUDO: [&str; 24] = [
    "autofs",
    "bdev",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fuse.lxcfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "resctrl",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
];

impl Mount {
    /// `/mnt: ext4 on dm-0 (LVM) on nvme0n1p2 (partition) on nvme0n1 (disk)`
    pub fn stack(&self) -> String {
        let layers: String = self
            .layers
            .iter()
            .map(|layer| format!(" on {} ({})", layer.name, layer.kind.name()))
            .collect();
        format!("{}: {}{layers}", self.at.display(), self.kind)
    }

    /// Whether it only shows the kernel's own state, such as /proc.
    pub fn is_pseudo(&self) -> bool {
        PSEUDO.contains(&self.kind.as_str())
    }
}

/// The mounts, in the order of mounting (`/proc/self/mountinfo`).
pub fn mounts() -> Vec<Mount> {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    mounts_in(&text, &Sysfs::default())
}

/// The mounts of a `mountinfo`, with the disks of `sysfs`.
pub fn mounts_in(mountinfo: &[u8], sysfs: &Sysfs) -> Vec<Mount> {
    let lines = mountinfo.split(|&byte| byte == b'\n');
    lines
        .filter_map(|line| {
            let line = parse_line(line)?;
            let disk = sysfs.block_device(line.number.0, line.number.1);
            Some(Mount {
                at: line.at,
                kind: line.kind,
                disk,
                layers: sysfs.stack(line.number.0, line.number.1),
            })
        })
        .collect()
}

#[derive(Debug, PartialEq, Eq)]
struct Line {
    number: (u32, u32),
    at: PathBuf,
    kind: String,
}

/// One line: id, parent, major:minor, root, mount point, options, tags, `-`, type, source, ...
fn parse_line(line: &[u8]) -> Option<Line> {
    let mut fields = line.split(|&byte| byte == b' ');
    let number = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = number.split_once(':')?;
    let at = unescape(fields.nth(1)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Line {
        number: (major.parse().ok()?, minor.parse().ok()?),
        at: std::ffi::OsString::from_vec(at).into(),
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
}

/// Decodes the kernel's escapes: a space, a tab, a newline and a backslash are `\` and three
/// octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|digits| {
            first == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit))
        });
        match octal {
            Some(digits) => {
                let value = digits.iter().fold(0u8, |value, digit| {
                    value.wrapping_mul(8).wrapping_add(digit - b'0')
                });
                plain.push(value);
                rest = &after[3..];
            }
            None => {
                plain.push(first);
                rest = after;
            }
        }
    }
    plain
}

/// The filesystem of a directory.
pub fn mount_of(directory: &Path) -> Option<Mount> {
    let directory = directory.canonicalize().ok()?;
    let holds = |mount: &Mount| directory.starts_with(&mount.at);
    // The later of two mounts on one directory hides the earlier one.
    mounts()
        .into_iter()
        .filter(holds)
        .max_by_key(|mount| mount.at.as_os_str().len())
}

/// The mount's path, filesystem type and disk, for messages: `/mnt (ext4 on nvme0n1,
/// 0000:01:00.0)`.
pub fn describe(directory: &Path) -> String {
    let path = directory.display();
    let Some(mount) = mount_of(directory) else {
        return path.to_string();
    };
    match mount.disk {
        None => format!("{path} ({})", mount.kind),
        Some(disk) => {
            let functions: String = disk
                .functions
                .iter()
                .map(|function| format!(", {function}"))
                .collect();
            format!("{path} ({} on {}{functions})", mount.kind, disk.name)
        }
    }
}

/// A directory for the demo's files: on a writable NVMe disk, else one with direct I/O, else
/// the directory for temporary files.
pub fn working_directory() -> PathBuf {
    let temporary = std::env::temp_dir();
    let mut usual = vec![temporary.clone(), PathBuf::from("/var/tmp")];
    usual.extend(std::env::home_dir());
    usual.extend(std::env::current_dir());
    let is_nvme = |mount: &Mount| {
        mount
            .disk
            .as_ref()
            .is_some_and(|disk| disk.name.starts_with("nvme"))
    };
    let mounted = mounts().into_iter().filter(is_nvme).map(|mount| mount.at);
    let on_nvme = usual
        .iter()
        .filter(|directory| mount_of(directory).as_ref().is_some_and(is_nvme))
        .cloned();
    let has_direct_io = |directory: &PathBuf| {
        unnamed_file(directory)
            .ok()
            .and_then(|file| FileImporter::from_fd(file.into(), "").ok())
            .is_some_and(|file| file.alignment().is_some())
    };
    mounted
        .chain(on_nvme)
        .find(has_direct_io)
        .or_else(|| {
            usual
                .iter()
                .find(|directory| has_direct_io(directory))
                .cloned()
        })
        .unwrap_or(temporary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_line_is_read_whatever_its_tags_and_spaces() {
        let line = br"36 35 98:0 / /mnt/a\040b\134 rw,noatime shared:1 master:2 - ext4 /dev/x rw";
        let expected = Line {
            number: (98, 0),
            at: r"/mnt/a b\".into(),
            kind: "ext4".into(),
        };
        assert_eq!(parse_line(line), Some(expected));
        assert_eq!(
            parse_line(b"36 35 0:5 / /proc rw - proc proc rw")
                .unwrap()
                .kind,
            "proc"
        );
        assert_eq!(parse_line(b""), None);
        assert_eq!(
            parse_line(b"36 35 nonsense / /proc rw - proc proc rw"),
            None
        );
    }

    #[test]
    fn the_root_directory_is_mounted() {
        assert_eq!(mount_of(Path::new("/")).unwrap().at, Path::new("/"));
    }
}
