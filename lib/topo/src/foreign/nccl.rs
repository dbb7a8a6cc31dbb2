//! The XML of NCCL and RCCL (`NCCL_TOPO_DUMP_FILE`, or a file that clouds provide for `NCCL_TOPO_FILE`).
//!
//! It lists processors, each with the PCI devices near it, and a switch as one bridge. It has no root ports
//! and host bridges, and omits bridges with a single child. Clouds' files group devices below bridges at `ffff:ff:xx`, which do not
//! exist: they tell NCCL to use the devices together, and not that they share a switch.

use peerbuf_core::PciAddress;
use roxmltree::Node;

use super::numbers::{hex, number};
use crate::machine::{Format, Function, Link, Machine, Processor};
use crate::sysfs::tenths;

pub(super) fn read(root: Node<'_, '_>) -> Result<Machine, String> {
    let mut machine = Machine::empty(Format::Nccl);
    let mut found: Vec<(Function, Option<usize>)> = Vec::new();
    let processors = root
        .descendants()
        .filter(|element| element.has_tag_name("cpu"));
    for (at, processor) in processors.enumerate() {
        let node = number(processor, "numaid");
        let name = format!("cpu{}", node.unwrap_or(at as u32));
        let host = machine.host(&name, false, false);
        machine.nodes = Some(machine.nodes.unwrap_or(0) + 1);
        if let (Some(vendor), Some(family)) = (
            processor.attribute("vendor"),
            number::<u16>(processor, "familyid"),
        ) {
            // NCCL shifts the extended family left by four bits; files written by hand have the sum.
            let family = match family & 0xf {
                0xf if family > 0xf => (family & 0xf) + (family >> 4),
                _ => family,
            };
            machine.processor.get_or_insert(Processor {
                vendor: vendor.to_owned(),
                family,
            });
        }
        let mut waiting: Vec<(Node<'_, '_>, Option<usize>)> = vec![(processor, None)];
        while let Some((element, mut bridge)) = waiting.pop() {
            let name = element.tag_name().name();
            if name == "pci" {
                let address = element.attribute("busid").unwrap_or_default();
                let address: PciAddress = address.parse().map_err(|error| format!("{error}"))?;
                let mut function = Function::at(address);
                function.host = host;
                function.node = node;
                function.class = element.attribute("class").and_then(hex);
                let id = |name| Some(hex(element.attribute(name)?)? as u16);
                function.id = match (address.domain, address.bus) {
                    (0xffff, 0xff) => Some(Function::PLACEHOLDER),
                    _ => id("vendor").zip(id("device")),
                };
                let speed = element.attribute("link_speed").unwrap_or_default();
                let speed = speed.split_whitespace().next().and_then(tenths);
                let width: Option<u8> = number(element, "link_width");
                function.link =
                    speed
                        .zip(width)
                        .filter(|(_, width)| *width > 0)
                        .map(|(speed, width)| Link {
                            speed,
                            width,
                            most: None,
                        });
                found.push((function, bridge));
                bridge = Some(found.len() - 1);
            } else if let (Some(at), "net" | "gpu") = (bridge, name) {
                match (name, element.attribute("name"), element.attribute("dev")) {
                    ("net", Some(card), _) => found[at].0.names.push(card.to_owned()),
                    ("gpu", _, Some(number)) => found[at].0.names.push(format!("gpu{number}")),
                    _ => {}
                }
            }
            let children: Vec<_> = element.children().filter(Node::is_element).collect();
            waiting.extend(children.into_iter().rev().map(|child| (child, bridge)));
        }
    }
    if found.is_empty() {
        return Err("it has no PCI device".into());
    }
    machine.arrange(found);
    Ok(machine)
}
