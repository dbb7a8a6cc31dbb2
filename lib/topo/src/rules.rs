//! The kernel's rules for DMA between two devices (`drivers/pci/p2pdma.c`, `calc_map_type_and_dist`), as of
//! Linux 5.9 to 7.3.
//!
//! 1. The closest common bridge decides. Without ACS redirection on the way, requests stay below it: bus
//!    addresses.
//! 2. Otherwise requests go through the host bridge. The kernel allows that on AMD processors from family 17h
//!    on, and if the first function of the root bus is on its list ([`ALLOWED`]).
//!
//! The answer is the same for reads and writes, and symmetric in the two devices. Unknown facts leave several
//! answers possible ([`Possible`]).

use crate::machine::{Acs, Format, Function, Index, Kernel, Machine, Port};

/// The kernel's mapping of one device's memory for another (`enum pci_p2pdma_map_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Map {
    /// By bus addresses: traffic stays below a common bridge.
    BusAddress,
    /// Through the host bridge.
    HostBridge,
    /// No mapping.
    NotSupported,
}

impl Map {
    /// All variants.
    pub const ALL: [Map; 3] = [Map::BusAddress, Map::HostBridge, Map::NotSupported];

    /// The human-readable name.
    pub fn name(self) -> &'static str {
        match self {
            Map::BusAddress => "bus address",
            Map::HostBridge => "through host bridge",
            Map::NotSupported => "not supported",
        }
    }
}

/// The answers that are possible given the known facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Possible(u8);

impl Possible {
    const NOTHING: Possible = Possible(0);

    fn only(map: Map) -> Possible {
        Possible(1 << map as u8)
    }

    fn or(self, other: Possible) -> Possible {
        Possible(self.0 | other.0)
    }

    /// Whether this answer is possible.
    pub fn has(self, map: Map) -> bool {
        self.0 & (1 << map as u8) != 0
    }

    /// The answer, if only one is possible.
    pub fn known(self) -> Option<Map> {
        let mut all = Map::ALL.into_iter().filter(|map| self.has(*map));
        all.next().filter(|_| all.next().is_none())
    }

    /// Whether the kernel allows the mapping; `None` if unknown.
    pub fn allowed(self) -> Option<bool> {
        let yes = self.has(Map::BusAddress) || self.has(Map::HostBridge);
        match (yes, self.has(Map::NotSupported)) {
            (true, false) => Some(true),
            (false, _) => Some(false),
            (true, true) => None,
        }
    }
}

/// The proximity of two devices, in the terms of `nvidia-smi topo -m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Near {
    /// The same function.
    Same,
    /// At most one PCIe switch in between.
    Pix,
    /// Several PCIe switches, but no host bridge.
    Pxb,
    /// One host bridge.
    Phb,
    /// Two host bridges of the same NUMA node.
    Node,
    /// The link between NUMA nodes.
    Sys,
}

impl Near {
    /// nvidia-smi's term.
    pub fn word(self) -> &'static str {
        match self {
            Near::Same => "X",
            Near::Pix => "PIX",
            Near::Pxb => "PXB",
            Near::Phb => "PHB",
            Near::Node => "NODE",
            Near::Sys => "SYS",
        }
    }
}

/// The rule that decided an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// A device reaches its own memory.
    SameFunction,
    /// A common bridge, without redirection.
    CommonBridge,
    /// A common bridge, with unknown ACS.
    CommonBridgeAcsUnknown,
    /// The host bridge, allowed for the processor's family.
    Processor,
    /// The host bridge, which is on the list.
    Listed,
    /// The host bridge, which is not on the list.
    NotListed,
    /// Two host bridges; the list allows only traffic within each.
    ListedForItselfOnly,
    /// The host bridge, whose root bus begins with neither a function 00.0 nor a root port.
    Unnamed,
    /// The host bridge, with an unknown fact.
    HostUnknown,
    /// The bridges above the devices are unknown.
    TreeUnknown,
    /// Kernels before 4.20 have no peer-to-peer mappings.
    KernelTooOld,
}

/// An answer; computed without allocating.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Route {
    /// The possible answers.
    pub possible: Possible,
    /// The closest common bridge; not a [placeholder](Function::is_placeholder).
    pub common: Option<Index>,
    /// The kernel's distance; `None` if bridges are missing from the tree.
    pub distance: Option<u32>,
    /// The proximity, if known.
    pub near: Option<Near>,
    /// ACS on the way redirects requests to the host bridge.
    pub redirected: bool,
    /// The rule that decided.
    pub rule: Rule,
}

