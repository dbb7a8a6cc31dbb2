//! Numbers and structs of peerbuf.ko's interface, as userspace sees them.
//!
//! The text is `abi.rs`, which peerbuf.ko includes too. C programs use `include/peerbuf.h`.
#![no_std]

include!("abi.rs");
