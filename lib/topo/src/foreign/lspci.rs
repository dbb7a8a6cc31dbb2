//! The text of `lspci -vvv`, with or without `-D`, `-nn` and `-xxxx`.
//!
//! The tree follows from the bus numbers of the bridges. Without root, lspci prints `<access denied>` instead
//! of capabilities, so ACS and links are unknown.

use peerbuf_core::PciAddress;

use super::numbers::hex;
use crate::machine::{Acs, Bar, Driver, Format, Function, Iommu, Link, Machine, Port};
use crate::sysfs::tenths;

/// The bus numbers of a bridge.
struct Buses {
    bridge: usize,
    domain: u32,
    secondary: u32,
    last: u32,
}

pub(crate) fn read(text: &str) -> Machine {
    let mut machine = Machine::empty(Format::Lspci);
    let mut found: Vec<Function> = Vec::new();
    let mut buses: Vec<Buses> = Vec::new();
    for block in blocks(text) {
        let Some((address, rest)) = start(block) else {
            continue;
        };
        let function = describe(address, rest, block);
        if let Some((secondary, last)) = bus_numbers(block) {
            buses.push(Buses {
                bridge: found.len(),
                domain: address.domain,
                secondary,
                last,
            });
        }
        found.push(function);
    }
    // A virtual function may be on a bus that no bridge has as secondary bus, but that lies within a bridge's
    // range.
    let parent = |at: usize, function: &Function| {
        let bus = u32::from(function.address.bus);
        let holds = |range: &&Buses| {
            range.bridge != at
                && range.domain == function.address.domain
                && (range.secondary..=range.last).contains(&bus)
        };
        buses
            .iter()
            .filter(holds)
            .min_by_key(|range| (range.last - range.secondary, range.last))
            .map(|range| range.bridge)
    };
    let parents: Vec<Option<usize>> = found
        .iter()
        .enumerate()
        .map(|(at, function)| parent(at, function))
        .collect();
    for (function, parent) in found.iter_mut().zip(&parents) {
        if parent.is_none() {
            let name = format!(
                "pci{:04x}:{:02x}",
                function.address.domain, function.address.bus
            );
            function.host = machine.host(&name, true, true);
        }
    }
    machine.arrange(found.into_iter().zip(parents).collect());
    let is_qemu = |f: &Function| f.id.is_some_and(|(vendor, _)| vendor == 0x1b36);
    machine.is_virtual = machine.functions.iter().any(is_qemu).then_some(true);
    machine
}

/// Splits the text at lines that are not indented: each begins a function.
fn blocks(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let begins = |at: &usize| {
            let next = rest.as_bytes().get(at + 1);
            next.is_some_and(|byte| byte.is_ascii_hexdigit()) && start(&rest[at + 1..]).is_some()
        };
        let end = rest.match_indices('\n').map(|(at, _)| at).find(begins);
        let (block, after) = rest.split_at(end.map_or(rest.len(), |end| end + 1));
        rest = after;
        Some(block)
    })
}

/// Parses `0000:03:00.0 Class [0108]: ...`; the domain may be missing.
fn start(block: &str) -> Option<(PciAddress, &str)> {
    let line = block.lines().next()?;
    let (address, rest) = line.split_once(' ')?;
    let whole = match address.matches(':').count() {
        1 => format!("0000:{address}"),
        _ => address.to_owned(),
    };
    Some((whole.parse().ok()?, rest))
}

fn describe(address: PciAddress, title: &str, block: &str) -> Function {
    let mut function = Function::at(address);
    let lines = || block.lines().skip(1).map(str::trim);
    let find = |begin: &str| lines().find_map(|line| line.strip_prefix(begin));
    // With -nn, `[0108]` and `[144d:a808]`; with -n, `0108: 144d:a808`.
    let brackets = title
        .split('[')
        .skip(1)
        .filter_map(|part| part.split(']').next());
    for text in brackets {
        match text.split_once(':') {
            Some((vendor, device)) if text.len() == 9 => {
                let id = hex(vendor).zip(hex(device));
                function.id = function.id.or(id.map(|(v, d)| (v as u16, d as u16)));
            }
            None if text.len() == 4 => {
                function.class = function.class.or(hex(text).map(|class| class << 8))
            }
            _ => {}
        }
    }
    let mut words = title.split_whitespace();
    if let (Some(class), Some(id)) = (words.next(), words.next())
        && let Some(class) = class
            .strip_suffix(':')
            .filter(|class| class.len() == 4)
            .and_then(hex)
        && let Some((vendor, device)) = id.split_once(':')
    {
        function.class = Some(class << 8);
        function.id = hex(vendor)
            .zip(hex(device))
            .map(|(v, d)| (v as u16, d as u16));
    }
    let class = title.split(':').next().unwrap_or_default();
    function.class = function.class.or_else(|| class_named(class));

    let readable = !block.contains("<access denied>");
    let express =
        lines().find(|line| line.starts_with("Capabilities: [") && line.contains("] Express"));
    function.port = match express {
        Some(line) => Some(port(line)),
        // Without -v, lspci prints no capabilities at all.
        None if readable && block.contains("Control: I/O") => Some(Port::Conventional),
        None => None,
    };
    function.acs = match find("ACSCtl:") {
        Some(bits) => Some(Acs::Control(acs(bits))),
        None if function.port.is_some() && readable => Some(Acs::Absent),
        None => None,
    };
    let status = find("LnkSta:").and_then(link);
    let most = find("LnkCap:").and_then(link);
    function.link = status
        .filter(|(_, width)| *width > 0)
        .map(|(speed, width)| Link { speed, width, most });
    function.driver = match find("Kernel driver in use:") {
        Some(name) => Some(Driver::Bound(name.trim().to_owned())),
        None => block.contains("Control: I/O").then_some(Driver::None),
    };
    function.node = find("NUMA node:").and_then(|node| node.trim().parse().ok());
    function.iommu = find("IOMMU group:")
        .and_then(|number| number.trim().parse().ok())
        .map(|number| Iommu::Group {
            number,
            domain: None,
        });
    let regions: Vec<Bar> = lines().filter_map(region).collect();
    if !regions.is_empty() || block.contains("Control: I/O") {
        function.bars = Some(regions);
    }
    function.is_virtual = title.contains("Virtual Function");
    function
}

