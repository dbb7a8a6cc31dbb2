//! A file or block device as one end of a transfer.
//!
//! A transfer needs a file in two ways: around the page cache (`O_DIRECT`), for whole blocks, and through it,
//! for the edges that are no whole blocks. One descriptor gives one of the two. The other one comes from
//! opening the file again, which may fail: the process may have dropped the right since, the file may have no
//! name, or `/proc` may be missing. The rules:
//!
//! - The descriptor that was given is used as it is, for the way that it was opened for. Its flags and its
//!   position belong to its owner, who may share the open file description with others: neither is changed.
//! - Without a second descriptor transfers still work, as far as the first one can: staged, or in whole blocks.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Statx, StatxAttributes, StatxFlags};

use crate::buffer::Access;
use crate::errno::Errno;
use crate::error::{SystemError, TransferError};
use crate::path::Direction;
use crate::sys::{self, extents};
use crate::topology::{BlockDevice, Sysfs};

use super::{Merged, Piece};

/// What a second descriptor keeps of the first one's flags: a write that was to be durable when it returns
/// stays so. `O_APPEND` is not among them.
const KEPT: OFlags = OFlags::RWMODE.union(OFlags::SYNC).union(OFlags::DSYNC);

/// An open file, twice: through the page cache, and around it, as far as each is possible.
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// For I/O by the processor: through the page cache, unless `blocks` says otherwise.
    staged: OwnedFd,
    /// The descriptor that was given, if neither `staged` nor `direct` shares its open file description: whether it
    /// appends still counts.
    given: Option<OwnedFd>,
    blocks: Option<Blocks>,
    direct: Result<Direct, String>,
    pub(crate) name: String,
    /// The number of the filesystem (`st_dev`), or of a raw device (`st_rdev`).
    pub(crate) number: (u32, u32),
    /// Where its disk is looked up.
    pub(crate) sysfs: Sysfs,
    pub(crate) is_block_device: bool,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

/// Why the processor, too, can move only whole blocks: the file is open with `O_DIRECT` and could not be opened
/// without.
#[derive(Debug)]
pub(crate) struct Blocks {
    /// Offsets and lengths are multiples of this many bytes.
    pub(crate) block: u64,
    pub(crate) why: SystemError,
}

/// The way around the page cache, and what it asks for.
#[derive(Debug)]
pub(crate) struct Direct {
    fd: OwnedFd,
    /// Addresses in memory are multiples of this many bytes.
    pub(crate) memory_align: u32,
    /// Offsets in the file and lengths are multiples of this many bytes.
    pub(crate) block: u32,
}

impl Direct {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Endpoint {
    /// Opens a path for what will be done with it, and nothing more. Opening for writing has consequences
    /// even if nothing is written: an overlay copies the file, a running program refuses, and udev is told that
    /// a disk has changed.
    pub(crate) fn open(path: &Path, access: Access) -> Result<Endpoint, TransferError> {
        let name = path.display().to_string();
        let mode = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::WRONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let fd = rustix::fs::open(path, mode | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| SystemError::new("open", &name, errno))?;
        Endpoint::new(fd, name, Some(path))
    }

    /// Takes an open file, which may have no name in any directory.
    pub(crate) fn from_fd(fd: OwnedFd, name: String) -> Result<Endpoint, TransferError> {
        Endpoint::new(fd, name, None)
    }

