//! GPU memory with every importer of this machine. The GPU is a stand-in: a library whose
//! answers follow the runtime's documentation, over real udmabufs. Runs in a guest with an
//! IOMMU.

#[allow(dead_code)]
#[path = "../../../lib/tests/standin/mod.rs"]
mod standin;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path as FilePath;
use std::process::Command;
use std::sync::LazyLock;

use peerbuf::buffer::Kind;
use peerbuf::device::vfio::VfioDevice;
use peerbuf::error::BufferError;
use peerbuf::export::gpu::{self, Exported, Mapping, Place, Runtime};
use peerbuf::export::vfio::{self, Request};
use peerbuf::export::{peerbuf as module, udmabuf};
use peerbuf::import::Attached;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::import::gpu::{self as import, GpuImporter, Way};
use peerbuf::plan::{Path, ReasonCode};
use peerbuf::{Access, Buffer};
use peerbuf_lab_suite::machine::expect_what_vfio_loses;
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::{Node, nvme_bdf};
use peerbuf_lab_suite::rdma::random;
use peerbuf_rdma::{Card, Rung};

use standin::{CUDA, HSA, Held, LEVEL_ZERO, StandIn, bytes_at, put_at};

static STANDIN: LazyLock<StandIn> = LazyLock::new(|| CUDA.load(&[]).unwrap());
static OTHERS: LazyLock<[StandIn; 2]> =
    LazyLock::new(|| [&HSA, &LEVEL_ZERO].map(|source| source.load(&[]).unwrap()));

/// A card that vfio-pci has.
static CARD: LazyLock<VfioDevice> = LazyLock::new(|| {
    expect_what_vfio_loses();
    modules::load("vfio-pci");
    let bdf = Node::all().last().unwrap().bdf.clone();
    modules::rebind(&bdf, "vfio-pci");
    VfioDevice::open(bdf.parse().unwrap()).unwrap()
});

const MIB: u64 = 1 << 20;
/// A place and a length that are not page-aligned.
const AT: u64 = 3 * 4096 + 1000;
const LENGTH: u64 = 300_001;

fn exported(pointer: u64, length: u64) -> Exported {
    // SAFETY: the tests drop everything that they make before they free the memory.
    unsafe { gpu::buffer_of(pointer, length) }.unwrap()
}

/// Memory of the stand-in, with random bytes around the range.
fn memory(cuda: &Held) -> (u64, Vec<u8>) {
    let base = cuda.allocate(MIB, 1, 0, 0);
    let around = random(MIB, 5);
    put_at(base, &around);
    (base, around)
}

/// Asserts that the range has these bytes, and that the bytes around it are unchanged.
fn check(base: u64, around: &[u8], bytes: &[u8]) {
    let mut expected = around.to_vec();
    expected[AT as usize..][..bytes.len()].copy_from_slice(bytes);
    let got = bytes_at(base, expected.len());
    let wrong = got.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "first wrong byte");
}

fn file_of(bytes: &[u8]) -> (File, FileImporter) {
    let file = unnamed_file(FilePath::new("/mnt/nvme")).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let importer = FileImporter::from_fd(file.try_clone().unwrap().into(), "the file");
    (file, importer.unwrap())
}

#[test]
fn both_dma_bufs_have_the_memory_itself_at_its_exact_offset() {
    let cuda = STANDIN.hold();
    let (base, around) = memory(&cuda);
    let exported = exported(base + AT, LENGTH);
    let range = &exported.range;
    assert_eq!((range.offset(), range.len()), (1000, LENGTH));
    assert_eq!(exported.receipt.mapping, Mapping::Pcie);
    let names = [Some(range), exported.other.as_ref()].map(|range| {
        let dmabuf = range.unwrap().buffer().dmabuf().unwrap();
        let info = dmabuf.info().unwrap();
        assert_eq!(info.exporter, "udmabuf");
        info.name
    });
    assert_eq!(names, ["standin-pcie", "standin-driver"]);
    let provenance = range.buffer().provenance();
    // No importer has checked yet where the bytes are.
    assert_eq!(provenance.kind, Kind::Other);
    assert_eq!(provenance.device, "0000:4a:00.0".parse().ok());
    // Accesses the dma-buf's own pages, without the runtime's copies.
    for range in [Some(range), exported.other.as_ref()].into_iter().flatten() {
        let mapping = range.map(Access::ReadWrite).unwrap();
        assert!(range.buffer().has_stage());
        let bytes = bytes_at(mapping.as_ptr() as u64, LENGTH as usize);
        assert!(bytes == around[AT as usize..][..LENGTH as usize]);
    }
    drop(exported);
    assert!(cuda.free(base));
}

