//! Asks a CUDA card and its driver how they work with peerbuf, one line for each question: `ok` and `FAILED` for what peerbuf
//! promises, `told` for what cards differ in. `tests/gpu/run` runs it. It has not been run on a card yet.
use std::error::Error;
use std::ffi::{c_int, c_uint, c_void};
use std::process::ExitCode;
use std::time::Instant;

use libloading::{Library, Symbol};
use peerbuf::buffer::BufferRange;
use peerbuf::export::gpu::{self, Exported, Runtime};
use peerbuf::export::{heap, memfd, peerbuf as module, udmabuf};
use peerbuf::import::Attached;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::import::gpu::GpuImporter;
use peerbuf::{Access, Buffer};

type Failure = Box<dyn Error>;

const MIB: u64 = 1 << 20;

#[derive(Default)]
struct Report {
    failed: u32,
}

impl Report {
    fn promise(&mut self, what: &str, found: Result<String, Failure>) {
        match found {
            Ok(said) => println!("ok     {what}: {said}"),
            Err(error) => {
                self.failed += 1;
                println!("FAILED {what}: {error}");
            }
        }
    }

    fn tell(&self, what: &str, found: Result<String, Failure>) {
        let said = found.unwrap_or_else(|error| format!("refused: {error}"));
        println!("told   {what}: {said}");
    }
}

fn main() -> ExitCode {
    let mut report = Report::default();
    let mut cards = 0;
    for (runtime, found) in gpu::probe() {
        let found = found.map_err(Into::into);
        if let (Runtime::Cuda, Ok(count)) = (runtime, &found) {
            cards = *count;
        }
        let said = found.map(|count| format!("{count} devices"));
        report.tell(&format!("runtime {runtime}"), said);
    }
    if cards == 0 {
        println!("not run: there is no CUDA card");
        return ExitCode::from(77);
    }
    for card in 0..cards {
        let made = gpu::allocate(Runtime::Cuda, card, MIB);
        let said = made.map(|made| format!("{}; notes: {:?}", made.receipt, made.receipt.notes));
        report.tell(&format!("export by card {card}"), said.map_err(Into::into));
    }
    match gpu::allocate(Runtime::Cuda, 0, 512 * MIB) {
        Ok(pool) => with_memory(&mut report, &pool),
        Err(error) => report.promise("an export by card 0", Err(error.into())),
    }
    println!("{} promises were broken", report.failed);
    ExitCode::from(u8::from(report.failed > 0))
}

fn with_memory(report: &mut Report, pool: &Exported) {
    for (at, length) in [
        (0, 1),
        (1, 1),
        (4095, 2),
        (1000, 5000),
        (65535, 65538),
        (MIB + 3, 10 * MIB + 1),
    ] {
        let what = format!("{length} bytes at {at} of a memory");
        report.promise(&what, part(pool, at, length));
    }
    match gpu::allocate(Runtime::Cuda, 0, 5 << 30) {
        Ok(large) => report.promise("past 4 GiB", part(&large, (4 << 30) + 1001, 70_000)),
        Err(error) => report.tell("a memory of 5 GiB", Err(error.into())),
    }

    let here = 7u8;
    for (what, at, length) in [
        ("an address of nobody", 16, 1),
        ("an address of the host", (&raw const here).addr() as u64, 1),
        ("no byte", pool.pointer(), 0),
        ("more than there is", pool.pointer(), 1 << 50),
    ] {
        // SAFETY: nothing is made of it: a success is a failure.
        let refused = match unsafe { gpu::descriptors_of(at, length) } {
            Ok(exported) => Err(format!("{exported:?}").into()),
            Err(error) => Ok(error.to_string()),
        };
        report.promise(&format!("{what} is refused"), refused);
    }

    let mapped = pool.range.map(Access::Read);
    let said = mapped.map(|mapping| format!("at {:?}", mapping.as_ptr()));
    report.tell("mmap of the dma-buf", said.map_err(Into::into));
    if let Some(other) = &pool.other {
        let mapped = other.map(Access::Read);
        let said = mapped.map(|mapping| format!("at {:?}", mapping.as_ptr()));
        report.tell("mmap of the other one", said.map_err(Into::into));
    }
    report.promise("a file", file(pool));
    for (kind, made) in foreign() {
        let imported = made.and_then(|buffer| import(&buffer));
        report.tell(&format!("import of a {kind}"), imported);
    }
    let own = pool.range.slice(0, MIB);
    let imported = own.map_err(Into::into).and_then(|own| import_range(&own));
    report.tell("import of its own dma-buf", imported);
    match Driver::open() {
        Ok(driver) => {
            report.promise("the stage's rate", rate(&driver, pool));
        }
        Err(error) => report.promise("the driver's own copies", Err(error)),
    }
}

fn pattern(length: u64) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// Exports a part of a memory anew, writes it there, and reads it by the whole.
fn part(pool: &Exported, at: u64, length: u64) -> Result<String, Failure> {
    // SAFETY: the pool outlives it.
    let part = unsafe { gpu::buffer_of(pool.pointer() + at, length) }?;
    let bytes = pattern(length);
    part.range.write_bytes(&bytes)?;
    let got = pool.range.slice(at, length)?.to_vec()?;
    if got != bytes {
        return Err("other bytes".into());
    }
    Ok(part.receipt.to_string())
}

fn file(pool: &Exported) -> Result<String, Failure> {
    let file = unnamed_file(&std::env::current_dir()?)?;
    let bytes = pattern(3 * MIB + 7);
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0)?;
    let importer = FileImporter::from_fd(file.into(), "a file")?;
    let range = pool.range.slice(5, bytes.len() as u64)?;
    let receipt = importer.attach(&range)?.read(0)?;
    if range.to_vec()? != bytes {
        return Err("other bytes".into());
    }
    Ok(receipt.plan.to_string())
}

