//! Kernel modules, and the devices that they make.

use std::path::{Path, PathBuf};
use std::process::Command;

use peerbuf::device::drm::{self, Card};
use peerbuf::device::edu::{self, Edu};
use peerbuf::device::v4l2::{self, VideoDevice};

/// Loads a module of the stock kernel, with its dependencies.
pub fn load(name: &str) {
    let done = Command::new("modprobe").arg(name).status().unwrap();
    assert!(done.success(), "modprobe {name}");
}

/// The card of `vgem`, a DRM device without hardware.
pub fn vgem() -> Card {
    load("vgem");
    let cards = drm::cards().unwrap();
    let cards = cards.iter().map(|card| Card::open(card).unwrap());
    cards
        .into_iter()
        .find(|card| card.driver() == "vgem")
        .unwrap()
}

/// The capture node of `vivid`, which draws test pictures.
pub fn vivid_node() -> PathBuf {
    load("vivid");
    let nodes = v4l2::devices().unwrap();
    let is_vivid = |node: &&PathBuf| VideoDevice::open(node).unwrap().driver() == "vivid";
    nodes.iter().find(is_vivid).unwrap().clone()
}

/// Unbinds a device from its driver.
pub fn unbind(bdf: &str) {
    let device = Path::new("/sys/bus/pci/devices").join(bdf);
    std::fs::write(device.join("driver_override"), "none").unwrap();
    std::fs::write(device.join("driver/unbind"), bdf).unwrap();
}

/// QEMU's device with a DMA engine, bound to vfio-pci and opened.
pub fn edu() -> Edu {
    load("vfio-pci");
    rebind(&find_pci(edu::ID.0, edu::ID.1), "vfio-pci");
    Edu::open(edu::probe().unwrap()).unwrap()
}

/// Binds a device to another driver.
pub fn rebind(bdf: &str, driver: &str) {
    let device = Path::new("/sys/bus/pci/devices").join(bdf);
    if device.join("driver").exists() {
        std::fs::write(device.join("driver/unbind"), bdf).unwrap();
    }
    std::fs::write(device.join("driver_override"), driver).unwrap();
    std::fs::write("/sys/bus/pci/drivers_probe", bdf).unwrap();
    let bound = std::fs::read_link(device.join("driver")).unwrap();
    assert!(bound.ends_with(driver), "{bdf} has {bound:?}");
}

/// The address of the first PCI device with these IDs.
pub fn find_pci(vendor: u16, device: u16) -> String {
    let id = |path: &Path, file| std::fs::read_to_string(path.join(file)).unwrap_or_default();
    let mut found: Vec<PathBuf> = std::fs::read_dir("/sys/bus/pci/devices")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            id(path, "vendor").trim() == format!("{vendor:#06x}")
                && id(path, "device").trim() == format!("{device:#06x}")
        })
        .collect();
    found.sort();
    let first = found.first().expect("such a PCI device");
    first.file_name().unwrap().to_str().unwrap().to_owned()
}
