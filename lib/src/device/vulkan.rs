//! Vulkan devices: GPUs, and lavapipe, which runs a GPU's work on the CPU.
//!
//! The crate opens the loader, `libvulkan.so.1`, on first use ([`Device::all`]) and never links
//! it. A program with its own Vulkan device passes it to [`Device::from_raw`].
//!
//! A [`Memory`] is a `VkBuffer` whose memory is a dma-buf. [`export`](crate::export::vulkan)
//! allocates one, and [`import`](crate::import::vulkan) makes one from another exporter's
//! dma-buf. [`Device::submit`] runs work on the queue, ordered with other users of the dma-buf
//! by their fences.
//!
//! <https://registry.khronos.org/vulkan/specs/latest/man/html/VK_EXT_external_memory_dma_buf.html>

use ash::vk;

/// The bindings that define the types of this interface.
pub use ash;

pub use crate::sys::vulkan::device::{Device, Fences, NEEDED, Raw, USED};
pub use crate::sys::vulkan::memory::Memory;
pub use crate::sys::vulkan::shader::{Affine, Formula, Words};
pub use crate::sys::vulkan::work::{Use, Work};

/// The default usage of a `VkBuffer`: shader storage and transfers.
pub const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::STORAGE_BUFFER.as_raw()
        | vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::TRANSFER_DST.as_raw(),
);
