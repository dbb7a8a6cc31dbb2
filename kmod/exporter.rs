// SPDX-License-Identifier: GPL-2.0

//! The dma-buf operations of an exported [`Buffer`]; nothing else calls in from C here.
//!
//! A dynamic exporter that can take access away: importers must be able to reach peer memory and
//! to be told that their mappings are stale. There are no pin operations (both or neither):
//! a buffer does not move yet, and a revoke does not respect pins anyway.
//!
//! Lock order: `mmap_lock`, then the reservation lock (a page fault takes it), then the file's
//! `i_mmap_rwsem` (zapping). `dma_resv_lockdep()` in the kernel teaches lockdep the same.

use core::ptr;

use kernel::{
    bindings, container_of,
    error::{from_err_ptr, from_result, to_result},
    ffi::*,
    mm::virt::{flags, VmaNew},
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
};

use crate::{
    abi,
    buffer::Buffer,
    ffi::{self, Table},
};

static OPS: Table<bindings::dma_buf_ops> = Table(bindings::dma_buf_ops {
    attach: Some(attach),
    map_dma_buf: Some(map),
    unmap_dma_buf: Some(unmap),
    release: Some(release),
    begin_cpu_access: Some(begin_cpu_access),
    end_cpu_access: Some(end_cpu_access),
    mmap: Some(mmap),
    // SAFETY: Null function pointers are operations that the exporter does not have.
    ..unsafe { core::mem::zeroed() }
});

static VM_OPS: Table<bindings::vm_operations_struct> = Table(bindings::vm_operations_struct {
    fault: Some(fault),
    // SAFETY: As above.
    ..unsafe { core::mem::zeroed() }
});

