// SPDX-License-Identifier: GPL-2.0

//! A PCI device whose memory is exported: its BARs and the list of its exports. This module knows exports
//! only as addresses; `binding.rs` makes and revokes them.

use kernel::{
    bindings,
    device::Core,
    error::to_result,
    ffi::*,
    impl_has_work, new_mutex, new_work,
    page::PAGE_SIZE,
    pci,
    prelude::*,
    sync::{aref::ARef, Arc, Mutex},
    workqueue::Work,
};

use crate::{
    abi,
    bar::Bar,
    common::raw,
    ffi,
    peers::Peers,
    pool::Chunk,
    region::{Place, Regions},
    wait::Wait,
};

/// Reasons for a revoke, which `abi.rs` describes; several may hold at once.
pub(crate) mod revoked {
    pub(crate) use crate::abi::{
        REASON_ERROR as BY_ERROR, REASON_GONE as GONE, REASON_OWNER as BY_OWNER,
        REASON_POWER as BY_POWER, REASON_RESET as BY_RESET,
    };

    /// With `BY_OWNER`: permanently. Not a reason of the interface.
    pub(crate) const PERMANENTLY: u32 = 1 << 16;
}

/// The mutable state of a bound device.
struct State {
    /// Why new exports are refused: `revoked::*` bits; zero if they are not.
    closed: u32,
    regions: [Regions; abi::NUM_BARS],
    /// The exports that removal must revoke. The release of a dma-buf or the removal, whichever comes first,
    /// deletes the entry with this lock held. So the dma-buf's memory is valid while its entry exists.
    exports: KVec<*mut bindings::dma_buf>,
}

impl State {
    /// EAGAIN during a reset, the recovery from an error or a suspend, ENODEV once the device is gone.
    fn present(&self) -> Result {
        match self.closed {
            0 => Ok(()),
            why if why & revoked::GONE == 0 => Err(EAGAIN),
            _ => Err(ENODEV),
        }
    }
}

/// Takes a reference to the file of a dma-buf; false if the file's last reference is gone.
///
/// # Safety
///
/// The lock of the list of exports is held, and `dmabuf` is in the list, or was removed with the lock held:
/// so its memory is valid.
unsafe fn alive(dmabuf: *mut bindings::dma_buf) -> bool {
    // SAFETY: The dma-buf's memory is valid, by the caller's promise.
    !unsafe { bindings::get_file_active(&raw mut (*dmabuf).file) }.is_null()
}

/// One part of an export.
pub(crate) struct Part {
    /// The requested place in the BAR; `None` for system memory.
    pub(crate) place: Option<Place>,
    /// The BAR's index, as the caller gave it; zero for system memory.
    pub(crate) bar: u32,
    /// Length in bytes.
    pub(crate) len: u64,
    /// Output: the offset in the BAR.
    pub(crate) offset: u64,
}

// SAFETY: The pointers are used only with the lock held, as the field says, which any thread can do.
unsafe impl Send for State {}

/// Where the memory of a device's exports comes from.
pub(crate) trait Source: Sync {
    /// Allocates bytes of `bar`, and returns their offset. The caller holds the lock of the device's state, and has
    /// checked that the device is live. Errors: those of [`Regions::take`].
    fn take(
        &self,
        _device: &Device,
        _bar: &Bar,
        (place, len): (Place, u64),
        regions: &mut Regions,
        _chunks: &mut KVec<Chunk>,
    ) -> Result<u64> {
        regions.take(place, len)
    }

    /// Announces that the driver of `device` is about to be unbound. The caller holds the device lock.
    fn unbinds(&self, _device: &Arc<Device>) {}
}

/// The BARs of a device that is bound to this driver, whose `unbind` removes the device.
struct Bars;

impl Source for Bars {}

/// A bound PCI device. After its removal the structure lives on, marked gone, while open files refer to it.
#[pin_data]
pub(crate) struct Device {
    pdev: ARef<pci::Device>,
    pub(crate) bars: [Bar; abi::NUM_BARS],
    /// Of each BAR: one may lie below the addresses that a device can send, and another above.
    pub(crate) peers: [Peers; abi::NUM_BARS],
    pub(crate) source: &'static dyn Source,
    #[pin]
    state: Mutex<State>,
    /// For a provider: work that completes the removal.
    #[pin]
    rest: Work<Self, 0>,
}

impl_has_work! {
    impl HasWork<Self, 0> for Device { self.rest }
}