#[test]
fn a_file_is_read_and_written_by_the_runtimes_copies() {
    let cuda = STANDIN.hold();
    let (base, around) = memory(&cuda);
    let exported = exported(base + AT, LENGTH);
    let bytes = random(LENGTH, 6);
    let (file, importer) = file_of(&bytes);
    let receipt = importer.attach(&exported.range).unwrap().read(0).unwrap();
    // The mapping of a udmabuf has no struct pages for direct I/O.
    assert_eq!(receipt.plan.path, Path::StagedCopy, "{}", receipt.plan);
    assert_eq!(receipt.bytes, LENGTH);
    check(base, &around, &bytes);
    let other = random(LENGTH, 7);
    exported.range.write_bytes(&other).unwrap();
    check(base, &around, &other);
    drop(importer);
    let importer = FileImporter::from_fd(file.try_clone().unwrap().into(), "the file").unwrap();
    importer.attach(&exported.range).unwrap().write(0).unwrap();
    let mut got = vec![0; LENGTH as usize];
    file.read_exact_at(&mut got, 0).unwrap();
    assert!(got == other);
    assert_eq!(
        cuda.get("pushed"),
        0,
        "each thread's context is its own again"
    );
    drop(exported);
    assert!(cuda.free(base));
}

fn vfio_bar() -> Buffer {
    let request = Request {
        bar: 2,
        offset: 0,
        length: MIB / 2,
        access: Access::ReadWrite,
    };
    vfio::export(&CARD, request).unwrap()
}

/// NVIDIA's driver before 13.3 supports no mapping of its dma-bufs. Neither does vfio-pci.
#[test]
fn a_file_goes_into_memory_that_cannot_be_mapped() {
    let unmappable = vfio_bar();

    let cuda = STANDIN.hold();
    let (base, around) = memory(&cuda);
    let fd = unmappable.dmabuf().unwrap().as_fd().as_raw_fd();
    cuda.set("next_fd", fd.into());
    let exported = exported(base + AT, LENGTH);
    let error = exported.range.map(Access::Read).unwrap_err();
    assert!(matches!(error, BufferError::NotMappable { .. }), "{error}");
    let bytes = random(LENGTH, 8);
    let (_file, importer) = file_of(&bytes);
    let receipt = importer.attach(&exported.range).unwrap().read(0).unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy);
    let not_mappable = |reason: &peerbuf::plan::Reason| reason.code == ReasonCode::NotMappable;
    assert!(
        receipt.plan.reasons.iter().any(not_mappable),
        "{}",
        receipt.plan
    );
    check(base, &around, &bytes);
    drop(exported);
    assert!(cuda.free(base));
}

#[test]
fn a_card_registers_the_memory_at_its_offset() {
    let cuda = STANDIN.hold();
    let (base, around) = memory(&cuda);
    let exported = exported(base + AT, LENGTH);
    let card = Card::open("rxe0").unwrap();
    let registration = card.register(&exported.range, None).unwrap();
    assert_ne!(registration.rung(), Rung::Staged, "{registration:?}");
    assert_eq!(
        registration.sge(0, LENGTH as u32).unwrap().length,
        LENGTH as u32
    );
    drop(registration);
    check(base, &around, &[]);
    drop(exported);
    assert!(cuda.free(base));
}

