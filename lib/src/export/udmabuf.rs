//! `/dev/udmabuf`: a dma-buf over memory that a process owns.
//!
//! The buffer carries the memfd too: importers that cannot take a dma-buf, such as files, use the
//! same pages through it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, SealFlags};

use super::{memfd, whole_pages};
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
/// The error of `open`, with what would help.
pub fn probe() -> Result<(), Unavailable> {
    open().map(drop)
}

/// Makes a udmabuf of `length` zero bytes, a multiple of the page size. `name` is for people.
///
/// # Errors
/// [`ExportError::Unavailable`] without `/dev/udmabuf`, [`ExportError::Unsuitable`] for a length
/// of zero or off a page, and the ioctl's own error.
pub fn export(name: &str, length: u64) -> Result<Buffer, ExportError> {
    whole_pages(length)?;
    over(name, memfd::sealed(name, length)?, length)
}

/// Makes a udmabuf of huge pages, which the administrator has set aside
/// (`/sys/kernel/mm/hugepages`). `length` is a multiple of their size.
///
/// # Errors
/// As [`export`], and `ENOMEM` where too few pages were set aside.
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

/// Makes one udmabuf of pieces of memory that are anywhere, one after the other. Each piece is a
/// range of a buffer with a memfd behind it, in whole pages. The pieces stay what they are: both
/// see the same bytes.
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
/// [`ExportError::Unavailable`] without `/dev/udmabuf`, [`ExportError::Unsuitable`] for no piece and one
/// off a page or without a memfd, and the ioctl's own error: `EINVAL` for more pieces or bytes than the limits in
/// `/sys/module/udmabuf/parameters`, or a memfd that is not sealed as the kernel wants it.
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
    let dmabuf = sys::udmabuf::create_list(udmabuf.as_fd(), &list)
        .map_err(|errno| refusal("ioctl(UDMABUF_CREATE_LIST)", name, &list, errno))?;
    let dmabuf = DmaBuf::from_fd(dmabuf)?;
    Ok(Buffer::from_dmabuf(dmabuf, provenance(name)))
}

/// A dma-buf over all of a memfd.
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
    let hint = match errno {
        Errno::INVAL => why_invalid(pieces, Limits::read()),
        _ => String::new(),
    };
    let cause = SystemError::new(call, name, errno);
    ExportError::System { cause, hint }
}

/// The module's parameters; `None` for one that cannot be read.
struct Limits {
    size_mib: Option<u64>,
    pieces: Option<u64>,
}

impl Limits {
    fn read() -> Limits {
        let parameter = |which: &str| {
            let path = format!("/sys/module/udmabuf/parameters/{which}");
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        Limits {
            size_mib: parameter("size_limit_mb"),
            pieces: parameter("list_limit"),
        }
    }
}

/// Which of the kernel's rules the pieces break, all of which it answers with EINVAL (`udmabuf_create` and
/// `check_memfd_seals` in drivers/dma-buf/udmabuf.c).
fn why_invalid(pieces: &[Piece<'_>], limits: Limits) -> String {
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
    let parameters = "/sys/module/udmabuf/parameters";
    let count = pieces.len() as u64;
    if let Some(limit) = limits.pieces
        && count > limit
    {
        return format!(": {count} pieces, and {limit} are allowed ({parameters}/list_limit)");
    }
    let size = pieces
        .iter()
        .fold(0, |sum: u64, piece| sum.saturating_add(piece.size));
    if let Some(limit) = limits.size_mib
        && size > limit.saturating_mul(1 << 20)
    {
        return format!(
            ": {size} bytes, and the largest udmabuf allowed has {limit} MiB ({parameters}/size_limit_mb)"
        );
    }
    if limits.size_mib.is_none() || limits.pieces.is_none() {
        return format!(": its limits cannot be read here ({parameters})");
    }
    String::new()
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

    fn limits() -> Limits {
        Limits {
            size_mib: Some(64),
            pieces: Some(3),
        }
    }

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
            (vec![piece(sealed, 4096); 4], "4 pieces, and 3 are allowed"),
            (vec![piece(sealed, 32 << 20); 3], "has 64 MiB"),
        ] {
            let why = why_invalid(&pieces, limits());
            assert!(why.starts_with(": ") && why.contains(said), "{why:?}");
        }
        assert_eq!(why_invalid(&[piece(sealed, 64 << 20)], limits()), "");
        let unknown = Limits {
            size_mib: None,
            pieces: None,
        };
        assert!(why_invalid(&[piece(sealed, 1 << 40)], unknown).contains("cannot be read"));
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_list_without_pieces_is_refused_as_such() {
        let error = export_list("nothing", &[]).unwrap_err().to_string();
        assert_eq!(error, "the number of pieces is 0, but must be at least 1");
    }
}
