//! ioctl numbers and structs of peerbuf.ko and peerbuf_probe.ko ([`probe`]).
//!
//! Both modules include the same files, `abi.rs` and `probe.rs`. For C, `include/peerbuf.h` and
//! `include/peerbuf_probe.h` declare the same.
#![no_std]

include!("abi.rs");

/// The interface of peerbuf_probe.ko, the test importer.
pub mod probe;
