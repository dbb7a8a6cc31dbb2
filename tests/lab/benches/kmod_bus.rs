//! What peerbuf.ko's operations cost beside vfio-pci's, by bus addresses, which no IOMMU has a part
//! in. `cargo lab bench kmod_bus`; see `peerbuf_lab_suite::cost`.

fn main() {
    peerbuf_lab_suite::cost::table();
}
