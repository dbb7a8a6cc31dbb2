//! What the transfer engine makes of a disk and of the processor, each figure beside what else a program would use
//! and beside its limit. `cargo lab bench transfer` prints sections of docs/performance.md.
//!
//! The guest's clock counts instructions: what a program does between the requests counts, and the host's load
//! does not. `--quick` measures each once.

mod fio;
mod null;
mod ring;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use null::{Disks, SIZE};
use peerbuf::export::memfd;
use peerbuf::import::file::unnamed_file;
use peerbuf::import::file::{Attachment, FileImporter};
use peerbuf::plan::{Path, ProofPolicy, forget_proofs};
use peerbuf::transfer::{Piece, Queue};
use peerbuf_lab_suite::cost::{counted, median};
use peerbuf_lab_suite::node::Node;
use peerbuf_lab_suite::transfer::{bar, device, fill, random};
use rand::RngExt;
use serde_json::Value;

/// Requests of one measurement, to each disk. fio's clock has whole milliseconds, which are to be little of it.
const REQUESTS: u64 = 4096;
/// The memory that the comparison's pieces go to, again and again.
const MEMORY: u64 = 32 << 20;

/// The sizes of pieces.
const SIZES: [(&str, u64); 2] = [("64 KiB", 64 << 10), ("4 KiB", 4 << 10)];

/// The system's, which counts.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's word.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's word.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn places(length: u64, count: u64) -> Vec<u64> {
    let mut random = rand::rng();
    let place = |_| random.random_range(0..SIZE / length) * length;
    (0..count).map(place).collect()
}

/// A disk of which random pieces go into memory, as one transfer.
struct Reader {
    attachment: Attachment,
    pieces: Vec<Piece>,
    /// One request at a time is a system call.
    queue: Queue,
}

impl Reader {
    fn new(disk: &str, length: u64, depth: u32) -> Reader {
        let buffer = memfd::export("memory", REQUESTS * length).unwrap();
        let disk = FileImporter::open(disk).unwrap().with_depth(depth);
        let mut reader = Reader {
            attachment: disk.attach(&buffer.whole()).unwrap(),
            pieces: (0..)
                .zip(places(length, REQUESTS))
                .map(|(index, file_offset)| Piece {
                    file_offset,
                    offset: index * length,
                    length,
                })
                .collect(),
            queue: if depth > 1 {
                Queue::IoUring
            } else {
                Queue::Calls
            },
        };
        // The first transfer makes the ring and touches the memory.
        reader.run();
        reader
    }

    fn run(&mut self) {
        let receipt = self.attachment.read_many(&self.pieces).unwrap();
        assert_eq!(receipt.copied, 0, "{}", receipt.plan);
        assert_eq!(receipt.queue, self.queue);
    }
}

/// Requests a second, by one thread for each disk.
fn ours(disks: &[String], length: u64, depth: u32) -> f64 {
    let barrier = Barrier::new(disks.len());
    let one = |disk: &String| {
        let mut reader = Reader::new(disk, length, depth);
        barrier.wait();
        let begun = Instant::now();
        reader.run();
        (begun, Instant::now())
    };
    let times: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = disks.iter().map(|disk| scope.spawn(|| one(disk))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let begun = times.iter().map(|(begun, _)| *begun).min().unwrap();
    let ended = times.iter().map(|(_, ended)| *ended).max().unwrap();
    (REQUESTS * disks.len() as u64) as f64 / (ended - begun).as_secs_f64()
}

fn open(disk: &str) -> File {
    let mut options = File::options();
    let options = options.read(true).custom_flags(libc::O_DIRECT);
    options.open(disk).unwrap()
}

/// What a program does that has no queue, in requests a second.
fn one_by_one(disk: &str, length: u64) -> f64 {
    let disk = open(disk);
    let memory = ring::Memory::new(length);
    let places = places(length, 64);
    let begun = Instant::now();
    for place in &places {
        memory.pread(&disk, *place);
    }
    places.len() as f64 / begun.elapsed().as_secs_f64()
}

/// Several measurements of one figure.
struct Spread(Vec<f64>);

impl Spread {
    fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    fn of(mut all: Vec<f64>) -> Spread {
        all.sort_by(f64::total_cmp);
        Spread(all)
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (least, most) = (self.0[0], self.0[self.0.len() - 1]);
        write!(f, "{:.0} ({least:.0} to {most:.0})", self.median())
    }
}

/// A figure of ours and one of somebody else's, measured in turn.
fn in_turn(
    rounds: usize,
    mut theirs: impl FnMut() -> f64,
    mut ours: impl FnMut() -> f64,
) -> [Spread; 2] {
    let pairs = (0..rounds).map(|_| (theirs(), ours()));
    let (theirs, ours) = pairs.unzip();
    [Spread::of(theirs), Spread::of(ours)]
}

fn verdict(as_wanted: bool) -> &'static str {
    if as_wanted { "yes" } else { "**no**" }
}

