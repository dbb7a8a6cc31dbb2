//! The request for an export of several ranges.

use crate::buffer::Access;

/// One range of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeRequest {
    /// In the BAR.
    Bar {
        /// Offset in bytes; `None` lets the module choose.
        offset: Option<u64>,
        /// Bytes.
        length: u64,
    },
    /// In system memory, with no place in the BAR.
    System {
        /// Bytes.
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
    /// The buffer moves to system memory for importers that cannot use the BAR, instead of
    /// refusing them.
    pub may_move: bool,
    /// Devices may only read the bytes: a mapping by which one could write is refused (`EACCES`). RDMA cards
    /// and graphics drivers always map in both directions, so they cannot use such a buffer.
    pub devices_read: bool,
    /// The access that the descriptor allows.
    pub access: Access,
}
