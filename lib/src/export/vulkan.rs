//! Vulkan: memory that a driver allocates, as a dma-buf.
//!
//! An allocation names its handle type (`VkExportMemoryAllocateInfo`). Memory allocated without
//! it cannot be exported later. The driver chooses the location of the bytes.
//!
//! lavapipe needs no GPU and exports a udmabuf. Without `/dev/udmabuf` it still lists the
//! extension, but only imports.
//!
//! ```no_run
//! use peerbuf::{device::vulkan::Device, export::vulkan};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = &Device::all()?[0];
//! let memory = vulkan::export(device, "weights", 1 << 20)?;
//! println!("VkBuffer {:?} is {:?}", memory.handle(), memory.buffer().provenance());
//! # Ok(())
//! # }
//! ```

use ash::vk;

use super::whole_pages;
use crate::device::vulkan::{Device, Memory, USAGE};
use crate::error::{ExportError, Unavailable};

/// The names of the Vulkan devices of this machine.
///
/// # Errors
/// As [`Device::all`].
pub fn probe() -> Result<Vec<String>, Unavailable> {
    let devices = Device::all()?;
    Ok(devices
        .iter()
        .map(|device| device.name().to_owned())
        .collect())
}

/// Allocates `length` bytes, a multiple of the page size, with a `VkBuffer` for [`USAGE`] over
/// them, and exports them. `name` is for messages. The bytes are not cleared.
///
/// # Errors
/// [`ExportError::Unsuitable`] for a length that is zero or not page-aligned,
/// [`ExportError::Vulkan`] if the driver does not export or has no memory left.
pub fn export(device: &Device, name: &str, length: u64) -> Result<Memory, ExportError> {
    export_for(device, name, length, USAGE)
}

/// Like [`export`], for another usage of the `VkBuffer`.
///
/// # Errors
/// As [`export`].
pub fn export_for(
    device: &Device,
    name: &str,
    length: u64,
    usage: vk::BufferUsageFlags,
) -> Result<Memory, ExportError> {
    whole_pages(length)?;
    Memory::export(device, name, length, usage)
}
