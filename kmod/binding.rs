// SPDX-License-Identifier: GPL-2.0

//! Operations on all exports of a device: export, and the revokes at removal and reset.

use core::mem;

use kernel::{
    bindings,
    device::Core,
    page::PAGE_SIZE,
    pci,
    prelude::*,
    sync::{Arc, ArcBorrow},
};

use crate::{
    abi,
    buffer::{Buffer, Held, Locked},
    common::{raw, DmaBuf},
    device::{revoked, Device, Part},
    exporter, ffi,
    pieces::{Piece, Pieces, SystemPart},
    region::Place,
    revoke::{self, Scope},
    system::{Contents, System},
    wait::Wait,
};

/// The longest that an error or a suspend waits for importers: it holds up a walk of the bus, or the system.
const LIMIT_MS: u32 = 2_000;

impl Device {
    /// Exports `parts`, in order, as one dma-buf, and sets the offset of each part. `flags` are
    /// `abi::EXPORT_*`.
    ///
    /// Errors: those of `abi::Export`.
    pub(crate) fn export(
        self: ArcBorrow<'_, Self>,
        parts: &mut [Part],
        flags: u32,
        fd_flags: u32,
    ) -> Result<DmaBuf> {
        let index = self.bar_of(parts)?;
        let page = PAGE_SIZE as u64;
        let mut total = 0u64;
        for part in parts.iter() {
            let misplaced = matches!(part.place, Some(Place::At(offset)) if offset % page != 0);
            if part.len == 0 || part.len % page != 0 || misplaced {
                return Err(EINVAL);
            }
            total = total.checked_add(part.len).ok_or(EOVERFLOW)?;
        }
        // The DMA API reserves the highest bit of a length.
        if total == 0 || total > i64::MAX as u64 {
            return Err(EINVAL);
        }
        // Allocates before the lock is taken, because it takes long.
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

        let dmabuf = self.take(index, parts, |parts, chunks| {
            for (part, piece) in parts.iter().zip(pieces.iter_mut()) {
                piece.home = part.place.map(|_| part.offset);
            }
            let buffer = Buffer::new(self.into(), index, flags, Pieces::new(pieces), chunks)?;
            exporter::export(buffer, fd_flags)
        })?;
        // SAFETY: The dma-buf is new, and its only reference is ours.
        Ok(unsafe { DmaBuf::from_raw(dmabuf) })
    }

    /// The index of the BAR in which all parts have their places; 0 if none has one.
    fn bar_of(&self, parts: &[Part]) -> Result<usize> {
        let mut one = None;
        for part in parts.iter().filter(|part| part.place.is_some()) {
            let bar = self.bars.get(part.bar as usize).ok_or(EINVAL)?;
            if bar.flags & abi::BAR_MEMORY == 0 {
                return Err(EINVAL);
            }
            if bar.flags & abi::BAR_EXPORT == 0 || *one.get_or_insert(part.bar) != part.bar {
                return Err(ffi::errno(bindings::EOPNOTSUPP));
            }
        }
        Ok(one.unwrap_or(0) as usize)
    }

    /// Revokes everything and returns when no importer can access the BARs any more.
    ///
    /// The order is that of the kernel's own exporters: refuse new exports; revoke each export, invalidate
    /// its mappings and zap its CPU mappings; wait for fences and for the importers to unmap; then wait for
    /// direct I/O on the pages of those mappings. The waits have no limit, because the memory is gone on
    /// return. They wait for importers' drivers and for I/O that a disk has accepted, which both end by
    /// themselves; the log names what is awaited.
    pub(crate) fn remove(&self) {
        while !self.remove_within(10_000) {
            self.name_holders();
        }
    }

    /// As [`Device::remove`], with a time limit. Returns whether it is done; if not, call it again.
    pub(crate) fn remove_within(&self, limit_ms: u32) -> bool {
        let wait = Wait::begin(limit_ms);
        self.close(revoked::GONE);
        if !self.revoke_all(revoked::GONE, limit_ms) {
            return false;
        }
        while let Some(dmabuf) = self.take_export() {
            // SAFETY: `take_export` returned the dma-buf with a reference to its file, dropped below.
            unsafe {
                // From here on nothing reads the buffer's places any more.
                let chunks = mem::take(&mut Locked::lock(dmabuf).chunks);
                drop(chunks);
                bindings::fput((*dmabuf).file);
            }
        }
        // No page becomes busy again: every export is revoked and zapped, or its file is dead and has no
        // mapping. Devres frees the chunks of pages.
        self.idle_within(wait.left_ms())
    }

    /// Revokes everything before the device is reset and waits as [`Device::remove`] does: the effect of a
    /// reset on accesses in flight is undefined. The driver core holds the device lock, which keeps the
    /// device bound.
    pub(crate) fn reset_prepare(&self) {
        while !self.suspend_access(revoked::BY_RESET, 10_000) {
            self.name_holders();
        }
    }

