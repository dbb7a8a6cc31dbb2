//! Whose a descriptor is that a runtime was given. The runtimes are stand-ins, and a memfd stands for a dma-buf, which
//! not every machine can make: the lab has the same with those.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::super::given::Given;
use super::{Failed, Imports, Reached, cuda, hsa, level_zero};

#[allow(dead_code)]
#[path = "../../../tests/standin/mod.rs"]
mod standin;

use standin::{Held, Source, StandIn};

const SIZE: u64 = 3 << 20;

/// A stand-in for one test. Without a C compiler the test says that it did not run.
fn held(cell: &'static OnceLock<StandIn>, source: &Source, test: &str) -> Option<Held> {
    if cell.get().is_none() {
        match source.load(&[]) {
            Ok(loaded) => drop(cell.set(loaded)),
            Err(why) => {
                let text = format!("test {test} ... NOT RUN: {why}\n");
                let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
            }
        }
    }
    cell.get().map(StandIn::hold)
}

struct Memory {
    file: File,
    name: String,
}

impl Memory {
    fn new(name: &str) -> Memory {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create(name, flags).unwrap());
        file.set_len(SIZE).unwrap();
        let name = format!("memfd:{name} ");
        Memory { file, name }
    }

    /// This process's descriptors of it: other tests open others.
    fn descriptors(&self) -> usize {
        let all = std::fs::read_dir("/proc/self/fd").unwrap();
        let links = all.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        links
            .filter(|link| link.to_string_lossy().contains(&self.name))
            .count()
    }

    fn imported(&self, gpu: &dyn Imports) -> Result<Box<dyn Reached>, Failed> {
        gpu.dmabuf(Given::copy_of(self.file.as_fd()).unwrap(), SIZE)
    }

    /// The runtime's copies reach it, whatever became of the descriptor.
    fn exchange(&self, reached: &dyn Reached) {
        let bytes: Vec<u8> = (0..SIZE - 11).map(|n| (n % 251) as u8).collect();
        reached.upload(7, &bytes).unwrap();
        let mut got = vec![0; bytes.len()];
        self.file.read_exact_at(&mut got, 7).unwrap();
        assert!(got == bytes);
        self.file.write_all_at(&[9; 100], 1 << 20).unwrap();
        let mut got = [0; 100];
        reached.download(1 << 20, &mut got).unwrap();
        assert_eq!(got, [9; 100]);
    }
}

#[test]
fn a_descriptor_that_cuda_was_given_is_closed_once() {
    static CUDA: OnceLock<StandIn> = OnceLock::new();
    let test = "a_descriptor_that_cuda_was_given_is_closed_once";
    let Some(cuda) = held(&CUDA, &standin::CUDA, test) else {
        return;
    };
    let memory = Memory::new("given-to-cuda");
    let gpu = cuda::Gpu::open(1).unwrap();
    // Left to the caller, closed with the memory, closed at once.
    for (takes, open) in [(0, 2), (1, 2), (2, 1)] {
        cuda.set("takes", takes);
        let reached = memory.imported(&gpu).unwrap();
        assert_eq!(memory.descriptors(), open, "{takes}");
        memory.exchange(&*reached);
        drop(reached);
        assert_eq!(memory.descriptors(), 1, "{takes}");
    }
    for (what, answer) in [("import_map", 801), ("import", 801)] {
        cuda.set(what, answer);
        for (takes, closes) in [(0, 0), (1, 0), (2, 1)] {
            cuda.set("takes", takes);
            cuda.set("closes_refused", closes);
            let failed = memory.imported(&gpu).err().unwrap();
            assert_eq!(failed.code, 801);
            assert_eq!(memory.descriptors(), 1, "{what} {takes}");
        }
    }
    for what in [
        "externals",
        "mapped",
        "disorder",
        "pushed",
        "retained",
        "live",
    ] {
        assert_eq!(cuda.get(what), 0, "{what}");
    }
}

#[test]
fn a_descriptor_that_rocm_was_given_stays_the_callers() {
    static HSA: OnceLock<StandIn> = OnceLock::new();
    let test = "a_descriptor_that_rocm_was_given_stays_the_callers";
    let Some(hsa) = held(&HSA, &standin::HSA, test) else {
        return;
    };
    let memory = Memory::new("given-to-rocm");
    let gpu = hsa::Gpu::open(1).unwrap();
    let reached = memory.imported(&gpu).unwrap();
    assert_eq!(memory.descriptors(), 1, "the runtime needs none any more");
    memory.exchange(&*reached);
    // The runtime is shut down after what it mapped is unmapped.
    drop(gpu);
    assert_eq!(hsa.get("initialised"), 2);
    drop(reached);
    assert_eq!((hsa.get("mapped"), hsa.get("initialised")), (0, 1));
    let gpu = hsa::Gpu::open(0).unwrap();
    hsa.set("interop_short", 4096);
    let failed = memory.imported(&gpu).err().unwrap();
    assert!(failed.to_string().contains("of 3145728 bytes"), "{failed}");
    hsa.set("interop", 0x1000);
    let failed = memory.imported(&gpu).err().unwrap();
    assert!(!gpu.is_final(&failed), "it may be a shortage");
    assert_eq!((memory.descriptors(), hsa.get("mapped")), (1, 0));
}

#[test]
fn a_descriptor_that_level_zero_was_given_is_closed_once() {
    static LEVEL_ZERO: OnceLock<StandIn> = OnceLock::new();
    let test = "a_descriptor_that_level_zero_was_given_is_closed_once";
    let Some(level_zero) = held(&LEVEL_ZERO, &standin::LEVEL_ZERO, test) else {
        return;
    };
    let memory = Memory::new("given-to-level-zero");
    let gpu = level_zero::Gpu::open(1).unwrap();
    for closes in [0, 1] {
        level_zero.set("closes", closes);
        level_zero.set("import", 0);
        let reached = memory.imported(&gpu).unwrap();
        assert_eq!(memory.descriptors(), 1, "the driver needs none any more");
        memory.exchange(&*reached);
        drop(reached);
        level_zero.set("import", 0x7800_000d);
        let failed = memory.imported(&gpu).err().unwrap();
        assert!(gpu.is_final(&failed));
        assert_eq!(memory.descriptors(), 1, "{closes}");
    }
    // The other driver's device says that it takes none, and is not asked to.
    let other = level_zero::Gpu::open(0).unwrap();
    let failed = memory.imported(&other).err().unwrap();
    assert_eq!(failed.call, "zeDeviceGetExternalMemoryProperties");
    for what in ["contexts", "lists", "host_memory", "live", "disorder"] {
        assert_eq!(level_zero.get(what), 0, "{what}");
    }
}
