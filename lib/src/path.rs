//! Paths and plans as values: the path of the bytes, and the reasons against each better one.
//! [`plan`](crate::plan) makes plans.

use std::fmt;

/// The path of bytes between an exporter's memory and an importer. Better paths compare
/// greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// The CPU copies the bytes through a bounce buffer in system memory. Always possible.
    #[doc(alias = "bounce buffer")]
    #[doc(alias = "fallback")]
    StagedCopy,
    /// Exporter and importer use the same pages of system memory, without a copy.
    SharedHostMemory,
    /// The importing device reads and writes the exporter's memory itself, without a copy and
    /// without system memory.
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

/// The direction of a transfer. Each direction needs its own proof: some machines pass peer
/// writes and not peer reads.
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

/// When a path is proved, and so when a proof may modify bytes of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum ProofPolicy {
    /// Before the first transfer between a card and a disk in a direction, and again once the
    /// verdict has expired: after a failed transfer, after a change of a device or its driver,
    /// or after ten minutes.
    #[default]
    First,
    /// Before each transfer.
    Every,
    /// Never. A transfer uses a path with a valid proof of this process. Otherwise the CPU
    /// copies the bytes.
    Never,
}

/// The chosen path, and the reasons against each better one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// The path.
    pub path: Path,
    /// The reasons against better paths, best path first. Empty for peer to peer.
    pub reasons: Vec<Reason>,
}

impl Plan {
    /// Makes a plan. `reasons` are the reasons against each better path, best path first.
    pub fn new(path: Path, reasons: Vec<Reason>) -> Plan {
        Plan { path, reasons }
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

/// One reason against one path.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reason {
    /// The rejected path.
    pub path: Path,
    /// The kind of reason, for programs.
    pub code: ReasonCode,
    /// The evidence, for people: the call and its error, the devices, the bytes.
    pub evidence: String,
}

impl Reason {
    /// Makes a reason. `evidence` is for people: the call and its error, the devices, the
    /// bytes.
    pub fn new(path: Path, code: ReasonCode, evidence: impl Into<String>) -> Reason {
        Reason {
            path,
            code,
            evidence: evidence.into(),
        }
    }
}

/// The kinds of reasons. Their names never change; later versions may add some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReasonCode {
    /// The kernel refuses transfers between the two devices.
    KernelRefused,
    /// A layer of the kernel between the file and its disk, such as a ram disk, a loop device or device mapper,
    /// does not pass device memory on.
    BlockLayer,
    /// The kernel and the devices reported success, but the bytes did not arrive.
    ProofFailed,
    /// The device or the kernel failed during the proof or a transfer.
    DeviceError,
    /// The file's blocks are spread over several disks, and a proof covers only one.
    SeveralDisks,
    /// No data was available to read that would prove that bytes arrive.
    ReadUnproved,
    /// No range may be overwritten to prove that bytes arrive.
    WriteUnproved,
    /// The buffer is in system memory, so peer-to-peer transfer does not apply.
    NotDeviceMemory,
    /// The buffer is in device memory, so there are no host pages to share.
    NotHostMemory,
    /// The buffer's mapping has no struct pages, which file I/O needs.
    NoStructPages,
    /// The file does not support direct I/O, which bypasses the page cache.
    NoDirectIo,
    /// An offset is not a multiple of the alignment of direct I/O.
    Misaligned,
    /// The transfer is shorter than one block of the disk.
    BelowBlockSize,
    /// The importer is the CPU or software, without a DMA engine that could be a peer.
    NotADevice,
    /// The library does not know whether the buffer is in device memory.
    PlacementUnknown,
    /// The buffer has no dma-buf, which the importer requires.
    NoDmaBuf,
    /// The exporter does not support mmap of the dma-buf.
    NotMappable,
    /// The buffer is in device memory, which the importer does not accept.
    ImporterNotPeer,
    /// The exporter or the importer's driver refused the attachment.
    AttachRefused,
    /// The kernel does not pin the buffer's pages for the importer.
    NotPinnable,
    /// The importer accepts only ranges that begin at the start of their buffer.
    NotWhole,
    /// The range is too small for the importer's writes.
    TooSmall,
}

