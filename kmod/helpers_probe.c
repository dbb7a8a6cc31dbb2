// SPDX-License-Identifier: GPL-2.0
/*
 * The functions of helpers.c that peerbuf_probe.ko needs; see there.
 */
#include <linux/device.h>
#include <linux/dma-direct.h>
#include <linux/dma-fence.h>
#include <linux/pci.h>
#include <linux/uaccess.h>

/* Called from Rust only; the declarations silence -Wmissing-prototypes. */
int peerbuf_device_lock(struct device *dev);
void peerbuf_device_unlock(struct device *dev);
void peerbuf_dma_fence_put(struct dma_fence *fence);
phys_addr_t peerbuf_dma_to_phys(struct device *dev, dma_addr_t address);
pci_bus_addr_t peerbuf_pci_bus_address(struct pci_dev *pdev, int bar);
struct pci_dev *peerbuf_pci_upstream_bridge(struct pci_dev *pdev);
int peerbuf_copy_struct_from_user(void *to, size_t size, const void __user *from, size_t from_size);
int peerbuf_copy_struct_to_user(void __user *to, size_t to_size, const void *from, size_t size);
u64 peerbuf_pci_address(struct pci_dev *pdev);

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