// SAFETY: `bars` is not written after probe. The P2PDMA provider and the pages are used only while the device
// is bound, as `State::presence` and `Buffer::revoked` say.
unsafe impl Send for Device {}
// SAFETY: `bars` is constant, and all other shared state has its own lock.
unsafe impl Sync for Device {}

impl Device {
    /// Enables the device's memory and claims its BARs.
    ///
    /// Disables bus mastering, even if another driver had enabled it: whatever a process writes to the
    /// device's registers through an export, the device sends neither DMA nor interrupt messages on its own.
    /// (If a BAR contains the device's configuration space, a holder of that BAR can enable it again.)
    ///
    /// # Safety
    ///
    /// The caller calls `Device::remove` before the device's driver is gone.
    pub(crate) unsafe fn probe(pdev: &pci::Device<Core<'_>>) -> Result<Arc<Self>> {
        let raw = raw(pdev);
        // SAFETY: `pdev` is being probed, so managed resources may be added.
        to_result(unsafe { bindings::pcim_enable_device(raw) })?;
        // SAFETY: `pdev` is valid.
        unsafe { bindings::pci_clear_master(raw) };
        // SAFETY: `pdev` is being probed; the name is static.
        to_result(unsafe { bindings::pcim_request_all_regions(raw, c"peerbuf".as_char_ptr()) })?;
        // SAFETY: `pdev` is being probed.
        to_result(unsafe { bindings::pcim_p2pdma_init(raw) })?;

        let mut bars = [Bar::ABSENT; abi::NUM_BARS];
        for (index, bar) in (0..).zip(bars.iter_mut()) {
            // SAFETY: `pdev` is being probed and `pcim_p2pdma_init` was called. Every export needs a
            // `Device`, and the caller has promised to call `remove`.
            *bar = unsafe { Bar::probe(pdev, index) };
        }
        Self::new(pdev.into(), bars, &Bars)
    }

