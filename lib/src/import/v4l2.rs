//! V4L2: a video device captures straight into a buffer (`V4L2_MEMORY_DMABUF`).
//!
//! ```no_run
//! use std::time::Duration;
//! use peerbuf::{device::v4l2::VideoDevice, export::udmabuf, import::v4l2};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut camera = VideoDevice::open("/dev/video0")?;
//! let format = camera.set_format(640, 480, *b"RGB3")?;
//! let size = u64::from(format.size).next_multiple_of(4096);
//! let buffers = [udmabuf::export("one", size)?, udmabuf::export("two", size)?];
//! let ranges = [buffers[0].whole(), buffers[1].whole()];
//! let capture = v4l2::attach(&camera, &ranges)?;
//! let picture = capture.one(Duration::from_secs(1))?;
//! println!("picture {} is in {}", picture.sequence, buffers[picture.index]);
//! # Ok(())
//! # }
//! ```

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use super::{attach_refused, dmabuf_of, impossible};
use crate::buffer::{BufferRange, DmaBuf};
use crate::device::v4l2::{Picture, Queue, VideoDevice, devices};
use crate::error::{BufferError, ImportError, Unavailable};
use crate::plan::{Plan, ReasonCode};
use crate::sys::v4l2::Memory;

/// The nodes of single-planar capture devices.
///
/// # Errors
/// [`Unavailable`] if there is none that this process may open.
pub fn probe() -> Result<Vec<PathBuf>, Unavailable> {
    devices()
}

/// Attaches buffers to a capture device. The driver checks each buffer only in
/// [`Attachment::give`], which therefore returns the driver's refusal.
///
/// # Errors
/// [`ImportError::Impossible`] with [`ReasonCode::NotWhole`] for a range with an offset in its
/// buffer (the interface has no offsets), [`ReasonCode::TooSmall`] for a range that is too
/// small for a picture of the present format, or [`ReasonCode::NoDmaBuf`];
/// [`ImportError::Buffer`] for a buffer that may not be written; the call that failed: `EBUSY`
/// while the device has other buffers.
#[doc(alias = "V4L2_MEMORY_DMABUF")]
pub fn attach(device: &VideoDevice, ranges: &[BufferRange]) -> Result<Attachment, ImportError> {
    let name = device.name();
    let format = device.format()?;
    for range in ranges {
        let buffer = range.buffer();
        dmabuf_of(buffer, &name)?;
        if !buffer.is_writable() {
            let object = buffer.name().to_owned();
            let wanted = "write";
            return Err(BufferError::Access { object, wanted }.into());
        }
        if range.offset() != 0 {
            let evidence = format!(
                "the range begins at offset {}, but V4L2 writes a buffer from its beginning",
                range.offset()
            );
            return Err(impossible(&name, buffer, ReasonCode::NotWhole, evidence));
        }
        if range.len() < u64::from(format.size) {
            let evidence = format!(
                "the range has {} bytes, but a picture has {}",
                range.len(),
                format.size
            );
            return Err(impossible(&name, buffer, ReasonCode::TooSmall, evidence));
        }
    }
    let count = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    let queue = device.queue(count, Memory::DmaBuf)?;
    Ok(Attachment {
        queue,
        ranges: ranges.to_vec(),
    })
}

/// Buffers attached to a video device.
#[derive(Debug)]
pub struct Attachment {
    queue: Queue,
    ranges: Vec<BufferRange>,
}

impl Attachment {
    /// The buffers.
    pub fn ranges(&self) -> &[BufferRange] {
        &self.ranges
    }

    /// The path of the pictures' bytes into the buffer with this index.
    pub fn plan(&self, index: usize) -> Option<Plan> {
        Some(Plan::in_place(self.ranges.get(index)?.buffer()))
    }

    /// Gives the device the buffer with this index, to capture a picture into. Nobody else may
    /// use the buffer until [`Attachment::next`] returns it, or [`Attachment::stop`] returns
    /// all buffers.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] if the driver cannot use the buffer; `EINVAL` for an index
    /// out of range, or a buffer that the device already has.
    #[doc(alias = "VIDIOC_QBUF")]
    pub fn give(&self, index: usize) -> Result<(), ImportError> {
        let range = self.ranges.get(index);
        let dmabuf: Option<&DmaBuf> = range.and_then(|range| range.buffer().dmabuf());
        let given = self.queue.give(index as u32, dmabuf);
        given.map_err(|cause| match range {
            Some(range) => attach_refused(&self.queue.device().name(), range.buffer(), &cause),
            None => cause.into(),
        })
    }

    /// Starts capturing into the given buffers.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn start(&self) -> Result<(), ImportError> {
        Ok(self.queue.start()?)
    }

    /// Waits for the next picture, and returns its buffer to the caller.
    ///
    /// # Errors
    /// The call that failed: `ETIME` if no picture came within `limit`, `EIO` for a picture
    /// that the device marks as corrupted.
    #[doc(alias = "VIDIOC_DQBUF")]
    pub fn next(&self, limit: Duration) -> Result<Picture, ImportError> {
        Ok(self.queue.next(limit)?)
    }

    /// Stops capturing and returns every buffer to the caller. The device writes no more on
    /// return.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn stop(&self) -> Result<(), ImportError> {
        Ok(self.queue.stop()?)
    }

    /// Captures one picture into one of the buffers, and stops.
    ///
    /// # Errors
    /// The errors of [`Attachment::give`], [`Attachment::start`], [`Attachment::next`] and
    /// [`Attachment::stop`].
    pub fn one(&self, limit: Duration) -> Result<Picture, ImportError> {
        for index in 0..self.ranges.len() {
            self.give(index)?;
        }
        self.start()?;
        let picture = self.next(limit);
        self.stop()?;
        picture
    }
}

/// Readable if a picture is ready ([`Attachment::next`] with a limit of zero), for programs
/// with an event loop.
impl AsFd for Attachment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.device().as_fd()
    }
}
