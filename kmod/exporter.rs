// SPDX-License-Identifier: GPL-2.0

//! The dma-buf operations of an exported [`Buffer`]; nothing else calls in from C here.
//!
//! A dynamic exporter: buffers move, and access can be taken away. An importer that cannot use
//! the BAR, because it did not ask for peer memory, cannot be told of a move, or has no route,
//! keeps the buffer in system memory as long as it is attached, if the export allows it.
//!
//! Lock order: `mmap_lock`, then the reservation lock (a page fault takes it), then the file's
//! `i_mmap_rwsem` (zapping). `dma_resv_lockdep()` in the kernel teaches lockdep the same.

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
    buffer::{Buffer, Held, KernelMapping, Locked, State},
    ffi::{self, Table},
    mapping::{self, Mapping},
    moves::{self, For, To},
    pieces::Piece,
};

static OPS: Table<bindings::dma_buf_ops> = Table(bindings::dma_buf_ops {
    vmap: Some(vmap),
    vunmap: Some(vunmap),
    ..WITHOUT_VMAP
});

/// Those of a buffer that the kernel gets no mapping of: device memory that does not move, and what devices
/// may only read. The core answers EINVAL then. It says WARN for every error of `vmap`, which a descriptor's
/// holder could bring about.
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
    // SAFETY: Null function pointers are operations that the exporter does not have.
    ..unsafe { core::mem::zeroed() }
});

/// Makes a dma-buf of a buffer, which it owns from then on. On an error the buffer is dropped.
pub(crate) fn export(buffer: Arc<Buffer>, fd_flags: u32) -> Result<*mut bindings::dma_buf> {
    let movable = !buffer.has_home || buffer.may_move || device_vmap();
    let vmaps = movable && !buffer.devices_read;
    let info = bindings::dma_buf_export_info {
        exp_name: c"peerbuf".as_char_ptr(),
        // A dma-buf keeps the module, since its operations are in it. It does not keep the
        // device from being unbound.
        owner: crate::compat::THIS_MODULE.as_ptr(),
        ops: if vmaps { &OPS.0 } else { &OPS_WITHOUT_VMAP.0 },
        size: buffer.len as usize,
        flags: fd_flags as c_int,
        resv: ptr::null_mut(),
        priv_: Arc::into_raw(buffer).cast_mut().cast(),
    };
    // SAFETY: `info` is filled in, and `priv_` is a reference to a `Buffer` as the operations
    // expect.
    let dmabuf = from_err_ptr(unsafe { bindings::dma_buf_export(&info) });
    if dmabuf.is_err() {
        // SAFETY: The release operation is not called when the export fails, so the reference is
        // still ours.
        drop(unsafe { Arc::from_raw(info.priv_.cast_const().cast::<Buffer>()) });
    }
    dmabuf
}

/// Whether a dma-buf is one of ours.
///
/// # Safety
///
/// `dmabuf` is valid.
pub(crate) unsafe fn is_ours(dmabuf: *mut bindings::dma_buf) -> bool {
    // SAFETY: By the caller's promise.
    let ops = unsafe { (*dmabuf).ops };
    ptr::eq(ops, &OPS.0) || ptr::eq(ops, &OPS_WITHOUT_VMAP.0)
}

/// The buffer behind one of our dma-bufs.
///
/// # Safety
///
/// `dmabuf` was made by [`export`] and is not released while the result is in use.
pub(crate) unsafe fn buffer<'a>(dmabuf: *mut bindings::dma_buf) -> &'a Buffer {
    // SAFETY: `priv_` is the reference put there by `export`.
    unsafe { &*(*dmabuf).priv_.cast::<Buffer>() }
}

/// What is known of an importer: the attachment, and what this module notes in its `priv`: whether
/// it needs system memory in the lowest bit, above it how often it has pinned the buffer. The note
/// is written by attach, before anybody else sees the attachment, and then under the reservation
/// lock.
pub(crate) struct Importer(*mut bindings::dma_buf_attachment);

impl Importer {
    const NEEDS_SYSTEM: usize = 1;
    const ONE_PIN: usize = 2;