    /// A device with memory from `source`.
    pub(crate) fn new(
        pdev: ARef<pci::Device>,
        bars: [Bar; abi::NUM_BARS],
        source: &'static dyn Source,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                pdev,
                bars,
                peers: [const { Peers::new() }; abi::NUM_BARS],
                source,
                state <- new_mutex!(State {
                    closed: 0,
                    regions: bars.each_ref().map(|bar| Regions::new(bar.own)),
                    exports: KVec::new(),
                }),
                rest <- new_work!("peerbuf::Device::rest"),
            }),
            GFP_KERNEL,
        )
    }

    /// The PCI address, `DDDD:BB:DD.F`.
    pub(crate) fn name(&self) -> &CStr {
        let dev: &kernel::device::Device = (*self.pdev).as_ref();
        dev.name()
    }

    pub(crate) fn pci(&self) -> &pci::Device {
        &self.pdev
    }

    /// Answers `abi::IOC_QUERY`. ENODEV once the device is gone.
    pub(crate) fn query(&self) -> Result<abi::Query> {
        let mut query = abi::Query {
            features: abi::FEATURES,
            // SAFETY: The device is valid.
            address: unsafe { ffi::peerbuf_pci_address(raw(&*self.pdev)) },
            vendor: self.pdev.vendor_id().as_raw(),
            device: self.pdev.device_id(),
            page_size: PAGE_SIZE as u32,
            ..Default::default()
        };
        let mut state = self.state.lock();
        state.present()?;
        let State {
            regions, exports, ..
        } = &mut *state;
        for ((out, bar), regions) in query.bars.iter_mut().zip(&self.bars).zip(regions) {
            bar.reap(regions);
            *out = abi::Bar {
                size: bar.size,
                free: regions.free(),
                largest_free: regions.largest_free(),
                exports: match bar.own == 0 && bar.flags & abi::BAR_EXPORT != 0 {
                    true => exports.len() as u64,
                    false => regions.count(),
                },
                flags: bar.flags,
                reserved: 0,
            };
        }
        Ok(query)
    }

    /// Allocates a range in BAR `index`, which is exportable, for each part with a place, sets the part's
    /// offset, and adds the dma-buf that `make` makes to the list.
    ///
    /// Errors: ENODEV, EAGAIN, those of [`Regions::take`] and of `make`. On an error nothing stays allocated.
    pub(crate) fn take(
        &self,
        index: usize,
        parts: &mut [Part],
        make: impl FnOnce(&[Part], KVec<Chunk>) -> Result<*mut bindings::dma_buf>,
    ) -> Result<*mut bindings::dma_buf> {
        let bar = &self.bars[index];
        let mut state = self.state.lock();
        state.present()?;
        // Reserves the list entry first: nothing may fail once the dma-buf exists.
        state.exports.reserve(1, GFP_KERNEL)?;
        bar.reap(&mut state.regions[index]);
        let mut taken = 0;
        let made = (|| {
            let mut chunks = KVec::new();
            for part in parts.iter_mut() {
                if let Some(place) = part.place {
                    let (want, regions) = ((place, part.len), &mut state.regions[index]);
                    part.offset = self.source.take(self, bar, want, regions, &mut chunks)?;
                }
                taken += 1;
            }
            make(parts, chunks)
        })();
        match made {
            // Cannot fail: the room was reserved above, with the same lock held.
            Ok(dmabuf) => drop(state.exports.push_within_capacity(dmabuf)),
            Err(_) => {
                for part in parts[..taken].iter().filter(|part| part.place.is_some()) {
                    state.regions[index].give_back(part.offset, part.len, |_, _| false);
                }
            }
        }
        made
    }

    /// Removes an export whose dma-buf is being released, and frees the ranges of BAR `index` that `each`
    /// names. Direct I/O can outlive both its mapping and the file, so with `may_be_busy` a range in use
    /// stays taken until it is idle.
    pub(crate) fn forget(
        &self,
        dmabuf: *mut bindings::dma_buf,
        index: usize,
        may_be_busy: bool,
        each: impl FnOnce(&mut dyn FnMut(u64, u64)),
    ) {
        let mut state = self.state.lock();
        state.exports.retain(|&mut entry| entry != dmabuf);
        if state.closed & revoked::GONE == 0 {
            let pages = self.bars[index].pages.as_ref();
            let in_use = |offset, len| {
                may_be_busy && pages.is_some_and(|pages| pages.busy(offset, len) != 0)
            };
            each(&mut |offset, len| state.regions[index].give_back(offset, len, in_use));
        }
    }

    /// Refuses new exports for the reason `why`, a `revoked::*` bit.
    pub(crate) fn close(&self, why: u32) {
        self.state.lock().closed |= why;
    }

    /// Ends the refusal that [`Device::close`] began for this reason.
    pub(crate) fn open_again(&self, why: u32) {
        self.state.lock().closed &= !why;
    }

    /// Calls `each` for every export whose file is alive, with a reference to the file. Holds no lock during
    /// the call: another task may hold a buffer's lock for a long time.
    pub(crate) fn each_kept(&self, mut each: impl FnMut(*mut bindings::dma_buf)) {
        let mut next = self.state.lock().exports.len();
        // Downwards: if entries go meanwhile, the loop sees some exports twice but misses none.
        while next > 0 {
            next -= 1;
            let state = self.state.lock();
            // SAFETY: The entry is in the list, and the lock is held.
            let kept = state.exports.get(next).filter(|&&it| unsafe { alive(it) });
            let kept = kept.copied();
            drop(state);
            if let Some(dmabuf) = kept {
                each(dmabuf);
                // SAFETY: Drops the reference that `alive` took.
                unsafe { bindings::fput((*dmabuf).file) };
            }
        }
    }

    /// Waits until no direct I/O uses a page of the BARs. Returns whether that is so within `limit_ms`.
    pub(crate) fn idle_within(&self, limit_ms: u32) -> bool {
        let wait = Wait::begin(limit_ms);
        loop {
            if self.busy_pages() == 0 {
                return true;
            }
            if wait.left_ms() == 0 {
                return false;
            }
            // SAFETY: The callers may sleep.
            unsafe { bindings::msleep(1) };
        }
    }

    /// Removes one export whose file is alive from the list, with a reference to the file.
    pub(crate) fn take_export(&self) -> Option<*mut bindings::dma_buf> {
        let mut state = self.state.lock();
        while let Some(dmabuf) = state.exports.pop() {
            // A dying file has neither attachments nor mappings, and its release finds no entry.
            // SAFETY: The entry was removed with the lock held, and the lock still is.
            if unsafe { alive(dmabuf) } {
                return Some(dmabuf);
            }
        }
        None
    }

    /// The number of pages in use, without those of a pool, for which its owner waits.
    pub(crate) fn busy_pages(&self) -> usize {
        let busy = |bar: &Bar| Some(bar.pages.as_ref()?.busy(0, bar.own));
        self.bars.iter().filter_map(busy).sum()
    }
}
