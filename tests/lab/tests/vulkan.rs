//! Vulkan with lavapipe, which runs a GPU's work on the CPU: a compute shader on buffers of
//! every exporter, combined with files and fences, and memory that lavapipe exports. Runs in
//! the guest.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path as FilePath;
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use peerbuf::buffer::Kind;
use peerbuf::device::vulkan::{
    Affine, Device, Fences, Formula, Memory, NEEDED, Raw, Words, Work, ash,
};
use peerbuf::error::{BufferError, ImportError};
use peerbuf::export::peerbuf::{MoveTo, Placement, RangeRequest, RangesRequest, Request};
use peerbuf::export::{heap, memfd, peerbuf as module, udmabuf, vulkan};
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::import::vulkan::{Attachment, VulkanImporter};
use peerbuf::plan::{Path, ReasonCode};
use peerbuf::{Access, Buffer};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::importer::{DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::machine::seconds;
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::{Node, nvme_bdf};
use peerbuf_uapi::probe;
use serde_json::Value;

const NVME: &str = "/mnt/nvme";
const SIZE: u64 = 1 << 20;
const FORMULA: Formula = Formula {
    factor: 0x9e37_79b1,
    step: 3,
    base: 1,
};

/// lavapipe, opened once, because it starts threads and compiles the shader.
fn lavapipe() -> &'static (Device, Affine) {
    static OPEN: OnceLock<(Device, Affine)> = OnceLock::new();
    OPEN.get_or_init(|| {
        let device = Device::open("llvmpipe").unwrap();
        let shader = Affine::new(&device).unwrap();
        (device, shader)
    })
}

fn limit() -> Duration {
    seconds(60)
}

fn random(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rand::fill(&mut bytes[..]);
    bytes
}

/// The shader's result for these bytes.
fn computed(bytes: &[u8]) -> Vec<u8> {
    let words = bytes.chunks_exact(4).zip(0u32..);
    words
        .flat_map(|(word, i)| {
            let word = u32::from_le_bytes(word.try_into().unwrap());
            FORMULA.of(word, i).to_le_bytes()
        })
        .collect()
}

fn attach(buffer: &Buffer) -> Attachment {
    let (device, _) = lavapipe();
    VulkanImporter::new(device).attach(&buffer.whole()).unwrap()
}

/// Runs the shader over all of a memory, into the same or another one.
fn begin(from: &Memory, to: &Memory) -> Result<Work, ImportError> {
    begin_within(from, to, limit())
}

fn begin_within(from: &Memory, to: &Memory, limit: Duration) -> Result<Work, ImportError> {
    let (_, shader) = lavapipe();
    let words = |memory| Words { memory, offset: 0 };
    let count = (from.size() / 4) as u32;
    shader.run(words(from), words(to), count, FORMULA, limit)
}

fn compute(from: &Memory, to: &Memory) {
    begin(from, to).unwrap().wait(limit()).unwrap();
}

fn module_device() -> module::Device {
    let bdf = Node::largest().bdf;
    module::Device::open(bdf.parse().unwrap()).unwrap()
}

/// `ranges` of the largest BAR and of system memory, in one dma-buf.
fn card(ranges: Vec<RangeRequest>, may_move: bool) -> Buffer {
    let device = module_device();
    let request = RangesRequest {
        bar: 2,
        ranges,
        may_move,
        devices_read: false,
        uncached: false,
        access: Access::ReadWrite,
    };
    device.export_ranges(&request).unwrap()
}

fn in_bar(length: u64) -> RangeRequest {
    let offset = None;
    RangeRequest::Bar { offset, length }
}

