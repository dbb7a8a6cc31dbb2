// SPDX-License-Identifier: GPL-2.0

//! Mappings: the scatter tables by which an importer's device sees a buffer.
//!
//! A table per mapping, never shared or cached, and each keeps the system pages that it shows. Device
//! memory is shown by the kernel's own helper for exporters, which knows the routes; system pages
//! by the ordinary DMA API; a mixed buffer by both, joined in the buffer's order.

use core::{ptr, slice};

use kernel::{
    bindings,
    error::{from_err_ptr, to_result},
    ffi::*,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
};

use crate::{
    abi,
    buffer::{Buffer, State},
    ffi,
    system::System,
};

/// A mapping that an importer has.
pub(crate) struct Mapping {
    /// Whose it is.
    pub(crate) attachment: *mut bindings::dma_buf_attachment,
    /// The buffer's generation when it was made.
    pub(crate) generation: u64,
    /// What the importer holds, and gives back.
    sgt: *mut bindings::sg_table,
    backing: Backing,
}

/// What a table was made of, which says how it is freed.
enum Backing {
    Device,
    System(KBox<SystemTable>),
    Mixed(KBox<MixedTable>),
}

struct SystemTable {
    sgt: bindings::sg_table,
    dir: bindings::dma_data_direction,
    /// The pages shown; not used, but kept.
    _pages: KVec<Arc<System>>,
}

struct MixedTable {
    /// Both of the others' entries, in the buffer's order.
    sgt: bindings::sg_table,
    /// By `dma_buf_phys_vec_to_sgt`.
    device: *mut bindings::sg_table,
    system: KBox<SystemTable>,
}

impl Mapping {
    /// Shows the buffer as it is now to an importer's device.
    ///
    /// Errors: EINVAL where the kernel sees no route to the BAR, ENOMEM, EIO and others of the DMA
    /// API.
    ///
    /// # Safety
    ///
    /// The reservation lock is held, the buffer is not revoked, and `attachment` is one of its.
    pub(crate) unsafe fn map(
        attachment: *mut bindings::dma_buf_attachment,
        buffer: &Buffer,
        state: &State,
        dir: bindings::dma_data_direction,
    ) -> Result<Self> {
        // SAFETY: By the caller's promise, in each case.
        let (sgt, backing) = unsafe {
            match state.one_run() {
                // Most buffers: no list is needed.
                Some(home) => {
                    let mut range = bindings::phys_vec {
                        paddr: buffer.bar().start + home,
                        len: buffer.len as usize,
                    };
                    let range = slice::from_mut(&mut range);
                    let sgt = map_ranges(attachment, buffer, range, dir)?;
                    (sgt, Backing::Device)
                }
                None => match state.placement() {
                    abi::PLACEMENT_DEVICE => {
                        let sgt = map_device(attachment, buffer, state, dir)?;
                        (sgt, Backing::Device)
                    }
                    abi::PLACEMENT_SYSTEM => {
                        let mut table = SystemTable::map((*attachment).dev, state, dir)?;
                        (&raw mut table.sgt, Backing::System(table))
                    }
                    _ => {
                        let mut table = MixedTable::map(attachment, buffer, state, dir)?;
                        (&raw mut table.sgt, Backing::Mixed(table))
                    }
                },
            }
        };
        Ok(Self {
            attachment,
            generation: state.generation,
            sgt,
            backing,
        })
    }

    /// What the importer is given.
    pub(crate) fn sgt(&self) -> *mut bindings::sg_table {
        self.sgt
    }

    /// Whether the importer can reach device memory by it.
    pub(crate) fn shows_device(&self) -> bool {
        !matches!(self.backing, Backing::System(_))
    }

    /// Frees the table, which the importer has given back.
    ///
    /// # Safety
    ///
    /// The reservation lock is held, and `dir` is the direction it was mapped in.
    pub(crate) unsafe fn unmap(self, dir: bindings::dma_data_direction) {
        // SAFETY: By the caller's promise; each kind goes the way it came.
        unsafe {
            match self.backing {
                Backing::Device => unmap_device(self.attachment, self.sgt, dir),
                Backing::System(mut table) => table.unmap((*self.attachment).dev),
                Backing::Mixed(mut table) => {
                    bindings::sg_free_table(&mut table.sgt);
                    table.system.unmap((*self.attachment).dev);
                    unmap_device(self.attachment, table.device, dir);
                }
            }
        }
    }

    /// Makes what the device wrote visible to the processor, or the reverse. Device memory needs
    /// nothing of the kind.
    ///
    /// # Safety
    ///
    /// The reservation lock is held.
    pub(crate) unsafe fn sync(&mut self, for_cpu: bool) {
        let table = match &mut self.backing {
            Backing::Device => return,
            Backing::System(table) => table,
            Backing::Mixed(table) => &mut table.system,
        };
        let (sgl, entries) = (table.sgt.sgl, table.sgt.orig_nents as c_int);
        // SAFETY: The table is mapped for the device, which its attachment keeps.
        unsafe {
            let dev = (*self.attachment).dev;
            if for_cpu {
                bindings::__dma_sync_sg_for_cpu(dev, sgl, entries, table.dir);
            } else {
                bindings::__dma_sync_sg_for_device(dev, sgl, entries, table.dir);
            }
        }
    }
}

