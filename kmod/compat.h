/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Differences between the kernels that peerbuf.ko supports, in C; compat.rs has those in Rust. Kbuild
 * lists the kernels. Workarounds for defects that all of them share are here, too, so that support for
 * the next kernel changes one file.
 *
 * Checked for 7.2 and 7.3: struct dma_buf_ops and dma_buf_attach_ops, dma_buf_invalidate_mappings(),
 * dma_buf_attach_revocable(), dma_fence_init() without a lock and the accessors of an attachment are the
 * same in both.
 */
#ifndef PEERBUF_COMPAT_H
#define PEERBUF_COMPAT_H

#include <linux/dma-buf-mapping.h>
#include <linux/dma-buf.h>
#include <linux/scatterlist.h>

/*
 * Frees a table of dma_buf_phys_vec_to_sgt(), which sets orig_nents to zero to mark that the table has no
 * CPU list. dma_buf_free_sgt() frees orig_nents entries and so leaks the list of every mapping. This
 * function restores the number first. (7.2, 7.3)
 */
static inline void compat_dma_buf_free_sgt(struct dma_buf_attachment *attach, struct sg_table *sgt,
					   enum dma_data_direction dir)
{
	sgt->orig_nents = sgt->nents;
	dma_buf_free_sgt(attach, sgt, dir);
}

/*
 * Maximum number of ranges that one call of dma_buf_phys_vec_to_sgt() can map for a device behind an
 * IOMMU: the call links each range at the beginning of the IOVAs reserved for all ranges, so the second
 * fails with EADDRINUSE. (7.2, 7.3)
 */
#define COMPAT_TRANSLATED_RANGES 1

#endif
