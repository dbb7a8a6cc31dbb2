//! The crate's copies to and from mapped memory, beside `memcpy` of the same bytes. Prints a table;
//! docs/performance.md has one, and how it was made.

use std::hint::black_box;

use peerbuf_core::{Access, memfd};

/// Bytes of one measurement, at least.
const BYTES: usize = 128 << 20;
const ROUNDS: usize = 41;

const SIZES: [(&str, usize); 4] = [
    ("4 KiB", 4 << 10),
    ("64 KiB", 64 << 10),
    ("1 MiB", 1 << 20),
    ("128 MiB", 128 << 20),
];

/// Seconds that this thread has had a processor: what a busy host does in between does not count.
fn processor_time() -> f64 {
    // SAFETY: zeros are a valid time.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: the time is written, and nothing else.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(read, 0);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// GB/s of copying `size` bytes again and again.
fn rate(size: usize, mut copy: impl FnMut()) -> f64 {
    let times = BYTES / size;
    let begun = processor_time();
    for _ in 0..times {
        copy();
    }
    (times * size) as f64 / (processor_time() - begun) / 1e9
}

fn spread(mut all: Vec<f64>) -> String {
    all.sort_by(f64::total_cmp);
    let (least, most) = (all[0], all[all.len() - 1]);
    format!("{:.2} ({least:.2} to {most:.2})", all[all.len() / 2])
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let build = match cfg!(debug_assertions) {
        true => "a build without optimisation",
        false => "an optimised build",
    };
    println!("\n## Copies by the processor, {build}\n");
    println!("| bytes | copy | `memcpy`, GB/s | peerbuf, GB/s | of `memcpy` |");
    println!("|---|---|---|---|---|");
    for (name, size) in SIZES {
        let buffer = memfd::buffer("copied", size as u64)?;
        let mut mapping = buffer.whole().map(Access::ReadWrite)?;
        let mut memory = vec![1_u8; size];
        for direction in ["out of the buffer", "into the buffer"] {
            let (mut plain, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            // The first round does not count.
            for round in 0..=ROUNDS {
                let mut cpu = mapping.begin_cpu_access(Access::ReadWrite)?;
                let mapped = black_box(cpu.mapping().as_ptr());
                let (by_memcpy, by_us) = match direction {
                    "into the buffer" => (
                        // SAFETY: both have so many bytes, and nobody else uses them.
                        rate(size, || unsafe {
                            mapped.copy_from_nonoverlapping(black_box(memory.as_ptr()), size);
                        }),
                        rate(size, || cpu.write_at(0, &memory).unwrap()),
                    ),
                    _ => (
                        // SAFETY: both have so many bytes, and nobody else uses them.
                        rate(size, || unsafe {
                            mapped.copy_to_nonoverlapping(black_box(memory.as_mut_ptr()), size);
                        }),
                        rate(size, || cpu.read_at(0, &mut memory).unwrap()),
                    ),
                };
                cpu.end()?;
                if round > 0 {
                    plain.push(by_memcpy);
                    ours.push(by_us);
                    ratios.push(by_us / by_memcpy);
                }
            }
            println!(
                "| {name} | {direction} | {} | {} | {} |",
                spread(plain),
                spread(ours),
                spread(ratios)
            );
        }
    }
    Ok(())
}
