//! Hardware events in the guest's machine at a test's request: a device is unplugged and plugged in again, a
//! network link goes down and up. The lab on the host makes them through QEMU's monitor.
//!
//! The lab's device names are `bar0` (the largest BAR), `bar1` (16 MiB), `nvme0` (the disk, which cannot be
//! plugged in again), `nvme1` (a second disk, in the slot of `bar1`), and `net0` for the link. Requests work only in guests of the suite and of `cargo lab
//! run --events`.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use crate::clock::Stopwatch;

/// Time limit for a device's removal, which may wait for importers or I/O.
const PATIENCE: Duration = Duration::from_secs(60);

/// The connection to the lab. Only one process at a time can have it.
pub struct Machine {
    port: BufReader<File>,
}

impl Machine {
    /// Opens the connection.
    ///
    /// # Panics
    ///
    /// If the guest has none, or another process has it.
    pub fn new() -> Self {
        let ports = fs::read_dir("/sys/class/virtio-ports").expect("virtio ports");
        let port = ports
            .flatten()
            .find(|port| {
                let name = fs::read_to_string(port.path().join("name"));
                name.is_ok_and(|name| name.trim() == "peerbuf.events")
            })
            .expect(
                "no port peerbuf.events: this guest runs neither in the suite nor with --events",
            );
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(Path::new("/dev").join(port.file_name()))
            .expect("the port of events");
        Self {
            port: BufReader::new(file),
        }
    }

    /// Sends a request, and waits for the answer.
    fn ask(&mut self, request: &str) -> Result<String, String> {
        // The token differs from those of late answers to a killed process.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let token = format!("{}-{count} ", std::process::id());
        let line = format!("{token}{request}\n");
        self.port.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            let n = self.port.read_line(&mut line).unwrap();
            assert!(n > 0, "the lab has closed the port of events");
            let Some(answer) = line.trim_end().strip_prefix(&token) else {
                continue;
            };
            return match answer.split_once(' ').unwrap_or((answer, "")) {
                ("ok", said) => Ok(said.to_owned()),
                (_, why) => Err(why.to_owned()),
            };
        }
    }

    /// Asks the kernel to release a device, as its slot's button does, without waiting.
    ///
    /// # Errors
    ///
    /// The error of the lab or of QEMU: no such device, or it cannot be unplugged.
    pub fn ask_unplug(&mut self, id: &str) -> Result<(), String> {
        self.ask(&format!("unplug {id}")).map(drop)
    }

    /// Whether the device has left its slot.
    pub fn is_gone(&mut self, id: &str) -> bool {
        self.ask(&format!("gone {id}")).expect("gone") == "yes"
    }

    /// Unplugs a device and waits until it is gone.
    ///
    /// # Panics
    ///
    /// If it is not gone within a minute.
    pub fn unplug(&mut self, id: &str) {
        self.ask_unplug(id).expect("unplug");
        let start = Stopwatch::start();
        while !self.is_gone(id) {
            assert!(start.elapsed() < PATIENCE, "{id} has not gone");
            sleep(Duration::from_millis(20));
        }
    }

    /// Plugs a device in again, in its old slot and with zeroed memory, and waits until the kernel has it at
    /// `bdf` without a driver. (virtio_pci probes every device of this vendor, and is its driver during the
    /// probe.)
    ///
    /// # Errors
    ///
    /// The error of the lab or of QEMU: the device is not gone, or cannot come back.
    ///
    /// # Panics
    ///
    /// If the kernel does not see it within a minute.
    pub fn plug(&mut self, id: &str, bdf: &str) -> Result<(), String> {
        self.ask(&format!("plug {id}"))?;
        let start = Stopwatch::start();
        while !device(bdf).exists() || driver_of(bdf).is_some() {
            assert!(
                start.elapsed() < PATIENCE,
                "{id} has not come back without a driver: {:?}",
                driver_of(bdf)
            );
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Plugs a second, empty disk of 64 MiB in, where `bar1` was, and waits for its node.
    ///
    /// # Panics
    ///
    /// If `bar1` is not gone, or the disk does not come within a minute.
    pub fn plug_disk(&mut self) -> &'static Path {
        self.ask("plug nvme1").expect("plug");
        let start = Stopwatch::start();
        let node = Path::new("/dev/nvme1n1");
        while !node.exists() {
            assert!(
                start.elapsed() < PATIENCE,
                "{} has not come",
                node.display()
            );
            sleep(Duration::from_millis(20));
        }
        node
    }

    /// Sets a network card's link down or up.
    ///
    /// # Errors
    ///
    /// The error of the lab or of QEMU.
    pub fn link(&mut self, id: &str, up: bool) -> Result<(), String> {
        let state = if up { "up" } else { "down" };
        self.ask(&format!("link {id} {state}")).map(drop)
    }

    /// Limits a disk's reads and writes to `rate` bytes a second; 0 is no limit.
    ///
    /// # Errors
    ///
    /// The error of the lab or of QEMU.
    pub fn slow(&mut self, id: &str, rate: u64) -> Result<(), String> {
        self.ask(&format!("slow {id} {rate}")).map(drop)
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

/// The sysfs directory of a PCI device.
pub fn device(bdf: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(bdf)
}

/// True on the debug kernel (`--kernel debug`), which checks every access and lock.
///
/// # Panics
///
/// If the kernel does not report its release.
pub fn is_debug_kernel() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    release.contains("peerbuf-debug")
}

/// Announces a complaint of the kernel: reports that contain these words are not failures.
///
/// # Panics
///
/// If the kernel log cannot be written.
pub fn expect(words: &str) {
    fs::write("/dev/kmsg", format!("peerbuf-lab: expect: {words}")).expect("the kernel's log");
}

/// vfio-pci leaks the scatter list of each mapping of its dma-bufs (docs/exporter.md). kmemleak reports it,
/// with this function's name in the trace as long as the module is loaded (`init/suite` keeps it loaded).
pub fn expect_what_vfio_loses() {
    expect("vfio_pci_dma_buf_map");
}

/// rdma_rxe of Linux 7.3 may WARN in `rxe_sched_task` when a program is killed in mid-transfer: a packet that was looped
/// back schedules the task of a queue pair whose last reference has just been dropped.
pub fn expect_what_rxe_says_of_a_killed_program() {
    expect("at rxe_sched_task");
}

/// A time limit in seconds on the stock kernel; five times as long on the debug kernel.
pub fn seconds(stock: u64) -> Duration {
    Duration::from_secs(if is_debug_kernel() { 5 * stock } else { stock })
}

/// The driver that a PCI device is bound to.
pub fn driver_of(bdf: &str) -> Option<PathBuf> {
    fs::read_link(device(bdf).join("driver")).ok()
}

/// Binds a device, such as one plugged in again, to peerbuf.
///
/// # Panics
///
/// If the driver does not bind within a minute.
pub fn give_to_peerbuf(bdf: &str) {
    fs::write(device(bdf).join("driver_override"), "peerbuf").expect("driver_override");
    let start = Stopwatch::start();
    // A new device is in sysfs before it is offered to drivers, and shows its driver before the probe is
    // over. The node comes last.
    while !Path::new("/dev/peerbuf").join(bdf).exists() {
        assert!(
            start.elapsed() < PATIENCE,
            "peerbuf does not take {bdf}, whose driver is {:?}",
            driver_of(bdf)
        );
        fs::write("/sys/bus/pci/drivers_probe", bdf).expect("drivers_probe");
        sleep(Duration::from_millis(20));
    }
}
