//! VFIO: a device that this process drives reaches a buffer at an I/O virtual address.
//!
//! The type 1 IOMMU maps memory that the process has mapped: pages that can be pinned, and BARs
//! without struct pages. A dma-buf's own mapping is neither, so a udmabuf uses the memfd behind
//! it.
//!
//! ```no_run
//! use peerbuf::{device::vfio::VfioDevice, export::udmabuf, import::vfio::VfioImporter};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = VfioDevice::open("0000:41:00.0".parse()?)?;
//! device.enable()?;
//! let buffer = udmabuf::export("ring", 1 << 16)?;
//! let ring = VfioImporter::new(&device).attach(&buffer.whole(), 0x10_0000)?;
//! let mut registers = device.registers(0)?;
//! registers.write::<u64>(0x18, ring.iova())?; // whatever tells this device where it is
//! # Ok(())
//! # }
//! ```

use super::{impossible, not_mappable};
use crate::buffer::{BufferRange, Mapping};
use crate::device::vfio::VfioDevice;
use crate::errno::Errno;
use crate::error::{BufferError, ImportError, Unavailable};
use crate::plan::{Plan, ReasonCode};
use crate::sys;
use crate::topology::PciAddress;
use peerbuf_core::limits::on_pinning;

/// The devices bound to `vfio-pci`.
///
/// # Errors
/// [`Unavailable`] if there is none.
pub fn probe() -> Result<Vec<PciAddress>, Unavailable> {
    crate::device::vfio::devices()
}

/// A device as an importer.
#[derive(Debug, Clone)]
pub struct VfioImporter {
    device: VfioDevice,
}

impl VfioImporter {
    /// Makes an importer from a device.
    pub fn new(device: &VfioDevice) -> VfioImporter {
        let device = device.clone();
        VfioImporter { device }
    }

    /// Display name: the device.
    pub fn name(&self) -> String {
        format!("{} (vfio-pci)", self.device.address())
    }

    /// Maps the range for the device at `iova` (`VFIO_IOMMU_MAP_DMA`), writable if the buffer
    /// is writable. The range and the address must be page-aligned.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] with [`ReasonCode::NotMappable`],
    /// [`ReasonCode::NotPinnable`] (also above the limit on locked memory), or
    /// [`ReasonCode::Misaligned`]; `EEXIST` if the address is already mapped.
    #[doc(alias = "VFIO_IOMMU_MAP_DMA")]
    pub fn attach(&self, range: &BufferRange, iova: u64) -> Result<Attachment, ImportError> {
        let page = rustix::param::page_size() as u64;
        if !(range.offset() | range.len() | iova).is_multiple_of(page) || range.is_empty() {
            let evidence = format!(
                "{} bytes from {} on, at {iova:#x}, are not whole pages of {page} bytes",
                range.len(),
                range.offset()
            );
            let buffer = range.buffer();
            return Err(impossible(
                &self.name(),
                buffer,
                ReasonCode::Misaligned,
                evidence,
            ));
        }
        let mapping = range
            .map(range.buffer().allowed())
            .map_err(|error| match error {
                BufferError::System(cause) | BufferError::NotMappable { cause } => {
                    not_mappable(&self.name(), range, &cause)
                }
                other => other.into(),
            })?;
        let window = mapping.map().window(0, range.len() as usize);
        let mapped = sys::vfio::map_dma(self.device.container(), window, iova);
        mapped.map_err(|errno| {
            let cause = self.device.failed("ioctl(VFIO_IOMMU_MAP_DMA)")(errno);
            // The kernel's errors for pages of a peer, and for a mapping without struct pages.
            if matches!(errno, Errno::FAULT | Errno::REMOTEIO | Errno::OPNOTSUPP) {
                let evidence = format!("{cause}: the kernel does not pin this memory");
                let (buffer, code) = (range.buffer(), ReasonCode::NotPinnable);
                return impossible(&self.name(), buffer, code, evidence);
            }
            if errno == Errno::NOMEM {
                let evidence = format!("{cause}{}", on_pinning(errno));
                let (buffer, code) = (range.buffer(), ReasonCode::NotPinnable);
                return impossible(&self.name(), buffer, code, evidence);
            }
            cause.into()
        })?;
        Ok(Attachment {
            device: self.device.clone(),
            mapping,
            iova,
        })
    }
}

/// A range attached to a device. Dropping it ends the device's access to the range.
#[derive(Debug)]
pub struct Attachment {
    device: VfioDevice,
    mapping: Mapping,
    iova: u64,
}

impl Attachment {
    /// The address of the range's first byte for the device.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// The path of the device's accesses. An IOMMU mapping of a peer's BAR does not mean that
    /// the bridges between the two devices pass bytes: verify a transfer before you rely on it.
    pub fn plan(&self) -> Plan {
        Plan::in_place(self.mapping.range().buffer())
    }

    /// The mapping for the CPU.
    pub fn mapping(&mut self) -> &mut Mapping {
        &mut self.mapping
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // The kernel fails this only for an unmapped address.
        let length = self.mapping.len();
        let _ = sys::vfio::unmap_dma(self.device.container(), self.iova, length);
    }
}
