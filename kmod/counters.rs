// SPDX-License-Identifier: GPL-2.0

//! Statistics of a buffer.

use kernel::prelude::*;

use crate::abi::DEVICE_NAME_LEN;

/// Event counts of a buffer.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) moves: u64,
    pub(crate) invalidations: u64,
    /// Mappings made for importers.
    pub(crate) maps: u64,
    /// Bytes that moves have copied.
    pub(crate) copied: u64,
    pub(crate) longest_wait_ns: u64,
}

impl Counters {
    /// Records that a move or revoke waited `ns` nanoseconds.
    pub(crate) fn waited(&mut self, ns: u64) {
        self.longest_wait_ns = self.longest_wait_ns.max(ns);
    }
}

/// The refused attachments: how many, and the last one.
pub(crate) struct Refusal {
    pub(crate) count: u64,
    pub(crate) device: [u8; DEVICE_NAME_LEN],
    /// `abi::REFUSED_*`.
    pub(crate) reason: u32,
    /// A positive number.
    pub(crate) errno: u32,
}

impl Refusal {
    pub(crate) const NOBODY: Self = Self {
        count: 0,
        device: [0; DEVICE_NAME_LEN],
        reason: 0,
        errno: 0,
    };

    /// Records that `device` was refused with `error`; `reason` is an `abi::REFUSED_*`.
    pub(crate) fn note(&mut self, device: &CStr, reason: u32, error: Error) {
        *self = Self {
            count: self.count + 1,
            device: name(device),
            reason,
            errno: error.to_errno().unsigned_abs(),
        };
    }
}

/// A device's name, truncated to 63 bytes.
pub(crate) fn name(device: &CStr) -> [u8; DEVICE_NAME_LEN] {
    let mut name = [0; DEVICE_NAME_LEN];
    let bytes = device.to_bytes();
    let len = bytes.len().min(name.len() - 1);
    name[..len].copy_from_slice(&bytes[..len]);
    name
}