    /// # Safety
    ///
    /// `attachment` is one of ours, and stays as long as the result.
    pub(crate) unsafe fn of(attachment: *mut bindings::dma_buf_attachment) -> Self {
        Self(attachment)
    }

    fn note(&self) -> usize {
        // SAFETY: By the promise to `of`. The pointer is a number, never followed.
        unsafe { (*self.0).priv_ }.addr()
    }

    fn set_note(&self, note: usize) {
        // SAFETY: As above.
        unsafe { (*self.0).priv_ = ptr::without_provenance_mut(note) };
    }

    fn needs_system(&self) -> bool {
        self.note() & Self::NEEDS_SYSTEM != 0
    }

    pub(crate) fn pins(&self) -> u32 {
        (self.note() / Self::ONE_PIN) as u32
    }

    /// Its device.
    fn device(&self) -> &kernel::device::Device {
        // SAFETY: By the promise to `of`; an importer keeps its device while it is attached.
        unsafe { kernel::device::Device::from_raw((*self.0).dev) }
    }

    /// A device without a DMA mask does no DMA: its driver uses the processor.
    fn does_dma(&self) -> bool {
        // SAFETY: As above.
        !unsafe { (*(*self.0).dev).dma_mask }.is_null()
    }

    fn revocable(&self) -> bool {
        // SAFETY: By the promise to `of`.
        unsafe { bindings::dma_buf_attach_revocable(self.0) }
    }

    /// `abi::ATTACHMENT_*`, without STALE.
    pub(crate) fn flags(&self) -> u32 {
        // SAFETY: By the promise to `of`.
        let (dynamic, peer) = unsafe { (!(*self.0).importer_ops.is_null(), (*self.0).peer2peer) };
        let flag = |has: bool, flag: u32| if has { flag } else { 0 };
        flag(dynamic, abi::ATTACHMENT_DYNAMIC)
            | flag(peer, abi::ATTACHMENT_PEER)
            | flag(self.revocable(), abi::ATTACHMENT_REVOCABLE)
            | flag(self.needs_system(), abi::ATTACHMENT_NEEDS_SYSTEM)
    }

    /// Whether the importer can use the BAR of `buffer`, by a route that was asked for before.
    fn is_known_peer(&self, buffer: &Buffer) -> bool {
        // SAFETY: By the promise to `of`.
        unsafe {
            (*self.0).peer2peer && self.revocable() && buffer.device.peers.know((*self.0).dev)
        }
    }

    /// Why the importer cannot use the BAR of `buffer`: an `abi::REFUSED_*` and the errno for it.
    fn obstacle(&self, buffer: &Buffer) -> Option<(u32, Error)> {
        // Bytes that are never in the BAR, and a driver that copies with the processor, are
        // nobody's peer.
        if !buffer.has_home || !self.does_dma() {
            return None;
        }
        // SAFETY: By the promise to `of`.
        if !unsafe { (*self.0).peer2peer } {
            return Some((abi::REFUSED_NOT_PEER, ffi::errno(bindings::EOPNOTSUPP)));
        }
        if !self.revocable() {
            return Some((abi::REFUSED_NOT_REVOCABLE, ffi::errno(bindings::EOPNOTSUPP)));
        }
        let (peers, provider) = (&buffer.device.peers, buffer.device.pci());
        // SAFETY: By the promise to `of`; an importer keeps its device while it attaches.
        if !unsafe { peers.reach((*self.0).dev, provider) } {
            return Some((abi::REFUSED_NO_ROUTE, ffi::errno(bindings::EREMOTEIO)));
        }
        None
    }
}

/// How long an importer that needs system memory waits, in attach, for the buffer to get there.
const ATTACH_LIMIT_MS: u32 = 5_000;

/// `dma_buf_ops.attach`. Without the reservation lock. Whether the buffer is revoked is advisory
/// here; map decides.
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
    // SAFETY: As above.
    unsafe { attach_new(dmabuf, object, importer) }
}