impl ReasonCode {
    /// All kinds of this version.
    pub const ALL: [ReasonCode; 22] = [
        ReasonCode::KernelRefused,
        ReasonCode::BlockLayer,
        ReasonCode::ProofFailed,
        ReasonCode::DeviceError,
        ReasonCode::SeveralDisks,
        ReasonCode::ReadUnproved,
        ReasonCode::WriteUnproved,
        ReasonCode::NotDeviceMemory,
        ReasonCode::NotHostMemory,
        ReasonCode::NoStructPages,
        ReasonCode::NoDirectIo,
        ReasonCode::Misaligned,
        ReasonCode::BelowBlockSize,
        ReasonCode::NotADevice,
        ReasonCode::PlacementUnknown,
        ReasonCode::NoDmaBuf,
        ReasonCode::NotMappable,
        ReasonCode::ImporterNotPeer,
        ReasonCode::AttachRefused,
        ReasonCode::NotPinnable,
        ReasonCode::NotWhole,
        ReasonCode::TooSmall,
    ];

    /// The stable name, in kebab case.
    pub fn as_str(self) -> &'static str {
        match self {
            ReasonCode::KernelRefused => "kernel-refused",
            ReasonCode::BlockLayer => "block-layer",
            ReasonCode::ProofFailed => "proof-failed",
            ReasonCode::DeviceError => "device-error",
            ReasonCode::SeveralDisks => "several-disks",
            ReasonCode::ReadUnproved => "read-unproved",
            ReasonCode::WriteUnproved => "write-unproved",
            ReasonCode::NotDeviceMemory => "not-device-memory",
            ReasonCode::NotHostMemory => "not-host-memory",
            ReasonCode::NoStructPages => "no-struct-pages",
            ReasonCode::NoDirectIo => "no-direct-io",
            ReasonCode::Misaligned => "misaligned",
            ReasonCode::BelowBlockSize => "below-block-size",
            ReasonCode::NotADevice => "not-a-device",
            ReasonCode::PlacementUnknown => "placement-unknown",
            ReasonCode::NoDmaBuf => "no-dma-buf",
            ReasonCode::NotMappable => "not-mappable",
            ReasonCode::ImporterNotPeer => "importer-not-peer",
            ReasonCode::AttachRefused => "attach-refused",
            ReasonCode::NotPinnable => "not-pinnable",
            ReasonCode::NotWhole => "not-whole",
            ReasonCode::TooSmall => "too-small",
        }
    }

    /// The remedy, in a sentence. `docs/reasons/` has the details.
    pub fn remedy(self) -> &'static str {
        match self {
            ReasonCode::KernelRefused => {
                "put both devices below one switch, or ask `peerbuf why` which setting is in the way"
            }
            ReasonCode::BlockLayer => {
                "keep the file on a filesystem directly on an NVMe disk, without the layer between"
            }
            ReasonCode::ProofFailed => {
                "iommu=pt, ACS redirection off, or both devices below one switch"
            }
            ReasonCode::DeviceError => "look at the kernel's log for what the device reports",
            ReasonCode::SeveralDisks => "use a file on one disk",
            ReasonCode::ReadUnproved => {
                "use a file that has bytes, or name a directory on its filesystem (with_scratch_directory)"
            }
            ReasonCode::WriteUnproved => {
                "name a directory on the filesystem (with_scratch_directory), or a range of the raw disk that may be \
                 overwritten (with_scratch_range)"
            }
            ReasonCode::NotDeviceMemory => "export the memory of a device",
            ReasonCode::NotHostMemory => "move the buffer to system memory, or export it there",
            ReasonCode::NoStructPages => {
                "export memory that has pages: by peerbuf.ko, from a large enough BAR"
            }
            ReasonCode::NoDirectIo => "use a filesystem with O_DIRECT, such as ext4 or XFS",
            ReasonCode::Misaligned => {
                "begin at a multiple of the disk's block, in the file and in the buffer"
            }
            ReasonCode::BelowBlockSize => "move at least one block of the disk at once",
            ReasonCode::NotADevice => "use an importer that is a device",
            ReasonCode::PlacementUnknown => {
                "open the node of the buffer's device, so that peerbuf.ko can be asked"
            }
            ReasonCode::NoDmaBuf => {
                "export the buffer as a dma-buf, such as a udmabuf over the same memory"
            }
            ReasonCode::NotMappable => {
                "give the buffer a stage, or export it by a driver that maps"
            }
            ReasonCode::ImporterNotPeer => {
                "use an importer whose driver takes device memory, or move the buffer to system memory"
            }
            ReasonCode::AttachRefused => "use an exporter or an importer by another driver",
            ReasonCode::NotPinnable => "raise RLIMIT_MEMLOCK, or use memory that can be pinned",
            ReasonCode::NotWhole => "attach the whole buffer",
            ReasonCode::TooSmall => "attach a larger range",
        }
    }
}

impl fmt::Display for ReasonCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
