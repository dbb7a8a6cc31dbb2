// SPDX-License-Identifier: GPL-2.0
/*
 * Rust cannot link to the kernel's inline functions and macros. This file wraps each one that the module
 * needs in a function. The kernel's rust/helpers/ does the same for others; none of these is among them
 * in Linux 7.3. Nothing else belongs here.
 */
#include <linux/completion.h>
#include <linux/dma-fence.h>
#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/fs.h>
#include <linux/gfp.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/pci.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "compat.h"

/* Called from Rust only; the declarations silence -Wmissing-prototypes. */
void peerbuf_dma_buf_free_sgt(struct dma_buf_attachment *attach, struct sg_table *sgt,
			      enum dma_data_direction dir);
unsigned int peerbuf_translated_ranges(void);
struct page *peerbuf_pfn_to_page(unsigned long pfn);
int peerbuf_page_count(const struct page *page);
struct page *peerbuf_page_head(struct page *page);
unsigned int peerbuf_page_order(struct page *page);
void peerbuf_set_page_count(struct page *page, int count);
unsigned long peerbuf_pci_resource_flags(struct pci_dev *pdev, int bar);
int peerbuf_device_lock(struct device *dev);
void peerbuf_device_unlock(struct device *dev);
void peerbuf_dma_fence_put(struct dma_fence *fence);
bool peerbuf_dma_fence_is_signaled(struct dma_fence *fence);
pgprot_t peerbuf_page_prot(unsigned long vm_flags);
pgprot_t peerbuf_device_prot(pgprot_t prot, bool combining);
void *peerbuf_page_address(struct page *page);
unsigned long peerbuf_page_to_pfn(const struct page *page);
unsigned int peerbuf_dma_max_segment(struct device *dev);
void peerbuf_reinit_completion(struct completion *completion);
void *peerbuf_vmap(struct page **pages, unsigned int count, bool device, bool combining);
struct page *peerbuf_virt_to_page(const void *address);
void peerbuf_get_pgmap(struct page *page, unsigned long references);
void peerbuf_put_page(struct page *page);
bool peerbuf_page_maybe_dma_pinned(struct page *page);
void peerbuf_mb(void);
void peerbuf_wmb(void);
void peerbuf_cond_resched(void);
bool peerbuf_fatal_signal_pending(void);
unsigned long peerbuf_totalram_pages(void);
struct page *peerbuf_alloc_pages(gfp_t gfp, unsigned int order);
void peerbuf_dma_resv_assert_held(struct dma_resv *resv);
bool peerbuf_dma_resv_trylock(struct dma_resv *resv);
int peerbuf_dma_resv_lock_interruptible(struct dma_resv *resv);
bool peerbuf_fault_may_retry(const struct vm_fault *fault);
bool peerbuf_fault_may_wait(const struct vm_fault *fault);
void peerbuf_mmap_read_unlock(struct mm_struct *mm);
struct file *peerbuf_get_file(struct file *file);
void peerbuf_vma_set_pfnmap(struct vm_area_struct *vma);
int peerbuf_copy_struct_from_user(void *to, size_t size, const void __user *from, size_t from_size);
int peerbuf_copy_struct_to_user(void __user *to, size_t to_size, const void *from, size_t size);
u64 peerbuf_pci_address(struct pci_dev *pdev);

void peerbuf_dma_buf_free_sgt(struct dma_buf_attachment *attach, struct sg_table *sgt,
			      enum dma_data_direction dir)
{
	compat_dma_buf_free_sgt(attach, sgt, dir);
}

unsigned int peerbuf_translated_ranges(void)
{
	return COMPAT_TRANSLATED_RANGES;
}

struct page *peerbuf_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

int peerbuf_page_count(const struct page *page)
{
	return page_count(page);
}

struct page *peerbuf_page_head(struct page *page)
{
	return compound_head(page);
}

unsigned int peerbuf_page_order(struct page *page)
{
	return compound_order(page);
}

void peerbuf_set_page_count(struct page *page, int count)
{
	set_page_count(page, count);
}