/// A buffer of each exporter, with the path of files to it.
fn all() -> Vec<(&'static str, Buffer, Path)> {
    let pieces = memfd::export("pieces", SIZE).unwrap();
    let half = SIZE / 2;
    let list = [
        pieces.range(half, half).unwrap(),
        pieces.range(0, half).unwrap(),
    ];
    let heap = heap::Heap::open("system").unwrap();
    let several = vec![
        in_bar(half),
        RangeRequest::System { length: half / 2 },
        in_bar(half / 2),
    ];
    vec![
        ("a BAR", card(vec![in_bar(SIZE)], false), Path::PeerToPeer),
        (
            "a BAR, may move",
            card(vec![in_bar(SIZE)], true),
            Path::PeerToPeer,
        ),
        ("several ranges", card(several, false), Path::PeerToPeer),
        (
            "a udmabuf",
            udmabuf::export("udmabuf", SIZE).unwrap(),
            Path::SharedHostMemory,
        ),
        (
            "a udmabuf of pieces",
            udmabuf::export_list("list", &list).unwrap(),
            Path::StagedCopy,
        ),
        (
            "a dma-heap",
            heap.export("heap", SIZE).unwrap(),
            Path::StagedCopy,
        ),
    ]
}

#[test]
fn a_compute_shader_writes_each_word_of_a_buffer_of_every_exporter() {
    for (what, buffer, _) in all() {
        let before = random(SIZE);
        put(&buffer.whole(), &before);
        let attachment = attach(&buffer);
        compute(attachment.memory(), attachment.memory());
        assert!(get(&buffer.whole()) == computed(&before), "{what}");
    }
}

#[test]
fn bytes_go_from_the_disk_through_a_shader_to_the_disk_by_the_path_that_each_buffer_has() {
    for (what, buffer, expected) in all() {
        let (before, source, sink) = (random(SIZE), file(), file());
        source.write_all_at(&before, 0).unwrap();
        source.sync_all().unwrap();
        let attachment = attach(&buffer);
        let read = importer(&source).attach(&buffer.whole()).unwrap().read(0);
        let read = read.unwrap();
        compute(attachment.memory(), attachment.memory());
        let written = importer(&sink).attach(&buffer.whole()).unwrap().write(0);
        let written = written.unwrap();
        assert!(contents(&sink) == computed(&before), "{what}");
        for receipt in [read, written] {
            assert_eq!(receipt.bytes, SIZE, "{what}");
            assert_eq!(receipt.plan.path, expected, "{what}: {}", receipt.plan);
        }
        // The source file is unchanged.
        assert!(contents(&source) == before, "{what}");
    }
}

/// An unnamed file on the disk.
fn file() -> File {
    unnamed_file(FilePath::new(NVME)).unwrap()
}

