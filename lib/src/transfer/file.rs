//! A file or block device as one end of a transfer.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags};

use crate::errno::Errno;
use crate::error::{SystemError, TransferError};
use crate::topology::{BlockDevice, Sysfs};

/// An open file, twice: the ordinary way, and around the page cache where that is possible.
#[derive(Debug)]
pub(crate) struct Endpoint {
    ordinary: OwnedFd,
    direct: Result<Direct, String>,
    pub(crate) name: String,
    /// The number of the block device, or of the filesystem's.
    pub(crate) number: (u32, u32),
    pub(crate) disk: Option<BlockDevice>,
    pub(crate) is_block_device: bool,
    pub(crate) writable: bool,
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
    /// Opens a path, for writing too where the permissions allow it.
    pub(crate) fn open(path: &Path) -> Result<Endpoint, TransferError> {
        let name = path.display().to_string();
        let open = |mode| rustix::fs::open(path, mode | OFlags::CLOEXEC, Mode::empty());
        let opened = match open(OFlags::RDWR) {
            Err(rustix::io::Errno::ACCESS | rustix::io::Errno::ROFS | rustix::io::Errno::PERM) => {
                open(OFlags::RDONLY)
            }
            other => other,
        };
        let fd = opened.map_err(|errno| SystemError::new("open", &name, errno))?;
        Endpoint::from_fd(fd, name)
    }

    /// Takes an open file, which may have no name in any directory.
    pub(crate) fn from_fd(fd: OwnedFd, name: String) -> Result<Endpoint, TransferError> {
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
        let disk = Sysfs::default().block_device(number.0, number.1);
        // A raw device has no page cache of a filesystem in between, so its block size will do.
        let raw = disk.as_ref().filter(|_| is_block_device);
        let direct = open_direct(fd.as_fd(), flags & OFlags::RWMODE, raw);
        let writable = flags & OFlags::RWMODE != OFlags::RDONLY;
        // The descriptor that we were given may itself be open with O_DIRECT.
        let ordinary = if flags.contains(OFlags::DIRECT) {
            reopen(fd.as_fd(), flags & OFlags::RWMODE).map_err(failed("open"))?
        } else {
            fd
        };
        Ok(Endpoint {
            ordinary,
            direct,
            name,
            number,
            disk,
            is_block_device,
            writable,
        })
    }

    pub(crate) fn ordinary(&self) -> BorrowedFd<'_> {
        self.ordinary.as_fd()
    }

    /// The way around the page cache, or why there is none.
    pub(crate) fn direct(&self) -> Result<&Direct, &str> {
        self.direct.as_ref().map_err(String::as_str)
    }

    pub(crate) fn size(&self) -> Result<u64, TransferError> {
        // Not fstat, which says 0 of a block device.
        let end = rustix::fs::seek(&self.ordinary, SeekFrom::End(0));
        Ok(end.map_err(|errno| SystemError::new("lseek", &self.name, errno))?)
    }

    /// Names the file, the disk and its place on the bus, for evidence.
    pub(crate) fn describe_disk(&self) -> String {
        match &self.disk {
            Some(disk) if !disk.functions.is_empty() => {
                let functions: Vec<String> =
                    disk.functions.iter().map(ToString::to_string).collect();
                format!("{} ({})", functions.join(", "), disk.name)
            }
            Some(disk) => format!("{} (no PCI device)", disk.name),
            None => format!("the filesystem of {}", self.name),
        }
    }

    /// The directory that holds the file, if it can still be found.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        let link = format!("/proc/self/fd/{}", self.ordinary.as_raw_fd());
        Some(std::fs::read_link(link).ok()?.parent()?.to_owned())
    }
}

/// Opens what `fd` is again. `/proc` leads there even when the file has no name any more.
fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, rustix::io::Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

fn open_direct(
    fd: BorrowedFd<'_>,
    mode: OFlags,
    raw: Option<&BlockDevice>,
) -> Result<Direct, String> {
    let direct = reopen(fd, mode | OFlags::DIRECT)
        .map_err(|errno| format!("open with O_DIRECT: {}", Errno::from(errno)))?;
    let statx = rustix::fs::statx(&direct, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let (memory_align, block) = match (statx, raw) {
        (Ok(statx), _) if statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            (statx.stx_dio_mem_align, statx.stx_dio_offset_align)
        }
        (_, Some(disk)) => (disk.logical_block, disk.logical_block),
        // Some filesystems accept O_DIRECT and copy through the page cache all the same: a tmpfs
        // always, a btrfs where it keeps checksums. One that does not say cannot be told from
        // those, and a copy must not be taken for a device's DMA.
        (_, None) => {
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
        fd: direct,
        memory_align,
        block,
    })
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
