//! The PCI topology: addresses, bridges, and the device behind a file, from sysfs.

use std::collections::BTreeSet;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

mod stack;

pub use stack::{Layer, LayerKind};

/// The address of a PCI function, `DDDD:BB:DD.F`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[doc(alias = "BDF")]
pub struct PciAddress {
    /// The domain, also called segment.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device number, 0 to 31.
    pub device: u8,
    /// The function number, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress {
            domain,
            bus,
            device,
            function,
        } = self;
        f.pad(&format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
    }
}

/// The error for a text that is not a PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a PCI address such as 0000:01:00.0")]
pub struct NotAPciAddress(String);

impl FromStr for PciAddress {
    type Err = NotAPciAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| NotAPciAddress(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let hex = |digits: &str, at_least: usize, at_most: usize| {
        let well_formed = (at_least..=at_most).contains(&digits.len())
            && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        well_formed
            .then(|| u32::from_str_radix(digits, 16).ok())
            .flatten()
    };
    let (domain, rest) = text.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    // Domains above ffff exist: Intel's VMD has them.
    let domain = hex(domain, 4, 8)?;
    let (bus, device, function) = (hex(bus, 2, 2)?, hex(device, 2, 2)?, hex(function, 1, 1)?);
    (device < 32 && function < 8).then_some(PciAddress {
        domain,
        bus: bus as u8,
        device: device as u8,
        function: function as u8,
    })
}

/// A sysfs tree: the running kernel's, or a copy of another machine's.
#[derive(Debug, Clone)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Sysfs::at("/sys")
    }
}

/// A block device in sysfs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockDevice {
    /// The name, such as `nvme0n1p1`.
    pub name: String,
    /// The PCI functions that carry its I/O: several for a striped or multi-path device, none for a device
    /// without hardware, such as a RAM disk.
    pub functions: Vec<PciAddress>,
    /// The number of disks, or of paths to one disk, that may carry its I/O. More than one for a striped,
    /// mirrored or multi-path device; then no interface tells which one a transfer uses.
    pub disks: usize,
    /// The smallest unit of I/O in bytes.
    pub logical_block: u32,
    /// The kernel layer that makes the device, over other devices or in memory, such as `device mapper`.
    /// `None` for a disk.
    pub layer: Option<&'static str>,
}

/// The layers whose block devices are not disks, by prefix of the device's name.
const LAYERS: [(&str, &str); 11] = [
    ("dm-", "device mapper"),
    ("md", "md"),
    ("loop", "a loop device"),
    ("ublk", "ublk, a program"),
    ("zram", "zram"),
    ("ram", "a ram disk"),
    ("bcache", "bcache"),
    ("pmem", "persistent memory"),
    ("nbd", "a network block device"),
    ("drbd", "drbd"),
    ("nvme", "NVMe over fabrics"),
];

/// A P2PDMA pool: memory that a device's driver has registered for peers. Sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pool {
    /// The total size.
    pub size: u64,
    /// The unallocated size.
    pub available: u64,
    /// Whether other drivers may allocate from it.
    pub published: bool,
}

/// Identifies a device and one binding of its driver: a device hot-plugged at the same address and a rebind
/// of the same driver both give another stamp. Without sysfs all stamps are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stamp {
    /// The inode number in sysfs, which never reuses numbers.
    device: Option<u64>,
    driver: Option<u64>,
}

impl Stamp {
    /// An arbitrary stamp, for tests.
    #[doc(hidden)]
    pub fn of_inodes(device: Option<u64>, driver: Option<u64>) -> Stamp {
        Stamp { device, driver }
    }
}

impl Sysfs {
    /// A sysfs tree at `root`, which contains `class`, `dev` and `devices`.
    pub fn at(root: impl Into<PathBuf>) -> Sysfs {
        Sysfs { root: root.into() }
    }

    /// The functions on the path from the host bridge down to `address`: the bridges first, `address` last.
    /// Empty if the function does not exist.
    pub fn pci_path(&self, address: PciAddress) -> Vec<PciAddress> {
        let link = self.root.join("bus/pci/devices").join(address.to_string());
        functions_in(&link.canonicalize().unwrap_or_default())
    }

