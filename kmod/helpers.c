// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the kernel that Rust cannot link to, each as a function of one
 * line. Rust's own support code does the same for those it needs (rust/helpers/); none of these
 * is among them in Linux 7.2. Nothing else belongs here.
 */
#include <linux/mm.h>
#include <linux/pci.h>

/* Rust calls them; no C file does. */
struct page *peerbuf_pfn_to_page(unsigned long pfn);
int peerbuf_page_ref_count(const struct page *page);
void peerbuf_set_page_count(struct page *page, int count);
unsigned long peerbuf_pci_resource_flags(struct pci_dev *pdev, int bar);
void peerbuf_vma_set_noncached(struct vm_area_struct *vma);

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
