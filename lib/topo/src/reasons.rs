//! All reasons against DMA between two devices, with the remedies.

use std::fmt;

use peerbuf_core::PciAddress;
use peerbuf_core::topology::{Layer, LayerKind};

use crate::machine::{Acs, Driver, Format, Function, Index, Iommu, Kernel, Kind, Machine};
use crate::rules::{Map, Missing, Route, Rule, Rules, Trust};

/// A reason code. The list is closed; `docs/reasons/` has a page for each code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Code {
    /// Both devices are the same function.
    SameFunction,
    /// The client device cannot do DMA.
    NoDmaEngine,
    /// The provider device has no memory to export.
    NoMemory,
    /// The kernel has no peer-to-peer mappings.
    KernelTooOld,
    /// The host bridge is not on the kernel's list.
    HostBridgeNotListed,
    /// The list allows traffic only within each host bridge.
    HostBridgesDiffer,
    /// No function on the root bus identifies the host bridge.
    HostBridgeUnnamed,
    /// A bridge redirects peer-to-peer requests to the host bridge (ACS).
    AcsRedirect,
    /// The provider's addresses exceed the client's DMA mask.
    DmaMask,
    /// The kernel bounces all DMA.
    SwiotlbForced,
    /// The ACS registers could not be read.
    AcsUnknown,
    /// The host bridge is unknown.
    HostBridgeUnknown,
    /// The processor is unknown.
    ProcessorUnknown,
    /// The kernel's version is unknown, or this crate does not know its rules.
    KernelUnknown,
    /// Bridges are missing from the snapshot.
    TreeUnknown,
    /// The snapshot lacks facts that could rule it out, such as the DMA mask.
    FactsUnknown,
    /// A virtual machine's IOMMU may drop requests that its virtual switch should have routed.
    IommuInGuest,
    /// A virtual machine's PCI tree is not the hardware's.
    VirtualMachine,
    /// A host bridge may forward writes but not reads.
    HostBridgeUnproved,
    /// The BAR is smaller than its maximum.
    BarSmall,
    /// A link is slower or narrower than its maximum.
    LinkDegraded,
    /// The kernel caches its verdict.
    VerdictCached,
    /// A kernel layer (md, device mapper) combines disks into this one.
    BlockLayer,
    /// Requests go to one of several disks, and a proof is about one.
    SeveralDisks,
    /// The device is not a PCI device.
    NotPci,
}

impl Code {
    /// All codes.
    pub const ALL: [Code; 25] = [
        Code::SameFunction,
        Code::NoDmaEngine,
        Code::NoMemory,
        Code::KernelTooOld,
        Code::HostBridgeNotListed,
        Code::HostBridgesDiffer,
        Code::HostBridgeUnnamed,
        Code::AcsRedirect,
        Code::DmaMask,
        Code::SwiotlbForced,
        Code::AcsUnknown,
        Code::HostBridgeUnknown,
        Code::ProcessorUnknown,
        Code::KernelUnknown,
        Code::TreeUnknown,
        Code::FactsUnknown,
        Code::IommuInGuest,
        Code::VirtualMachine,
        Code::HostBridgeUnproved,
        Code::BarSmall,
        Code::LinkDegraded,
        Code::VerdictCached,
        Code::BlockLayer,
        Code::SeveralDisks,
        Code::NotPci,
    ];

