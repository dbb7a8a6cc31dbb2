// SPDX-License-Identifier: GPL-2.0

//! Mappings: the scatter tables through which an importer's device accesses a buffer.
//!
//! Each mapping has a table of its own, and keeps a reference to the system pages in it. The exporters'
//! helper `dma_buf_phys_vec_to_sgt` maps device memory, since it knows the routes; the DMA API maps system
//! pages. A buffer that needs several such tables gets a joined table, in the buffer's order.

use core::{ptr, slice};

use kernel::{
    bindings,
    dma::DataDirection,
    error::{from_err_ptr, to_result},
    ffi::*,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
};

use crate::{abi, bar::Bar, ffi, pieces::Pieces, system::System};

/// A mapping held by an importer.
pub(crate) struct Mapping {
    /// The importer's attachment.
    pub(crate) attachment: *mut bindings::dma_buf_attachment,
    /// The buffer's generation when the mapping was made.
    pub(crate) generation: u64,
    /// The table that the importer holds and passes to unmap.
    sgt: *mut bindings::sg_table,
    backing: Backing,
}

/// The origin of a table, which determines how to free it.
enum Backing {
    Device,
    System(KBox<SystemTable>),
    Joined(KBox<JoinedTable>),
}

struct SystemTable {
    sgt: bindings::sg_table,
    dir: bindings::dma_data_direction,
    /// Keeps the mapped pages allocated; never read.
    _pages: KVec<Arc<System>>,
}

struct JoinedTable {
    /// The entries of the other tables, in the buffer's order.
    sgt: bindings::sg_table,
    device: DeviceTables,
    system: Option<KBox<SystemTable>>,
}

/// Tables made by `dma_buf_phys_vec_to_sgt`, in the buffer's order.
type DeviceTables = KVec<*mut bindings::sg_table>;

impl Mapping {
    /// Maps the buffer, as it is placed now, for an importer's device.
    ///
    /// Errors: EINVAL if the kernel knows no route to the BAR, ENOMEM, EIO and others of the DMA API.
    ///
    /// # Safety
    ///
    /// The caller holds the reservation lock. The buffer consists of `pieces` in `bar`, is not revoked, and
    /// `attachment` is an attachment of it.
    pub(crate) unsafe fn map(
        attachment: *mut bindings::dma_buf_attachment,
        bar: &Bar,
        pieces: &Pieces,
        generation: u64,
        dir: bindings::dma_data_direction,
    ) -> Result<Self> {
        // SAFETY: By the caller's promise, in each arm: the lock is held and the buffer is not revoked.
        let (sgt, backing) = unsafe {
            match pieces.one_run() {
                // The common case: one range, no list.
                Some(home) => {
                    let mut range = bindings::phys_vec {
                        paddr: bar.start + home,
                        len: pieces.bytes() as usize,
                    };
                    let range = slice::from_mut(&mut range);
                    let sgt = map_ranges(attachment, bar, range, dir)?;
                    (sgt, Backing::Device)
                }
                None if pieces.placement() == abi::PLACEMENT_SYSTEM => {
                    let mut table = SystemTable::map((*attachment).dev, pieces, dir)?;
                    (&raw mut table.sgt, Backing::System(table))
                }
                None => {
                    let device = map_device(attachment, bar, pieces, dir)?;
                    match &*device {
                        &[sgt] if pieces.placement() == abi::PLACEMENT_DEVICE => {
                            (sgt, Backing::Device)
                        }
                        _ => {
                            let mut table = JoinedTable::join(attachment, pieces, device, dir)?;
                            (&raw mut table.sgt, Backing::Joined(table))
                        }
                    }
                }
            }
        };
        Ok(Self {
            attachment,
            generation,
            sgt,
            backing,
        })
    }

    /// The importer's scatter table.
    pub(crate) fn sgt(&self) -> *mut bindings::sg_table {
        self.sgt
    }

    /// Whether the importer can access device memory through the mapping.
    pub(crate) fn shows_device(&self) -> bool {
        !matches!(self.backing, Backing::System(_))
    }

    /// Frees the table, which the importer has passed to unmap.
    ///
    /// # Safety
    ///
    /// The caller holds the reservation lock, and `dir` is the direction given to [`Mapping::map`].
    pub(crate) unsafe fn unmap(self, dir: bindings::dma_data_direction) {
        // SAFETY: The lock is held, by the caller's promise; each table is freed by the counterpart of its
        // constructor.
        unsafe {
            match self.backing {
                Backing::Device => unmap_device(self.attachment, self.sgt, dir),
                Backing::System(mut table) => table.unmap((*self.attachment).dev),
                Backing::Joined(mut table) => table.unmap(self.attachment, dir),
            }
        }
    }

