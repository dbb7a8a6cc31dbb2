//! `/dev/udmabuf`: a dma-buf over memory that a process owns.
//!
//! The buffer also carries the memfd. Importers that do not accept a dma-buf, such as files,
//! use the same pages through the memfd.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, SealFlags};

use super::{memfd, plain, room, whole_pages};
use crate::buffer::{Buffer, BufferRange, DmaBuf, Kind, Provenance};
use crate::errno::Errno;
use crate::error::{ExportError, SystemError, Unavailable};
use crate::sys;
use crate::sys::udmabuf::Piece;

pub use super::memfd::HugePages;

const NODE: &str = "/dev/udmabuf";

/// Tries to open `/dev/udmabuf`.
///
/// # Errors
/// The error of `open`, with the remedy.
pub fn probe() -> Result<(), Unavailable> {
    open().map(drop)
}

/// Makes a udmabuf of `length` zero bytes, a multiple of the page size. `name` is for messages.
///
/// # Errors
/// [`ExportError::Unavailable`] without `/dev/udmabuf`, [`ExportError::Unsuitable`] for a
/// length that is zero, not page-aligned, or above the memory that the machine or the process's
/// cgroup has left, and the ioctl's own error.
#[doc(alias = "UDMABUF_CREATE")]
pub fn export(name: &str, length: u64) -> Result<Buffer, ExportError> {
    whole_pages(length)?;
    room::check(length)?;
    over(name, memfd::sealed(name, length)?, length)
}

/// Makes a udmabuf of huge pages, which the administrator has reserved
/// (`/sys/kernel/mm/hugepages`). `length` is a multiple of their size in bytes.
///
/// On Linux 6.12, drivers that copy by the processor (videobuf2's vmalloc allocator) read and write
/// other bytes of it than the buffer has: use [`export`] there (`docs/kernels.md`).
///
/// # Errors
/// As [`export`], and `ENOMEM` if too few huge pages are reserved.
pub fn export_huge(name: &str, length: u64, pages: HugePages) -> Result<Buffer, ExportError> {
    if length == 0 || !length.is_multiple_of(pages.size()) {
        return Err(ExportError::Unsuitable {
            what: "the length",
            value: length,
            must: format!(
                "a multiple of the huge pages' size, {}, and not 0",
                pages.size()
            ),
        });
    }
    over(name, memfd::sealed_huge(name, length, pages)?, length)
}

/// Makes one udmabuf from pieces of memory, in this order. Each piece is a page-aligned range
/// of a buffer with a memfd. The udmabuf and the original buffers share the same bytes.
///
/// ```no_run
/// # use peerbuf::export::{memfd, udmabuf};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (header, body) = (memfd::export("header", 4096)?, memfd::export("body", 1 << 20)?);
/// let packet = udmabuf::export_list("packet", &[header.whole(), body.range(8192, 65536)?])?;
/// assert_eq!(packet.size(), 4096 + 65536);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`ExportError::Unavailable`] without `/dev/udmabuf`; [`ExportError::Unsuitable`] for an
/// empty list, a piece that is not page-aligned or has no memfd, or pieces whose holes exceed
/// the available memory; the ioctl's own error: `EINVAL` for more pieces or bytes than the
/// limits in `/sys/module/udmabuf/parameters`, or a memfd without the seals that the kernel
/// requires.
#[doc(alias = "UDMABUF_CREATE_LIST")]
pub fn export_list(name: &str, pieces: &[BufferRange]) -> Result<Buffer, ExportError> {
    if pieces.is_empty() {
        return Err(ExportError::Unsuitable {
            what: "the number of pieces",
            value: 0,
            must: "at least 1".into(),
        });
    }
    let udmabuf = open()?;
    let mut list = Vec::with_capacity(pieces.len());
    for piece in pieces {
        whole_pages(piece.len())?;
        let page = rustix::param::page_size() as u64;
        if !piece.offset().is_multiple_of(page) {
            return Err(ExportError::Unsuitable {
                what: "the offset of a piece",
                value: piece.offset(),
                must: format!("a multiple of the page size, {page}"),
            });
        }
        let Some(memfd) = piece.buffer().host_memory() else {
            return Err(ExportError::Unsuitable {
                what: "a piece that has no memfd behind it, of length",
                value: piece.len(),
                must: "a range of a memfd or udmabuf".into(),
            });
        };
        list.push(Piece {
            memfd,
            offset: piece.offset(),
            size: piece.len(),
        });
    }
    room::check(holes(&list).map_err(plain)?)?;
    let dmabuf = sys::udmabuf::create_list(udmabuf.as_fd(), &list)
        .map_err(|errno| refusal("ioctl(UDMABUF_CREATE_LIST)", name, &list, errno))?;
    let dmabuf = DmaBuf::from_fd(dmabuf)?;
    Ok(Buffer::from_dmabuf(dmabuf, provenance(name)))
}

