//! DRM: dma-bufs of buffers that a graphics driver made (PRIME).
//!
//! ```no_run
//! use peerbuf::{device::drm::Card, export::drm};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let card = Card::open(&drm::probe()?[0])?;
//! let buffer = drm::export(&card, "surface", 1 << 20)?; // a dumb buffer
//! # let handle = std::num::NonZeroU32::new(1).unwrap();
//! let other = drm::export_handle(&card, handle, "texture")?; // one that you made
//! # Ok(())
//! # }
//! ```

use std::num::NonZeroU32;
use std::path::PathBuf;

use super::{plain, whole_pages};
use crate::buffer::{Buffer, DmaBuf, Kind, Provenance};
use crate::device::drm::{Card, cards};
use crate::error::{ExportError, Unavailable};

/// The card nodes of this machine. Opening a node, or its driver, may still fail.
///
/// # Errors
/// [`Unavailable`] if there is none.
pub fn probe() -> Result<Vec<PathBuf>, Unavailable> {
    cards()
}

/// Makes and exports a dumb buffer of `length` zero bytes, a multiple of the page size. Every
/// driver with a display has dumb buffers. The dma-buf alone keeps the buffer alive. `name` is
/// for messages.
///
/// # Errors
/// [`ExportError::Unsuitable`] for a length that is zero or not page-aligned, and the ioctls'
/// own errors: `EOPNOTSUPP` or `ENOSYS` from a driver without dumb buffers, `EACCES` on a
/// render node, which has none.
pub fn export(card: &Card, name: &str, length: u64) -> Result<Buffer, ExportError> {
    whole_pages(length)?;
    // The rows of this dumb buffer have 4096 bytes, which divides every page size.
    let rows = u32::try_from(length / 4096).map_err(|_| ExportError::Unsuitable {
        what: "the length",
        value: length,
        must: "less than 16 TiB".into(),
    })?;
    let gem = card.allocate(rows).map_err(plain)?;
    let buffer = wrap(card, gem.handle().into(), name)?;
    // The driver may round up a row, and the buffer must have the requested size.
    if buffer.size() != length {
        return Err(ExportError::Unsuitable {
            what: "the length",
            value: length,
            must: format!("{} for this driver's rows", buffer.size()),
        });
    }
    Ok(buffer)
}

/// Exports the GEM buffer of a handle that the caller made on this card through the driver's
/// own interface. The caller keeps the handle. `name` is for messages.
///
/// # Errors
/// The ioctl's error: `ENOENT` for a handle that is not valid here, `ENOSYS` from a driver
/// without PRIME.
#[doc(alias = "DRM_IOCTL_PRIME_HANDLE_TO_FD")]
#[doc(alias = "drmPrimeHandleToFD")]
pub fn export_handle(card: &Card, handle: NonZeroU32, name: &str) -> Result<Buffer, ExportError> {
    wrap(card, handle, name)
}

fn wrap(card: &Card, handle: NonZeroU32, name: &str) -> Result<Buffer, ExportError> {
    let fd = card.export(handle.into()).map_err(plain)?;
    let provenance = Provenance {
        kind: Kind::Drm,
        device: card.device(),
        bar: None,
        name: name.into(),
    };
    Ok(Buffer::from_dmabuf(DmaBuf::from_fd(fd)?, provenance))
}
