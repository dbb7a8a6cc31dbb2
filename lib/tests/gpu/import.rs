//! Buffers that a GPU uses: which way its driver takes, and what is told of the others. Memory without a dma-buf here;
//! `tests/lab` has real ones.

use std::os::fd::{AsRawFd, OwnedFd};

use peerbuf::Buffer;
use peerbuf::buffer::{Kind, Provenance};
use peerbuf::error::{BufferError, ImportError};
use peerbuf::export::memfd;
use peerbuf::import::Importer;
use peerbuf::import::gpu::{self, GpuImporter, Runtime, Way};
use peerbuf::plan::{Path, ReasonCode};

use crate::page;
use crate::standin::{Held, bytes_at, put_at};

const NOT_SUPPORTED: i64 = 801;

fn held(which: usize, test: &str) -> Option<Held> {
    let held = crate::hold(which, test);
    gpu::forget();
    held
}

fn pattern(length: u64) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

/// The code and the text of a refusal.
fn refusal(importer: &GpuImporter, buffer: &Buffer) -> (ReasonCode, String) {
    match importer.attach(&buffer.whole()).unwrap_err() {
        ImportError::Impossible { code, evidence, .. } => (code, evidence),
        other => panic!("{other}"),
    }
}

#[test]
fn memory_of_the_host_is_registered_by_whole_pages_and_reached_at_its_offset() {
    let test = "memory_of_the_host_is_registered_by_whole_pages_and_reached_at_its_offset";
    for (which, runtime, live) in [
        (0, Runtime::Cuda, "registered"),
        (1, Runtime::Hsa, "locked"),
    ] {
        let Some(standin) = held(which, test) else {
            return;
        };
        let buffer = memfd::export("registered", 9 << 20).unwrap();
        let importer = GpuImporter::open(runtime, 1).unwrap();
        let (at, length) = (2 * page() + 1003, (8 << 20) + 5);
        let range = buffer.range(at, length).unwrap();
        let mut attached = importer.attach(&range).unwrap();
        assert_eq!(attached.way(), Way::HostMemory);
        let refused = &attached.refused()[0];
        assert_eq!(
            (refused.way, refused.code, attached.refused().len()),
            (Way::DmaBuf, ReasonCode::NoDmaBuf, 1)
        );
        assert_eq!(attached.plan().path, Path::SharedHostMemory);

        // What a kernel writes at the address is in the buffer, and the other way round.
        put_at(attached.pointer(), b"by a kernel");
        assert_eq!(
            range.slice(0, 11).unwrap().to_vec().unwrap(),
            b"by a kernel"
        );
        range
            .slice(length - 3, 3)
            .unwrap()
            .write_bytes(b"end")
            .unwrap();
        assert_eq!(bytes_at(attached.pointer() + length - 3, 3), b"end");

        // By the runtime's copies, which are there when the call returns.
        let bytes = pattern(length);
        let attached: &mut dyn peerbuf::import::Attached = &mut attached;
        assert!(attached.write(&bytes).unwrap().is_some());
        assert!(range.to_vec().unwrap() == bytes);
        assert_eq!(buffer.range(at - 1, 1).unwrap().to_vec().unwrap(), [0]);
        let after = buffer.range(at + length, 1).unwrap();
        assert_eq!(after.to_vec().unwrap(), [0]);
        let other: Vec<u8> = bytes.iter().map(|byte| byte ^ 0x5a).collect();
        range.write_bytes(&other).unwrap();
        let mut got = vec![0; other.len()];
        attached.read(&mut got).unwrap();
        assert!(got == other);
        let beyond = attached.write(&vec![0; bytes.len() + 1]).unwrap_err();
        let beyond = matches!(beyond, ImportError::Buffer(BufferError::OutOfRange { .. }));
        assert!(beyond);
        standin.set("copy", 2);
        let said = attached.write(&[1]).unwrap_err().to_string();
        assert!(said.contains("on registered: "), "{said}");
        assert_eq!(standin.get(live), 1);
    }
}

