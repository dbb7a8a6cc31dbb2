// SPDX-License-Identifier: GPL-2.0

//! A PCI device whose memory is exported: its BARs, and who has what of them. It knows exports as addresses
//! alone; what they are, and what becomes of them when the device goes, is in `binding.rs`.

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
    peers::Peers,
    pool::Chunk,
    region::{Place, Regions},
};

/// Whether the device can be used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    Live,
    /// It is being reset: nothing new is exported until that is over.
    Resetting,
    /// It is going away, or is gone: nothing new is exported.
    Gone,
}

/// What changes while the device is bound.
struct State {
    presence: Presence,
    regions: [Regions; abi::NUM_BARS],
    /// The exports that removal must revoke. An entry is taken out by the release of its dma-buf
    /// or by removal, whichever comes first, under the lock; so while an entry is here its
    /// dma-buf's memory is, too.
    exports: KVec<*mut bindings::dma_buf>,
}

impl State {
    /// EAGAIN during a reset, ENODEV once the device is gone.
    fn present(&self) -> Result {
        match self.presence {
            Presence::Live => Ok(()),
            Presence::Resetting => Err(EAGAIN),
            Presence::Gone => Err(ENODEV),
        }
    }
}

/// Takes a reference to the file of a dma-buf, unless the file is dying already.
///
/// # Safety
///
/// `dmabuf` is, or was until now, in the list of exports, and the lock of the list is held: so its
/// memory is valid.
unsafe fn alive(dmabuf: *mut bindings::dma_buf) -> bool {
    // SAFETY: By the caller's promise.
    !unsafe { bindings::get_file_active(&raw mut (*dmabuf).file) }.is_null()
}

/// Part of an export: where it shall be, and where it is.
pub(crate) struct Part {
    /// In the BAR; `None` for system memory.
    pub(crate) place: Option<Place>,
    /// Bytes.
    pub(crate) len: u64,
    /// Out: where in the BAR it begins.
    pub(crate) offset: u64,
}

// SAFETY: The pointers are used under the lock, as the field says, from whatever thread.
unsafe impl Send for State {}

/// A bound PCI device. It lives on, gone, while descriptors refer to it.
#[pin_data]
pub(crate) struct Device {
    pdev: ARef<pci::Device>,
    pub(crate) bars: [Bar; abi::NUM_BARS],
    pub(crate) peers: Peers,
    /// Another driver's, which lends its memory from a pool; no range of it is ours.
    is_provider: bool,
    #[pin]
    state: Mutex<State>,
    /// Of a provider: what is left of its removal.
    #[pin]
    rest: Work<Self, 0>,
}

impl_has_work! {
    impl HasWork<Self, 0> for Device { self.rest }
}

// SAFETY: `bars` is not written after probe; the P2PDMA provider and the pages are used only
// while the device is bound, which `State::presence` and `Buffer::revoked` tell.
unsafe impl Send for Device {}
// SAFETY: As for `Send`.
unsafe impl Sync for Device {}

impl Device {
    /// Enables the device's memory and takes its BARs.
    ///
    /// Bus mastering is off from here on, whoever had switched it on before: whatever somebody does to
    /// the device's registers through an export, it cannot send DMA or an interrupt message on its own.
    /// (A device that shows its configuration space in a BAR can be told to do so by whoever has that
    /// BAR.)
    ///
    /// # Safety
    ///
    /// The caller sees to it that `Device::remove` is called before the device's driver is gone.
    pub(crate) unsafe fn probe(pdev: &pci::Device<Core<'_>>) -> Result<Arc<Self>> {
        let raw = raw(pdev);
        // SAFETY: `pdev` is being probed, so managed resources may be added. The same for the
        // calls that follow.
        to_result(unsafe { bindings::pcim_enable_device(raw) })?;
        // SAFETY: `pdev` is valid.
        unsafe { bindings::pci_clear_master(raw) };
        // SAFETY: As above; the name is static.
        to_result(unsafe { bindings::pcim_request_all_regions(raw, c"peerbuf".as_char_ptr()) })?;
        // SAFETY: As above.
        to_result(unsafe { bindings::pcim_p2pdma_init(raw) })?;

        let mut bars = [Bar::ABSENT; abi::NUM_BARS];
        for (index, bar) in (0..).zip(bars.iter_mut()) {
            // SAFETY: `pdev` is being probed and `pcim_p2pdma_init` was called. Exporting takes a
            // `Device`, and the caller has promised to call `remove`.
            *bar = unsafe { Bar::probe(pdev, index) };
        }
        let regions = bars.each_ref().map(|bar| Regions::new(bar.size));
        Self::new(pdev.into(), bars, regions, false)
    }

