// SPDX-License-Identifier: GPL-2.0

//! What happens to a device's exports as a whole: they are made, and when the device goes away or is
//! reset, access to all of them is taken away.

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
    buffer::{revoked, Buffer, Held, Locked},
    common::{raw, DmaBuf},
    device::{Device, Part, Presence},
    exporter, ffi,
    pieces::{Piece, Pieces, SystemPart},
    region::Place,
    revoke::{self, Scope},
    system::{Contents, System},
    wait::Wait,
};

impl Device {
    /// Exports memory as one dma-buf, in the order of `parts`, and puts down where each is. `flags`
    /// are `abi::EXPORT_*`.
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

        let dmabuf = self.take(index, parts, |parts, chunks| {
            for (part, piece) in parts.iter().zip(pieces.iter_mut()) {
                piece.home = part.place.map(|_| part.offset);
            }
            let buffer = Buffer::new(self.into(), index, flags, Pieces::new(pieces), chunks)?;
            exporter::export(buffer, fd_flags)
        })?;
        // SAFETY: It is new, and so is its one reference.
        Ok(unsafe { DmaBuf::from_raw(dmabuf) })
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
        self.close(Presence::Gone);
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
        self.close(Presence::Resetting);
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
        self.open_again();
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

    /// Calls `each` for every export whose file is alive, with its reservation lock held and no other.
    pub(crate) fn each_export(&self, mut each: impl FnMut(&mut Held<'_>)) {
        self.each_kept(|dmabuf| {
            // SAFETY: It is one of ours, and kept.
            each(unsafe { &mut Locked::lock(dmabuf) });
        });
    }
}

/// A device that is bound. Dropping it is the device's removal, see [`Device::remove`], which must
/// happen before the driver core takes anything of the device apart: in the driver's `unbind`.
pub(crate) struct Binding(Arc<Device>);

impl Binding {
    /// Binds a device that is being probed.
    pub(crate) fn new(pdev: &pci::Device<Core<'_>>) -> Result<Self> {
        // SAFETY: Dropping this object is the device's removal.
        Ok(Self(unsafe { Device::probe(pdev) }?))
    }

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