/// A line of the table of rates.
fn rates(disks: &Disks, count: usize, name: &str, length: u64, depth: u32, rounds: usize) {
    let names = &disks.names()[..count];
    let [fio, ours] = in_turn(
        rounds,
        || fio::rate(names, length, depth, REQUESTS),
        || ours(names, length, depth),
    );
    let single = one_by_one(&names[0], length);
    let limit = disks.limit(depth) * count as f64;
    let ratio = ours.median() / fio.median();
    let floor = if depth == 32 && count == 1 { 0.95 } else { 0.9 };
    println!(
        "| {name} | {depth} | {count} of {} | {limit:.0} | {single:.0} | {fio} | {ours} | {ratio:.2} | {floor} | {} |",
        disks.queue,
        verdict(ratio >= floor)
    );
}

/// Instructions for each request of a disk that answers at once.
fn instructions(disks: &Disks, name: &str, length: u64, depth: u32, rounds: usize) {
    let disk = &disks.names()[0];
    let mut reader = Reader::new(disk, length, depth);
    let file = open(disk);
    let memory = ring::Memory::new(MEMORY);
    let mut bare = ring::Bare::new(depth);
    let each = |all: u64| all as f64 / REQUESTS as f64;
    let places = places(length, REQUESTS);
    let mut by_ring = || each(counted(|| bare.read(&file, &memory, length, &places)).0);
    by_ring();
    let [by_ring, ours] = in_turn(rounds, by_ring, || each(counted(|| reader.run()).0));
    let fio = (0..rounds).map(|_| 1e9 / fio::rate(&disks.names()[..1], length, depth, REQUESTS));
    let fio = Spread::of(fio.collect());
    let ratio = ours.median() / by_ring.median();
    println!(
        "| {name} | {depth} | {fio} | {by_ring} | {ours} | {ratio:.2} | 1.05 | {} |",
        verdict(ratio <= 1.05)
    );
}

/// What one request costs beyond the system call.
fn one_transfer(disk: &str) {
    let buffer = memfd::export("memory", 4096).unwrap();
    let mut attachment = FileImporter::open(disk)
        .unwrap()
        .attach(&buffer.whole())
        .unwrap();
    let file = open(disk);
    let memory = ring::Memory::new(4096);
    let bare = median(|| counted(|| memory.pread(&file, 0)).0);
    let ours = median(|| counted(|| drop(attachment.read(0).unwrap())).0);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    drop(attachment.read(0).unwrap());
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    println!(
        "| {bare} | {ours} | {} | {allocations} |",
        ours.saturating_sub(bare)
    );
}

