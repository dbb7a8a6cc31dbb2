/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels that peerbuf.ko is written for, in C. The list of kernels is in
 * Kbuild; for Rust see compat.rs. What a kernel does wrong in the same way in all of them is worked
 * around here, too, so that the next one is one place to change.
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
 * Frees a table of dma_buf_phys_vec_to_sgt(), which sets orig_nents to zero, to say that there is no
 * CPU list. dma_buf_free_sgt() frees as many entries as that says: every mapping loses its list. With
 * the number put back it is freed. (7.2, 7.3)
 */
static inline void compat_dma_buf_free_sgt(struct dma_buf_attachment *attach, struct sg_table *sgt,
					   enum dma_data_direction dir)
{
	sgt->orig_nents = sgt->nents;
	dma_buf_free_sgt(attach, sgt, dir);
}

/*
 * How many ranges one call of dma_buf_phys_vec_to_sgt() can map for a device behind an IOMMU: it links
 * each at the beginning of the IOVAs that it reserved for all, so that the second fails (EADDRINUSE).
 * (7.2, 7.3)
 */
#define COMPAT_TRANSLATED_RANGES 1

#endif
