//! PCI devices of the guest other than the exporting ones.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::clock::Stopwatch;
use crate::machine::seconds;

/// A PCI device bound to this driver.
pub fn bound_to(driver: &str) -> Option<String> {
    let bound = fs::read_dir(Path::new("/sys/bus/pci/drivers").join(driver)).ok()?;
    bound
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .find(|name| name.starts_with("0000:"))
}

/// A PCI device that no one needs: the SATA controller without disks, bound to its driver.
pub fn spare_device() -> String {
    let driver = Path::new("/sys/bus/pci/drivers/ahci");
    if !driver.exists() {
        let loaded = Command::new("modprobe").arg("ahci").output().unwrap();
        assert!(loaded.status.success(), "{loaded:?}");
    }
    wait_until("ahci", || bound_to("ahci").is_some());
    bound_to("ahci").unwrap()
}

/// Waits until a condition holds, with a limit that is longer on the debug kernel.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let waiting = Stopwatch::start();
    while !condition() {
        assert!(waiting.elapsed() < seconds(20), "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}
