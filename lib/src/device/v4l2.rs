//! Video devices that capture: cameras, frame grabbers, and `vivid`, which draws test pictures.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};

use crate::buffer::DmaBuf;
use crate::errno::Errno;
use crate::error::{SystemError, Unavailable};
use crate::sys::v4l2::{self as sys, Memory};
use crate::topology::{PciAddress, Sysfs};

const WHAT: &str = "V4L2";

/// The nodes (`/dev/video*`) of devices that capture into buffers, one plane each.
///
/// # Errors
/// [`Unavailable`] where there is none that this process may open.
pub fn devices() -> Result<Vec<PathBuf>, Unavailable> {
    let mut refused = Unavailable {
        what: WHAT,
        cause: SystemError::new("open", "/dev/video*", rustix::io::Errno::NOENT),
        remedy: "no capture device here; `modprobe vivid` makes one without hardware".into(),
    };
    let mut nodes: Vec<PathBuf> = std::fs::read_dir("/dev")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"video"))
        .map(|entry| entry.path())
        .collect();
    nodes.sort();
    nodes.retain(|node| match VideoDevice::open(node) {
        Ok(_) => true,
        Err(error) => {
            refused = error;
            false
        }
    });
    if nodes.is_empty() {
        return Err(refused);
    }
    Ok(nodes)
}

/// A device's capture format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Format {
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// The pixel format's four characters, such as `RGB3`.
    pub fourcc: [u8; 4],
    /// Bytes from one line to the next; 0 where the format has no lines.
    pub bytes_per_line: u32,
    /// Bytes of a whole picture, which a buffer must have room for.
    pub size: u32,
}

impl From<sys::PixFormat> for Format {
    fn from(pix: sys::PixFormat) -> Format {
        Format {
            width: pix.width,
            height: pix.height,
            fourcc: pix.pixelformat.to_le_bytes(),
            bytes_per_line: pix.bytesperline,
            size: pix.sizeimage,
        }
    }
}

/// A picture that was captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Picture {
    /// The buffer that it is in, by its place in the list that was given.
    pub index: usize,
    /// How many bytes of the buffer it has.
    pub bytes: u32,
    /// The device's count of pictures; a gap means that some were lost.
    pub sequence: u32,
}

/// An open capture device. Clones are the same.
#[derive(Debug, Clone)]
pub struct VideoDevice {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    path: PathBuf,
    driver: String,
    card: String,
    device: Option<PciAddress>,
    /// There is one queue of buffers at a time: an end of one is the end of all.
    has_queue: AtomicBool,
}

impl VideoDevice {
    /// Opens a node.
    ///
    /// # Errors
    /// [`Unavailable`] when there is no such node, it may not be opened, or is no device that
    /// captures into buffers.
    pub fn open(path: impl AsRef<Path>) -> Result<VideoDevice, Unavailable> {
        let path = path.as_ref();
        let unavailable = |call, errno: Errno, remedy: &str| Unavailable {
            what: WHAT,
            cause: SystemError::new(call, path.display().to_string(), errno),
            remedy: remedy.into(),
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| {
            let remedy = match errno {
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                    "give this user the node, by its group (often `video`) or an ACL"
                }
                _ => "see the nodes /dev/video*",
            };
            unavailable("open", errno.into(), remedy)
        })?;
        let query = "ioctl(VIDIOC_QUERYCAP)";
        let capability = sys::capability(fd.as_fd())
            .map_err(|errno| unavailable(query, errno, "it is not a video device"))?;
        // A driver may have several nodes, each for a part of what the whole can do.
        let can = if capability.capabilities & sys::CAP_DEVICE_CAPS != 0 {
            capability.device_caps
        } else {
            capability.capabilities
        };
        let needed = sys::CAP_VIDEO_CAPTURE | sys::CAP_STREAMING;
        if can & needed != needed {
            let remedy = "it does not capture into buffers of one plane; others may";
            return Err(unavailable(query, Errno::OPNOTSUPP, remedy));
        }
        let number = rustix::fs::fstat(&fd).map_or(0, |stat| stat.st_rdev);
        let number = (rustix::fs::major(number), rustix::fs::minor(number));
        let inner = Inner {
            fd,
            path: path.to_owned(),
            driver: text(&capability.driver),
            card: text(&capability.card),
            device: Sysfs::default().character_device(number.0, number.1),
            has_queue: AtomicBool::new(false),
        };
        Ok(VideoDevice {
            inner: Arc::new(inner),
        })
    }

    /// The node's path.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The driver's name, such as `uvcvideo` or `vivid`.
    pub fn driver(&self) -> &str {
        &self.inner.driver
    }

    /// The device's name for itself.
    pub fn card(&self) -> &str {
        &self.inner.card
    }

    /// The PCI device behind it; `None` for one that is virtual or on another bus.
    pub fn device(&self) -> Option<PciAddress> {
        self.inner.device
    }

    /// For people: the node and its driver.
    pub(crate) fn name(&self) -> String {
        format!("{} ({})", self.inner.path.display(), self.inner.driver)
    }

    /// The current capture format (`VIDIOC_G_FMT`).
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn format(&self) -> Result<Format, SystemError> {
        let format = sys::format(self.inner.fd.as_fd());
        Ok(format.map_err(self.failed("ioctl(VIDIOC_G_FMT)"))?.into())
    }

    /// Asks for a size and a pixel format (`VIDIOC_S_FMT`). The driver answers with what comes
    /// closest of what it can do.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn set_format(
        &mut self,
        width: u32,
        height: u32,
        fourcc: [u8; 4],
    ) -> Result<Format, SystemError> {
        let pixels = u32::from_le_bytes(fourcc);
        let format = sys::set_format(self.inner.fd.as_fd(), width, height, pixels);
        Ok(format.map_err(self.failed("ioctl(VIDIOC_S_FMT)"))?.into())
    }

    /// Sets a control by its number (`VIDIOC_S_CTRL`).
    ///
    /// # Errors
    /// The ioctl's error: `EINVAL` for a control that it has not, `ERANGE` for the value.
    pub fn set_control(&self, id: u32, value: i32) -> Result<(), SystemError> {
        let set = sys::set_control(self.inner.fd.as_fd(), id, value);
        set.map_err(self.failed("ioctl(VIDIOC_S_CTRL)"))
    }

    /// A queue of `count` buffers; the driver may make more of its own. `EBUSY` while there is another.
    pub(crate) fn queue(&self, count: u32, memory: Memory) -> Result<Queue, SystemError> {
        let call = "ioctl(VIDIOC_REQBUFS)";
        if self.inner.has_queue.swap(true, Ordering::AcqRel) {
            return Err(self.failed(call)(Errno::BUSY));
        }
        // From here on dropping it lets another be made.
        let mut queue = Queue {
            device: self.clone(),
            memory,
            count: 0,
        };
        let made = sys::request_buffers(self.inner.fd.as_fd(), count, memory);
        let made = made.map_err(self.failed(call))?;
        queue.count = made.count;
        // An old driver does not say what it can do.
        let capabilities = made.capabilities;
        if memory == Memory::DmaBuf && capabilities != 0 && capabilities & sys::BUF_CAP_DMABUF == 0
        {
            return Err(self.failed(call)(Errno::OPNOTSUPP));
        }
        Ok(queue)
    }

    fn failed(&self, call: &'static str) -> impl Fn(Errno) -> SystemError {
        let name = self.name();
        move |errno| SystemError::new(call, name.clone(), errno)
    }
}

