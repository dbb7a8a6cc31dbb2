//! The information that the kernel gives about a dma-buf, and fences. Runs in the guest.

use std::time::Duration;

use peerbuf::buffer::{FenceState, SyncFile};
use peerbuf::error::BufferError;
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::udmabuf;
use peerbuf::{Access, Buffer, DmaBuf};
use peerbuf_lab_suite::demo::alone;
use peerbuf_lab_suite::node::Node;

const NOW: Duration = Duration::ZERO;

fn bar(length: u64) -> Buffer {
    let device = Device::open(Node::largest().bdf.parse().unwrap()).unwrap();
    let request = Request {
        bar: 2,
        offset: None,
        length,
        access: Access::ReadWrite,
    };
    device.export(request).unwrap()
}

#[test]
fn a_name_is_seen_in_every_descriptor_and_a_long_one_is_refused() {
    let buffer = udmabuf::export("memory", 4096).unwrap();
    let dmabuf = buffer.dmabuf().unwrap();
    dmabuf.set_name("weights of layer 7").unwrap();
    let other = dmabuf.try_clone().unwrap();
    assert_eq!(other.info().unwrap().name, "weights of layer 7");
    dmabuf.set_name(&"x".repeat(31)).unwrap();
    assert_eq!(other.info().unwrap().name, "x".repeat(31));
    for name in [&"x".repeat(32), "a\0b"] {
        let error = dmabuf.set_name(name).unwrap_err();
        assert!(matches!(error, BufferError::Name { .. }), "{error}");
    }
    assert_eq!(other.info().unwrap().name, "x".repeat(31));
}

#[test]
fn a_range_without_bytes_is_like_others_wherever_it_begins() {
    for buffer in [bar(8192), udmabuf::export("memory", 8192).unwrap()] {
        for at in [0, 5, 4096, 8192] {
            let empty = buffer.range(at, 0).unwrap();
            empty.write_bytes(&[]).unwrap();
            assert!(empty.to_vec().unwrap().is_empty());
            assert!(empty.write_bytes(&[1]).is_err(), "{at}");
        }
    }
}

#[test]
fn holders_are_counted() {
    let buffer = udmabuf::export("memory", 4096).unwrap();
    let dmabuf = buffer.dmabuf().unwrap();
    let before = dmabuf.info().unwrap();
    assert_eq!(before.exporter, "udmabuf");
    let held = [dmabuf.try_clone().unwrap(), dmabuf.try_clone().unwrap()];
    let counted = held[0].info().unwrap().references;
    assert_eq!(counted, before.references + 2);
    drop(held);
    let alone = Buffer::from_dmabuf(dmabuf.try_clone().unwrap(), buffer.provenance().clone());
    let mapping = alone.whole().map(Access::Read).unwrap();
    assert_eq!(dmabuf.info().unwrap().references, before.references + 2);
    drop((mapping, alone));
    assert_eq!(dmabuf.info().unwrap(), before);
}

#[test]
fn a_buffer_that_nobody_works_on_has_only_fences_that_are_done() {
    let _alone = alone();
    for buffer in [udmabuf::export("memory", 4096).unwrap(), bar(4096)] {
        let dmabuf = buffer.dmabuf().unwrap();
        for access in [Access::Read, Access::Write, Access::ReadWrite] {
            dmabuf.wait(access, NOW).unwrap();
            let fences = dmabuf.export_sync_file(access).unwrap();
            assert_eq!(fences.state().unwrap(), FenceState::Done);
            fences.wait(NOW).unwrap();
            dmabuf.import_sync_file(&fences, access).unwrap();
            let fd = std::os::fd::OwnedFd::from(fences);
            assert!(SyncFile::try_from(fd).is_ok());
        }
    }
}

#[test]
fn what_is_no_sync_file_or_dma_buf_is_refused() {
    let buffer = udmabuf::export("memory", 4096).unwrap();
    let dmabuf = buffer.dmabuf().unwrap();
    let fences = dmabuf.export_sync_file(Access::Read).unwrap();
    assert!(matches!(
        DmaBuf::from_fd(fences.into()),
        Err(BufferError::NotADmaBuf { .. })
    ));
    let fd = std::os::fd::OwnedFd::from(dmabuf.try_clone().unwrap());
    let error = SyncFile::from_fd(fd).unwrap_err().to_string();
    assert!(error.contains("SYNC_IOC_FILE_INFO"), "{error}");
}

#[test]
fn values_cross_the_bus_whole_and_reach_every_mapping() {
    let _alone = alone();
    let buffer = bar(8192);
    let mut one = buffer.whole().map(Access::ReadWrite).unwrap();
    let mut cpu = one.begin_cpu_access(Access::ReadWrite).unwrap();
    for offset in [0, 4, 4095, 4097] {
        cpu.write(offset, &0x0102_0304_u32).unwrap();
        assert_eq!(cpu.read::<u32>(offset).unwrap(), 0x0102_0304);
    }
    cpu.write_slice(8000, &[1u64, 2, 3]).unwrap();
    cpu.end().unwrap();
    let mut other = buffer.range(8000, 24).unwrap().map(Access::Read).unwrap();
    let mut values = [0u64; 3];
    let cpu = other.begin_cpu_access(Access::Read).unwrap();
    cpu.read_slice(0, &mut values).unwrap();
    assert_eq!(values, [1, 2, 3]);
}
