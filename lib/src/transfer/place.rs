//! Where a file's bytes are, as far as the kernel tells: what a proof is about.
//!
//! The number that `stat` gives (`st_dev`) names a filesystem or a block device, and that is not always one disk:
//!
//! - An XFS may keep the bytes of some files on its realtime device, a disk of its own.
//! - The files of an overlay may be in several filesystems below it. With `xino=on` all have one number.
//! - md, device mapper and multi-path disks pass each request to one of several disks.
//!
//! A path that was proved for one of the disks is not proved for another one.

use std::os::fd::BorrowedFd;

use rustix::fs::Stat;

use crate::path::Direction;
use crate::sys::extents;
use crate::topology::BlockDevice;

/// `XFS_SUPER_MAGIC` (linux/magic.h).
const XFS: u64 = 0x5846_5342;

/// The place of a file's bytes. Files of one place are on one disk, if that is
/// not [several](BlockDevice::disks).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// The block device with this number.
    Device(u32, u32),
    /// The realtime device of the XFS on it.
    Realtime(u32, u32),
    /// A file of a filesystem with a number of its own: its disk is not known.
    File { filesystem: (u32, u32), inode: u64 },
}

impl Place {
    /// `number` is that of the device or filesystem, `disk` what sysfs knows of it.
    pub(crate) fn of(
        file: BorrowedFd<'_>,
        stat: &Stat,
        number: (u32, u32),
        disk: Option<&BlockDevice>,
    ) -> Place {
        let (major, minor) = number;
        if disk.is_none() {
            let inode = stat.st_ino;
            return Place::File {
                filesystem: number,
                inode,
            };
        }
        match is_on(file, XFS) && extents::is_realtime(file) == Ok(true) {
            true => Place::Realtime(major, minor),
            false => Place::Device(major, minor),
        }
    }

    /// The number of the block device or filesystem.
    pub(crate) fn number(self) -> (u32, u32) {
        match self {
            Place::Device(major, minor) | Place::Realtime(major, minor) => (major, minor),
            Place::File { filesystem, .. } => filesystem,
        }
    }

    /// Whether a path that is proved with a new file at `made` is proved for a file here.
    pub(crate) fn is_proved_at(self, made: Place, direction: Direction) -> bool {
        match (self, made) {
            // An overlay makes new files where it has put those that are written. Those that are only read
            // may be elsewhere.
            (
                Place::File { filesystem, .. },
                Place::File {
                    filesystem: new, ..
                },
            ) => direction == Direction::BufferToDisk && filesystem == new,
            (here, made) => here == made,
        }
    }
}

/// Whether a file is on a filesystem with this number (linux/magic.h).
pub(crate) fn is_on(file: BorrowedFd<'_>, magic: u64) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|filesystem| filesystem.f_type as u64 == magic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_elsewhere_is_none() {
        let disk = Place::Device(259, 1);
        let file = |inode| Place::File {
            filesystem: (0, 40),
            inode,
        };
        for direction in [Direction::DiskToBuffer, Direction::BufferToDisk] {
            assert!(disk.is_proved_at(disk, direction));
            for other in [
                Place::Device(259, 2),
                Place::Realtime(259, 1),
                Place::File {
                    filesystem: (259, 1),
                    inode: 7,
                },
            ] {
                assert!(!disk.is_proved_at(other, direction), "{other:?}");
                assert!(!other.is_proved_at(disk, direction), "{other:?}");
            }
        }
        assert!(file(1).is_proved_at(file(2), Direction::BufferToDisk));
        assert!(!file(1).is_proved_at(file(2), Direction::DiskToBuffer));
    }
}
