//! VFIO: a dma-buf of part of a BAR of a device that this process drives.
//!
//! The kernel supports no CPU mapping of such a dma-buf. The device's own descriptor can be
//! mapped, so a buffer can be mapped in the process that exported it, and not in a process that
//! received it.

use super::plain;
use crate::Errno;
use crate::buffer::{Access, Buffer, DmaBuf, Kind, Provenance};
use crate::device::vfio::{VfioDevice, devices};
use crate::error::{ExportError, SystemError, Unavailable};
use crate::sys;
use crate::topology::PciAddress;

use rustix::fs::OFlags;

/// The devices bound to `vfio-pci`. Opening a device may still fail, and a kernel without
/// `CONFIG_VFIO_PCI_DMABUF` exports nothing.
///
/// # Errors
/// [`Unavailable`] if there is none.
pub fn probe() -> Result<Vec<PciAddress>, Unavailable> {
    devices()
}

/// The parameters of an export.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// The BAR's index.
    pub bar: u8,
    /// Offset in the BAR in bytes, a multiple of the page size. Exports may overlap.
    pub offset: u64,
    /// Length in bytes, a multiple of the page size.
    pub length: u64,
    /// The access that the descriptor allows. [`Access::Write`] counts as [`Access::ReadWrite`].
    pub access: Access,
}

/// Exports part of a BAR (`VFIO_DEVICE_FEATURE_DMA_BUF`). A reset of the device, or switching
/// off its memory decoding, revokes the memory from importers.
///
/// # Errors
/// [`ExportError::Unavailable`] from a kernel without the feature. Otherwise the ioctl's error:
/// `EINVAL` for a range that is not page-aligned or outside the BAR, `ENODEV` for a BAR that
/// does not exist, `EOPNOTSUPP` if the device's driver does not support the feature.
#[doc(alias = "VFIO_DEVICE_FEATURE_DMA_BUF")]
pub fn export(device: &VfioDevice, request: Request) -> Result<Buffer, ExportError> {
    let writes = if request.access.writes() {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    let flags = (writes | OFlags::CLOEXEC).bits();
    let Request {
        bar,
        offset,
        length,
        ..
    } = request;
    let exported = sys::vfio::export_dma_buf(device.device(), bar.into(), offset, length, flags);
    let failed = device.failed("ioctl(VFIO_DEVICE_FEATURE_DMA_BUF)");
    let fd = exported.map_err(|errno| refused(failed(errno)))?;
    let region = device.region(bar.into()).map_err(plain)?;
    let provenance = Provenance {
        kind: Kind::Vfio,
        device: Some(device.address()),
        bar: Some(bar),
        name: format!("{} BAR {bar} at {offset:#x}", device.address()),
    };
    let dmabuf = DmaBuf::from_fd(fd)?;
    if region.flags & sys::vfio::REGION_MMAP == 0 {
        return Ok(Buffer::from_dmabuf(dmabuf, provenance));
    }
    let view = device.another_descriptor().map_err(plain)?;
    let at = region.offset + offset;
    Ok(Buffer::from_dmabuf_and_view(dmabuf, view, at, provenance))
}

/// The error for a refused export.
fn refused(cause: SystemError) -> ExportError {
    if cause.errno != Errno::NOTTY {
        return plain(cause);
    }
    ExportError::Unavailable(Unavailable {
        what: "dma-bufs of vfio-pci",
        cause,
        remedy: "Linux 6.19 or later with CONFIG_VFIO_PCI_DMABUF".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_the_feature_lacks_it_and_other_errors_are_failures() {
        let error = |errno| {
            let call = "ioctl(VFIO_DEVICE_FEATURE_DMA_BUF)";
            refused(SystemError::new(call, "0000:00:13.0", errno))
        };
        assert!(matches!(error(Errno::NOTTY), ExportError::Unavailable(_)));
        assert!(
            error(Errno::NOTTY)
                .to_string()
                .contains("CONFIG_VFIO_PCI_DMABUF")
        );
        assert!(matches!(error(Errno::INVAL), ExportError::System { .. }));
    }
}