unsigned long peerbuf_pci_resource_flags(struct pci_dev *pdev, int bar)
{
	return pci_resource_flags(pdev, bar);
}

pgprot_t peerbuf_page_prot(unsigned long vm_flags)
{
	return vm_get_page_prot(vm_flags);
}

pgprot_t peerbuf_device_prot(pgprot_t prot, bool combining)
{
	return pgprot_decrypted(combining ? pgprot_writecombine(prot) : pgprot_noncached(prot));
}

void *peerbuf_page_address(struct page *page)
{
	return page_address(page);
}

unsigned long peerbuf_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

unsigned int peerbuf_dma_max_segment(struct device *dev)
{
	return min_t(size_t, dma_get_max_seg_size(dev), dma_max_mapping_size(dev));
}

void peerbuf_reinit_completion(struct completion *completion)
{
	reinit_completion(completion);
}

void *peerbuf_vmap(struct page **pages, unsigned int count, bool device, bool combining)
{
	return vmap(pages, count, VM_MAP,
		    device ? peerbuf_device_prot(PAGE_KERNEL, combining) : PAGE_KERNEL);
}

struct page *peerbuf_virt_to_page(const void *address)
{
	return virt_to_page(address);
}

void peerbuf_get_pgmap(struct page *page, unsigned long references)
{
	percpu_ref_get_many(&page_pgmap(page)->ref, references);
}

void peerbuf_put_page(struct page *page)
{
	put_page(page);
}

bool peerbuf_page_maybe_dma_pinned(struct page *page)
{
	return folio_maybe_dma_pinned(page_folio(page));
}

void peerbuf_mb(void)
{
	mb();
}

void peerbuf_wmb(void)
{
	wmb();
}

int peerbuf_device_lock(struct device *dev)
{
	return device_lock_interruptible(dev);
}

void peerbuf_device_unlock(struct device *dev)
{
	device_unlock(dev);
}

void peerbuf_dma_fence_put(struct dma_fence *fence)
{
	dma_fence_put(fence);
}

bool peerbuf_dma_fence_is_signaled(struct dma_fence *fence)
{
	return dma_fence_is_signaled(fence);
}

void peerbuf_cond_resched(void)
{
	cond_resched();
}

bool peerbuf_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

unsigned long peerbuf_totalram_pages(void)
{
	return totalram_pages();
}

struct page *peerbuf_alloc_pages(gfp_t gfp, unsigned int order)
{
	return alloc_pages(gfp, order);
}

void peerbuf_dma_resv_assert_held(struct dma_resv *resv)
{
	dma_resv_assert_held(resv);
}

bool peerbuf_dma_resv_trylock(struct dma_resv *resv)
{
	return dma_resv_trylock(resv);
}

int peerbuf_dma_resv_lock_interruptible(struct dma_resv *resv)
{
	return dma_resv_lock_interruptible(resv, NULL);
}

bool peerbuf_fault_may_retry(const struct vm_fault *fault)
{
	return fault_flag_allow_retry_first(fault->flags);
}

bool peerbuf_fault_may_wait(const struct vm_fault *fault)
{
	return !(fault->flags & FAULT_FLAG_RETRY_NOWAIT);
}

void peerbuf_mmap_read_unlock(struct mm_struct *mm)
{
	mmap_read_unlock(mm);
}

struct file *peerbuf_get_file(struct file *file)
{
	return get_file(file);
}

void peerbuf_vma_set_pfnmap(struct vm_area_struct *vma)
{
	vm_flags_set(vma, VM_PFNMAP);
}

int peerbuf_copy_struct_from_user(void *to, size_t size, const void __user *from, size_t from_size)
{
	return copy_struct_from_user(to, size, from, from_size);
}

int peerbuf_copy_struct_to_user(void __user *to, size_t to_size, const void *from, size_t size)
{
	return copy_struct_to_user(to, to_size, from, size, NULL);
}

u64 peerbuf_pci_address(struct pci_dev *pdev)
{
	return (u64)(u32)pci_domain_nr(pdev->bus) << 16 | pci_dev_id(pdev);
}
