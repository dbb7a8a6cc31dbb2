// SPDX-License-Identifier: GPL-2.0

//! A bound PCI device: its BARs, who has what of them, and going away.

use core::{mem, ptr};

use kernel::{
    bindings,
    device::Core,
    error::to_result,
    ffi::*,
    impl_has_work, new_mutex, new_work,
    page::PAGE_SIZE,
    pci,
    prelude::*,
    sync::{aref::ARef, Arc, ArcBorrow, Mutex},
    workqueue::Work,
};

use crate::{
    abi,
    buffer::{revoked, Buffer, Held, Locked},
    common::{raw, DmaBuf},
    exporter, ffi,
    pages::Pages,
    peers::Peers,
    pieces::{Piece, Pieces, SystemPart},
    provider::Chunk,
    region::{Place, Regions},
    revoke::{self, Scope},
    system::{Contents, System},
    wait::Wait,
};

/// One BAR, as it was found at probe time.
#[derive(Clone, Copy)]
pub(crate) struct Bar {
    /// Physical address as the processor sees it.
    pub(crate) start: u64,
    /// Bytes; zero where there is no such BAR.
    pub(crate) size: u64,
    /// `abi::BAR_*`.
    pub(crate) flags: u32,
    /// Null where the BAR cannot be exported. Valid while the device is bound.
    pub(crate) provider: *mut bindings::p2pdma_provider,
    /// Present where CPU mappings have struct pages.
    pub(crate) pages: Option<Pages>,
    /// The kernel's uncached mapping of the whole BAR, for copies. Null where the BAR cannot be
    /// exported. Valid while the device is bound.
    kernel: *mut c_void,
}

impl Bar {
    const ABSENT: Self = Self {
        start: 0,
        size: 0,
        flags: 0,
        provider: ptr::null_mut(),
        pages: None,
        kernel: ptr::null_mut(),
    };

    /// Reads where BAR `bar` is, and of which kind.
    ///
    /// # Safety
    ///
    /// `pdev` is valid, and `bar` is below `NUM_BARS`.
    unsafe fn describe(pdev: *mut bindings::pci_dev, bar: c_int) -> Self {
        // SAFETY: By the caller's promise.
        let (resource, start, size) = unsafe {
            (
                ffi::peerbuf_pci_resource_flags(pdev, bar) as u32,
                bindings::pci_resource_start(pdev, bar),
                bindings::pci_resource_len(pdev, bar),
            )
        };
        if size == 0 {
            return Self::ABSENT;
        }
        let mut this = Self {
            start,
            size,
            ..Self::ABSENT
        };
        if resource & bindings::IORESOURCE_MEM == 0 || resource & bindings::IORESOURCE_UNSET != 0 {
            return this;
        }
        this.flags |= abi::BAR_MEMORY;
        if resource & bindings::IORESOURCE_PREFETCH != 0 {
            this.flags |= abi::BAR_PREFETCHABLE;
        }
        if resource & bindings::IORESOURCE_MEM_64 != 0 {
            this.flags |= abi::BAR_64BIT;
        }
        this
    }

    /// Adds what a provider's BAR needs to be exported. Its pool is somewhere in it, and `chunk` is
    /// part of that.
    ///
    /// # Safety
    ///
    /// `pdev` is the provider, whose driver is bound, and the chunk lies in its BAR `bar`, this one.
    unsafe fn of_provider(
        mut self,
        pdev: *mut bindings::pci_dev,
        bar: c_int,
        chunk: &Chunk,
    ) -> Self {
        let (paddr, kaddr) = chunk.place();
        // The kernel has the pages in its linear mapping, so one distance is right for all.
        self.kernel = kaddr.wrapping_byte_sub((paddr - self.start) as usize);
        self.pages = Some(Pages::of_provider(self.kernel, self.start, self.size));
        // SAFETY: By the caller's promise. A device with a pool has one for each memory BAR.
        self.provider = unsafe { bindings::pcim_p2pdma_provider(pdev, bar) };
        self.flags |= abi::BAR_EXPORT | abi::BAR_PAGES;
        self
    }

