// SPDX-License-Identifier: GPL-2.0

//! ioctl numbers and structs: the same text as in the crate `peerbuf-uapi`.

// `uapi/src/abi.rs` also compiles in userspace, with a Cargo feature that does not exist here, and the module
// does not use every constant.
#![allow(dead_code, unexpected_cfgs, unreachable_pub)]

use crate::misc::plain;

include!("../uapi/src/abi.rs");

plain! {
    Query Export Range ExportRanges Move Revoke Restore Watch Attachment Piece BufferQuery
    ProviderOpen
}
