//! Address spaces of iommufd with a device in them. Runs in a guest with an IOMMU, on a kernel with
//! CONFIG_IOMMUFD.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use peerbuf::device::edu;
use peerbuf::device::vfio::VfioDevice;
use peerbuf::error::ImportError;
use peerbuf::export::{heap, memfd, udmabuf, vfio};
use peerbuf::import::iommufd::{self, AddressSpace};
use peerbuf::plan::{Path, ReasonCode};
use peerbuf::{Access, Buffer};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::{Node, ioctl};

const MIB: u64 = 1 << 20;
const IOVA: u64 = 0x10_0000;
/// Number of bytes of one copy by the device.
const CHUNK: u64 = 4096;

fn random(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rand::fill(&mut bytes[..]);
    bytes
}

fn space() -> AddressSpace {
    modules::load("iommufd");
    iommufd::probe().unwrap();
    AddressSpace::open().unwrap()
}

/// QEMU's `edu` in an address space, through VFIO's newer interface (include/uapi/linux/vfio.h), which the
/// crate does not use.
struct Device(File);

impl Device {
    fn attach(space: &AddressSpace) -> Device {
        let bdf = modules::find_pci(edu::ID.0, edu::ID.1);
        modules::load("vfio-pci");
        modules::rebind(&bdf, "vfio-pci");
        let directory = format!("/sys/bus/pci/devices/{bdf}/vfio-dev");
        let name = std::fs::read_dir(directory).unwrap().next().unwrap();
        let node = format!("/dev/vfio/devices/{}", name.unwrap().file_name().display());
        let file = File::options().read(true).write(true).open(node).unwrap();
        let number = |n: u32| u32::from(b';') << 8 | (100 + n);
        let iommu = space.as_fd().as_raw_fd() as u32;
        // VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_ATTACH_IOMMUFD_PT
        let mut bind = [16, 0, iommu, 0u32];
        ioctl(file.as_fd(), number(18), bind.as_mut_ptr().addr()).expect("BIND_IOMMUFD");
        let mut attach = [12, 0, space.id()];
        ioctl(file.as_fd(), number(19), attach.as_mut_ptr().addr()).expect("ATTACH_IOMMUFD_PT");
        // PCI_COMMAND in the configuration space: memory and bus mastering.
        file.write_all_at(&6u16.to_le_bytes(), (7 << 40) + 4)
            .unwrap();
        Device(file)
    }

    /// Copies from one address to the device's own memory, and from there to the other address.
    fn copy(&self, from: u64, to: u64) {
        let own = 0x4_0000;
        for (source, target, command) in [(from, own, 1u64), (own, to, 3)] {
            for (register, value) in [
                (0x80, source),
                (0x88, target),
                (0x90, CHUNK),
                (0x98, command),
            ] {
                self.0.write_all_at(&value.to_le_bytes(), register).unwrap();
            }
            let begun = Stopwatch::start();
            let mut state = [1; 8];
            while state[0] & 1 != 0 {
                assert!(
                    begun.elapsed() < Duration::from_secs(20),
                    "the device does not end"
                );
                self.0.read_exact_at(&mut state, 0x98).unwrap();
            }
        }
    }
}

#[test]
fn a_device_reaches_memory_where_it_was_mapped_and_no_longer_when_it_was_unmapped() {
    let space = space();
    let device = Device::attach(&space);
    for buffer in [
        udmabuf::export("memory", MIB).unwrap(),
        memfd::export("memory", MIB).unwrap(),
    ] {
        let range = buffer.range(8192, 3 * CHUNK).unwrap();
        let bytes = random(CHUNK);
        put(&range, &bytes);
        let attached = space.attach(&range, IOVA).unwrap();
        assert_eq!(attached.plan().path, Path::SharedHostMemory);
        device.copy(attached.iova(), attached.iova() + 2 * CHUNK);
        let found = get(&range);
        assert!(found[2 * CHUNK as usize..] == bytes);
        assert!(
            found[CHUNK as usize..2 * CHUNK as usize]
                .iter()
                .all(|&byte| byte == 0)
        );

        let taken = space.attach(&range, IOVA).unwrap_err().to_string();
        assert!(
            taken.contains("EEXIST") || taken.contains("EADDRINUSE"),
            "{taken}"
        );
        drop(attached);
        put(&range, &[0; 3 * CHUNK as usize]);
        device.copy(IOVA, IOVA + 2 * CHUNK);
        assert!(get(&range).iter().all(|&byte| byte == 0));
        // The address is free again, and maps the next buffer.
    }
}

#[test]
fn a_bar_that_vfio_exports_is_reached_by_another_device() {
    let bdf = Node::all().last().unwrap().bdf.clone();
    modules::load("vfio-pci");
    modules::rebind(&bdf, "vfio-pci");
    let card = VfioDevice::open(bdf.parse().unwrap()).unwrap();
    let request = vfio::Request {
        bar: 2,
        offset: 0,
        length: 65536,
        access: Access::ReadWrite,
    };
    let bar = vfio::export(&card, request).unwrap();
    put(&bar.whole(), &[0; 65536]);
    let bytes = random(CHUNK);
    let memory = memfd::export("memory", CHUNK).unwrap();
    put(&memory.whole(), &bytes);
    let space = space();
    let device = Device::attach(&space);
    let source = space.attach(&memory.whole(), IOVA).unwrap();
    let target = space.attach(&bar.whole(), IOVA + MIB).unwrap();
    assert_eq!(target.plan().path, Path::PeerToPeer);
    device.copy(source.iova(), target.iova() + CHUNK);
    assert!(get(&bar.range(CHUNK, CHUNK).unwrap()) == bytes);
}

#[test]
fn dma_bufs_of_other_exporters_are_refused_with_the_reason() {
    let space = space();
    let memory = udmabuf::export("memory", MIB).unwrap();
    let alone = memory.dmabuf().unwrap().try_clone().unwrap();
    let node = Node::largest();
    let device = peerbuf::export::peerbuf::Device::open(node.bdf.parse().unwrap()).unwrap();
    let bar = peerbuf::export::peerbuf::Request {
        bar: 2,
        offset: None,
        length: MIB,
        access: Access::ReadWrite,
    };
    let heap = heap::Heap::open("system").unwrap();
    for buffer in [
        heap.export("frames", MIB).unwrap(),
        Buffer::from_dmabuf(alone, memory.provenance().clone()),
        device.export(bar).unwrap(),
    ] {
        match space.attach(&buffer.whole(), IOVA) {
            Err(ImportError::Impossible { code, evidence, .. }) => {
                assert_eq!(code, ReasonCode::AttachRefused, "{evidence}");
                assert!(evidence.contains("as vfio-pci exports it"), "{evidence}");
            }
            other => panic!("{buffer}: {other:?}"),
        }
    }
    let odd = space
        .attach(&memory.range(1, 4096).unwrap(), IOVA)
        .unwrap_err();
    let misaligned = matches!(
        odd,
        ImportError::Impossible {
            code: ReasonCode::Misaligned,
            ..
        }
    );
    assert!(misaligned, "{odd}");
}
