//! A machine's PCI functions as facts. A fact that could not be read is `None`, which is not the same
//! as a fact that is known to be absent.

use std::collections::HashMap;

use peerbuf_core::PciAddress;
use serde::{Deserialize, Serialize};

/// The place of a function in [`Machine::functions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Index(pub u32);

/// A machine: its host bridges, the functions below them, and what decides about traffic between these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// What this was read from.
    pub format: Format,
    /// The version of the kernel.
    pub kernel: Option<Kernel>,
    /// The processor.
    pub processor: Option<Processor>,
    /// Whether the machine is a virtual one.
    pub is_virtual: Option<bool>,
    /// Whether this was read in a container, which hides devices.
    pub in_container: Option<bool>,
    /// The kernel's command line, of which only what matters for DMA between devices is kept.
    pub options: Option<Vec<String>>,
    /// How many NUMA nodes there are.
    pub nodes: Option<u32>,
    /// The host bridges.
    pub hosts: Vec<Host>,
    /// The functions. A bridge comes before what is below it.
    pub functions: Vec<Function>,
}

/// What a machine was read from. Each lacks something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// sysfs: everything, but ACS for root only.
    Sysfs,
    /// `lspci -vvv`: no IOMMU groups, no DMA masks, no kernel.
    Lspci,
    /// `rdma_topo dump`: no kernel, no processor, and only some devices.
    RdmaTopo,
    /// hwloc's XML: no ACS, no BARs, no IOMMU groups, and often no host bridges' own functions.
    Hwloc,
    /// NCCL's XML: no root complex, and not all bridges.
    Nccl,
}

impl Format {
    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Format::Sysfs => "sysfs",
            Format::Lspci => "lspci -vvv",
            Format::RdmaTopo => "rdma_topo dump",
            Format::Hwloc => "hwloc's XML",
            Format::Nccl => "NCCL's XML",
        }
    }

    /// What it never tells; empty for sysfs.
    pub fn lacks(self) -> &'static str {
        match self {
            Format::Sysfs => "",
            Format::Lspci => "kernel, processor, IOMMU groups, DMA masks",
            Format::RdmaTopo => "kernel, processor, BARs, DMA masks, most devices",
            Format::Hwloc => "kernel, ACS, BARs, IOMMU groups, DMA masks",
            Format::Nccl => "kernel, root complex, ACS, BARs, IOMMU groups, DMA masks",
        }
    }
}

/// A kernel's version.
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
    /// The numbers at the beginning of a release (`uname -r`).
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

    /// Whether it is of this series or a later one.
    pub fn at_least(self, major: u16, minor: u16) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{}.{}.{}", self.major, self.minor, self.patch))
    }
}

/// A processor, as far as the kernel's rules look at it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// Such as `AuthenticAMD`; empty for one that is not x86.
    pub vendor: String,
    /// The family, with its extension added.
    pub family: u16,
}

/// A host bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Such as `pci0000:00`.
    pub name: String,
    /// The format tells every function of the root bus, so that the first one is known.
    pub complete: bool,
    /// The format tells that this is one host bridge. Otherwise devices were only seen near to each other.
    pub certain: bool,
}

/// A PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Where it is.
    #[serde(with = "address")]
    pub address: PciAddress,
    /// The bridge above it; `None` on a root bus.
    pub parent: Option<Index>,
    /// The place of its host bridge in [`Machine::hosts`].
    pub host: u32,
    /// How many bridges are above it.
    pub depth: u16,
    /// Vendor and device id.
    pub id: Option<(u16, u16)>,
    /// The class code, of 24 bits.
    pub class: Option<u32>,
    /// What it is on PCI Express.
    pub port: Option<Port>,
    /// Its access control services.
    pub acs: Option<Acs>,
    /// Its memory BARs.
    pub bars: Option<Vec<Bar>>,
    /// Its link to the bridge above it.
    pub link: Option<Link>,
    /// How the IOMMU sees it.
    pub iommu: Option<Iommu>,
    /// Its NUMA node.
    pub node: Option<u32>,
    /// How many address bits its driver says that it can use.
    pub dma_bits: Option<u8>,
    /// Its driver.
    pub driver: Option<Driver>,
    /// It is a virtual function.
    pub is_virtual: bool,
    /// Memory that its driver lends to peers, in bytes (`p2pmem`).
    pub lends: Option<u64>,
    /// Names of what its drivers made of it, such as `nvme0n1`, `mlx5_0`, `renderD128`.
    pub names: Vec<String>,
}

impl Function {
    /// A function of which only the place is known.
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
            names: Vec::new(),
        }
    }

    /// What it is for us.
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
            // InfiniBand controllers of old.
            (0x0c, 0x06) => Kind::Nic,
            _ => Kind::Other,
        }
    }

    /// Its largest memory BAR.
    pub fn largest_bar(&self) -> Option<&Bar> {
        self.bars.iter().flatten().max_by_key(|bar| bar.size)
    }
}

