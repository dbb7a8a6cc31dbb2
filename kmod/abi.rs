// SPDX-License-Identifier: GPL-2.0

//! The interface to userspace: the same text that the crate `peerbuf-uapi` compiles.

// `abi.rs` serves userspace too, where the crate has a feature; here it has none, and not every
// constant has a user.
#![allow(dead_code, unexpected_cfgs, unreachable_pub)]

use kernel::transmute::{AsBytes, FromBytes};

include!("../uapi/src/abi.rs");

// SAFETY: Only integers and arrays of integers, for which every bit pattern is valid.
unsafe impl FromBytes for Query {}
// SAFETY: No padding and no pointers: the crate `peerbuf-uapi` derives `bytemuck::Pod` for it.
unsafe impl AsBytes for Query {}

// SAFETY: Only integers, for which every bit pattern is valid.
unsafe impl FromBytes for Export {}
// SAFETY: No padding and no pointers: the crate `peerbuf-uapi` derives `bytemuck::Pod` for it.
unsafe impl AsBytes for Export {}

macro_rules! plain {
    ($($name:ident)*) => {$(
        // SAFETY: Only integers and arrays of integers, for which every bit pattern is valid.
        unsafe impl FromBytes for $name {}
        // SAFETY: No padding and no pointers: the crate `peerbuf-uapi` derives `bytemuck::Pod`.
        unsafe impl AsBytes for $name {}
    )*};
}

plain!(ImportAttach ImportMap ImportStep ImportFence ImportQuery);
