//! The layers of a block device, from the top down to its disks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{PciAddress, Sysfs};

/// A layer of a block device: the device itself, or one below it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layer {
    /// The block device's name, such as `dm-0`.
    pub name: String,
    /// What it is.
    pub kind: LayerKind,
}

/// What a layer is, as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerKind {
    /// A disk with hardware of its own.
    Disk,
    /// A part of the device below.
    Partition,
    /// A volume of LVM.
    Lvm,
    /// An encrypted device: LUKS, dm-crypt.
    Crypt,
    /// Several paths to one disk, by the device mapper.
    Multipath,
    /// Another device of the device mapper.
    Mapper,
    /// Software RAID, with its level, such as `raid0`.
    Raid(Option<String>),
    /// A loop device, with its file.
    Loop(Option<PathBuf>),
    /// An NVMe disk on a network, with its transport, such as `rdma` or `tcp`.
    Fabrics(Option<String>),
    /// Several paths to one disk, by the NVMe driver.
    NvmePaths,
    /// Memory: zram, a RAM disk, persistent memory.
    Memory,
    /// Any other device without hardware.
    Virtual,
}

impl LayerKind {
    /// The human-readable name.
    pub fn name(&self) -> String {
        match self {
            LayerKind::Disk => "disk".into(),
            LayerKind::Partition => "partition".into(),
            LayerKind::Lvm => "LVM".into(),
            LayerKind::Crypt => "dm-crypt".into(),
            LayerKind::Multipath => "dm-multipath".into(),
            LayerKind::Mapper => "device mapper".into(),
            LayerKind::Raid(None) => "md".into(),
            LayerKind::Raid(Some(level)) => format!("md {level}"),
            LayerKind::Loop(None) => "loop device".into(),
            LayerKind::Loop(Some(file)) => format!("loop device of {}", file.display()),
            LayerKind::Fabrics(None) => "NVMe over fabrics".into(),
            LayerKind::Fabrics(Some(transport)) => format!("NVMe over {transport}"),
            LayerKind::NvmePaths => "NVMe multipath".into(),
            LayerKind::Memory => "memory".into(),
            LayerKind::Virtual => "virtual block device".into(),
        }
    }
}

impl Sysfs {
    /// The layers of the block device with this number: itself first, then those below, each before its own. Each
    /// occurs once. Empty if there is no such device.
    pub fn stack(&self, major: u32, minor: u32) -> Vec<Layer> {
        let link = self.root.join(format!("dev/block/{major}:{minor}"));
        let mut layers = Vec::new();
        if let Ok(directory) = link.canonicalize() {
            below(&directory, &mut BTreeSet::new(), &mut layers);
        }
        layers
    }
}

fn below(directory: &Path, seen: &mut BTreeSet<PathBuf>, into: &mut Vec<Layer>) {
    let Some(name) = directory.file_name().and_then(|name| name.to_str()) else {
        return;
    };
    // A loop in a copied tree ends here.
    if !seen.insert(directory.to_owned()) || seen.len() > 256 {
        return;
    }
    let kind = kind_of(directory, name);
    let is_partition = kind == LayerKind::Partition;
    into.push(Layer {
        name: name.to_owned(),
        kind,
    });
    if is_partition {
        if let Some(disk) = directory.parent() {
            below(disk, seen, into);
        }
        return;
    }
    let entries = std::fs::read_dir(directory.join("slaves"));
    let mut slaves: Vec<PathBuf> = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.path().canonicalize().ok())
        .collect();
    slaves.sort();
    for slave in slaves {
        below(&slave, seen, into);
    }
}