    /// The stable name, in kebab case.
    pub fn as_str(self) -> &'static str {
        match self {
            Code::SameFunction => "same-function",
            Code::NoDmaEngine => "no-dma-engine",
            Code::NoMemory => "no-memory",
            Code::KernelTooOld => "kernel-too-old",
            Code::HostBridgeNotListed => "host-bridge-not-listed",
            Code::HostBridgesDiffer => "host-bridges-differ",
            Code::HostBridgeUnnamed => "host-bridge-unnamed",
            Code::AcsRedirect => "acs-redirect",
            Code::DmaMask => "dma-mask",
            Code::SwiotlbForced => "swiotlb-forced",
            Code::AcsUnknown => "acs-unknown",
            Code::HostBridgeUnknown => "host-bridge-unknown",
            Code::ProcessorUnknown => "processor-unknown",
            Code::KernelUnknown => "kernel-unknown",
            Code::TreeUnknown => "tree-unknown",
            Code::FactsUnknown => "facts-unknown",
            Code::IommuInGuest => "iommu-in-guest",
            Code::VirtualMachine => "virtual-machine",
            Code::HostBridgeUnproved => "host-bridge-unproved",
            Code::BarSmall => "bar-small",
            Code::LinkDegraded => "link-degraded",
            Code::VerdictCached => "verdict-cached",
            Code::BlockLayer => "block-layer",
            Code::SeveralDisks => "several-disks",
            Code::NotPci => "not-pci",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The effect of a reason, the gravest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// Peer-to-peer DMA cannot work.
    Blocks,
    /// Whether it works depends on an unknown fact.
    MayBlock,
    /// It works on a longer route.
    Slows,
    /// Only information.
    Warns,
}

impl Effect {
    /// The human-readable name.
    pub fn name(self) -> &'static str {
        match self {
            Effect::Blocks => "blocks",
            Effect::MayBlock => "may block",
            Effect::Slows => "slows",
            Effect::Warns => "warns",
        }
    }
}

/// A reason with its evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reason {
    /// The code.
    pub code: Code,
    /// The effect in this case.
    pub effect: Effect,
    /// The devices, bits and numbers, as text.
    pub evidence: String,
}

impl Reason {
    /// `evidence` is for people: the devices, bits and numbers.
    pub fn new(code: Code, effect: Effect, evidence: impl Into<String>) -> Reason {
        Reason {
            code,
            effect,
            evidence: evidence.into(),
        }
    }
}

/// A change that would remove a reason.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Remedy {
    /// The effect and the cost of the change.
    pub what: String,
    /// Commands for a root shell; none if the change needs other hardware.
    pub commands: Vec<String>,
}

impl Remedy {
    /// `commands` are for a root shell.
    pub fn new<const N: usize>(what: impl Into<String>, commands: [String; N]) -> Remedy {
        Remedy {
            what: what.into(),
            commands: commands.into(),
        }
    }
}

/// The prediction whether one device can use another's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel will allow it.
    Yes,
    /// It cannot work.
    No,
    /// A fact is missing.
    Unknown,
}

impl Verdict {
    /// The human-readable name.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Yes => "yes",
            Verdict::No => "no",
            Verdict::Unknown => "unknown",
        }
    }
}

/// The complete prediction for one device's DMA to another's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Argument {
    /// The device that does DMA.
    pub client: Index,
    /// The device that provides the memory.
    pub provider: Index,
    /// The prediction.
    pub verdict: Verdict,
    /// The predicted answer of the kernel.
    pub route: Route,
    /// All reasons against it, the gravest first.
    pub reasons: Vec<Reason>,
    /// Changes that would remove reasons.
    pub remedies: Vec<Remedy>,
}

/// Whether `client` can do DMA to and from the memory of `provider`.
pub fn argue(rules: &Rules<'_>, client: Index, provider: Index) -> Argument {
    let mut case = Case {
        rules,
        machine: rules.machine(),
        route: rules.route(client, provider),
        client,
        provider,
        reasons: Vec::new(),
        remedies: Vec::new(),
    };
    case.devices();
    case.way();
    case.addresses();
    case.cautions();
    let Case {
        route,
        mut reasons,
        mut remedies,
        ..
    } = case;
    reasons.sort_by_key(|reason| reason.effect);
    remedies.dedup();
    let has = |effect| reasons.iter().any(|reason| reason.effect == effect);
    let verdict = match (has(Effect::Blocks), has(Effect::MayBlock)) {
        (true, _) => Verdict::No,
        (false, true) => Verdict::Unknown,
        (false, false) => Verdict::Yes,
    };
    Argument {
        client,
        provider,
        verdict,
        route,
        reasons,
        remedies,
    }
}