/// An entry of the kernel's list of host bridges (`pci_p2pdma_whitelist`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Allowed {
    /// The vendor ID of the root bus's first function.
    pub vendor: u16,
    /// Its device ID; `None` for all of the vendor's.
    pub device: Option<u16>,
    /// Only for traffic within this host bridge.
    pub same_host_bridge: bool,
    /// The first kernel version known to have the entry.
    pub since: (u16, u16),
    /// The last kernel version known to lack it.
    pub not_in: (u16, u16),
}

/// The first kernel version with these rules.
pub const FIRST: (u16, u16) = (5, 9);
/// The last kernel version whose sources were read.
pub const LAST: (u16, u16) = (7, 3);

const fn entry(vendor: u16, device: u16, since: (u16, u16), not_in: (u16, u16)) -> Allowed {
    Allowed {
        vendor,
        device: Some(device),
        same_host_bridge: false,
        since,
        not_in,
    }
}

const fn same_only(device: u16) -> Allowed {
    Allowed {
        same_host_bridge: true,
        ..entry(0x8086, device, FIRST, (5, 3))
    }
}

/// The kernel's list (`pci_p2pdma_whitelist`).
pub const ALLOWED: [Allowed; 25] = [
    // Xeon E5 and E7 up to version 3, Core i7.
    same_only(0x3c00),
    same_only(0x3c01),
    same_only(0x2f00),
    same_only(0x2f01),
    // Skylake-E
    entry(0x8086, 0x2030, FIRST, (5, 3)),
    entry(0x8086, 0x2031, FIRST, (5, 6)),
    entry(0x8086, 0x2032, FIRST, (5, 6)),
    entry(0x8086, 0x2033, FIRST, (5, 6)),
    entry(0x8086, 0x2020, FIRST, (5, 3)),
    // Xeon Scalable from the third generation on
    entry(0x8086, 0x09a2, (5, 18), (5, 17)),
    // Its accelerators (DSA, IAA, QAT), if one of them is the first function.
    entry(0x8086, 0x0b25, (7, 2), (7, 0)),
    entry(0x8086, 0x0cfe, (7, 2), (7, 0)),
    entry(0x8086, 0x11fb, (7, 2), (7, 0)),
    entry(0x8086, 0x1212, (7, 2), (7, 0)),
    entry(0x8086, 0x1216, (7, 2), (7, 0)),
    entry(0x8086, 0x4940, (7, 2), (7, 0)),
    entry(0x8086, 0x4942, (7, 2), (7, 0)),
    entry(0x8086, 0x4944, (7, 2), (7, 0)),
    entry(0x8086, 0x4946, (7, 2), (7, 0)),
    entry(0x8086, 0x4948, (7, 2), (7, 0)),
    // Google's host bridge.
    Allowed {
        vendor: 0x1ae0,
        device: None,
        same_host_bridge: false,
        since: (7, 2),
        not_in: (7, 0),
    },
    // NVIDIA's processors.
    entry(0x10de, 0x2f95, (7, 3), (7, 2)),
    entry(0x10de, 0x2f96, (7, 3), (7, 2)),
    entry(0x10de, 0x2f97, (7, 3), (7, 2)),
    entry(0x10de, 0x2f98, (7, 3), (7, 2)),
];

/// The rules' verdict on traffic through a host bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Allowed.
    Yes(Rule),
    /// Refused.
    No(Rule),
    /// A fact is unknown.
    Unknown(Missing),
}

/// An unknown fact that the rules need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// The first function of the root bus.
    HostBridge,
    /// The processor.
    Processor,
    /// The kernel's version.
    Kernel,
}

/// The kernel's rules for one machine. The constructor examines each host bridge once.
#[derive(Debug)]
pub struct Rules<'m> {
    machine: &'m Machine,
    kernel: Option<Kernel>,
    /// Per host bridge: the verdict within it, and to another.
    trust: Vec<(Trust, Trust)>,
    processor: Option<bool>,
}

impl<'m> Rules<'m> {
    /// The rules of `kernel`, or of the machine's own kernel if `None`.
    pub fn new(machine: &'m Machine, kernel: Option<Kernel>) -> Rules<'m> {
        let mut rules = Rules {
            machine,
            kernel: kernel.or(machine.kernel),
            trust: Vec::new(),
            processor: machine
                .processor
                .as_ref()
                .map(|processor| processor.vendor == "AuthenticAMD" && processor.family >= 0x17),
        };
        let hosts = 0..machine.hosts.len() as u32;
        rules.trust = hosts
            .map(|host| (rules.listed(host, true), rules.listed(host, false)))
            .collect();
        rules
    }

    /// The machine.
    pub fn machine(&self) -> &'m Machine {
        self.machine
    }

