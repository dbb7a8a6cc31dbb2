//! Exporters make buffers. Each kind has its own file, with the same functions: `probe` checks the
//! exporter's requirements and reports the missing one, `export` makes a buffer.
//!
//! | module | whose memory | needs |
//! |---|---|---|
//! | [`peerbuf`] | a BAR of any PCI device | peerbuf.ko |
//! | [`provider`] | memory that another driver publishes for peers: an NVMe controller memory buffer | peerbuf.ko |
//! | [`vfio`] | a BAR of a PCI device that this process drives | `vfio-pci` and an IOMMU |
//! | [`drm`] | a GPU's or display driver's, or the system's | a DRM driver, such as `vgem` |
//! | [`gpu`] | what a GPU program has: a pointer of CUDA, ROCm or Level Zero | the runtime's library |
//! | [`v4l2`] | pictures of a video device | a capture device, such as `vivid` |
//! | [`vulkan`] | a GPU's, as Vulkan's drivers allocate it | a Vulkan driver; lavapipe needs no GPU |
//! | [`heap`] | the system's, or what a platform sets aside | `/dev/dma_heap` |
//! | [`udmabuf`] | this process's own, and memfds that others gave it | `/dev/udmabuf` |
//! | [`memfd`] | the system's, without a dma-buf: the stand-in | nothing |

#[cfg(feature = "drm")]
pub mod drm;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod heap;
pub mod memfd;
#[cfg(feature = "module")]
pub mod peerbuf;
#[cfg(feature = "module")]
pub mod provider;
mod room;
pub mod udmabuf;
#[cfg(feature = "v4l2")]
pub mod v4l2;
#[cfg(feature = "vfio")]
pub mod vfio;
#[cfg(feature = "vulkan")]
pub mod vulkan;

use crate::error::{ExportError, SystemError};

/// Refuses a length that is no whole number of pages.
fn whole_pages(length: u64) -> Result<(), ExportError> {
    let page = rustix::param::page_size() as u64;
    if length == 0 || !length.is_multiple_of(page) {
        return Err(ExportError::Unsuitable {
            what: "the length",
            value: length,
            must: format!("a multiple of the page size, {page}, and not 0"),
        });
    }
    Ok(())
}

/// A failure that needs no hint.
fn plain(cause: SystemError) -> ExportError {
    let hint = String::new();
    ExportError::System { cause, hint }
}
