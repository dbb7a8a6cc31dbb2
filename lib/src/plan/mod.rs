//! Plans: which path the bytes take between a buffer and an importer, and why not a better one.

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
    /// The plan of an importer that uses the buffer's memory where it is: no byte is copied, and
    /// only where the memory is makes a difference.
    pub fn in_place(buffer: &Buffer) -> Plan {
        let Provenance { kind, device, .. } = buffer.provenance();
        let not_peer = |code, evidence: String| Plan {
            path: Path::SharedHostMemory,
            reasons: vec![Reason::new(Path::PeerToPeer, code, evidence)],
        };
        // Without a device of its own, a graphics driver's buffers can only be in system memory.
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

/// Whether all bytes are in device memory now, or all in system memory; `None` where that is not
/// known, or they are in both. peerbuf.ko may have moved a buffer in a BAR, and says so to whoever may
/// open its device's node.
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

/// Without the module's part nobody can be asked.
#[cfg(not(feature = "module"))]
fn module_says(_: Kind, _: PciAddress, _: &DmaBuf) -> Option<bool> {
    None
}