type Made = Result<Buffer, Failure>;

/// Buffers of every exporter that needs no other device. Root and peerbuf.ko have BARs, too.
fn foreign() -> Vec<(String, Made)> {
    let mut all: Vec<(String, Made)> = vec![
        (
            "udmabuf".into(),
            udmabuf::export("udmabuf", MIB).map_err(Into::into),
        ),
        (
            "memfd".into(),
            memfd::export("memfd", MIB).map_err(Into::into),
        ),
    ];
    for heap in heap::probe().unwrap_or_default() {
        let name = format!("dma-heap {}", heap.name());
        all.push((name.clone(), heap.export(&name, MIB).map_err(Into::into)));
    }
    for node in module::probe().unwrap_or_default() {
        let bar = |node| -> Made {
            let device = module::Device::open_node(node)?;
            let bars = device.query()?.bars;
            let suits = |bar: &&module::BarInfo| {
                bar.exportable && bar.prefetchable && bar.largest_free >= MIB
            };
            let bar = bars.iter().find(suits).ok_or("no prefetchable BAR")?.index;
            Ok(device.export(module::Request {
                bar,
                offset: None,
                length: MIB,
                access: Access::ReadWrite,
            })?)
        };
        all.push((format!("BAR of {}", node.display()), bar(node)));
    }
    all
}

fn import(buffer: &Buffer) -> Result<String, Failure> {
    import_range(&buffer.whole())
}

/// By which way the card reaches it, and whether its copies are right.
fn import_range(range: &BufferRange) -> Result<String, Failure> {
    // SAFETY: this program has its buffers alone, and moves none.
    let importer = unsafe { GpuImporter::open(Runtime::Cuda, 0)?.with_io_memory() };
    let mut attached = importer.attach(range)?;
    let bytes = pattern(range.len());
    attached.write(&bytes)?;
    let mut said = format!("by {}", attached.way());
    for refused in attached.refused() {
        said += &format!("; {refused}");
    }
    let mut back = vec![0; bytes.len()];
    attached.read(&mut back)?;
    match range.to_vec()? == bytes && back == bytes {
        true => Ok(said),
        false => Err(format!("{said}, and other bytes").into()),
    }
}

/// How fast the stage copies, beside the driver's own copies of the same memory.
fn rate(driver: &Driver, pool: &Exported) -> Result<String, Failure> {
    let length = pool.range.len();
    let mut bytes = pattern(length);
    let best = |copy: &mut dyn FnMut() -> Result<(), Failure>| -> Result<f64, Failure> {
        let mut best = f64::MAX;
        for _ in 0..4 {
            let begun = Instant::now();
            copy()?;
            best = best.min(begun.elapsed().as_secs_f64());
        }
        Ok(length as f64 / best / 1e9)
    };
    let ours_in = best(&mut || Ok(pool.range.write_bytes(&bytes)?))?;
    let theirs_in = best(&mut || driver.copy_in(pool.pointer(), &bytes))?;
    let ours_out = best(&mut || Ok(pool.range.read_bytes(&mut bytes)?))?;
    let theirs_out = best(&mut || driver.copy_out(&mut bytes, pool.pointer()))?;
    let said = format!(
        "in {ours_in:.2} GB/s beside {theirs_in:.2}, out {ours_out:.2} GB/s beside {theirs_out:.2}"
    );
    match ours_in >= 0.95 * theirs_in && ours_out >= 0.95 * theirs_out {
        true => Ok(said),
        false => Err(said.into()),
    }
}

/// The driver's interface, as a CUDA program has it, with the primary context of card 0.
struct Driver(Library);

impl Driver {
    fn open() -> Result<Driver, Failure> {
        // SAFETY: peerbuf has opened it already.
        let driver = Driver(unsafe { Library::new("libcuda.so.1") }?);
        let mut context: *mut c_void = std::ptr::null_mut();
        // SAFETY: cuda.h has these types.
        unsafe {
            let init: Symbol<unsafe extern "C" fn(c_uint) -> c_int> = driver.0.get(b"cuInit")?;
            done(init(0))?;
            let retain: Symbol<unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int> =
                driver.0.get(b"cuDevicePrimaryCtxRetain")?;
            done(retain(&mut context, 0))?;
            let set: Symbol<unsafe extern "C" fn(*mut c_void) -> c_int> =
                driver.0.get(b"cuCtxSetCurrent")?;
            done(set(context))?;
        }
        Ok(driver)
    }

    fn copy_in(&self, to: u64, from: &[u8]) -> Result<(), Failure> {
        type Copy = unsafe extern "C" fn(u64, *const c_void, usize) -> c_int;
        // SAFETY: cuda.h has this type, and the memory is the pool's.
        done(unsafe {
            let copy: Symbol<Copy> = self.0.get(b"cuMemcpyHtoD_v2")?;
            copy(to, from.as_ptr().cast(), from.len())
        })
    }

    fn copy_out(&self, to: &mut [u8], from: u64) -> Result<(), Failure> {
        type Copy = unsafe extern "C" fn(*mut c_void, u64, usize) -> c_int;
        // SAFETY: cuda.h has this type, and the memory is the pool's.
        done(unsafe {
            let copy: Symbol<Copy> = self.0.get(b"cuMemcpyDtoH_v2")?;
            copy(to.as_mut_ptr().cast(), from, to.len())
        })
    }
}

fn done(code: c_int) -> Result<(), Failure> {
    match code {
        0 => Ok(()),
        code => Err(format!("CUDA's error {code}").into()),
    }
}