/// The maximum number of bytes that the kernel has to allocate for the holes of `pieces`: a
/// memfd has no memory where nobody has written.
fn holes(pieces: &[Piece<'_>]) -> Result<u64, SystemError> {
    // By inode: the bytes of the memfd's pieces, and the bytes that the memfd lacks.
    let mut memfds: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for piece in pieces {
        let status = rustix::fs::fstat(piece.memfd)
            .map_err(|errno| SystemError::new("fstat", "a piece's memfd", errno))?;
        let size = u64::try_from(status.st_size).unwrap_or(0);
        let has = u64::try_from(status.st_blocks).unwrap_or(0) * 512;
        let entry = memfds.entry(status.st_ino).or_default();
        entry.0 = entry.0.saturating_add(piece.size);
        entry.1 = size.saturating_sub(has);
    }
    let lacks = memfds.values().map(|&(asked, lacks)| asked.min(lacks));
    Ok(lacks.fold(0, u64::saturating_add))
}

/// A dma-buf over a whole memfd.
fn over(name: &str, memory: OwnedFd, length: u64) -> Result<Buffer, ExportError> {
    let udmabuf = open()?;
    let piece = Piece {
        memfd: memory.as_fd(),
        offset: 0,
        size: length,
    };
    let dmabuf = sys::udmabuf::create(udmabuf.as_fd(), piece)
        .map_err(|errno| refusal("ioctl(UDMABUF_CREATE)", name, &[piece], errno))?;
    let dmabuf = DmaBuf::from_fd(dmabuf)?;
    Ok(Buffer::from_host_memory(
        memory,
        Some(dmabuf),
        provenance(name),
    )?)
}

fn provenance(name: &str) -> Provenance {
    Provenance {
        kind: Kind::Udmabuf,
        device: None,
        bar: None,
        name: name.into(),
    }
}

fn refusal(call: &'static str, name: &str, pieces: &[Piece<'_>], errno: Errno) -> ExportError {
    let limit = |which: &str| {
        let path = format!("/sys/module/udmabuf/parameters/{which}");
        let text = std::fs::read_to_string(path).ok()?;
        text.trim().parse::<i32>().ok()
    };
    let hint = match errno {
        Errno::INVAL => why_invalid(pieces, limit("size_limit_mb"), limit("list_limit")),
        _ => String::new(),
    };
    let cause = SystemError::new(call, name, errno);
    ExportError::System { cause, hint }
}