fn kind_of(directory: &Path, name: &str) -> LayerKind {
    let line = |file: &str| {
        let text = std::fs::read_to_string(directory.join(file)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    if directory.join("partition").exists() {
        return LayerKind::Partition;
    }
    let has = |part: &str| directory.iter().any(|name| name == part);
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    if begins(&["dm-"]) {
        // The prefix is the subsystem that made the device; `part1-` is before that of a partition's.
        let uuid = line("dm/uuid").unwrap_or_default();
        let is = |prefix: &str| uuid.starts_with(prefix);
        return match () {
            () if is("LVM-") => LayerKind::Lvm,
            () if is("CRYPT-") => LayerKind::Crypt,
            () if is("mpath-") => LayerKind::Multipath,
            () if is("part") && uuid.contains("-mpath-") => LayerKind::Partition,
            () => LayerKind::Mapper,
        };
    }
    if begins(&["md"]) && has("virtual") {
        return LayerKind::Raid(line("md/level"));
    }
    if begins(&["loop"]) {
        return LayerKind::Loop(line("loop/backing_file").map(PathBuf::from));
    }
    if begins(&["nvme"]) && has("nvme-fabrics") {
        return LayerKind::Fabrics(line("../transport"));
    }
    if begins(&["nvme"]) && has("nvme-subsystem") {
        return nvme_paths(directory);
    }
    if begins(&["zram", "ram", "pmem"]) {
        return LayerKind::Memory;
    }
    let on_pci = directory
        .iter()
        .filter_map(|part| part.to_str())
        .any(|part| part.parse::<PciAddress>().is_ok());
    match has("virtual") && !on_pci {
        true => LayerKind::Virtual,
        false => LayerKind::Disk,
    }
}

/// A disk below its subsystem, which has links to the controllers of its paths.
fn nvme_paths(head: &Path) -> LayerKind {
    let subsystem = head.parent().unwrap_or(head);
    let entries = std::fs::read_dir(subsystem).into_iter().flatten().flatten();
    let transports: BTreeSet<String> = entries
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("transport")).ok())
        .map(|text| text.trim().to_owned())
        .collect();
    match transports.iter().find(|transport| *transport != "pcie") {
        Some(transport) => LayerKind::Fabrics(Some(transport.clone())),
        None => LayerKind::NvmePaths,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::tests::Tree;

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_stack_is_read_from_the_filesystem_down_to_the_disk() {
        let tree = Tree::new("stack");
        let disk = tree.device("pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1");
        let part = tree.device("pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p3");
        let write = |directory: &Path, file: &str, text: &str| {
            let path = directory.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(&part, "partition", "3\n");
        let mapped: Vec<PathBuf> = ["LVM-0123", "CRYPT-LUKS2-0123-root", "mpath-0123", ""]
            .iter()
            .enumerate()
            .map(|(number, uuid)| {
                let device = tree.device(&format!("virtual/block/dm-{number}"));
                write(&device, "dm/uuid", &format!("{uuid}\n"));
                device
            })
            .collect();
        tree.link("devices/virtual/block/dm-0/slaves/dm-1", &mapped[1]);
        tree.link("devices/virtual/block/dm-1/slaves/nvme0n1p3", &part);
        tree.link("devices/virtual/block/dm-2/slaves/nvme0n1", &disk);
        // A tree that leads back to itself ends.
        tree.link("devices/virtual/block/dm-3/slaves/dm-3", &mapped[3]);
        let raid = tree.device("virtual/block/md0");
        write(&raid, "md/level", "raid0\n");
        let file = tree.device("virtual/block/loop0");
        write(&file, "loop/backing_file", "/srv/image.raw\n");
        let far = tree.device("virtual/nvme-fabrics/ctl/nvme1/nvme1n1");
        write(far.parent().unwrap(), "transport", "rdma\n");
        let head = tree.device("virtual/nvme-subsystem/nvme-subsys0/nvme2n1");
        let controller = tree.device("virtual/nvme-fabrics/ctl/nvme2");
        write(&controller, "transport", "tcp\n");
        let link = "devices/virtual/nvme-subsystem/nvme-subsys0/nvme2";
        tree.link(link, &controller);
        let zram = tree.device("virtual/block/zram0");
        let sysfs = Sysfs::at(&tree.0);
        for (minor, (device, names)) in [
            (
                &mapped[0],
                "dm-0 (LVM), dm-1 (dm-crypt), nvme0n1p3 (partition), nvme0n1 (disk)",
            ),
            (&mapped[2], "dm-2 (dm-multipath), nvme0n1 (disk)"),
            (&mapped[3], "dm-3 (device mapper)"),
            (&raid, "md0 (md raid0)"),
            (&file, "loop0 (loop device of /srv/image.raw)"),
            (&far, "nvme1n1 (NVMe over rdma)"),
            (&head, "nvme2n1 (NVMe over tcp)"),
            (&zram, "zram0 (memory)"),
            (&disk, "nvme0n1 (disk)"),
        ]
        .into_iter()
        .enumerate()
        {
            tree.link(&format!("dev/block/9:{minor}"), device);
            let layers: Vec<String> = sysfs
                .stack(9, minor as u32)
                .iter()
                .map(|layer| format!("{} ({})", layer.name, layer.kind.name()))
                .collect();
            assert_eq!(layers.join(", "), names);
        }
        assert_eq!(sysfs.stack(9, 99), []);
    }
}
