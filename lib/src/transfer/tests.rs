//! Transfers against a model: whatever the order of the answers, however short they are, and wherever they
//! fail, each byte is where the receipt or the error says.
//!
//! They need a directory with direct I/O to take all paths, and take those that there are without one.

use std::fs::File;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use super::engine::{Done, Lanes, Order, Progress};
use super::file::Endpoint;
use super::{Piece, Queue, Receipt, Watch};
use crate::buffer::{Buffer, LazyMapping};
use crate::errno::Errno;
use crate::error::{BufferError, SystemError, TransferError};
use crate::export::memfd;
use crate::import::file::{FileImporter, unnamed_file};
use crate::path::{Direction, Path};
use crate::sys::direct::{DirectIo, Kernel, Request, Work, threads};
use crate::sys::memory::Window;
use crate::transfer::engine;

fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::fill(&mut bytes[..]);
    bytes
}

fn file_with(bytes: &[u8]) -> File {
    let program = std::env::current_exe().unwrap();
    let file = unnamed_file(program.parent().unwrap()).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn memory(bytes: &[u8]) -> Buffer {
    let buffer = memfd::export("memory", bytes.len() as u64).unwrap();
    buffer.whole().write_bytes(bytes).unwrap();
    buffer
}

fn importer(file: &File, io: impl DirectIo + 'static) -> FileImporter {
    let file = file.try_clone().unwrap();
    FileImporter::from_fd(file.into(), "the file")
        .unwrap()
        .with_io(io)
}

/// A kernel that has io_uring for nobody.
struct ByThreads;

fn forbidden() -> SystemError {
    SystemError::new("io_uring_setup", "this test", Errno::PERM)
}

impl DirectIo for ByThreads {
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno> {
        Kernel::default().read(file, into, offset)
    }

    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno> {
        Kernel::default().write(file, from, offset)
    }

    fn run<'w>(&self, depth: u32, work: &mut dyn Work<'w>) -> Queue {
        threads(depth, work, forbidden())
    }
}

/// A disk that answers in any order, often short, sometimes with `EINTR`, and fails at one place.
#[derive(Clone)]
struct Unruly(Arc<Mutex<State>>);

struct State {
    random: StdRng,
    /// I/O on these bytes of the file fails.
    bad: Option<(Range<u64>, Errno)>,
    /// The file is made so short before the next request.
    cut: Option<u64>,
    /// After so many requests somebody cancels.
    cancel: Option<(u32, Watch)>,
    requests: u32,
    deepest: usize,
}

impl Unruly {
    fn new(seed: u64) -> Unruly {
        Unruly(Arc::new(Mutex::new(State {
            random: StdRng::seed_from_u64(seed),
            bad: None,
            cut: None,
            cancel: None,
            requests: 0,
            deepest: 0,
        })))
    }

    fn with(self, set: impl FnOnce(&mut State)) -> Unruly {
        set(&mut self.0.lock().unwrap());
        self
    }
}

impl State {
    fn answer(&mut self, request: &Request<'_>) -> Result<usize, Errno> {
        self.requests += 1;
        if let Some(length) = self.cut.take() {
            rustix::fs::ftruncate(request.file, length).unwrap();
        }
        if let Some((after, watch)) = &self.cancel
            && self.requests > *after
        {
            watch.cancel();
        }
        if self.random.random_ratio(1, 10) {
            return Err(Errno::INTR);
        }
        let mut length = request.window.length();
        if let Some((bad, errno)) = &self.bad {
            let end = request.offset + length as u64;
            if request.offset < bad.end && bad.start < end {
                return Err(*errno);
            }
        }
        if self.random.random_ratio(1, 4) {
            // Direct I/O is cut at a block.
            let unit = match length.is_multiple_of(512) && request.offset.is_multiple_of(512) {
                true => 512,
                false => 1,
            };
            length = self.random.random_range(1..=length / unit) * unit;
        }
        Kernel::default().one(&Request {
            window: request.window.first(length),
            ..*request
        })
    }
}

