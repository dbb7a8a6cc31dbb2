//! What peerbuf.ko's operations cost beside vfio-pci's, through the host bridge and an IOMMU.
//! `cargo lab bench kmod`; see `peerbuf_lab_suite::cost`.

fn main() {
    peerbuf_lab_suite::cost::table();
}
