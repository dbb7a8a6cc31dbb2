//! [`DmaBuf`]: the file descriptor of a dma-buf, and what the kernel reports about it.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, SeekFrom};

use crate::errno::Errno;
use crate::error::{BufferError, SystemError};
use crate::sys;

/// The magic number of the dma-buf filesystem (`DMA_BUF_MAGIC`, linux/magic.h).
const DMA_BUF_MAGIC: u64 = 0x444d_4142;

/// The identity of a dma-buf: equal for all descriptors of one buffer, in any process. Unique until the
/// machine restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// The buffer's inode number, as in `/proc/<pid>/fdinfo` and debugfs.
    pub fn inode(self) -> u64 {
        self.inode
    }
}

/// The kernel's report on a dma-buf (`/proc/self/fdinfo`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Info {
    /// The exporter's name, such as `udmabuf`.
    pub exporter: String,
    /// The name set with [`DmaBuf::set_name`]; empty without one.
    pub name: String,
    /// The number of references at this moment: file descriptors, mappings and importers in all processes
    /// together. It is no number of holders: one process, or one driver, may have several.
    pub references: u64,
}

/// A file descriptor that is known to be a dma-buf.
///
/// It converts from and to [`OwnedFd`]. [`DmaBuf::try_clone`] makes another descriptor of the same buffer.
///
/// ```
/// use std::os::fd::OwnedFd;
/// use peerbuf_core::DmaBuf;
///
/// fn same_buffer(one: OwnedFd, other: OwnedFd) -> Result<bool, peerbuf_core::error::BufferError> {
///     Ok(DmaBuf::try_from(one)?.identity() == DmaBuf::try_from(other)?.identity())
/// }
///
/// let (a, b) = std::io::pipe()?;
/// assert!(same_buffer(a.into(), b.into()).is_err()); // a pipe is no dma-buf
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
#[doc(alias = "dma_buf")]
pub struct DmaBuf {
    fd: OwnedFd,
    size: u64,
    identity: Identity,
    writable: bool,
}

impl DmaBuf {
    /// Takes a file descriptor, after a check that it is a dma-buf.
    ///
    /// # Errors [`BufferError::NotADmaBuf`], or the failed call. The descriptor is then closed.
    pub fn from_fd(fd: OwnedFd) -> Result<DmaBuf, BufferError> {
        let failed = |call| move |errno| SystemError::new(call, "a descriptor", errno);
        let filesystem = rustix::fs::fstatfs(&fd).map_err(failed("fstatfs"))?.f_type as u64;
        if filesystem != DMA_BUF_MAGIC {
            let object = "the descriptor".into();
            return Err(BufferError::NotADmaBuf {
                object,
                found: filesystem,
            });
        }
        let stat = rustix::fs::fstat(&fd).map_err(failed("fstat"))?;
        // lseek is the only call that returns a dma-buf's size.
        let size = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(failed("lseek"))?;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed("fcntl(F_GETFL)"))?;
        Ok(DmaBuf {
            identity: Identity {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            size,
            writable: flags & OFlags::RWMODE == OFlags::RDWR,
            fd,
        })
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The identity of the dma-buf.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// True if the descriptor was opened for writing, which a writable mapping needs.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The kernel's report on the dma-buf at this moment.
    ///
    /// # Errors Reading `/proc/self/fdinfo` failed: procfs may not be mounted.
    pub fn info(&self) -> Result<Info, BufferError> {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let text = std::fs::read_to_string(&path)
            .map_err(|error| SystemError::new("read", path, Errno::from(&error)))?;
        Ok(parse_info(&text))
    }

    /// The exporter's name in the kernel, such as `udmabuf`; empty if procfs is not mounted.
    pub fn exporter(&self) -> String {
        self.info().unwrap_or_default().exporter
    }

    /// Sets the name in the kernel's listings, which helps to find the users of memory (`DMA_BUF_SET_NAME`).
    /// A later name replaces it.
    ///
    /// # Errors [`BufferError::Name`] for a name that the kernel does not accept: it accepts up to 31 bytes
    /// without NUL. Otherwise the ioctl's error.
    #[doc(alias = "DMA_BUF_SET_NAME")]
    pub fn set_name(&self, name: &str) -> Result<(), BufferError> {
        let unsuitable = || BufferError::Name {
            name: name.into(),
            limit: sys::dmabuf::NAME_LENGTH - 1,
        };
        if name.len() >= sys::dmabuf::NAME_LENGTH {
            return Err(unsuitable());
        }
        let text = CString::new(name).map_err(|_| unsuitable())?;
        let failed = |errno| SystemError::new("ioctl(DMA_BUF_SET_NAME)", name, errno);
        Ok(sys::dmabuf::set_name(self.fd.as_fd(), &text).map_err(failed)?)
    }

    /// Another file descriptor of the same buffer.
    ///
    /// # Errors The failed call; `EMFILE` if the process has too many open descriptors.
    pub fn try_clone(&self) -> Result<DmaBuf, BufferError> {
        let fd = self.fd.try_clone().map_err(|error| {
            SystemError::new("fcntl(F_DUPFD_CLOEXEC)", "a dma-buf", Errno::from(&error))
        })?;
        Ok(DmaBuf { fd, ..*self })
    }
}

/// Parses the `fdinfo` of a dma-buf: `pos`, `flags`, ... as for any file, then `size`, `count`, `exp_name`
/// and, if set, `name`. A name may contain anything, so a value extends to the end of its line, and the first
/// line with a key counts: `name` comes last.
#[doc(hidden)]
pub fn parse_info(text: &str) -> Info {
    let field = |key: &str| {
        let mut lines = text.lines();
        let found = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"));
        found.unwrap_or_default()
    };
    Info {
        exporter: field("exp_name").into(),
        name: field("name").into(),
        references: field("count").trim().parse().unwrap_or(0),
    }
}

impl AsFd for DmaBuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<DmaBuf> for OwnedFd {
    fn from(dmabuf: DmaBuf) -> OwnedFd {
        dmabuf.fd
    }
}

impl TryFrom<OwnedFd> for DmaBuf {
    type Error = BufferError;

    fn try_from(fd: OwnedFd) -> Result<DmaBuf, BufferError> {
        DmaBuf::from_fd(fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_is_read_with_a_name_and_without() {
        let text = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t7\nsize:\t4096\ncount:\t3\n\
                    exp_name:\tudmabuf\nname:\tcount:\t99 of them\n";
        let info = Info {
            exporter: "udmabuf".into(),
            name: "count:\t99 of them".into(),
            references: 3,
        };
        assert_eq!(parse_info(text), info);
        assert_eq!(parse_info("exp_name:\tx\n").name, "");
        assert_eq!(parse_info(""), Info::default());
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn what_is_not_a_dma_buf_is_named_as_such() {
        let fd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(
            DmaBuf::from_fd(fd),
            Err(BufferError::NotADmaBuf { .. })
        ));
    }
}
