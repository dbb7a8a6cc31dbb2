//! DRM devices: GPUs, display controllers, and `vgem`, which is neither.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use drm::Device as _;
use drm::buffer::Handle;
use drm::control::Device as _;
use rustix::fs::{Mode, OFlags};

use crate::errno::Errno;
use crate::error::{SystemError, Unavailable};
use crate::topology::{PciAddress, Sysfs};
use peerbuf_core::unpoisoned;

const NODES: &str = "/dev/dri";
const WHAT: &str = "DRM";

/// The card nodes (`/dev/dri/card*`) of this machine. Opening a node may still fail.
///
/// # Errors
/// [`Unavailable`] if there is none.
pub fn cards() -> Result<Vec<PathBuf>, Unavailable> {
    let unavailable = |errno| Unavailable {
        what: WHAT,
        cause: SystemError::new("open", NODES, errno),
        remedy: "no DRM driver has a device here; `modprobe vgem` makes one without hardware"
            .into(),
    };
    let entries = std::fs::read_dir(NODES).map_err(|error| unavailable(Errno::from(&error)))?;
    let mut cards: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"card"))
        .map(|entry| entry.path())
        .collect();
    if cards.is_empty() {
        return Err(unavailable(rustix::io::Errno::NOENT.into()));
    }
    cards.sort();
    Ok(cards)
}

/// An open card. Clones refer to the same card.
#[derive(Debug, Clone)]
pub struct Card {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    path: PathBuf,
    driver: String,
    device: Option<PciAddress>,
    /// Number of holders of each handle. The kernel returns the same handle for each import of
    /// a buffer, and the first close closes the handle.
    handles: Mutex<HashMap<Handle, usize>>,
}

impl AsFd for Inner {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl drm::Device for Inner {}
impl drm::control::Device for Inner {}

impl Card {
    /// Opens a node.
    ///
    /// # Errors
    /// [`Unavailable`] if the node does not exist, may not be opened, or is not a DRM node.
    pub fn open(path: impl AsRef<Path>) -> Result<Card, Unavailable> {
        let path = path.as_ref();
        let unavailable = |call, errno: Errno, remedy: &str| Unavailable {
            what: WHAT,
            cause: SystemError::new(call, path.display().to_string(), errno),
            remedy: remedy.into(),
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| {
            let remedy = match errno {
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                    "give this user the node, by its group (often `video` or `render`) or an ACL"
                }
                _ => "see the nodes in /dev/dri",
            };
            unavailable("open", errno.into(), remedy)
        })?;
        let number = rustix::fs::fstat(&fd).map_or(0, |stat| stat.st_rdev);
        let number = (rustix::fs::major(number), rustix::fs::minor(number));
        let mut inner = Inner {
            fd,
            path: path.to_owned(),
            driver: String::new(),
            device: Sysfs::default().character_device(number.0, number.1),
            handles: Mutex::default(),
        };
        let driver = inner.get_driver().map_err(|error| {
            let remedy = "it is not the node of a DRM driver";
            unavailable("ioctl(DRM_IOCTL_VERSION)", Errno::from(&error), remedy)
        })?;
        inner.driver = driver.name().to_string_lossy().into_owned();
        let inner = Arc::new(inner);
        Ok(Card { inner })
    }

    /// The node's path.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The driver's name, such as `amdgpu` or `vgem`.
    pub fn driver(&self) -> &str {
        &self.inner.driver
    }

    /// The card's PCI device; `None` for a card that is virtual or on another bus.
    pub fn device(&self) -> Option<PciAddress> {
        self.inner.device
    }

    /// Display name: the node and its driver.
    pub(crate) fn name(&self) -> String {
        format!("{} ({})", self.path().display(), self.driver())
    }

    /// Allocates a dumb buffer of at least `rows` times 4096 bytes.
    pub(crate) fn allocate(&self, rows: u32) -> Result<Gem, SystemError> {
        // A dumb buffer has a width and a height: here rows of 1024 pixels of 32 bits.
        let format = drm::buffer::DrmFourcc::Xrgb8888;
        let mut handles = self.handles();
        let made = self.inner.create_dumb_buffer((1024, rows), format, 32);
        let dumb = made.map_err(self.failed("ioctl(DRM_IOCTL_MODE_CREATE_DUMB)"))?;
        Ok(self.hold(&mut handles, drm::buffer::Buffer::handle(&dumb)))
    }

    /// Attaches a dma-buf.
    pub(crate) fn import(&self, dmabuf: BorrowedFd<'_>) -> Result<Gem, SystemError> {
        let mut handles = self.handles();
        let imported = self.inner.prime_fd_to_buffer(dmabuf);
        let handle = imported.map_err(self.failed("ioctl(DRM_IOCTL_PRIME_FD_TO_HANDLE)"))?;
        Ok(self.hold(&mut handles, handle))
    }

    /// Exports the buffer of a handle that the caller made on this descriptor, as a dma-buf.
    pub(crate) fn export(&self, handle: Handle) -> Result<OwnedFd, SystemError> {
        let flags = (OFlags::CLOEXEC | OFlags::RDWR).bits();
        let exported = self.inner.buffer_to_prime_fd(handle, flags);
        exported.map_err(self.failed("ioctl(DRM_IOCTL_PRIME_HANDLE_TO_FD)"))
    }

    fn handles(&self) -> std::sync::MutexGuard<'_, HashMap<Handle, usize>> {
        let handles = &self.inner.handles;
        unpoisoned(handles.lock())
    }

    fn hold(&self, handles: &mut HashMap<Handle, usize>, handle: Handle) -> Gem {
        *handles.entry(handle).or_default() += 1;
        let card = self.clone();
        Gem { card, handle }
    }

    fn failed(&self, call: &'static str) -> impl Fn(std::io::Error) -> SystemError {
        let name = self.name();
        move |error| SystemError::new(call, name.clone(), &error)
    }
}

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }
}

/// A GEM handle that is counted in its card.
#[derive(Debug)]
pub(crate) struct Gem {
    card: Card,
    handle: Handle,
}

impl Gem {
    pub(crate) fn card(&self) -> &Card {
        &self.card
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle
    }

    /// The offset for `mmap` of the buffer on the card's descriptor.
    pub(crate) fn map_offset(&self) -> Result<u64, SystemError> {
        let mapped = drm_ffi::mode::dumbbuffer::map(self.card.as_fd(), self.handle.into(), 0, 0);
        let mapped = mapped.map_err(self.card.failed("ioctl(DRM_IOCTL_MODE_MAP_DUMB)"))?;
        Ok(mapped.offset)
    }
}

impl Drop for Gem {
    fn drop(&mut self) {
        let mut handles = self.card.handles();
        let Some(holders) = handles.get_mut(&self.handle) else {
            return;
        };
        *holders -= 1;
        if *holders == 0 {
            handles.remove(&self.handle);
            // The kernel fails this only for a handle that does not exist.
            let _ = self.card.inner.close_buffer(self.handle);
        }
    }
}
