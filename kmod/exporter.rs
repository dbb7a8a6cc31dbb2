// SPDX-License-Identifier: GPL-2.0

//! The dma-buf operations of a [`Buffer`]: the only functions of an export that C code calls.
//!
//! This is a dynamic exporter: it moves and revokes buffers. Some importers cannot use the BAR: they do not
//! accept peer memory, cannot be invalidated, or have no route. Such an importer keeps the buffer in system
//! memory while it is attached, if the export allows moving; otherwise attaching fails.
//!
//! Lock order: `mmap_lock`, then the reservation lock (page faults take it), then the file's `i_mmap_rwsem`
//! (zapping takes it). `dma_resv_lockdep()` in the kernel teaches lockdep the same order.

use core::ptr;

use kernel::{
    bindings,
    dma::DataDirection,
    error::{from_err_ptr, from_result, to_result},
    ffi::*,
    mm::virt::VmaNew,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
};

use crate::{
    abi,
    buffer::{Buffer, Held, KernelMapping, Left, Locked, State},
    ffi::{self, Table},
    mapping::{self, Mapping},
    moves::{self, For, To},
    peers,
    pieces::Piece,
};

static OPS: Table<bindings::dma_buf_ops> = Table(bindings::dma_buf_ops {
    vmap: Some(vmap),
    vunmap: Some(vunmap),
    ..WITHOUT_VMAP
});

/// Operations of a buffer that has no kernel mapping: device memory that does not move, or a buffer that
/// devices may only read. Without `vmap` the core answers EINVAL. It WARNs on every error of `vmap` itself,
/// which anyone with the descriptor could provoke.
static OPS_WITHOUT_VMAP: Table<bindings::dma_buf_ops> = Table(WITHOUT_VMAP);

const WITHOUT_VMAP: bindings::dma_buf_ops = bindings::dma_buf_ops {
    attach: Some(attach),
    detach: Some(detach),
    pin: Some(pin),
    unpin: Some(unpin),
    map_dma_buf: Some(map),
    unmap_dma_buf: Some(unmap),
    release: Some(release),
    begin_cpu_access: Some(begin_cpu_access),
    end_cpu_access: Some(end_cpu_access),
    mmap: Some(mmap),
    vmap: None,
    vunmap: None,
};

static VM_OPS: Table<bindings::vm_operations_struct> = Table(bindings::vm_operations_struct {
    fault: Some(fault),
    // SAFETY: A null function pointer means that the exporter lacks the operation.
    ..unsafe { core::mem::zeroed() }
});

/// Makes a dma-buf that owns `buffer`. On an error the buffer is dropped.
pub(crate) fn export(buffer: Arc<Buffer>, fd_flags: u32) -> Result<*mut bindings::dma_buf> {
    let movable = !buffer.has_home || buffer.may_move || device_vmap();
    let vmaps = movable && !buffer.devices_read;
    let info = bindings::dma_buf_export_info {
        exp_name: c"peerbuf".as_char_ptr(),
        // A dma-buf keeps the module loaded, which contains its operations. It does not keep the device
        // bound.
        owner: crate::compat::THIS_MODULE.as_ptr(),
        ops: if vmaps { &OPS.0 } else { &OPS_WITHOUT_VMAP.0 },
        size: buffer.len as usize,
        flags: fd_flags as c_int,
        resv: ptr::null_mut(),
        priv_: Arc::into_raw(buffer).cast_mut().cast(),
    };
    // SAFETY: `info` is complete, and `priv_` is a reference to a `Buffer`, as the operations expect.
    let dmabuf = from_err_ptr(unsafe { bindings::dma_buf_export(&info) });
    if dmabuf.is_err() {
        // SAFETY: A failed export does not call the release operation, so the reference is still ours.
        drop(unsafe { Arc::from_raw(info.priv_.cast_const().cast::<Buffer>()) });
    }
    dmabuf
}

/// Whether this module made the dma-buf.
///
/// # Safety
///
/// `dmabuf` is valid.
pub(crate) unsafe fn is_ours(dmabuf: *mut bindings::dma_buf) -> bool {
    // SAFETY: The dma-buf is valid, by the caller's promise.
    let ops = unsafe { (*dmabuf).ops };
    ptr::eq(ops, &OPS.0) || ptr::eq(ops, &OPS_WITHOUT_VMAP.0)
}

/// The buffer behind one of our dma-bufs.
///
/// # Safety
///
/// `dmabuf` was made by [`export`] and is not released while the result is in use.
pub(crate) unsafe fn buffer<'a>(dmabuf: *mut bindings::dma_buf) -> &'a Buffer {
    // SAFETY: `priv_` is the reference that `export` put there.
    unsafe { &*(*dmabuf).priv_.cast::<Buffer>() }
}

