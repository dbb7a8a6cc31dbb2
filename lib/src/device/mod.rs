//! Devices that both make buffers and use them: one open device serves [`export`](crate::export)
//! and [`import`](crate::import) alike.

pub mod drm;
pub mod edu;
pub mod v4l2;
pub mod vfio;