/// [`attach`] where more is to be asked or done.
///
/// # Safety
///
/// `object` is the buffer of `dmabuf`, which the caller keeps, and the importer's attachment is being
/// made.
#[cold]
unsafe fn attach_new(dmabuf: *mut bindings::dma_buf, object: &Buffer, importer: Importer) -> c_int {
    let obstacle = importer.obstacle(object);
    // SAFETY: By the caller's promise; the core does not hold the lock here.
    let mut locked = unsafe { Locked::lock(dmabuf) };
    if locked.buffer().revoked() {
        return ENODEV.to_errno();
    }
    let Some((reason, error)) = obstacle else {
        return 0;
    };
    if !object.may_move {
        locked.refusal.note(importer.device().name(), reason, error);
        return error.to_errno();
    }
    // Counted before the move, so that nobody takes the buffer back in between.
    locked.need_system += 1;
    drop(locked);
    // SAFETY: As above. The whole of the buffer is page-aligned and not empty.
    let moved = unsafe {
        moves::move_part(
            dmabuf,
            0..object.len,
            To::System,
            ATTACH_LIMIT_MS,
            For::Importer,
        )
    };
    match moved {
        Ok(_) => {
            importer.set_note(Importer::NEEDS_SYSTEM);
            0
        }
        Err(e) => {
            // SAFETY: As above.
            let mut locked = unsafe { Locked::lock(dmabuf) };
            locked.need_system -= 1;
            locked
                .refusal
                .note(importer.device().name(), abi::REFUSED_MOVE_FAILED, e);
            e.to_errno()
        }
    }
}

/// `dma_buf_ops.detach`. Without the reservation lock; the attachment is in no list any more.
unsafe extern "C" fn detach(
    dmabuf: *mut bindings::dma_buf,
    attachment: *mut bindings::dma_buf_attachment,
) {
    // SAFETY: The dma-buf core calls with valid pointers and a reference held.
    let importer = unsafe { Importer::of(attachment) };
    if importer.note() == 0 {
        return;
    }
    // SAFETY: As above; the core does not hold the lock here.
    let mut locked = unsafe { Locked::lock(dmabuf) };
    if importer.needs_system() {
        locked.need_system -= 1;
    }
    // An importer that goes without unpinning has a bug, which is not to keep the buffer in its
    // place for ever.
    locked.pins -= importer.pins();
    locked.notify();
}

/// `dma_buf_ops.pin`, with the reservation lock held. A pinned buffer does not move; it can be
/// revoked all the same, when its device goes away. A static importer is pinned by the core while
/// it has a mapping; it has brought the buffer to system memory when it attached.
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
    // SAFETY: As in `pin`.
    let (mut locked, importer) =
        unsafe { (Held::new((*attachment).dmabuf), Importer::of(attachment)) };
    // An importer that unpins more often than it pinned has a bug, which is not to become ours.
    if importer.pins() > 0 {
        importer.set_note(importer.note() - Importer::ONE_PIN);
        locked.pins -= 1;
        locked.notify();
    }
}

/// `dma_buf_ops.map_dma_buf`. The reservation lock is held by the caller.
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
        // Not reached while `need_system` holds: the buffer went there when the importer came,
        // and does not leave.
        if importer.needs_system() && state.pieces.at_home().next().is_some() {
            return Err(ffi::errno(bindings::EREMOTEIO));
        }
        // Room first, so that nothing can fail once the mapping is made.
        state.mappings.reserve(1, GFP_KERNEL)?;
        // SAFETY: The lock is held, the buffer is not revoked, and the attachment is one of its.
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

/// `dma_buf_ops.unmap_dma_buf`. The reservation lock is held by the caller.
unsafe extern "C" fn unmap(
    attachment: *mut bindings::dma_buf_attachment,
    sgt: *mut bindings::sg_table,
    dir: bindings::dma_data_direction,
) {
    // SAFETY: As in `map`, and `sgt` is a table that `map` made for the attachment.
    let mut locked = unsafe { Held::new((*attachment).dmabuf) };
    if let Some(mapping) = mapping::take(&mut locked.mappings, attachment, sgt) {
        // SAFETY: The lock is held, and `dir` is what the importer has mapped in.
        unsafe { mapping.unmap(dir) };
    }
    // Whoever waits counts the list under the lock, so after the table is gone.
    locked.notify();
}