/// An importer: its attachment, and a note in the attachment's `priv`. The lowest bit of the note says
/// whether the importer needs system memory; the bits above count its pins. Attach writes the note before
/// anyone else can see the attachment; later writers hold the reservation lock.
pub(crate) struct Importer(*mut bindings::dma_buf_attachment);

impl Importer {
    const NEEDS_SYSTEM: usize = 1;
    const ONE_PIN: usize = 2;

    /// # Safety
    ///
    /// `attachment` belongs to a dma-buf of this module and stays valid as long as the result.
    pub(crate) unsafe fn of(attachment: *mut bindings::dma_buf_attachment) -> Self {
        Self(attachment)
    }

    fn note(&self) -> usize {
        // SAFETY: The attachment is valid, by the promise to `of`. The pointer is only a number.
        unsafe { (*self.0).priv_ }.addr()
    }

    fn set_note(&self, note: usize) {
        // SAFETY: The attachment is valid, by the promise to `of`.
        unsafe { (*self.0).priv_ = ptr::without_provenance_mut(note) };
    }

    fn needs_system(&self) -> bool {
        self.note() & Self::NEEDS_SYSTEM != 0
    }

    pub(crate) fn pins(&self) -> u32 {
        (self.note() / Self::ONE_PIN) as u32
    }

    /// The importer's device.
    fn device(&self) -> &kernel::device::Device {
        // SAFETY: The attachment is valid, by the promise to `of`; an importer keeps its device while it is
        // attached.
        unsafe { kernel::device::Device::from_raw((*self.0).dev) }
    }

    /// Whether the importer's device does DMA. Without a DMA mask the driver copies with the CPU.
    fn does_dma(&self) -> bool {
        // SAFETY: The attachment is valid, by the promise to `of`; an importer keeps its device while it is
        // attached.
        !unsafe { (*(*self.0).dev).dma_mask }.is_null()
    }

    fn revocable(&self) -> bool {
        // SAFETY: The attachment is valid, by the promise to `of`.
        unsafe { bindings::dma_buf_attach_revocable(self.0) }
    }

    /// The importer's `abi::ATTACHMENT_*` flags, without STALE.
    pub(crate) fn flags(&self) -> u32 {
        // SAFETY: The attachment is valid, by the promise to `of`.
        let (dynamic, peer) = unsafe { (!(*self.0).importer_ops.is_null(), (*self.0).peer2peer) };
        let flag = |has: bool, flag: u32| if has { flag } else { 0 };
        flag(dynamic, abi::ATTACHMENT_DYNAMIC)
            | flag(peer, abi::ATTACHMENT_PEER)
            | flag(self.revocable(), abi::ATTACHMENT_REVOCABLE)
            | flag(self.needs_system(), abi::ATTACHMENT_NEEDS_SYSTEM)
    }

    /// Whether the importer can use the BAR of `buffer`, through a route in the cache.
    fn is_known_peer(&self, buffer: &Buffer) -> bool {
        // SAFETY: The attachment is valid, by the promise to `of`; an importer keeps its device while it
        // attaches.
        unsafe { (*self.0).peer2peer && self.revocable() && buffer.peers().know((*self.0).dev) }
    }

    /// The reason why the importer cannot use the BAR of `buffer`: an `abi::REFUSED_*` and its errno.
    ///
    /// # Safety
    ///
    /// The reservation lock is held, and the buffer is not revoked.
    unsafe fn obstacle(&self, buffer: &Buffer) -> Option<(u32, Error)> {
        // Neither bytes that are never in the BAR nor a driver that copies with the CPU need peer-to-peer
        // DMA.
        if !buffer.has_home || !self.does_dma() {
            return None;
        }
        // SAFETY: The attachment is valid, by the promise to `of`.
        if !unsafe { (*self.0).peer2peer } {
            return Some((abi::REFUSED_NOT_PEER, ffi::errno(bindings::EOPNOTSUPP)));
        }
        if !self.revocable() {
            return Some((abi::REFUSED_NOT_REVOCABLE, ffi::errno(bindings::EOPNOTSUPP)));
        }
        // SAFETY: The attachment is valid, by the promise to `of`; an importer keeps its device while it
        // attaches. The lock is held and the buffer is not revoked, by the caller's promise.
        let reaches = unsafe {
            peers::has_route((*self.0).dev, buffer.device.pci())
                && mapping::is_mappable(self.0, buffer.bar())
        };
        if !reaches {
            return Some((abi::REFUSED_NO_ROUTE, ffi::errno(bindings::EREMOTEIO)));
        }
        // SAFETY: The attachment is valid, by the promise to `of`.
        buffer.peers().remember(unsafe { (*self.0).dev });
        None
    }
}

