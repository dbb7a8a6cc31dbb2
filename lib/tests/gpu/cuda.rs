//! CUDA, with a stand-in for `libcuda.so.1`.

use std::os::fd::AsFd;

use peerbuf::error::{BufferError, ExportError};
use peerbuf::export::gpu::{self, Mapping, Runtime};
use peerbuf::export::memfd;
use rustix::io::{FdFlags, fcntl_getfd};

use crate::standin::{bytes_at, put_at};
use crate::{export, in_a_child, name, open_descriptors, page, read, refusal, size};

const PLAIN: i32 = 0;
const VMM: i32 = 1;
const VMM_WITHOUT_RDMA: i32 = 2;
const HOST: i32 = 3;
const MANAGED: i32 = 4;

const INVALID_VALUE: i64 = 1;
const NOT_SUPPORTED: i64 = 801;

macro_rules! cuda {
    ($name:ident) => {
        match crate::hold(0, stringify!($name)) {
            Some(held) => held,
            None => return,
        }
    };
}

#[test]
fn a_pointer_at_an_odd_place_keeps_its_offset_in_whole_pages() {
    let cuda = cuda!(a_pointer_at_an_odd_place_keeps_its_offset_in_whole_pages);
    let base = cuda.allocate(1 << 20, 1, PLAIN, 0);
    for (at, length) in [(0, 4096), (3, 1), (1000, 5000), (2 * page() + 1, page())] {
        put_at(base + at, &vec![7; length as usize]);
        let exported = export(base + at, length).unwrap();
        assert_eq!((exported.offset, exported.length), (at % page(), length));
        let receipt = &exported.receipt;
        assert_eq!(receipt.added_before, at % page());
        let whole = receipt.added_before + length + receipt.added_after;
        assert!(whole.is_multiple_of(page()) && receipt.added_after < page());
        assert_eq!(size(&exported.fd), whole);
        if let Some(bytes) = read(exported.fd.as_fd(), exported.offset, length as usize) {
            assert!(bytes.iter().all(|byte| *byte == 7), "{at}");
        }
        assert_eq!(receipt.device, "0000:4a:00.0".parse().ok());
        assert_eq!(receipt.runtime, Runtime::Cuda);
        put_at(base + at, &vec![0; length as usize]);
    }
    assert!(cuda.free(base));
}

