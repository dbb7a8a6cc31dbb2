//! The memory type with which the CPU accesses device memory: of a page of this process, by the fixture
//! `memtype`, and of physical addresses, by the kernel's own list.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use crate::node::{Map, ioctl};

/// A memory type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryType {
    /// As system memory.
    Cached,
    /// Each access reaches the device.
    Uncached,
    /// Writes are collected; reads are not cached.
    WriteCombining,
}

/// The type of the page at byte `at` of a mapping, which the caller has touched.
pub fn of_page(map: &Map, at: usize) -> MemoryType {
    if !Path::new("/dev/memtype").exists() {
        let module = "/opt/peerbuf/fixtures/memtype.ko";
        let done = Command::new("insmod").arg(module).status().unwrap();
        assert!(done.success(), "insmod memtype.ko");
    }
    let node = File::open("/dev/memtype").unwrap();
    assert!(at < map.len);
    let address = map.as_ptr().addr() + at;
    match ioctl(node.as_fd(), u32::from(b'M') << 8, address).unwrap() {
        0 => MemoryType::Cached,
        1 => MemoryType::Uncached,
        2 => MemoryType::WriteCombining,
        other => panic!("{other}"),
    }
}

/// The entries of the kernel's list that begin at a physical address: `uncached-minus`, `write-combining`.
pub fn listed(start: u64) -> Vec<String> {
    let text = std::fs::read_to_string("/sys/kernel/debug/x86/pat_memtype_list").unwrap();
    let prefix = format!("[mem 0x{start:016x}-");
    let lines = text.lines().filter(|line| line.contains(&prefix));
    lines
        .map(|line| line.rsplit(']').next().unwrap().trim().to_owned())
        .collect()
}
