// SPDX-License-Identifier: GPL-2.0

//! peerbuf_probe.ko: attaches any dma-buf on behalf of a PCI device, so that a plan can ask the kernel
//! what it would give a driver, and tests can play a driver, a bad one too.
//!
//! It is a module apart from peerbuf.ko, and neither needs the other: what they have to do with each
//! other goes through the kernel's dma-buf interface. Who may use its node can hold fences and mappings
//! on other drivers' devices for as long as a bad driver could, so a machine that only exports leaves it
//! unloaded.
//!
//! - `importer.rs`: the node, and whose device goes;
//! - `attachment.rs`: what it attaches;
//! - `route.rs`: where the addresses lead that an attachment was given;
//! - as in peerbuf.ko: `common.rs`, `misc.rs`, `ffi.rs`, `compat.rs`; and `helpers_probe.c` for
//!   `helpers.c`.
//!
//! Locks: see `attachment.rs`.

use kernel::prelude::*;

mod attachment;
mod common;
// Not everything that differs concerns this module.
#[allow(unused)]
mod compat;
mod ffi;
mod importer;
mod misc;
mod route;

/// The interface to userspace: the same text that the crate `peerbuf-uapi` compiles.
#[allow(dead_code, unexpected_cfgs, unreachable_pub)]
#[path = "../uapi/src/probe.rs"]
mod abi;

misc::plain! { abi::Attach abi::Map abi::Step abi::Fence abi::Query }

/// The module.
struct Loaded {
    _importer: importer::Registered,
}

impl kernel::Module for Loaded {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        // SAFETY: A module is initialised once, and this is the only importer.
        let importer = unsafe { importer::Registered::new() }?;
        Ok(Self {
            _importer: importer,
        })
    }
}

module! {
    type: Loaded,
    name: "peerbuf_probe",
    authors: ["The peerbuf authors"],
    description: "Attaches dma-bufs on behalf of PCI devices, to see what a driver would get",
    license: "GPL",
    imports_ns: ["DMA_BUF"],
}
