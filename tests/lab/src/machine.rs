//! Events that a test asks of the guest's machine: a device is unplugged and plugged in again, a
//! network link goes down and up. The lab on the host does it, through QEMU's monitor.
//!
//! Devices are named as the lab names them: `bar0` (the largest BAR), `bar1` (16 MiB), `nvme0` (the
//! disk, which cannot be plugged in again), and the link of `net0`. Only guests of the suite, and
//! those of `cargo lab run --events`, can ask.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use crate::clock::Stopwatch;

/// For a device that goes; the slow ones are those that wait for something.
const PATIENCE: Duration = Duration::from_secs(60);

/// The connection to the lab. One process at a time can have it.
pub struct Machine {
    port: BufReader<File>,
}

impl Machine {
    /// Opens the connection.
    ///
    /// # Panics
    ///
    /// When the guest has none, or somebody else has it.
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

    /// Asks, and waits for the answer.
    fn ask(&mut self, request: &str) -> Result<String, String> {
        // An answer that a killed process did not wait for has another token.
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

    /// Asks the kernel to let a device go, as its slot's button does, and does not wait for it.
    ///
    /// # Errors
    ///
    /// What the lab or QEMU says: no such device, or it cannot go.
    pub fn ask_unplug(&mut self, id: &str) -> Result<(), String> {
        self.ask(&format!("unplug {id}")).map(drop)
    }

    /// Whether the device has gone from its slot.
    pub fn is_gone(&mut self, id: &str) -> bool {
        self.ask(&format!("gone {id}")).expect("gone") == "yes"
    }

    /// Unplugs a device and waits until it has gone.
    ///
    /// # Panics
    ///
    /// When it has not gone within a minute.
    pub fn unplug(&mut self, id: &str) {
        self.ask_unplug(id).expect("unplug");
        let start = Stopwatch::start();
        while !self.is_gone(id) {
            assert!(start.elapsed() < PATIENCE, "{id} has not gone");
            sleep(Duration::from_millis(20));
        }
    }

    /// Plugs a device in again, in its old slot, its memory all zero, and waits until the kernel has
    /// it at `bdf` and no driver holds it. (virtio_pci tries every device of this vendor, and shows
    /// as its driver while it does.)
    ///
    /// # Errors
    ///
    /// What the lab or QEMU says: it has not gone, or cannot come back.
    ///
    /// # Panics
    ///
    /// When the kernel does not see it within a minute.
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

    /// Takes a network card's link down or up.
    ///
    /// # Errors
    ///
    /// What the lab or QEMU says.
    pub fn link(&mut self, id: &str, up: bool) -> Result<(), String> {
        let state = if up { "up" } else { "down" };
        self.ask(&format!("link {id} {state}")).map(drop)
    }

    /// Has a disk read, and write, at most `rate` bytes a second; 0 is no limit.
    ///
    /// # Errors
    ///
    /// What the lab or QEMU says.
    pub fn slow(&mut self, id: &str, rate: u64) -> Result<(), String> {
        self.ask(&format!("slow {id} {rate}")).map(drop)
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

/// A PCI device in sysfs.
pub fn device(bdf: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(bdf)
}

/// True on the kernel of `--kernel debug`, which checks every access and lock.
///
/// # Panics
///
/// When the kernel does not tell its release.
pub fn is_debug_kernel() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    release.contains("peerbuf-debug")
}

/// Announces what the kernel will complain of: reports that have these words in them fail nothing.
///
/// # Panics
///
/// When the log takes no words.
pub fn expect(words: &str) {
    fs::write("/dev/kmsg", format!("peerbuf-lab: expect: {words}")).expect("the kernel's log");
}

/// vfio-pci loses the list of each mapping of a dma-buf of its own (docs/exporter.md), which kmemleak finds
/// and whose trace names this function as long as its module is there (`init/suite` leaves it).
pub fn expect_what_vfio_loses() {
    expect("vfio_pci_dma_buf_map");
}

/// What takes at most so many seconds on the stock kernel: on the debug one it has five times as long.
pub fn seconds(stock: u64) -> Duration {
    Duration::from_secs(if is_debug_kernel() { 5 * stock } else { stock })
}

/// The driver that a PCI device shows.
pub fn driver_of(bdf: &str) -> Option<PathBuf> {
    fs::read_link(device(bdf).join("driver")).ok()
}

/// Gives a device, such as one plugged in again, to peerbuf.
///
/// # Panics
///
/// When the driver does not take it within a minute.
pub fn give_to_peerbuf(bdf: &str) {
    fs::write(device(bdf).join("driver_override"), "peerbuf").expect("driver_override");
    let start = Stopwatch::start();
    // A device that has just come is in sysfs before drivers are offered it, and shows its driver
    // before that is done with it: the node is the last to come.
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