impl AsFd for VideoDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }
}

/// The device's queue of buffers. There is one at a time.
#[derive(Debug)]
pub(crate) struct Queue {
    device: VideoDevice,
    memory: Memory,
    count: u32,
}

impl Queue {
    pub(crate) fn device(&self) -> &VideoDevice {
        &self.device
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// A dma-buf of one of the driver's own buffers.
    pub(crate) fn export(&self, index: u32) -> Result<OwnedFd, SystemError> {
        let flags = (OFlags::RDWR | OFlags::CLOEXEC).bits();
        let exported = sys::export(self.device.as_fd(), index, flags);
        exported.map_err(self.device.failed("ioctl(VIDIOC_EXPBUF)"))
    }

    /// Gives a buffer to the device, to capture the next picture into.
    pub(crate) fn give(&self, index: u32, dmabuf: Option<&DmaBuf>) -> Result<(), SystemError> {
        let memory = dmabuf.map(|dmabuf| {
            // 0 means the whole buffer, which is all that larger ones can have.
            let length = u32::try_from(dmabuf.size()).unwrap_or(0);
            (dmabuf.as_fd(), length)
        });
        let queued = sys::queue(self.device.as_fd(), index, memory);
        queued.map_err(self.device.failed("ioctl(VIDIOC_QBUF)"))
    }

    pub(crate) fn start(&self) -> Result<(), SystemError> {
        let started = sys::stream(self.device.as_fd(), true);
        started.map_err(self.device.failed("ioctl(VIDIOC_STREAMON)"))
    }

    /// Stops, and takes every buffer back.
    pub(crate) fn stop(&self) -> Result<(), SystemError> {
        let stopped = sys::stream(self.device.as_fd(), false);
        stopped.map_err(self.device.failed("ioctl(VIDIOC_STREAMOFF)"))
    }

    /// The next picture. `ETIME` when none came within the limit, `EIO` for a spoilt one.
    pub(crate) fn next(&self, limit: Duration) -> Result<Picture, SystemError> {
        let failed = self.device.failed("ioctl(VIDIOC_DQBUF)");
        let begun = Instant::now();
        loop {
            match sys::dequeue(self.device.as_fd(), self.memory) {
                Ok(buffer) if buffer.flags & sys::BUF_ERROR != 0 => return Err(failed(Errno::IO)),
                Ok(buffer) => {
                    return Ok(Picture {
                        index: buffer.index as usize,
                        bytes: buffer.bytesused,
                        sequence: buffer.sequence,
                    });
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(failed(Errno::TIME));
            }
            let timeout = Timespec::try_from(left).ok();
            let mut waiting = [PollFd::new(&self.device, PollFlags::IN)];
            match rustix::event::poll(&mut waiting, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(self.device.failed("poll")(errno.into())),
            }
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // Buffers that were exported live on; a failure has nobody to tell.
        let _ = sys::stream(self.device.as_fd(), false);
        let _ = sys::request_buffers(self.device.as_fd(), 0, self.memory);
        self.device.inner.has_queue.store(false, Ordering::Release);
    }
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&field[..end.unwrap_or(field.len())]).into_owned()
}
