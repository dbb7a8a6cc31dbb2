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

/// The nodes (`/dev/video*`) of single-planar capture devices.
///
/// # Errors
/// [`Unavailable`] if there is none that this process may open.
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
    /// Width in pixels.
    pub width: u32,
    /// Height in lines.
    pub height: u32,
    /// The pixel format's four characters, such as `RGB3`.
    pub fourcc: [u8; 4],
    /// Number of bytes from one line to the next; 0 for formats without lines.
    pub bytes_per_line: u32,
    /// Number of bytes of a whole picture, the minimum size of a buffer.
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

/// A captured picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Picture {
    /// The index of the picture's buffer in the list of buffers.
    pub index: usize,
    /// Number of bytes of the picture.
    pub bytes: u32,
    /// The device's picture counter. A gap means lost pictures.
    pub sequence: u32,
}

/// An open capture device. Clones refer to the same device.
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
    /// True while a queue exists. A device has one queue, and stopping it ends all uses of it.
    has_queue: AtomicBool,
}

impl VideoDevice {
    /// Opens a node.
    ///
    /// # Errors
    /// [`Unavailable`] if the node does not exist, may not be opened, or is not a device that
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
        // A driver may have several nodes, each with a part of the driver's capabilities.
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

    /// The device's own name.
    pub fn card(&self) -> &str {
        &self.inner.card
    }

    /// The video device's PCI device; `None` for a device that is virtual or on another bus.
    pub fn device(&self) -> Option<PciAddress> {
        self.inner.device
    }

    /// Display name: the node and its driver.
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

    /// Requests a size and a pixel format (`VIDIOC_S_FMT`). Returns the closest format that the
    /// driver supports.
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
    /// The ioctl's error: `EINVAL` for an unsupported control, `ERANGE` for an invalid value.
    pub fn set_control(&self, id: u32, value: i32) -> Result<(), SystemError> {
        let set = sys::set_control(self.inner.fd.as_fd(), id, value);
        set.map_err(self.failed("ioctl(VIDIOC_S_CTRL)"))
    }

    /// Makes a queue of `count` buffers. The driver may add its own. `EBUSY` while another
    /// queue exists.
    pub(crate) fn queue(&self, count: u32, memory: Memory) -> Result<Queue, SystemError> {
        let call = "ioctl(VIDIOC_REQBUFS)";
        if self.inner.has_queue.swap(true, Ordering::AcqRel) {
            return Err(self.failed(call)(Errno::BUSY));
        }
        // From here on, dropping the queue clears `has_queue`.
        let mut queue = Queue {
            device: self.clone(),
            memory,
            count: 0,
        };
        let made = sys::request_buffers(self.inner.fd.as_fd(), count, memory);
        let made = made.map_err(self.failed(call))?;
        queue.count = made.count;
        // An old driver does not report its capabilities.
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

/// The device's queue of buffers. A device has at most one.
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

    /// Exports one of the driver's own buffers as a dma-buf.
    pub(crate) fn export(&self, index: u32) -> Result<OwnedFd, SystemError> {
        let flags = (OFlags::RDWR | OFlags::CLOEXEC).bits();
        let exported = sys::export(self.device.as_fd(), index, flags);
        exported.map_err(self.device.failed("ioctl(VIDIOC_EXPBUF)"))
    }

    /// Gives a buffer to the device for the next picture.
    pub(crate) fn give(&self, index: u32, dmabuf: Option<&DmaBuf>) -> Result<(), SystemError> {
        let memory = dmabuf.map(|dmabuf| {
            // A length of 0 means the whole buffer, the only choice for buffers of 4 GiB and
            // more.
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

    /// Waits for the next picture. `ETIME` if none came within the limit, `EIO` for a corrupted
    /// picture.
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
        // Exported buffers live on. Nobody is left to receive an error.
        let _ = sys::stream(self.device.as_fd(), false);
        let _ = sys::request_buffers(self.device.as_fd(), 0, self.memory);
        self.device.inner.has_queue.store(false, Ordering::Release);
    }
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&field[..end.unwrap_or(field.len())]).into_owned()
}