/// `dma_buf_ops.release`: no descriptor, attachment or mapping is left.
unsafe extern "C" fn release(dmabuf: *mut bindings::dma_buf) {
    // SAFETY: `priv_` is the reference put there by `export`; this is its end.
    let buffer = unsafe { Arc::from_raw((*dmabuf).priv_.cast_const().cast::<Buffer>()) };
    let busy = buffer.may_have_busy_pages();
    buffer.device.forget(dmabuf, buffer.bar, busy, |give_back| {
        // SAFETY: The dma-buf is being released: it is valid, and nobody else has it.
        let locked = unsafe { Locked::lock(dmabuf) };
        for piece in &*locked.pieces {
            if let Some(home) = piece.home {
                give_back(home, piece.len);
            }
        }
    });
}

/// `dma_buf_ops.begin_cpu_access`. The core waits for fences after it, which is too late for what is
/// synchronised here: bounce buffers are copied, and a device may still write to them.
unsafe extern "C" fn begin_cpu_access(
    dmabuf: *mut bindings::dma_buf,
    dir: bindings::dma_data_direction,
) -> c_int {
    // SAFETY: The dma-buf core calls with a valid dma-buf and a reference held.
    if unsafe { buffer(dmabuf) }.revoked() {
        return ENODEV.to_errno();
    }
    // Who reads waits for writers, and who writes for readers, too; as the core does it.
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
    // SAFETY: As above.
    let mut locked = unsafe { Locked::lock(dmabuf) };
    if locked.buffer().revoked() {
        return ENODEV.to_errno();
    }
    // The processor's mapping of a BAR is uncached, so there is nothing to invalidate; what a
    // device wrote to system memory may have to be made visible.
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
    // The lock keeps the device bound while it is read from.
    // SAFETY: The dma-buf core calls with a valid dma-buf, a reference held and the lock not.
    let mut locked = unsafe { Locked::lock(dmabuf) };
    if locked.buffer().revoked() {
        return ENODEV.to_errno();
    }
    if dir == DataDirection::FromDevice.into() {
        return 0;
    }
    // A peer may reach the memory by a path that the processor's posted writes do not take.
    let (object, state) = locked.parts();
    // One read pushes the writes to the whole of the BAR.
    if let Some((offset, _)) = state.pieces.at_home().next() {
        object.bar().flush(offset);
    }
    for mapping in state.mappings.iter_mut() {
        // SAFETY: The lock is held.
        unsafe { mapping.sync(false) };
    }
    0
}

/// Whether the kernel may map device memory: only where whoever loaded the module wants it.
fn device_vmap() -> bool {
    crate::compat::parameter(crate::module_parameters::device_vmap.value()) != 0
}

/// How long a kernel mapping waits for the buffer to get to system memory.
const VMAP_LIMIT_MS: u32 = 1_000;

/// `dma_buf_ops.vmap`, with the reservation lock held: a kernel mapping, for importers that copy
/// with the processor. Its user keeps the lock while he uses it, or has pinned the buffer; a
/// buffer with a kernel mapping does not move.
///
/// It is a mapping of system memory, to which the buffer is taken first. Nobody tells the user of a kernel
/// mapping to give it back (`videobuf2` has it from QBUF until its program wants the frame), so device memory
/// would keep its device from going away, for as long as somebody sleeps.
///
/// The core says WARN for whatever error this returns, so an importer should pin first, which
/// fails without one. Errors: ENODEV once revoked; EBUSY where the buffer is pinned in the BAR, or what is
/// under way there does not end; ENOMEM. With `device_vmap` EOPNOTSUPP for a buffer that is partly in the
/// BAR and partly not, since one mapping has one memory type.
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
        // Not `is_iomem`, for a BAR either: videobuf2's vmalloc drivers (a webcam's, among others)
        // drop that flag, use the plain address, and give it back without the flag, at which
        // `dma_buf_vunmap` BUGs. Whoever may open /dev/video0 could so end the kernel. Ordinary
        // loads and stores reach a BAR on every architecture that this module has been tried on.
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
        // The kernel has the BAR mapped already.
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
    // SAFETY: All are valid pages, of one kind of memory.
    let address = unsafe { ffi::peerbuf_vmap(pages.as_mut_ptr(), count, device) };
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
    if let Some(mapping) = locked.kernel_mapping.take() {
        if mapping.vmapped {
            // SAFETY: `vmap` has made it.
            unsafe { ffi::vunmap(mapping.address) };
        }
    }
    locked.notify();
}

