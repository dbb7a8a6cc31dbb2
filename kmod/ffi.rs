// SPDX-License-Identifier: GPL-2.0

//! Declarations that `kernel::bindings` lacks: exported kernel functions whose headers the bindings do not
//! include, and the wrappers in `helpers.c` and `helpers_probe.c`.

// Each of the two modules uses only some of the declarations.
#![allow(dead_code)]

use kernel::{bindings, ffi::*};

/// `VM_FAULT_NOPAGE`: the fault handler has installed the page table entry.
pub(crate) const VM_FAULT_NOPAGE: bindings::vm_fault_t = 0x100;

/// `VM_MAYSHARE`, set in every shared mapping. (In Linux 7.2 `kernel::mm::virt::flags::MAYSHARE` has the
/// value of `VM_MAYEXEC`.)
pub(crate) const VM_MAYSHARE: bindings::vm_flags_t = 0x80;

/// The error of an errno for which the kernel's Rust code has no constant, such as `bindings::EOPNOTSUPP`.
pub(crate) fn errno(number: u32) -> kernel::error::Error {
    kernel::error::Error::from_errno(-(number as c_int))
}

/// Whether the current task has a pending signal.
pub(crate) fn signal_pending() -> bool {
    kernel::current!().signal_pending()
}

/// Whether the current task is being killed.
pub(crate) fn fatal_signal_pending() -> bool {
    // SAFETY: Reads the current task, which exists.
    unsafe { peerbuf_fatal_signal_pending() }
}

/// A table of function pointers that the kernel only reads.
pub(crate) struct Table<T>(pub(crate) T);

// SAFETY: The table is never written.
unsafe impl<T> Sync for Table<T> {}

