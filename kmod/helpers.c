// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the kernel that Rust cannot link to, each as a function of one
 * line. Rust's own support code does the same for those it needs (rust/helpers/); none of these
 * is among them in Linux 7.2. Nothing else belongs here.
 */
#include <linux/dma-direct.h>
#include <linux/dma-fence.h>
#include <linux/mm.h>
#include <linux/pci.h>

/* Rust calls them; no C file does. */
struct page *peerbuf_pfn_to_page(unsigned long pfn);
int peerbuf_page_ref_count(const struct page *page);
void peerbuf_set_page_count(struct page *page, int count);
unsigned long peerbuf_pci_resource_flags(struct pci_dev *pdev, int bar);
void peerbuf_vma_set_noncached(struct vm_area_struct *vma);
void peerbuf_device_lock(struct device *dev);
void peerbuf_device_unlock(struct device *dev);
phys_addr_t peerbuf_dma_to_phys(struct device *dev, dma_addr_t address);
pci_bus_addr_t peerbuf_pci_bus_address(struct pci_dev *pdev, int bar);
struct pci_dev *peerbuf_pci_upstream_bridge(struct pci_dev *pdev);
void peerbuf_dma_fence_put(struct dma_fence *fence);

struct page *peerbuf_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

int peerbuf_page_ref_count(const struct page *page)
{
	return page_ref_count(page);
}

void peerbuf_set_page_count(struct page *page, int count)
{
	set_page_count(page, count);
}

unsigned long peerbuf_pci_resource_flags(struct pci_dev *pdev, int bar)
{
	return pci_resource_flags(pdev, bar);
}

void peerbuf_vma_set_noncached(struct vm_area_struct *vma)
{
	vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
}

void peerbuf_device_lock(struct device *dev)
{
	device_lock(dev);
}

void peerbuf_device_unlock(struct device *dev)
{
	device_unlock(dev);
}

phys_addr_t peerbuf_dma_to_phys(struct device *dev, dma_addr_t address)
{
	return dma_to_phys(dev, address);
}

pci_bus_addr_t peerbuf_pci_bus_address(struct pci_dev *pdev, int bar)
{
	return pci_bus_address(pdev, bar);
}

struct pci_dev *peerbuf_pci_upstream_bridge(struct pci_dev *pdev)
{
	return pci_upstream_bridge(pdev);
}

void peerbuf_dma_fence_put(struct dma_fence *fence)
{
	dma_fence_put(fence);
}
