//! Plans: which path the bytes take between a buffer and an importer, and why not a better one.

pub(crate) mod proof;
mod verdicts;

use crate::buffer::{Buffer, Kind, Provenance};
use crate::export::peerbuf::{Device, Placement};
use crate::export::provider;

pub use crate::path::{Direction, Path, Plan, ProofPolicy, Reason, ReasonCode};
pub use crate::topology;
pub use verdicts::forget_proofs;
pub(crate) use verdicts::{Key, Verdict, void};

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
        match module_placement(buffer) {
            Some(Placement::System) => {
                let evidence = "peerbuf.ko has moved the buffer to system memory";
                return not_peer(ReasonCode::NotDeviceMemory, evidence.into());
            }
            None | Some(Placement::Mixed) => {}
            Some(_) => {
                return Plan {
                    path: Path::PeerToPeer,
                    reasons: Vec::new(),
                };
            }
        }
        not_peer(
            ReasonCode::PlacementUnknown,
            "it is not known where the buffer's bytes are; nothing is copied".into(),
        )
    }
}

/// Where a buffer in a BAR is now: peerbuf.ko may have moved it, and says so to whoever may open
/// its device's node. `None` where that is not known.
fn module_placement(buffer: &Buffer) -> Option<Placement> {
    let Provenance { kind, device, .. } = buffer.provenance();
    match (kind, device, buffer.dmabuf()) {
        (Kind::Bar | Kind::Provider, Some(device), Some(dmabuf)) => {
            let device = match kind {
                Kind::Bar => Device::open(*device).ok()?,
                _ => provider::open(*device).ok()?,
            };
            Some(device.status(dmabuf).ok()?.placement)
        }
        _ => kind.is_device_memory().then_some(Placement::Device),
    }
}
