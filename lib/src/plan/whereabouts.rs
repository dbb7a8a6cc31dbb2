//! Where a buffer's bytes are now, and whether it has moved since that was asked.
//!
//! peerbuf.ko moves a buffer in a BAR to system memory and back while others use it, and takes access to it away. It
//! says so to whoever may open its device's node. Of all other buffers what is known from the beginning does not
//! change.

use crate::buffer::{Buffer, DmaBuf, Kind, Provenance};
#[cfg(feature = "module")]
use crate::errno::Errno;
#[cfg(feature = "module")]
use crate::export::peerbuf::{Device, Placement, State};
#[cfg(feature = "module")]
use crate::export::provider;
use crate::topology::PciAddress;

/// What was seen of a buffer. Two looks that see the same have seen no move in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    /// All bytes are in device memory, or all in system memory; `None` where that is not known, or they are in
    /// both.
    pub(crate) in_device: Option<bool>,
    /// Why its bytes cannot be reached, for people, if they cannot.
    pub(crate) out_of_reach: Option<&'static str>,
    /// Each move and each revoke raises it.
    generation: Option<u64>,
}

impl Seen {
    const NOTHING: Seen = Seen {
        in_device: None,
        out_of_reach: None,
        generation: None,
    };
}

#[cfg(feature = "module")]
const GONE: &str = "whose device was unbound or removed";

/// Looks after one buffer. The node stays open, so that a look is one system call.
#[derive(Debug, Default)]
pub(crate) struct Whereabouts {
    #[cfg(feature = "module")]
    node: std::sync::OnceLock<Option<Device>>,
}

impl Whereabouts {
    pub(crate) fn look(&self, buffer: &Buffer) -> Seen {
        let Provenance { kind, device, .. } = buffer.provenance();
        match (kind, device, buffer.dmabuf()) {
            (Kind::Bar | Kind::Provider, Some(device), Some(dmabuf)) => {
                self.module_says(*kind, *device, dmabuf)
            }
            _ => Seen {
                in_device: kind.is_device_memory().then_some(true),
                ..Seen::NOTHING
            },
        }
    }

    #[cfg(feature = "module")]
    fn module_says(&self, kind: Kind, device: PciAddress, dmabuf: &DmaBuf) -> Seen {
        let node = self.node.get_or_init(|| match kind {
            Kind::Bar => Device::open(device).ok(),
            _ => provider::open(device).ok(),
        });
        match node.as_ref().map(|node| node.glance(dmabuf)) {
            Some(Ok((state, reasons, placement, generation))) => Seen {
                out_of_reach: match state {
                    State::Live => None,
                    State::Revoked => Some("to which access was taken away"),
                    State::Gone if reasons.gone => Some(GONE),
                    State::Gone => Some("to which access was permanently revoked"),
                },
                generation: Some(generation),
                in_device: match placement {
                    Placement::Device => Some(true),
                    Placement::System => Some(false),
                    Placement::Mixed => None,
                },
            },
            Some(Err(Errno::NODEV)) => Seen {
                out_of_reach: Some(GONE),
                ..Seen::NOTHING
            },
            Some(Err(_)) | None => Seen::NOTHING,
        }
    }

    /// Without the module's part nobody can be asked.
    #[cfg(not(feature = "module"))]
    fn module_says(&self, _: Kind, _: PciAddress, _: &DmaBuf) -> Seen {
        Seen::NOTHING
    }
}