/// A function's address and common name: `0000:03:00.0 (nvme0n1)`.
pub fn label(function: &Function) -> String {
    match short_name(function) {
        Some(name) => format!("{} ({name})", function.address),
        None => function.address.to_string(),
    }
}

/// The most informative name: a disk before its controller, an RDMA device before its network interface.
pub fn short_name(function: &Function) -> Option<&str> {
    let rank = |name: &&String| {
        let name = name.as_str();
        let is_disk = name.starts_with("nvme") && name[4..].contains('n');
        let groups = ["renderD", "card", "video", "accel"];
        let group = groups.iter().position(|begin| name.starts_with(begin));
        (!is_disk, group, name.starts_with('e'), name.len())
    };
    function.names.iter().min_by_key(rank).map(String::as_str)
}

struct Case<'a, 'm> {
    rules: &'a Rules<'m>,
    machine: &'m Machine,
    route: Route,
    client: Index,
    provider: Index,
    reasons: Vec<Reason>,
    remedies: Vec<Remedy>,
}

impl<'m> Case<'_, 'm> {
    fn say(&mut self, code: Code, effect: Effect, evidence: impl Into<String>) {
        self.reasons.push(Reason {
            code,
            effect,
            evidence: evidence.into(),
        });
    }

    fn remedy(&mut self, remedy: Remedy) {
        self.remedies.push(remedy);
    }

    fn client(&self) -> &'m Function {
        self.machine.function(self.client)
    }

    fn provider(&self) -> &'m Function {
        self.machine.function(self.provider)
    }

    /// Reasons in the devices themselves.
    fn devices(&mut self) {
        let (client, provider) = (self.client(), self.provider());
        if self.client == self.provider {
            let what = format!("both are {}", label(client));
            self.say(Code::SameFunction, Effect::Warns, what);
        }
        let at = client.address;
        match (&client.driver, client.kind()) {
            (_, Kind::Bridge) => {
                let what =
                    format!("{at} is a bridge, which only forwards requests of other devices");
                self.say(Code::NoDmaEngine, Effect::Blocks, what);
            }
            (Some(Driver::None), _) => {
                let what = format!("{} has no driver, so it cannot do DMA", label(client));
                self.say(Code::NoDmaEngine, Effect::Blocks, what);
                let command = format!("echo {at} > /sys/bus/pci/drivers_probe");
                self.remedy(Remedy::new("bind the device to its driver", [command]));
            }
            (Some(Driver::Bound(driver)), _) if driver == "peerbuf" => {
                let what = format!(
                    "{at} is bound to peerbuf.ko, which exports its memory and keeps its DMA off"
                );
                self.say(Code::NoDmaEngine, Effect::Blocks, what);
            }
            _ => {}
        }
        let lends = provider.lends.is_some();
        let at = label(provider);
        match (&provider.bars, provider.kind()) {
            (Some(bars), _) if bars.is_empty() => {
                self.say(
                    Code::NoMemory,
                    Effect::Blocks,
                    format!("{at} has no memory BAR"),
                );
            }
            (_, Kind::Bridge) => {
                let what = format!("{at} is a bridge and has no memory of its own");
                self.say(Code::NoMemory, Effect::Blocks, what);
            }
            (_, Kind::Nvme) if !lends && self.machine.format == Format::Sysfs => {
                let what = match provider.cmb {
                    Some(bytes) if bytes > 0 => format!(
                        "{at} has a controller memory buffer (CMB) of {}, which its driver does not publish",
                        size(bytes)
                    ),
                    _ => format!(
                        "{at} has registers only, and no published controller memory buffer (CMB)"
                    ),
                };
                self.say(Code::NoMemory, Effect::Blocks, what);
            }
            (_, Kind::Nvme | Kind::Disk | Kind::Nic) if !lends => {
                let what = format!(
                    "a {} has memory for peers only if its driver publishes it, which {} does not show",
                    provider.kind().name(),
                    self.machine.format.name()
                );
                self.say(Code::NoMemory, Effect::MayBlock, what);
            }
            _ => {}
        }
        if let Some(bar) = provider.largest_bar()
            && let Some(most) = bar.resizable_to.filter(|most| *most > bar.size)
        {
            let what = format!(
                "BAR {} of {at} shows {}, and can show {}",
                bar.index,
                size(bar.size),
                size(most)
            );
            self.say(Code::BarSmall, Effect::Warns, what);
            let bits = most.ilog2() - 20;
            let command = format!(
                "echo {bits} > /sys/bus/pci/devices/{}/resource{}_resize",
                provider.address, bar.index
            );
            let what = "enlarge the BAR: Resizable BAR and 'above 4G decoding' in the firmware's setup, or here \
                        with the driver unbound";
            self.remedy(Remedy::new(what, [command]));
        }
    }

    /// Reasons on the route between the devices.
    fn way(&mut self) {
        let (client, provider) = (self.client(), self.provider());
        let (Function { host: one, .. }, Function { host: other, .. }) = (client, provider);
        if self.route.rule == Rule::KernelTooOld {
            let what = "peer-to-peer DMA came with Linux 4.20";
            self.say(Code::KernelTooOld, Effect::Blocks, what);
            self.remedy(Remedy::new("run a newer kernel", []));
            return;
        }
        // Bridges that redirect requests from the shortest route, or may.
        let redirectors = self.redirectors();
        if self.route.redirected {
            let bridges: Vec<String> = redirectors
                .iter()
                .map(|(at, control)| acs_text(*at, *control))
                .collect();
            let effect = match self.route.possible.allowed() {
                Some(true) => Effect::Slows,
                Some(false) => Effect::Blocks,
                None => Effect::MayBlock,
            };
            let what = format!(
                "requests between them are sent up to the host bridge by {}",
                bridges.join(", ")
            );
            self.say(Code::AcsRedirect, effect, what);
            self.remedies
                .extend(acs_remedies(&redirectors, self.rules.kernel()));
            let what = format!(
                "the kernel keeps its answer until the driver of {} is bound anew",
                provider.address
            );
            self.say(Code::VerdictCached, Effect::Warns, what);
        }
        if self.route.rule == Rule::CommonBridgeAcsUnknown {
            let (unread, what) = self.unread_acs();
            let effect = match self.route.possible.allowed() {
                Some(_) => Effect::Warns,
                None => Effect::MayBlock,
            };
            self.say(Code::AcsUnknown, effect, what);
            if unread && self.machine.format == Format::Sysfs {
                let what = "run this as root: only root can read the whole configuration space";
                self.remedy(Remedy::new(what, []));
            }
        }
        if self.route.rule == Rule::TreeUnknown {
            // Sorted, so that both directions have the same text.
            let what = format!(
                "{} does not show which bridges and host bridges {} and {} have in common",
                self.machine.format.name(),
                client.address.min(provider.address),
                client.address.max(provider.address)
            );
            let effect = match self.route.possible.allowed() {
                Some(_) => Effect::Warns,
                None => Effect::MayBlock,
            };
            self.say(Code::TreeUnknown, effect, what);
        }
        if !self.route.possible.has(Map::HostBridge) && !self.route.possible.has(Map::NotSupported)
        {
            return;
        }
        let blocked = match self.route.possible.allowed() {
            Some(true) => {
                if self.route.possible.known() == Some(Map::HostBridge) {
                    let what = format!(
                        "bytes cross {}; some host bridges pass writes, and slow down or lose reads",
                        self.hosts(*one, *other)
                    );
                    self.say(Code::HostBridgeUnproved, Effect::Warns, what);
                }
                return;
            }
            Some(false) => Effect::Blocks,
            None => Effect::MayBlock,
        };
        self.host_bridges(*one, *other, blocked);
    }

    /// Reasons why the kernel refuses traffic through the host bridge, or may.
    fn host_bridges(&mut self, one: u32, other: u32, effect: Effect) {
        let no_bridge = match self.route.common {
            None => "they have no bridge in common, and",
            Some(_) => "requests may be sent up, and",
        };
        let under = match self.rules.kernel() {
            Some(kernel) => format!("Linux {kernel}"),
            None => format!(
                "Linux up to {}.{}",
                crate::rules::LAST.0,
                crate::rules::LAST.1
            ),
        };
        match self.rules.trust(one, other) {
            Trust::No(Rule::ListedForItselfOnly) => {
                let what = format!(
                    "{no_bridge} {under} allows {} within itself only",
                    self.hosts(one, other)
                );
                self.say(Code::HostBridgesDiffer, effect, what);
                let what = "move one card to a slot of the other's host bridge";
                self.remedy(Remedy::new(what, []));
            }
            Trust::No(Rule::Unnamed) => {
                let what = format!(
                    "{no_bridge} the first function of the root bus is neither 00.0 nor a root port: {}",
                    self.hosts(one, other)
                );
                self.say(Code::HostBridgeUnnamed, effect, what);
                self.under_a_switch();
            }
            Trust::No(_) => {
                let what = format!(
                    "{no_bridge} {under} does not trust {} to pass requests on",
                    self.hosts(one, other)
                );
                self.say(Code::HostBridgeNotListed, effect, what);
                self.under_a_switch();
            }
            Trust::Unknown(Missing::HostBridge) => {
                let what = format!(
                    "{no_bridge} {} does not identify host bridge {}",
                    self.machine.format.name(),
                    self.hosts(one, other)
                );
                self.say(Code::HostBridgeUnknown, effect, what);
            }
            Trust::Unknown(Missing::Processor) => {
                let what = format!(
                    "{no_bridge} {} is not on the list of {under}; an AMD processor from family 17h on makes up \
                     for that, and the processor is not known",
                    self.hosts(one, other)
                );
                self.say(Code::ProcessorUnknown, effect, what);
            }
            Trust::Unknown(Missing::Kernel) => {
                let what = match self.rules.kernel() {
                    None => "the kernel's version is unknown, and newer versions trust more host bridges".into(),
                    Some(kernel) => format!(
                        "it is unknown whether Linux {kernel} trusts {}: this program has the rules of 5.9 to 7.3",
                        self.hosts(one, other)
                    ),
                };
                self.say(Code::KernelUnknown, effect, what);
                let what = "name the kernel";
                let at = [self.client(), self.provider()].map(|function| function.address);
                // Sorted, so that both directions have the same text.
                let (one, other) = (at[0].min(at[1]), at[0].max(at[1]));
                let command = format!("peerbuf why {one} {other} --kernel 7.3");
                self.remedy(Remedy::new(what, [command]));
            }
            Trust::Yes(_) => {}
        }
    }

    fn under_a_switch(&mut self) {
        if self.machine.is_virtual == Some(true) {
            let what = "put both below one switch in the virtual machine (QEMU), or pass its processor through if \
                        that is an AMD of family 17h or later (-cpu host)";
            let switch = "-device x3130-upstream,id=up,bus=ROOT_PORT -device xio3130-downstream,id=d1,bus=up,chassis=1 \
                          -device xio3130-downstream,id=d2,bus=up,chassis=2";
            self.remedy(Remedy::new(what, [switch.into()]));
        } else {
            let what = "put both cards below one PCIe switch; no option of the kernel adds a host bridge to its list";
            self.remedy(Remedy::new(what, []));
        }
    }

    /// `pci0000:00 (8086:29c0)`
    fn hosts(&self, one: u32, other: u32) -> String {
        let describe = |host: u32| {
            let name = &self.machine.hosts[host as usize].name;
            let first = self
                .rules
                .named_by(host)
                .map(|first| self.machine.function(first));
            match first.and_then(|first| first.id) {
                Some((vendor, device)) => format!("{name} ({vendor:04x}:{device:04x})"),
                None => name.clone(),
            }
        };
        match one == other {
            true => describe(one),
            // Sorted, so that both directions have the same text.
            false => format!(
                "{} and {}",
                describe(one.min(other)),
                describe(one.max(other))
            ),
        }
    }

    /// The functions on the route whose ACS redirects.
    fn redirectors(&self) -> Vec<(PciAddress, u16)> {
        let mut found = Vec::new();
        self.rules
            .each_on_the_way(self.client, self.provider, self.route.common, |index| {
                let function = self.machine.function(index);
                if let Some(Acs::Control(control)) = function.acs
                    && control & Acs::REDIRECT != 0
                {
                    found.push((function.address, control));
                }
            });
        found.sort();
        found
    }

    /// Whether a bridge's ACS could not be read, and text about it.
    fn unread_acs(&self) -> (bool, String) {
        let mut unread = Vec::new();
        self.rules
            .each_on_the_way(self.client, self.provider, self.route.common, |index| {
                let function = self.machine.function(index);
                if function.acs.is_none() {
                    unread.push(function.address);
                }
            });
        // Sorted, so that both directions have the same text.
        unread.sort();
        let text = match unread.is_empty() {
            true => format!(
                "{} does not show the bridges, whose ACS may redirect requests",
                self.machine.format.name()
            ),
            false => format!(
                "cannot read whether ACS redirects requests to the host bridge at {}",
                unread
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        };
        (!unread.is_empty(), text)
    }

    /// Whether the provider's addresses fit the client's DMA mask.
    fn addresses(&mut self) {
        let (client, provider) = (self.client(), self.provider());
        let translates = client.iommu.as_ref().and_then(Iommu::translates);
        let bus = self.route.possible.known() == Some(Map::BusAddress);
        self.unknown_facts(translates, bus);
        // Through the host bridge, a translating IOMMU assigns addresses within the DMA mask.
        if translates == Some(true) && !bus {
            return;
        }
        if let (Some(bits), Some(bar)) = (client.dma_bits, provider.largest_bar())
            && bits < bar.address_bits
        {
            let what = format!(
                "the DMA mask of {} has {bits} bits, but BAR {} of {} needs {}",
                label(client),
                bar.index,
                provider.address,
                bar.address_bits
            );
            self.say(Code::DmaMask, Effect::Blocks, what);
            let what = "let an IOMMU translate (through the host bridge), or place BARs below 4 GiB in the firmware's setup \
                        ('above 4G decoding' off)";
            self.remedy(Remedy::new(what, []));
        }
        let forced = |option: &String| {
            option.starts_with("swiotlb=")
                && option.contains("force")
                && !option.contains("noforce")
        };
        if !bus && self.machine.options.iter().flatten().any(forced) {
            let what = "swiotlb=force makes the kernel bounce all DMA, which peer-to-peer memory does not support";
            self.say(Code::SwiotlbForced, Effect::Blocks, what);
            self.remedy(Remedy::new(
                "remove swiotlb=force from the kernel's command line",
                [],
            ));
        }
    }

    /// Names the facts that could rule the pair out and are unknown. `bus`: requests stay below a bridge.
    fn unknown_facts(&mut self, translates: Option<bool>, bus: bool) {
        let (client, provider) = (self.client(), self.provider());
        if self.client == self.provider {
            return;
        }
        let mut unknown = Vec::new();
        if client.driver.is_none() {
            unknown.push(format!("the driver of {}", client.address));
        }
        // A translating IOMMU gives addresses within the mask; 64 bits reach every BAR.
        if (bus || translates != Some(true)) && client.dma_bits != Some(64) {
            if client.dma_bits.is_none() {
                unknown.push(format!("the DMA mask of {}", client.address));
            }
            if !bus && translates.is_none() {
                unknown.push(format!("the IOMMU domain of {}", client.address));
            }
        }
        if provider.bars.is_none() {
            unknown.push(format!("the BARs of {}", provider.address));
        }
        if !bus && self.machine.options.is_none() {
            unknown.push("the kernel's command line (swiotlb=force)".into());
        }
        if !unknown.is_empty() {
            let what = format!(
                "{} does not show what could rule it out: {}",
                self.machine.format.name(),
                unknown.join(", ")
            );
            self.say(Code::FactsUnknown, Effect::Warns, what);
        }
    }

    fn cautions(&mut self) {
        let client = self.client();
        if self.client == self.provider {
            return;
        }
        let translates = client.iommu.as_ref().and_then(Iommu::translates);
        if self.machine.is_virtual == Some(true) {
            if translates == Some(true) && self.route.possible.has(Map::BusAddress) {
                let what = format!(
                    "the virtual machine's IOMMU translates the requests of {}. It may treat the bus addresses of a peer as its \
                     own and drop the bytes, while every call reports success",
                    client.address
                );
                self.say(Code::IommuInGuest, Effect::Warns, what);
                let what =
                    "put the IOMMU into passthrough mode on the kernel's command line, and reboot";
                self.remedy(Remedy::new(what, ["iommu=pt".into()]));
            } else {
                let what = "this is a virtual machine, whose PCI topology is not the hardware's: only a checked transfer proves a path";
                self.say(Code::VirtualMachine, Effect::Warns, what);
            }
        }
        for at in [self.client, self.provider] {
            let function = self.machine.function(at);
            if let Some(link) = function.link
                && let Some((speed, width)) = link.most
                && (link.speed < speed || link.width < width)
                && self.machine.is_virtual != Some(true)
            {
                let what = format!("the link of {} runs at {link}", label(function));
                self.say(Code::LinkDegraded, Effect::Warns, what);
            }
        }
    }
}

