//! Level Zero, with a stand-in for `libze_loader.so.1`.

use std::os::fd::AsFd;

use peerbuf::error::{BufferError, ExportError};
use peerbuf::export::gpu::{self, Mapping, Runtime};
use peerbuf::export::memfd;
use rustix::io::{FdFlags, fcntl_getfd};

use crate::standin::{Held, bytes_at, put_at};
use crate::{export, open_descriptors, page, read, refusal, size};

/// Whether the allocation was made for export.
const NAMED: i32 = 0;
const NOT_NAMED: i32 = 1;
const HOST: i32 = 2;
const SHARED: i32 = 3;
/// The number of the driver whose device exports.
const SECOND: i32 = 1;

macro_rules! level_zero {
    ($name:ident) => {
        match crate::hold(2, stringify!($name)) {
            Some(held) => held,
            None => return,
        }
    };
}

/// Asserts that every object was released.
fn all_is_given_back(level_zero: &Held) {
    for what in ["contexts", "lists", "host_memory", "live"] {
        assert_eq!(level_zero.get(what), 0, "{what}");
    }
}

#[test]
fn the_offset_counts_from_the_allocations_beginning() {
    let level_zero = level_zero!(the_offset_counts_from_the_allocations_beginning);
    let base = level_zero.allocate(3 << 20, 1, NAMED, SECOND);
    let before = open_descriptors();
    let (at, length) = (70_001, (2 << 20) + 5);
    let bytes: Vec<u8> = (0..length as u32).map(|n| (n % 251) as u8).collect();
    put_at(base + at, &bytes);
    let exported = export(base + at, length).unwrap();
    assert_eq!((exported.offset, exported.length), (at, length));
    let receipt = &exported.receipt;
    assert_eq!(receipt.runtime, Runtime::LevelZero);
    assert_eq!(receipt.mapping, Mapping::Driver);
    assert_eq!(receipt.device, "0000:21:00.0".parse().ok());
    assert_eq!(
        (receipt.added_before, receipt.added_after),
        (at, (3 << 20) - at - length)
    );
    assert_eq!(size(&exported.fd), 3 << 20);
    if let Some(read) = read(exported.fd.as_fd(), at, length as usize) {
        assert!(read == bytes);
    }
    assert!(
        fcntl_getfd(&exported.fd)
            .unwrap()
            .contains(FdFlags::CLOEXEC)
    );

    // Three copies in each direction, through memory that the devices reach.
    let buffer = memfd::export("stage", 3 << 20)
        .unwrap()
        .with_stage(exported.stage());
    let range = buffer.range(at, length).unwrap();
    assert!(range.to_vec().unwrap() == bytes);
    assert_eq!(level_zero.get("copies"), 3);
    let other: Vec<u8> = bytes.iter().map(|byte| byte ^ 0x5a).collect();
    range.write_bytes(&other).unwrap();
    assert!(bytes_at(base + at, length as usize) == other);
    assert_eq!(bytes_at(base + at - 1, 1), [0]);
    assert_eq!(bytes_at(base + at + length, 1), [0]);
    level_zero.set("copy", 0x7000_0001);
    let said = range.to_vec().unwrap_err().to_string();
    assert!(
        said.contains("zeCommandListAppendMemoryCopy: ZE_RESULT_ERROR_DEVICE_LOST"),
        "{said}"
    );
    drop((exported, buffer, range));
    assert_eq!(open_descriptors(), before, "one descriptor for each call");
    all_is_given_back(&level_zero);
    assert!(level_zero.free(base));
}

#[test]
fn a_device_is_asked_whether_it_exports_dma_bufs() {
    let level_zero = level_zero!(a_device_is_asked_whether_it_exports_dma_bufs);
    let base = level_zero.allocate(65536, 1, NAMED, SECOND);
    for types in [0, 1] {
        level_zero.set("export_types", types);
        let said = refusal(base, 65536);
        assert!(
            said.contains("zeDeviceGetExternalMemoryProperties"),
            "{said}"
        );
    }
    assert_eq!(level_zero.get("exports"), 0);
    assert!(level_zero.free(base));
    all_is_given_back(&level_zero);
}

#[test]
fn memory_whose_export_was_not_named_is_refused_and_its_descriptor_closed() {
    let level_zero =
        level_zero!(memory_whose_export_was_not_named_is_refused_and_its_descriptor_closed);
    let before = open_descriptors();
    let base = level_zero.allocate(65536, 1, NOT_NAMED, SECOND);
    let memory = open_descriptors() - before;
    let said = refusal(base, 65536);
    let sizes = format!(
        "a descriptor of {} bytes, of an allocation of 65536",
        page()
    );
    assert!(said.contains(&sizes), "{said}");
    assert!(said.contains("ze_external_memory_export_desc_t"), "{said}");
    assert_eq!(open_descriptors(), before + memory);
    level_zero.set("none", 1);
    let said = refusal(base, 65536);
    assert!(
        said.contains("no descriptor") && said.contains("ze_external_memory_export_desc_t"),
        "{said}"
    );
    level_zero.set("export", 0x7800_000d);
    let said = refusal(base, 65536);
    assert!(
        said.contains("ZE_RESULT_ERROR_UNSUPPORTED_ENUMERATION"),
        "{said}"
    );
    assert!(level_zero.free(base));
    all_is_given_back(&level_zero);
}

#[test]
fn memory_of_the_host_shared_memory_and_ranges_beyond_are_refused() {
    let level_zero = level_zero!(memory_of_the_host_shared_memory_and_ranges_beyond_are_refused);
    for (kind, what) in [(HOST, "memory of the host"), (SHARED, "shared memory")] {
        let base = level_zero.allocate(65536, 1, kind, SECOND);
        let said = refusal(base, 65536);
        assert!(said.contains(what), "{said}");
        assert!(level_zero.free(base));
    }
    let base = level_zero.allocate(65536, 1, NAMED, SECOND);
    let error = export(base + 60_000, 6000).unwrap_err();
    let beyond = matches!(error, ExportError::Buffer(BufferError::OutOfRange { .. }));
    assert!(beyond, "{error}");
    assert_eq!(level_zero.get("exports"), 0);
    assert!(level_zero.free(base));
    all_is_given_back(&level_zero);
}

#[test]
fn memory_is_allocated_for_its_export_and_freed() {
    let level_zero = level_zero!(memory_is_allocated_for_its_export_and_freed);
    let made = gpu::allocate(Runtime::LevelZero, 1, 65536);
    match std::path::Path::new("/dev/udmabuf").exists() {
        true => assert_eq!(made.unwrap().receipt.device, "0000:21:00.0".parse().ok()),
        false => assert!(matches!(
            made.unwrap_err(),
            ExportError::Buffer(BufferError::NotADmaBuf { .. })
        )),
    }
    assert_eq!(level_zero.get("exports"), 1);
    let said = gpu::allocate(Runtime::LevelZero, 2, 65536)
        .unwrap_err()
        .to_string();
    assert!(said.contains("there are 2 devices"), "{said}");
    let said = gpu::allocate(Runtime::LevelZero, 1, 1 << 50)
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
        "{said}"
    );
    all_is_given_back(&level_zero);
}
