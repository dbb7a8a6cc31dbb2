//! Devices driven through VFIO. Runs in a guest with an IOMMU.

use std::error::Error;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use peerbuf::buffer::{Kind, Stage};
use peerbuf::device::edu::{self, CHUNK};
use peerbuf::device::vfio::VfioDevice;
use peerbuf::error::{BufferError, ImportError};
use peerbuf::export::vfio::{self, Request};
use peerbuf::export::{heap, memfd, udmabuf};
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::import::vfio::VfioImporter;
use peerbuf::plan::topology::Sysfs;
use peerbuf::plan::{Path, ReasonCode};
use peerbuf::{Access, Buffer, DmaBuf};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::machine::expect_what_vfio_loses;
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::Node;

const MIB: u64 = 1 << 20;
const IOVA: u64 = 0x10_0000;

fn random(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rand::fill(&mut bytes[..]);
    bytes
}

/// The card with the smallest BAR, bound to vfio-pci.
fn card() -> VfioDevice {
    expect_what_vfio_loses();
    modules::load("vfio-pci");
    let address = match Node::all().last() {
        Some(node) if node.bar2().size == MIB => {
            let bdf = node.bdf.clone();
            drop(Node::all());
            modules::rebind(&bdf, "vfio-pci");
            bdf
        }
        // An earlier test has bound the card.
        _ => vfio::probe()
            .unwrap()
            .into_iter()
            .map(|address| address.to_string())
            .find(|bdf| *bdf != modules::find_pci(edu::ID.0, edu::ID.1))
            .unwrap(),
    };
    VfioDevice::open(address.parse().unwrap()).unwrap()
}

fn request(offset: u64, length: u64) -> Request {
    Request {
        bar: 2,
        offset,
        length,
        access: Access::ReadWrite,
    }
}

#[test]
fn a_device_reads_and_writes_a_buffer_where_it_was_attached() {
    let mut edu = modules::edu();
    let bytes = random(CHUNK);
    for buffer in [
        udmabuf::export("memory", MIB).unwrap(),
        memfd::export("memory", MIB).unwrap(),
    ] {
        let range = buffer.range(8192, 3 * CHUNK).unwrap();
        put(&range, &bytes);
        let attached = VfioImporter::new(edu.device())
            .attach(&range, IOVA)
            .unwrap();
        assert_eq!(attached.plan().path, Path::SharedHostMemory);
        edu.copy(attached.iova(), attached.iova() + 2 * CHUNK)
            .unwrap();
        let found = get(&range);
        assert!(found[2 * CHUNK as usize..] == bytes);
        assert!(
            found[CHUNK as usize..2 * CHUNK as usize]
                .iter()
                .all(|&byte| byte == 0)
        );
        drop(attached);
        // The address is free again, and maps the next buffer.
    }
}

#[test]
fn what_was_detached_is_out_of_the_devices_reach() {
    let mut edu = modules::edu();
    let importer = VfioImporter::new(edu.device());
    let (source, target) = (
        udmabuf::export("source", MIB).unwrap(),
        udmabuf::export("target", MIB).unwrap(),
    );
    put(&source.whole(), &random(MIB));
    let source = importer.attach(&source.whole(), IOVA).unwrap();
    let attached = importer.attach(&target.whole(), IOVA + MIB).unwrap();
    let taken = importer.attach(&target.whole(), IOVA + MIB).unwrap_err();
    assert!(taken.to_string().contains("EEXIST"), "{taken}");
    drop(attached);
    edu.copy(source.iova(), IOVA + MIB).unwrap();
    assert!(get(&target.whole()).iter().all(|&byte| byte == 0));
}

/// Copies through the owner's own mapping, as a GPU library does with its own calls.
struct Owner(Buffer);

impl Stage for Owner {
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let range = self.0.range(offset, from.len() as u64)?;
        Ok(range.write_bytes(from)?)
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let range = self.0.range(offset, into.len() as u64)?;
        Ok(range.read_bytes(into)?)
    }
}

/// The receiver of the descriptor cannot map it, and uses the owner's copies.
fn goes_by_its_owners_copies(buffer: &Buffer, card: &VfioDevice) {
    // If another test binds a second device to vfio-pci meanwhile, the memory's owner is unknown.
    let devices = || Sysfs::default().bound_to("vfio-pci").len();
    let before = devices();
    let fd = buffer.dmabuf().unwrap().as_fd().try_clone_to_owned();
    let foreign = Buffer::import(fd.unwrap()).unwrap();
    let known = (foreign.provenance().kind, foreign.provenance().device);
    match (before, devices()) {
        (1, 1) => assert_eq!(known, (Kind::Vfio, Some(card.address()))),
        (2.., 2..) => assert_eq!(known, (Kind::Other, None)),
        _ => {}
    }
    let error = foreign.whole().to_vec().unwrap_err();
    assert!(matches!(error, BufferError::NotMappable { .. }), "{error}");

    let file = unnamed_file(std::path::Path::new("/mnt/nvme")).unwrap();
    let bytes = random(foreign.size());
    file.write_all_at(&bytes, 0).unwrap();
    let importer = FileImporter::from_fd(file.into(), "the file").unwrap();
    // Attaching needs nothing that the buffer lacks.
    let mut attachment = importer.attach(&foreign.whole()).unwrap();
    let error = attachment.read(0).unwrap_err().to_string();
    assert!(error.contains("Buffer::with_stage"), "{error}");
    let foreign = foreign.with_stage(Owner(buffer.clone()));
    let receipt = importer.attach(&foreign.whole()).unwrap().read(0).unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy);
    assert_eq!(receipt.plan.reasons[0].code, ReasonCode::NotMappable);
    assert!(get(&buffer.whole()) == bytes);
}

