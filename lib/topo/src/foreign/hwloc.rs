//! hwloc's XML, versions 1 to 3 (`lstopo --of xml`, best with `--whole-io`).
//!
//! It has the tree, NUMA nodes and names. It usually omits the host bridges' own functions, and all PCI
//! domains above ffff (Intel's VMD).

use roxmltree::Node;

use super::numbers::{hex, number};
use crate::machine::{Format, Function, Machine, Port, Processor};

pub(super) fn read(root: Node<'_, '_>) -> Result<Machine, String> {
    let mut machine = Machine::empty(Format::Hwloc);
    let mut found: Vec<(Function, Option<usize>)> = Vec::new();
    let (mut nodes, mut vendor, mut family, mut architecture) = (0, None, None, None);
    // Elements to visit, each with its host bridge, bridge and NUMA node.
    let mut waiting: Vec<(Node<'_, '_>, Above)> = vec![(root, Above::default())];
    while let Some((element, mut above)) = waiting.pop() {
        if element.tag_name().name() == "info" {
            let value = element.attribute("value").map(str::to_owned);
            match element.attribute("name") {
                Some("CPUVendor") => vendor = value,
                Some("Architecture") => architecture = value,
                Some("CPUFamilyNumber") => family = value.and_then(|family| family.parse().ok()),
                _ => {}
            }
        }
        match element.attribute("type") {
            Some("NUMANode") => nodes += 1,
            Some("Bridge")
                if element
                    .attribute("bridge_type")
                    .is_some_and(|kind| kind.starts_with("0-")) =>
            {
                let buses = element.attribute("bridge_pci").unwrap_or_default();
                // 0000:[00-1f]
                let (domain, buses) = buses.split_once(":[").unwrap_or_default();
                let bus = buses.split('-').next().unwrap_or_default();
                above.host = Some(machine.host(&format!("pci{domain}:{bus}"), false, true));
                above.bridge = None;
            }
            Some("Bridge" | "PCIDev") => {
                let address = element.attribute("pci_busid").unwrap_or_default();
                let address = address.parse().map_err(|error| format!("{error}"))?;
                let mut function = Function::at(address);
                let unknown = format!("pci{:04x}:{:02x}", address.domain, address.bus);
                function.host = above
                    .host
                    .unwrap_or_else(|| machine.host(&unknown, false, false));
                function.node = above.node;
                describe(element, &mut function);
                if above.bridge.is_none() && element.attribute("type") == Some("Bridge") {
                    // A device with a link on a root bus is a root port.
                    let speed: Option<f64> = number(element, "pci_link_speed");
                    function.port = speed.filter(|speed| *speed > 0.0).map(|_| Port::RootPort);
                }
                found.push((function, above.bridge));
                above.bridge = Some(found.len() - 1);
            }
            Some("OSDev") => {
                if let (Some(bridge), Some(name)) = (above.bridge, element.attribute("name")) {
                    found[bridge].0.names.push(name.to_owned());
                }
            }
            // A part of the machine with its own memory: devices in it are near that NUMA node.
            Some(_) => {
                if let Some(node) = own_node(element) {
                    above.node = Some(node);
                }
            }
            None => {}
        }
        let children: Vec<_> = element.children().filter(Node::is_element).collect();
        waiting.extend(children.into_iter().rev().map(|child| (child, above)));
    }
    if found.is_empty() {
        return Err(
            "it has no PCI device (lstopo leaves them out unless asked: --whole-io)".into(),
        );
    }
    machine.nodes = (nodes > 0).then_some(nodes);
    machine.processor = match (vendor, family) {
        (Some(vendor), Some(family)) => Some(Processor { vendor, family }),
        // Other vendors' families do not matter; an AMD processor without a family could be an old one.
        (Some(vendor), None) if vendor != "AuthenticAMD" => Some(Processor { vendor, family: 0 }),
        (None, _) => architecture
            .filter(|name: &String| !["x86_64", "i386", "i686"].contains(&name.as_str()))
            .map(|_| Processor {
                vendor: String::new(),
                family: 0,
            }),
        _ => None,
    };
    machine.arrange(found);
    Ok(machine)
}

#[derive(Clone, Copy, Default)]
struct Above {
    host: Option<u32>,
    bridge: Option<usize>,
    node: Option<u32>,
}

/// The only NUMA node that is a child of this element, or is named by its `nodeset`.
fn own_node(element: Node<'_, '_>) -> Option<u32> {
    if element.attribute("type") == Some("NUMANode") {
        return number(element, "os_index");
    }
    let set = element.attribute("nodeset")?;
    // `0x00000001`, or `0x1,0x0` for more than 32 nodes.
    let mut bits = set.rsplit(',').enumerate().flat_map(|(word, text)| {
        let bits = hex(text).unwrap_or(0);
        let set = (0..32).filter(move |bit| bits >> bit & 1 != 0);
        set.map(move |bit| bit + 32 * word as u32)
    });
    let first = bits.next()?;
    bits.next().is_none().then_some(first)
}

/// Parses `pci_type="0108 [144d:a808] [144d:a801] 00"`. `pci_link_speed` is the total of all lanes, from
/// which neither the number of lanes nor their speed follows.
fn describe(element: Node<'_, '_>, function: &mut Function) {
    let kind = element.attribute("pci_type").unwrap_or_default();
    function.class = kind.get(..4).and_then(hex).map(|class| class << 8);
    let id = kind
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    function.id = id.and_then(|(id, _)| {
        let (vendor, device) = id.split_once(':')?;
        Some((hex(vendor)? as u16, hex(device)? as u16))
    });
}
