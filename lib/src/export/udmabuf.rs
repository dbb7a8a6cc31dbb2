//! `/dev/udmabuf`: a dma-buf over memory that a process owns.
//!
//! The buffer carries the memfd too: importers that cannot take a dma-buf, such as files, use the
//! same pages through it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::memfd;
use crate::buffer::{Buffer, DmaBuf, Kind, Provenance};
use crate::errno::Errno;
use crate::error::{ExportError, SystemError, Unavailable};
use crate::sys;

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
    let udmabuf = open()?;
    let page = rustix::param::page_size() as u64;
    if length == 0 || !length.is_multiple_of(page) {
        let must = format!("a multiple of the page size, {page}, and not 0");
        return Err(ExportError::Unsuitable {
            what: "the length",
            value: length,
            must,
        });
    }
    let memory = memfd::sealed(name, length)?;
    let dmabuf =
        sys::udmabuf::create(udmabuf.as_fd(), memory.as_fd(), length).map_err(|errno| {
            // EINVAL is all that the kernel says about a buffer over its limit.
            let limit = std::fs::read_to_string("/sys/module/udmabuf/parameters/size_limit_mb");
            let hint = match limit {
                Ok(limit) if errno == Errno::INVAL => format!(
                    ": the largest udmabuf allowed here is {} MiB \
                 (/sys/module/udmabuf/parameters/size_limit_mb)",
                    limit.trim()
                ),
                _ => String::new(),
            };
            let cause = SystemError::new("ioctl(UDMABUF_CREATE)", name, errno);
            ExportError::System { cause, hint }
        })?;
    let provenance = Provenance {
        kind: Kind::Udmabuf,
        device: None,
        bar: None,
        name: name.into(),
    };
    Ok(Buffer::from_host_memory(
        memory,
        Some(DmaBuf::from_fd(dmabuf)?),
        provenance,
    )?)
}

fn open() -> Result<OwnedFd, Unavailable> {
    rustix::fs::open(NODE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        let remedy = match errno {
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