/// Time limit in attach for the move to system memory, for an importer that needs the buffer there.
const ATTACH_LIMIT_MS: u32 = 5_000;

/// `dma_buf_ops.attach`. The core does not hold the reservation lock, so the check for a revoke is only a
/// hint; map decides.
unsafe extern "C" fn attach(
    dmabuf: *mut bindings::dma_buf,
    attachment: *mut bindings::dma_buf_attachment,
) -> c_int {
    // SAFETY: The dma-buf core calls with valid pointers and a reference held.
    let (object, importer) = unsafe { (buffer(dmabuf), Importer::of(attachment)) };
    importer.set_note(0);
    if importer.is_known_peer(object) && !object.revoked() {
        return 0;
    }
    // SAFETY: The core keeps the dma-buf and the attachment during the call.
    unsafe { attach_new(dmabuf, object, importer) }
}

/// The slow path of [`attach`]: asks for a route, or moves the buffer.
///
/// # Safety
///
/// `object` is the buffer of `dmabuf`, which the caller keeps, and `importer` is being attached to it.
#[cold]
unsafe fn attach_new(dmabuf: *mut bindings::dma_buf, object: &Buffer, importer: Importer) -> c_int {
    // SAFETY: The caller keeps the dma-buf, and the core does not hold the lock here.
    let mut locked = unsafe { Locked::lock(dmabuf) };
    if locked.buffer().revoked() {
        return ENODEV.to_errno();
    }
    // SAFETY: The lock is held, and the buffer is not revoked.
    let Some((reason, error)) = (unsafe { importer.obstacle(object) }) else {
        return 0;
    };
    if !object.may_move {
        locked.refusal.note(importer.device().name(), reason, error);
        return error.to_errno();
    }
    // Counted before the move, so that no other task moves the buffer back in between.
    locked.need_system += 1;
    drop(locked);
    // SAFETY: The caller keeps the dma-buf, and the lock is released. The whole buffer is page-aligned and
    // not empty.
    let moved = unsafe {
        moves::move_part(
            dmabuf,
            0..object.len,
            To::System,
            ATTACH_LIMIT_MS,
            For::Importer,
            &mut Left::default(),
        )
    };
    match moved {
        Ok(_) => {
            importer.set_note(Importer::NEEDS_SYSTEM);
            0
        }
        Err(e) => {
            // SAFETY: The caller keeps the dma-buf, and this task does not hold the lock.
            let mut locked = unsafe { Locked::lock(dmabuf) };
            locked.let_go(|state| state.need_system -= 1);
            locked
                .refusal
                .note(importer.device().name(), abi::REFUSED_MOVE_FAILED, e);
            e.to_errno()
        }
    }
}

/// `dma_buf_ops.detach`. The core does not hold the reservation lock, and the attachment is in no list any
/// more.
unsafe extern "C" fn detach(
    dmabuf: *mut bindings::dma_buf,
    attachment: *mut bindings::dma_buf_attachment,
) {
    // SAFETY: The dma-buf core calls with valid pointers and a reference held.
    let importer = unsafe { Importer::of(attachment) };
    if importer.note() == 0 {
        return;
    }
    // SAFETY: The core keeps the dma-buf and does not hold the lock here.
    let mut locked = unsafe { Locked::lock(dmabuf) };
    locked.let_go(|state| {
        if importer.needs_system() {
            state.need_system -= 1;
        }
        // An importer that detaches without unpinning is buggy, but must not pin the buffer forever.
        state.pins -= importer.pins();
    });
}

/// `dma_buf_ops.pin`, with the reservation lock held. A pinned buffer does not move, but its device's removal
/// still revokes it. The core pins for a static importer while that has a mapping; attach has already moved
/// the buffer to system memory if the importer needs it there.
unsafe extern "C" fn pin(attachment: *mut bindings::dma_buf_attachment) -> c_int {
    // SAFETY: The dma-buf core calls with a valid attachment and the lock held.
    let (mut locked, importer) =
        unsafe { (Held::new((*attachment).dmabuf), Importer::of(attachment)) };
    if locked.buffer().revoked() {
        return ENODEV.to_errno();
    }
    importer.set_note(importer.note() + Importer::ONE_PIN);
    locked.pins += 1;
    0
}

/// `dma_buf_ops.unpin`, with the reservation lock held.
unsafe extern "C" fn unpin(attachment: *mut bindings::dma_buf_attachment) {
    // SAFETY: The dma-buf core calls with a valid attachment and the lock held.
    let (mut locked, importer) =
        unsafe { (Held::new((*attachment).dmabuf), Importer::of(attachment)) };
    // An importer that unpins more often than it pinned is buggy, but must not corrupt the count.
    if importer.pins() > 0 {
        importer.set_note(importer.note() - Importer::ONE_PIN);
        locked.let_go(|state| state.pins -= 1);
    }
}

