//! ROCm, with a stand-in for `libhsa-runtime64.so.1`.

use std::os::fd::AsFd;

use peerbuf::error::{BufferError, ExportError};
use peerbuf::export::gpu::{Mapping, Runtime};
use peerbuf::export::memfd;
use rustix::io::{FdFlags, fcntl_getfd};

use crate::standin::{bytes_at, put_at};
use crate::{export, in_a_child, name, open_descriptors, read, refusal, size};

const PLAIN: i32 = 0;
const LOCKED: i32 = 1;
const INVALID_ARGUMENT: i64 = 0x1001;

macro_rules! hsa {
    ($name:ident) => {
        match crate::hold(1, stringify!($name)) {
            Some(held) => held,
            None => return,
        }
    };
}

fn is_out_of_range(error: &ExportError) -> bool {
    matches!(error, ExportError::Buffer(BufferError::OutOfRange { .. }))
}

#[test]
fn a_pointer_in_a_pool_has_the_offset_that_the_runtime_tells() {
    let hsa = hsa!(a_pointer_in_a_pool_has_the_offset_that_the_runtime_tells);
    let base = hsa.allocate(1 << 20, 1, PLAIN, 1);
    // The allocation begins inside of the memory behind the descriptor.
    hsa.set("fragment", 65536);
    let pointer = base + 65536 + 1003;
    put_at(pointer, &[7; 5000]);
    let exported = export(pointer, 5000).unwrap();
    assert_eq!((exported.offset, exported.length), (65536 + 1003, 5000));
    let receipt = &exported.receipt;
    assert_eq!(receipt.runtime, Runtime::Hsa);
    assert_eq!(receipt.device, "0000:03:00.0".parse().ok());
    assert_eq!(receipt.added_before, exported.offset);
    assert_eq!(receipt.added_after, (1 << 20) - exported.offset - 5000);
    assert_eq!(size(&exported.fd), 1 << 20);
    if let Some(bytes) = read(exported.fd.as_fd(), exported.offset, 5000) {
        assert_eq!(bytes, [7; 5000]);
    }
    let flags = fcntl_getfd(&exported.fd).unwrap();
    assert!(
        flags.contains(FdFlags::CLOEXEC),
        "the runtime does not set it"
    );

    let buffer = memfd::export("stage", 1 << 20)
        .unwrap()
        .with_stage(exported.stage());
    let range = buffer.range(exported.offset, exported.length).unwrap();
    assert_eq!(range.to_vec().unwrap(), [7; 5000]);
    range.write_bytes(&[9; 5000]).unwrap();
    assert_eq!(bytes_at(pointer, 5000), [9; 5000]);
    assert_eq!(
        (bytes_at(pointer - 1, 1), bytes_at(pointer + 5000, 1)),
        (vec![0], vec![0])
    );
    hsa.set("copy", 0x1008);
    let said = range.to_vec().unwrap_err().to_string();
    assert!(
        said.contains("hsa_memory_copy: HSA_STATUS_ERROR_OUT_OF_RESOURCES (4104)"),
        "{said}"
    );
    drop((exported, buffer, range));
    assert!(hsa.free(base));
}

#[test]
fn the_mapping_by_pcie_comes_first_then_the_drivers_then_the_older_call() {
    let hsa = hsa!(the_mapping_by_pcie_comes_first_then_the_drivers_then_the_older_call);
    let base = hsa.allocate(65536, 1, PLAIN, 0);
    let exported = export(base, 65536).unwrap();
    assert_eq!(exported.receipt.mapping, Mapping::Pcie);
    assert!(name(&exported.fd).contains("standin-pcie"));
    // The runtime refuses a mapping if not all of the GPU's memory is in its BAR.
    for (refused, expected) in [
        ("export_pcie", "standin-driver"),
        ("export_driver", "standin-old"),
    ] {
        hsa.set(refused, INVALID_ARGUMENT);
        let exported = export(base, 65536).unwrap();
        assert_eq!(exported.receipt.mapping, Mapping::Driver);
        assert!(name(&exported.fd).contains(expected));
        let notes = exported.receipt.notes.join(" ");
        assert!(
            notes.contains("mapping PCIe: HSA_STATUS_ERROR_INVALID_ARGUMENT"),
            "{notes}"
        );
    }
    hsa.set("export_old", 0x1008);
    let said = refusal(base, 65536);
    assert!(
        said.contains("HSA_STATUS_ERROR_OUT_OF_RESOURCES (4104)"),
        "{said}"
    );
    assert!(
        said.contains("CONFIG_HSA_AMD_P2P") && said.contains("iommu=pt"),
        "{said}"
    );
    drop(exported);
    assert!(hsa.free(base));
}

