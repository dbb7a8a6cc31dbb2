//! The JSON of `rdma_topo dump` (rdma-core): a list of devices with path, configuration space and IOMMU
//! group.
//!
//! It omits the host bridges' own functions, and devices that its vendor's cards do not need.

use std::collections::HashMap;

use peerbuf_core::PciAddress;
use serde::Deserialize;

use crate::config::Config;
use crate::machine::{Format, Function, Iommu, Machine};
use crate::sysfs::is_host;

#[derive(Deserialize)]
struct Device {
    realpath: String,
    config: String,
    modalias: String,
    iommu_group: Option<u32>,
    numa_node: Option<i64>,
    subsystems: Option<HashMap<String, Vec<String>>>,
}

pub(crate) fn read(text: &str) -> Result<Machine, String> {
    let devices: Vec<Device> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let mut machine = Machine::empty(Format::RdmaTopo);
    let mut found = Vec::new();
    let mut parents: Vec<Option<PciAddress>> = Vec::new();
    for device in devices {
        let names: Vec<&str> = device.realpath.split('/').collect();
        let address = names.last().copied().unwrap_or_default();
        let address: PciAddress = address.parse().map_err(|error| format!("{error}"))?;
        let host = names.iter().rev().find(|name| is_host(name));
        let host = host.ok_or_else(|| format!("`{}` has no host bridge in it", device.realpath))?;
        let mut function = Function::at(address);
        function.host = machine.host(host, false, true);
        let bytes = base64(&device.config)
            .and_then(|packed| inflate(&packed))
            .ok_or_else(|| format!("the configuration space of {address} cannot be unpacked"))?;
        let config = Config::new(&bytes, Some(bytes.len()).filter(|whole| *whole >= 256));
        function.id = config.id().or_else(|| id(&device.modalias));
        function.class = config.class();
        function.port = config.port();
        function.acs = config.acs();
        function.link = config.link();
        function.iommu = Some(match device.iommu_group {
            Some(number) => Iommu::Group {
                number,
                domain: None,
            },
            None => Iommu::None,
        });
        function.node = device.numa_node.and_then(|node| u32::try_from(node).ok());
        function.names = device
            .subsystems
            .into_iter()
            .flatten()
            .flat_map(|(_, names)| names)
            .collect();
        function.names.sort();
        parents.push(names.iter().rev().nth(1).and_then(|name| name.parse().ok()));
        found.push(function);
    }
    let places: HashMap<PciAddress, usize> = found
        .iter()
        .enumerate()
        .map(|(at, function)| (function.address, at))
        .collect();
    let above = parents
        .into_iter()
        .map(|parent| places.get(&parent?).copied());
    let above: Vec<Option<usize>> = above.collect();
    machine.arrange(found.into_iter().zip(above).collect());
    match machine.functions.is_empty() {
        true => Err("it has no device".into()),
        false => Ok(machine),
    }
}

/// `pci:v000010DEd00002330sv...`
fn id(modalias: &str) -> Option<(u16, u16)> {
    let rest = modalias.strip_prefix("pci:v")?;
    let hex = |text: &str| {
        u32::from_str_radix(text, 16)
            .ok()
            .map(|number| number as u16)
    };
    Some((hex(rest.get(..8)?)?, hex(rest.get(9..17)?)?))
}

fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut have) = (0_u32, 0);
    for letter in text
        .bytes()
        .filter(|letter| !letter.is_ascii_whitespace() && *letter != b'=')
    {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        have += 6;
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have) as u8);
        }
    }
    Some(bytes)
}

/// Unpacks a configuration space; fails if it is larger than 4096 bytes.
fn inflate(packed: &[u8]) -> Option<Vec<u8>> {
    miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(packed, 4096).ok()
}