/// `dma_buf_ops.map_dma_buf`, with the reservation lock held.
unsafe extern "C" fn map(
    attachment: *mut bindings::dma_buf_attachment,
    dir: bindings::dma_data_direction,
) -> *mut bindings::sg_table {
    // SAFETY: The dma-buf core calls with a valid attachment of one of our dma-bufs, and the lock
    // held.
    let (mut locked, importer) =
        unsafe { (Held::new((*attachment).dmabuf), Importer::of(attachment)) };
    let (object, state) = locked.parts();
    let mapped = (|| {
        if object.revoked() {
            return Err(ENODEV);
        }
        if !importer.does_dma() {
            return Err(ffi::errno(bindings::EOPNOTSUPP));
        }
        if object.devices_read && dir != DataDirection::ToDevice.into() {
            return Err(EACCES);
        }
        // Not reached while `need_system` is raised: attach moved the buffer to system memory, where it
        // stays.
        if importer.needs_system() && state.pieces.at_home().next().is_some() {
            return Err(ffi::errno(bindings::EREMOTEIO));
        }
        // Reserves the list entry first: nothing may fail once the mapping exists.
        state.mappings.reserve(1, GFP_KERNEL)?;
        // SAFETY: The lock is held, the buffer is not revoked, and the attachment belongs to it.
        let mapping = unsafe {
            Mapping::map(
                attachment,
                object.bar(),
                &state.pieces,
                state.generation,
                dir,
            )?
        };
        let sgt = mapping.sgt();
        let _ = state.mappings.push_within_capacity(mapping);
        state.counters.maps += 1;
        Ok(sgt)
    })();
    mapped.unwrap_or_else(|e| e.to_ptr())
}

/// `dma_buf_ops.unmap_dma_buf`, with the reservation lock held.
unsafe extern "C" fn unmap(
    attachment: *mut bindings::dma_buf_attachment,
    sgt: *mut bindings::sg_table,
    dir: bindings::dma_data_direction,
) {
    // SAFETY: The core calls with a valid attachment and the lock held; `map` made `sgt` for the attachment.
    let mut locked = unsafe { Held::new((*attachment).dmabuf) };
    // Waiters count the list with the lock held, so the table is freed first.
    locked.let_go(|state| {
        if let Some(mapping) = mapping::take(&mut state.mappings, attachment, sgt) {
            // SAFETY: The lock is held, and `dir` is the direction that the importer mapped in.
            unsafe { mapping.unmap(dir) };
        }
    });
}

/// `dma_buf_ops.release`: no file, attachment or mapping is left.
unsafe extern "C" fn release(dmabuf: *mut bindings::dma_buf) {
    // SAFETY: `priv_` is the reference that `export` put there, and release consumes it.
    let buffer = unsafe { Arc::from_raw((*dmabuf).priv_.cast_const().cast::<Buffer>()) };
    let busy = buffer.may_have_busy_pages();
    buffer.device.forget(dmabuf, buffer.bar, busy, |give_back| {
        // SAFETY: The dma-buf is being released: it is valid, and no one else uses it.
        let locked = unsafe { Locked::lock(dmabuf) };
        for piece in &*locked.pieces {
            if let Some(home) = piece.home {
                give_back(home, piece.len);
            }
        }
    });
}

/// `dma_buf_ops.begin_cpu_access`. The core waits for fences after this call. That is too late for the
/// synchronisation here, which copies bounce buffers: a device may still write to them. So this function
/// waits itself.
unsafe extern "C" fn begin_cpu_access(
    dmabuf: *mut bindings::dma_buf,
    dir: bindings::dma_data_direction,
) -> c_int {
    // SAFETY: The dma-buf core calls with a valid dma-buf and a reference held.
    if unsafe { buffer(dmabuf) }.revoked() {
        return ENODEV.to_errno();
    }
    // A reader waits for writers; a writer waits for readers, too. The core does the same.
    let usage = match dir == DataDirection::FromDevice.into() {
        true => bindings::dma_resv_usage_DMA_RESV_USAGE_WRITE,
        false => bindings::dma_resv_usage_DMA_RESV_USAGE_READ,
    };
    // SAFETY: The dma-buf core calls with a valid dma-buf, a reference held and the lock not.
    let waited = unsafe {
        let resv = (*dmabuf).resv;
        bindings::dma_resv_wait_timeout(resv, usage, true, c_long::MAX as usize)
    };
    if waited < 0 {
        return waited as c_int;
    }
    // SAFETY: The core keeps the dma-buf, and this task does not hold the lock.
    let mut locked = unsafe { Locked::lock(dmabuf) };
    if locked.buffer().revoked() {
        return ENODEV.to_errno();
    }
    // No mapping of a BAR is cached, so there is nothing to invalidate. But the CPU may read write-combining memory
    // before it is told to: not before the fences, from here on. It also drains the CPU's earlier writes.
    // SAFETY: A barrier.
    unsafe { ffi::peerbuf_mb() };
    // Writes of a device to system memory may need synchronisation.
    if dir != DataDirection::ToDevice.into() {
        for mapping in locked.mappings.iter_mut() {
            // SAFETY: The lock is held.
            unsafe { mapping.sync(true) };
        }
    }
    0
}

