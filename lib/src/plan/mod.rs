//! Plans: which path the bytes take between a buffer and an importer, and why not a better one.

pub(crate) mod proof;
mod reason;
pub mod topology;
mod verdicts;

use std::fmt;

use crate::buffer::{Buffer, Kind, Provenance};
use crate::export::peerbuf::{Device, Placement};
use crate::export::provider;

pub use reason::{Reason, ReasonCode};
pub use verdicts::forget_proofs;
pub(crate) use verdicts::{Key, void};

/// How bytes travel between an exporter's memory and an importer. Better paths compare greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// The CPU carries them through memory of its own. Always possible.
    StagedCopy,
    /// Both use the same pages of system memory. Nothing is copied.
    SharedHostMemory,
    /// The importing device reads and writes the exporter's memory itself. Nothing is copied,
    /// and nothing passes through system memory.
    PeerToPeer,
}

impl Path {
    /// The name used in reports: `peer-to-peer`, `shared-host-memory` or `staged-copy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Path::PeerToPeer => "peer-to-peer",
            Path::SharedHostMemory => "shared-host-memory",
            Path::StagedCopy => "staged-copy",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Which way bytes go. A path is proved for each by itself: some machines pass peer writes and
/// not peer reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the file or disk into the buffer.
    DiskToBuffer,
    /// From the buffer to the file or disk.
    BufferToDisk,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Direction::DiskToBuffer => "disk to buffer",
            Direction::BufferToDisk => "buffer to disk",
        })
    }
}

/// When a path is proved, and so when a proof may touch the bytes of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum ProofPolicy {
    /// Before the first transfer between a card and a disk in a direction, and again when what was found cannot
    /// be believed any more: after a transfer that failed, a change of a device or its driver, or ten minutes.
    #[default]
    First,
    /// Before each transfer.
    Every,
    /// Not at all. A path that was proved in this process, and is still believed, is used; without that the
    /// processor carries the bytes.
    Never,
}

/// The path chosen, and for each better one the reasons against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The path.
    pub path: Path,
    /// Why not a better one; best path first. Empty for peer to peer.
    pub reasons: Vec<Reason>,
}

impl Plan {
    /// The plan of an importer that uses the buffer's memory where it is: no byte is copied, and
    /// only where the memory is makes a difference.
    pub(crate) fn in_place(buffer: &Buffer) -> Plan {
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

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path)?;
        for reason in &self.reasons {
            write!(f, "; not {}: {}", reason.path, reason.evidence)?;
        }
        Ok(())
    }
}