/// The reason for a kernel layer between filesystem and disk that does not pass pages of peer memory on.
/// `layer` is [`BlockDevice::layer`](peerbuf_core::topology::BlockDevice::layer).
pub fn of_layer(disk: &str, layer: &str) -> Reason {
    let (effect, what) = match layer {
        "device mapper" => (
            Effect::MayBlock,
            "passes no peer memory on in Linux 7.3, not even for tables that need no CPU (linear, striped)",
        ),
        "NVMe over fabrics" => (
            Effect::MayBlock,
            "reaches its disk through an RDMA card (Linux 7.2 and later) or a socket",
        ),
        "md" => (
            Effect::MayBlock,
            "is software RAID, which passes peer memory on in RAID 0 (Linux 7.3) if all its disks accept it",
        ),
        "a loop device" => (Effect::Blocks, "is a file, which the CPU reads and writes"),
        _ => (Effect::Blocks, "is served by the CPU"),
    };
    Reason {
        code: Code::BlockLayer,
        effect,
        evidence: format!("{disk} is made by {layer}. It {what}"),
    }
}

/// The reasons of the layers below a filesystem, where the kinds of the layers tell more than [`of_layer`] of the top
/// one.
pub fn of_stack(layers: &[Layer]) -> Vec<Reason> {
    let reason = |(at, layer): (usize, &Layer)| {
        let (effect, what) = of_kind(&layer.kind)?;
        // Of these, [`of_layer`] says as much about the top one.
        let is_told = match layer.kind {
            LayerKind::Lvm | LayerKind::Crypt | LayerKind::Multipath => false,
            LayerKind::Fabrics(ref transport) => transport.is_none(),
            _ => true,
        };
        let evidence = format!("{} ({}) {what}", layer.name, layer.kind.name());
        (at > 0 || !is_told).then(|| Reason::new(Code::BlockLayer, effect, evidence))
    };
    layers.iter().enumerate().filter_map(reason).collect()
}

