// SPDX-License-Identifier: GPL-2.0

//! peerbuf_probe.ko: a dma-buf importer for plans and tests.
//!
//! Only the kernel knows which mapping an importer would get. This module attaches any dma-buf on behalf of a
//! PCI device, so that a plan can ask, and so that tests can act as a driver, a faulty one included.
//!
//! The module is separate from peerbuf.ko and needs none of it: the two meet only at the kernel's dma-buf
//! interface (<https://docs.kernel.org/driver-api/dma-buf.html>). A user of its node can hold fences and
//! mappings on other drivers' devices as long as a faulty driver could, so a machine in production does not
//! load it.
//!
//! - `importer.rs`: the node, and which device a caller may act for;
//! - `attachment.rs`: attachments and their callbacks; its head gives the lock order;
//! - `route.rs`: classifies the DMA addresses of a mapping;
//! - shared with peerbuf.ko: `common.rs`, `misc.rs`, `ffi.rs`, `compat.rs`. `helpers_probe.c` corresponds to
//!   its   `helpers.c`.

use kernel::prelude::*;

mod attachment;
mod common;
// This module needs only some of the differences.
#[allow(unused)]
mod compat;
mod ffi;
mod importer;
mod misc;
mod route;

/// ioctl numbers and structs: the same text as in the crate `peerbuf-uapi`.
#[allow(dead_code, unexpected_cfgs, unreachable_pub)]
#[path = "../uapi/src/probe.rs"]
mod abi;

misc::plain! {
    abi::Attach, abi::ATTACH_MIN_SIZE;
    abi::Map, abi::MAP_MIN_SIZE;
    abi::Step, abi::STEP_MIN_SIZE;
    abi::Fence, abi::FENCE_MIN_SIZE;
    abi::Query, abi::QUERY_MIN_SIZE;
}

/// The module.
struct Loaded {
    _importer: importer::Registered,
}

impl kernel::Module for Loaded {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        // SAFETY: `init` runs once, and no other importer is registered.
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