impl DirectIo for Unruly {
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno> {
        Kernel::default().read(file, into, offset)
    }

    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno> {
        Kernel::default().write(file, from, offset)
    }

    fn run<'w>(&self, depth: u32, work: &mut dyn Work<'w>) -> Queue {
        let mut state = self.0.lock().unwrap();
        let mut in_flight = Vec::new();
        loop {
            while in_flight.len() < depth as usize {
                let Some(request) = work.next() else { break };
                in_flight.push(request);
            }
            state.deepest = state.deepest.max(in_flight.len());
            in_flight.shuffle(&mut state.random);
            let Some(request) = in_flight.pop() else {
                return Queue::Calls;
            };
            work.done(request.token, state.answer(&request));
        }
    }
}

const FILE: u64 = 3 << 20;
const BUFFER: u64 = 2 << 20;

/// Pieces that overlap neither in the file nor in the buffer, in any order.
fn pieces(random: &mut StdRng) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut file, mut at) = (0, 0);
    // Some fit into the blocks of the disk, some do not.
    let aligned = random.random_bool(0.5);
    for _ in 0..random.random_range(1..20) {
        let gap = random.random_range(0..20_000_u64);
        let gap = if aligned { gap / 4096 * 4096 } else { gap };
        (file, at) = (file + gap, at + gap);
        if random.random_bool(0.3) {
            at += random.random_range(0..600);
        }
        let length = match random.random_range(0..3) {
            0 => random.random_range(0..600),
            1 => random.random_range(0..100_000),
            _ => random.random_range(0..700_000),
        };
        let length = length
            .min(FILE.saturating_sub(file))
            .min(BUFFER.saturating_sub(at));
        pieces.push(Piece {
            file_offset: file.min(FILE),
            offset: at.min(BUFFER),
            length,
        });
        (file, at) = (file + length, at + length);
    }
    pieces.shuffle(random);
    pieces
}

fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.length).sum()
}

/// Copies pieces, as the model does: the first `prefix` bytes of them.
fn copy(pieces: &[Piece], direction: Direction, mut prefix: u64, from: &[u8], to: &mut [u8]) {
    for piece in pieces {
        let length = piece.length.min(prefix) as usize;
        prefix -= length as u64;
        let (file, at) = (piece.file_offset as usize, piece.offset as usize);
        match direction {
            Direction::DiskToBuffer => {
                to[at..at + length].copy_from_slice(&from[file..file + length])
            }
            Direction::BufferToDisk => {
                to[file..file + length].copy_from_slice(&from[at..at + length])
            }
        }
    }
}

fn transfer(
    importer: &FileImporter,
    buffer: &Buffer,
    direction: Direction,
    pieces: &[Piece],
) -> Result<Receipt, TransferError> {
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    match direction {
        Direction::DiskToBuffer => attachment.read_many(pieces),
        Direction::BufferToDisk => attachment.write_many(pieces),
    }
}