#[test]
fn a_range_that_leaves_its_allocation_or_its_dma_buf_is_refused() {
    let hsa = hsa!(a_range_that_leaves_its_allocation_or_its_dma_buf_is_refused);
    let base = hsa.allocate(65536, 1, PLAIN, 0);
    let before = open_descriptors();
    let error = export(base + 60_000, 6000).unwrap_err();
    assert!(is_out_of_range(&error), "{error}");
    // The library also checks the descriptor's offset and size.
    for (setting, value) in [("short", 1), ("offset", 60_000), ("offset", i64::MAX)] {
        hsa.set(setting, value);
        let error = export(base, 65536).unwrap_err();
        assert!(is_out_of_range(&error), "{setting} {value}: {error}");
    }
    assert_eq!(open_descriptors(), before);
    assert!(hsa.free(base));
}

#[test]
fn memory_of_the_host_is_refused_as_such() {
    let hsa = hsa!(memory_of_the_host_is_refused_as_such);
    let base = hsa.allocate(65536, 1, LOCKED, 0);
    let said = refusal(base, 65536);
    assert!(said.contains("memory of the host that is locked"), "{said}");
    assert!(hsa.free(base));
}

#[test]
fn the_runtime_stays_initialised_as_long_as_its_copies_may_be_asked_for() {
    let hsa = hsa!(the_runtime_stays_initialised_as_long_as_its_copies_may_be_asked_for);
    let base = hsa.allocate(65536, 1, PLAIN, 0);
    let exported = export(base, 65536).unwrap();
    let stage = exported.stage();
    drop(exported);
    assert_eq!(hsa.get("initialised"), 2);
    drop(stage);
    assert_eq!(hsa.get("initialised"), 1);
    // A program that has not initialised the runtime has no memory of it. The lookup does not
    // initialise it.
    hsa.set("initialised", 0);
    let said = refusal(base, 65536);
    assert!(
        said.contains("ROCm (libhsa-runtime64.so.1): no memory of its"),
        "{said}"
    );
    assert_eq!(hsa.get("initialised"), 0);
    assert!(hsa.free(base));
}

#[test]
fn versions_without_the_newer_call_or_without_any_are_told_apart() {
    let _hsa = hsa!(versions_without_the_newer_call_or_without_any_are_told_apart);
    in_a_child("hsa::child", "-DBEFORE_7_1");
    in_a_child("hsa::child", "-DOLD_ROCM");
}

#[test]
#[ignore = "the other process of the tests in this file, which start it"]
fn child() {
    let (role, hsa) = crate::other(&crate::standin::HSA);
    let base = hsa.allocate(65536, 1, PLAIN, 0);
    if role == "-DOLD_ROCM" {
        let said = refusal(base, 65536);
        assert!(
            said.contains("not in this library") && said.contains("ROCm 5.4"),
            "{said}"
        );
        return;
    }
    let exported = export(base, 65536).unwrap();
    assert_eq!(exported.receipt.mapping, Mapping::Driver);
    assert!(name(&exported.fd).contains("standin-old"));
    let notes = exported.receipt.notes.join(" ");
    assert!(
        notes.contains("hsa_amd_portable_export_dmabuf_v2"),
        "{notes}"
    );
}
