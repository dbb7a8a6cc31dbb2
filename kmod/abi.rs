// SPDX-License-Identifier: GPL-2.0

//! ioctl numbers and structs: the same text as in the crate `peerbuf-uapi`.

// `uapi/src/abi.rs` also compiles in userspace, with a Cargo feature that does not exist here, and the module
// does not use every constant.
#![allow(dead_code, unexpected_cfgs, unreachable_pub)]

use crate::misc::plain;

include!("../uapi/src/abi.rs");

plain! {
    Query, QUERY_MIN_SIZE;
    Export, EXPORT_MIN_SIZE;
    Range, RANGE_MIN_SIZE;
    Move, MOVE_MIN_SIZE;
    Revoke, REVOKE_MIN_SIZE;
    Restore, RESTORE_MIN_SIZE;
    Watch, WATCH_MIN_SIZE;
    Attachment, ATTACHMENT_MIN_SIZE;
    Piece, PIECE_MIN_SIZE;
    BufferQuery, BUFFER_QUERY_MIN_SIZE;
    ProviderOpen, PROVIDER_OPEN_MIN_SIZE;
}