/// What a device is for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A graphics card, or what looks like one.
    Gpu,
    /// An accelerator.
    Accelerator,
    /// An NVMe disk.
    Nvme,
    /// Another storage controller.
    Disk,
    /// A network or RDMA card.
    Nic,
    /// A card that takes pictures.
    Capture,
    /// A card of memory, such as an FPGA shows.
    Memory,
    /// A bridge.
    Bridge,
    /// Anything else.
    Other,
}

impl Kind {
    /// Its name, for people.
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

    /// Whether buffers are commonly shared with such a device.
    pub fn matters(self) -> bool {
        !matches!(self, Kind::Bridge | Kind::Other | Kind::Disk)
    }
}

/// What a function is on PCI Express.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Port {
    /// A device.
    Endpoint,
    /// A root port.
    RootPort,
    /// A switch's port towards the root.
    Upstream,
    /// A switch's port towards a device.
    Downstream,
    /// A bridge to or from conventional PCI.
    Bridge,
    /// Part of the root complex.
    RootComplex,
    /// Not PCI Express.
    Conventional,
}

/// Access control services (PCIe 7.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acs {
    /// The function has none.
    Absent,
    /// It has, and the control register says this.
    Control(u16),
}

impl Acs {
    /// P2P Request Redirect, P2P Completion Redirect, P2P Egress Control: what the kernel looks at.
    pub const REDIRECT: u16 = 0x04 | 0x08 | 0x20;
    /// The bits and their names, as lspci writes them.
    pub const BITS: [(u16, &str); 7] = [
        (0x01, "SrcValid"),
        (0x02, "TransBlk"),
        (0x04, "ReqRedir"),
        (0x08, "CmpltRedir"),
        (0x10, "UpstreamFwd"),
        (0x20, "EgressCtrl"),
        (0x40, "DirectTrans"),
    ];

    /// Whether it sends requests between peers to the host bridge.
    pub fn redirects(self) -> bool {
        matches!(self, Acs::Control(control) if control & Acs::REDIRECT != 0)
    }
}

/// A memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bar {
    /// 0 to 5.
    pub index: u8,
    /// In bytes.
    pub size: u64,
    /// How many bits its last address has. The address itself is not kept.
    pub address_bits: u8,
    /// Its type has 64 bits.
    pub is_64bit: bool,
    /// It may be read and written like memory.
    pub prefetchable: bool,
    /// The largest size it can be given, in bytes, where it can be resized.
    pub resizable_to: Option<u64>,
}

/// A link: what it runs at, and what it could.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// In tenths of GT/s.
    pub speed: u16,
    /// Lanes.
    pub width: u8,
    /// The same of the most that this end can do.
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

/// How the IOMMU sees a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Iommu {
    /// None does.
    None,
    /// It is in a group.
    Group {
        /// The group's number.
        number: u32,
        /// The type of its domain: `DMA`, `DMA-FQ`, `identity`, ...
        domain: Option<String>,
    },
}

impl Iommu {
    /// Whether the device's addresses are translated.
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
pub enum Driver {
    /// None has it.
    None,
    /// This one has.
    Bound(String),
}

impl Machine {
    /// One without devices.
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

    /// The function at this place, which this machine has given out.
    pub fn function(&self, index: Index) -> &Function {
        &self.functions[index.0 as usize]
    }

    /// Each function with its place.
    pub fn each(&self) -> impl Iterator<Item = (Index, &Function)> {
        (0..).map(Index).zip(&self.functions)
    }

    /// The place of the function at this address.
    pub fn find(&self, address: PciAddress) -> Option<Index> {
        let found = self
            .each()
            .find(|(_, function)| function.address == address);
        found.map(|(index, _)| index)
    }

    /// The place of the function with this name, such as `nvme0n1`. A partition's name finds its disk.
    pub fn named(&self, name: &str) -> Option<Index> {
        let has = |function: &Function| function.names.iter().any(|known| known == name);
        let found = self.each().find(|(_, function)| has(function));
        found.map(|(index, _)| index)
    }

    /// The function itself and the bridges above it, the closest first.
    pub fn upwards(&self, from: Index) -> impl Iterator<Item = Index> {
        std::iter::successors(Some(from), |at| self.function(*at).parent)
    }

    /// Devices that buffers are shared with, without virtual functions.
    pub fn devices_that_matter(&self) -> Vec<Index> {
        let all = self.each();
        let matters = |function: &Function| {
            let lends = function.lends.is_some();
            let taken = matches!(&function.driver, Some(Driver::Bound(name)) if name == "peerbuf" || name == "vfio-pci");
            // NCCL's files name only what matters, and of some not what they are.
            let named = self.format == Format::Nccl && function.class.is_none();
            !function.is_virtual && (function.kind().matters() || lends || taken || named)
        };
        all.filter(|(_, function)| matters(function))
            .map(|(index, _)| index)
            .collect()
    }

    /// Puts functions, each with the place that its bridge has among them, in order: sorted by host bridge
    /// and address, a bridge before what is below it. Those whose bridges form a circle are left out.
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

    /// The place of a host bridge of this name, new if need be.
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

    /// Whether places and depths agree with each other, and names are such as can be printed, as they must in
    /// a file from elsewhere.
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

/// Whether a terminal shows it as it is.
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