/// What a layer does to peers' pages; `None` if it passes them on.
fn of_kind(kind: &LayerKind) -> Option<(Effect, &'static str)> {
    Some(match kind {
        LayerKind::Disk | LayerKind::Partition | LayerKind::NvmePaths => return None,
        LayerKind::Lvm => (
            Effect::MayBlock,
            "passes no peer memory on in Linux 7.3, not even in linear and striped volumes",
        ),
        LayerKind::Crypt => (
            Effect::Blocks,
            "encrypts with the CPU, from and into pages of its own: staged copies",
        ),
        LayerKind::Multipath => (
            Effect::MayBlock,
            "chooses a path for each request, and passes peer memory on only if all paths accept it",
        ),
        LayerKind::Mapper => (
            Effect::MayBlock,
            "passes no peer memory on in Linux 7.3, not even for tables that need no CPU (linear, striped)",
        ),
        LayerKind::Raid(_) => (
            Effect::MayBlock,
            "is software RAID, which passes peer memory on in RAID 0 (Linux 7.3) if all its disks accept it",
        ),
        LayerKind::Loop(_) => (
            Effect::Blocks,
            "goes through the page cache, or through direct I/O of the kernel's own pages",
        ),
        LayerKind::Fabrics(Some(transport)) if transport == "rdma" => (
            Effect::MayBlock,
            "reaches its disk through an RDMA card, which takes peer memory on Linux 7.2 and later",
        ),
        LayerKind::Fabrics(Some(transport)) if transport == "tcp" => (
            Effect::Blocks,
            "reaches its disk through a socket: the CPU copies",
        ),
        LayerKind::Fabrics(_) => (
            Effect::MayBlock,
            "reaches its disk through an RDMA card (Linux 7.2 and later) or a socket",
        ),
        _ => (Effect::Blocks, "is served by the CPU"),
    })
}

