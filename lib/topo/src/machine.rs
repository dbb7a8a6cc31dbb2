//! The facts about a machine's PCI functions. `None` means unknown, which differs from known to be absent.

use std::collections::HashMap;

use peerbuf_core::PciAddress;
use serde::{Deserialize, Serialize};

/// The index of a function in [`Machine::functions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Index(pub u32);

/// A machine: its host bridges, their functions, and the facts that determine peer-to-peer DMA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The source of the facts.
    pub format: Format,
    /// The kernel's version.
    pub kernel: Option<Kernel>,
    /// The processor.
    pub processor: Option<Processor>,
    /// Whether it is a virtual machine.
    pub is_virtual: Option<bool>,
    /// Whether it was read in a container, which hides devices.
    pub in_container: Option<bool>,
    /// The options on the kernel's command line that affect peer-to-peer DMA; others are not kept.
    pub options: Option<Vec<String>>,
    /// The number of NUMA nodes.
    pub nodes: Option<u32>,
    /// The host bridges.
    pub hosts: Vec<Host>,
    /// The functions. A bridge comes before the functions below it.
    pub functions: Vec<Function>,
}

/// The source of a machine's facts. All but sysfs lack some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Format {
    /// sysfs: everything; ACS only as root.
    Sysfs,
    /// `lspci -vvv`: no IOMMU domains, no DMA masks, no kernel version or options.
    Lspci,
    /// `rdma_topo dump`: no kernel version or options, no processor, and only some devices.
    RdmaTopo,
    /// hwloc's XML: no ACS, no BARs, no IOMMU groups, and usually no functions of the host bridges.
    Hwloc,
    /// NCCL's XML: no root complex, and not all bridges.
    Nccl,
}

impl Format {
    /// The human-readable name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Sysfs => "sysfs",
            Format::Lspci => "lspci -vvv",
            Format::RdmaTopo => "rdma_topo dump",
            Format::Hwloc => "hwloc's XML",
            Format::Nccl => "NCCL's XML",
        }
    }

    /// The facts that it lacks; empty for sysfs.
    pub fn lacks(self) -> &'static str {
        match self {
            Format::Sysfs => "",
            Format::Lspci => "kernel and its options, processor, IOMMU domains, DMA masks",
            Format::RdmaTopo => {
                "kernel and its options, processor, drivers, BARs, IOMMU domains, DMA masks, most devices"
            }
            Format::Hwloc => "kernel and its options, drivers, ACS, BARs, IOMMU groups, DMA masks",
            Format::Nccl => {
                "kernel and its options, root complex, drivers, ACS, BARs, IOMMU groups, DMA masks"
            }
        }
    }
}

/// A kernel version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Kernel {
    /// 7 of 7.3.4.
    pub major: u16,
    /// 3 of 7.3.4.
    pub minor: u16,
    /// 4 of 7.3.4.
    pub patch: u16,
}

impl Kernel {
    /// Parses the numbers at the start of a release (`uname -r`).
    pub fn parse(release: &str) -> Option<Kernel> {
        let digits = release
            .trim()
            .split(|c: char| !c.is_ascii_digit() && c != '.');
        let mut numbers = digits.clone().next()?.split('.');
        let mut next = || numbers.next().and_then(|number| number.parse().ok());
        Some(Kernel {
            major: next()?,
            minor: next()?,
            patch: next().unwrap_or(0),
        })
    }

    /// Whether the version is in this series or a later one.
    pub fn at_least(self, major: u16, minor: u16) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{}.{}.{}", self.major, self.minor, self.patch))
    }
}

/// A processor, as far as the kernel's rules distinguish it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Processor {
    /// The vendor, such as `AuthenticAMD`; empty for a processor that is not x86.
    pub vendor: String,
    /// The family, extended family included.
    pub family: u16,
}

/// A host bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Host {
    /// The name, such as `pci0000:00`.
    pub name: String,
    /// The format lists every function of the root bus, so the first one is known.
    pub complete: bool,
    /// The format identifies the host bridge. Otherwise it only groups devices by proximity.
    pub certain: bool,
}