/// Instructions of this process, those of the kernel on its behalf included.
fn by_this_process() -> u64 {
    // SAFETY: zeros are a valid time.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: the time is written, and nothing else.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    assert_eq!(read, 0);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What a MiB from the disk to the card costs the processor, on the paths that there are.
fn paths(rounds: usize) {
    const LENGTH: u64 = 32 << 20;
    let file = unnamed_file(std::path::Path::new("/mnt/nvme")).unwrap();
    fill(&file, &random(LENGTH));
    let buffer = bar(&device(&Node::largest()), LENGTH);
    let importer = FileImporter::from_fd(file.into(), "the file").unwrap();
    let measure = |importer: &FileImporter, path: Path| {
        let mut attachment = importer.attach(&buffer.whole()).unwrap();
        let mut one = || {
            let before = by_this_process();
            let receipt = attachment.read(0).unwrap();
            assert_eq!(receipt.plan.path, path, "{}", receipt.plan);
            (by_this_process() - before) as f64 / (LENGTH >> 20) as f64
        };
        one();
        Spread::of((0..rounds).map(|_| one()).collect())
    };
    let peer = measure(&importer, Path::PeerToPeer);
    forget_proofs();
    let importer = importer.with_proofs(ProofPolicy::Never);
    let staged = measure(&importer, Path::StagedCopy);
    let ratio = peer.median() / staged.median();
    println!(
        "| {peer} | {staged} | {ratio:.2} | 0.1 | {} |",
        verdict(ratio <= 0.1)
    );
}

/// A safetensors file of 1,000 tensors of all lengths up to 64 KiB.
fn model(path: &str) {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for index in 0..1000 {
        let length = rand::rng().random_range(1..32 << 10) * 2;
        let tensor = serde_json::json!({
            "dtype": "F16", "shape": [length / 2], "data_offsets": [end, end + length],
        });
        header.insert(format!("layer.{index}.weight"), tensor);
        end += length;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(random(end));
    fill(&File::create(path).unwrap(), &bytes);
}

/// `peerbuf load` of such a file, into memory that other loaders have no way to.
fn loads() {
    const MODEL: &str = "/mnt/nvme/model.safetensors";
    model(MODEL);
    for place in [format!("bar:{}/2", Node::largest().bdf), "udmabuf:".into()] {
        let output = Command::new("peerbuf")
            .args(["load", MODEL, "--check", "--json", "--to", &place])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let loaded: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(loaded["checked"], true);
        let receipt = &loaded["receipt"];
        let [path, bytes, copied, requests] =
            ["path", "bytes", "copied", "requests"].map(|field| receipt[field].to_string());
        let path = path.trim_matches('"');
        println!("| `{place}` | {path} | {bytes} | {copied} | {requests} |");
    }
    std::fs::remove_file(MODEL).unwrap();
}

const RATES: &str = "
## Pieces of a slow disk

The disk takes 2 ms for each request, so many of them at a time as its queue has room for. Pieces at random places
go into one buffer (`Attachment::read_many`), with so many requests in flight at each disk
(`FileImporter::with_depth`). fio is `--ioengine=io_uring --direct=1` with the same size and depth, and one job for
each disk, as peerbuf has one thread. All figures are requests a second.

| pieces | in flight | disks of a queue | limit | one `pread` at a time | fio | peerbuf | of fio | wanted | met |
|---|---|---|---|---|---|---|---|---|---|";

const RATES_TEXT: &str = "
- The limit is what the disks can do: requests in flight, at most the queue's length, each 2 ms.
";

const INSTRUCTIONS: &str = "
## Work of the processor

The disk answers at once, so the clock counts work alone. `liburing` is a C program's loop of one thread, which does nothing
but refill the queue: one system call for all that were answered (`tests/lab/benches/transfer/reads.c`). All figures
are instructions for a request, those of the kernel included.

| pieces | in flight | fio | `liburing` | peerbuf | of `liburing` | at most | met |
|---|---|---|---|---|---|---|---|";

const ONE: &str = "
One transfer of 4 KiB after the first, in instructions, and how often it allocates memory:

| `pread` | peerbuf | more | allocations |
|---|---|---|---|";

const PATHS: &str = "
## Peer to peer, and staged

A file on the lab's NVMe disk goes into the memory of a card, 32 MiB at a time. The figures are instructions of the
process for each MiB, those of the kernel on its behalf included: what the clock of the process counts. Interrupts
that come while it waits are not in it.

| peer to peer | staged | of staged | at most | met |
|---|---|---|---|---|";

const LOADS: &str = "
A safetensors file of 1,000 tensors on that disk, by `peerbuf load --check`:

| to | path | bytes | copied by the processor | requests |
|---|---|---|---|---|";

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    // They are nearly alike: the clock counts instructions.
    let rounds = if quick { 1 } else { 3 };
    println!("{INSTRUCTIONS}");
    let disks = Disks::immediate();
    for depth in [1, 32] {
        for (name, length) in SIZES {
            instructions(&disks, name, length, depth, rounds);
        }
    }
    println!("{ONE}");
    one_transfer(&disks.names()[0]);
    drop(disks);
    println!("{PATHS}");
    paths(rounds);
    println!("{LOADS}");
    loads();
    println!("{RATES}");
    let disks = Disks::slow(64);
    for (count, depth) in [(1, 32), (1, 128), (4, 32), (4, 128)] {
        for (name, length) in SIZES {
            rates(&disks, count, name, length, depth, rounds);
        }
    }
    drop(disks);
    let disks = Disks::slow(128);
    for (name, length) in SIZES {
        rates(&disks, 1, name, length, 128, rounds);
    }
    drop(disks);
    print!("{RATES_TEXT}");
}
