//! An exporter that does not support the card: vfio-pci exports its BARs only to importers that accept peer
//! memory, which soft-RoCE does not. Runs in a guest with an IOMMU, on both soft-RoCEs.

use peerbuf::device::vfio::VfioDevice;
use peerbuf::export::vfio::{self, Request};
use peerbuf::{Access, Errno};
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::Node;
use peerbuf_rdma::{Card, Layer, Rung};

#[test]
fn a_refusal_by_the_exporter_is_not_taken_for_the_drivers() {
    modules::load("vfio-pci");
    let bdf = Node::all().last().unwrap().bdf.clone();
    modules::rebind(&bdf, "vfio-pci");
    let device = VfioDevice::open(bdf.parse().unwrap()).unwrap();
    let request = Request {
        bar: 2,
        offset: 0,
        length: 64 << 10,
        access: Access::ReadWrite,
    };
    let buffer = vfio::export(&device, request).unwrap();
    let card = Card::open("rxe0").unwrap();
    let registration = card.register(&buffer.whole(), None).unwrap();
    assert_eq!(registration.rung(), Rung::Staged);
    let attempt = |rung| {
        let mut attempts = registration.attempts().iter();
        attempts.find(|attempt| attempt.rung == rung).unwrap()
    };
    let (library, kernel) = (
        attempt(Rung::DmaBufByLibrary),
        attempt(Rung::DmaBufByKernel),
    );
    assert_eq!(library.errno, Some(Errno::OPNOTSUPP), "{library}");
    assert_eq!(kernel.errno, Some(Errno::OPNOTSUPP), "{kernel}");
    // The same number from three different layers.
    let expected = match std::env::var("PEERBUF_LAB_RDMA").as_deref() {
        Ok("dmabuf") => (Layer::Library, Layer::Exporter),
        _ => (Layer::Driver, Layer::Driver),
    };
    assert_eq!((library.layer, kernel.layer), expected);
}