    /// The kernel version of the rules.
    pub fn kernel(&self) -> Option<Kernel> {
        self.kernel
    }

    /// The function by which the kernel identifies a host bridge: the first of its root bus, if that is 00.0
    /// or a root port. `None` if there is none, or it is unknown.
    pub fn named_by(&self, host: u32) -> Option<Index> {
        self.first(host).ok().flatten()
    }

    /// As [`Rules::named_by`]; `Err` if it is unknown.
    fn first(&self, host: u32) -> Result<Option<Index>, Missing> {
        let facts = &self.machine.hosts[host as usize];
        // In a format that omits bridges, functions of other buses seem to be directly below the host bridge.
        let is_on_root_bus = |function: &Function| {
            let bus = function.address.bus;
            facts.complete || facts.name.ends_with(&format!(":{bus:02x}"))
        };
        let on_root_bus = self.machine.each().filter(|(_, function)| {
            function.host == host && function.parent.is_none() && is_on_root_bus(function)
        });
        let first = on_root_bus.min_by_key(|(_, function)| function.address);
        let Some((index, function)) = first else {
            return Err(Missing::HostBridge);
        };
        if (function.address.device, function.address.function) == (0, 0) && facts.certain {
            return Ok(Some(index));
        }
        // Devices that the format omits may come before it.
        if !facts.complete {
            return Err(Missing::HostBridge);
        }
        match function.port {
            // Since 5.19 a root port identifies the bridge at any address.
            Some(Port::RootPort) => match self.kernel {
                Some(kernel) if !kernel.at_least(5, 18) => Ok(None),
                Some(kernel) if !kernel.at_least(5, 19) => Err(Missing::Kernel),
                _ => Ok(Some(index)),
            },
            Some(_) => Ok(None),
            None => Err(Missing::HostBridge),
        }
    }

    fn listed(&self, host: u32, same: bool) -> Trust {
        let first = match self.first(host) {
            Ok(Some(first)) => self.machine.function(first),
            Ok(None) => return Trust::No(Rule::Unnamed),
            Err(missing) => return Trust::Unknown(missing),
        };
        let Some((vendor, device)) = first.id else {
            return Trust::Unknown(Missing::HostBridge);
        };
        let matches = |entry: &&Allowed| {
            entry.vendor == vendor && entry.device.is_none_or(|listed| listed == device)
        };
        let Some(entry) = ALLOWED.iter().find(matches) else {
            // A later kernel may have more entries.
            return match self.kernel {
                Some(kernel) if kernel.at_least(LAST.0, LAST.1 + 1) => {
                    Trust::Unknown(Missing::Kernel)
                }
                _ => Trust::No(Rule::NotListed),
            };
        };
        match self.kernel {
            None if entry.since > FIRST => return Trust::Unknown(Missing::Kernel),
            Some(kernel) if !kernel.at_least(entry.since.0, entry.since.1) => {
                let without = (kernel.major, kernel.minor) <= entry.not_in;
                return match without {
                    true => Trust::No(Rule::NotListed),
                    false => Trust::Unknown(Missing::Kernel),
                };
            }
            _ => {}
        }
        match entry.same_host_bridge && !same {
            true => Trust::No(Rule::ListedForItselfOnly),
            false => Trust::Yes(Rule::Listed),
        }
    }

    /// The verdict on traffic from one host bridge to another, or within one.
    pub fn trust(&self, one: u32, other: u32) -> Trust {
        if self
            .kernel
            .is_some_and(|kernel| !kernel.at_least(FIRST.0, FIRST.1))
        {
            return Trust::Unknown(Missing::Kernel);
        }
        if self.processor == Some(true) {
            return Trust::Yes(Rule::Processor);
        }
        let listed = if one == other {
            self.trust[one as usize].0
        } else {
            match (self.trust[one as usize].1, self.trust[other as usize].1) {
                (Trust::No(rule), _) | (_, Trust::No(rule)) => Trust::No(rule),
                (Trust::Unknown(missing), _) | (_, Trust::Unknown(missing)) => {
                    Trust::Unknown(missing)
                }
                (yes, _) => yes,
            }
        };
        match (listed, self.processor) {
            (Trust::No(_) | Trust::Unknown(_), None) => Trust::Unknown(Missing::Processor),
            _ => listed,
        }
    }

