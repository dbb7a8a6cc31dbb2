// SPDX-License-Identifier: GPL-2.0

//! The interface to userspace: the same text that the crate `peerbuf-uapi` compiles.

// `abi.rs` serves userspace too, where the crate has a feature; here it has none, and not every
// constant has a user.
#![allow(dead_code, unexpected_cfgs, unreachable_pub)]

use kernel::transmute::{AsBytes, FromBytes};

include!("../uapi/src/abi.rs");

/// Says of structs of the interface that they are plain bytes.
macro_rules! plain {
    ($($name:ident)*) => {$(
        // SAFETY: Only integers and arrays of integers, for which every bit pattern is valid.
        unsafe impl FromBytes for $name {}
        // SAFETY: No padding and no pointers: the crate `peerbuf-uapi` derives `bytemuck::Pod`.
        unsafe impl AsBytes for $name {}
    )*};
}

plain! {
    Query Export Range ExportRanges Move Revoke Restore Watch Attachment Piece BufferQuery
    ProviderOpen ImportAttach ImportMap ImportStep ImportFence ImportQuery
}
