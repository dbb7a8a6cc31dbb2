//! Kernel memory in use, and available memory.

use std::fs;
use std::path::Path;

/// Bytes in use in the kernel's general caches whose name ends with `ending` (`""`: all of them).
///
/// Flushes KASAN's quarantine first, which keeps freed memory for a while.
pub fn in_use(ending: &str) -> u64 {
    let text = fs::read_to_string("/proc/slabinfo").expect("/proc/slabinfo");
    let names: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with("kmalloc") && name.ends_with(ending))
        .collect();
    assert!(!names.is_empty(), "no cache kmalloc*{ending}");
    for name in &names {
        let _ = fs::write(Path::new("/sys/kernel/slab").join(name).join("shrink"), "1");
    }
    let text = fs::read_to_string("/proc/slabinfo").expect("/proc/slabinfo");
    text.lines()
        .filter_map(|line| {
            let mut field = line.split_whitespace();
            let name = field.next()?;
            let active: u64 = field.next()?.parse().ok()?;
            let size: u64 = field.nth(1)?.parse().ok()?;
            names.contains(&name).then_some(active * size)
        })
        .sum()
}

/// Bytes available to programs (`MemAvailable`).
pub fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let kib: u64 = kib.expect("MemAvailable").parse().expect("a number");
    kib << 10
}