    /// Synchronises system memory for the CPU or for the device. Device memory needs no synchronisation.
    ///
    /// # Safety
    ///
    /// The caller holds the reservation lock.
    pub(crate) unsafe fn sync(&mut self, for_cpu: bool) {
        let table = match &mut self.backing {
            Backing::Device => return,
            Backing::System(table) => table,
            Backing::Joined(table) => match &mut table.system {
                Some(table) => table,
                None => return,
            },
        };
        let (sgl, entries) = (table.sgt.sgl, table.sgt.orig_nents as c_int);
        // SAFETY: The table is mapped for the device, which the attachment keeps.
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

/// Whether the DMA API gives the importer's device addresses of the BAR: maps the BAR's last page, and unmaps
/// it. A route is not enough: only PCI devices get such addresses, and those through a host bridge must be ones
/// that the device can send, on a kernel that does not bounce all DMA (`swiotlb=force`, encrypted guests).
///
/// # Safety
///
/// The caller holds the reservation lock. `attachment` is one of a buffer in `bar` that is not revoked.
pub(crate) unsafe fn is_mappable(attachment: *mut bindings::dma_buf_attachment, bar: &Bar) -> bool {
    let dir = DataDirection::Bidirectional.into();
    let len = PAGE_SIZE;
    let paddr = bar.start + bar.size - len as u64;
    let mut page = bindings::phys_vec { paddr, len };
    // SAFETY: The lock is held and the buffer is not revoked, by the caller's promise.
    let mapped = unsafe { map_ranges(attachment, bar, slice::from_mut(&mut page), dir) };
    if let Ok(sgt) = mapped {
        // SAFETY: The lock is held, and `map_ranges` made the table for this attachment.
        unsafe { unmap_device(attachment, sgt, dir) };
    }
    mapped.is_ok()
}

/// Maps the parts in the BAR: one table, or several if one call cannot map all ranges.
///
/// # Safety
///
/// As for [`Mapping::map`].
unsafe fn map_device(
    attachment: *mut bindings::dma_buf_attachment,
    bar: &Bar,
    pieces: &Pieces,
    dir: bindings::dma_data_direction,
) -> Result<DeviceTables> {
    let start = bar.start;
    let mut ranges: KVec<bindings::phys_vec> = KVec::new();
    for (offset, len) in pieces.at_home() {
        let (paddr, len) = (start + offset, len as usize);
        match ranges.last_mut() {
            // Merges contiguous ranges.
            Some(last) if last.paddr + last.len as u64 == paddr => last.len += len,
            _ => ranges.push(bindings::phys_vec { paddr, len }, GFP_KERNEL)?,
        }
    }
    // SAFETY: An attachment keeps its device, and the device keeps its IOMMU domain while it has a driver.
    let translated = unsafe { !bindings::iommu_get_domain_for_dev((*attachment).dev).is_null() };
    // SAFETY: The call only returns a number.
    let translated_at_once = unsafe { ffi::peerbuf_translated_ranges() };
    let at_once = match translated {
        true => translated_at_once as usize,
        false => ranges.len().max(1),
    };
    let mut tables = KVec::with_capacity(ranges.len().div_ceil(at_once), GFP_KERNEL)?;
    for ranges in ranges.chunks_mut(at_once) {
        // SAFETY: The lock is held and the buffer is not revoked, by the caller's promise.
        match unsafe { map_ranges(attachment, bar, ranges, dir) } {
            Ok(table) => {
                let _ = tables.push_within_capacity(table);
            }
            Err(e) => {
                // SAFETY: The lock is held, and the tables were made by `map_ranges` in this loop.
                unsafe { unmap_tables(attachment, &tables, dir) };
                return Err(e);
            }
        }
    }
    Ok(tables)
}

/// # Safety
///
/// As for [`Mapping::map`]; `ranges` are ranges of the buffer.
unsafe fn map_ranges(
    attachment: *mut bindings::dma_buf_attachment,
    bar: &Bar,
    ranges: &mut [bindings::phys_vec],
    dir: bindings::dma_data_direction,
) -> Result<*mut bindings::sg_table> {
    let len = ranges.iter().map(|range| range.len).sum();
    // SAFETY: The lock is held and the buffer is not revoked. So the device is bound, and the provider stays
    // valid until every scatter table has been unmapped.
    from_err_ptr(unsafe {
        ffi::dma_buf_phys_vec_to_sgt(
            attachment,
            bar.provider,
            ranges.as_mut_ptr(),
            ranges.len(),
            len,
            dir,
        )
    })
}

/// # Safety
///
/// The caller holds the reservation lock, and `sgt` came from [`map_ranges`] for this attachment.
unsafe fn unmap_device(
    attachment: *mut bindings::dma_buf_attachment,
    sgt: *mut bindings::sg_table,
    dir: bindings::dma_data_direction,
) {
    // SAFETY: By the caller's promise: the lock is held, and `sgt` is a table of this attachment.
    unsafe {
        ffi::peerbuf_dma_buf_free_sgt(attachment, sgt, dir);
    }
}

/// # Safety
///
/// As for [`unmap_device`], for each of `tables`.
unsafe fn unmap_tables(
    attachment: *mut bindings::dma_buf_attachment,
    tables: &[*mut bindings::sg_table],
    dir: bindings::dma_data_direction,
) {
    for &sgt in tables {
        // SAFETY: By the caller's promise: the lock is held, and `sgt` is a table of this attachment.
        unsafe { unmap_device(attachment, sgt, dir) };
    }
}

impl SystemTable {
    /// # Safety
    ///
    /// The caller holds the reservation lock, and `dev` can do DMA (it has a DMA mask).
    unsafe fn map(
        dev: *mut bindings::device,
        pieces: &Pieces,
        dir: bindings::dma_data_direction,
    ) -> Result<KBox<Self>> {
        let mut kept = KVec::new();
        let mut all = KVVec::new();
        for piece in &**pieces {
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
        // SAFETY: The list has `count` pages, and no one else uses the table.
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
            // SAFETY: The table was filled above and is not mapped.
            unsafe { bindings::sg_free_table(&mut this.sgt) };
            return Err(e);
        }
        Ok(this)
    }

    /// # Safety
    ///
    /// The table is mapped for `dev` and is not used afterwards.
    unsafe fn unmap(&mut self, dev: *mut bindings::device) {
        // SAFETY: By the caller's promise: the table is mapped for `dev`.
        unsafe {
            let entries = self.sgt.orig_nents as c_int;
            bindings::dma_unmap_sg_attrs(dev, self.sgt.sgl, entries, self.dir, 0);
            bindings::sg_free_table(&mut self.sgt);
        }
    }
}

impl JoinedTable {
    /// Maps the system pages, if any, and joins all tables. On an error it unmaps everything, `device` too.
    ///
    /// # Safety
    ///
    /// As for [`Mapping::map`]; `device` holds the tables that `map_device` made from `pieces` for this
    /// attachment.
    unsafe fn join(
        attachment: *mut bindings::dma_buf_attachment,
        pieces: &Pieces,
        device: DeviceTables,
        dir: bindings::dma_data_direction,
    ) -> Result<KBox<Self>> {
        let mut this = Self {
            sgt: bindings::sg_table::default(),
            device,
            system: None,
        };
        // SAFETY: By the caller's promise, which is the same as that of `fill`.
        let made = unsafe { this.fill((*attachment).dev, pieces, dir) }
            .and_then(|()| Ok(KBox::<Self>::new_uninit(GFP_KERNEL)?));
        match made {
            Ok(place) => Ok(place.write(this)),
            Err(e) => {
                // SAFETY: The lock is held, and everything in `this` was mapped for the attachment.
                // `sg_free_table` accepts a table that was never filled.
                unsafe { this.unmap(attachment, dir) };
                Err(e)
            }
        }
    }

    /// # Safety
    ///
    /// As for [`JoinedTable::join`].
    unsafe fn fill(
        &mut self,
        dev: *mut bindings::device,
        pieces: &Pieces,
        dir: bindings::dma_data_direction,
    ) -> Result {
        let pages;
        let mut system: &[*mut bindings::sg_table] = &[];
        if pieces.placement() != abi::PLACEMENT_DEVICE {
            // SAFETY: The lock is held and the device can do DMA, by the caller's promise.
            let table = self
                .system
                .insert(unsafe { SystemTable::map(dev, pieces, dir) }?);
            pages = [&raw mut table.sgt];
            system = &pages;
        }
        // SAFETY: `device` was mapped from `pieces`, by the caller's promise, and `system` was mapped above.
        let entries = unsafe { in_order(pieces, &self.device, system, |_, _| {}) };
        // SAFETY: The table is ours and empty.
        to_result(unsafe {
            bindings::sg_alloc_table(&mut self.sgt, entries, bindings::GFP_KERNEL)
        })?;
        let mut to = self.sgt.sgl;
        // SAFETY: The tables are mapped, and `self.sgt` has as many entries as were counted.
        unsafe {
            in_order(pieces, &self.device, system, |address, len| {
                (*to).dma_address = address;
                (*to).dma_length = len;
                to = bindings::sg_next(to);
            });
        }
        // There is no list for the CPU; `dma_buf_phys_vec_to_sgt` says so in the same way.
        self.sgt.orig_nents = 0;
        Ok(())
    }

    /// # Safety
    ///
    /// The caller holds the reservation lock, the table was mapped for `attachment`, and it is not used
    /// afterwards.
    unsafe fn unmap(
        &mut self,
        attachment: *mut bindings::dma_buf_attachment,
        dir: bindings::dma_data_direction,
    ) {
        // SAFETY: By the caller's promise: the lock is held, and every table here was mapped for
        // `attachment`.
        unsafe {
            self.sgt.orig_nents = self.sgt.nents;
            bindings::sg_free_table(&mut self.sgt);
            if let Some(system) = &mut self.system {
                system.unmap((*attachment).dev);
            }
            unmap_tables(attachment, &self.device, dir);
        }
    }
}

/// A position in a sequence of mapped tables.
struct Cursor<'a> {
    sg: *mut bindings::scatterlist,
    offset: u32,
    more: slice::Iter<'a, *mut bindings::sg_table>,
}

impl<'a> Cursor<'a> {
    fn new(tables: &'a [*mut bindings::sg_table]) -> Self {
        Self {
            sg: ptr::null_mut(),
            offset: 0,
            more: tables.iter(),
        }
    }