#[test]
fn the_mapping_by_pcie_comes_first_and_the_other_is_kept() {
    let cuda = cuda!(the_mapping_by_pcie_comes_first_and_the_other_is_kept);
    let base = cuda.allocate(8192, 1, PLAIN, 0);
    let exported = export(base, 8192).unwrap();
    assert_eq!(exported.receipt.mapping, Mapping::Pcie);
    assert!(exported.receipt.both && exported.receipt.notes.is_empty());
    assert!(name(&exported.fd).contains("standin-pcie"));
    let other = exported.other.as_ref().unwrap();
    assert!(name(other).contains("standin-driver"));
    let said = exported.receipt.to_string();
    assert!(said.contains("PCIe (and the driver's choice)"), "{said}");
    for fd in [&exported.fd, other] {
        assert!(fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
    }
    drop(exported);
    // The driver may refuse its own choice of mapping; the PCIe mapping, which is needed, is
    // there.
    cuda.set("export_driver", 999);
    let exported = export(base, 8192).unwrap();
    assert!(!exported.receipt.both && exported.other.is_none());
    let notes = exported.receipt.notes.join(" ");
    assert!(notes.contains("the driver's choice: error 999"), "{notes}");
    assert!(cuda.free(base));
}

#[test]
fn drivers_and_machines_without_the_pcie_flag_are_asked_again_without_it() {
    let cuda = cuda!(drivers_and_machines_without_the_pcie_flag_are_asked_again_without_it);
    let base = cuda.allocate(8192, 1, PLAIN, 0);
    for (answer, named) in [
        (INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE (1)"),
        (NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED (801)"),
    ] {
        cuda.set("export_pcie", answer);
        let exported = export(base, 8192).unwrap();
        assert_eq!(exported.receipt.mapping, Mapping::Driver);
        assert!(!exported.receipt.both && exported.other.is_none());
        assert!(name(&exported.fd).contains("standin-driver"));
        let notes = exported.receipt.notes.join(" ");
        assert!(notes.contains(named), "{notes}");
    }
    // Both calls fail, and the error reports both answers.
    cuda.set("export_driver", 999);
    let said = refusal(base, 8192);
    assert!(
        said.contains("error 999") && said.contains("(801)"),
        "{said}"
    );
    // Another error has nothing to do with the flag.
    cuda.set("exports", 0);
    cuda.set("export_pcie", 2);
    let said = refusal(base, 8192);
    assert_eq!(cuda.get("exports"), 1);
    assert!(said.contains("CUDA_ERROR_OUT_OF_MEMORY (2)"), "{said}");
    assert!(
        said.contains("BAR1") && said.contains("NV_ERR_NO_MEMORY"),
        "{said}"
    );
    cuda.set("export_pcie", 304);
    let said = refusal(base, 8192);
    assert!(said.contains("RLIMIT_NOFILE"), "{said}");
    assert!(cuda.free(base));
}

#[test]
fn each_gpu_is_asked_whether_it_exports() {
    let cuda = cuda!(each_gpu_is_asked_whether_it_exports);
    let [first, second] = [0, 1].map(|device| cuda.allocate(8192, 1, PLAIN, device));
    export(first, 8192).unwrap();
    let exports = cuda.get("exports");
    let said = refusal(second, 8192);
    assert!(said.contains("DMA_BUF_SUPPORTED"), "{said}");
    assert!(said.contains("GPU 1 (0000:4B:00.0)"), "{said}");
    assert!(said.contains("open kernel modules"), "{said}");
    assert_eq!(cuda.get("exports"), exports, "asked all the same");
    cuda.set("dmabuf_supported_1", 1);
    let exported = export(second, 8192).unwrap();
    assert_eq!(exported.receipt.device, "0000:4b:00.0".parse().ok());
    drop(exported);
    assert!(cuda.free(first) && cuda.free(second));
}

#[test]
fn a_range_over_several_segments_is_one_buffer_and_is_not_widened() {
    let cuda = cuda!(a_range_over_several_segments_is_one_buffer_and_is_not_widened);
    let segment = 65536;
    let base = cuda.allocate(segment, 3, VMM, 0);
    put_at(base + segment - 10, &[5; 20]);
    let exported = export(base + segment - 10, 20).unwrap();
    assert_eq!(exported.offset, page() - 10);
    assert_eq!(
        size(&exported.fd),
        2 * page(),
        "neither a segment nor all of them"
    );
    if let Some(bytes) = read(exported.fd.as_fd(), exported.offset, 20) {
        assert_eq!(bytes, [5; 20]);
    }
    drop(exported);
    let exported = export(base, 3 * segment).unwrap();
    assert_eq!(size(&exported.fd), 3 * segment);
    drop(exported);
    assert!(cuda.free(base));
}

#[test]
fn segments_that_do_not_go_together_are_named() {
    let cuda = cuda!(segments_that_do_not_go_together_are_named);
    let segment = 65536;
    let base = cuda.allocate(segment, 3, VMM, 0);
    cuda.move_to(base + segment, 1);
    let said = refusal(base, 3 * segment);
    for n in 0..3 {
        let named = format!("{:#x} with 65536 bytes", base + n * segment);
        assert!(said.contains(&named), "{said}");
    }
    assert!(said.contains("3 segments"), "{said}");
    export(base, segment).unwrap();

    cuda.unmap(base + segment);
    let said = refusal(base, 3 * segment);
    let hole = format!("nothing is mapped at {:#x}", base + segment);
    assert!(said.contains(&hole), "{said}");
    assert!(cuda.free(base));

    let base = cuda.allocate(segment, 1, VMM_WITHOUT_RDMA, 0);
    let said = refusal(base, segment);
    assert!(
        said.contains("(801)") && said.contains("gpuDirectRDMACapable"),
        "{said}"
    );
    assert!(cuda.free(base));
}

#[test]
fn copies_are_put_in_order_by_the_memory_or_by_its_context_once() {
    let cuda = cuda!(copies_are_put_in_order_by_the_memory_or_by_its_context_once);
    let base = cuda.allocate(8192, 1, PLAIN, 0);
    assert!(export(base, 8192).unwrap().receipt.ordered);
    assert_eq!((cuda.get("synchronous"), cuda.get("flag_settings")), (1, 0));
    // Virtual memory does not have this attribute.
    cuda.set("context_flags", 0x4);
    let virtually = cuda.allocate(65536, 1, VMM, 0);
    for _ in 0..2 {
        assert!(export(virtually, 65536).unwrap().receipt.ordered);
    }
    assert_eq!(cuda.get("context_flags"), 0x84, "others stay");
    assert_eq!(
        cuda.get("flag_settings"),
        1,
        "setting takes the context's lock"
    );
    // With neither the attribute nor the flag the receipt says so, and the export succeeds.
    cuda.set("context_flags", 0);
    cuda.set("set_flags", NOT_SUPPORTED);
    let receipt = export(virtually, 65536).unwrap().receipt;
    let notes = receipt.notes.join(" ");
    assert!(!receipt.ordered && notes.contains("SYNC_MEMOPS"), "{notes}");
    assert!(cuda.free(base) && cuda.free(virtually));
}

#[test]
fn copies_by_the_stage_have_arrived_when_they_return() {
    let cuda = cuda!(copies_by_the_stage_have_arrived_when_they_return);
    let base = cuda.allocate(1 << 20, 1, PLAIN, 0);
    // A driver that cannot make its copies synchronous.
    cuda.set("sync_memops", INVALID_VALUE);
    cuda.set("set_flags", NOT_SUPPORTED);
    let exported = export(base + 5000, 10_000).unwrap();
    // Any buffer of the dma-buf's size. Its own bytes do not matter.
    let buffer = memfd::export("stage", 4 * page())
        .unwrap()
        .with_stage(exported.stage());
    let range = buffer.range(exported.offset, exported.length).unwrap();
    let bytes: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
    range.write_bytes(&bytes).unwrap();
    assert!(cuda.get("late_copies") > 0);
    assert!(bytes_at(base + 5000, 10_000) == bytes);
    assert!(range.to_vec().unwrap() == bytes);
    assert_eq!(bytes_at(base + 4999, 1), [0]);
    assert_eq!(bytes_at(base + 15_000, 1), [0]);
    assert_eq!(
        cuda.get("pushed"),
        0,
        "the thread's context is its own again"
    );
    // The error of the driver has its name.
    cuda.set("copy", 2);
    let said = range.write_bytes(&bytes).unwrap_err().to_string();
    assert!(
        said.contains("cuMemcpyHtoD: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        "{said}"
    );
    let said = range.to_vec().unwrap_err().to_string();
    assert!(
        said.contains("cuMemcpyDtoH: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        "{said}"
    );
    drop((exported, buffer, range));
    assert!(cuda.free(base));
}

#[test]
fn what_devices_wrote_is_flushed_before_it_is_read() {
    let cuda = cuda!(what_devices_wrote_is_flushed_before_it_is_read);
    let base = cuda.allocate(8192, 1, PLAIN, 0);
    let exported = export(base, 8192).unwrap();
    let buffer = memfd::export("stage", 8192)
        .unwrap()
        .with_stage(exported.stage());
    buffer.whole().write_bytes(&[1]).unwrap();
    assert_eq!(cuda.get("flushes"), 0);
    buffer.range(0, 1).unwrap().to_vec().unwrap();
    assert_eq!(cuda.get("flushes"), 1);
    // A driver without the call has nothing to wait for. Another error may come from failed
    // work.
    cuda.set("flush", NOT_SUPPORTED);
    assert_eq!(buffer.range(0, 1).unwrap().to_vec().unwrap(), [1]);
    cuda.set("flush", INVALID_VALUE);
    let said = buffer.whole().to_vec().unwrap_err().to_string();
    assert!(said.contains("cuFlushGPUDirectRDMAWrites"), "{said}");
    drop((exported, buffer));
    assert!(cuda.free(base));
}

#[test]
fn memory_of_the_host_and_managed_memory_are_refused_as_such() {
    let cuda = cuda!(memory_of_the_host_and_managed_memory_are_refused_as_such);
    for (kind, what) in [(HOST, "memory of the host"), (MANAGED, "managed memory")] {
        let base = cuda.allocate(8192, 1, kind, 0);
        let said = refusal(base, 8192);
        assert!(said.contains(what), "{said}");
        assert!(cuda.free(base));
    }
    assert_eq!(cuda.get("exports"), 0);
}

#[test]
fn contexts_and_descriptors_are_given_back() {
    let cuda = cuda!(contexts_and_descriptors_are_given_back);
    let plain = cuda.allocate(8192, 1, PLAIN, 0);
    let virtually = cuda.allocate(65536, 1, VMM, 0);
    let before = open_descriptors();
    let exported = export(plain, 8192).unwrap();
    assert_eq!(cuda.get("retained"), 0, "its own context");
    let stage = exported.stage();
    drop(exported);
    assert_eq!(open_descriptors(), before);
    drop(stage);
    let exported = export(virtually, 65536).unwrap();
    assert_eq!(cuda.get("retained"), 1, "the device's primary context");
    assert_eq!(open_descriptors(), before + 2);
    drop(exported);
    assert_eq!((cuda.get("retained"), cuda.get("pushed")), (0, 0));
    // Errors release them, too. The stand-in's descriptor is smaller than it claims.
    cuda.set("short", 1);
    let error = export(virtually, 65536).unwrap_err();
    let is_short = matches!(error, ExportError::Buffer(BufferError::OutOfRange { .. }));
    assert!(is_short, "{error}");
    cuda.set("export_pcie", INVALID_VALUE);
    cuda.set("export_driver", INVALID_VALUE);
    export(virtually, 65536).unwrap_err();
    assert_eq!(open_descriptors(), before);
    assert_eq!((cuda.get("retained"), cuda.get("pushed")), (0, 0));
    assert!(cuda.free(plain) && cuda.free(virtually));
}

#[test]
fn a_buffer_is_made_of_a_dma_buf_alone() {
    let cuda = cuda!(a_buffer_is_made_of_a_dma_buf_alone);
    let base = cuda.allocate(1 << 20, 1, PLAIN, 0);
    let before = open_descriptors();
    // SAFETY: the buffer is dropped below, before the memory is freed.
    let made = unsafe { gpu::buffer_of(base + 100, 5000) };
    match std::path::Path::new("/dev/udmabuf").exists() {
        // tests/lab tests the rest.
        true => assert_eq!(made.unwrap().range.offset(), 100),
        false => {
            let error = made.unwrap_err();
            let is_none = matches!(error, ExportError::Buffer(BufferError::NotADmaBuf { .. }));
            assert!(is_none, "{error}");
        }
    }
    assert_eq!(open_descriptors(), before);
    assert!(cuda.free(base));
}

#[test]
fn an_address_of_nobody_and_no_length_are_refused() {
    let cuda = cuda!(an_address_of_nobody_and_no_length_are_refused);
    let here = 7u8;
    let at = (&raw const here).addr() as u64;
    let error = export(at, 1).unwrap_err();
    let ExportError::NotGpuMemory { pointer, asked } = &error else {
        panic!("{error}");
    };
    assert_eq!((*pointer, asked.len()), (at, Runtime::ALL.len()));
    assert!(
        error
            .to_string()
            .contains("CUDA (libcuda.so.1): no memory of its"),
        "{error}"
    );
    for (at, length) in [(at, 0), (u64::MAX, 1), (1, u64::MAX)] {
        let refused = matches!(export(at, length), Err(ExportError::Unsuitable { .. }));
        assert!(refused, "{at:#x}, {length}");
    }
    // A library without a driver behind it.
    cuda.set("initialised", 0);
    cuda.set("init", 100);
    let said = refusal(at, 1);
    assert!(said.contains("libcuda.so.1: cuInit: error 100"), "{said}");
    let (_, found) = &gpu::probe()[0];
    assert!(found.as_ref().unwrap_err().contains("cuInit"));
    cuda.set("init", 0);
    let (runtime, found) = &gpu::probe()[0];
    assert_eq!((*runtime, found), (Runtime::Cuda, &Ok(2)));
}

#[test]
fn memory_is_allocated_on_the_gpu_that_is_named_and_freed() {
    let cuda = cuda!(memory_is_allocated_on_the_gpu_that_is_named_and_freed);
    cuda.set("dmabuf_supported_1", 1);
    let before = open_descriptors();
    let made = gpu::allocate(Runtime::Cuda, 1, 1 << 20);
    match std::path::Path::new("/dev/udmabuf").exists() {
        true => assert_eq!(made.unwrap().receipt.device, "0000:4b:00.0".parse().ok()),
        false => assert!(matches!(made.unwrap_err(), ExportError::Buffer(_))),
    }
    assert_eq!(open_descriptors(), before);
    assert_eq!(cuda.get("live"), 0, "allocated and not freed");
    assert_eq!(cuda.get("retained"), 0);
    let said = gpu::allocate(Runtime::Cuda, 2, 4096)
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("cuDeviceGet on 4096 bytes on GPU 2"),
        "{said}"
    );
    let said = gpu::allocate(Runtime::Cuda, 0, 1 << 50)
        .unwrap_err()
        .to_string();
    assert!(said.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{said}");
    assert_eq!((cuda.get("retained"), cuda.get("pushed")), (0, 0));
}

#[test]
fn a_driver_that_is_too_old_says_so() {
    let _cuda = cuda!(a_driver_that_is_too_old_says_so);
    in_a_child("cuda::child", "-DOLD_DRIVER");
}

#[test]
#[ignore = "the other process of the tests in this file, which start it"]
fn child() {
    let (_, cuda) = crate::other(&crate::standin::CUDA);
    let base = cuda.allocate(8192, 1, PLAIN, 0);
    let said = refusal(base, 8192);
    assert!(said.contains("cuMemGetHandleForAddressRange"), "{said}");
    assert!(said.contains("not in this driver's library"), "{said}");
    assert!(said.contains("CUDA 11.7"), "{said}");
}