/// # Safety
///
/// As for [`Mapping::map`].
unsafe fn map_device(
    attachment: *mut bindings::dma_buf_attachment,
    buffer: &Buffer,
    state: &State,
    dir: bindings::dma_data_direction,
) -> Result<*mut bindings::sg_table> {
    let start = buffer.bar().start;
    let mut ranges: KVec<bindings::phys_vec> = KVec::new();
    for (offset, len) in state.at_home() {
        let (paddr, len) = (start + offset, len as usize);
        match ranges.last_mut() {
            // Neighbours are joined.
            Some(last) if last.paddr + last.len as u64 == paddr => last.len += len,
            _ => ranges.push(bindings::phys_vec { paddr, len }, GFP_KERNEL)?,
        }
    }
    // SAFETY: By the caller's promise.
    unsafe { map_ranges(attachment, buffer, &mut ranges, dir) }
}

/// # Safety
///
/// As for [`Mapping::map`]; the ranges are the buffer's own.
unsafe fn map_ranges(
    attachment: *mut bindings::dma_buf_attachment,
    buffer: &Buffer,
    ranges: &mut [bindings::phys_vec],
    dir: bindings::dma_data_direction,
) -> Result<*mut bindings::sg_table> {
    let len = ranges.iter().map(|range| range.len).sum();
    // SAFETY: Not revoked, under the lock, means that the device is bound, so the provider is
    // valid, until every scatter table came back.
    from_err_ptr(unsafe {
        ffi::dma_buf_phys_vec_to_sgt(
            attachment,
            buffer.bar().provider,
            ranges.as_mut_ptr(),
            ranges.len(),
            len,
            dir,
        )
    })
}

/// # Safety
///
/// The reservation lock is held and `sgt` came from [`map_device`] for this attachment.
unsafe fn unmap_device(
    attachment: *mut bindings::dma_buf_attachment,
    sgt: *mut bindings::sg_table,
    dir: bindings::dma_data_direction,
) {
    // SAFETY: By the caller's promise.
    unsafe {
        // `dma_buf_phys_vec_to_sgt` of Linux 7.2 sets `orig_nents` to zero, to say that there is
        // no CPU list, and `dma_buf_free_sgt` frees as many entries as that says: every mapping
        // leaks its list. With the number put back, as here, it is freed.
        (*sgt).orig_nents = (*sgt).nents;
        ffi::dma_buf_free_sgt(attachment, sgt, dir);
    }
}

impl SystemTable {
    /// # Safety
    ///
    /// The reservation lock is held, and `dev` can do DMA (it has a DMA mask).
    unsafe fn map(
        dev: *mut bindings::device,
        state: &State,
        dir: bindings::dma_data_direction,
    ) -> Result<KBox<Self>> {
        let mut kept = KVec::new();
        let mut all = KVVec::new();
        for piece in &state.pieces {
            if let Some(system) = &piece.system {
                kept.push(system.pages.clone(), GFP_KERNEL)?;
                all.extend_from_slice(piece.system_pages(), GFP_KERNEL)?;
            }
        }
        let mut this = KBox::new(
            Self {
                sgt: bindings::sg_table::default(),
                dir,
                _pages: kept,
            },
            GFP_KERNEL,
        )?;
        let count = c_uint::try_from(all.len()).map_err(|_| EINVAL)?;
        // SAFETY: `dev` is valid.
        let segment = unsafe { ffi::peerbuf_dma_max_segment(dev) };
        // SAFETY: The list has `count` pages, and the table is ours.
        to_result(unsafe {
            bindings::sg_alloc_table_from_pages_segment(
                &mut this.sgt,
                all.as_mut_ptr(),
                count,
                0,
                all.len() * PAGE_SIZE,
                segment,
                bindings::GFP_KERNEL,
            )
        })?;
        // SAFETY: The table was filled above, and `dev` can do DMA.
        let mapped = to_result(unsafe { bindings::dma_map_sgtable(dev, &mut this.sgt, dir, 0) });
        if let Err(e) = mapped {
            // SAFETY: Filled above and not mapped.
            unsafe { bindings::sg_free_table(&mut this.sgt) };
            return Err(e);
        }
        Ok(this)
    }

    /// # Safety
    ///
    /// It is mapped for `dev`, and never used again.
    unsafe fn unmap(&mut self, dev: *mut bindings::device) {
        // SAFETY: By the caller's promise.
        unsafe {
            let entries = self.sgt.orig_nents as c_int;
            bindings::dma_unmap_sg_attrs(dev, self.sgt.sgl, entries, self.dir, 0);
            bindings::sg_free_table(&mut self.sgt);
        }
    }
}