    /// The closest common bridge of both functions; `None` if only a host bridge joins them, or one does not
    /// exist.
    pub fn common_bridge(&self, one: PciAddress, other: PciAddress) -> Option<PciAddress> {
        let (one, other) = (self.pci_path(one), self.pci_path(other));
        one.iter()
            .zip(&other)
            .take_while(|(a, b)| a == b)
            .last()
            .map(|(bridge, _)| *bridge)
    }

    /// Identifies the device at this address and its driver's binding: sysfs makes the link to the driver
    /// anew at each bind.
    pub fn stamp(&self, address: PciAddress) -> Stamp {
        let directory = self.root.join("bus/pci/devices").join(address.to_string());
        let driver = std::fs::symlink_metadata(directory.join("driver"));
        Stamp {
            device: std::fs::metadata(directory).ok().map(|file| file.ino()),
            driver: driver.ok().map(|link| link.ino()),
        }
    }

    /// Identifies the block device with this number.
    pub fn block_stamp(&self, major: u32, minor: u32) -> Stamp {
        let directory = self.root.join(format!("dev/block/{major}:{minor}"));
        Stamp {
            device: std::fs::metadata(directory).ok().map(|file| file.ino()),
            driver: None,
        }
    }

    /// The block device with this number.
    pub fn block_device(&self, major: u32, minor: u32) -> Option<BlockDevice> {
        let link = self.root.join(format!("dev/block/{major}:{minor}"));
        self.block_device_at(&link.canonicalize().ok()?)
    }

