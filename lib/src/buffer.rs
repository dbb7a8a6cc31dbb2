//! Buffers and the CPU's access to them, re-exported from the crate `peerbuf-core`.

pub use peerbuf_core::{
    Access, Buffer, BufferRange, CpuAccess, DmaBuf, FenceState, Identity, Info, Kind, LazyMapping,
    Mapping, Provenance, Stage, SyncFile,
};
#[cfg(feature = "share")]
pub(crate) use peerbuf_core::{LastHandle, LeaseState, parse_info};