const BOTH: [Direction; 2] = [Direction::DiskToBuffer, Direction::BufferToDisk];

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn pieces_arrive_whole_in_any_order_of_answers_and_nothing_else_changes() {
    for seed in 0..24 {
        let mut random_ = StdRng::seed_from_u64(seed);
        let pieces = pieces(&mut random_);
        let depth = [1, 2, 7, 32][random_.random_range(0..4)];
        for direction in BOTH {
            let (held, on_disk) = (random(BUFFER as usize), random(FILE as usize));
            let (file, buffer) = (file_with(&on_disk), memory(&held));
            let importer = match seed % 4 {
                0 => importer(&file, Kernel::default()),
                1 => importer(&file, ByThreads),
                _ => importer(&file, Unruly::new(seed)),
            };
            let importer = importer.with_depth(depth);
            let receipt = transfer(&importer, &buffer, direction, &pieces).unwrap();
            let bytes = total(&pieces);
            assert_eq!(
                (receipt.bytes, receipt.host_bytes),
                (bytes, bytes),
                "seed {seed}"
            );
            let (mut in_buffer, mut in_file) = (held.clone(), on_disk.clone());
            match direction {
                Direction::DiskToBuffer => {
                    copy(&pieces, direction, bytes, &on_disk, &mut in_buffer)
                }
                Direction::BufferToDisk => copy(&pieces, direction, bytes, &held, &mut in_file),
            }
            let what = format!("seed {seed}, {direction}, depth {depth}: {}", receipt.plan);
            assert!(buffer.whole().to_vec().unwrap() == in_buffer, "{what}");
            assert!(content(&file) == in_file, "{what}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn a_transfer_that_fails_names_the_place_and_what_had_arrived() {
    for seed in 0..16 {
        let mut random_ = StdRng::seed_from_u64(seed);
        let pieces = pieces(&mut random_);
        let Some(piece) = pieces.iter().max_by_key(|piece| piece.length) else {
            continue;
        };
        if piece.length == 0 {
            continue;
        }
        let at = piece.file_offset + random_.random_range(0..piece.length);
        for direction in BOTH {
            let (held, on_disk) = (random(BUFFER as usize), random(FILE as usize));
            let (file, buffer) = (file_with(&on_disk), memory(&held));
            let bad = Some((at..at + 1, Errno::IO));
            let unruly = Unruly::new(seed).with(|state| state.bad = bad);
            let importer = importer(&file, unruly);
            let error = transfer(&importer, &buffer, direction, &pieces).unwrap_err();
            let TransferError::Stopped {
                cause,
                offset,
                length,
                arrived,
                wanted,
                prefix,
            } = &error
            else {
                panic!("seed {seed}: {error}");
            };
            assert_eq!(cause.errno, Errno::IO);
            // The block around it is what was asked for.
            assert!(
                offset / 4096 <= at / 4096 && at / 4096 <= (offset + length) / 4096,
                "seed {seed}: {error}"
            );
            assert!(
                prefix <= arrived && arrived < wanted && *wanted == total(&pieces),
                "seed {seed}: {error}"
            );
            let (now, before, from) = match direction {
                Direction::DiskToBuffer => (buffer.whole().to_vec().unwrap(), held, on_disk),
                Direction::BufferToDisk => (content(&file), on_disk, held),
            };
            // What is said to have arrived is there: the first bytes, and as many as were counted.
            let (mut first, mut all) = (now.clone(), before.clone());
            copy(&pieces, direction, *prefix, &from, &mut first);
            assert!(now == first, "seed {seed}, {direction}");
            copy(&pieces, direction, total(&pieces), &from, &mut all);
            let changed = now
                .iter()
                .zip(&before)
                .filter(|(now, before)| now != before)
                .count() as u64;
            assert!(
                changed <= *arrived,
                "seed {seed}, {direction}: {changed} of {error}"
            );
            assert!(
                now.iter()
                    .zip(before.iter().zip(&all))
                    .all(|(now, (before, all))| now == before || now == all)
            );
            // And a transfer of the rest, without the fault, completes it.
            let mut left = *prefix;
            let rest: Vec<Piece> = pieces
                .iter()
                .map(|piece| {
                    let skip = piece.length.min(left);
                    left -= skip;
                    Piece {
                        file_offset: piece.file_offset + skip,
                        offset: piece.offset + skip,
                        length: piece.length - skip,
                    }
                })
                .collect();
            let importer = self::importer(&file, Kernel::default());
            transfer(&importer, &buffer, direction, &rest).unwrap();
            let now = match direction {
                Direction::DiskToBuffer => buffer.whole().to_vec().unwrap(),
                Direction::BufferToDisk => content(&file),
            };
            assert!(now == all, "seed {seed}, {direction}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn a_file_that_shrinks_gives_the_bytes_before_its_end() {
    for seed in 0..8 {
        let mut random_ = StdRng::seed_from_u64(seed);
        let bytes = random(FILE as usize);
        let end = random_.random_range(0..BUFFER);
        for many in [false, true] {
            let file = file_with(&bytes);
            let buffer = memory(&vec![0; BUFFER as usize]);
            let unruly = Unruly::new(seed).with(|state| state.cut = Some(end));
            let importer = importer(&file, unruly);
            let mut attachment = importer.attach(&buffer.whole()).unwrap();
            let prefix = if many {
                let piece = Piece {
                    file_offset: 0,
                    offset: 0,
                    length: BUFFER,
                };
                let error = attachment.read_many(&[piece]).unwrap_err();
                let TransferError::ShortRead {
                    read: prefix,
                    wanted,
                    ..
                } = error
                else {
                    panic!("seed {seed}: {error}");
                };
                assert_eq!(wanted, BUFFER);
                prefix
            } else {
                attachment.read(0).unwrap().bytes
            };
            assert_eq!(prefix, end, "seed {seed}");
            let read = buffer.whole().to_vec().unwrap();
            assert!(
                read[..prefix as usize] == bytes[..prefix as usize],
                "seed {seed}"
            );
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn a_transfer_that_is_cancelled_says_how_far_it_was() {
    let bytes = random(FILE as usize);
    let file = file_with(&bytes);
    let buffer = memory(&vec![0; BUFFER as usize]);
    let watch = Watch::default();
    let cancel = Some((3, watch.clone()));
    let unruly = Unruly::new(1).with(|state| state.cancel = cancel);
    let importer = importer(&file, unruly).with_depth(2);
    let mut attachment = importer.attach(&buffer.whole()).unwrap().watched_by(&watch);
    let pieces: Vec<Piece> = (0..32)
        .map(|index| Piece {
            file_offset: index * 65_536,
            offset: (31 - index) * 65_536,
            length: 65_536,
        })
        .collect();
    let error = attachment.read_many(&pieces).unwrap_err();
    let TransferError::Cancelled {
        arrived,
        wanted,
        prefix,
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert!(
        0 < arrived && arrived < wanted && prefix <= arrived,
        "{prefix} {arrived} of {wanted}"
    );
    assert_eq!(watch.bytes(), arrived);
    let mut expected = vec![0; BUFFER as usize];
    let read = buffer.whole().to_vec().unwrap();
    copy(
        &pieces,
        Direction::DiskToBuffer,
        prefix,
        &bytes,
        &mut expected,
    );
    let first = pieces.iter().take((prefix / 65_536) as usize);
    for piece in first {
        let at = piece.offset as usize..(piece.offset + piece.length) as usize;
        assert!(read[at.clone()] == expected[at]);
    }
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn as_many_requests_are_in_flight_as_the_queue_is_deep() {
    let file = file_with(&random(FILE as usize));
    let buffer = memory(&vec![0; BUFFER as usize]);
    for depth in [1, 2, 3, 8] {
        let unruly = Unruly::new(7);
        let importer = importer(&file, unruly.clone()).with_depth(depth);
        let pieces: Vec<Piece> = (0..32)
            .map(|index| Piece {
                file_offset: index * 65_536,
                offset: (31 - index) * 65_536,
                length: 65_536,
            })
            .collect();
        let receipt = transfer(&importer, &buffer, Direction::DiskToBuffer, &pieces).unwrap();
        let state = unruly.0.lock().unwrap();
        assert_eq!(state.deepest, depth as usize);
        assert_eq!(receipt.requests, u64::from(state.requests));
    }
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn the_receipt_tells_how_requests_got_to_the_kernel() {
    let file = file_with(&random(FILE as usize));
    let buffer = memory(&vec![0; BUFFER as usize]);
    let read = |importer: &FileImporter, length: u64| {
        let range = buffer.range(0, length).unwrap();
        importer.attach(&range).unwrap().read(0).unwrap().queue
    };
    let kernel = importer(&file, Kernel::default());
    // One request needs no queue.
    assert_eq!(read(&kernel, 4096), Queue::Calls);
    let many = read(&kernel, BUFFER);
    let is_right = match &many {
        Queue::IoUring => cfg!(feature = "io-uring"),
        Queue::Threads { why } => !why.errno.to_string().is_empty(),
        Queue::Calls => false,
    };
    assert!(is_right, "{many}");
    let threads = importer(&file, ByThreads);
    let why = forbidden();
    assert_eq!(read(&threads, BUFFER), Queue::Threads { why });
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn pieces_that_are_not_inside_are_refused_before_anything_moves() {
    let file = file_with(&random(10_000));
    let buffer = memory(&vec![9; 8192]);
    let importer = importer(&file, Kernel::default());
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    let good = Piece {
        file_offset: 0,
        offset: 0,
        length: 100,
    };
    for bad in [
        Piece {
            file_offset: 9_999,
            ..good
        },
        Piece {
            offset: 8_100,
            ..good
        },
        Piece {
            offset: u64::MAX,
            ..good
        },
        Piece {
            file_offset: u64::MAX,
            ..good
        },
    ] {
        let refused = attachment.read_many(&[good, bad]);
        assert!(
            matches!(
                refused,
                Err(TransferError::Buffer(BufferError::OutOfRange { .. }))
            ),
            "{refused:?}"
        );
    }
    let bad = Piece {
        file_offset: u64::MAX - 10,
        ..good
    };
    let refused = attachment.write_many(&[good, bad]);
    assert!(
        matches!(
            refused,
            Err(TransferError::Buffer(BufferError::OutOfRange { .. }))
        ),
        "{refused:?}"
    );
    assert!(buffer.whole().to_vec().unwrap() == [9; 8192]);
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn the_middle_goes_directly_where_head_and_tail_cannot() {
    let bytes = random(FILE as usize);
    let file = file_with(&bytes);
    let importer = importer(&file, Kernel::default());
    let Some((_, block)) = importer.alignment() else {
        eprintln!("skipped: no direct I/O");
        return;
    };
    let buffer = memory(&vec![0; BUFFER as usize]);
    // As far from a block in memory as in the file.
    let piece = Piece {
        file_offset: u64::from(block) + 100,
        offset: 100,
        length: 1_000_000,
    };
    let receipt = transfer(&importer, &buffer, Direction::DiskToBuffer, &[piece]).unwrap();
    assert_eq!(
        receipt.plan.path,
        Path::SharedHostMemory,
        "{}",
        receipt.plan
    );
    assert!(
        receipt.copied < 2 * u64::from(block),
        "{} bytes were copied",
        receipt.copied
    );
    let read = buffer.whole().to_vec().unwrap();
    let from = piece.file_offset as usize;
    assert!(read[100..1_000_100] == bytes[from..from + 1_000_000]);
    assert_eq!(engine::CHUNK % u64::from(block), 0);
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn pieces_that_follow_each_other_are_read_as_one() {
    let bytes = random(FILE as usize);
    let file = file_with(&bytes);
    let importer = importer(&file, Kernel::default());
    let buffer = memory(&vec![0; BUFFER as usize]);
    // Of a length that is no multiple of anything.
    let pieces: Vec<Piece> = (0..1000)
        .map(|index| Piece {
            file_offset: 4096 + index * 1001,
            offset: index * 1001,
            length: 1001,
        })
        .collect();
    let receipt = transfer(&importer, &buffer, Direction::DiskToBuffer, &pieces).unwrap();
    assert!(receipt.requests < 10, "{} requests", receipt.requests);
    assert!(buffer.whole().to_vec().unwrap()[..1_001_000] == bytes[4096..][..1_001_000]);
}

/// A disk that does not reach the place that a buffer has moved to: it says that all is well, and nothing arrives.
struct Moving {
    unruly: Unruly,
    /// How often the buffer has moved.
    generation: Arc<AtomicU32>,
    /// When the path was chosen.
    chosen: Arc<AtomicU32>,
    /// How often it may.
    most: u32,
}

impl DirectIo for Moving {
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno> {
        Kernel::default().read(file, into, offset)
    }

    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno> {
        Kernel::default().write(file, from, offset)
    }

    fn run<'w>(&self, depth: u32, work: &mut dyn Work<'w>) -> Queue {
        let mut state = self.unruly.0.lock().unwrap();
        let mut in_flight = Vec::new();
        loop {
            while in_flight.len() < depth as usize {
                let Some(request) = work.next() else { break };
                in_flight.push(request);
            }
            in_flight.shuffle(&mut state.random);
            let Some(request) = in_flight.pop() else {
                return Queue::Calls;
            };
            let generation = self.generation.load(Ordering::Relaxed);
            if generation < self.most && state.random.random_ratio(1, 4) {
                self.generation.fetch_add(1, Ordering::Relaxed);
            }
            let moved =
                self.generation.load(Ordering::Relaxed) != self.chosen.load(Ordering::Relaxed);
            let result = match (moved && request.window.is_shared(), generation % 2) {
                (false, _) => state.answer(&request),
                (true, 0) => Ok(request.window.length()),
                (true, _) => Err(Errno::FAULT),
            };
            work.done(request.token, result);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "system calls that Miri does not have")]
fn what_is_carried_directly_while_the_buffer_moves_is_carried_again() {
    let mut moved = 0;
    for seed in 0..24 {
        let mut random_ = StdRng::seed_from_u64(seed);
        let pieces = pieces(&mut random_);
        for direction in BOTH {
            let (held, on_disk) = (random(BUFFER as usize), random(FILE as usize));
            let (file, buffer) = (file_with(&on_disk), memory(&held));
            let endpoint =
                Endpoint::from_fd(file.try_clone().unwrap().into(), "the file".into()).unwrap();
            let (generation, chosen) = (Arc::default(), Arc::<AtomicU32>::default());
            let io = Moving {
                unruly: Unruly::new(seed),
                generation: Arc::clone(&generation),
                chosen: Arc::clone(&chosen),
                most: 5,
            };
            let watch = Watch::default();
            let mut mapping = LazyMapping::new(&buffer.whole()).unwrap();
            let mut lanes = Lanes::default();
            let mut progress = Progress::new(&pieces);
            loop {
                let seen = generation.load(Ordering::Relaxed);
                chosen.store(seen, Ordering::Relaxed);
                let order = Order {
                    io: &io,
                    file: &endpoint,
                    pieces: &pieces,
                    direction,
                    direct: endpoint.direct().ok(),
                    may_copy: true,
                    depth: 7,
                    staging: engine::STAGING,
                    watch: Some(&watch),
                    moved: &|| generation.load(Ordering::Relaxed) != seen,
                };
                let done = engine::carry(&order, &mut progress, &mut lanes, &mut mapping);
                match done.unwrap().unwrap() {
                    Done::All => break,
                    Done::Moved => moved += 1,
                }
            }
            let what = format!("seed {seed}, {direction}");
            let (bytes, carried) = (total(&pieces), &progress.carried);
            assert_eq!(carried.direct + carried.copied, bytes, "{what}");
            assert_eq!((carried.prefix, watch.bytes()), (bytes, bytes), "{what}");
            let (mut in_buffer, mut in_file) = (held.clone(), on_disk.clone());
            match direction {
                Direction::DiskToBuffer => {
                    copy(&pieces, direction, bytes, &on_disk, &mut in_buffer)
                }
                Direction::BufferToDisk => copy(&pieces, direction, bytes, &held, &mut in_file),
            }
            assert!(buffer.whole().to_vec().unwrap() == in_buffer, "{what}");
            assert!(content(&file) == in_file, "{what}");
            if endpoint.direct().is_err() {
                // All goes by the processor, which a move does not concern.
                moved += 1;
            }
        }
    }
    assert!(moved > 20, "{moved}");
}