/// `dma_buf_ops.end_cpu_access`.
unsafe extern "C" fn end_cpu_access(
    dmabuf: *mut bindings::dma_buf,
    dir: bindings::dma_data_direction,
) -> c_int {
    // The lock keeps the device bound during the read in `flush`.
    // SAFETY: The dma-buf core calls with a valid dma-buf, a reference held and the lock not.
    let mut locked = unsafe { Locked::lock(dmabuf) };
    if locked.buffer().revoked() {
        return ENODEV.to_errno();
    }
    if dir == DataDirection::FromDevice.into() {
        return 0;
    }
    // A peer may reach the memory on a path on which the CPU's posted writes are not ordered before it.
    let (object, state) = locked.parts();
    // One read pushes the posted writes to the whole BAR.
    if let Some((offset, _)) = state.pieces.at_home().next() {
        object.bar().flush(offset);
    }
    for mapping in state.mappings.iter_mut() {
        // SAFETY: The lock is held.
        unsafe { mapping.sync(false) };
    }
    0
}

/// Whether the kernel may map device memory (`vmap`): a module parameter, off by default.
fn device_vmap() -> bool {
    crate::compat::parameter(crate::module_parameters::device_vmap.value()) != 0
}

/// Time limit for the move to system memory before a kernel mapping.
const VMAP_LIMIT_MS: u32 = 1_000;

/// `dma_buf_ops.vmap`, with the reservation lock held: a kernel mapping for importers that copy with the CPU.
/// The importer holds the lock while it uses the mapping, or has pinned the buffer. A buffer with a kernel
/// mapping does not move.
///
/// The buffer is moved to system memory first. A kernel mapping cannot be invalidated (`videobuf2` holds it
/// from QBUF until its program dequeues the frame), so a mapping of device memory would block the device's
/// removal as long as that program sleeps.
///
/// The core WARNs on every error of this function, so an importer should pin first, which fails without a
/// WARN.
/// Errors: ENODEV once revoked; EBUSY if the buffer is pinned in the BAR, or accesses to the BAR do not end
/// in time; ENOMEM. With `device_vmap`, EOPNOTSUPP for a buffer that is only partly in the BAR: a mapping has
/// one memory type.
unsafe extern "C" fn vmap(dmabuf: *mut bindings::dma_buf, map: *mut bindings::iosys_map) -> c_int {
    // SAFETY: The dma-buf core calls with a valid dma-buf and the lock held.
    let mut locked = unsafe { Held::new(dmabuf) };
    from_result(|| {
        if locked.buffer().revoked() {
            return Err(ENODEV);
        }
        if !device_vmap() {
            moves::to_system(&mut locked, VMAP_LIMIT_MS)?;
        }
        let (object, state) = locked.parts();
        let mapping = kernel_mapping(object, state)?;
        // `is_iomem` stays false for a BAR, too. Videobuf2's vmalloc drivers (webcams, among others) ignore
        // the flag, use the plain address, and pass a map without the flag to `dma_buf_vunmap`, which BUGs:
        // anyone who may open /dev/video0 could crash the kernel. Plain loads and stores reach a BAR on every
        // architecture on which this module was tested.
        // SAFETY: `map` is valid for writes.
        unsafe {
            (*map).is_iomem = false;
            (*map).__bindgen_anon_1.vaddr = mapping.address;
        }
        state.kernel_mapping = Some(mapping);
        Ok(0)
    })
}

