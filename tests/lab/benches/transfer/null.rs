//! Disks of the kernel's module null_blk, which have no bytes.

use std::process::Command;

/// Of each disk.
pub const SIZE: u64 = 1 << 30;

const COUNT: usize = 4;

/// Four of them, all alike. There are none when this is dropped.
pub struct Disks {
    /// How many requests each takes at a time.
    pub queue: u32,
    names: Vec<String>,
}

/// What one request takes.
const DELAY: f64 = 2e-3;

impl Disks {
    /// Each request takes 2 ms.
    pub fn slow(queue: u32) -> Disks {
        let nanoseconds = format!("completion_nsec={:.0}", DELAY * 1e9);
        Disks::load(queue, &["irqmode=2", &nanoseconds])
    }

    /// Each request is answered while it is made.
    pub fn immediate() -> Disks {
        Disks::load(128, &["irqmode=0"])
    }

    fn load(queue: u32, options: &[&str]) -> Disks {
        let loaded = Command::new("modprobe")
            .args(["null_blk", "gb=1"])
            .arg(format!("nr_devices={COUNT}"))
            .arg(format!("hw_queue_depth={queue}"))
            .args(options)
            .status();
        assert!(loaded.unwrap().success(), "modprobe null_blk");
        let disks = (0..COUNT).map(|number| format!("nullb{number}"));
        for disk in disks.clone() {
            std::fs::write(format!("/sys/block/{disk}/queue/scheduler"), "none").unwrap();
        }
        let names = disks.map(|disk| format!("/dev/{disk}")).collect();
        Disks { queue, names }
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How many requests a second one disk can do, with so many in flight.
    pub fn limit(&self, depth: u32) -> f64 {
        f64::from(depth.min(self.queue)) / DELAY
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        let removed = Command::new("modprobe").args(["-r", "null_blk"]).status();
        assert!(
            removed.is_ok_and(|status| status.success()),
            "modprobe -r null_blk"
        );
    }
}