    /// Restores access after a reset; see [`Device::resume_access`].
    pub(crate) fn reset_done(&self) {
        self.resume_access(revoked::BY_RESET);
    }

    /// Revokes everything because of a PCI error. The wait is bounded, since the error may have taken away
    /// what a holder needs to let go: its driver recovers in the same walk of the bus, after this device.
    pub(crate) fn error_detected(&self) {
        if !self.suspend_access(revoked::BY_ERROR, LIMIT_MS) {
            self.name_holders();
        }
    }

    /// Restores access after the recovery from an error; see [`Device::resume_access`].
    pub(crate) fn error_resume(&self) {
        self.resume_access(revoked::BY_ERROR);
    }

    /// Revokes everything before the device sleeps, which may cost its memory the contents. EBUSY if an importer
    /// does not let go in time: the system then stays awake, and the buffers are live again.
    pub(crate) fn power_down(&self) -> Result {
        if self.suspend_access(revoked::BY_POWER, LIMIT_MS) {
            return Ok(());
        }
        self.name_holders();
        self.power_up();
        Err(EBUSY)
    }

    /// Restores access when the device is awake; see [`Device::resume_access`].
    pub(crate) fn power_up(&self) {
        self.resume_access(revoked::BY_POWER);
    }

    /// Refuses new exports and revokes everything for the reason `why`. Returns whether nobody can access
    /// the BARs any more; if not, `limit_ms` is over.
    fn suspend_access(&self, why: u32, limit_ms: u32) -> bool {
        let wait = Wait::begin(limit_ms);
        self.close(why);
        self.revoke_all(why, limit_ms) && self.idle_within(wait.left_ms())
    }

    /// Restores access that [`Device::suspend_access`] took away for the same reason, with a new generation:
    /// the memory's contents are undefined. A buffer that is revoked for another reason stays so. So does,
    /// after an error, a buffer of which an importer still has a mapping. Direct I/O in flight may outlast an
    /// error: a disk that recovers repeats it, into the pages that it was meant for.
    fn resume_access(&self, why: u32) {
        self.each_export(|buffer| {
            if revoke::restore(buffer, why) == Err(EBUSY) {
                pr_warn!("{}: a buffer stays revoked\n", self.name());
            }
        });
        self.open_again(why);
    }

    /// Revokes every export and waits until no importer can access the BARs by DMA; returns whether that
    /// succeeded in time. New exports are already refused. All exports are revoked before any wait, so the
    /// time is that of the slowest importer, not the sum of all.
    fn revoke_all(&self, why: u32, limit_ms: u32) -> bool {
        self.each_kept(|dmabuf| {
            // SAFETY: The dma-buf is in the device's list, and `each_kept` holds a reference to its file.
            let mut locked = unsafe { Locked::lock(dmabuf) };
            if locked.buffer().reasons() & why == 0 {
                revoke::take_away(&mut locked, why);
            }
        });
        let wait = Wait::begin(limit_ms);
        let mut nobody = true;
        self.each_kept(|dmabuf| {
            // SAFETY: The dma-buf is in the device's list, and `each_kept` holds a reference to its file.
            let left = unsafe { revoke::wait_for(dmabuf, why, Scope::Bar, wait.left_ms()) };
            nobody &= left.nobody();
        });
        nobody
    }

    /// Logs what keeps revoked buffers in use.
    fn name_holders(&self) {
        let pages = self.busy_pages();
        if pages != 0 {
            pr_warn!("{}: direct I/O on {pages} pages\n", self.name());
        }
        self.each_kept(|dmabuf| {
            // SAFETY: The dma-buf is in the device's list, and `each_kept` holds a reference to its file.
            unsafe { revoke::name_holders(dmabuf) };
        });
    }

    /// Calls `each` for every export whose file is alive, with its reservation lock held and no other lock.
    pub(crate) fn each_export(&self, mut each: impl FnMut(&mut Held<'_>)) {
        self.each_kept(|dmabuf| {
            // SAFETY: The dma-buf is in the device's list, and `each_kept` holds a reference to its file.
            each(unsafe { &mut Locked::lock(dmabuf) });
        });
    }
}

/// A bound device. Dropping it removes the device (see [`Device::remove`]). That must happen in the driver's
/// `unbind`, before the driver core takes the device apart.
pub(crate) struct Binding(Arc<Device>);

impl Binding {
    /// Binds a device that is being probed.
    pub(crate) fn new(pdev: &pci::Device<Core<'_>>) -> Result<Self> {
        // SAFETY: Dropping this object is the device's removal.
        Ok(Self(unsafe { Device::probe(pdev) }?))
    }

    /// The device, which outlives the binding while others refer to it.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.0
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        self.0.remove();
        // A process may have enabled bus mastering through an export meanwhile.
        // SAFETY: The device is valid, and bound to this driver until this returns.
        unsafe { bindings::pci_clear_master(raw(self.0.pci())) };
    }
}
