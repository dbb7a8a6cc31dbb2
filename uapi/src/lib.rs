//! Numbers and structs of the interfaces of peerbuf.ko and of peerbuf_probe.ko ([`probe`]), as userspace
//! sees them.
//!
//! The texts are `abi.rs` and `probe.rs`, which the modules include too. C programs use
//! `include/peerbuf.h` and `include/peerbuf_probe.h`.
#![no_std]

include!("abi.rs");

/// The importer to probe with, peerbuf_probe.ko.
pub mod probe;
