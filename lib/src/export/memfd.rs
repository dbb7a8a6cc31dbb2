//! Plain sealed memory: the stand-in for an exporter on a machine that has none.
//!
//! Files and the CPU can use such a buffer like any other. There is no dma-buf, so it cannot be
//! attached to a device.

use std::os::fd::OwnedFd;

use memfd::{FileSeal, MemfdOptions};

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

/// A memfd of `length` bytes that keeps that size for ever, so that no holder of it can make the
/// others' mappings fault.
pub(crate) fn sealed(name: &str, length: u64) -> Result<OwnedFd, ExportError> {
    let system = |call: &'static str, errno: i32| ExportError::System {
        cause: SystemError::new(call, name, Errno(errno)),
        hint: String::new(),
    };
    let memfd = MemfdOptions::new()
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