/// `dma_buf_ops.mmap`. The core has checked that the range lies in the buffer.
unsafe extern "C" fn mmap(
    dmabuf: *mut bindings::dma_buf,
    vma: *mut bindings::vm_area_struct,
) -> c_int {
    // SAFETY: The dma-buf core calls with a valid dma-buf and a VMA that is being set up.
    let (object, new) = unsafe { (buffer(dmabuf), VmaNew::from_raw(vma)) };
    from_result(|| {
        // Advisory; a fault decides.
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
            // Not VM_IO or VM_PFNMAP, which direct I/O refuses.
            new.set_mixedmap();
        } else {
            // No struct pages: plain frames, with which direct I/O fails with EFAULT.
            // `VmaNew` has no setter for PFNMAP alone.
            new.set_io();
            // SAFETY: The VMA is being set up.
            unsafe { ffi::peerbuf_vma_set_pfnmap(vma) };
        }
        // SAFETY: The VMA is being set up. The buffer outlives it: a VMA keeps its file.
        unsafe {
            (*vma).vm_private_data = dmabuf.cast();
            (*vma).vm_ops = &VM_OPS.0;
        }
        object.set_cpu_mapped();
        Ok(0)
    })
}

/// The pages that one fault puts in, as an aligned window of bytes in the buffer, so that a large
/// transfer does not fault on every page.
const FAULT_WINDOW: usize = 16 * PAGE_SIZE;

/// How long a fault waits for a move that is under way. Not for the end: the fault may be part of
/// direct I/O that holds other pages of the buffer, for which the move waits. Long against the
/// time of an I/O request: a move needs a moment in which nobody has one in flight, and requests
/// begin with a fault as long as it lasts.
const FAULT_DELAY_MS: u32 = 40;

/// As [`FAULT_WINDOW`], during a move: so much that a request which holds pages does not meet the
/// delay again before it has all of them.
const MOVE_WINDOW: usize = 512 * PAGE_SIZE;

/// Takes the reservation lock for a fault; or says what the fault answers.
///
/// The `mmap_lock` is held, and a buffer's lock may be held for long, by anybody: so that one does not hold
/// up whoever wants to map something in this process, the `mmap_lock` is let go for the wait and the fault
/// begins anew, as TTM does it (`ttm_bo_vm_reserve`). A signal ends the wait.
///
/// # Safety
///
/// `vmf` is a fault on a VMA that [`mmap`] has set up for `dmabuf`, being handled with the `mmap_lock` held
/// for reading.
unsafe fn lock_for_fault<'a>(
    vmf: *mut bindings::vm_fault,
    dmabuf: *mut bindings::dma_buf,
) -> Result<Locked<'a>, bindings::vm_fault_t> {
    // SAFETY: By the caller's promise the VMA keeps the dma-buf, here and below.
    let resv = unsafe { (*dmabuf).resv };
    // SAFETY: As above.
    if unsafe { ffi::peerbuf_dma_resv_trylock(resv) } {
        // SAFETY: As above, and the lock was taken.
        return Ok(unsafe { Locked::taken(dmabuf) });
    }
    let wait = || {
        // SAFETY: As above; the caller's reference keeps the dma-buf while there is no `mmap_lock`.
        unsafe {
            if ffi::peerbuf_dma_resv_lock_interruptible(resv) == 0 {
                bindings::dma_resv_unlock(resv);
            }
        }
    };
    // SAFETY: By the caller's promise.
    if let Some(retry) = unsafe { retry_after(vmf, wait) } {
        return Err(retry);
    }
    // SAFETY: As above.
    match unsafe { ffi::peerbuf_dma_resv_lock_interruptible(resv) } {
        // SAFETY: As above, and the lock was taken.
        0 => Ok(unsafe { Locked::taken(dmabuf) }),
        // The signal is handled, and then the fault comes again.
        _ => Err(ffi::VM_FAULT_NOPAGE),
    }
}

