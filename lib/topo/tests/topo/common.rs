//! Machines that are made up, as trees of sysfs and of /proc.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use peerbuf_topo::machine::Index;
use peerbuf_topo::{Argument, Machine, Rules, argue};
use tempfile::TempDir;

/// A tree in a folder.
pub struct Tree {
    directory: TempDir,
}

/// What a function says of itself. Numbers are as in its configuration space.
#[derive(Clone)]
pub struct Spec {
    pub id: (u16, u16),
    pub class: u32,
    /// 0 endpoint, 4 root port, 5 upstream, 6 downstream.
    pub port: u16,
    pub acs: Option<u16>,
    pub driver: Option<&'static str>,
    /// Begin and size.
    pub bar: Option<(u64, u64)>,
    pub resizable_to: Option<u64>,
    pub group: Option<(u32, &'static str)>,
    pub node: Option<u32>,
    pub dma_bits: Option<u8>,
    /// Class and name.
    pub names: &'static [(&'static str, &'static str)],
    /// Only what a user may read.
    pub for_users: bool,
    /// Lanes now, of 16.
    pub lanes: u16,
}

pub const BRIDGE: Spec = Spec {
    id: (0x8086, 0x2030),
    class: 0x0006_0400,
    port: 4,
    acs: Some(0),
    driver: Some("pcieport"),
    bar: None,
    resizable_to: None,
    group: None,
    node: None,
    dma_bits: None,
    names: &[],
    for_users: false,
    lanes: 16,
};

pub fn port(kind: u16) -> Spec {
    Spec {
        id: (0x10b5, 0x8747),
        port: kind,
        ..BRIDGE
    }
}

pub fn host_bridge(vendor: u16, device: u16) -> Spec {
    Spec {
        id: (vendor, device),
        class: 0x0006_0000,
        port: 9,
        acs: None,
        driver: None,
        ..BRIDGE
    }
}

pub fn gpu() -> Spec {
    Spec {
        id: (0x10de, 0x20b0),
        class: 0x0003_0200,
        port: 0,
        acs: None,
        driver: Some("nvidia"),
        bar: Some((0x38_0000_0000, 64 << 30)),
        dma_bits: Some(47),
        names: &[("drm", "renderD128")],
        ..BRIDGE
    }
}

pub fn nvme() -> Spec {
    Spec {
        id: (0x144d, 0xa808),
        class: 0x0001_0802,
        port: 0,
        acs: None,
        driver: Some("nvme"),
        bar: Some((0xfe00_0000, 16 << 10)),
        dma_bits: Some(64),
        names: &[("nvme/nvme0", "nvme0n1")],
        ..BRIDGE
    }
}

pub fn nic() -> Spec {
    Spec {
        id: (0x15b3, 0x101b),
        class: 0x0002_0700,
        driver: Some("mlx5_core"),
        names: &[("infiniband", "mlx5_0"), ("net", "ibp1s0")],
        ..nvme()
    }
}

impl Tree {
    /// `processor`: vendor and family of an x86, if it is known.
    pub fn new(
        kernel: Option<&str>,
        processor: Option<(&str, u16)>,
        is_virtual: bool,
        options: &str,
    ) -> Tree {
        let tree = Tree {
            directory: TempDir::new().unwrap(),
        };
        fs::create_dir_all(tree.path("proc/sys/kernel")).unwrap();
        fs::create_dir_all(tree.path("sys/bus/pci/devices")).unwrap();
        fs::create_dir_all(tree.path("sys/devices/system/node/node0")).unwrap();
        if let Some(kernel) = kernel {
            fs::write(tree.path("proc/sys/kernel/osrelease"), kernel).unwrap();
        }
        if let Some((vendor, family)) = processor {
            let hypervisor = if is_virtual { " hypervisor" } else { "" };
            let text = format!(
                "processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: fpu{hypervisor}\n"
            );
            fs::write(tree.path("proc/cpuinfo"), text).unwrap();
        }
        fs::write(tree.path("proc/cmdline"), options).unwrap();
        tree
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.directory.path().join(below)
    }

    /// `place`: `pci0000:00/0000:00:01.0`.
    pub fn add(&self, place: &str, spec: &Spec) -> &Tree {
        let directory = self.path("sys/devices").join(place);
        fs::create_dir_all(&directory).unwrap();
        let write = |name: &str, text: String| fs::write(directory.join(name), text).unwrap();
        let (vendor, device) = spec.id;
        let driver = spec
            .driver
            .map(|name| format!("DRIVER={name}\n"))
            .unwrap_or_default();
        write(
            "uevent",
            format!(
                "{driver}PCI_CLASS={:X}\nPCI_ID={vendor:04X}:{device:04X}\n",
                spec.class
            ),
        );
        let config = config(spec);
        fs::write(
            directory.join("config"),
            &config[..if spec.for_users { 64 } else { 4096 }],
        )
        .unwrap();
        let (begin, end, flags) = match spec.bar {
            Some((begin, size)) => (begin, begin + size - 1, 0x0014_220c),
            None => (0, 0, 0),
        };
        write(
            "resource",
            format!("{begin:#018x} {end:#018x} {flags:#018x}\n"),
        );
        if let Some(bits) = spec.dma_bits {
            write("dma_mask_bits", bits.to_string());
        }
        write(
            "numa_node",
            spec.node.map_or("-1".into(), |node| node.to_string()),
        );
        if let Some((group, domain)) = spec.group {
            let groups = self.path("sys/kernel/iommu_groups").join(group.to_string());
            fs::create_dir_all(&groups).unwrap();
            fs::write(groups.join("type"), domain).unwrap();
            symlink(groups, directory.join("iommu_group")).unwrap();
        }
        for (class, name) in spec.names {
            fs::create_dir_all(directory.join(class).join(name)).unwrap();
        }
        let address = place.rsplit('/').next().unwrap();
        let target = format!("../../../devices/{place}");
        symlink(target, self.path("sys/bus/pci/devices").join(address)).unwrap();
        self
    }

    pub fn read(&self) -> Machine {
        peerbuf_topo::open(self.directory.path()).unwrap()
    }
}

fn config(spec: &Spec) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0x00, u32::from(spec.id.1) << 16 | u32::from(spec.id.0));
    put(0x04, 0x0010_0000);
    put(0x08, spec.class << 8);
    put(0x34, 0x40);
    put(0x40, u32::from(spec.port) << 20 | 0x0002_0010);
    put(0x4c, 0x104);
    put(0x50, (u32::from(spec.lanes) << 4 | 4) << 16);
    let next = if spec.acs.is_some() { 0x1400_0000 } else { 0 };
    match spec.resizable_to {
        Some(size) => {
            put(0x100, next | 0x0001_0015);
            put(0x104, 1 << (size.ilog2() - 20 + 4));
            put(0x108, 1 << 5);
        }
        None => put(0x100, next | 0x0001_0001),
    }
    if let Some(control) = spec.acs {
        put(0x140, 0x0001_000d);
        put(0x144, u32::from(control) << 16);
    }
    bytes
}

pub fn at(machine: &Machine, address: &str) -> Index {
    machine
        .find(address.parse().unwrap())
        .unwrap_or_else(|| panic!("no {address}"))
}

/// About `client`'s use of the memory of `provider`.
pub fn ask(machine: &Machine, client: &str, provider: &str) -> Argument {
    argue(
        &Rules::new(machine, None),
        at(machine, client),
        at(machine, provider),
    )
}