fn importer(file: &File) -> FileImporter {
    FileImporter::from_fd(file.try_clone().unwrap().into(), "the file").unwrap()
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn memory_that_lavapipe_allocates_is_a_buffer_that_outlives_its_handles() {
    let (device, _) = lavapipe();
    let memory = vulkan::export(device, "weights", SIZE).unwrap();
    let buffer = memory.buffer().clone();
    assert_eq!(buffer.provenance().kind, Kind::Udmabuf);
    assert_eq!(buffer.name(), "weights");
    assert!(buffer.size() >= SIZE);
    let range = buffer.range(0, SIZE).unwrap();
    let before = random(SIZE);
    put(&range, &before);
    compute(&memory, &memory);
    drop(memory);
    assert!(get(&range) == computed(&before));

    // Only lavapipe has the memfd behind the buffer, so direct I/O finds no struct pages.
    let sink = file();
    let receipt = importer(&sink).attach(&range).unwrap().write(0).unwrap();
    assert_eq!(receipt.plan.path, Path::StagedCopy);
    let code = receipt.plan.reasons.last().unwrap().code;
    assert_eq!(code, ReasonCode::NoStructPages, "{}", receipt.plan);
    assert!(contents(&sink) == computed(&before));

    // lavapipe imports its own exports, as another device would.
    let again = attach(&buffer);
    compute(again.memory(), again.memory());
    assert!(get(&range) == computed(&computed(&before)));
}

/// The bytes of a buffer with a memfd behind it, read without waiting for fences.
fn without_waiting(buffer: &Buffer) -> Vec<u8> {
    let memfd = buffer.host_memory().unwrap().try_clone_to_owned().unwrap();
    let mut bytes = vec![0; buffer.size() as usize];
    File::from(memfd).read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn is_busy(buffer: &Buffer, access: Access) -> bool {
    match buffer.dmabuf().unwrap().wait(access, Duration::ZERO) {
        Ok(()) => false,
        Err(BufferError::TimedOut { .. }) => true,
        Err(other) => panic!("{other}"),
    }
}

/// Emulates another device that works on a buffer.
fn somebody_else(buffer: &Buffer) -> Importer {
    let fd = buffer.dmabuf().unwrap().as_fd();
    Importer::attach(fd, &nvme_bdf(), DYNAMIC | PEER, 0).unwrap()
}

#[test]
fn a_late_fence_is_waited_for_by_the_queue_or_to_the_limit() {
    let (device, _) = lavapipe();
    assert_eq!(device.fences(), Fences::SyncFiles);
    for buffer in [
        card(vec![in_bar(SIZE)], false),
        udmabuf::export("source", SIZE).unwrap(),
    ] {
        let sink = udmabuf::export("sink", SIZE).unwrap();
        let (from, to) = (attach(&buffer), attach(&sink));
        let before = random(SIZE);
        put(&buffer.whole(), &before);
        let file = file();
        // The CPU copies of a proof would wait, so the proof is made before.
        let disk = importer(&file);
        disk.attach(&sink.whole()).unwrap().write(0).unwrap();

        let other = somebody_else(&buffer);
        // A reader does not stop another reader.
        other.fence(probe::FENCE_READ, 60_000).unwrap();
        compute(from.memory(), to.memory());
        assert!(is_busy(&buffer, Access::Write));
        other.step(probe::IOC_SIGNAL).unwrap();
        assert!(get(&sink.whole()) == computed(&before));

        put(&sink.whole(), &vec![0; SIZE as usize]);
        other.fence(probe::FENCE_WRITE, 60_000).unwrap();
        // The limit holds, and no work was submitted.
        let error = begin_within(from.memory(), to.memory(), Duration::from_millis(100));
        let error = error.unwrap_err();
        assert!(is_late(&error), "{error}");
        let work = std::thread::scope(|scope| {
            // Without a limit the driver itself waits.
            let begun = scope.spawn(|| begin_within(from.memory(), to.memory(), Duration::MAX));
            std::thread::sleep(Duration::from_millis(300));
            assert!(without_waiting(&sink).iter().all(|&byte| byte == 0));
            other.step(probe::IOC_SIGNAL).unwrap();
            begun.join().unwrap().unwrap()
        });
        assert_eq!(*work.fences(), Fences::SyncFiles);
        let written = disk.attach(&sink.whole()).unwrap().write(0).unwrap();
        assert_eq!(written.plan.path, Path::SharedHostMemory);
        assert!(contents(&file) == computed(&before));
        work.wait(limit()).unwrap();
        assert!(!is_busy(&buffer, Access::Write) && !is_busy(&sink, Access::Write));
    }
}

/// lavapipe's work is done when its call returns, so lavapipe never leaves an unsignalled fence
/// on a buffer.
#[test]
fn what_lavapipe_was_given_is_done_when_its_call_returns() {
    const LARGE: u64 = 16 << 20;
    let (source, sink) = (
        udmabuf::export("source", LARGE).unwrap(),
        udmabuf::export("sink", LARGE).unwrap(),
    );
    let (from, to) = (attach(&source), attach(&sink));
    let before = random(LARGE);
    put(&source.whole(), &before);
    let work = begin(from.memory(), to.memory()).unwrap();
    assert_eq!(*work.fences(), Fences::SyncFiles);
    assert!(work.is_done().unwrap());
    assert!(!is_busy(&source, Access::Write) && !is_busy(&sink, Access::Write));
    assert!(without_waiting(&sink) == computed(&before));
}

fn is_late(error: &ImportError) -> bool {
    matches!(error, ImportError::Buffer(BufferError::TimedOut { .. }))
}

/// The device as a program would own it, created with these extensions.
fn own_device(extensions: &[&std::ffi::CStr]) -> Result<Device, peerbuf::error::VulkanError> {
    let (device, _) = lavapipe();
    // SAFETY: the library is the system's loader, which is already open.
    let entry = unsafe { ash::Entry::load() }.unwrap();
    let raw = Raw {
        entry,
        instance: device.instance().clone(),
        physical: device.physical(),
        device: device.raw().clone(),
        queue_family: device.queue_family(),
        queue: 0,
        extensions,
    };
    // SAFETY: the parts belong to one device, which lives as long as the process, and only this
    // test uses its queue.
    unsafe { Device::from_raw(raw) }
}

#[test]
fn a_programs_own_device_without_sync_files_has_the_processor_wait_and_says_so() {
    let refused = own_device(&NEEDED[..1]).unwrap_err().to_string();
    assert!(
        refused.contains("VK_EXT_external_memory_dma_buf"),
        "{refused}"
    );

    let device = own_device(&NEEDED).unwrap();
    let Fences::Host { why } = device.fences() else {
        panic!("sync files without the extension");
    };
    assert!(why.contains("VK_KHR_external_semaphore_fd"), "{why}");
    let shader = Affine::new(&device).unwrap();
    let buffer = udmabuf::export("memory", SIZE).unwrap();
    let attachment = VulkanImporter::new(&device)
        .attach(&buffer.whole())
        .unwrap();
    let memory = attachment.memory();
    let words = Words { memory, offset: 0 };
    let run = |limit| shader.run(words, words, (SIZE / 4) as u32, FORMULA, limit);
    let before = random(SIZE);
    put(&buffer.whole(), &before);
    let other = somebody_else(&buffer);
    other.fence(probe::FENCE_WRITE, 60_000).unwrap();
    let error = run(Duration::from_millis(100)).unwrap_err();
    assert!(is_late(&error), "{error}");
    assert!(without_waiting(&buffer) == before);
    other.step(probe::IOC_SIGNAL).unwrap();
    // The work is done when the call returns.
    assert!(run(limit()).unwrap().is_done().unwrap());
    assert!(without_waiting(&buffer) == computed(&before));
}

#[test]
fn a_shader_finds_the_bytes_wherever_the_buffer_has_moved() {
    let device = module_device();
    let buffer = card(vec![in_bar(SIZE)], true);
    let dmabuf = buffer.dmabuf().unwrap();
    let attachment = attach(&buffer);
    let memory = attachment.memory();
    let move_to = |to| device.move_buffer(dmabuf, to, limit()).unwrap();
    let mut bytes = random(SIZE);
    put(&buffer.whole(), &bytes);
    for (to, placement) in [
        (MoveTo::System, Placement::System),
        (MoveTo::Device, Placement::Device),
    ] {
        move_to(to);
        assert_eq!(device.status(dmabuf).unwrap().placement, placement);
        compute(memory, memory);
        bytes = computed(&bytes);
        assert!(get(&buffer.whole()) == bytes, "{to:?}");
    }

    // The shader also works while the buffer moves.
    let done = AtomicBool::new(false);
    let moves = std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut moves = 0;
            while !done.load(Ordering::Relaxed) {
                move_to([MoveTo::System, MoveTo::Device][moves % 2]);
                moves += 1;
            }
            moves
        });
        for _ in 0..10 {
            compute(memory, memory);
            bytes = computed(&bytes);
        }
        done.store(true, Ordering::Relaxed);
        mover.join().unwrap()
    });
    println!("{moves} moves under 10 dispatches");
    assert!(get(&buffer.whole()) == bytes);
}

