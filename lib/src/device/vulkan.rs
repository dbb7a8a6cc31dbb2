//! Vulkan devices: GPUs, and lavapipe, which has the processor do a GPU's work.
//!
//! The loader, `libvulkan.so.1`, is opened when it is asked for ([`Device::all`]); nothing is linked. A program
//! with a Vulkan device of its own gives that ([`Device::from_raw`]).
//!
//! A [`Memory`] is a `VkBuffer` whose memory has a dma-buf: [`export`](crate::export::vulkan) allocates one,
//! [`import`](crate::import::vulkan) makes one of a dma-buf that somebody else exported. [`Device::submit`] has the
//! queue work on it in turn with others that use the dma-buf, by their fences.
//!
//! <https://registry.khronos.org/vulkan/specs/latest/man/html/VK_EXT_external_memory_dma_buf.html>

use ash::vk;

/// The bindings whose types are used here.
pub use ash;

pub use crate::sys::vulkan::device::{Device, Fences, NEEDED, Raw, USED};
pub use crate::sys::vulkan::memory::Memory;
pub use crate::sys::vulkan::shader::{Affine, Formula, Words};
pub use crate::sys::vulkan::work::{Use, Work};

/// What a `VkBuffer` is for unless something else is asked for: shaders' storage, and transfers.
pub const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::STORAGE_BUFFER.as_raw()
        | vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::TRANSFER_DST.as_raw(),
);