/// The kernel's rule that the pieces break. The kernel returns EINVAL for all of its rules
/// (`udmabuf_create` and `check_memfd_seals` in drivers/dma-buf/udmabuf.c). `size_mib` and
/// `list` are the driver's parameters.
fn why_invalid(pieces: &[Piece<'_>], size_mib: Option<i32>, list: Option<i32>) -> String {
    let refused = SealFlags::WRITE | SealFlags::FUTURE_WRITE;
    for (index, piece) in pieces.iter().enumerate() {
        let which = match pieces.len() {
            1 => "its memfd".into(),
            _ => format!("the memfd of piece {index}"),
        };
        let Ok(seals) = rustix::fs::fcntl_get_seals(piece.memfd) else {
            continue;
        };
        if !seals.contains(SealFlags::SHRINK) {
            return format!(": {which} is not sealed against shrinking (F_SEAL_SHRINK)");
        }
        if seals.intersects(refused) {
            return format!(
                ": {which} is sealed against writing (F_SEAL_WRITE or F_SEAL_FUTURE_WRITE), and a udmabuf \
                 could be written"
            );
        }
    }
    let count = pieces.len() as u64;
    let size = pieces
        .iter()
        .fold(0, |sum: u64, piece| sum.saturating_add(piece.size));
    let over = |value: u64, limit: Option<i32>, unit: u64| {
        let limit = limit.and_then(|limit| u64::try_from(limit).ok());
        limit.is_some_and(|limit| value > limit.saturating_mul(unit))
    };
    if over(count, list, 1) || over(size, size_mib, 1 << 20) {
        return format!(": pieces: {count}, bytes: {size}{}", limits(size_mib, list));
    }
    String::new()
}

/// The limits in the driver's parameters, as a hint; empty if no limit is known.
fn limits(size_mib: Option<i32>, pieces: Option<i32>) -> String {
    // Since Linux 7.3 the size is unlimited unless the administrator sets a limit.
    let size = size_mib.filter(|&mib| mib != i32::MAX);
    let (what, files) = match (size, pieces) {
        (Some(size), Some(list)) => (
            format!("{size} MiB in {list} pieces"),
            "size_limit_mb and list_limit",
        ),
        (Some(size), None) => (format!("{size} MiB"), "size_limit_mb"),
        (None, Some(list)) => (format!("{list} pieces"), "list_limit"),
        (None, None) => return String::new(),
    };
    format!(
        ": the largest udmabuf allowed here is {what} ({files} in /sys/module/udmabuf/parameters)"
    )
}

fn open() -> Result<OwnedFd, Unavailable> {
    rustix::fs::open(NODE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        let remedy = match errno {
            rustix::io::Errno::NOENT if Path::new("/sys/class/misc/udmabuf").exists() => {
                "the kernel has it, but this /dev has no node: a container needs it passed in \
                 (`--device /dev/udmabuf`)"
            }
            rustix::io::Errno::NOENT | rustix::io::Errno::NODEV => {
                "`modprobe udmabuf`, or a kernel with CONFIG_UDMABUF"
            }
            rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                "give this user the node, by its group (often `kvm`) or an ACL"
            }
            _ => "see the error",
        };
        let cause = SystemError::new("open", NODE, errno);
        Unavailable {
            what: "udmabuf",
            cause,
            remedy: remedy.into(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_refusal_names_the_rule_that_was_broken() {
        let memory = |seals| {
            let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
            let memory = rustix::fs::memfd_create("test", flags).unwrap();
            rustix::fs::fcntl_add_seals(&memory, seals).unwrap();
            memory
        };
        let sealed = memory(SealFlags::SHRINK);
        let (open, written) = (
            memory(SealFlags::empty()),
            memory(SealFlags::SHRINK | SealFlags::WRITE),
        );
        let piece = |memfd, size| Piece {
            memfd,
            offset: 0,
            size,
        };
        let (sealed, open, written) = (sealed.as_fd(), open.as_fd(), written.as_fd());
        for (pieces, said) in [
            (
                vec![piece(open, 4096)],
                "its memfd is not sealed against shrinking",
            ),
            (
                vec![piece(sealed, 4096), piece(written, 4096)],
                "the memfd of piece 1 is sealed against writing",
            ),
            (
                vec![piece(sealed, 4096); 4],
                "pieces: 4, bytes: 16384: the largest udmabuf allowed here is 64 MiB in 3 pieces",
            ),
            (
                vec![piece(sealed, 32 << 20); 3],
                "pieces: 3, bytes: 100663296",
            ),
        ] {
            let why = why_invalid(&pieces, Some(64), Some(3));
            assert!(why.starts_with(": ") && why.contains(said), "{why:?}");
        }
        // A request that breaks no known rule gets no hint.
        let good = [piece(sealed, 64 << 20)];
        assert_eq!(why_invalid(&good, Some(64), Some(3)), "");
        assert_eq!(why_invalid(&good, None, None), "");
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_list_without_pieces_is_refused_as_such() {
        let error = export_list("nothing", &[]).unwrap_err().to_string();
        assert_eq!(error, "the number of pieces is 0, but must be at least 1");
    }

    #[test]
    fn a_limit_that_is_none_is_not_told() {
        let both = limits(Some(64), Some(1024));
        assert!(both.contains("64 MiB in 1024 pieces"), "{both}");
        let list = limits(Some(i32::MAX), Some(1024));
        assert!(list.contains("is 1024 pieces (list_limit in"), "{list}");
        assert!(!list.contains("2147483647"), "{list}");
        assert_eq!(limits(None, None), "");
    }

    #[test]
    fn memory_that_a_memfd_has_already_is_not_asked_for_again() {
        let fill = |bytes: usize| {
            let memory = memfd::sealed("memory", 1 << 20).unwrap();
            rustix::io::pwrite(&memory, &vec![1; bytes], 0).unwrap();
            memory
        };
        let piece = |memory: &OwnedFd, offset, size| {
            let memory = memory.as_fd();
            holes(&[Piece {
                memfd: memory,
                offset,
                size,
            }])
            .unwrap()
        };
        assert_eq!(piece(&fill(0), 0, 1 << 20), 1 << 20);
        assert_eq!(piece(&fill(1 << 20), 0, 1 << 20), 0);
        // The same piece twice, and a piece of another memfd.
        let (first, second) = (fill(0), fill(0));
        let whole = |memory| Piece {
            memfd: memory,
            offset: 0,
            size: 1 << 20,
        };
        let list = [
            whole(first.as_fd()),
            whole(first.as_fd()),
            whole(second.as_fd()),
        ];
        assert_eq!(holes(&list).unwrap(), 2 << 20);
    }
}