/// Runs this test in a separate process with these environment variables.
fn myself(test: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads=1", "--nocapture", "--exact"])
        .args(test)
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn a_buffer_that_is_revoked_ends_the_process_in_which_lavapipe_uses_it() {
    const CHILD: &str = "PEERBUF_TEST_REVOKED";
    let name = "a_buffer_that_is_revoked_ends_the_process_in_which_lavapipe_uses_it";
    if std::env::var_os(CHILD).is_none() {
        let output = myself(&[name], &[(CHILD, "1")]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("revoked"), "{said}");
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
        return;
    }
    let device = module_device();
    let buffer = card(vec![in_bar(SIZE)], false);
    let attachment = attach(&buffer);
    compute(attachment.memory(), attachment.memory());
    device.revoke(buffer.dmabuf().unwrap(), limit()).unwrap();
    println!("revoked");
    let work = begin(attachment.memory(), attachment.memory()).unwrap();
    panic!(
        "lavapipe works on memory that was taken away: {:?}",
        work.wait(limit())
    );
}

#[test]
fn what_does_not_go_together_is_refused_and_leaves_no_descriptor() {
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (device, _) = lavapipe();
    let vulkan = VulkanImporter::new(device);

    let alone = memfd::export("memory", SIZE).unwrap();
    let error = vulkan.attach(&alone.whole()).unwrap_err();
    let no_dmabuf = matches!(
        error,
        ImportError::Impossible {
            code: ReasonCode::NoDmaBuf,
            ..
        }
    );
    assert!(no_dmabuf, "{error}");

    let (bar, offset, length, access) = (2, None, SIZE, Access::Read);
    let request = Request {
        bar,
        offset,
        length,
        access,
    };
    let to_read = module_device().export(request).unwrap();
    let error = vulkan.attach(&to_read.whole()).unwrap_err();
    let may_not = matches!(
        error,
        ImportError::Buffer(BufferError::Access {
            wanted: "write",
            ..
        })
    );
    assert!(may_not, "{error}");

    // A revoked buffer can no longer be mapped.
    let gone = card(vec![in_bar(SIZE)], false);
    let module = module_device();
    module.revoke(gone.dmabuf().unwrap(), limit()).unwrap();
    let before = descriptors();
    for _ in 0..20 {
        let error = vulkan.attach(&gone.whole()).unwrap_err();
        let ImportError::Impossible { code, evidence, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(*code, ReasonCode::AttachRefused, "{error}");
        assert!(evidence.contains("vkAllocateMemory on"), "{error}");
    }
    assert_eq!(descriptors(), before);

    // A device's queue works on that device's memory, at aligned offsets.
    let buffer = udmabuf::export("memory", SIZE).unwrap();
    let (_, shader) = lavapipe();
    let other = Device::open("llvmpipe").unwrap();
    let theirs = VulkanImporter::new(&other).attach(&buffer.whole());
    let theirs = theirs.unwrap();
    let error = begin(theirs.memory(), theirs.memory()).unwrap_err();
    assert!(error.to_string().contains("another device"), "{error}");
    let (memory, offset) = (theirs.memory(), 4);
    let words = Words { memory, offset };
    let error = shader.run(words, words, 1, FORMULA, limit()).unwrap_err();
    assert!(error.to_string().contains("a multiple of 16"), "{error}");
    let offset = SIZE - 16;
    let words = Words { memory, offset };
    let error = shader.run(words, words, 5, FORMULA, limit()).unwrap_err();
    let outside = matches!(error, ImportError::Buffer(BufferError::OutOfRange { .. }));
    assert!(outside, "{error}");
    drop((theirs, other));

    // Dropped attachments close their descriptors.
    compute(attach(&buffer).memory(), attach(&buffer).memory());
    let before = descriptors();
    for _ in 0..20 {
        let attachment = attach(&buffer);
        compute(attachment.memory(), attachment.memory());
    }
    assert_eq!(descriptors(), before);
}

#[test]
fn without_dev_udmabuf_lavapipe_only_imports_and_the_error_says_so() {
    const NODE: &str = "/dev/udmabuf";
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            std::fs::rename("/dev/udmabuf.away", NODE).unwrap();
        }
    }
    let (device, _) = lavapipe();
    std::fs::rename(NODE, "/dev/udmabuf.away").unwrap();
    let back = Back;
    let fresh = Device::open("llvmpipe").unwrap();
    let error = vulkan::export(&fresh, "weights", SIZE)
        .unwrap_err()
        .to_string();
    assert!(error.contains("open on /dev/udmabuf: ENOENT"), "{error}");
    assert!(error.contains("only imports"), "{error}");
    let buffer = card(vec![in_bar(SIZE)], false);
    VulkanImporter::new(&fresh).attach(&buffer.whole()).unwrap();
    drop(back);
    vulkan::export(device, "weights", SIZE).unwrap();
}