/// `Bus: primary=00, secondary=01, subordinate=05, sec-latency=0`
fn bus_numbers(block: &str) -> Option<(u32, u32)> {
    let line = block
        .lines()
        .map(str::trim)
        .find(|line| line.starts_with("Bus: primary="))?;
    let number = |name: &str| {
        let (_, rest) = line.split_once(name)?;
        hex(rest.split(',').next()?)
    };
    let (secondary, last) = (number("secondary=")?, number("subordinate=")?);
    (secondary != 0 && secondary <= last).then_some((secondary, last))
}

fn port(line: &str) -> Port {
    let kinds = [
        ("Root Port", Port::RootPort),
        ("Upstream Port", Port::Upstream),
        ("Downstream Port", Port::Downstream),
        ("PCI-Express to PCI", Port::Bridge),
        ("PCI/PCI-X to PCI-Express", Port::Bridge),
        ("Root Complex", Port::RootComplex),
    ];
    let found = kinds.iter().find(|(name, _)| line.contains(name));
    found.map_or(Port::Endpoint, |(_, port)| *port)
}

/// `SrcValid+ TransBlk- ReqRedir+ ...`
fn acs(bits: &str) -> u16 {
    let is_set = |name: &str| {
        bits.split_whitespace()
            .any(|word| word.strip_suffix('+') == Some(name))
    };
    Acs::BITS
        .iter()
        .filter(|(_, name)| is_set(name))
        .map(|(bit, _)| bit)
        .sum()
}

/// `Speed 16GT/s (ok), Width x16 (ok)`; also after `Port #0, `.
fn link(text: &str) -> Option<(u16, u8)> {
    let after = |name: &str| text.split_once(name).map(|(_, rest)| rest);
    let speed = after("Speed ")?.split("GT/s").next()?;
    let width = after("Width x")?;
    let digits = width
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(width.len());
    Some((tenths(speed.trim())?, width[..digits].parse().ok()?))
}

/// `Region 2: Memory at 384000000000 (64-bit, prefetchable) [size=64M]`
fn region(line: &str) -> Option<Bar> {
    let (index, rest) = line.strip_prefix("Region ")?.split_once(": Memory at ")?;
    let size = rest.split_once("[size=")?.1.split(']').next()?;
    let digits = size
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(size.len());
    let shift = match &size[digits..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    let size = size[..digits].parse::<u64>().ok()?.checked_shl(shift)?;
    let begin = rest.split_whitespace().next()?;
    let begin = u64::from_str_radix(begin, 16).ok();
    let last = begin.and_then(|begin| begin.checked_add(size.saturating_sub(1)));
    Some(Bar {
        index: index.parse().ok()?,
        size,
        // `<unassigned>` and `<ignored>` regions have no address.
        address_bits: last.map_or(0, |last| (u64::BITS - last.leading_zeros()) as u8),
        is_64bit: rest.contains("64-bit"),
        prefetchable: rest.contains(" prefetchable") || rest.contains("(prefetchable"),
        resizable_to: None,
    })
}

/// The class by its name in pciutils' list, for output without numbers.
fn class_named(name: &str) -> Option<u32> {
    let classes = [
        ("Non-Volatile memory controller", 0x0108),
        ("SATA controller", 0x0106),
        ("Ethernet controller", 0x0200),
        ("Infiniband controller", 0x0207),
        ("Network controller", 0x0280),
        ("VGA compatible controller", 0x0300),
        ("3D controller", 0x0302),
        ("Display controller", 0x0380),
        ("Multimedia video controller", 0x0400),
        ("RAM memory", 0x0500),
        ("Memory controller", 0x0580),
        ("Host bridge", 0x0600),
        ("ISA bridge", 0x0601),
        ("PCI bridge", 0x0604),
        ("Processing accelerators", 0x1200),
    ];
    let found = classes.iter().find(|(known, _)| *known == name.trim());
    found.map(|(_, class)| class << 8)
}