    /// Reads what BAR `index` is, and makes struct pages for it where the kernel can.
    ///
    /// # Safety
    ///
    /// Called from the probe of `dev`, after `pcim_p2pdma_init`, once for each index below
    /// `NUM_BARS`. [`Device::remove`] runs before the devres of `dev` is released, unless nothing
    /// was exported.
    unsafe fn probe(dev: &pci::Device<Core<'_>>, index: u32) -> Self {
        let pdev = raw(dev);
        let bar = index as c_int;
        // SAFETY: `pdev` is valid.
        let mut this = unsafe { Self::describe(pdev, bar) };
        let (start, size) = (this.start, this.size);
        let page = PAGE_SIZE as u64;
        if this.flags & abi::BAR_MEMORY == 0 || start % page != 0 || size % page != 0 {
            return this;
        }
        // SAFETY: As above, and `pcim_p2pdma_init` was called.
        this.provider = unsafe { bindings::pcim_p2pdma_provider(pdev, bar) };
        if this.provider.is_null() {
            return this;
        }
        this.flags |= abi::BAR_EXPORT;
        if Pages::possible(start, size) {
            // SAFETY: By the caller's promise and the check above.
            match unsafe { Pages::publish(dev, index, start, size) } {
                Ok(Some(pages)) => {
                    this.kernel = pages.kernel_address();
                    this.pages = Some(pages);
                    this.flags |= abi::BAR_PAGES;
                }
                Ok(None) => {
                    pr_warn!(
                        "BAR {}: its pages are not to be had: it is not exported\n",
                        index
                    );
                    this.flags &= !abi::BAR_EXPORT;
                    return this;
                }
                Err(e) => pr_warn!(
                    "BAR {}: no struct pages ({:?}): direct I/O on its mappings will be refused\n",
                    index,
                    e
                ),
            }
        }
        if this.pages.is_none() {
            // SAFETY: `pdev` is being probed and `bar` is one of its memory BARs.
            this.kernel = unsafe { bindings::pcim_iomap(pdev, bar, 0) };
            if this.kernel.is_null() {
                this.flags &= !abi::BAR_EXPORT;
            }
        }
        this
    }

    /// Where the kernel sees `offset` of the BAR. EINVAL outside it.
    pub(crate) fn kernel_address(&self, offset: u64) -> Result<*mut c_void> {
        if self.kernel.is_null() || offset >= self.size {
            return Err(EINVAL);
        }
        Ok(self.kernel.wrapping_byte_add(offset as usize))
    }

    /// Waits until every write to the BAR that the processor has posted has arrived, by draining
    /// write-combining buffers and reading back from `offset`: a PCIe read pushes posted writes on
    /// its path ahead of itself. Only where a read has no side effects, which a BAR says by being
    /// prefetchable. The device is bound.
    pub(crate) fn flush(&self, offset: u64) {
        if self.flags & abi::BAR_PREFETCHABLE == 0 {
            return;
        }
        if let Ok(address) = self.kernel_address(offset) {
            // SAFETY: The address lies in the kernel's mapping of the BAR.
            unsafe {
                ffi::peerbuf_wmb();
                address.cast::<u8>().read_volatile();
            }
        }
    }
}

