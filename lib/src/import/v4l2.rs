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

/// The nodes of devices that capture into buffers of one plane.
///
/// # Errors
/// [`Unavailable`] where there is none that this process may open.
pub fn probe() -> Result<Vec<PathBuf>, Unavailable> {
    devices()
}

/// Brings a device and the buffers that it is to capture into together. The driver looks at each
/// only when it is given to the device, so that its refusal comes from there.
///
/// # Errors
/// [`ImportError::Impossible`] with [`ReasonCode::NotWhole`] for a range that does not begin where
/// its buffer does (the interface has no place for an offset), [`ReasonCode::TooSmall`] for one
/// that a picture of the present format does not fit in, or [`ReasonCode::NoDmaBuf`];
/// [`ImportError::Buffer`] for one that may not be written; the call that failed: `EBUSY` while the device has
/// other buffers.
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

/// Buffers and a video device, brought together.
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

    /// How the pictures' bytes get into the buffer at this place in the list.
    pub fn plan(&self, index: usize) -> Option<Plan> {
        Some(Plan::in_place(self.ranges.get(index)?.buffer()))
    }

    /// Gives the device a buffer by its place in the list, to capture a picture into. Nobody else
    /// may use it until [`Attachment::next`] gives it back, or [`Attachment::stop`] all.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] where the driver cannot use the buffer; `EINVAL` for a place
    /// that is not there or a buffer that the device has already.
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

    /// Starts capturing into what was given.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn start(&self) -> Result<(), ImportError> {
        Ok(self.queue.start()?)
    }

    /// Waits for the next picture. The buffer that it is in is the caller's again.
    ///
    /// # Errors
    /// The call that failed: `ETIME` when none came within `limit`, `EIO` for one that the device
    /// calls spoilt.
    #[doc(alias = "VIDIOC_DQBUF")]
    pub fn next(&self, limit: Duration) -> Result<Picture, ImportError> {
        Ok(self.queue.next(limit)?)
    }

    /// Stops capturing. Every buffer is the caller's again, and the device has stopped writing.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn stop(&self) -> Result<(), ImportError> {
        Ok(self.queue.stop()?)
    }

    /// Captures one picture into one of the buffers, and stops.
    ///
    /// # Errors
    /// As the steps that it takes.
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

/// Readable when a picture is there ([`Attachment::next`] with a limit of zero), for programs that wait for other
/// things, too.
impl AsFd for Attachment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.device().as_fd()
    }
}