impl MixedTable {
    /// # Safety
    ///
    /// As for [`Mapping::map`].
    unsafe fn map(
        attachment: *mut bindings::dma_buf_attachment,
        buffer: &Buffer,
        state: &State,
        dir: bindings::dma_data_direction,
    ) -> Result<KBox<Self>> {
        // SAFETY: By the caller's promise, here and below.
        unsafe {
            let dev = (*attachment).dev;
            let mut system = SystemTable::map(dev, state, dir)?;
            let device = match map_device(attachment, buffer, state, dir) {
                Ok(device) => device,
                Err(e) => {
                    system.unmap(dev);
                    return Err(e);
                }
            };
            let entries = join(state, device, &mut system.sgt, |_, _, _| {});
            let mut joined = bindings::sg_table::default();
            let made = to_result(bindings::sg_alloc_table(
                &mut joined,
                entries,
                bindings::GFP_KERNEL,
            ))
            .and_then(|()| {
                let mut to = joined.sgl;
                join(state, device, &mut system.sgt, |_, address, len| {
                    (*to).dma_address = address;
                    (*to).dma_length = len;
                    to = bindings::sg_next(to);
                });
                Ok(KBox::<Self>::new_uninit(GFP_KERNEL)?)
            });
            match made {
                Ok(place) => Ok(place.write(Self {
                    sgt: joined,
                    device,
                    system,
                })),
                Err(e) => {
                    // Nothing to free where the first step failed.
                    bindings::sg_free_table(&mut joined);
                    system.unmap(dev);
                    unmap_device(attachment, device, dir);
                    Err(e)
                }
            }
        }
    }
}

/// Where in a mapped table a walk has come to.
struct Cursor {
    sg: *mut bindings::scatterlist,
    offset: u32,
}

impl Cursor {
    /// The next bytes, at most `most`: their DMA address and how many.
    ///
    /// # Safety
    ///
    /// The table is mapped, and has not been walked to its end.
    unsafe fn take(&mut self, most: u64) -> (u64, u32) {
        // SAFETY: By the caller's promise.
        unsafe {
            let entry = self.sg;
            let left = (*entry).dma_length - self.offset;
            let len = u64::from(left).min(most) as u32;
            let address = (*entry).dma_address + u64::from(self.offset);
            self.offset += len;
            if len == left {
                *self = Self {
                    sg: bindings::sg_next(entry),
                    offset: 0,
                };
            }
            (address, len)
        }
    }
}

/// Goes through a mixed buffer in order, and says for each entry of the joined list its number,
/// DMA address and length. Returns how many there are.
///
/// # Safety
///
/// The tables were mapped from the device and the system pieces of `state` as it is now.
unsafe fn join(
    state: &State,
    device: *mut bindings::sg_table,
    system: *mut bindings::sg_table,
    mut each: impl FnMut(u32, u64, u32),
) -> u32 {
    // SAFETY: Both tables are valid.
    let start = |table: *mut bindings::sg_table| unsafe {
        Cursor {
            sg: (*table).sgl,
            offset: 0,
        }
    };
    let (mut device, mut system) = (start(device), start(system));
    let mut entries = 0;
    for piece in &state.pieces {
        let from = if piece.system.is_some() {
            &mut system
        } else {
            &mut device
        };
        let mut left = piece.len;
        while left != 0 {
            // SAFETY: Each table has as many bytes as its pieces together.
            let (address, len) = unsafe { from.take(left) };
            each(entries, address, len);
            left -= u64::from(len);
            entries += 1;
        }
    }
    entries
}

/// The mappings that importers have of a buffer. Most have one, which costs no list.
pub(crate) struct Mappings {
    first: Option<Mapping>,
    more: KVec<Mapping>,
}

impl Mappings {
    pub(crate) const fn new() -> Self {
        Self {
            first: None,
            more: KVec::new(),
        }
    }

    /// Makes room for one more. ENOMEM.
    pub(crate) fn reserve(&mut self) -> Result {
        if self.first.is_some() {
            self.more.reserve(1, GFP_KERNEL)?;
        }
        Ok(())
    }

    /// Adds one, for which there is room.
    pub(crate) fn push(&mut self, mapping: Mapping) {
        if self.first.is_none() {
            self.first = Some(mapping);
        } else {
            let _ = self.more.push_within_capacity(mapping);
        }
    }

    /// Takes out the mapping whose table an importer gives back.
    pub(crate) fn take(
        &mut self,
        attachment: *mut bindings::dma_buf_attachment,
        sgt: *mut bindings::sg_table,
    ) -> Option<Mapping> {
        let wanted =
            |mapping: &mut Mapping| ptr::eq(mapping.sgt, sgt) && mapping.attachment == attachment;
        if let Some(first) = self.first.take_if(wanted) {
            return Some(first);
        }
        // The newest are the likeliest to go. The order is nobody's business.
        let index = self.more.iter_mut().rposition(wanted)?;
        let last = self.more.len() - 1;
        self.more.swap(index, last);
        self.more.pop()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Mapping> {
        Iterator::chain(self.first.iter(), &*self.more)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Mapping> {
        Iterator::chain(self.first.iter_mut(), &mut *self.more)
    }

    pub(crate) fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.more.len()
    }
}