fn kernel_mapping(object: &Buffer, state: &State) -> Result<KernelMapping> {
    let device = match state.pieces.placement() {
        abi::PLACEMENT_DEVICE => true,
        abi::PLACEMENT_SYSTEM => false,
        _ => return Err(ffi::errno(bindings::EOPNOTSUPP)),
    };
    if let Some(home) = state.pieces.one_run() {
        // The kernel has already mapped the BAR.
        return Ok(KernelMapping {
            address: object.bar().kernel_address(home)?,
            vmapped: false,
            device,
            _pages: KVec::new(),
        });
    }
    let mut pages = KVVec::new();
    let mut kept = KVec::new();
    for piece in &*state.pieces {
        if let Some(system) = &piece.system {
            kept.push(system.pages.clone(), GFP_KERNEL)?;
            pages.extend_from_slice(piece.system_pages(), GFP_KERNEL)?;
            continue;
        }
        let bar = object
            .bar()
            .pages
            .as_ref()
            .ok_or(ffi::errno(bindings::EOPNOTSUPP))?;
        let first = piece.home.ok_or(EINVAL)? as usize / PAGE_SIZE;
        for index in first..first + piece.len as usize / PAGE_SIZE {
            pages.push(bar.page(index)?, GFP_KERNEL)?;
        }
    }
    let count = c_uint::try_from(pages.len()).map_err(|_| EINVAL)?;
    // SAFETY: All pages are valid, and of one kind of memory.
    let address =
        unsafe { ffi::peerbuf_vmap(pages.as_mut_ptr(), count, device, object.combines_writes) };
    if address.is_null() {
        return Err(ENOMEM);
    }
    Ok(KernelMapping {
        address,
        vmapped: true,
        device,
        _pages: kept,
    })
}

/// `dma_buf_ops.vunmap`, with the reservation lock held.
unsafe extern "C" fn vunmap(dmabuf: *mut bindings::dma_buf, _map: *mut bindings::iosys_map) {
    // SAFETY: The dma-buf core calls with a valid dma-buf and the lock held, once for each `vmap`.
    let mut locked = unsafe { Held::new(dmabuf) };
    locked.let_go(|state| {
        if let Some(mapping) = state
            .kernel_mapping
            .take()
            .filter(|mapping| mapping.vmapped)
        {
            // SAFETY: `vmap` made this mapping with `peerbuf_vmap`.
            unsafe { ffi::vunmap(mapping.address) };
        }
    });
}

/// `dma_buf_ops.mmap`. The core has checked that the range lies in the buffer.
unsafe extern "C" fn mmap(
    dmabuf: *mut bindings::dma_buf,
    vma: *mut bindings::vm_area_struct,
) -> c_int {
    // SAFETY: The dma-buf core calls with a valid dma-buf and a VMA that is being set up.
    let (object, new) = unsafe { (buffer(dmabuf), VmaNew::from_raw(vma)) };
    from_result(|| {
        // Only a hint; the page fault decides.
        if object.revoked() {
            return Err(ENODEV);
        }
        // A private mapping would copy device memory on the first write.
        if new.flags() & ffi::VM_MAYSHARE == 0 {
            return Err(EINVAL);
        }
        new.set_dontexpand();
        new.set_dontdump();
        if object.has_pages() {
            // Not VM_IO or VM_PFNMAP: direct I/O refuses both.
            new.set_mixedmap();
        } else {
            // Without struct pages the mapping inserts plain frames, and direct I/O fails with EFAULT.
            // `VmaNew` has no setter for PFNMAP alone.
            new.set_io();
            // SAFETY: The VMA is being set up.
            unsafe { ffi::peerbuf_vma_set_pfnmap(vma) };
        }
        // SAFETY: The VMA is being set up. A VMA keeps its file, so the buffer outlives it.
        unsafe {
            (*vma).vm_private_data = dmabuf.cast();
            (*vma).vm_ops = &VM_OPS.0;
        }
        object.set_cpu_mapped();
        Ok(0)
    })
}

/// The aligned window of the buffer, in bytes, that one fault maps, so that a large transfer does not fault
/// on every page.
const FAULT_WINDOW: usize = 16 * PAGE_SIZE;

/// How long a fault waits for a move in progress.
///
/// Not until the move ends: the fault may be part of direct I/O that holds other pages of the buffer, and the
/// move waits for those pages. Yet longer than an I/O request takes: a move needs a moment without requests
/// in flight, and during a move every new request starts with a fault.
const FAULT_DELAY_MS: u32 = 40;

/// [`FAULT_WINDOW`] during a move: large enough that a request which already holds pages gets all its pages
/// with one delay.
const MOVE_WINDOW: usize = 512 * PAGE_SIZE;