    /// A device whose driver has published memory for peers.
    ///
    /// Errors: ENOSPC where all of it is taken, ENOMEM.
    ///
    /// # Safety
    ///
    /// Its driver has a pool, and is bound. The caller sees to it that `Device::remove` is called
    /// before it is unbound.
    pub(crate) unsafe fn provider(pdev: ARef<pci::Device>) -> Result<Arc<Self>> {
        let raw = raw(&*pdev);
        // Only what the pool gives shows where it is.
        // SAFETY: By the caller's promise, here and below.
        let chunk = unsafe { Chunk::take(raw, PAGE_SIZE as u64)? };
        let (paddr, _) = chunk.place();
        let mut bars = [Bar::ABSENT; abi::NUM_BARS];
        for (index, bar) in (0..).zip(bars.iter_mut()) {
            // SAFETY: As above.
            *bar = unsafe { Bar::describe(raw, index) };
            if paddr.wrapping_sub(bar.start) < bar.size {
                // SAFETY: As above.
                *bar = unsafe { bar.of_provider(raw, index, &chunk) };
            }
        }
        Self::new(pdev, bars, [const { Regions::new(0) }; abi::NUM_BARS], true)
    }

    fn new(
        pdev: ARef<pci::Device>,
        bars: [Bar; abi::NUM_BARS],
        regions: [Regions; abi::NUM_BARS],
        is_provider: bool,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                pdev,
                bars,
                peers: Peers::new(),
                is_provider,
                state <- new_mutex!(State {
                    presence: Presence::Live,
                    regions,
                    exports: KVec::new(),
                }),
                rest <- new_work!("peerbuf::Device::rest"),
            }),
            GFP_KERNEL,
        )
    }

    pub(crate) fn is_provider(&self) -> bool {
        self.is_provider
    }

    /// The PCI address, as `DDDD:BB:DD.F`.
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
            size: size_of::<abi::Query>() as u32,
            abi_version: abi::ABI_VERSION,
            page_size: PAGE_SIZE as u32,
            vendor: self.pdev.vendor_id().as_raw(),
            device: self.pdev.device_id(),
            ..Default::default()
        };
        // The last byte stays NUL; no PCI address is that long.
        let name = self.name().to_bytes();
        let len = name.len().min(query.bdf.len() - 1);
        query.bdf[..len].copy_from_slice(&name[..len]);

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
                exports: match self.is_provider && bar.flags & abi::BAR_EXPORT != 0 {
                    true => exports.len() as u32,
                    false => regions.count(),
                },
                flags: bar.flags,
            };
        }
        Ok(query)
    }

    /// Takes places in BAR `index`, which can be exported, for those `parts` that want one, puts down where
    /// each is, and notes the dma-buf that `make` makes of them.
    ///
    /// Errors: ENODEV, EAGAIN, those of [`Regions::take`] and of `make`; then nothing is taken.
    pub(crate) fn take(
        &self,
        index: usize,
        parts: &mut [Part],
        make: impl FnOnce(&[Part], KVec<Chunk>) -> Result<*mut bindings::dma_buf>,
    ) -> Result<*mut bindings::dma_buf> {
        let bar = &self.bars[index];
        let mut state = self.state.lock();
        state.present()?;
        // Room in the list first, so that nothing can fail once the dma-buf exists.
        state.exports.reserve(1, GFP_KERNEL)?;
        bar.reap(&mut state.regions[index]);
        let mut taken = 0;
        let made = (|| {
            let mut chunks = KVec::new();
            for part in parts.iter_mut() {
                if let Some(place) = part.place {
                    part.offset = match self.is_provider {
                        true => self.borrow(bar, place, part.len, &mut chunks)?,
                        false => state.regions[index].take(place, part.len)?,
                    };
                }
                taken += 1;
            }
            make(parts, chunks)
        })();
        match made {
            // Cannot fail: the room was reserved above, under the same lock.
            Ok(dmabuf) => drop(state.exports.push_within_capacity(dmabuf)),
            Err(_) => {
                for part in parts[..taken].iter().filter(|part| part.place.is_some()) {
                    state.regions[index].give_back(part.offset, part.len, |_, _| false);
                }
            }
        }
        made
    }

    /// Takes `len` bytes from the pool that is in `bar`, and returns where in the BAR they are. The
    /// state is locked, and the device present: so its driver is bound.
    ///
    /// Errors: EINVAL for a place of one's own choice, ENOSPC, ENOMEM.
    fn borrow(&self, bar: &Bar, place: Place, len: u64, chunks: &mut KVec<Chunk>) -> Result<u64> {
        let Place::Any = place else {
            return Err(EINVAL);
        };
        // SAFETY: The driver is bound, as said, and has a pool.
        let chunk = unsafe { Chunk::take(raw(&*self.pdev), len)? };
        let offset = chunk.place().0.wrapping_sub(bar.start);
        // A pool may have memory of several BARs.
        if offset >= bar.size {
            return Err(ENOSPC);
        }
        chunks.push(chunk, GFP_KERNEL)?;
        Ok(offset)
    }

    /// Forgets an export whose dma-buf is being released, and gives the ranges back that `each` names: in BAR
    /// `index`, and maybe still in use by direct I/O, which may outlive both the mapping it was started on and
    /// the descriptor.
    pub(crate) fn forget(
        &self,
        dmabuf: *mut bindings::dma_buf,
        index: usize,
        may_be_busy: bool,
        each: impl FnOnce(&mut dyn FnMut(u64, u64)),
    ) {
        let mut state = self.state.lock();
        state.exports.retain(|&mut entry| entry != dmabuf);
        if state.presence != Presence::Gone {
            let pages = self.bars[index].pages.as_ref();
            let in_use = |offset, len| {
                may_be_busy && pages.is_some_and(|pages| pages.busy(offset, len) != 0)
            };
            each(&mut |offset, len| state.regions[index].give_back(offset, len, in_use));
        }
    }

    /// From now on nothing new is exported.
    pub(crate) fn close(&self, presence: Presence) {
        self.state.lock().presence = presence;
    }

    /// Ends what [`Device::close`] began for a reset.
    pub(crate) fn open_again(&self) {
        let mut state = self.state.lock();
        if state.presence == Presence::Resetting {
            state.presence = Presence::Live;
        }
    }

    /// Calls `each` for every export that there is already and whose file is alive, with a reference to
    /// the file and no lock held: whoever has a buffer's lock may have it for long.
    pub(crate) fn each_kept(&self, mut each: impl FnMut(*mut bindings::dma_buf)) {
        let mut next = self.state.lock().exports.len();
        // Downwards: when entries go meanwhile, some are met twice, and none is left out.
        while next > 0 {
            next -= 1;
            let state = self.state.lock();
            // SAFETY: It is in the list, and the lock is held.
            let kept = state.exports.get(next).filter(|&&it| unsafe { alive(it) });
            let kept = kept.copied();
            drop(state);
            if let Some(dmabuf) = kept {
                each(dmabuf);
                // SAFETY: The reference that `alive` took.
                unsafe { bindings::fput((*dmabuf).file) };
            }
        }
    }

    /// Waits, without a limit, until no direct I/O uses a page of the BARs.
    pub(crate) fn wait_idle(&self) {
        let mut waited_ms = 0;
        while let busy @ 1.. = self.busy_pages() {
            if waited_ms % 10_000 == 9_999 {
                pr_warn!(
                    "{}: still waiting for direct I/O on {} pages\n",
                    self.name(),
                    busy
                );
            }
            // SAFETY: The callers may sleep.
            unsafe { bindings::msleep(1) };
            waited_ms += 1;
        }
    }

    /// Takes an export out of the list whose file is alive, with a reference to the file.
    pub(crate) fn take_export(&self) -> Option<*mut bindings::dma_buf> {
        let mut state = self.state.lock();
        while let Some(dmabuf) = state.exports.pop() {
            // A dying file has neither attachments nor mappings; its release finds no entry.
            // SAFETY: It was in the list until now, and the lock is held.
            if unsafe { alive(dmabuf) } {
                return Some(dmabuf);
            }
        }
        None
    }

    /// Pages in use of the BARs that are ours.
    fn busy_pages(&self) -> usize {
        if self.is_provider {
            return 0;
        }
        self.bars
            .iter()
            .filter_map(|bar| Some(bar.pages.as_ref()?.busy(0, bar.size)))
            .sum()
    }
}
