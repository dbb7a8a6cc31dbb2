//! Buffers: what is shared, and how the CPU gets at it. They are the crate `peerbuf-core`'s.

pub use peerbuf_core::{
    Access, Buffer, BufferRange, CpuAccess, DmaBuf, FenceState, Identity, Info, Kind, LazyMapping,
    Mapping, Provenance, Stage, SyncFile,
};
#[cfg(feature = "share")]
pub(crate) use peerbuf_core::{LastHandle, LeaseState, parse_info};