/// Takes the reservation lock for a fault, or returns the fault's result.
///
/// Another task may hold the reservation lock for long, and the caller holds the `mmap_lock`, which would
/// block every mmap of this process. So, like TTM (`ttm_bo_vm_reserve`), this function releases the
/// `mmap_lock` for the wait and has the fault retried. A signal ends the wait.
///
/// # Safety
///
/// `vmf` is a fault on a VMA that [`mmap`] has set up for `dmabuf`, handled with the `mmap_lock` held for
/// reading.
unsafe fn lock_for_fault<'a>(
    vmf: *mut bindings::vm_fault,
    dmabuf: *mut bindings::dma_buf,
) -> Result<Locked<'a>, bindings::vm_fault_t> {
    // SAFETY: The VMA keeps the dma-buf, by the caller's promise.
    let resv = unsafe { (*dmabuf).resv };
    // SAFETY: The VMA keeps the dma-buf, and so its reservation object.
    if unsafe { ffi::peerbuf_dma_resv_trylock(resv) } {
        // SAFETY: The VMA keeps the dma-buf, and the lock was taken above.
        return Ok(unsafe { Locked::taken(dmabuf) });
    }
    let wait = || {
        // SAFETY: `retry_after` holds a reference to the file, which keeps the dma-buf without the
        // `mmap_lock`.
        unsafe {
            if ffi::peerbuf_dma_resv_lock_interruptible(resv) == 0 {
                bindings::dma_resv_unlock(resv);
            }
        }
    };
    // SAFETY: By the caller's promise; nothing uses the fault after `Err`.
    if let Some(retry) = unsafe { retry_after(vmf, wait) } {
        return Err(retry);
    }
    // SAFETY: The VMA keeps the dma-buf: the `mmap_lock` is still held.
    match unsafe { ffi::peerbuf_dma_resv_lock_interruptible(resv) } {
        // SAFETY: The VMA keeps the dma-buf, and the lock was taken above.
        0 => Ok(unsafe { Locked::taken(dmabuf) }),
        // The task handles the signal and then faults again.
        _ => Err(ffi::VM_FAULT_NOPAGE),
    }
}

/// Releases the `mmap_lock`, calls `wait`, and returns the result that has the fault retried. Returns `None`
/// if the fault may not be retried, or was retried before.
///
/// # Safety
///
/// `vmf` is a fault that is being handled with the `mmap_lock` held for reading. After `Some` the caller uses
/// nothing of the fault any more.
unsafe fn retry_after(
    vmf: *mut bindings::vm_fault,
    wait: impl FnOnce(),
) -> Option<bindings::vm_fault_t> {
    // SAFETY: The fault is being handled, by the caller's promise.
    if !unsafe { ffi::peerbuf_fault_may_retry(vmf) } {
        return None;
    }
    // SAFETY: The fault is being handled, by the caller's promise.
    if unsafe { ffi::peerbuf_fault_may_wait(vmf) } {
        // SAFETY: The VMA is valid until the `mmap_lock` is released; the reference keeps the file and its
        // dma-buf after that.
        let file = unsafe {
            let vma = (*vmf).__bindgen_anon_1.vma;
            let file = ffi::peerbuf_get_file((*vma).vm_file);
            ffi::peerbuf_mmap_read_unlock((*vma).vm_mm);
            file
        };
        wait();
        // SAFETY: The reference was taken above.
        unsafe { bindings::fput(file) };
    }
    Some(bindings::vm_fault_reason_VM_FAULT_RETRY)
}

/// `vm_operations_struct.fault`, with the `mmap_lock` held for reading. (The memory manager calls it with
/// only the per-VMA lock if there is `map_pages`, which these operations lack.)
unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: The memory manager calls with a valid fault on a VMA that `mmap` set up, and the
    // VMA keeps its file, whose dma-buf this is.
    let (vma, dmabuf, address, offset) = unsafe {
        let at = &(*vmf).__bindgen_anon_1;
        (
            at.vma,
            (*at.vma).vm_private_data.cast::<bindings::dma_buf>(),
            at.address as usize & !(PAGE_SIZE - 1),
            at.pgoff as usize * PAGE_SIZE,
        )
    };
    // SAFETY: The VMA is valid, and the lock held for the fault keeps its bounds.
    let (vma_start, vma_end) = unsafe {
        let bounds = &(*vma).__bindgen_anon_1.__bindgen_anon_1;
        (bounds.vm_start as usize, bounds.vm_end as usize)
    };
    // Held until the pages are mapped. A revoke or a move sets its mark with this lock held and zaps later:
    // so a page mapped before the mark is zapped, and no page is mapped after a revoke's mark.
    // SAFETY: The VMA keeps the dma-buf. A page fault holds no reservation lock, by the lock order.
    let mut locked = match unsafe { lock_for_fault(vmf, dmabuf) } {
        Ok(locked) => locked,
        Err(answer) => return answer,
    };
    let mut window = FAULT_WINDOW;
    if locked.moving {
        window = MOVE_WINDOW;
        let object = locked.buffer();
        locked.expect_change();
        drop(locked);
        // SAFETY: The fault is being handled with the `mmap_lock` held, and after `Some` this function
        // returns.
        if let Some(retry) = unsafe { retry_after(vmf, || object.wait_changed(FAULT_DELAY_MS)) } {
            return retry;
        }
        object.wait_changed(FAULT_DELAY_MS);
        // SAFETY: The VMA keeps the dma-buf, and the reservation lock was dropped above.
        locked = match unsafe { lock_for_fault(vmf, dmabuf) } {
            Ok(locked) => locked,
            Err(answer) => return answer,
        };
    }
    let (object, state) = locked.parts();
    if object.revoked() || offset >= object.len as usize {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    }
    // Clips the window to the VMA and to the buffer.
    let before = (offset % window).min(address - vma_start);
    let first = offset - before;
    let len = (window - first % window)
        .min(vma_end - (address - before))
        .min(object.len as usize - first);
    for at in (0..len).step_by(PAGE_SIZE) {
        // SAFETY: `mmap` set up the VMA, the address lies in it, and the lock is held.
        let inserted = unsafe {
            insert(
                vma,
                address - before + at,
                object,
                state,
                (first + at) as u64,
            )
        };
        match inserted {
            // Another thread's fault on the window may have mapped the page first.
            Ok(()) => {}
            Err(e) if e == EBUSY => {}
            // The faulting page is mapped; the rest of the window can fault later.
            Err(_) if at > before => break,
            Err(e) if e == ENOMEM => return bindings::vm_fault_reason_VM_FAULT_OOM,
            Err(_) => return bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }
    ffi::VM_FAULT_NOPAGE
}