    /// All whole disks that have hardware.
    pub fn block_devices(&self) -> Vec<BlockDevice> {
        let entries = std::fs::read_dir(self.root.join("block"));
        let mut disks: Vec<BlockDevice> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| self.block_device_at(&entry.path().canonicalize().ok()?))
            .filter(|disk| !disk.functions.is_empty())
            .collect();
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        disks
    }

    /// The vendor ID and device ID of a function.
    pub fn pci_id(&self, address: PciAddress) -> Option<(u16, u16)> {
        let directory = self.root.join("bus/pci/devices").join(address.to_string());
        let id = |file| {
            let text = std::fs::read_to_string(directory.join(file)).ok()?;
            u16::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
        };
        Some((id("vendor")?, id("device")?))
    }

    /// All PCI functions.
    pub fn pci_devices(&self) -> Vec<PciAddress> {
        let entries = std::fs::read_dir(self.root.join("bus/pci/devices"));
        let addresses = entries.into_iter().flatten().flatten();
        addresses
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// The function's P2PDMA pool, if its driver has made one.
    pub fn pool(&self, address: PciAddress) -> Option<Pool> {
        let directory = self.root.join("bus/pci/devices").join(address.to_string());
        let number = |file| -> Option<u64> {
            let text = std::fs::read_to_string(directory.join("p2pmem").join(file)).ok()?;
            text.trim().parse().ok()
        };
        Some(Pool {
            size: number("size")?,
            available: number("available")?,
            published: number("published")? != 0,
        })
    }

    /// Whether a BAR is prefetchable, so that reads have no side effects. False if unknown.
    pub fn is_prefetchable(&self, address: PciAddress, bar: u8) -> bool {
        let directory = self.root.join("bus/pci/devices").join(address.to_string());
        let text = std::fs::read_to_string(directory.join("resource")).unwrap_or_default();
        // One line per BAR: start, end and flags (IORESOURCE_PREFETCH, linux/ioport.h).
        let flags = text.lines().nth(bar.into()).and_then(|line| {
            let flags = line.split_whitespace().nth(2)?.strip_prefix("0x")?;
            u64::from_str_radix(flags, 16).ok()
        });
        bar < 6 && flags.is_some_and(|flags| flags & 0x2000 != 0)
    }

    /// The PCI functions bound to a driver.
    pub fn bound_to(&self, driver: &str) -> Vec<PciAddress> {
        let entries = std::fs::read_dir(self.root.join("bus/pci/drivers").join(driver));
        let names = entries.into_iter().flatten().flatten();
        let mut bound: Vec<PciAddress> = names
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        bound.sort();
        bound
    }

    /// The PCI functions bound to a module's drivers.
    pub fn functions_of_module(&self, module: &str) -> Vec<PciAddress> {
        // The name may come from any source, and becomes part of a path.
        let is_name = |name: &str| {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
            !name.is_empty() && name.bytes().all(known)
        };
        if !is_name(module) {
            return Vec::new();
        }
        let drivers = self.names_in(&format!("module/{module}/drivers"));
        let drivers = drivers
            .iter()
            .filter_map(|driver| driver.strip_prefix("pci:"));
        drivers.flat_map(|driver| self.bound_to(driver)).collect()
    }

    /// The PCI functions bound to the drivers of all modules that use this module.
    pub fn functions_of_users(&self, module: &str) -> Vec<PciAddress> {
        let users = self.names_in(&format!("module/{module}/holders"));
        let functions = users.iter().flat_map(|user| self.functions_of_module(user));
        functions.collect()
    }

    fn names_in(&self, directory: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join(directory));
        let names = entries.into_iter().flatten().flatten();
        names
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// The PCI function of the character device with this number.
    pub fn character_device(&self, major: u32, minor: u32) -> Option<PciAddress> {
        let link = self.root.join(format!("dev/char/{major}:{minor}"));
        functions_in(&link.canonicalize().ok()?).last().copied()
    }

    fn block_device_at(&self, directory: &Path) -> Option<BlockDevice> {
        let name = directory.file_name()?.to_str()?.to_owned();
        let mut below = BTreeSet::new();
        self.collect_disks(directory, 0, &mut below);
        let disks = below.len();
        let functions = below.into_iter().filter_map(|disk| disk.ok());
        // A partition has no queue of its own; the directory above is its disk's.
        let queue = [directory.join("queue"), directory.join("../queue")];
        let block = queue.iter().find_map(|queue| {
            std::fs::read_to_string(queue.join("logical_block_size"))
                .ok()?
                .trim()
                .parse()
                .ok()
        });
        Some(BlockDevice {
            name,
            functions: functions.collect(),
            disks,
            logical_block: block.unwrap_or(512),
            layer: layer_of(directory),
        })
    }

    /// Collects the functions that carry a device's I/O, and the directories of its disks that have no
    /// function.
    fn collect_disks(
        &self,
        directory: &Path,
        depth: u32,
        into: &mut BTreeSet<Result<PciAddress, PathBuf>>,
    ) {
        // Device-mapper tables stack, but not this deep. The limit ends a loop in a copied tree.
        if depth > 8 {
            return;
        }
        if let Some(&function) = functions_in(directory).last() {
            into.insert(Ok(function));
            return;
        }
        let mut found = false;
        // md and device-mapper list their components. The head of an NVMe multi-path disk is under its
        // subsystem, next to links to the controllers. A partition of either is one directory further down.
        for place in [directory, directory.parent().unwrap_or(directory)] {
            let slaves = std::fs::read_dir(place.join("slaves"));
            for entry in slaves.into_iter().flatten().flatten() {
                if let Ok(slave) = entry.path().canonicalize() {
                    self.collect_disks(&slave, depth + 1, into);
                    found = true;
                }
            }
        }
        for subsystem in directory.ancestors().take(3) {
            let is_subsystem = subsystem
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with("nvme-subsys"));
            let entries = is_subsystem
                .then(|| std::fs::read_dir(subsystem).ok())
                .flatten();
            for entry in entries.into_iter().flatten().flatten() {
                let Ok(target) = entry.path().canonicalize() else {
                    continue;
                };
                if let Some(&function) = functions_in(&target).last() {
                    into.insert(Ok(function));
                    found = true;
                }
            }
        }
        if !found {
            into.insert(Err(directory.to_owned()));
        }
    }
}

fn layer_of(directory: &Path) -> Option<&'static str> {
    let names: Vec<&str> = directory.iter().filter_map(|name| name.to_str()).collect();
    // The head of an NVMe multi-path disk is under its subsystem, and forwards its I/O.
    let is_disks =
        |name: &&str| name.starts_with("nvme-subsys") || name.parse::<PciAddress>().is_ok();
    if names.iter().any(is_disks) {
        return None;
    }
    let within = names.contains(&"virtual") || names.iter().any(|name| name.starts_with("ndbus"));
    let name = names.iter().rev().find(|name| {
        let known = |(prefix, _): &(&str, &str)| name.starts_with(prefix);
        LAYERS.iter().any(known)
    });
    let layer = name.and_then(|name| LAYERS.iter().find(|(prefix, _)| name.starts_with(prefix)));
    within.then(|| layer.map_or("a virtual block device", |(_, layer)| *layer))
}