/// The reason for a device over several disks, or paths to a disk. `disks` is
/// [`BlockDevice::disks`](peerbuf_core::topology::BlockDevice::disks).
pub fn of_several(disk: &str, disks: usize) -> Option<Reason> {
    let evidence = format!(
        "{disk} passes each request to one of {disks} disks. A proof would be about those that it happens to reach, so \
         peerbuf copies"
    );
    (disks > 1).then(|| Reason::new(Code::SeveralDisks, Effect::Blocks, evidence))
}

/// The reason for a device that is not a PCI function.
pub fn not_pci(name: &str) -> Reason {
    Reason {
        code: Code::NotPci,
        effect: Effect::Blocks,
        evidence: format!("{name} is not on a PCI device, so it has no peer-to-peer DMA"),
    }
}

/// `0000:01:00.0 (ReqRedir+ CmpltRedir+)`
fn acs_text(at: PciAddress, control: u16) -> String {
    let bits = Acs::BITS
        .iter()
        .filter(|(bit, _)| control & Acs::REDIRECT & bit != 0);
    let bits: Vec<String> = bits.map(|(_, name)| format!("{name}+")).collect();
    format!("{at} ({})", bits.join(" "))
}

fn acs_remedies(bridges: &[(PciAddress, u16)], kernel: Option<Kernel>) -> Vec<Remedy> {
    let set = bridges.iter().flat_map(|(at, control)| {
        // setpci exits with 0 even if it found no device, and a bit may be hardwired: so the command reads
        // back.
        [
            format!(
                "setpci -s {at} ECAP_ACS+6.w=0:2c  # {control:04x} = {:04x}",
                control & !Acs::REDIRECT
            ),
            format!(
                "setpci -s {at} ECAP_ACS+6.w  # reads {:04x} if it took",
                control & !Acs::REDIRECT
            ),
        ]
    });
    let now = Remedy {
        what: "switch redirection off until the next reboot or reset (current = wanted), and bind the driver of the \
               memory's device anew. Devices below these bridges are then not isolated from each other"
            .into(),
        commands: set.collect(),
    };
    let places: Vec<String> = bridges.iter().map(|(at, _)| at.to_string()).collect();
    let places = places.join(";");
    let at_boot = match kernel {
        Some(kernel) if !kernel.at_least(6, 11) => format!("pci=disable_acs_redir={places}"),
        _ => format!("pci=config_acs=x0x00xx@{places}"),
    };
    let boot = Remedy::new(
        "or for good, on the kernel's command line; then reboot",
        [at_boot],
    );
    vec![now, boot]
}

/// `256 MiB`
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let steps = (bytes.max(1).ilog2() / 10).min(4);
    format!("{} {}", bytes >> (10 * steps), UNITS[steps as usize])
}