#[test]
fn the_example_shares_vulkans_memory_with_another_process() {
    let example = Command::new("/opt/peerbuf/bin/share_vulkan_memory").output();
    let example = example.unwrap();
    let said = String::from_utf8_lossy(&example.stdout);
    assert!(
        said.starts_with("llvmpipe") && said.ends_with(": hello\n"),
        "{example:?}"
    );
}

/// Runs `peerbuf` with these arguments and returns its output.
fn peerbuf(arguments: &[&str]) -> String {
    let output = Command::new("peerbuf").args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_demo_ends_with_a_compute_shader_between_two_files() {
    let answer = peerbuf(&["demo", "--json", "--size", "1000003"]);
    let transfers: Vec<Value> = answer
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(transfers.len(), 7);
    for transfer in &transfers {
        assert_eq!(transfer["verified"], true, "{transfer}");
        assert_eq!(transfer["bytes"], 1_000_003, "{transfer}");
    }
    let last: Vec<_> = transfers[4..]
        .iter()
        .map(|transfer| transfer["path"].as_str().unwrap())
        .collect();
    // lavapipe's loads and stores run on the CPU, hence the staged copy.
    assert_eq!(last, ["peer-to-peer", "staged-copy", "peer-to-peer"]);
    assert_eq!(transfers[5]["sink"], "Vulkan llvmpipe, a shader");
    assert_eq!(transfers[5]["reasons"][0]["code"], "not-a-device");
}

/// The results of each exporter with lavapipe, and of lavapipe's exports with each importer.
const COLUMN: [(&str, &str); 11] = [
    ("peerbuf.ko BAR", STAGED),
    ("peerbuf.ko BAR, may move", STAGED),
    ("peerbuf.ko BAR without pages", STAGED),
    ("provider's memory", STAGED),
    ("provider's, may move", STAGED),
    ("udmabuf", SHARED),
    ("udmabuf of pieces", SHARED),
    ("dma-heap system", SHARED),
    ("DRM vgem", SHARED),
    ("Vulkan llvmpipe", SHARED),
    ("memfd", "no-dma-buf"),
];
const ROW: [(&str, &str); 5] = [
    ("CPU", SHARED),
    ("file", STAGED),
    ("DRM vgem", SHARED),
    ("Vulkan llvmpipe", SHARED),
    ("probe as NVMe driver", SHARED),
];
const SHARED: &str = "shared-host-memory";
const STAGED: &str = "staged-copy";

#[test]
fn the_matrix_has_vulkans_row_and_column() {
    modules::vgem();
    let answer: Value = serde_json::from_str(&peerbuf(&["matrix", "--json"])).unwrap();
    let cells = answer["cells"].as_array().unwrap();
    let found = |which: &str, other: &str| -> Vec<(String, String)> {
        let cells = cells.iter().filter(|cell| cell[which] == "Vulkan llvmpipe");
        cells
            .map(|cell| {
                let path = cell["path"].as_str().or(cell["code"].as_str());
                let name = cell[other].as_str().unwrap();
                (name.to_owned(), path.unwrap_or("failed").to_owned())
            })
            .collect()
    };
    let expected = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        let pairs = list
            .iter()
            .map(|(name, path)| (name.to_string(), path.to_string()));
        pairs.collect()
    };
    assert_eq!(found("importer", "exporter"), expected(&COLUMN), "{answer}");
    assert_eq!(found("exporter", "importer"), expected(&ROW), "{answer}");
}

#[test]
fn the_validation_layer_finds_nothing() {
    let tests = [
        "a_compute_shader_writes_each_word_of_a_buffer_of_every_exporter",
        "memory_that_lavapipe_allocates_is_a_buffer_that_outlives_its_handles",
        "a_late_fence_is_waited_for_by_the_queue_or_to_the_limit",
    ];
    let layer = "VK_LAYER_KHRONOS_validation";
    let output = myself(
        &tests,
        &[("VK_INSTANCE_LAYERS", layer), ("VK_LOADER_DEBUG", "layer")],
    );
    let said = String::from_utf8_lossy(&output.stdout);
    let loader = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{loader}");
    assert!(
        loader.contains(layer),
        "the loader has no such layer: {loader}"
    );
    assert!(
        !said.contains("VUID") && !said.contains("Validation"),
        "{said}"
    );
}