/// The PCI functions in a path in `devices/`, in order.
fn functions_in(path: &Path) -> Vec<PciAddress> {
    path.iter()
        .filter_map(|part| part.to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn addresses_survive_a_round_trip() {
        for text in ["0000:00:00.0", "0000:ff:1f.7", "10000:e1:00.0"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "01:00.0",
            "0000:01:00",
            "0000:01:20.0",
            "0000:01:00.8",
            "0000:+1:00.0",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }

    /// An artificial sysfs tree.
    pub(crate) struct Tree(pub(crate) PathBuf);

    impl Tree {
        pub(crate) fn new(name: &str) -> Tree {
            let root = std::env::temp_dir().join(format!("peerbuf-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&root);
            Tree(root)
        }

        pub(crate) fn device(&self, path: &str) -> PathBuf {
            let path = self.0.join("devices").join(path);
            std::fs::create_dir_all(&path).unwrap();
            path
        }

        pub(crate) fn link(&self, from: &str, to: &Path) {
            let from = self.0.join(from);
            std::fs::create_dir_all(from.parent().unwrap()).unwrap();
            symlink(to, from).unwrap();
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn two_ports_of_one_switch_have_its_upstream_port_in_common() {
        let tree = Tree::new("switch");
        let up = "pci0000:00/0000:00:03.0/0000:01:00.0";
        let disk = tree.device(&format!("{up}/0000:02:00.0/0000:03:00.0"));
        let card = tree.device(&format!("{up}/0000:02:01.0/0000:04:00.0"));
        tree.link("bus/pci/devices/0000:03:00.0", &disk);
        tree.link("bus/pci/devices/0000:04:00.0", &card);
        let sysfs = Sysfs::at(&tree.0);
        let [disk, card] = ["0000:03:00.0", "0000:04:00.0"].map(|text| text.parse().unwrap());
        assert_eq!(sysfs.common_bridge(disk, card), "0000:01:00.0".parse().ok());
        assert_eq!(sysfs.pci_path(card).len(), 4);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn two_root_ports_have_no_bridge_in_common() {
        let tree = Tree::new("ports");
        for (address, port) in [
            ("0000:01:00.0", "0000:00:03.0"),
            ("0000:02:00.0", "0000:00:04.0"),
        ] {
            let device = tree.device(&format!("pci0000:00/{port}/{address}"));
            tree.link(&format!("bus/pci/devices/{address}"), &device);
        }
        let sysfs = Sysfs::at(&tree.0);
        let [one, other] = ["0000:01:00.0", "0000:02:00.0"].map(|text| text.parse().unwrap());
        assert_eq!(sysfs.common_bridge(one, other), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_device_that_came_back_or_has_another_driver_is_another_one() {
        let tree = Tree::new("stamp");
        let device = tree.device("pci0000:00/0000:01:00.0");
        let link = "bus/pci/devices/0000:01:00.0";
        tree.link(link, &device);
        let sysfs = Sysfs::at(&tree.0);
        let stamp = || sysfs.stamp("0000:01:00.0".parse().unwrap());
        let bare = stamp();
        assert_eq!(stamp(), bare);
        tree.link("devices/pci0000:00/0000:01:00.0/driver", Path::new("one"));
        let bound = stamp();
        assert_ne!(bound, bare);
        // Keeps the old entry until the new one exists, so that the numbers differ, as in sysfs.
        let kept = tree.0.join("kept");
        std::fs::rename(device.join("driver"), kept).unwrap();
        tree.link("devices/pci0000:00/0000:01:00.0/driver", Path::new("one"));
        assert_ne!(stamp(), bound);
        let bound = stamp();
        std::fs::rename(&device, tree.0.join("gone")).unwrap();
        tree.device("pci0000:00/0000:01:00.0");
        assert_ne!(stamp(), bound);
        assert_eq!(sysfs.block_stamp(1, 1), Stamp::default());
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_partition_leads_to_its_disks_controller_and_block_size() {
        let tree = Tree::new("partition");
        let disk = tree.device("pci0000:00/0000:00:03.0/0000:01:00.0/nvme/nvme0/nvme0n1");
        let part = tree.device("pci0000:00/0000:00:03.0/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p2");
        std::fs::create_dir(disk.join("queue")).unwrap();
        std::fs::write(disk.join("queue/logical_block_size"), "4096\n").unwrap();
        tree.link("dev/block/259:2", &part);
        let found = Sysfs::at(&tree.0).block_device(259, 2).unwrap();
        assert_eq!(found.name, "nvme0n1p2");
        assert_eq!(found.functions, ["0000:01:00.0".parse().unwrap()]);
        assert_eq!(found.logical_block, 4096);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_mapped_disk_leads_to_all_that_it_is_made_of() {
        let tree = Tree::new("mapped");
        let mapped = tree.device("virtual/block/dm-0");
        for (index, address) in ["0000:01:00.0", "0000:02:00.0"].iter().enumerate() {
            let disk = tree.device(&format!(
                "pci0000:00/{address}/nvme/nvme{index}/nvme{index}n1"
            ));
            tree.link(
                &format!("devices/virtual/block/dm-0/slaves/nvme{index}n1"),
                &disk,
            );
        }
        tree.link("dev/block/253:0", &mapped);
        let found = Sysfs::at(&tree.0).block_device(253, 0).unwrap();
        assert_eq!(found.functions.len(), 2);
        assert_eq!(found.disks, 2);
        assert_eq!(found.layer, Some("device mapper"));
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn disks_are_counted_once_and_those_without_a_function_too() {
        let tree = Tree::new("counted");
        let disk = tree.device("pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1");
        let part = tree.device("pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p1");
        let ram = tree.device("virtual/block/ram0");
        let linear = tree.device("virtual/block/dm-0");
        let mixed = tree.device("virtual/block/dm-1");
        let above = tree.device("virtual/block/dm-2");
        tree.link("devices/virtual/block/dm-0/slaves/nvme0n1", &disk);
        tree.link("devices/virtual/block/dm-0/slaves/nvme0n1p1", &part);
        tree.link("devices/virtual/block/dm-1/slaves/nvme0n1", &disk);
        tree.link("devices/virtual/block/dm-1/slaves/ram0", &ram);
        tree.link("devices/virtual/block/dm-2/slaves/dm-0", &linear);
        tree.link("devices/virtual/block/dm-2/slaves/nvme0n1", &disk);
        let sysfs = Sysfs::at(&tree.0);
        for (minor, device, disks, functions) in [
            (0, &disk, 1, 1),
            (1, &ram, 1, 0),
            (2, &linear, 1, 1),
            (3, &mixed, 2, 1),
            (4, &above, 1, 1),
        ] {
            tree.link(&format!("dev/block/259:{minor}"), device);
            let found = sysfs.block_device(259, minor).unwrap();
            let counts = (found.disks, found.functions.len());
            assert_eq!(counts, (disks, functions), "{}", found.name);
        }
    }

    #[test]
    fn what_is_no_disk_names_what_makes_it() {
        for (path, layer) in [
            ("virtual/block/loop0", Some("a loop device")),
            ("virtual/block/md127", Some("md")),
            ("virtual/block/md127/md127p1", Some("md")),
            ("virtual/block/zram0", Some("zram")),
            ("virtual/block/ram0", Some("a ram disk")),
            ("virtual/block/ublkb0", Some("ublk, a program")),
            ("virtual/block/bcache0", Some("bcache")),
            ("virtual/block/new0", Some("a virtual block device")),
            (
                "LNXSYSTM:00/LNXSYBUS:00/ACPI0012:00/ndbus0/region0/namespace0.0/block/pmem0",
                Some("persistent memory"),
            ),
            (
                "virtual/nvme-fabrics/ctl/nvme1/nvme1n1",
                Some("NVMe over fabrics"),
            ),
            ("virtual/nvme-subsystem/nvme-subsys0/nvme0n1", None),
            ("pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p1", None),
            ("platform/soc/1000.mmc/mmc_host/mmc0/block/mmcblk0", None),
        ] {
            let path = Path::new("/sys/devices").join(path);
            assert_eq!(layer_of(&path), layer, "{}", path.display());
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn an_nvme_multipath_head_leads_to_its_controllers() {
        let tree = Tree::new("multipath");
        let head = tree.device("virtual/nvme-subsystem/nvme-subsys0/nvme0n1");
        let controller = tree.device("pci0000:00/0000:00:03.0/0000:01:00.0/nvme/nvme0");
        tree.link(
            "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0",
            &controller,
        );
        tree.link("dev/block/259:1", &head);
        let found = Sysfs::at(&tree.0).block_device(259, 1).unwrap();
        assert_eq!(found.functions, ["0000:01:00.0".parse().unwrap()]);
    }
}
