//! Importers: what uses buffers. One file per kind, with the same verbs in each: `probe` says
//! what there is, `open` takes what is to use buffers, and `attach` brings the two together. The
//! attachment names the path of the bytes in its plan.
//!
//! | module | who uses the buffer | takes |
//! |---|---|---|
//! | [`cpu`] | the processor | what can be mapped |
//! | [`file`](mod@file) | an NVMe disk, any file | anything that can be mapped, by the best path |
//! | [`drm`] | a GPU or display (PRIME) | dma-bufs that its driver can reach |
//! | [`v4l2`] | a video device captures into it | whole dma-bufs |
//! | [`vfio`] | a device that this process drives | what can be mapped and pinned |
//! | [`iommufd`] | the same, by the newer interface | memfds, and dma-bufs of vfio-pci |
//! | [`mod@probe`] | nobody: asks the kernel what it would give a device's driver | dma-bufs |
//!
//! RDMA cards, and engines on libfabric, are importers of the crate `peerbuf-rdma`.

pub mod cpu;
#[cfg(feature = "drm")]
pub mod drm;
pub mod file;
#[cfg(feature = "vfio")]
pub mod iommufd;
#[cfg(feature = "module")]
pub mod probe;
#[cfg(feature = "v4l2")]
pub mod v4l2;
#[cfg(feature = "vfio")]
pub mod vfio;

#[cfg(any(feature = "drm", feature = "v4l2"))]
use crate::buffer::DmaBuf;
use crate::buffer::{Buffer, BufferRange};
#[cfg(any(feature = "drm", feature = "v4l2"))]
use crate::errno::Errno;
use crate::error::{ImportError, SystemError};
use crate::plan::ReasonCode;

#[cfg(any(feature = "drm", feature = "v4l2"))]
/// The dma-buf, for an importer that takes nothing else.
fn dmabuf_of<'b>(buffer: &'b Buffer, importer: &str) -> Result<&'b DmaBuf, ImportError> {
    buffer.dmabuf().ok_or_else(|| {
        let evidence = "it is memory alone, without a dma-buf over it".into();
        impossible(importer, buffer, ReasonCode::NoDmaBuf, evidence)
    })
}

fn impossible(importer: &str, buffer: &Buffer, code: ReasonCode, evidence: String) -> ImportError {
    ImportError::Impossible {
        importer: importer.to_owned(),
        buffer: buffer.name().to_owned(),
        code,
        evidence,
    }
}

#[cfg(any(feature = "drm", feature = "v4l2"))]
/// What a driver's refusal of a dma-buf means.
fn attach_refused(importer: &str, buffer: &Buffer, cause: &SystemError) -> ImportError {
    let in_device = !crate::plan::Plan::in_place(buffer)
        .reasons
        .iter()
        .any(|reason| reason.code == ReasonCode::NotDeviceMemory);
    let unsupported = matches!(cause.errno, Errno::OPNOTSUPP | Errno::NOTSUPP);
    let (code, why) = if in_device && unsupported {
        (
            ReasonCode::ImporterNotPeer,
            "its bytes are in device memory, and the importer's driver did not say that it can \
             reach that, or let it go again",
        )
    } else {
        (
            ReasonCode::AttachRefused,
            "one of the two drivers does not take the other",
        )
    };
    impossible(importer, buffer, code, format!("{cause}: {why}"))
}

/// What it means that a range cannot be mapped.
fn not_mappable(importer: &str, range: &BufferRange, cause: &SystemError) -> ImportError {
    let why = "the exporter gives the processor no mapping of it";
    let evidence = format!("{cause}: {why}");
    impossible(importer, range.buffer(), ReasonCode::NotMappable, evidence)
}