/// A PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Function {
    /// The PCI address.
    #[serde(with = "address")]
    pub address: PciAddress,
    /// The bridge above it; `None` on a root bus.
    pub parent: Option<Index>,
    /// The index of its host bridge in [`Machine::hosts`].
    pub host: u32,
    /// The number of bridges above it.
    pub depth: u16,
    /// Vendor ID and device ID.
    pub id: Option<(u16, u16)>,
    /// The 24-bit class code.
    pub class: Option<u32>,
    /// The PCI Express device or port type.
    pub port: Option<Port>,
    /// The access control services (ACS).
    pub acs: Option<Acs>,
    /// The memory BARs.
    pub bars: Option<Vec<Bar>>,
    /// The link to the bridge above it.
    pub link: Option<Link>,
    /// Its relation to the IOMMU.
    pub iommu: Option<Iommu>,
    /// The NUMA node.
    pub node: Option<u32>,
    /// The width of the DMA mask in bits.
    pub dma_bits: Option<u8>,
    /// The driver.
    pub driver: Option<Driver>,
    /// True for a virtual function (SR-IOV).
    pub is_virtual: bool,
    /// The size in bytes of the P2PDMA memory that its driver publishes (`p2pmem`).
    pub lends: Option<u64>,
    /// The size in bytes of an NVMe disk's controller memory buffer (CMB); 0 if it has none.
    #[serde(default)]
    pub cmb: Option<u64>,
    /// Names that its drivers gave it, such as `nvme0n1`, `mlx5_0`, `renderD128`.
    pub names: Vec<String>,
}

impl Function {
    /// The ID of a bridge that a snapshot made up to group devices. No device has it: sysfs and lspci read it where
    /// nothing answers.
    pub(crate) const PLACEHOLDER: (u16, u16) = (0xffff, 0xffff);

    /// Whether the snapshot made this bridge up: devices below it are grouped, but share no known switch.
    pub fn is_placeholder(&self) -> bool {
        self.id == Some(Function::PLACEHOLDER)
    }

    /// A function with nothing known but its address.
    pub fn at(address: PciAddress) -> Function {
        Function {
            address,
            parent: None,
            host: 0,
            depth: 0,
            id: None,
            class: None,
            port: None,
            acs: None,
            bars: None,
            link: None,
            iommu: None,
            node: None,
            dma_bits: None,
            driver: None,
            is_virtual: false,
            lends: None,
            cmb: None,
            names: Vec::new(),
        }
    }

    /// The kind of device.
    pub fn kind(&self) -> Kind {
        let Some(class) = self.class else {
            return Kind::Other;
        };
        match (class >> 16, (class >> 8) & 0xff) {
            (0x01, 0x08) => Kind::Nvme,
            (0x01, _) => Kind::Disk,
            (0x02, _) => Kind::Nic,
            (0x03, _) => Kind::Gpu,
            (0x04, 0x00 | 0x80) => Kind::Capture,
            (0x05, _) => Kind::Memory,
            (0x06, _) => Kind::Bridge,
            (0x12, _) => Kind::Accelerator,
            // Old InfiniBand controllers.
            (0x0c, 0x06) => Kind::Nic,
            _ => Kind::Other,
        }
    }

    /// The largest memory BAR.
    pub fn largest_bar(&self) -> Option<&Bar> {
        self.bars.iter().flatten().max_by_key(|bar| bar.size)
    }
}

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Kind {
    /// A GPU or other display controller.
    Gpu,
    /// An accelerator.
    Accelerator,
    /// An NVMe disk.
    Nvme,
    /// Another storage controller.
    Disk,
    /// A network or RDMA adapter.
    Nic,
    /// A capture card.
    Capture,
    /// A memory controller, such as an FPGA's.
    Memory,
    /// A bridge.
    Bridge,
    /// Anything else.
    Other,
}

impl Kind {
    /// The human-readable name.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Gpu => "GPU",
            Kind::Accelerator => "accelerator",
            Kind::Nvme => "NVMe disk",
            Kind::Disk => "storage controller",
            Kind::Nic => "network card",
            Kind::Capture => "capture card",
            Kind::Memory => "memory card",
            Kind::Bridge => "bridge",
            Kind::Other => "device",
        }
    }

    /// Whether buffers are commonly shared with devices of this kind.
    pub fn matters(self) -> bool {
        !matches!(self, Kind::Bridge | Kind::Other | Kind::Disk)
    }
}

/// A PCI Express device or port type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Port {
    /// An endpoint.
    Endpoint,
    /// A root port.
    RootPort,
    /// A switch's upstream port.
    Upstream,
    /// A switch's downstream port.
    Downstream,
    /// A bridge to or from conventional PCI.
    Bridge,
    /// A part of the root complex.
    RootComplex,
    /// Not PCI Express.
    Conventional,
}

/// Access control services (PCIe specification, 7.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acs {
    /// The function has no ACS capability.
    Absent,
    /// The value of the ACS control register.
    Control(u16),
}

