// SPDX-License-Identifier: GPL-2.0

//! The interface to userspace: the same text that the crate `peerbuf-uapi` compiles.

// `abi.rs` serves userspace too, where the crate has a feature; here it has none, and not every
// constant has a user.
#![allow(dead_code, unexpected_cfgs, unreachable_pub)]

use crate::misc::plain;

include!("../uapi/src/abi.rs");

plain! {
    Query Export Range ExportRanges Move Revoke Restore Watch Attachment Piece BufferQuery
    ProviderOpen
}