// `bindings` declares some of these types as structs without fields.
#[allow(improper_ctypes)]
extern "C" {
    /// `linux/dma-buf-mapping.h`, namespace `DMA_BUF`. The caller holds the reservation lock.
    pub(crate) fn dma_buf_phys_vec_to_sgt(
        attach: *mut bindings::dma_buf_attachment,
        provider: *mut bindings::p2pdma_provider,
        phys_vec: *mut bindings::phys_vec,
        nr_ranges: usize,
        size: usize,
        dir: bindings::dma_data_direction,
    ) -> *mut bindings::sg_table;

    /// `dma_buf_free_sgt` with the fix described in `compat.h`. The caller holds the reservation lock.
    pub(crate) fn peerbuf_dma_buf_free_sgt(
        attach: *mut bindings::dma_buf_attachment,
        sgt: *mut bindings::sg_table,
        dir: bindings::dma_data_direction,
    );

    /// The number of ranges that one call of `dma_buf_phys_vec_to_sgt` can map behind an IOMMU; see
    /// `compat.h`.
    pub(crate) fn peerbuf_translated_ranges() -> c_uint;

    /// `linux/memremap.h`: the alignment in bytes that device memory needs to get struct pages.
    pub(crate) fn memremap_compat_align() -> c_ulong;

    pub(crate) fn peerbuf_pfn_to_page(pfn: c_ulong) -> *mut bindings::page;
    pub(crate) fn peerbuf_page_count(page: *const bindings::page) -> c_int;
    pub(crate) fn peerbuf_page_head(page: *mut bindings::page) -> *mut bindings::page;
    pub(crate) fn peerbuf_page_order(page: *mut bindings::page) -> c_uint;
    pub(crate) fn peerbuf_set_page_count(page: *mut bindings::page, count: c_int);
    pub(crate) fn peerbuf_pci_resource_flags(pdev: *mut bindings::pci_dev, bar: c_int) -> c_ulong;

    /// `linux/anon_inodes.h`: a file without a directory entry.
    pub(crate) fn anon_inode_getfile(
        name: *const c_char,
        fops: *const bindings::file_operations,
        private: *mut c_void,
        flags: c_int,
    ) -> *mut bindings::file;

    /// EINTR on a signal.
    pub(crate) fn peerbuf_device_lock(dev: *mut bindings::device) -> c_int;
    pub(crate) fn peerbuf_device_unlock(dev: *mut bindings::device);
    pub(crate) fn peerbuf_dma_to_phys(
        dev: *mut bindings::device,
        address: bindings::dma_addr_t,
    ) -> bindings::phys_addr_t;
    pub(crate) fn peerbuf_pci_bus_address(pdev: *mut bindings::pci_dev, bar: c_int) -> u64;
    pub(crate) fn peerbuf_pci_upstream_bridge(
        pdev: *mut bindings::pci_dev,
    ) -> *mut bindings::pci_dev;
    pub(crate) fn peerbuf_dma_fence_put(fence: *mut bindings::dma_fence);
    pub(crate) fn peerbuf_dma_fence_is_signaled(fence: *mut bindings::dma_fence) -> bool;
    /// The protection of cached pages in a VMA with these flags.
    pub(crate) fn peerbuf_page_prot(vm_flags: c_ulong) -> bindings::pgprot_t;
    /// As `prot`, for device memory: write-combining, or uncached.
    pub(crate) fn peerbuf_device_prot(
        prot: bindings::pgprot_t,
        combining: bool,
    ) -> bindings::pgprot_t;
    pub(crate) fn peerbuf_page_address(page: *mut bindings::page) -> *mut c_void;
    pub(crate) fn peerbuf_page_to_pfn(page: *const bindings::page) -> c_ulong;
    pub(crate) fn peerbuf_dma_max_segment(dev: *mut bindings::device) -> c_uint;
    pub(crate) fn peerbuf_reinit_completion(completion: *mut bindings::completion);
    pub(crate) fn peerbuf_vmap(
        pages: *mut *mut bindings::page,
        count: c_uint,
        device: bool,
        combining: bool,
    ) -> *mut c_void;
    pub(crate) fn peerbuf_virt_to_page(address: *const c_void) -> *mut bindings::page;
    pub(crate) fn peerbuf_get_pgmap(page: *mut bindings::page, references: c_ulong);
    pub(crate) fn peerbuf_put_page(page: *mut bindings::page);
    pub(crate) fn peerbuf_page_maybe_dma_pinned(page: *mut bindings::page) -> bool;
    pub(crate) fn peerbuf_mb();
    pub(crate) fn peerbuf_wmb();
    pub(crate) fn peerbuf_cond_resched();
    fn peerbuf_fatal_signal_pending() -> bool;
    pub(crate) fn peerbuf_totalram_pages() -> c_ulong;
    pub(crate) fn peerbuf_alloc_pages(gfp: bindings::gfp_t, order: c_uint) -> *mut bindings::page;
    pub(crate) fn peerbuf_dma_resv_assert_held(resv: *mut bindings::dma_resv);
    pub(crate) fn peerbuf_dma_resv_trylock(resv: *mut bindings::dma_resv) -> bool;
    /// EINTR on a signal.
    pub(crate) fn peerbuf_dma_resv_lock_interruptible(resv: *mut bindings::dma_resv) -> c_int;
    pub(crate) fn peerbuf_fault_may_retry(fault: *const bindings::vm_fault) -> bool;
    pub(crate) fn peerbuf_fault_may_wait(fault: *const bindings::vm_fault) -> bool;
    pub(crate) fn peerbuf_mmap_read_unlock(mm: *mut bindings::mm_struct);
    pub(crate) fn peerbuf_get_file(file: *mut bindings::file) -> *mut bindings::file;
    pub(crate) fn peerbuf_vma_set_pfnmap(vma: *mut bindings::vm_area_struct);

    /// `linux/uaccess.h`. E2BIG if bytes after `size` are not zero; EFAULT.
    pub(crate) fn peerbuf_copy_struct_from_user(
        to: *mut c_void,
        size: usize,
        from: *const c_void,
        from_size: usize,
    ) -> c_int;
    /// `linux/uaccess.h`. EFAULT.
    pub(crate) fn peerbuf_copy_struct_to_user(
        to: *mut c_void,
        to_size: usize,
        from: *const c_void,
        size: usize,
    ) -> c_int;
    /// A device's PCI address, a number as in `uapi/src/abi.rs`.
    pub(crate) fn peerbuf_pci_address(pdev: *mut bindings::pci_dev) -> u64;

    /// `linux/vmalloc.h`.
    pub(crate) fn vunmap(address: *const c_void);
}
