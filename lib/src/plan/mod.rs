//! Plans: the path of the bytes between a buffer and an importer, and the reasons against
//! better paths.

pub(crate) mod proof;
mod verdicts;
pub(crate) mod whereabouts;

use self::whereabouts::{Seen, Whereabouts};
use crate::buffer::{Buffer, Kind, Provenance};

pub use crate::path::{Direction, Path, Plan, ProofPolicy, Reason, ReasonCode};
pub use crate::topology;
pub use verdicts::forget_proofs;
pub(crate) use verdicts::{Key, Verdict, given_up, now, valid_until, void};

impl Plan {
    /// The plan of an importer that uses the buffer's memory in place. No byte is copied, so
    /// the plan depends only on the location of the memory.
    pub fn in_place(buffer: &Buffer) -> Plan {
        Plan::seen(buffer, &Whereabouts::default().look(buffer))
    }

    /// As [`Plan::in_place`], of a buffer that was looked at already.
    pub(crate) fn seen(buffer: &Buffer, seen: &Seen) -> Plan {
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
        match seen.in_device {
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
