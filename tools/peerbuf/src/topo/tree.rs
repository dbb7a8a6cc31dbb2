//! The tree of a machine, with the relevant devices marked.

use std::collections::BTreeSet;

use peerbuf_topo::Rules;
use peerbuf_topo::machine::{Acs, Driver, Function, Index, Iommu, Kind, Machine};
use peerbuf_topo::reasons::short_name;

use crate::size;

/// Each relevant device with its label in the tree and the matrix: `GPU0`, `NVMe1`.
pub fn labels(machine: &Machine) -> Vec<(Index, String)> {
    let mut counts = std::collections::BTreeMap::new();
    let devices = machine.devices_that_matter();
    let label = |index: Index| {
        let name = match machine.function(index).kind() {
            Kind::Gpu => "GPU",
            Kind::Accelerator => "ACC",
            Kind::Nvme => "NVMe",
            Kind::Nic => "NIC",
            Kind::Capture => "CAP",
            Kind::Memory => "MEM",
            _ => "DEV",
        };
        let count = counts.entry(name).or_insert(0);
        *count += 1;
        (index, format!("{name}{}", *count - 1))
    };
    devices.into_iter().map(label).collect()
}

/// A line of the tree.
pub struct Line {
    /// Depth below the host bridge.
    pub depth: usize,
    /// The function; `None` for a host bridge.
    pub function: Option<Index>,
    /// The line's description.
    pub text: String,
    /// True if a line of the same depth follows below the same bridge.
    pub has_next: bool,
    /// The device's label.
    pub label: Option<String>,
}

/// The host bridges, and below them the relevant devices with their bridges; with `all`, every
/// function.
pub fn lines(rules: &Rules<'_>, labels: &[(Index, String)], all: bool) -> Vec<Line> {
    let machine = rules.machine();
    let mut shown = BTreeSet::new();
    if all {
        shown.extend(machine.each().map(|(index, _)| index));
    } else {
        for (device, _) in labels {
            shown.extend(machine.upwards(*device));
        }
    }
    let mut lines = Vec::new();
    for (number, host) in (0..).zip(&machine.hosts) {
        let below: Vec<Index> = shown
            .iter()
            .copied()
            .filter(|index| machine.function(*index).host == number)
            .collect();
        if below.is_empty() {
            continue;
        }
        lines.push(Line {
            depth: 0,
            function: None,
            text: host_text(rules, number, &host.name),
            has_next: false,
            label: None,
        });
        for (at, index) in below.iter().enumerate() {
            let function = machine.function(*index);
            let label = labels.iter().find(|(device, _)| device == index);
            let mut after = below[at + 1..].iter().map(|index| machine.function(*index));
            lines.push(Line {
                depth: usize::from(function.depth) + 1,
                function: Some(*index),
                text: describe(function),
                has_next: after.any(|next| next.parent == function.parent),
                label: label.map(|(_, label)| label.clone()),
            });
        }
    }
    lines
}

fn host_text(rules: &Rules<'_>, host: u32, name: &str) -> String {
    use peerbuf_topo::rules::{Missing, Rule, Trust};
    let named = rules
        .named_by(host)
        .and_then(|first| rules.machine().function(first).id);
    let id = named
        .map(|(vendor, device)| format!(" ({vendor:04x}:{device:04x})"))
        .unwrap_or_default();
    let trust = match rules.trust(host, host) {
        Trust::Yes(Rule::Processor) => "trusted by the kernel for its processor",
        Trust::Yes(_) => "trusted by the kernel",
        Trust::No(_) => "not trusted by the kernel",
        Trust::Unknown(Missing::HostBridge) => "not known whether the kernel trusts it",
        Trust::Unknown(Missing::Processor) => "trusted if its processor is",
        Trust::Unknown(Missing::Kernel) => "trusted or not, by the kernel's version",
    };
    format!("{name}{id}, {trust}")
}

/// The description of a function, after its address.
pub fn describe(function: &Function) -> String {
    if function.is_placeholder() {
        return "a group that the file made up, no bridge".into();
    }
    let mut parts = Vec::new();
    let bridge = function.kind() == Kind::Bridge;
    let kind = match function.port.filter(|_| bridge) {
        Some(peerbuf_topo::machine::Port::RootPort) => "root port",
        Some(peerbuf_topo::machine::Port::Upstream) => "switch, up",
        Some(peerbuf_topo::machine::Port::Downstream) => "switch, down",
        _ => function.kind().name(),
    };
    let name = short_name(function)
        .map(|name| format!(" {name}"))
        .unwrap_or_default();
    parts.push(format!("{kind}{name}"));
    if let Some((vendor, device)) = function.id
        && !bridge
    {
        parts.push(format!("{vendor:04x}:{device:04x}"));
    }
    if let Some(Driver::Bound(driver)) = &function.driver
        && !bridge
    {
        parts.push(driver.clone());
    }
    if let Some(bar) = function.largest_bar()
        && !bridge
    {
        parts.push(format!("BAR {} {}", bar.index, size::show(bar.size)));
    }
    if let Some(bytes) = function.cmb.filter(|bytes| *bytes > 0) {
        parts.push(format!("CMB {}", size::show(bytes)));
    }
    if let Some(bytes) = function.lends {
        parts.push(format!("lends {}", size::show(bytes)));
    }
    if let Some(link) = function.link {
        parts.push(link.to_string());
    }
    match function.acs {
        Some(acs) if acs.redirects() => parts.push("ACS redirects".into()),
        Some(Acs::Control(_)) if bridge => parts.push("ACS lets peers pass".into()),
        _ => {}
    }
    if let Some(Iommu::Group { number, .. }) = function.iommu
        && !bridge
    {
        parts.push(format!("group {number}"));
    }
    if let Some(node) = function.node
        && !bridge
    {
        parts.push(format!("node {node}"));
    }
    parts.join(", ")
}

/// The tree as text.
pub fn show(machine: &Machine, lines: &[Line], width: usize) -> String {
    let mut text = String::new();
    // For each depth, whether a rail continues.
    let mut rails: Vec<bool> = Vec::new();
    for line in lines {
        let (Some(index), Some(above)) = (line.function, line.depth.checked_sub(1)) else {
            text += &crate::table::paragraph(&line.text, width);
            rails.clear();
            continue;
        };
        rails.truncate(above);
        let draw = |rails: &[bool]| -> String {
            rails
                .iter()
                .map(|on| if *on { "│ " } else { "  " })
                .collect()
        };
        let fork = if line.has_next { "├ " } else { "└ " };
        let mark = line
            .label
            .as_ref()
            .map(|label| format!("[{label}] "))
            .unwrap_or_default();
        let what = format!("{mark}{} {}", machine.function(index).address, line.text);
        let before = draw(&rails);
        rails.push(line.has_next);
        let after = draw(&rails);
        let room = width.saturating_sub(2 * rails.len()).max(20);
        for (number, part) in crate::table::wrap_hanging(&what, room, 2)
            .iter()
            .enumerate()
        {
            text += &match number {
                0 => format!("{before}{fork}{part}\n"),
                _ => format!("{after}{part}\n"),
            };
        }
    }
    text
}
