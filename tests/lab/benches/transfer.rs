//! Pieces of a slow disk into a buffer, by the crate, by fio's io_uring engine at the same depth, and by one
//! `pread` after another. `cargo lab bench transfer`.
//!
//! The disk takes 2 ms for each request, as many at a time as its queue has room for, so that a program is as
//! fast as its queue is deep. The guest's clock counts instructions: what the program does between the requests
//! counts, and the host's load does not.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use peerbuf::export::memfd;
use peerbuf::import::file::FileImporter;
use peerbuf::transfer::{Piece, Queue};
use rand::RngExt;
use serde_json::Value;

const DISK: &str = "/dev/nullb0";
/// Of the disk, which has no bytes.
const SIZE: u64 = 1 << 30;
/// Requests of one measurement.
const REQUESTS: u64 = 2048;
const ROUNDS: usize = 5;

/// Requests a second.
fn rate(requests: u64, time: Duration) -> f64 {
    requests as f64 / time.as_secs_f64()
}

fn places(length: u64) -> Vec<u64> {
    let mut random = rand::rng();
    let place = |_| random.random_range(0..SIZE / length) * length;
    (0..REQUESTS).map(place).collect()
}

/// Pieces at random places of the disk, one after the other in the buffer.
fn ours(length: u64, depth: u32) -> f64 {
    // As much memory as a transfer has: the buffer is filled again and again.
    let room = (32 << 20) / length;
    let buffer = memfd::export("memory", room * length).unwrap();
    let disk = FileImporter::open(DISK).unwrap().with_depth(depth);
    let mut attachment = disk.attach(&buffer.whole()).unwrap();
    let pieces: Vec<Piece> = (0..room)
        .cycle()
        .zip(places(length))
        .map(|(index, file_offset)| Piece {
            file_offset,
            offset: index * length,
            length,
        })
        .collect();
    // The first transfer makes the ring and touches the memory.
    attachment
        .read_many(&pieces[..room.min(REQUESTS) as usize])
        .unwrap();
    let begun = Instant::now();
    for pieces in pieces.chunks(room as usize) {
        let receipt = attachment.read_many(pieces).unwrap();
        assert_eq!(receipt.copied, 0, "{}", receipt.plan);
        assert_eq!(receipt.queue, Queue::IoUring);
    }
    rate(REQUESTS, begun.elapsed())
}

/// What a program does that has no queue.
fn one_by_one(length: u64) -> f64 {
    let disk = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(DISK)
        .unwrap();
    let buffer = memfd::export("memory", length).unwrap();
    let memory = buffer.host_memory().unwrap();
    let mapping = map(memory.as_raw_fd(), length as usize);
    let places = &places(length)[..64];
    let begun = Instant::now();
    for place in places {
        // SAFETY: the mapping has `length` bytes.
        let read =
            unsafe { libc::pread(disk.as_raw_fd(), mapping, length as usize, *place as i64) };
        assert_eq!(read, length as isize);
    }
    rate(places.len() as u64, begun.elapsed())
}

fn map(memory: i32, length: usize) -> *mut libc::c_void {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, at a place that the kernel picks.
    let mapping = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            libc::MAP_SHARED,
            memory,
            0,
        )
    };
    assert_ne!(mapping, libc::MAP_FAILED);
    mapping
}

fn fio(length: u64, depth: u32) -> f64 {
    let output = Command::new("fio")
        .args([
            "--name=it",
            "--ioengine=io_uring",
            "--direct=1",
            "--rw=randread",
        ])
        .args([
            "--thread",
            "--output-format=json",
            "--randrepeat=0",
            "--norandommap",
        ])
        .arg(format!("--filename={DISK}"))
        .arg(format!("--bs={length}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--size={SIZE}"))
        .arg(format!("--io_size={}", REQUESTS * length))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    let begin = text
        .find('{')
        .unwrap_or_else(|| panic!("fio: {text}{error}"));
    let found: Value = serde_json::from_str(&text[begin..]).unwrap();
    let read = &found["jobs"][0]["read"];
    assert_eq!(read["total_ios"], REQUESTS, "{text}");
    // Of the job's own clock, in ms; the start of the program is not in it.
    read["iops"].as_f64().unwrap()
}

/// Median, and the least and the most.
fn spread(mut all: Vec<f64>) -> (f64, String) {
    all.sort_by(f64::total_cmp);
    let median = all[all.len() / 2];
    (
        median,
        format!("{median:.0} ({:.0} to {:.0})", all[0], all[all.len() - 1]),
    )
}

fn main() {
    let options = "irqmode=2 completion_nsec=2000000 hw_queue_depth=128 gb=1";
    let loaded = Command::new("modprobe")
        .arg("null_blk")
        .args(options.split(' '))
        .status();
    assert!(loaded.unwrap().success(), "modprobe null_blk");
    std::fs::write("/sys/block/nullb0/queue/scheduler", "none").unwrap();
    println!("| pieces, depth | one by one | fio | peerbuf | of fio |");
    println!("|---|---|---|---|---|");
    for depth in [32, 128] {
        for (name, length) in [("64 KiB", 64 << 10), ("4 KiB", 4 << 10)] {
            let (mut by_us, mut by_fio) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                by_fio.push(fio(length, depth));
                by_us.push(ours(length, depth));
            }
            let single = one_by_one(length);
            let ((ours, our_spread), (fio, fio_spread)) = (spread(by_us), spread(by_fio));
            println!(
                "| {name}, {depth} | {single:.0} | {fio_spread} | {our_spread} | {:.2} |",
                ours / fio
            );
        }
    }
}