/// Lets the `mmap_lock` go, calls `wait`, and has the fault begin anew: what it answers is returned. `None`
/// where it may not, or did so before.
///
/// # Safety
///
/// `vmf` is a fault that is being handled with the `mmap_lock` held for reading. Nothing of it is used if this
/// returns an answer.
unsafe fn retry_after(
    vmf: *mut bindings::vm_fault,
    wait: impl FnOnce(),
) -> Option<bindings::vm_fault_t> {
    // SAFETY: By the caller's promise, here and below.
    if !unsafe { ffi::peerbuf_fault_may_retry(vmf) } {
        return None;
    }
    // SAFETY: As above.
    if unsafe { ffi::peerbuf_fault_may_wait(vmf) } {
        // SAFETY: As above. The reference keeps the file, and so the dma-buf, when the VMA may go.
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

/// `vm_operations_struct.fault`, with the `mmap_lock` held for reading: the memory manager calls it with the
/// VMA's own lock alone only where there is `map_pages`.
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
    // SAFETY: As above.
    let (vma_start, vma_end) = unsafe {
        let bounds = &(*vma).__bindgen_anon_1.__bindgen_anon_1;
        (bounds.vm_start as usize, bounds.vm_end as usize)
    };
    // Held until the pages are in: a revoke or move marks under this lock and zaps after, so a
    // page put in before the mark is zapped, and after a revoke's none is put in.
    // SAFETY: The dma-buf is kept by the VMA; a fault happens with no reservation lock held, as
    // the lock order says.
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
        // SAFETY: As above.
        if let Some(retry) = unsafe { retry_after(vmf, || object.wait_changed(FAULT_DELAY_MS)) } {
            return retry;
        }
        object.wait_changed(FAULT_DELAY_MS);
        // SAFETY: As above.
        locked = match unsafe { lock_for_fault(vmf, dmabuf) } {
            Ok(locked) => locked,
            Err(answer) => return answer,
        };
    }
    let (object, state) = locked.parts();
    if object.revoked() || offset >= object.len as usize {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    }
    // The window, clipped to the mapping and to the buffer.
    let before = (offset % window).min(address - vma_start);
    let first = offset - before;
    let len = (window - first % window)
        .min(vma_end - (address - before))
        .min(object.len as usize - first);
    for at in (0..len).step_by(PAGE_SIZE) {
        // SAFETY: The VMA is as `mmap` set it up, the address lies in it, and the lock is held.
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
            // Another thread's fault on the window may have been first.
            Ok(()) => {}
            Err(e) if e == EBUSY => {}
            // What was asked for is in; the neighbours will be asked for if they are needed.
            Err(_) if at > before => break,
            Err(e) if e == ENOMEM => return bindings::vm_fault_reason_VM_FAULT_OOM,
            Err(_) => return bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }
    ffi::VM_FAULT_NOPAGE
}

/// Puts the page at `offset` of the buffer in at `address`.
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
    // Device memory is uncached, as the kernel's own mapping of it; system memory is not. The
    // field is only used by the insertion below: all faults of this VMA hold the reservation
    // lock, and who holds the `mmap_lock` for writing keeps faults out.
    // SAFETY: By the caller's promise.
    unsafe { ffi::peerbuf_vma_set_device(vma, piece.system.is_none()) };
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
            // SAFETY: The VMA is VM_MIXEDMAP, and the page has a count of at least one.
            to_result(unsafe { bindings::vm_insert_page(vma, address, page) })
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
            // SAFETY: The VMA is VM_PFNMAP, and what it shows is the buffer's own: it is zapped
            // before the memory goes to somebody else.
            match unsafe { bindings::vmf_insert_pfn(vma, address, pfn as c_ulong) } {
                ffi::VM_FAULT_NOPAGE => Ok(()),
                bindings::vm_fault_reason_VM_FAULT_OOM => Err(ENOMEM),
                _ => Err(EFAULT),
            }
        }
    }
}