/// Maps the page at `offset` of the buffer at `address`.
///
/// # Safety
///
/// `vma` was set up by [`mmap`] for this buffer, `address` lies in it, a fault on it is being
/// handled, and the reservation lock is held.
unsafe fn insert(
    vma: *mut bindings::vm_area_struct,
    address: usize,
    object: &Buffer,
    state: &State,
    offset: u64,
) -> Result {
    let (start, piece) = state
        .pieces
        .placed()
        .find(|(start, piece): &(u64, &Piece)| offset < start + piece.len)
        .ok_or(EFAULT)?;
    let within = offset - start;
    // SAFETY: `vma` is valid, and the `mmap_lock`, held for the fault, keeps its flags.
    let prot = unsafe { page_prot(vma, object, piece) };
    let page = match (piece.home, &object.bar().pages) {
        _ if piece.system.is_some() => {
            let index = within as usize / PAGE_SIZE;
            Some(*piece.system_pages().get(index).ok_or(EFAULT)?)
        }
        (Some(home), Some(pages)) => Some(pages.page((home + within) as usize / PAGE_SIZE)?),
        _ => None,
    };
    let address = address as c_ulong;
    match page {
        Some(page) if object.has_pages() => {
            // No function of the kernel takes a protection for a page that is counted, so the VMA has the page's
            // during the call. Nobody else uses it then: all faults of this VMA hold the reservation lock, what
            // changes present entries (mprotect) keeps their memory type, and fork, mremap and a holder of the
            // `mmap_lock` for writing exclude faults.
            // SAFETY: The VMA is valid and VM_MIXEDMAP, and the page has a count of at least one.
            unsafe {
                let of_vma = ptr::replace(&raw mut (*vma).vm_page_prot, prot);
                let inserted = to_result(bindings::vm_insert_page(vma, address, page));
                (*vma).vm_page_prot = of_vma;
                inserted
            }
        }
        _ => {
            let pfn = match page {
                // SAFETY: The page is valid.
                Some(page) => unsafe { ffi::peerbuf_page_to_pfn(page) },
                None => {
                    let home = piece.home.ok_or(EFAULT)?;
                    (object.bar().start + home + within) as usize / PAGE_SIZE
                }
            };
            // SAFETY: The VMA is VM_PFNMAP, and the frame belongs to the buffer, which zaps it before the
            // memory is reused.
            match unsafe { bindings::vmf_insert_pfn_prot(vma, address, pfn as c_ulong, prot) } {
                ffi::VM_FAULT_NOPAGE => Ok(()),
                bindings::vm_fault_reason_VM_FAULT_OOM => Err(ENOMEM),
                _ => Err(EFAULT),
            }
        }
    }
}

/// The protection with which a page of `piece` is mapped: system memory is cached, device memory is uncached or
/// write-combining.
///
/// # Safety
///
/// `vma` is valid, and its flags do not change.
unsafe fn page_prot(
    vma: *const bindings::vm_area_struct,
    object: &Buffer,
    piece: &Piece,
) -> bindings::pgprot_t {
    // SAFETY: `vma` is valid, by the caller's promise; the calls compute numbers.
    unsafe {
        let cached = ffi::peerbuf_page_prot((*vma).__bindgen_anon_2.vm_flags);
        match piece.system {
            Some(_) => cached,
            None => ffi::peerbuf_device_prot(cached, object.combines_writes),
        }
    }
}
