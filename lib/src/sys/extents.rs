//! The layout of a file on its disk: the ioctls of filesystems (include/uapi/linux/fs.h and
//! fiemap.h).

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::errno::Errno;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Attributes {
    flags: u32,
    others: [u32; 6],
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

const EXTENTS: usize = 32;

/// `struct fiemap` with room for the extents.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// The size of a `struct fiemap` without extents, which is part of the ioctl's number.
const HEADER: usize = 32;

mod raw {
    nix::ioctl_read!(fsgetxattr, b'X', 31, super::Attributes);
    nix::ioctl_readwrite_bad!(
        fiemap,
        nix::request_code_readwrite!(b'f', 11, super::HEADER),
        super::Map
    );
}

/// True if the file's bytes are on the realtime device of its XFS (`FS_XFLAG_REALTIME`).
pub(crate) fn is_realtime(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes a struct fsxattr, which lives through the call.
    unsafe { raw::fsgetxattr(file.as_raw_fd(), &raw mut attributes) }
        .map_err(super::ioctl_errno)?;
    Ok(attributes.flags & 1 != 0)
}

/// True if some of these bytes are in a hole.
pub(crate) fn has_hole(file: BorrowedFd<'_>, bytes: Range<u64>) -> Result<bool, Errno> {
    let mut at = bytes.start;
    while at < bytes.end {
        let mut map = Map {
            start: at,
            length: bytes.end - at,
            count: EXTENTS as u32,
            ..Map::default()
        };
        // SAFETY: the kernel reads and writes a struct fiemap with room for `count` extents, which live through
        // the call.
        unsafe { raw::fiemap(file.as_raw_fd(), &raw mut map) }.map_err(super::ioctl_errno)?;
        let found = map.extents.iter().take(map.mapped as usize);
        let before = at;
        for extent in found {
            if extent.logical > at {
                return Ok(true);
            }
            at = at.max(extent.logical.saturating_add(extent.length));
        }
        if at == before {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!(size_of::<Attributes>(), 28);
        assert_eq!(size_of::<Extent>(), 56);
        assert_eq!(offset_of!(Map, extents), HEADER);
        assert_eq!(nix::request_code_readwrite!(b'f', 11, HEADER), 0xc020_660b);
        assert_eq!(nix::request_code_read!(b'X', 31, 28), 0x801c_581f);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_hole_is_found_wherever_it_is() {
        const PIECE: u64 = 1 << 20;
        let file = tempfile::tempfile().unwrap();
        for piece in [0, 1, 3] {
            file.write_all_at(&vec![7; PIECE as usize], piece * PIECE)
                .unwrap();
        }
        file.sync_all().unwrap();
        let has_hole = |bytes| has_hole(file.as_fd(), bytes);
        if has_hole(0..1) == Err(Errno::OPNOTSUPP) {
            eprintln!("not run: the filesystem of temporary files has no FIEMAP");
            return;
        }
        for (bytes, expected) in [
            (0..2 * PIECE, false),
            (PIECE..PIECE + 1, false),
            (0..2 * PIECE + 1, true),
            (2 * PIECE..3 * PIECE, true),
            (3 * PIECE - 1..4 * PIECE, true),
            (3 * PIECE..4 * PIECE, false),
            (3 * PIECE..5 * PIECE, true),
            (9 * PIECE..9 * PIECE + 1, true),
            (5..5, false),
        ] {
            assert_eq!(has_hole(bytes.clone()), Ok(expected), "{bytes:?}");
        }
    }
}