    /// The kernel's answer to DMA between two devices, in either direction.
    pub fn route(&self, one: Index, other: Index) -> Route {
        let machine = self.machine;
        let (a, b) = (machine.function(one), machine.function(other));
        let complete = machine.format != Format::Nccl;
        let common = self.common(one, other);
        let placeholder = common.is_some_and(|at| machine.function(at).is_placeholder());
        let common = common.filter(|_| !placeholder);
        let distance = match common {
            Some(common) => {
                let common = u32::from(machine.function(common).depth);
                u32::from(a.depth) + u32::from(b.depth) - 2 * common
            }
            None => u32::from(a.depth) + u32::from(b.depth) + 2,
        };
        let mut route = Route {
            possible: Possible::NOTHING,
            common,
            distance: complete.then_some(distance),
            near: match placeholder {
                true => None,
                false => self.near(one, other, common, distance),
            },
            redirected: false,
            rule: Rule::SameFunction,
        };
        if self.kernel.is_some_and(|kernel| !kernel.at_least(4, 20)) {
            route.possible = Possible::only(Map::NotSupported);
            route.rule = Rule::KernelTooOld;
            return route;
        }
        let bus = Possible::only(Map::BusAddress);
        if one == other {
            route.possible = bus;
            return route;
        }
        let (through_host, host_rule) = match self.trust(a.host, b.host) {
            Trust::Yes(rule) => (Possible::only(Map::HostBridge), rule),
            Trust::No(rule) => (Possible::only(Map::NotSupported), rule),
            Trust::Unknown(_) => (
                Possible::only(Map::HostBridge).or(Possible::only(Map::NotSupported)),
                Rule::HostUnknown,
            ),
        };
        match common {
            Some(_) => {
                let (mut redirected, mut unknown) = (false, false);
                self.on_the_way(one, other, common, |acs| match acs {
                    Some(acs) => redirected |= acs.redirects(),
                    None => unknown = true,
                });
                route.redirected = redirected;
                (route.possible, route.rule) = match (redirected, unknown || !complete) {
                    (true, _) => (through_host, host_rule),
                    (false, true) => (bus.or(through_host), Rule::CommonBridgeAcsUnknown),
                    (false, false) => (bus, Rule::CommonBridge),
                };
            }
            // The tree may lack bridges.
            None if !machine.hosts[a.host as usize].certain
                || !machine.hosts[b.host as usize].certain =>
            {
                (route.possible, route.rule) = (bus.or(through_host), Rule::TreeUnknown);
            }
            None => (route.possible, route.rule) = (through_host, host_rule),
        }
        route
    }

    fn common(&self, one: Index, other: Index) -> Option<Index> {
        let depth = |index: Index| self.machine.function(index).depth;
        let up = |index: Index| self.machine.function(index).parent;
        let (mut a, mut b) = (one, other);
        while depth(a) > depth(b) {
            a = up(a)?;
        }
        while depth(b) > depth(a) {
            b = up(b)?;
        }
        while a != b {
            (a, b) = (up(a)?, up(b)?);
        }
        Some(a)
    }

    /// The functions whose ACS the kernel tests: both devices and all bridges between them, the common one
    /// included.
    fn on_the_way(
        &self,
        one: Index,
        other: Index,
        common: Option<Index>,
        mut look: impl FnMut(Option<Acs>),
    ) {
        self.each_on_the_way(one, other, common, |index| {
            look(self.machine.function(index).acs)
        });
    }

    /// The indices of these functions.
    pub(crate) fn each_on_the_way(
        &self,
        one: Index,
        other: Index,
        common: Option<Index>,
        mut look: impl FnMut(Index),
    ) {
        for index in self.machine.upwards(one) {
            look(index);
            if Some(index) == common {
                break;
            }
        }
        for index in self.machine.upwards(other) {
            if Some(index) == common {
                break;
            }
            look(index);
        }
    }

    fn near(&self, one: Index, other: Index, common: Option<Index>, distance: u32) -> Option<Near> {
        let machine = self.machine;
        let (a, b) = (machine.function(one), machine.function(other));
        // NCCL shows a switch as one bridge; the real tree has two.
        let one_switch = if machine.format == Format::Nccl { 2 } else { 4 };
        match common {
            _ if one == other => Some(Near::Same),
            Some(_) if distance <= one_switch => Some(Near::Pix),
            Some(_) => Some(Near::Pxb),
            None if a.host == b.host => Some(Near::Phb),
            None => match (a.node, b.node) {
                (Some(a), Some(b)) if a != b => Some(Near::Sys),
                (Some(_), Some(_)) => Some(Near::Node),
                _ => (machine.nodes == Some(1)).then_some(Near::Node),
            },
        }
    }
}
