//! Devices that both make and use buffers: one open device serves [`export`](crate::export) and
//! [`import`](crate::import).

#[cfg(feature = "drm")]
pub mod drm;
#[cfg(feature = "vfio")]
pub mod edu;
#[cfg(feature = "v4l2")]
pub mod v4l2;
#[cfg(feature = "vfio")]
pub mod vfio;
#[cfg(feature = "vulkan")]
pub mod vulkan;