#[test]
fn the_gpu_lets_go_before_the_mapping_and_the_buffer_go() {
    let test = "the_gpu_lets_go_before_the_mapping_and_the_buffer_go";
    for (which, runtime, counts) in [
        (
            0,
            Runtime::Cuda,
            &["registered", "pushed", "retained", "live"][..],
        ),
        (1, Runtime::Hsa, &["locked"][..]),
    ] {
        let Some(standin) = held(which, test) else {
            return;
        };
        let buffer = memfd::export("let go", 1 << 20).unwrap();
        let importer = GpuImporter::open(runtime, 0).unwrap();
        let mut all: Vec<Box<dyn peerbuf::import::Attached>> = Vec::new();
        // The same range twice: each attachment has a mapping of its own.
        for _ in 0..2 {
            all.push(Importer::attach(&importer, &buffer.whole()).unwrap());
        }
        all[0].write(b"one").unwrap();
        drop((buffer, importer));
        let mut three = [0; 3];
        all[1].read(&mut three).unwrap();
        assert_eq!(&three, b"one");
        drop(all);
        for what in counts.iter().chain(&["disorder"]) {
            assert_eq!(standin.get(what), 0, "{runtime}: {what}");
        }
        if runtime == Runtime::Hsa {
            assert_eq!(standin.get("initialised"), 1, "the program's own");
        }
    }
}

#[test]
fn a_final_refusal_is_remembered_for_the_exporter_and_a_shortage_is_not() {
    let test = "a_final_refusal_is_remembered_for_the_exporter_and_a_shortage_is_not";
    let Some(cuda) = held(0, test) else { return };
    let buffer = memfd::export("refused", 8192).unwrap();
    let importer = GpuImporter::open(Runtime::Cuda, 0).unwrap();
    // Out of memory, now.
    cuda.set("register", 2);
    for _ in 0..2 {
        let (code, said) = refusal(&importer, &buffer);
        assert_eq!(code, ReasonCode::AttachRefused);
        assert!(
            said.contains("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (2)"),
            "{said}"
        );
    }
    assert_eq!(cuda.get("registrations"), 2);
    assert!(gpu::known().is_empty());

    cuda.set("register", NOT_SUPPORTED);
    let (_, said) = refusal(&importer, &buffer);
    assert!(
        said.contains("cuMemHostRegister: CUDA_ERROR_NOT_SUPPORTED (801)"),
        "{said}"
    );
    assert!(!said.contains("before"), "{said}");
    cuda.set("register", 0);
    let (_, said) = refusal(&importer, &buffer);
    assert!(said.contains("(801) (before)"), "{said}");
    assert_eq!(cuda.get("registrations"), 3, "not asked again");
    let known = gpu::known();
    assert_eq!(known.len(), 1);
    assert_eq!(
        (known[0].kind, known[0].way),
        (Kind::Memfd, Way::HostMemory)
    );
    assert!(known[0].taken.as_ref().unwrap_err().contains("(801)"));

    // It was an answer of this device's, about this exporter.
    let second = GpuImporter::open(Runtime::Cuda, 1).unwrap();
    second.attach(&buffer.whole()).unwrap();
    let memory: OwnedFd = buffer.host_memory().unwrap().try_clone_to_owned().unwrap();
    let provenance = Provenance {
        kind: Kind::Udmabuf,
        device: None,
        bar: None,
        name: "of another kind".into(),
    };
    let other = Buffer::from_host_memory(memory, None, provenance).unwrap();
    importer.attach(&other.whole()).unwrap();
    gpu::forget();
    importer.attach(&buffer.whole()).unwrap();
    assert_eq!(gpu::known().len(), 1);
}