impl Acs {
    /// P2P Request Redirect, P2P Completion Redirect and P2P Egress Control: the bits that the kernel tests.
    pub const REDIRECT: u16 = 0x04 | 0x08 | 0x20;
    /// The bits with their names in lspci.
    pub const BITS: [(u16, &str); 7] = [
        (0x01, "SrcValid"),
        (0x02, "TransBlk"),
        (0x04, "ReqRedir"),
        (0x08, "CmpltRedir"),
        (0x10, "UpstreamFwd"),
        (0x20, "EgressCtrl"),
        (0x40, "DirectTrans"),
    ];

    /// Whether it redirects peer-to-peer requests to the host bridge.
    pub fn redirects(self) -> bool {
        matches!(self, Acs::Control(control) if control & Acs::REDIRECT != 0)
    }
}

/// A memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Bar {
    /// The index, 0 to 5.
    pub index: u8,
    /// The size in bytes.
    pub size: u64,
    /// The number of bits of its last address. The address itself is not kept.
    pub address_bits: u8,
    /// It is a 64-bit BAR.
    pub is_64bit: bool,
    /// It is prefetchable.
    pub prefetchable: bool,
    /// The largest size in bytes, if the BAR is resizable.
    pub resizable_to: Option<u64>,
}

/// A link: its current speed and width, and the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Link {
    /// In tenths of GT/s.
    pub speed: u16,
    /// The number of lanes.
    pub width: u8,
    /// The maximum speed and width of this end.
    pub most: Option<(u16, u8)>,
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let speed = |speed: u16| match speed % 10 {
            0 => format!("{}", speed / 10),
            tenth => format!("{}.{tenth}", speed / 10),
        };
        write!(f, "x{} {} GT/s", self.width, speed(self.speed))?;
        match self.most {
            Some((most, width)) if (most, width) != (self.speed, self.width) => {
                write!(f, " (of x{width} {})", speed(most))
            }
            _ => Ok(()),
        }
    }
}

/// A device's relation to the IOMMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Iommu {
    /// No IOMMU handles the device.
    None,
    /// The device is in an IOMMU group.
    Group {
        /// The group's number.
        number: u32,
        /// The type of its domain: `DMA`, `DMA-FQ`, `identity`, ...
        domain: Option<String>,
    },
}

impl Iommu {
    /// Whether the IOMMU translates the device's addresses.
    pub fn translates(&self) -> Option<bool> {
        match self {
            Iommu::None => Some(false),
            Iommu::Group { domain, .. } => domain.as_ref().map(|domain| domain != "identity"),
        }
    }
}

/// A device's driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Driver {
    /// No driver is bound.
    None,
    /// The name of the bound driver.
    Bound(String),
}

impl Machine {
    /// A machine without devices.
    pub fn empty(format: Format) -> Machine {
        Machine {
            format,
            kernel: None,
            processor: None,
            is_virtual: None,
            in_container: None,
            options: None,
            nodes: None,
            hosts: Vec::new(),
            functions: Vec::new(),
        }
    }

    /// The function at an index from this machine.
    pub fn function(&self, index: Index) -> &Function {
        &self.functions[index.0 as usize]
    }

    /// All functions with their indices.
    pub fn each(&self) -> impl Iterator<Item = (Index, &Function)> {
        (0..).map(Index).zip(&self.functions)
    }

    /// The index of the function with this address.
    pub fn find(&self, address: PciAddress) -> Option<Index> {
        let found = self
            .each()
            .find(|(_, function)| function.address == address);
        found.map(|(index, _)| index)
    }

    /// The index of the function with this name, such as `nvme0n1`. The name of a partition finds its disk.
    pub fn named(&self, name: &str) -> Option<Index> {
        let has = |function: &Function| function.names.iter().any(|known| known == name);
        let found = self.each().find(|(_, function)| has(function));
        found.map(|(index, _)| index)
    }

    /// The function itself and the bridges above it, from the bottom up.
    pub fn upwards(&self, from: Index) -> impl Iterator<Item = Index> {
        std::iter::successors(Some(from), |at| self.function(*at).parent)
    }

    /// The devices of a kind that buffers are shared with, without virtual functions.
    pub fn devices_that_matter(&self) -> Vec<Index> {
        let all = self.each();
        let matters = |function: &Function| {
            let lends = function.lends.is_some();
            let taken = matches!(&function.driver, Some(Driver::Bound(name)) if name == "peerbuf" || name == "vfio-pci");
            // NCCL's files list only such devices, some without a class.
            let named = self.format == Format::Nccl && function.class.is_none();
            !function.is_virtual && (function.kind().matters() || lends || taken || named)
        };
        all.filter(|(_, function)| matters(function))
            .map(|(index, _)| index)
            .collect()
    }

