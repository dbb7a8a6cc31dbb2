//! `/dev/dma_heap`: dma-bufs of system memory, or of memory that a platform reserves for
//! devices.
//!
//! ```no_run
//! use peerbuf::export::heap;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! for heap in heap::probe()? {
//!     let buffer = heap.export("frames", 1 << 20)?;
//!     println!("{} gave {} bytes", heap.name(), buffer.size());
//! }
//! # Ok(())
//! # }
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::{plain, whole_pages};
use crate::buffer::{Buffer, DmaBuf, Kind, Provenance};
use crate::errno::Errno;
use crate::error::{ExportError, SystemError, Unavailable};
use crate::sys;

const HEAPS: &str = "/dev/dma_heap";
const WHAT: &str = "dma-heap";

/// The heaps that this process may use, in order of name. Most machines have `system`.
///
/// # Errors
/// [`Unavailable`] if there is none.
pub fn probe() -> Result<Vec<Heap>, Unavailable> {
    let none = |errno| Unavailable {
        what: WHAT,
        cause: SystemError::new("open", HEAPS, errno),
        remedy: "a kernel with CONFIG_DMABUF_HEAPS_SYSTEM (a module in newer ones: \
                 `modprobe system_heap`)"
            .into(),
    };
    let entries = std::fs::read_dir(HEAPS).map_err(|error| none(Errno::from(&error)))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let mut refused = none(rustix::io::Errno::NOENT.into());
    let mut heaps = Vec::new();
    for path in paths {
        match Heap::open_node(&path) {
            Ok(heap) => heaps.push(heap),
            Err(error) => refused = error,
        }
    }
    if heaps.is_empty() {
        return Err(refused);
    }
    Ok(heaps)
}

/// An open heap.
#[derive(Debug)]
pub struct Heap {
    fd: OwnedFd,
    name: String,
}

impl Heap {
    /// Opens the heap of this name, such as `system`.
    ///
    /// # Errors
    /// [`Unavailable`] if the heap does not exist or may not be opened.
    pub fn open(name: &str) -> Result<Heap, Unavailable> {
        Heap::open_node(&Path::new(HEAPS).join(name))
    }

    fn open_node(path: &Path) -> Result<Heap, Unavailable> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| Unavailable {
            what: WHAT,
            cause: SystemError::new("open", path.display().to_string(), errno),
            remedy: match errno {
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                    "give this user the node, by its group or an ACL"
                }
                _ => "see the heaps in /dev/dma_heap",
            }
            .into(),
        })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.into_owned();
        Ok(Heap { fd, name })
    }

    /// The heap's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes a buffer of `length` zero bytes, a multiple of the page size
    /// (`DMA_HEAP_IOCTL_ALLOC`). `name` is for messages. The kernel gets the name, too, unless
    /// it is too long.
    ///
    /// # Errors
    /// [`ExportError::Unsuitable`] for a length that is zero or not page-aligned, and the
    /// ioctl's own error: `ENOMEM` if the heap has too little memory.
    #[doc(alias = "DMA_HEAP_IOCTL_ALLOC")]
    pub fn export(&self, name: &str, length: u64) -> Result<Buffer, ExportError> {
        whole_pages(length)?;
        let allocated = sys::heap::allocate(self.fd.as_fd(), length);
        let fd = allocated.map_err(|errno| {
            let object = format!("{HEAPS}/{}", self.name);
            plain(SystemError::new(
                "ioctl(DMA_HEAP_IOCTL_ALLOC)",
                object,
                errno,
            ))
        })?;
        let dmabuf = DmaBuf::from_fd(fd)?;
        // A name that is too long for the kernel still serves in messages.
        let _ = dmabuf.set_name(name);
        let provenance = Provenance {
            kind: Kind::Heap,
            device: None,
            bar: None,
            name: name.into(),
        };
        Ok(Buffer::from_dmabuf(dmabuf, provenance))
    }
}