    /// Takes the next bytes, at most `most`; returns their DMA address and their number.
    ///
    /// # Safety
    ///
    /// The tables are mapped, and the cursor is not past the end of the last one.
    unsafe fn take(&mut self, most: u64) -> (u64, u32) {
        // SAFETY: By the caller's promise the current entry is valid.
        unsafe {
            if self.sg.is_null() {
                if let Some(&table) = self.more.next() {
                    self.sg = (*table).sgl;
                }
            }
            let entry = self.sg;
            let left = (*entry).dma_length - self.offset;
            let len = u64::from(left).min(most) as u32;
            let address = (*entry).dma_address + u64::from(self.offset);
            self.offset += len;
            if len == left {
                self.sg = bindings::sg_next(entry);
                self.offset = 0;
            }
            (address, len)
        }
    }
}

/// Walks a buffer in order and passes the DMA address and the length of each entry of the joined table to
/// `each`. Returns the number of entries.
///
/// # Safety
///
/// The tables were mapped from `pieces`: `device` from those in the BAR, `system` from those in system
/// memory.
unsafe fn in_order(
    pieces: &Pieces,
    device: &[*mut bindings::sg_table],
    system: &[*mut bindings::sg_table],
    mut each: impl FnMut(u64, u32),
) -> u32 {
    let (mut device, mut system) = (Cursor::new(device), Cursor::new(system));
    let mut entries = 0;
    for piece in &**pieces {
        let from = if piece.system.is_some() {
            &mut system
        } else {
            &mut device
        };
        let mut left = piece.len;
        while left != 0 {
            // SAFETY: The tables cover as many bytes as the pieces of their kind.
            let (address, len) = unsafe { from.take(left) };
            each(address, len);
            left -= u64::from(len);
            entries += 1;
        }
    }
    entries
}

/// Removes the mapping of the table `sgt` from the list, because its importer unmaps it.
pub(crate) fn take(
    mappings: &mut KVec<Mapping>,
    attachment: *mut bindings::dma_buf_attachment,
    sgt: *mut bindings::sg_table,
) -> Option<Mapping> {
    let wanted = |mapping: &Mapping| ptr::eq(mapping.sgt, sgt) && mapping.attachment == attachment;
    // The newest mapping is the likeliest to go. The list has no order.
    let index = mappings.iter().rposition(wanted)?;
    let last = mappings.len() - 1;
    mappings.swap(index, last);
    mappings.pop()
}
