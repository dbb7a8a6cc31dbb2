//! Importers use buffers. Each kind has its own file, with the same functions: `probe` lists
//! what this machine has, `open` opens the importer, and `attach` attaches a buffer to it. The
//! attachment's plan names the path of the bytes.
//!
//! | module | importer | accepts |
//! |---|---|---|
//! | [`cpu`] | the CPU | buffers that can be mapped |
//! | [`file`](mod@file) | an NVMe disk, any file | all buffers that can be mapped, by the best path |
//! | [`drm`] | a GPU or display (PRIME) | dma-bufs that its driver can reach |
//! | [`gpu`] | a GPU, by CUDA, ROCm or Level Zero | what its driver takes: dma-bufs, registered memory |
//! | [`vulkan`] | a GPU, by Vulkan | dma-bufs that its driver can reach |
//! | [`v4l2`] | a video device captures into the buffer | whole dma-bufs |
//! | [`vfio`] | a device that this process drives | buffers that can be mapped and pinned |
//! | [`iommufd`] | a device that this process drives, by the newer interface | memfds, and dma-bufs of vfio-pci |
//! | [`mod@probe`] | none: asks the kernel for the mapping that a driver would get | dma-bufs |
//!
//! The crate `peerbuf-rdma` has importers for RDMA cards and libfabric engines.
//!
//! Each importer has its own functions, because each needs other parameters: an address, a
//! direction, a list of buffers. [`Importer`] is the common part: a program attaches a range,
//! reads its plan, and moves bytes into the range and out of it. Use [`Importer`] in programs
//! that support several kinds of importers, including their own.

pub mod cpu;
#[cfg(feature = "drm")]
pub mod drm;
pub mod file;
#[cfg(feature = "gpu")]
pub mod gpu;
#[cfg(feature = "vfio")]
pub mod iommufd;
#[cfg(feature = "module")]
pub mod probe;
#[cfg(feature = "v4l2")]
pub mod v4l2;
#[cfg(feature = "vfio")]
pub mod vfio;
#[cfg(feature = "vulkan")]
pub mod vulkan;

#[cfg(any(feature = "drm", feature = "v4l2", feature = "vulkan"))]
use crate::buffer::DmaBuf;
use crate::buffer::{Buffer, BufferRange};
#[cfg(any(feature = "drm", feature = "v4l2"))]
use crate::errno::Errno;
use crate::error::{ImportError, SystemError};
use crate::plan::{Plan, ReasonCode};

/// A user of buffers.
///
/// ```
/// use peerbuf::buffer::BufferRange;
/// use peerbuf::error::ImportError;
/// use peerbuf::export::memfd;
/// use peerbuf::import::{Importer, cpu::Processor};
///
/// fn fill(importer: &dyn Importer, range: &BufferRange, bytes: &[u8]) -> Result<(), ImportError> {
///     let mut attached = importer.attach(range)?;
///     match attached.write(bytes)? {
///         Some(plan) => println!("{} wrote it: {plan}", importer.name()),
///         None => println!("{} moves no bytes by itself", importer.name()),
///     }
///     Ok(())
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let buffer = memfd::export("example", 5)?;
/// fill(&Processor, &buffer.whole(), b"hello")?;
/// assert_eq!(buffer.whole().to_vec()?, b"hello");
/// # Ok(())
/// # }
/// ```
pub trait Importer: Send + Sync {
    /// Display name.
    fn name(&self) -> String;

    /// Attaches a range until the returned value is dropped.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] if the importer cannot use the buffer; the call that failed.
    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError>;
}

/// A range attached to an importer.
pub trait Attached: Send {
    /// The path of the importer's accesses, as far as it is known before a transfer.
    fn plan(&self) -> Plan;

    /// Writes bytes to the start of the range by the importer's own means: the disk's DMA, the
    /// graphics driver's mapping, and so on. Returns the path of the bytes; `None`, with
    /// nothing done, for an importer that moves no bytes by itself.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`](crate::error::BufferError::OutOfRange) if the range is
    /// shorter; the error of the transfer.
    fn write(&mut self, bytes: &[u8]) -> Result<Option<Plan>, ImportError>;

    /// Reads bytes from the start of the range, by the same means.
    ///
    /// # Errors
    /// As [`Attached::write`].
    fn read(&mut self, into: &mut [u8]) -> Result<Option<Plan>, ImportError>;
}

#[cfg(any(feature = "drm", feature = "v4l2", feature = "vulkan"))]
/// The dma-buf, for an importer that accepts nothing else.
fn dmabuf_of<'b>(buffer: &'b Buffer, importer: &str) -> Result<&'b DmaBuf, ImportError> {
    buffer.dmabuf().ok_or_else(|| {
        let evidence = "the buffer is host memory without a dma-buf".into();
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
/// The error for a driver's refusal of a dma-buf.
fn attach_refused(importer: &str, buffer: &Buffer, cause: &SystemError) -> ImportError {
    // The location of a foreign buffer is unknown, so the error must not say that it is in a device.
    let in_device = buffer.provenance().kind.is_device_memory()
        && !crate::plan::Plan::in_place(buffer)
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
            "the exporter or the importer's driver refuses the other",
        )
    };
    impossible(importer, buffer, code, format!("{cause}: {why}"))
}

/// The error for a range that cannot be mapped.
fn not_mappable(importer: &str, range: &BufferRange, cause: &SystemError) -> ImportError {
    let why = "the exporter does not support mmap";
    let evidence = format!("{cause}: {why}");
    impossible(importer, range.buffer(), ReasonCode::NotMappable, evidence)
}

#[cfg(all(test, feature = "drm"))]
mod tests {
    use crate::buffer::{Kind, Provenance};

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_driver_that_refuses_a_foreign_buffer_is_not_said_to_miss_device_memory() {
        let device = "ffff:fe:00.0".parse().ok();
        for (kind, device, code) in [
            (Kind::Other, None, ReasonCode::AttachRefused),
            (Kind::Other, device, ReasonCode::AttachRefused),
            (Kind::Drm, device, ReasonCode::AttachRefused),
            (Kind::Vfio, device, ReasonCode::ImporterNotPeer),
        ] {
            let memory = crate::export::memfd::sealed("a buffer", 4096).unwrap();
            let provenance = Provenance {
                kind,
                device,
                bar: None,
                name: "a buffer".into(),
            };
            let buffer = Buffer::from_host_memory(memory, None, provenance).unwrap();
            let cause = SystemError::new("ioctl", "a card", Errno::OPNOTSUPP);
            let error = attach_refused("a card", &buffer, &cause);
            let ImportError::Impossible { code: got, .. } = &error else {
                panic!("{error:?}");
            };
            assert_eq!(*got, code, "{kind:?}: {error}");
            let in_device = error.to_string().contains("in device memory");
            assert_eq!(in_device, code == ReasonCode::ImporterNotPeer, "{error}");
        }
    }
}
