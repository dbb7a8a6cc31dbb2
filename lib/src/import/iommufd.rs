//! iommufd: an I/O address space that files are mapped into.
//!
//! iommufd maps memfds, and dma-bufs that `vfio-pci` made of one range of a BAR. The kernel
//! refuses all other dma-bufs (drivers/iommu/iommufd/pages.c), but it attaches and pins a
//! dma-buf before it checks. A movable buffer may therefore have moved when the kernel refuses
//! it. VFIO or another driver attaches devices to the address space by its id.
//!
//! ```no_run
//! use peerbuf::{export::udmabuf, import::iommufd::AddressSpace};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let space = AddressSpace::open()?;
//! let buffer = udmabuf::export("ring", 1 << 16)?;
//! let ring = space.attach(&buffer.whole(), 0x10_0000)?;
//! println!("at {:#x} of address space {}", ring.iova(), space.id());
//! # Ok(())
//! # }
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::{Attached, Importer, impossible};
use crate::buffer::BufferRange;
use crate::errno::Errno;
use crate::error::{ImportError, SystemError, Unavailable};
use crate::plan::{Plan, ReasonCode};
use crate::sys;
use peerbuf_core::limits::on_pinning;

const NODE: &str = "/dev/iommu";
const WHAT: &str = "iommufd";

/// Tries to open `/dev/iommu`.
///
/// # Errors
/// [`Unavailable`], with the remedy.
pub fn probe() -> Result<(), Unavailable> {
    open().map(drop)
}

fn open() -> Result<OwnedFd, Unavailable> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(NODE, flags, Mode::empty()).map_err(|errno| Unavailable {
        what: WHAT,
        cause: SystemError::new("open", NODE, errno),
        remedy: match errno {
            rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                "give this user the node, by its group or an ACL"
            }
            _ => "`modprobe iommufd`, or a kernel with CONFIG_IOMMUFD",
        }
        .into(),
    })
}

/// An I/O address space. Clones refer to the same one.
#[derive(Debug, Clone)]
#[doc(alias = "IOAS")]
pub struct AddressSpace {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    iommu: OwnedFd,
    id: u32,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The kernel fails this only while a device uses the address space, which then lives
        // until that use ends.
        let _ = sys::iommufd::destroy(self.iommu.as_fd(), self.id);
    }
}

impl AddressSpace {
    /// Makes an address space (`IOMMU_IOAS_ALLOC`).
    ///
    /// # Errors
    /// [`ImportError::Unavailable`], or the ioctl's error.
    pub fn open() -> Result<AddressSpace, ImportError> {
        let iommu = open()?;
        let failed = |errno| SystemError::new("ioctl(IOMMU_IOAS_ALLOC)", NODE, errno);
        let id = sys::iommufd::allocate(iommu.as_fd()).map_err(failed)?;
        let inner = Arc::new(Inner { iommu, id });
        Ok(AddressSpace { inner })
    }

    /// The id of the address space, for attaching devices to it on the same descriptor.
    pub fn id(&self) -> u32 {
        self.inner.id
    }

    /// Maps the range at `iova` (`IOMMU_IOAS_MAP_FILE`), writable if the buffer is writable.
    /// Maps the memfd if there is one, otherwise the dma-buf. The range and the address must be
    /// page-aligned.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] with [`ReasonCode::AttachRefused`] for a dma-buf that the
    /// kernel does not accept here, [`ReasonCode::NotPinnable`] above the limit on locked
    /// memory, or [`ReasonCode::Misaligned`]; `EEXIST` or `EADDRINUSE` if the address is
    /// already mapped, `ENOTTY` from a kernel before 6.13.
    #[doc(alias = "IOMMU_IOAS_MAP_FILE")]
    pub fn attach(&self, range: &BufferRange, iova: u64) -> Result<Attachment, ImportError> {
        let buffer = range.buffer();
        let page = rustix::param::page_size() as u64;
        if !(range.offset() | range.len() | iova).is_multiple_of(page) || range.is_empty() {
            let evidence = format!("the range or {iova:#x} is not in whole pages of {page} bytes");
            return Err(impossible(WHAT, buffer, ReasonCode::Misaligned, evidence));
        }
        let memfd = buffer.host_memory();
        let Some(file) = memfd.or_else(|| buffer.dmabuf().map(AsFd::as_fd)) else {
            let evidence = "it has no descriptor".into();
            return Err(impossible(WHAT, buffer, ReasonCode::NoDmaBuf, evidence));
        };
        let mapped = sys::iommufd::map_file(
            self.inner.iommu.as_fd(),
            self.inner.id,
            file,
            range.offset(),
            range.len(),
            iova,
            buffer.is_writable(),
        );
        mapped.map_err(|errno| {
            let cause = SystemError::new("ioctl(IOMMU_IOAS_MAP_FILE)", buffer.name(), errno);
            let foreign =
                memfd.is_none() && matches!(errno, Errno::INVAL | Errno::OPNOTSUPP | Errno::FAULT);
            if foreign {
                let why = "iommufd takes a memfd, or one range of a BAR as vfio-pci exports it, \
                           and this is another exporter's dma-buf";
                let evidence = format!("{cause}: {why}");
                impossible(WHAT, buffer, ReasonCode::AttachRefused, evidence)
            } else if errno == Errno::NOMEM {
                let evidence = format!("{cause}{}", on_pinning(errno));
                impossible(WHAT, buffer, ReasonCode::NotPinnable, evidence)
            } else {
                cause.into()
            }
        })?;
        Ok(Attachment {
            space: self.clone(),
            range: range.clone(),
            iova,
        })
    }
}

impl AsFd for AddressSpace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.iommu.as_fd()
    }
}

/// A range in an address space. Dropping it unmaps the range.
#[derive(Debug)]
pub struct Attachment {
    space: AddressSpace,
    range: BufferRange,
    iova: u64,
}

impl Attachment {
    /// The I/O virtual address of the range's first byte.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// The mapped range.
    pub fn range(&self) -> &BufferRange {
        &self.range
    }

    /// The path of accesses by the address space's devices.
    pub fn plan(&self) -> Plan {
        Plan::in_place(self.range.buffer())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let space = &self.space.inner;
        // The kernel fails this only for an unmapped address.
        let length = self.range.len();
        let _ = sys::iommufd::unmap(space.iommu.as_fd(), space.id, self.iova, length);
    }
}

/// Maps the range at a fixed address, without a device in the address space: no byte moves.
impl Importer for AddressSpace {
    fn name(&self) -> String {
        WHAT.into()
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        /// An address above the ranges that devices reserve (interrupts, the first pages).
        const IOVA: u64 = 1 << 20;
        Ok(Box::new(AddressSpace::attach(self, range, IOVA)?))
    }
}

impl Attached for Attachment {
    fn plan(&self) -> Plan {
        Attachment::plan(self)
    }

    fn write(&mut self, _: &[u8]) -> Result<Option<Plan>, ImportError> {
        Ok(None)
    }

    fn read(&mut self, _: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        Ok(None)
    }
}