#[test]
fn memory_that_was_allocated_here_is_freed_with_its_last_handle() {
    let cuda = STANDIN.hold();
    // The driver does not guarantee page alignment, and the buffer begins with the range in any
    // case.
    cuda.set("odd", 1);
    let exported = gpu::allocate(Runtime::Cuda, 0, MIB).unwrap();
    let range = exported.range.clone();
    assert_eq!((range.offset(), range.len()), (0, MIB));
    assert!(exported.pointer().is_multiple_of(4096));
    drop(exported);
    range.write_bytes(&[9; 100]).unwrap();
    assert_eq!(range.slice(90, 10).unwrap().to_vec().unwrap(), [9; 10]);
    assert_eq!(cuda.get("live"), 1);
    drop(range);
    assert_eq!(cuda.get("live"), 0);
    assert_eq!(cuda.get("retained"), 0);
}

/// The stand-in says yes, as drivers do that have put the bytes into system memory, and the kernel's addresses tell.
#[test]
fn an_export_that_is_in_system_memory_is_found_out_by_its_addresses() {
    let cuda = STANDIN.hold();
    let disk = nvme_bdf().parse().unwrap();
    let (base, _) = memory(&cuda);
    let mut pinned = exported(base + AT, LENGTH);
    let seen = pinned.ask(disk).unwrap();
    let places: Vec<_> = seen
        .iter()
        .map(|seen| (seen.mapping, &seen.place))
        .collect();
    let system = Ok(Place::System);
    assert_eq!(
        places,
        [(Mapping::Pcie, &system), (Mapping::Driver, &system)]
    );
    let said = pinned.receipt.to_string();
    let found = format!("{disk} finds the bytes in system memory (mapping: PCIe)");
    assert!(said.contains(&found), "{said}");

    // What is in a BAR is told from that, and so is whose BAR it is.
    let bar = vfio_bar();
    cuda.set("next_fd", bar.dmabuf().unwrap().as_fd().as_raw_fd().into());
    let mut peer = exported(base + AT, LENGTH);
    let card = Some(CARD.address());
    for seen in peer.ask(disk).unwrap() {
        assert_eq!(seen.place, Ok(Place::Bar(card)));
    }
    let nobody = "ffff:ff:1f.7".parse().unwrap();
    let refused = peer.ask(nobody).unwrap();
    assert!(refused[0].place.as_ref().unwrap_err().contains("ENXIO"));
    drop((pinned, peer));
    assert!(cuda.free(base));
}

/// Bytes that the stand-in copies are in the buffer, and the other way round, and none beside them.
fn exchange(importer: &GpuImporter, buffer: &Buffer, way: Way) -> import::Attachment {
    let (at, length) = (4096 + 1003, 70_001);
    buffer
        .whole()
        .write_bytes(&vec![0; buffer.size() as usize])
        .unwrap();
    let range = buffer.range(at, length).unwrap();
    let mut attached = importer.attach(&range).unwrap();
    assert_eq!(attached.way(), way, "{:?}", attached.refused());
    let bytes = random(length, 11);
    attached.write(&bytes).unwrap();
    let all = buffer.whole().to_vec().unwrap();
    let (before, rest) = all.split_at(at as usize);
    let (found, after) = rest.split_at(length as usize);
    assert!(found == bytes, "{way}");
    assert!(before.iter().chain(after).all(|byte| *byte == 0), "{way}");
    let other = random(length, 12);
    range.write_bytes(&other).unwrap();
    let mut got = vec![0; length as usize];
    attached.read(&mut got).unwrap();
    assert!(got == other, "{way}");
    if way != Way::IoMemory {
        assert!(bytes_at(attached.pointer(), length as usize) == other);
    }
    attached
}

/// How many descriptors of a dma-buf this process has.
fn descriptors(buffer: &Buffer) -> usize {
    let inode = buffer.dmabuf().unwrap().identity().inode();
    let line = format!("ino:\t{inode}\n");
    let all = std::fs::read_dir("/proc/self/fdinfo").unwrap();
    let infos = all.filter_map(|entry| std::fs::read_to_string(entry.unwrap().path()).ok());
    infos
        .filter(|info| info.contains("exp_name") && info.contains(&line))
        .count()
}