    fn new(fd: OwnedFd, name: String, path: Option<&Path>) -> Result<Endpoint, TransferError> {
        let failed = |call| {
            let name = name.clone();
            move |errno| SystemError::new(call, name, errno)
        };
        let stat = rustix::fs::fstat(&fd).map_err(failed("fstat"))?;
        let (number, is_block_device) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => (stat.st_dev, false),
            FileType::BlockDevice => (stat.st_rdev, true),
            _ => return Err(TransferError::NotAFile { object: name }),
        };
        let number = (rustix::fs::major(number), rustix::fs::minor(number));
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed("fcntl(F_GETFL)"))?;
        let again = |extra| open_again(fd.as_fd(), &stat, path, (flags & KEPT) | extra);
        let (staged, direct, blocks, given) = if flags.contains(OFlags::DIRECT) {
            let direct = fd
                .try_clone()
                .map_err(|error| SystemError::new("fcntl(F_DUPFD_CLOEXEC)", &name, &error))?;
            let direct = around_the_page_cache(direct, is_block_device);
            match again(OFlags::empty()) {
                Ok(staged) => {
                    let given = direct.is_err().then_some(fd);
                    (staged, direct, None, given)
                }
                Err(why) => {
                    // Where the filesystem does not say what it needs: no disk has larger blocks than pages.
                    let page = rustix::param::page_size() as u64;
                    let block = direct.as_ref().map_or(page, |direct| direct.block.into());
                    (fd, direct, Some(Blocks { block, why }), None)
                }
            }
        } else {
            let direct = again(OFlags::DIRECT)
                .map_err(|error| format!("it cannot be opened again with O_DIRECT: {error}"))
                .and_then(|direct| around_the_page_cache(direct, is_block_device));
            (fd, direct, None, None)
        };
        Ok(Endpoint {
            staged,
            given,
            blocks,
            direct,
            name,
            number,
            sysfs: Sysfs::default(),
            is_block_device,
            readable: flags & OFlags::RWMODE != OFlags::WRONLY,
            writable: flags & OFlags::RWMODE != OFlags::RDONLY,
        })
    }

    /// The descriptor for I/O by the processor.
    pub(crate) fn staged(&self) -> BorrowedFd<'_> {
        self.staged.as_fd()
    }

    /// Reads around the page cache, and writes, are of whole ones of these, in bytes; 1 where all I/O goes through
    /// the page cache.
    pub(crate) fn unit(&self) -> u64 {
        match (&self.direct, &self.blocks) {
            (Ok(direct), _) => direct.block.into(),
            (Err(_), Some(blocks)) => blocks.block,
            (Err(_), None) => 1,
        }
    }

    /// The way around the page cache, or why there is none.
    pub(crate) fn direct(&self) -> Result<&Direct, &str> {
        self.direct.as_ref().map_err(String::as_str)
    }

    /// Refuses writes that the kernel would put elsewhere (`O_APPEND`), or that the descriptor cannot do.
    /// Asked before each transfer: whoever shares the open file description may change the flag.
    pub(crate) fn may_write(&self, pieces: &[Piece]) -> Result<(), TransferError> {
        let object = || self.name.clone();
        if !self.writable {
            return Err(TransferError::ReadOnly { object: object() });
        }
        let direct = self.direct().ok().map(Direct::fd);
        let given = self.given.as_ref().map(AsFd::as_fd);
        for fd in [Some(self.staged()), direct, given].into_iter().flatten() {
            let flags = rustix::fs::fcntl_getfl(fd)
                .map_err(|errno| SystemError::new("fcntl(F_GETFL)", &self.name, errno))?;
            if flags.contains(OFlags::APPEND) {
                return Err(TransferError::Appending { object: object() });
            }
        }
        let Some(Blocks { block, why }) = &self.blocks else {
            return Ok(());
        };
        let is_part = |piece: &&Piece| !(piece.file_offset | piece.length).is_multiple_of(*block);
        match pieces.iter().find(is_part) {
            None => Ok(()),
            Some(piece) => Err(TransferError::WholeBlocksOnly {
                object: object(),
                block: *block,
                offset: piece.file_offset,
                length: piece.length,
                cause: why.clone(),
            }),
        }
    }

    /// Refuses reads that the descriptor was not opened for.
    pub(crate) fn may_read(&self) -> Result<(), TransferError> {
        if self.readable {
            return Ok(());
        }
        let object = self.name.clone();
        Err(TransferError::WriteOnly { object })
    }

    /// Without `lseek`, which would move the position of whoever shares the descriptor.
    pub(crate) fn size(&self) -> Result<u64, TransferError> {
        if self.is_block_device {
            // Not fstat, which says 0.
            let size = sys::block::size(self.staged());
            return Ok(
                size.map_err(|errno| SystemError::new("ioctl(BLKGETSIZE64)", &self.name, errno))?
            );
        }
        let stat = rustix::fs::fstat(&self.staged)
            .map_err(|errno| SystemError::new("fstat", &self.name, errno))?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// The disk that has the bytes, as it is now: a volume that is in use may get other disks at any time. `None` if
    /// the kernel does not tell, as for an overlay, a btrfs and the realtime device of an XFS.
    pub(crate) fn disk(&self) -> Option<BlockDevice> {
        let fd = self.staged();
        if !self.is_block_device && is_on(fd, XFS) && extents::is_realtime(fd) != Ok(false) {
            return None;
        }
        self.sysfs.block_device(self.number.0, self.number.1)
    }

    /// Names a disk and its place on the bus, or what is in place of a disk, for evidence.
    pub(crate) fn describe(&self, disk: Option<&BlockDevice>) -> String {
        let Some(disk) = disk else {
            let kind = self.one_of(&WITHOUT_DISK).unwrap_or("the filesystem");
            let name = &self.name;
            return format!("{kind} of {name}, whose disk the kernel does not tell");
        };
        let functions: Vec<String> = disk.functions.iter().map(ToString::to_string).collect();
        let functions = functions.join(", ");
        match (disk.layer, functions.as_str()) {
            (None, "") => format!("{} (no PCI device)", disk.name),
            (None, functions) => format!("{functions} ({})", disk.name),
            (Some(layer), "") => format!("{} ({layer}, no PCI device)", disk.name),
            (Some(layer), functions) => format!("{} ({layer} over {functions})", disk.name),
        }
    }

    fn one_of(&self, filesystems: &[(u64, &'static str)]) -> Option<&'static str> {
        let mut names = filesystems.iter();
        let found = names.find(|(magic, _)| is_on(self.staged(), *magic));
        found.map(|(_, name)| *name)
    }

    /// Says so, for people, unless the kernel tells that all bytes are on this one disk: a proof with one disk says
    /// nothing of another.
    pub(crate) fn several_disks(&self, disk: Option<&BlockDevice>) -> Option<String> {
        let what = self.describe(disk);
        let why = match (disk, self.one_of(&SPANNING)) {
            (None, _) => format!("{what}, may be on several disks"),
            (Some(disk), _) if disk.disks > 1 => {
                format!("{what} passes each request to one of {} disks", disk.disks)
            }
            (Some(_), Some(kind)) => {
                format!("{kind} of {}, on {what}, may have further disks", self.name)
            }
            (Some(_), None) => return None,
        };
        Some(format!(
            "{why}, and a proof would be about those that it happens to reach: use files on one disk, or the disks \
             themselves"
        ))
    }

    /// Says so, for people, if the kernel carries these bytes through the page cache in spite of `O_DIRECT`:
    /// ext2 and ext3 (files without extents) do so to fill holes.
    pub(crate) fn through_the_page_cache(
        &self,
        direction: Direction,
        pieces: &[Piece],
    ) -> Option<String> {
        let fd = self.direct().ok()?.fd();
        if direction == Direction::DiskToBuffer || self.is_block_device || !is_on(fd, EXT) {
            return None;
        }
        let flags = rustix::fs::ioctl_getflags(fd).ok()?;
        if flags.bits() & EXTENTS != 0 {
            return None;
        }
        // What comes after the file's end is no hole: such blocks are written directly.
        let size = self.size().ok()?;
        let has_hole = |piece: Piece| {
            let end = piece.file_offset.saturating_add(piece.length).min(size);
            piece.file_offset < end && extents::has_hole(fd, piece.file_offset..end) != Ok(false)
        };
        Merged(pieces).any(has_hole).then(|| {
            format!(
                "{} has holes where it is to be written, which ext2 and ext3 fill through the page cache: \
                 write zeros there first, or use ext4 with extents",
                self.name
            )
        })
    }

    /// The directory that holds the file, if it can still be found.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        let link = format!("/proc/self/fd/{}", self.staged.as_raw_fd());
        Some(std::fs::read_link(link).ok()?.parent()?.to_owned())
    }
}

/// Whether a file is on a filesystem with this number (linux/magic.h).
fn is_on(file: BorrowedFd<'_>, magic: u64) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|filesystem| filesystem.f_type as u64 == magic)
}

/// `XFS_SUPER_MAGIC` (linux/magic.h).
const XFS: u64 = 0x5846_5342;

/// `EXT4_SUPER_MAGIC`, which ext2 and ext3 share (linux/magic.h).
const EXT: u64 = 0xef53;

/// `FS_EXTENT_FL` (linux/fs.h), which rustix has no name for.
const EXTENTS: u32 = 0x0008_0000;

/// Filesystems whose files have the number of no disk, or of another one (linux/magic.h; a btrfs makes numbers up).
const WITHOUT_DISK: [(u64, &str); 9] = [
    (0x794c_7630, "the overlay"),
    (0x0102_1997, "the 9p filesystem"),
    (0x6573_5546, "the FUSE filesystem"),
    (0x0102_1994, "the tmpfs"),
    (0x0000_6969, "the NFS filesystem"),
    (0xff53_4d42, "the CIFS filesystem"),
    (0x9123_683e, "the btrfs"),
    (0x9584_58f6, "the huge pages"),
    (XFS, "the realtime part of the XFS"),
];

/// Filesystems that take several disks, and give all their files the number of the first.
const SPANNING: [(u64, &str); 2] = [(0xf2f5_2010, "the F2FS"), (0xe0f5_e1e2, "the EROFS")];

/// Opens a file again with other flags. `/proc` leads there even if the file has no name any more; without
/// `/proc` the path does, if that is still the same file.
fn open_again(
    fd: BorrowedFd<'_>,
    stat: &Stat,
    path: Option<&Path>,
    flags: OFlags,
) -> Result<OwnedFd, SystemError> {
    let flags = flags | OFlags::CLOEXEC;
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let errno = match rustix::fs::open(&link, flags, Mode::empty()) {
        Ok(again) => return Ok(again),
        Err(errno) => errno,
    };
    if errno != rustix::io::Errno::NOENT {
        return Err(SystemError::new("open", link, errno));
    }
    let same = |again: &OwnedFd| {
        rustix::fs::fstat(again).is_ok_and(|other| {
            (other.st_dev, other.st_ino, other.st_rdev) == (stat.st_dev, stat.st_ino, stat.st_rdev)
        })
    };
    let by_path = path.and_then(|path| rustix::fs::open(path, flags, Mode::empty()).ok());
    match by_path.filter(same) {
        Some(again) => Ok(again),
        None => {
            let why = if Path::new("/proc/self/fd").exists() {
                "whose filesystem cannot open a file without a name again"
            } else {
                "without procfs, by which an open file is opened again"
            };
            Err(SystemError::new("open", format!("{link}, {why}"), errno))
        }
    }
}

/// Asks what direct I/O needs on a descriptor that is open with `O_DIRECT`.
fn around_the_page_cache(fd: OwnedFd, is_block_device: bool) -> Result<Direct, String> {
    let statx = rustix::fs::statx(&fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let told = statx.ok().map(|statx| alignment(&statx)).transpose()?;
    let (memory_align, block) = match told.flatten() {
        Some(alignment) => alignment,
        // A raw device has no filesystem in between, so its block size will do.
        None if is_block_device => {
            let block = rustix::fs::ioctl_blksszget(&fd)
                .map_err(|errno| format!("ioctl(BLKSSZGET): {}", Errno::from(errno)))?;
            (block, block)
        }
        // Some filesystems accept O_DIRECT and copy through the page cache all the same: a tmpfs
        // always, a btrfs where it keeps checksums. One that does not say cannot be told from
        // those, and a copy must not be taken for a device's DMA.
        None => {
            return Err(
                "the filesystem does not say that O_DIRECT goes around the page cache \
                 (statx with STATX_DIOALIGN, since Linux 6.1)"
                    .into(),
            );
        }
    };
    if memory_align == 0 || block == 0 {
        return Err("the filesystem says that this file has no direct I/O (statx)".into());
    }
    Ok(Direct {
        fd,
        memory_align,
        block,
    })
}

/// What a filesystem says that direct I/O needs, of memory and of offsets, if it says something.
fn alignment(statx: &Statx) -> Result<Option<(u32, u32)>, String> {
    // The processor copies between such a file and the caller's memory, O_DIRECT or not.
    if statx.stx_attributes.contains(StatxAttributes::DAX) {
        return Err("the file is in memory that the processor copies to and from (DAX)".into());
    }
    let told = statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    Ok(told.then_some((statx.stx_dio_mem_align, statx.stx_dio_offset_align)))
}

/// Makes a file for reading and writing that has no name, so that nothing is left of it however
/// this process ends.
///
/// # Errors
/// The call that failed, such as `ENOENT`, `EACCES`, `EROFS` or `ENOSPC`.
pub fn unnamed_file(directory: &Path) -> Result<File, SystemError> {
    let name = directory.display().to_string();
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        Ok(fd) => return Ok(fd.into()),
        // Not every filesystem has O_TMPFILE; kernels that know it give EOPNOTSUPP.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {}
        Err(errno) => return Err(SystemError::new("open(O_TMPFILE)", name, errno)),
    }
    loop {
        let path = directory.join(format!(".peerbuf-{:016x}", rand::random::<u64>()));
        match rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Ok(fd) => {
                rustix::fs::unlink(&path).map_err(|errno| {
                    SystemError::new("unlink", path.display().to_string(), errno)
                })?;
                return Ok(fd.into());
            }
            Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(SystemError::new("open(O_CREAT)", name, errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_file_that_the_processor_copies_has_no_direct_io() {
        let file = tempfile::tempfile().unwrap();
        let mut statx =
            rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).unwrap();
        statx.stx_mask &= !StatxFlags::DIOALIGN.bits();
        assert_eq!(alignment(&statx), Ok(None));
        statx.stx_mask |= StatxFlags::DIOALIGN.bits();
        (statx.stx_dio_mem_align, statx.stx_dio_offset_align) = (4, 512);
        assert_eq!(alignment(&statx), Ok(Some((4, 512))));
        statx.stx_attributes |= StatxAttributes::DAX;
        assert!(alignment(&statx).unwrap_err().contains("DAX"));
    }
}
