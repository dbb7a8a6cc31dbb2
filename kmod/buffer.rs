// SPDX-License-Identifier: GPL-2.0

//! The object behind an exported dma-buf.
//!
//! A [`Buffer`] is owned by its dma-buf (`dma_buf.priv` is a reference, dropped by the release
//! operation) and keeps its [`Device`] structure, though not the device, alive. Its state is
//! guarded by the dma-buf's reservation lock, as importers expect: see [`Buffer::revoked`].

use kernel::{
    bindings,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc,
    },
    types::Opaque,
};

use crate::device::Device;

/// A page-aligned region of a BAR that was exported.
#[pin_data]
pub(crate) struct Buffer {
    pub(crate) device: Arc<Device>,
    /// Index of the BAR, below `NUM_BARS`.
    pub(crate) bar: usize,
    /// Where the region begins in the BAR, in bytes.
    pub(crate) offset: u64,
    /// The region's length in bytes.
    pub(crate) len: u64,
    /// The region as the P2PDMA core wants it. Written only here, but passed as a mutable pointer.
    #[pin]
    pub(crate) phys: Opaque<bindings::phys_vec>,
    /// Access has been taken away for good. Written with the reservation lock held; whoever
    /// decides by it holds that lock until what was decided is done. Reads without the lock are
    /// advisory.
    revoked: Atomic<i32>,
    /// Scatter tables that importers have. Read and written with the reservation lock held.
    mapped: Atomic<i32>,
    /// Done once the buffer is revoked and no scatter table is left. (`kernel::sync::Completion`
    /// cannot be waited for with a limit.)
    #[pin]
    unmapped: Opaque<bindings::completion>,
    /// A CPU mapping was made at some time, so pages may be in use after the last descriptor.
    cpu_mapped: Atomic<i32>,
}

// SAFETY: `phys` is only read after initialisation; everything else is `Send`.
unsafe impl Send for Buffer {}
// SAFETY: As for `Send`; the atomics' rules are with the fields.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Describes `len` bytes at `offset` of a BAR, which the caller has taken from its regions.
    pub(crate) fn new(device: Arc<Device>, bar: usize, offset: u64, len: u64) -> Result<Arc<Self>> {
        let phys = bindings::phys_vec {
            paddr: device.bars[bar].start + offset,
            len: len as usize,
        };
        Arc::pin_init(
            pin_init!(Self {
                device,
                bar,
                offset,
                len,
                phys: Opaque::new(phys),
                revoked: Atomic::new(0),
                mapped: Atomic::new(0),
                unmapped <- Opaque::ffi_init(|slot: *mut bindings::completion| {
                    // SAFETY: `slot` is valid for writes, and pinned.
                    unsafe { bindings::init_completion(slot) };
                }),
                cpu_mapped: Atomic::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// Whether access was taken away. Binding only while the reservation lock is held.
    pub(crate) fn revoked(&self) -> bool {
        self.revoked.load(Relaxed) != 0
    }

    /// Takes access away. The reservation lock is held.
    pub(crate) fn set_revoked(&self) {
        self.revoked.store(1, Relaxed);
        self.complete_if_unmapped();
    }

    /// Counts a scatter table given to an importer. The reservation lock is held.
    pub(crate) fn mapping_made(&self) {
        self.mapped.store(self.mapped.load(Relaxed) + 1, Relaxed);
    }

    /// Counts a scatter table that came back. The reservation lock is held.
    pub(crate) fn mapping_gone(&self) {
        self.mapped.store(self.mapped.load(Relaxed) - 1, Relaxed);
        self.complete_if_unmapped();
    }

    fn complete_if_unmapped(&self) {
        if self.revoked() && self.mapped.load(Relaxed) == 0 {
            // SAFETY: Initialised with the buffer.
            unsafe { bindings::complete_all(self.unmapped.get()) };
        }
    }

    /// Waits until a revoked buffer has no scatter table left, or for `seconds`; whether it has
    /// none. The reservation lock is not held.
    pub(crate) fn wait_unmapped(&self, seconds: u32) -> bool {
        // SAFETY: Initialised with the buffer; the caller may sleep.
        let left = unsafe {
            let jiffies = bindings::__msecs_to_jiffies(seconds * 1000);
            bindings::wait_for_completion_timeout(self.unmapped.get(), jiffies)
        };
        left != 0
    }

    /// Notes that a process has mapped the buffer.
    pub(crate) fn set_cpu_mapped(&self) {
        self.cpu_mapped.store(1, Relaxed);
    }

    /// Whether any page of the region is in use by a page table or an I/O request. The device is
    /// live.
    pub(crate) fn pages_in_use(&self) -> bool {
        self.cpu_mapped.load(Relaxed) != 0
            && self.device.bars[self.bar]
                .pages
                .as_ref()
                .is_some_and(|pages| pages.busy(self.offset, self.len) != 0)
    }
}