/// Makes a dma-buf of a buffer, which it owns from then on. On an error the buffer is dropped.
pub(crate) fn export(buffer: Arc<Buffer>, fd_flags: u32) -> Result<*mut bindings::dma_buf> {
    let info = bindings::dma_buf_export_info {
        exp_name: c"peerbuf".as_char_ptr(),
        // A dma-buf keeps the module, since its operations are in it. It does not keep the
        // device from being unbound.
        owner: crate::THIS_MODULE.as_ptr(),
        ops: &OPS.0,
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

/// Takes access to an export away for good. When it returns no importer has a mapping, and no CPU
/// mapping has a page; direct I/O that was accepted before may still use pages.
///
/// # Safety
///
/// `dmabuf` is one of ours and the caller has a reference to its file. May sleep; neither the
/// reservation lock nor anything below it in the lock order is held.
pub(crate) unsafe fn revoke(dmabuf: *mut bindings::dma_buf) {
    // SAFETY: The caller's reference keeps the dma-buf and so its buffer.
    let buffer = unsafe { buffer(dmabuf) };
    {
        // SAFETY: As above.
        let _resv = unsafe { Resv::lock(dmabuf) };
        // From here on map answers ENODEV and a fault SIGBUS: both look under this lock.
        buffer.set_revoked();
        // SAFETY: The reservation lock is held. The same for the next call.
        unsafe { bindings::dma_buf_invalidate_mappings(dmabuf) };
        // Fences end what importers do with full access; unmaps, below, end speculative reads.
        // Both are needed. BOOKKEEP waits for every fence there is.
        // SAFETY: As above.
        unsafe {
            bindings::dma_resv_wait_timeout(
                (*dmabuf).resv,
                bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP,
                false,
                ffi::MAX_SCHEDULE_TIMEOUT,
            )
        };
        // Importers need the lock to unmap, so it is given up before that is waited for.
    }
    // After the mark no fault puts in another page, so what is zapped here stays so.
    // SAFETY: The file is valid, and its mapping with it; the whole of it is zapped.
    unsafe { bindings::unmap_mapping_range((*(*dmabuf).file).f_mapping, 0, 0, 1) };
    while !buffer.wait_unmapped(10) {
        // SAFETY: As above.
        unsafe { name_importers(dmabuf) };
    }
}

/// Says in the log who has attached a dma-buf that a revoke waits for.
///
/// # Safety
///
/// As for [`revoke`].
unsafe fn name_importers(dmabuf: *mut bindings::dma_buf) {
    // SAFETY: By the caller's promise. The lock keeps the list of attachments as it is, and an
    // attachment keeps its importer's device.
    unsafe {
        let _resv = Resv::lock(dmabuf);
        let exporter = buffer(dmabuf).device.name();
        let head = &raw mut (*dmabuf).attachments;
        let mut node = (*head).next;
        while node != head {
            let attachment = container_of!(node, bindings::dma_buf_attachment, node);
            let importer: &kernel::device::Device =
                kernel::device::Device::from_raw((*attachment).dev);
            pr_warn!(
                "{exporter}: revoked, and waiting for {} to unmap it\n",
                importer.name()
            );
            node = (*node).next;
        }
    }
}

/// The buffer behind one of our dma-bufs.
///
/// # Safety
///
/// `dmabuf` was made by [`export`] and is not released while the result is in use.
unsafe fn buffer<'a>(dmabuf: *mut bindings::dma_buf) -> &'a Buffer {
    // SAFETY: `priv_` is the reference put there by `export`.
    unsafe { &*(*dmabuf).priv_.cast::<Buffer>() }
}

/// The reservation lock, held.
struct Resv(*mut bindings::dma_resv);

impl Resv {
    /// # Safety
    ///
    /// `dmabuf` is valid until the result is dropped, and the calling task does not hold its
    /// reservation lock.
    unsafe fn lock(dmabuf: *mut bindings::dma_buf) -> Self {
        // SAFETY: By the caller's promise.
        let resv = unsafe { (*dmabuf).resv };
        // Without an acquire context this cannot fail: it only waits.
        // SAFETY: As above.
        unsafe { bindings::dma_resv_lock(resv, ptr::null_mut()) };
        Self(resv)
    }
}

impl Drop for Resv {
    fn drop(&mut self) {
        // SAFETY: `lock` has taken it and the object is still valid.
        unsafe { bindings::dma_resv_unlock(self.0) };
    }
}

/// `dma_buf_ops.attach`. Without the reservation lock, so the answer is advisory; map decides.
unsafe extern "C" fn attach(
    dmabuf: *mut bindings::dma_buf,
    attachment: *mut bindings::dma_buf_attachment,
) -> c_int {
    // SAFETY: The dma-buf core calls with valid pointers and a reference held.
    let (buffer, attachment_ref) = unsafe { (buffer(dmabuf), &*attachment) };
    if buffer.revoked() {
        return ENODEV.to_errno();
    }
    // A BAR address is only for an importer that asked for peer memory and that can be told when
    // the memory goes away. There is no system memory to fall back to yet.
    // SAFETY: As above.
    if !attachment_ref.peer2peer || !unsafe { bindings::dma_buf_attach_revocable(attachment) } {
        return ffi::eopnotsupp().to_errno();
    }
    0
}

/// `dma_buf_ops.map_dma_buf`. The reservation lock is held by the caller.
unsafe extern "C" fn map(
    attachment: *mut bindings::dma_buf_attachment,
    dir: bindings::dma_data_direction,
) -> *mut bindings::sg_table {
    // SAFETY: The dma-buf core calls with a valid attachment of one of our dma-bufs.
    let buffer = unsafe { buffer((*attachment).dmabuf) };
    if buffer.revoked() {
        return ENODEV.to_ptr();
    }
    // SAFETY: Not revoked, under the lock, means that the device is bound, so the provider is
    // valid, until every scatter table came back. The lock is held, as the function wants.
    let sgt = unsafe {
        ffi::dma_buf_phys_vec_to_sgt(
            attachment,
            buffer.device.bars[buffer.bar].provider,
            buffer.phys.get(),
            1,
            buffer.len as usize,
            dir,
        )
    };
    // Counted after success, so a failure leaves nothing to undo.
    if from_err_ptr(sgt).is_ok() {
        buffer.mapping_made();
    }
    sgt
}

/// `dma_buf_ops.unmap_dma_buf`. The reservation lock is held by the caller.
unsafe extern "C" fn unmap(
    attachment: *mut bindings::dma_buf_attachment,
    sgt: *mut bindings::sg_table,
    dir: bindings::dma_data_direction,
) {
    // SAFETY: The dma-buf core calls with a valid attachment of one of our dma-bufs, and a table
    // that `map` made for it.
    unsafe {
        // `dma_buf_phys_vec_to_sgt` of Linux 7.2 sets `orig_nents` to zero, to say that there is
        // no CPU list, and `dma_buf_free_sgt` frees as many entries as that says: every mapping
        // leaks its list. With the number put back, as here, it is freed.
        (*sgt).orig_nents = (*sgt).nents;
        ffi::dma_buf_free_sgt(attachment, sgt, dir);
        // Counted after the table is gone: removal may go on from here.
        buffer((*attachment).dmabuf).mapping_gone();
    }
}

/// `dma_buf_ops.release`: no descriptor, attachment or mapping is left.
unsafe extern "C" fn release(dmabuf: *mut bindings::dma_buf) {
    // SAFETY: `priv_` is the reference put there by `export`; this is its end.
    let buffer = unsafe { Arc::from_raw((*dmabuf).priv_.cast_const().cast::<Buffer>()) };
    buffer.device.forget(&buffer, dmabuf);
}

/// `dma_buf_ops.begin_cpu_access`.
unsafe extern "C" fn begin_cpu_access(
    dmabuf: *mut bindings::dma_buf,
    _dir: bindings::dma_data_direction,
) -> c_int {
    // CPU mappings are uncached, so there is nothing to invalidate. The core waits for fences.
    // SAFETY: The dma-buf core calls with a valid dma-buf and a reference held.
    if unsafe { buffer(dmabuf) }.revoked() {
        return ENODEV.to_errno();
    }
    0
}

/// `dma_buf_ops.end_cpu_access`.
unsafe extern "C" fn end_cpu_access(
    dmabuf: *mut bindings::dma_buf,
    dir: bindings::dma_data_direction,
) -> c_int {
    // SAFETY: The dma-buf core calls with a valid dma-buf and a reference held.
    let buffer = unsafe { buffer(dmabuf) };
    // The lock keeps the device bound while it is read from.
    // SAFETY: As above; the core does not hold the lock here.
    let _resv = unsafe { Resv::lock(dmabuf) };
    if buffer.revoked() {
        return ENODEV.to_errno();
    }
    let bar = &buffer.device.bars[buffer.bar];
    // A peer may reach the memory by a path that the processor's posted writes do not take. A
    // read has no side effects where the BAR is prefetchable, and only there.
    if dir != bindings::dma_data_direction_DMA_FROM_DEVICE && bar.flags & abi::BAR_PREFETCHABLE != 0
    {
        if let Some(pages) = &bar.pages {
            pages.flush(buffer.offset);
        }
    }
    0
}

/// `dma_buf_ops.mmap`. The core has checked that the range lies in the buffer.
unsafe extern "C" fn mmap(
    dmabuf: *mut bindings::dma_buf,
    vma: *mut bindings::vm_area_struct,
) -> c_int {
    // SAFETY: The dma-buf core calls with a valid dma-buf and a VMA that is being set up.
    let (buffer, new) = unsafe { (buffer(dmabuf), VmaNew::from_raw(vma)) };
    from_result(|| {
        if buffer.revoked() {
            return Err(ENODEV);
        }
        // A private mapping would copy device memory on the first write.
        if new.flags() & ffi::VM_MAYSHARE == 0 {
            return Err(EINVAL);
        }
        new.set_dontexpand();
        new.set_dontdump();
        if buffer.device.bars[buffer.bar].pages.is_some() {
            // Not VM_IO or VM_PFNMAP, which direct I/O refuses.
            new.set_mixedmap();
        } else {
            // No struct pages: plain frames, with which direct I/O fails with EFAULT.
            // `VmaNew` has no setter for PFNMAP alone.
            new.set_io();
            // SAFETY: The VMA is being set up, so nobody else looks at its flags.
            unsafe { (*vma).__bindgen_anon_2.vm_flags |= flags::PFNMAP };
        }
        // SAFETY: The VMA is being set up. The buffer outlives it: a VMA keeps its file.
        unsafe {
            // The same memory type as the kernel's mapping of the pages.
            ffi::peerbuf_vma_set_noncached(vma);
            (*vma).vm_private_data = dmabuf.cast();
            (*vma).vm_ops = &VM_OPS.0;
        }
        buffer.set_cpu_mapped();
        Ok(0)
    })
}

/// The pages that one fault puts in, as an aligned window of bytes in the buffer, so that a large
/// transfer does not fault on every page.
const FAULT_WINDOW: usize = 16 * PAGE_SIZE;

/// `vm_operations_struct.fault`, with the `mmap_lock` or the VMA's own lock held for reading.
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
    let (buffer, vma_start, vma_end) = unsafe {
        let bounds = &(*vma).__bindgen_anon_1.__bindgen_anon_1;
        (
            buffer(dmabuf),
            bounds.vm_start as usize,
            bounds.vm_end as usize,
        )
    };
    // Held until the pages are in: a revoke marks under this lock and zaps after, so a page put
    // in before the mark is zapped, and after the mark none is put in.
    // SAFETY: The dma-buf is kept by the VMA; a fault happens with no reservation lock held, as
    // the lock order says.
    let _resv = unsafe { Resv::lock(dmabuf) };
    if buffer.revoked() || offset >= buffer.len as usize {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    }
    let bar = &buffer.device.bars[buffer.bar];
    let Some(pages) = &bar.pages else {
        let pfn = (bar.start + buffer.offset) as usize / PAGE_SIZE + offset / PAGE_SIZE;
        // SAFETY: The VMA is VM_PFNMAP and the frame belongs to the export, so to the BAR.
        return unsafe { bindings::vmf_insert_pfn(vma, address as c_ulong, pfn as c_ulong) };
    };

    // The window, clipped to the mapping and to the buffer.
    let before = (offset % FAULT_WINDOW).min(address - vma_start);
    let first = offset - before;
    let len = (FAULT_WINDOW - first % FAULT_WINDOW)
        .min(vma_end - (address - before))
        .min(buffer.len as usize - first);
    for at in (0..len).step_by(PAGE_SIZE) {
        let index = (buffer.offset as usize + first + at) / PAGE_SIZE;
        let Ok(page) = pages.page(index) else {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        };
        // SAFETY: The VMA is VM_MIXEDMAP since `mmap`, the address lies in it, and the page has a
        // count of at least one.
        let inserted =
            unsafe { bindings::vm_insert_page(vma, (address - before + at) as c_ulong, page) };
        match to_result(inserted) {
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