#[test]
fn a_udmabuf_is_imported_by_each_runtime_and_its_descriptor_closed_once() {
    let buffer = udmabuf::export("imported", MIB).unwrap();
    let before = descriptors(&buffer);
    let cuda = STANDIN.hold();
    import::forget();
    let importer = GpuImporter::open(Runtime::Cuda, 0).unwrap();
    // Left to the caller, closed with the memory, closed at once.
    for takes in 0..3 {
        cuda.set("takes", takes);
        let attached = exchange(&importer, &buffer, Way::DmaBuf);
        assert_eq!(attached.plan().path, Path::SharedHostMemory);
        drop(attached);
        assert_eq!(descriptors(&buffer), before, "{takes}");
    }
    // NVIDIA's drivers for other than Tegra take no dma-buf, and register the memfd behind it.
    cuda.set("import", 801);
    for closes in [0, 1] {
        import::forget();
        cuda.set("closes_refused", closes);
        let attached = exchange(&importer, &buffer, Way::HostMemory);
        let said = attached.refused()[0].to_string();
        assert_eq!(
            said,
            "not by dma-buf: cuImportExternalMemory(DMABUF_FD): CUDA_ERROR_NOT_SUPPORTED (801)"
        );
        assert_eq!(descriptors(&buffer), before, "{closes}");
    }
    let imports = cuda.get("imports");
    let attached = exchange(&importer, &buffer, Way::HostMemory);
    assert!(attached.refused()[0].remembered);
    assert_eq!(cuda.get("imports"), imports, "not asked again");
    drop(attached);
    for what in ["externals", "mapped", "registered", "disorder", "retained"] {
        assert_eq!(cuda.get(what), 0, "{what}");
    }
    drop(cuda);
    for (standin, runtime, way) in [
        (&OTHERS[0], Runtime::Hsa, Way::DmaBuf),
        (&OTHERS[1], Runtime::LevelZero, Way::DmaBuf),
    ] {
        let standin = standin.hold();
        import::forget();
        let importer = GpuImporter::open(runtime, 1).unwrap();
        drop(exchange(&importer, &buffer, way));
        assert_eq!(descriptors(&buffer), before, "{runtime}");
        assert_eq!(standin.get("disorder"), 0, "{runtime}");
    }
}

#[test]
fn a_bar_that_the_driver_does_not_import_is_registered_only_where_it_stays() {
    let cuda = STANDIN.hold();
    import::forget();
    let importer = GpuImporter::open(Runtime::Cuda, 0).unwrap();
    let node = module::Device::open(Node::largest().bdf.parse().unwrap()).unwrap();
    let request = module::Request {
        bar: 2,
        offset: None,
        length: MIB,
        access: Access::ReadWrite,
    };
    let bar = node.export(request).unwrap();
    let attached = exchange(&importer, &bar, Way::DmaBuf);
    assert_eq!(attached.plan().path, Path::PeerToPeer);
    drop(attached);
    cuda.set("import", 801);
    import::forget();
    let said = importer.attach(&bar.whole()).unwrap_err().to_string();
    assert!(
        said.contains("(801)") && said.contains("with_io_memory"),
        "{said}"
    );
    // SAFETY: this test alone has the buffer, and does not move it.
    let staying = unsafe { importer.clone().with_io_memory() };
    let attached = exchange(&staying, &bar, Way::IoMemory);
    assert_eq!(attached.plan().path, Path::PeerToPeer);
    drop(attached);
    // vfio-pci's dma-buf has no mapping, by which the stand-in imports; its BAR has one.
    cuda.set("import", 0);
    drop(exchange(&importer, &vfio_bar(), Way::IoMemory));
    for what in ["externals", "mapped", "registered", "disorder", "retained"] {
        assert_eq!(cuda.get(what), 0, "{what}");
    }
}

/// Runs the command, which finds the stand-in under the runtime's name. Returns the command's
/// output.
fn peerbuf(directory: &FilePath, arguments: &[&str]) -> String {
    let output = Command::new("peerbuf")
        .args(arguments)
        .env("LD_LIBRARY_PATH", directory)
        .output()
        .unwrap();
    let [out, errors] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{arguments:?}: {out}{errors}");
    out
}