#[test]
fn what_no_way_is_for_is_refused_with_the_reason_against_each() {
    let test = "what_no_way_is_for_is_refused_with_the_reason_against_each";
    let Some(level_zero) = held(2, test) else {
        return;
    };
    let buffer = memfd::export("host memory", 8192).unwrap();
    let importer = GpuImporter::open(Runtime::LevelZero, 1).unwrap();
    assert_eq!(importer.address(), "0000:21:00.0".parse().ok());
    let (_, said) = refusal(&importer, &buffer);
    for part in [
        "not by dma-buf: the buffer is host memory without a dma-buf",
        "not by registered host memory: ze_api.h: ",
        "not by registered I/O memory: the buffer is not known to be in a BAR",
    ] {
        assert!(said.contains(part), "{said}");
    }
    for what in ["contexts", "lists", "host_memory", "live"] {
        assert_eq!(level_zero.get(what), 0, "{what}");
    }
}

/// Memory that says it is in a BAR: the exporter's word is what decides.
fn as_if_in_a_bar(kind: Kind) -> Buffer {
    let memory = memfd::export("BAR", 8192).unwrap();
    let memory = memory.host_memory().unwrap().try_clone_to_owned().unwrap();
    let provenance = Provenance {
        kind,
        device: "ffff:ff:1f.7".parse().ok(),
        bar: Some(2),
        name: "BAR".into(),
    };
    Buffer::from_host_memory(memory, None, provenance).unwrap()
}

#[test]
fn a_bar_is_registered_as_io_memory_where_it_stays() {
    let Some(cuda) = held(0, "a_bar_is_registered_as_io_memory_where_it_stays") else {
        return;
    };
    let importer = GpuImporter::open(Runtime::Cuda, 0).unwrap();
    let bar = as_if_in_a_bar(Kind::Vfio);
    let attached = importer.attach(&bar.whole()).unwrap();
    assert_eq!(attached.way(), Way::IoMemory);
    assert_eq!(attached.plan().path, Path::PeerToPeer);
    assert_eq!(attached.refused()[1].code, ReasonCode::NotHostMemory);
    drop(attached);
    // Without root the driver refuses, and says so.
    gpu::forget();
    cuda.set("register_io", 800);
    let (code, said) = refusal(&importer, &bar);
    assert_eq!(code, ReasonCode::AttachRefused);
    assert!(
        said.contains("cuMemHostRegister(IOMEMORY): CUDA_ERROR_NOT_PERMITTED (800)"),
        "{said}"
    );
    drop(cuda);
    let Some(_hsa) = held(1, "a_bar_is_registered_as_io_memory_where_it_stays") else {
        return;
    };
    let importer = GpuImporter::open(Runtime::Hsa, 0).unwrap();
    let (_, said) = refusal(&importer, &bar);
    assert!(said.contains("locks memory of the system only"), "{said}");
}

#[test]
fn what_may_only_be_read_an_empty_range_and_a_device_that_is_not_there_are_refused() {
    let test = "what_may_only_be_read_an_empty_range_and_a_device_that_is_not_there_are_refused";
    let Some(cuda) = held(0, test) else { return };
    let importer = GpuImporter::open(Runtime::Cuda, 0).unwrap();
    assert_eq!(importer.name(), "CUDA 0");
    assert_eq!(importer.address(), "0000:4a:00.0".parse().ok());
    let buffer = memfd::export("read-only", 8192).unwrap();
    let number = buffer.host_memory().unwrap().as_raw_fd();
    let memory = std::fs::File::open(format!("/proc/self/fd/{number}")).unwrap();
    let provenance = buffer.provenance().clone();
    let to_read = Buffer::from_host_memory(memory.into(), None, provenance).unwrap();
    let error = importer.attach(&to_read.whole()).unwrap_err();
    let refused = matches!(error, ImportError::Buffer(BufferError::Access { .. }));
    assert!(refused, "{error}");
    let empty = buffer.range(1, 0).unwrap();
    let error = importer.attach(&empty).unwrap_err();
    assert!(error.to_string().contains("too-small"), "{error}");
    let said = GpuImporter::open(Runtime::Cuda, 2).unwrap_err().to_string();
    assert_eq!(
        said,
        "open on CUDA device 2 (libcuda.so.1): there are 2 devices"
    );
    assert_eq!((cuda.get("imports"), cuda.get("registrations")), (0, 0));
}
