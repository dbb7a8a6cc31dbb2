//! Vulkan: memory that a driver allocates, as a dma-buf.
//!
//! The handle type is named when memory is allocated (`VkExportMemoryAllocateInfo`): memory that was allocated
//! without it cannot be exported later. Where the bytes are is the driver's choice.
//!
//! lavapipe, which needs no GPU, exports a udmabuf. It lists the extension without `/dev/udmabuf`, too, and then
//! only imports.
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

/// The names of the devices that there are.
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

/// Allocates `length` bytes, a multiple of the page size, with a `VkBuffer` for [`USAGE`] over them,
/// and exports them. `name` is for people. The bytes are not cleared.
///
/// # Errors
/// [`ExportError::Unsuitable`] for a length of zero or off a page, [`ExportError::Vulkan`] where the driver does
/// not export or has no memory left.
pub fn export(device: &Device, name: &str, length: u64) -> Result<Memory, ExportError> {
    export_for(device, name, length, USAGE)
}

/// The same for other usages of the `VkBuffer`.
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