#[test]
fn the_command_copies_into_a_gpu_and_hands_its_memory_over() {
    let directory = tempfile::tempdir().unwrap();
    CUDA.compile(directory.path(), &[]).unwrap();
    let said = |arguments: &[&str]| peerbuf(directory.path(), arguments);
    let from = "/mnt/nvme/to-a-gpu";
    std::fs::write(from, random(LENGTH, 9)).unwrap();
    let receipt = said(&["copy", from, "cuda:0", "--check", "--json"]);
    assert!(receipt.contains(r#""checked":true"#), "{receipt}");
    assert!(receipt.contains(r#""path":"staged-copy""#), "{receipt}");
    std::fs::remove_file(from).unwrap();
    let export = ["export", "--gpu", "cuda:0", "--length", "64K", "--"];
    let show = [
        "sh",
        "-c",
        "cat /proc/$$/fdinfo/$PEERBUF_FD; echo length $PEERBUF_LENGTH",
    ];
    let shown = said(&[&export[..], &show].concat());
    assert!(
        shown.contains("standin-pcie") && shown.contains("length 65536"),
        "{shown}"
    );
    let model = "/mnt/nvme/to-a-gpu.safetensors";
    let head =
        format!(r#"{{"weights":{{"dtype":"U8","shape":[{LENGTH}],"data_offsets":[0,{LENGTH}]}}}}"#);
    let parts = [
        &(head.len() as u64).to_le_bytes()[..],
        head.as_bytes(),
        &random(LENGTH, 10),
    ];
    std::fs::write(model, parts.concat()).unwrap();
    let loaded = said(&["load", model, "--to", "cuda:0", "--check", "--json"]);
    assert!(loaded.contains(r#""checked":true"#), "{loaded}");
    std::fs::remove_file(model).unwrap();
    let info = said(&["info"]);
    assert!(info.contains("CUDA: libcuda.so.1 (2 devices)"), "{info}");
}

/// A row and a column for each runtime found. The stand-in for Level Zero has a first device that exports and imports
/// nothing.
#[test]
fn the_matrix_has_a_row_and_a_column_for_each_runtime() {
    let directory = tempfile::tempdir().unwrap();
    for source in [&CUDA, &HSA, &LEVEL_ZERO] {
        source.compile(directory.path(), &[]).unwrap();
    }
    let answer = peerbuf(directory.path(), &["matrix", "--json"]);
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    let cells = answer["cells"].as_array().unwrap();
    let told = |exporter: &str, importer: &str| -> String {
        let cell = cells
            .iter()
            .find(|cell| cell["exporter"] == exporter && cell["importer"] == importer);
        let cell = cell.unwrap_or_else(|| panic!("{exporter}, {importer}: {answer}"));
        let outcome = cell["outcome"].as_str().unwrap();
        let path = cell["path"].as_str().or(cell["code"].as_str());
        format!("{outcome} {}", path.unwrap())
    };
    const P2P: &str = "bytes-checked peer-to-peer";
    const SHARED: &str = "bytes-checked shared-host-memory";
    const REFUSED: &str = "impossible attach-refused";
    for (exporter, expected) in [
        ("peerbuf.ko BAR", [P2P, P2P, REFUSED]),
        ("udmabuf", [SHARED, SHARED, REFUSED]),
        ("dma-heap system", [SHARED, SHARED, REFUSED]),
        ("CUDA 0", [SHARED, SHARED, REFUSED]),
        ("memfd", [SHARED, SHARED, REFUSED]),
    ] {
        for (importer, expected) in ["CUDA 0", "ROCm 0", "Level Zero 0"].iter().zip(expected) {
            assert_eq!(told(exporter, importer), expected, "{exporter}, {importer}");
        }
    }
    assert_eq!(told("CUDA 0", "file"), "bytes-checked staged-copy");
    assert_eq!(told("CUDA 0", "CPU"), SHARED);
    let missing = answer["missing"].to_string();
    assert!(!missing.contains("GPU runtimes"), "{missing}");
}
