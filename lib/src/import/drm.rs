//! DRM: a GPU or display uses a buffer (PRIME).
//!
//! The driver attaches the dma-buf and returns a GEM handle. Each driver has its own interface
//! for the handle: a display shows it by `ADDFB2`, and a GPU takes it into its command lists.
//!
//! ```no_run
//! use peerbuf::{device::drm::Card, export::udmabuf, import::drm::DrmImporter};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let importer = DrmImporter::new(&Card::open("/dev/dri/card0")?);
//! let buffer = udmabuf::export("surface", 1 << 20)?;
//! let surface = importer.attach(&buffer.whole())?;
//! println!("GEM handle {}, {}", surface.handle(), surface.plan());
//! # Ok(())
//! # }
//! ```

use std::num::NonZeroU32;
use std::path::PathBuf;

use std::os::fd::AsFd;

use super::{Attached, Importer, attach_refused, dmabuf_of};
use crate::buffer::{Access, Buffer, BufferRange, DmaBuf, Mapping};
use crate::device::drm::{Card, Gem, cards};
use crate::errno::Errno;
use crate::error::{ImportError, SystemError, Unavailable};
use crate::plan::Plan;

/// The card nodes of this machine.
///
/// # Errors
/// [`Unavailable`] if there is none.
pub fn probe() -> Result<Vec<PathBuf>, Unavailable> {
    cards()
}

/// A card as an importer.
#[derive(Debug, Clone)]
pub struct DrmImporter {
    card: Card,
}

impl DrmImporter {
    /// Makes an importer from a card.
    pub fn new(card: &Card) -> DrmImporter {
        DrmImporter { card: card.clone() }
    }

    /// Display name: the node and its driver.
    pub fn name(&self) -> String {
        self.card.name()
    }

    /// Attaches the buffer that contains the range. GEM handles refer to whole buffers, so
    /// users of the handle also need the range's offset.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] if the driver cannot use the exporter's buffer.
    #[doc(alias = "DRM_IOCTL_PRIME_FD_TO_HANDLE")]
    #[doc(alias = "drmPrimeFDToHandle")]
    pub fn attach(&self, range: &BufferRange) -> Result<Attachment, ImportError> {
        let buffer = range.buffer();
        let dmabuf = dmabuf_of(buffer, &self.name())?;
        let imported = self.card.import(dmabuf.as_fd());
        let gem = imported.map_err(|cause| attach_refused(&self.name(), buffer, &cause))?;
        let range = range.clone();
        Ok(Attachment { gem, range })
    }
}

/// A range attached to a card. The handle is closed when the last attachment of the buffer to
/// the card is dropped.
#[derive(Debug)]
pub struct Attachment {
    gem: Gem,
    range: BufferRange,
}

impl Attachment {
    /// The GEM handle of the whole buffer, on the card's descriptor.
    pub fn handle(&self) -> NonZeroU32 {
        self.gem.handle().into()
    }

    /// The attached range.
    pub fn range(&self) -> &BufferRange {
        &self.range
    }

    /// The path of the driver's accesses. For a driver that cannot reach device memory, the
    /// exporter may have moved the buffer during the attach. The plan describes the placement
    /// before that.
    pub fn plan(&self) -> Plan {
        Plan::in_place(self.range.buffer())
    }

    /// Maps the range through the handle, and so shows the bytes that the driver sees. The
    /// first choice is the driver's own mapping. The kernel refuses this mapping for imported
    /// buffers (`EINVAL` from `DRM_IOCTL_MODE_MAP_DUMB`). The second choice is a dma-buf that
    /// the driver exports for the handle, which must be the attached one.
    ///
    /// # Errors
    /// The call that failed; `EXDEV` if the handle refers to another buffer.
    pub fn map(&self, access: Access) -> Result<Mapping, ImportError> {
        let buffer = self.range.buffer();
        let exported = DmaBuf::from_fd(self.gem.card().export(self.gem.handle())?)?;
        if Some(exported.identity()) != buffer.dmabuf().map(DmaBuf::identity) {
            let call = "ioctl(DRM_IOCTL_PRIME_HANDLE_TO_FD)";
            let other = Errno(rustix::io::Errno::XDEV.raw_os_error());
            return Err(SystemError::new(call, buffer.name(), other).into());
        }
        let provenance = buffer.provenance().clone();
        let seen = match self.gem.map_offset() {
            Ok(at) => {
                let card = self.gem.card();
                let view = card.as_fd().try_clone_to_owned().map_err(|error| {
                    SystemError::new("fcntl(F_DUPFD_CLOEXEC)", card.name(), &error)
                })?;
                Buffer::from_dmabuf_and_view(exported, view, at, provenance)
            }
            Err(cause) if cause.errno == Errno::INVAL => Buffer::from_dmabuf(exported, provenance),
            Err(cause) => return Err(cause.into()),
        };
        // The mapping counts as a use of the buffer.
        let seen = seen.with_last_handle(Box::new(self.range.clone()));
        Ok(seen
            .range(self.range.offset(), self.range.len())?
            .map(access)?)
    }
}

impl Importer for DrmImporter {
    fn name(&self) -> String {
        DrmImporter::name(self)
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        Ok(Box::new(DrmImporter::attach(self, range)?))
    }
}

/// Copies bytes through the mapping of the handle, so that they are the bytes that the driver
/// sees.
impl Attached for Attachment {
    fn plan(&self) -> Plan {
        Attachment::plan(self)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Option<Plan>, ImportError> {
        self.map(Access::ReadWrite)?.write_bytes(bytes)?;
        Ok(Some(Attachment::plan(self)))
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        self.map(Access::Read)?.read_bytes(into)?;
        Ok(Some(Attachment::plan(self)))
    }
}
