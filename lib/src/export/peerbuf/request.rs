//! The request for an export of several ranges.

use crate::buffer::Access;

/// One range of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeRequest {
    /// In the BAR.
    Bar {
        /// Offset in bytes; `None` lets the module choose.
        offset: Option<u64>,
        /// Length in bytes.
        length: u64,
    },
    /// In system memory, with no place in the BAR.
    System {
        /// Length in bytes.
        length: u64,
    },
}

/// A buffer of several ranges.
#[derive(Debug, Clone)]
pub struct RangesRequest {
    /// The BAR's index.
    pub bar: u8,
    /// The ranges, in the buffer's order.
    pub ranges: Vec<RangeRequest>,
    /// True if the buffer moves to system memory for importers that cannot use the BAR.
    /// Otherwise such importers are refused.
    pub may_move: bool,
    /// True if devices may only read the bytes. The module then refuses mappings for writing
    /// (`EACCES`). RDMA cards and graphics drivers always map in both directions, so they
    /// cannot use such a buffer.
    pub devices_read: bool,
    /// The CPU maps the BAR uncached: each access reaches the device, in order. Otherwise its mappings are
    /// write-combining where the BAR allows that ([`BarInfo::write_combining`](super::BarInfo)): writes are
    /// collected until the end of the [`CpuAccess`](peerbuf_core::CpuAccess).
    pub uncached: bool,
    /// The access that the descriptor allows.
    pub access: Access,
}
