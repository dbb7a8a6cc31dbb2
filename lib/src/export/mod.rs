//! Exporters make buffers. Each kind has its own file, with the same functions: `probe` checks the
//! exporter's requirements and reports the missing one, `export` makes a buffer.
//!
//! | module | memory | needs |
//! |---|---|---|
//! | [`peerbuf`] | a BAR of any PCI device | peerbuf.ko |
//! | [`provider`] | memory that another driver lends to peers, such as an NVMe controller memory buffer | peerbuf.ko |
//! | [`vfio`] | a BAR of a PCI device that this process drives | `vfio-pci` and an IOMMU |
//! | [`drm`] | buffers of a GPU or display driver, or system memory | a DRM driver, such as `vgem` |
//! | [`gpu`] | memory of a GPU program: a pointer of CUDA, ROCm or Level Zero | the runtime's library |
//! | [`v4l2`] | pictures of a video device | a capture device, such as `vivid` |
//! | [`vulkan`] | memory that a Vulkan driver allocates | a Vulkan driver; lavapipe needs no GPU |
//! | [`heap`] | system memory, or memory that a platform reserves | `/dev/dma_heap` |
//! | [`udmabuf`] | memory of this process, and received memfds | `/dev/udmabuf` |
//! | [`memfd`] | system memory, without a dma-buf | nothing |

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

/// Refuses a length that is not a whole number of pages.
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
