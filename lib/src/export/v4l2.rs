//! V4L2: dma-bufs of the memory that a video device captures into (`VIDIOC_EXPBUF`).
//!
//! ```no_run
//! use std::time::Duration;
//! use peerbuf::{device::v4l2::VideoDevice, export::v4l2};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut camera = VideoDevice::open(&v4l2::probe()?[0])?;
//! camera.set_format(640, 480, *b"RGB3")?;
//! let capture = v4l2::export(&camera, 4)?;
//! let picture = capture.one(Duration::from_secs(1))?;
//! let buffer = &capture.buffers()[picture.index];
//! println!("{} of {} bytes of {buffer}", picture.bytes, buffer.size());
//! # Ok(())
//! # }
//! ```

use std::path::PathBuf;
use std::time::Duration;

use super::plain;
use crate::buffer::{Buffer, DmaBuf, Kind, Provenance};
use crate::device::v4l2::{Picture, Queue, VideoDevice, devices};
use crate::error::{ExportError, SystemError, Unavailable};
use crate::sys::v4l2::Memory;

/// The nodes of single-planar capture devices.
///
/// # Errors
/// [`Unavailable`] if there is none that this process may open.
pub fn probe() -> Result<Vec<PathBuf>, Unavailable> {
    devices()
}

/// A device's own buffers, exported, and the device that fills them. The buffers outlive this
/// value.
#[derive(Debug)]
pub struct Capture {
    queue: Queue,
    buffers: Vec<Buffer>,
}

/// Lets the device make `count` buffers for its present format, and exports each. The device
/// may make more buffers.
///
/// # Errors
/// The call that failed: `EBUSY` if another process captures, `ENOTTY` or `EINVAL` from a
/// driver that cannot export.
#[doc(alias = "VIDIOC_EXPBUF")]
pub fn export(device: &VideoDevice, count: u32) -> Result<Capture, ExportError> {
    let name = device.name();
    let address = device.device();
    let queue = device.queue(count, Memory::Own).map_err(plain)?;
    let mut buffers = Vec::new();
    for index in 0..queue.count() {
        let dmabuf = DmaBuf::from_fd(queue.export(index).map_err(plain)?)?;
        let provenance = Provenance {
            kind: Kind::V4l2,
            device: address,
            bar: None,
            name: format!("{name} buffer {index}"),
        };
        buffers.push(Buffer::from_dmabuf(dmabuf, provenance));
    }
    Ok(Capture { queue, buffers })
}

impl Capture {
    /// The buffers.
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// Captures one picture into one of the buffers, and stops.
    ///
    /// # Errors
    /// The call that failed: `ETIME` if no picture came within `limit`, `EIO` for a picture
    /// that the device marks as corrupted.
    pub fn one(&self, limit: Duration) -> Result<Picture, SystemError> {
        for index in 0..self.queue.count() {
            self.queue.give(index, None)?;
        }
        self.queue.start()?;
        let picture = self.queue.next(limit);
        self.queue.stop()?;
        picture
    }
}