/// Whether the device can be used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
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
    pub(crate) fn probe(pdev: &pci::Device<Core<'_>>) -> Result<Binding> {
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
            // `Device`, and the `Binding` around the only way to one calls `remove`.
            *bar = unsafe { Bar::probe(pdev, index) };
        }
        let regions = bars.each_ref().map(|bar| Regions::new(bar.size));
        Ok(Binding(Self::new(pdev.into(), bars, regions, false)?))
    }

    /// A device whose driver has published memory for peers.
    ///
    /// Errors: ENOSPC where all of it is taken, ENOMEM.
    ///
    /// # Safety
    ///
    /// Its driver has a pool, and is bound. The caller sees to it that [`Device::remove`] is called
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

    /// Exports memory as one dma-buf, in the order of `parts`, and puts down where each is. `flags` are `abi::EXPORT_*`.
    ///
    /// Errors: those of `abi::ExportRanges`.
    pub(crate) fn export(
        self: ArcBorrow<'_, Self>,
        bar: u32,
        parts: &mut [Part],
        flags: u32,
        fd_flags: u32,
    ) -> Result<DmaBuf> {
        let index = bar as usize;
        let info = self.bars.get(index).ok_or(EINVAL)?;
        if info.flags & abi::BAR_MEMORY == 0 {
            return Err(EINVAL);
        }
        if info.flags & abi::BAR_EXPORT == 0 {
            return Err(ffi::errno(bindings::EOPNOTSUPP));
        }
        let page = PAGE_SIZE as u64;
        let mut total = 0u64;
        for part in parts.iter() {
            let misplaced = matches!(part.place, Some(Place::At(offset)) if offset % page != 0);
            if part.len == 0 || part.len % page != 0 || misplaced {
                return Err(EINVAL);
            }
            total = total.checked_add(part.len).ok_or(EOVERFLOW)?;
        }
        // The DMA API keeps the highest bit of a length for itself.
        if total == 0 || total > i64::MAX as u64 {
            return Err(EINVAL);
        }
        // Before the lock: it takes a while.
        let mut pieces = KVec::with_capacity(parts.len(), GFP_KERNEL)?;
        for part in parts.iter() {
            let system = match part.place {
                Some(_) => None,
                None => Some(SystemPart {
                    pages: System::alloc(part.len, Contents::Zeroes)?,
                    first: 0,
                }),
            };
            let piece = Piece {
                len: part.len,
                home: None,
                system,
            };
            pieces.push(piece, GFP_KERNEL)?;
        }

        let mut state = self.state.lock();
        state.present()?;
        // Room in the list first, so that nothing can fail once the dma-buf exists.
        state.exports.reserve(1, GFP_KERNEL)?;
        info.reap(&mut state.regions[index]);
        let mut taken = 0;
        let exported = (|| {
            let mut chunks = KVec::new();
            for (part, piece) in parts.iter_mut().zip(pieces.iter_mut()) {
                if let Some(place) = part.place {
                    part.offset = match self.is_provider {
                        true => self.borrow(info, place, part.len, &mut chunks)?,
                        false => state.regions[index].take(place, part.len)?,
                    };
                    piece.home = Some(part.offset);
                }
                taken += 1;
            }
            let buffer = Buffer::new(self.into(), index, flags, Pieces::new(pieces), chunks)?;
            exporter::export(buffer, fd_flags)
        })();
        match exported {
            Ok(dmabuf) => {
                // Cannot fail: the room was reserved above, under the same lock.
                let _ = state.exports.push_within_capacity(dmabuf);
                // SAFETY: It is new, and so is its one reference.
                Ok(unsafe { DmaBuf::from_raw(dmabuf) })
            }
            Err(e) => {
                for part in parts[..taken].iter().filter(|part| part.place.is_some()) {
                    state.regions[index].give_back(part.offset, part.len, |_, _| false);
                }
                Err(e)
            }
        }
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

    /// Forgets an export whose dma-buf is being released, and gives its ranges back.
    pub(crate) fn forget(&self, buffer: &Buffer, dmabuf: *mut bindings::dma_buf) {
        let mut state = self.state.lock();
        state.exports.retain(|&mut entry| entry != dmabuf);
        if state.presence != Presence::Gone {
            // Direct I/O may outlive both the mapping it was started on and the descriptor.
            let in_use = |offset, len| {
                let pages = buffer.bar().pages.as_ref();
                buffer.may_have_busy_pages()
                    && pages.is_some_and(|pages| pages.busy(offset, len) != 0)
            };
            // SAFETY: The dma-buf is being released: it is valid, and nobody else has it.
            let locked = unsafe { Locked::lock(dmabuf) };
            for piece in &*locked.pieces {
                if let Some(home) = piece.home {
                    state.regions[buffer.bar].give_back(home, piece.len, in_use);
                }
            }
        }
    }

    /// Takes all access away and returns when nobody can reach the BARs any more.
    ///
    /// The order is that of the kernel's own exporters: no new exports; each export revoked, its
    /// importers told, CPU mappings zapped, fences and the importers' unmapping waited for; and
    /// then direct I/O on pages of those mappings. The waits have no limit, since the memory is
    /// gone when this returns; they are for the importers' drivers and for I/O that a disk has
    /// accepted, both of which end by themselves, and what is waited for is logged.
    pub(crate) fn remove(&self) {
        while !self.remove_within(10_000) {
            self.name_holders();
        }
    }

    /// The same within a time. Whether nobody can reach the BARs any more; if not, it is to be called again.
    pub(crate) fn remove_within(&self, limit_ms: u32) -> bool {
        self.state.lock().presence = Presence::Gone;
        if !self.revoke_all(revoked::GONE, limit_ms) {
            return false;
        }
        while let Some(dmabuf) = self.take_export() {
            // SAFETY: `take_export` returned it with a reference to its file, which is dropped
            // below.
            unsafe {
                // From here on nobody looks at the places of the buffer any more.
                let chunks = mem::take(&mut Locked::lock(dmabuf).chunks);
                drop(chunks);
                bindings::fput((*dmabuf).file);
            }
        }
        self.wait_idle();
        // No page becomes busy again: every export is revoked and zapped, or its file is dead and
        // has no mapping. The chunks of pages go back with the devres.
        true
    }

    /// Takes all access away before the device is reset, and waits as [`Device::remove`] does: what
    /// a reset does to accesses under way is anybody's guess. The driver core holds the device's
    /// lock, so the device is not removed meanwhile.
    pub(crate) fn reset_prepare(&self) {
        self.state.lock().presence = Presence::Resetting;
        while !self.revoke_all(revoked::BY_RESET, 10_000) {
            self.name_holders();
        }
        self.wait_idle();
    }

    /// Gives access again after a reset, with a new generation: what the memory holds now is the
    /// device's business. Buffers that their owner has revoked stay so.
    pub(crate) fn reset_done(&self) {
        self.each_export(|buffer| {
            // The only error is that the reset did not revoke it.
            let _ = revoke::restore(buffer, revoked::BY_RESET);
        });
        let mut state = self.state.lock();
        if state.presence == Presence::Resetting {
            state.presence = Presence::Live;
        }
    }

    /// Revokes every export, and waits until nobody can reach the BARs by DMA: whether that is so in time. New
    /// exports are refused already. All are told before any is waited for, so that this takes as long
    /// as the slowest importer, and not as long as all of them, one after the other.
    fn revoke_all(&self, why: u32, limit_ms: u32) -> bool {
        self.each_kept(|dmabuf| {
            // SAFETY: It is one of ours, and kept.
            let mut locked = unsafe { Locked::lock(dmabuf) };
            if locked.buffer().reasons() & why == 0 {
                revoke::take_away(&mut locked, why);
            }
        });
        let wait = Wait::begin(limit_ms);
        let mut nobody = true;
        self.each_kept(|dmabuf| {
            // SAFETY: It is one of ours, and kept.
            let left = unsafe { revoke::wait_for(dmabuf, why, Scope::Bar, wait.left_ms()) };
            nobody &= left.nobody();
        });
        nobody
    }

    /// Says in the log who is waited for.
    fn name_holders(&self) {
        self.each_kept(|dmabuf| {
            // SAFETY: It is one of ours, and kept.
            unsafe { revoke::name_holders(dmabuf) };
        });
    }

    /// Calls `each` for every export that there is already and whose file is alive, with a reference to
    /// the file and no lock held: whoever has a buffer's lock may have it for long.
    fn each_kept(&self, mut each: impl FnMut(*mut bindings::dma_buf)) {
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
    fn wait_idle(&self) {
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
    fn take_export(&self) -> Option<*mut bindings::dma_buf> {
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

    /// Calls `each` for every export whose file is alive, with its reservation lock held and no other.
    pub(crate) fn each_export(&self, mut each: impl FnMut(&mut Held<'_>)) {
        self.each_kept(|dmabuf| {
            // SAFETY: It is one of ours, and kept.
            each(unsafe { &mut Locked::lock(dmabuf) });
        });
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

impl Bar {
    /// Frees the ranges that only waited for direct I/O which has ended by now.
    fn reap(&self, regions: &mut Regions) {
        regions.reap(|start, len| {
            self.pages
                .as_ref()
                .is_some_and(|pages| pages.busy(start, len) != 0)
        });
    }
}

/// A device that is bound. Dropping it is the device's removal, see [`Device::remove`], which must
/// happen before the driver core takes anything of the device apart: in the driver's `unbind`.
pub(crate) struct Binding(Arc<Device>);

impl Binding {
    /// The device, which others may keep beyond the binding.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.0
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        self.0.remove();
        // Whatever was written to its registers meanwhile.
        // SAFETY: The device is valid, and this module's until this returns.
        unsafe { bindings::pci_clear_master(raw(self.0.pci())) };
    }
}
