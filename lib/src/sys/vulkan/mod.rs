//! Vulkan's calls with the crate `ash`, which loads `libvulkan.so.1` on first use.
//!
//! Each handle is destroyed with the value that holds it, and that value also holds everything
//! that the handle depends on. Numbers and flags for the driver come from the driver's own
//! answers, or are checked against them.

pub(crate) mod device;
pub(crate) mod memory;
pub(crate) mod shader;
mod spirv;
pub(crate) mod work;
