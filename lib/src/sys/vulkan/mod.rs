//! Vulkan's calls, by the crate `ash`, which opens the loader (`libvulkan.so.1`) when it is asked for.
//!
//! A handle here is destroyed with the value that holds it, and what it depends on is held beside it. Numbers and
//! flags that go to the driver come from the driver's own answers, or are checked against them.

pub(crate) mod device;
pub(crate) mod memory;
pub(crate) mod shader;
mod spirv;
pub(crate) mod work;