#[test]
fn a_bar_of_a_vfio_device_is_a_buffer() {
    let card = card();
    assert_eq!(card.bar_size(2).unwrap(), MIB);
    let buffer = vfio::export(&card, request(65536, 65536)).unwrap();
    assert_eq!(buffer.provenance().kind, Kind::Vfio);
    assert_eq!(buffer.dmabuf().unwrap().exporter(), "vfio_pci_core");
    let bytes = random(65536);
    put(&buffer.whole(), &bytes);
    assert!(get(&buffer.whole()) == bytes);
    let registers = card.registers(2).unwrap();
    assert_eq!(registers.read::<[u8; 32]>(65536).unwrap(), bytes[..32]);
    // Without the owner's mapping, the dma-buf cannot be mapped.
    let dmabuf = buffer.dmabuf().unwrap().try_clone().unwrap();
    let alone = Buffer::from_dmabuf(dmabuf, buffer.provenance().clone());
    let error = peerbuf::import::cpu::attach(&alone.whole(), Access::Read).unwrap_err();
    assert!(
        matches!(
            error,
            ImportError::Impossible {
                code: ReasonCode::NotMappable,
                ..
            }
        ),
        "{error}"
    );

    goes_by_its_owners_copies(&buffer, &card);

    for (wrong, errno) in [
        (request(100, 4096), "EINVAL"),
        (request(0, 2 * MIB), "EINVAL"),
        (request(0, 0), "EINVAL"),
    ] {
        let error = vfio::export(&card, wrong).unwrap_err().to_string();
        assert!(error.contains(errno), "{error}");
    }
    let error = vfio::export(
        &card,
        Request {
            bar: 5,
            ..request(0, 4096)
        },
    )
    .unwrap_err()
    .to_string();
    assert!(error.contains("ENODEV"), "{error}");
}

#[test]
fn a_bar_is_read_back_after_writes_if_it_is_prefetchable_and_never_otherwise() {
    let memory = vfio::export(&card(), request(0, 4096)).unwrap();
    assert!(memory.is_read_back(), "{memory}");
    let edu = modules::edu();
    let of_registers = Request {
        bar: 0,
        ..request(0, 4096)
    };
    let registers = vfio::export(edu.device(), of_registers).unwrap();
    assert!(!registers.is_read_back(), "{registers}");
}

#[test]
fn a_device_writes_into_the_bar_of_another() {
    let card = card();
    let buffer = vfio::export(&card, request(0, 65536)).unwrap();
    put(&buffer.whole(), &[0; 65536]);
    let bytes = random(CHUNK);
    let source = udmabuf::export("memory", CHUNK).unwrap();
    put(&source.whole(), &bytes);
    let mut edu = modules::edu();
    let importer = VfioImporter::new(edu.device());
    let source = importer.attach(&source.whole(), IOVA).unwrap();
    let target = importer.attach(&buffer.whole(), IOVA + MIB).unwrap();
    assert_eq!(target.plan().path, Path::PeerToPeer);
    edu.copy(source.iova(), target.iova() + CHUNK).unwrap();
    assert!(get(&buffer.range(CHUNK, CHUNK).unwrap()) == bytes);
}

#[test]
fn memory_that_cannot_be_pinned_is_refused_with_the_reason() {
    let edu = modules::edu();
    let importer = VfioImporter::new(edu.device());
    let udmabuf = udmabuf::export("memory", MIB).unwrap();
    let alone = DmaBuf::try_from(std::os::fd::OwnedFd::from(
        udmabuf.dmabuf().unwrap().try_clone().unwrap(),
    ))
    .unwrap();
    let node = Node::largest();
    let device = peerbuf::export::peerbuf::Device::open(node.bdf.parse().unwrap()).unwrap();
    let bar = peerbuf::export::peerbuf::Request {
        bar: 2,
        offset: None,
        length: MIB,
        access: Access::ReadWrite,
    };
    let buffers = [
        heap::Heap::open("system")
            .unwrap()
            .export("frames", MIB)
            .unwrap(),
        Buffer::from_dmabuf(alone, udmabuf.provenance().clone()),
        device.export(bar).unwrap(),
    ];
    for buffer in buffers {
        match importer.attach(&buffer.whole(), IOVA) {
            Err(ImportError::Impossible { code, evidence, .. }) => {
                eprintln!("{buffer}: {evidence}");
                assert_eq!(code, ReasonCode::NotPinnable, "{evidence}");
            }
            other => panic!("{buffer}: {other:?}"),
        }
    }
    let odd = importer
        .attach(&udmabuf.range(1, 4096).unwrap(), IOVA)
        .unwrap_err();
    assert!(
        matches!(
            odd,
            ImportError::Impossible {
                code: ReasonCode::Misaligned,
                ..
            }
        ),
        "{odd}"
    );
}

#[test]
fn a_device_that_is_open_already_says_so() {
    let edu = modules::edu();
    let error = VfioDevice::open(edu.device().address())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("EBUSY") && error.contains("one process"),
        "{error}"
    );
    let error = VfioDevice::open("ffff:00:00.0".parse().unwrap())
        .unwrap_err()
        .to_string();
    assert!(error.contains("IOMMU group"), "{error}");
}