    /// Sorts functions by host bridge and address, a bridge before the functions below it. Each comes with
    /// the index of its bridge in `unsorted`. Functions whose bridges form a cycle are dropped.
    pub(crate) fn arrange(&mut self, unsorted: Vec<(Function, Option<usize>)>) {
        let mut children: HashMap<Option<usize>, Vec<usize>> = HashMap::new();
        for (at, (_, parent)) in unsorted.iter().enumerate() {
            children.entry(*parent).or_default().push(at);
        }
        for list in children.values_mut() {
            list.sort_by_key(|at| (unsorted[*at].0.host, unsorted[*at].0.address));
        }
        let mut functions: Vec<Option<Function>> = unsorted
            .into_iter()
            .map(|(function, _)| Some(function))
            .collect();
        let roots = children.remove(&None).unwrap_or_default();
        let mut waiting: Vec<(usize, Option<Index>, u16)> =
            roots.into_iter().rev().map(|at| (at, None, 0)).collect();
        while let Some((at, parent, depth)) = waiting.pop() {
            let Some(mut function) = functions[at].take() else {
                continue;
            };
            if let Some(parent) = parent {
                function.host = self.function(parent).host;
            }
            function.parent = parent;
            function.depth = depth;
            function.names.retain(|name| is_plain(name));
            let index = Index(self.functions.len() as u32);
            self.functions.push(function);
            let below = children.remove(&Some(at)).unwrap_or_default();
            let below = below.into_iter().rev();
            waiting.extend(below.map(|at| (at, Some(index), depth.saturating_add(1))));
        }
    }

    /// The index of the host bridge with this name; adds it if it is new.
    pub(crate) fn host(&mut self, name: &str, complete: bool, certain: bool) -> u32 {
        let known = self.hosts.iter().position(|host| host.name == name);
        let place = known.unwrap_or_else(|| {
            self.hosts.push(Host {
                name: name.to_owned(),
                complete,
                certain,
            });
            self.hosts.len() - 1
        });
        place as u32
    }

    /// Whether indices and depths are consistent and all names printable. A file from elsewhere may violate
    /// both.
    pub(crate) fn is_sound(&self) -> bool {
        let plain = self.hosts.iter().all(|host| is_plain(&host.name));
        plain
            && self.each().all(|(index, function)| {
                let mut names = function.names.iter().chain(match &function.driver {
                    Some(Driver::Bound(driver)) => Some(driver),
                    _ => None,
                });
                let above = match function.parent {
                    None => function.depth == 0,
                    Some(parent) => {
                        parent < index && {
                            let above = self.function(parent);
                            above.depth.checked_add(1) == Some(function.depth)
                                && above.host == function.host
                        }
                    }
                };
                above
                    && (function.host as usize) < self.hosts.len()
                    && names.all(|name| is_plain(name))
            })
    }
}

/// Whether a terminal prints the name unchanged.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.len() < 256 && name.bytes().all(|byte| byte.is_ascii_graphic())
}

mod address {
    use super::PciAddress;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(address: &PciAddress, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(address)
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<PciAddress, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_a_version_whatever_follows_it() {
        for (release, expected) in [
            ("7.3.4+deb13-amd64", Some((7, 3, 4))),
            ("6.12\n", Some((6, 12, 0))),
            ("5.14.0-427.el9.x86_64", Some((5, 14, 0))),
            ("7.3-rc7", Some((7, 3, 0))),
            ("next", None),
            ("", None),
            ("99999.1", None),
        ] {
            let expected = expected.map(|(major, minor, patch)| Kernel {
                major,
                minor,
                patch,
            });
            assert_eq!(Kernel::parse(release), expected, "{release:?}");
        }
    }

    #[test]
    fn functions_are_arranged_below_their_bridges_and_circles_are_left_out() {
        let function = |text: &str| Function::at(text.parse().unwrap());
        let mut machine = Machine::empty(Format::Lspci);
        machine.host("pci0000:00", true, true);
        machine.arrange(vec![
            (function("0000:02:00.0"), Some(1)),
            (function("0000:00:01.0"), None),
            (function("0000:05:00.0"), Some(3)),
            (function("0000:06:00.0"), Some(2)),
            (function("0000:00:00.0"), None),
        ]);
        let order: Vec<String> = machine
            .functions
            .iter()
            .map(|f| f.address.to_string())
            .collect();
        assert_eq!(order, ["0000:00:00.0", "0000:00:01.0", "0000:02:00.0"]);
        assert!(machine.is_sound());
        machine.functions[2].depth = 5;
        assert!(!machine.is_sound());
    }
}
