//! Shared host memory: memfds of a fixed size.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::buffer::{Buffer, Kind, Provenance};
use crate::error::{BufferError, SystemError};

/// The size of huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HugePages {
    /// 2 MiB.
    TwoMebibytes,
    /// 1 GiB.
    OneGibibyte,
}

impl HugePages {
    /// In bytes.
    pub fn size(self) -> u64 {
        match self {
            HugePages::TwoMebibytes => 2 << 20,
            HugePages::OneGibibyte => 1 << 30,
        }
    }

    fn flags(self) -> MemfdFlags {
        match self {
            HugePages::TwoMebibytes => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            HugePages::OneGibibyte => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        }
    }
}

/// A memfd of `length` zero bytes, sealed to this size so that no holder can make another's mapping fault.
/// With `None` it uses pages of the normal size. `name` is for diagnostics.
///
/// # Errors The failed call: `ENOMEM` or `EFBIG` for a length that the machine cannot hold, `EMFILE`.
pub fn sealed(name: &str, length: u64, pages: Option<HugePages>) -> Result<OwnedFd, SystemError> {
    let failed = |call| move |errno| SystemError::new(call, name, errno);
    let huge = pages.map_or(MemfdFlags::empty(), HugePages::flags);
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC | huge;
    let memfd = rustix::fs::memfd_create(name, flags).map_err(failed("memfd_create"))?;
    rustix::fs::ftruncate(&memfd, length).map_err(failed("ftruncate"))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memfd, seals).map_err(failed("fcntl(F_ADD_SEALS)"))?;
    Ok(memfd)
}

/// A buffer of `length` zero bytes in a sealed memfd, without a dma-buf.
///
/// # Errors
/// As [`sealed`].
pub fn buffer(name: &str, length: u64) -> Result<Buffer, BufferError> {
    let memfd = sealed(name, length, None)?;
    let provenance = Provenance {
        kind: Kind::Memfd,
        device: None,
        bar: None,
        name: name.into(),
    };
    Buffer::from_host_memory(memfd, None, provenance)
}
