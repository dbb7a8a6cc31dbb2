//! Plans: the path of the bytes between a buffer and an importer, and the reasons against
//! better paths.

pub(crate) mod proof;
mod verdicts;

use crate::buffer::{Buffer, DmaBuf, Kind, Provenance};
#[cfg(feature = "module")]
use crate::export::peerbuf::{Device, Placement};
#[cfg(feature = "module")]
use crate::export::provider;
use crate::topology::PciAddress;

pub use crate::path::{Direction, Path, Plan, ProofPolicy, Reason, ReasonCode};
pub use crate::topology;
pub use verdicts::forget_proofs;
pub(crate) use verdicts::{Key, Verdict, given_up, void};

impl Plan {
    /// The plan of an importer that uses the buffer's memory in place. No byte is copied, so
    /// the plan depends only on the location of the memory.
    pub fn in_place(buffer: &Buffer) -> Plan {
        let Provenance { kind, device, .. } = buffer.provenance();
        let not_peer = |code, evidence: String| Plan {
            path: Path::SharedHostMemory,
            reasons: vec![Reason::new(Path::PeerToPeer, code, evidence)],
        };
        // A graphics driver without a PCI device has its buffers in system memory.
        if kind.is_host_memory() || (*kind == Kind::Drm && device.is_none()) {
            let what = match kind {
                Kind::Udmabuf => "a udmabuf",
                Kind::Memfd => "a memfd",
                Kind::Heap => "of a dma-heap",
                Kind::V4l2 => "a video device's",
                _ => "of a graphics driver without a device",
            };
            let evidence = format!("the buffer is {what}: its bytes are in system memory");
            return not_peer(ReasonCode::NotDeviceMemory, evidence);
        }
        match is_in_device(buffer) {
            Some(false) => {
                let evidence = "peerbuf.ko has moved the buffer to system memory";
                not_peer(ReasonCode::NotDeviceMemory, evidence.into())
            }
            Some(true) => Plan {
                path: Path::PeerToPeer,
                reasons: Vec::new(),
            },
            None => not_peer(
                ReasonCode::PlacementUnknown,
                "it is not known where the buffer's bytes are; nothing is copied".into(),
            ),
        }
    }
}

/// True if all bytes are in device memory now, false if all are in system memory. `None` if the
/// location is unknown or mixed. peerbuf.ko can move a buffer out of its BAR, and reports the
/// location to processes that may open the device's node.
fn is_in_device(buffer: &Buffer) -> Option<bool> {
    let Provenance { kind, device, .. } = buffer.provenance();
    match (kind, device, buffer.dmabuf()) {
        (Kind::Bar | Kind::Provider, Some(device), Some(dmabuf)) => {
            module_says(*kind, *device, dmabuf)
        }
        _ => kind.is_device_memory().then_some(true),
    }
}

#[cfg(feature = "module")]
fn module_says(kind: Kind, device: PciAddress, dmabuf: &DmaBuf) -> Option<bool> {
    let device = match kind {
        Kind::Bar => Device::open(device).ok()?,
        _ => provider::open(device).ok()?,
    };
    match device.status(dmabuf).ok()?.placement {
        Placement::Device => Some(true),
        Placement::System => Some(false),
        Placement::Mixed => None,
    }
}

/// Without the feature `module` the location is unknown.
#[cfg(not(feature = "module"))]
fn module_says(_: Kind, _: PciAddress, _: &DmaBuf) -> Option<bool> {
    None
}
