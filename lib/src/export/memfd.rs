//! Plain sealed memory: the stand-in for an exporter on a machine that has none.
//!
//! Files and the CPU can use such a buffer like any other. There is no dma-buf, so it cannot be
//! attached to a device.

use std::os::fd::OwnedFd;

use memfd::{FileSeal, HugetlbSize, MemfdOptions};

use crate::buffer::{Buffer, Kind, Provenance};
use crate::errno::Errno;
use crate::error::{ExportError, SystemError};

/// Makes a buffer of `length` zero bytes of system memory. `name` is for people.
///
/// # Errors
/// The call that failed: `ENOMEM` or `EFBIG` for a length that the machine cannot hold, `EMFILE`.
pub fn export(name: &str, length: u64) -> Result<Buffer, ExportError> {
    let memfd = sealed(name, length)?;
    let provenance = Provenance {
        kind: Kind::Memfd,
        device: None,
        bar: None,
        name: name.into(),
    };
    Ok(Buffer::from_host_memory(memfd, None, provenance)?)
}

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
}

/// A memfd of `length` bytes that keeps that size for ever, so that no holder of it can make the
/// others' mappings fault.
pub(crate) fn sealed(name: &str, length: u64) -> Result<OwnedFd, ExportError> {
    make(name, length, MemfdOptions::new())
}

/// The same of huge pages.
pub(crate) fn sealed_huge(
    name: &str,
    length: u64,
    pages: HugePages,
) -> Result<OwnedFd, ExportError> {
    let size = match pages {
        HugePages::TwoMebibytes => HugetlbSize::Huge2MB,
        HugePages::OneGibibyte => HugetlbSize::Huge1GB,
    };
    make(name, length, MemfdOptions::new().hugetlb(Some(size)))
}

fn make(name: &str, length: u64, options: MemfdOptions) -> Result<OwnedFd, ExportError> {
    let system = |call: &'static str, errno: i32| ExportError::System {
        cause: SystemError::new(call, name, Errno(errno)),
        hint: String::new(),
    };
    let memfd = options
        .allow_sealing(true)
        .close_on_exec(true)
        .create(name)
        .map_err(|error| system("memfd_create", memfd_errno(&error)))?;
    memfd
        .as_file()
        .set_len(length)
        .map_err(|error| system("ftruncate", error.raw_os_error().unwrap_or(Errno::IO.0)))?;
    memfd
        .add_seals(&[FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal])
        .map_err(|error| system("fcntl(F_ADD_SEALS)", memfd_errno(&error)))?;
    Ok(memfd.into_file().into())
}

fn memfd_errno(error: &memfd::Error) -> i32 {
    use memfd::Error::{AddSeals, Create, GetSeals};
    let (Create(error) | AddSeals(error) | GetSeals(error)) = error;
    error.raw_os_error().unwrap_or(Errno::IO.0)
}
