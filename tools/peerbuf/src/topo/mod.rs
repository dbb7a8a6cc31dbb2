//! `peerbuf topo`: the tree of a machine's devices, and the kernel's predicted answer for each
//! pair.

mod matrix;
pub mod source;
mod svg;
mod tree;

use std::path::PathBuf;
use std::process::ExitCode;

use peerbuf_topo::{Machine, Rules};
use serde_json::{Value, json};

pub use source::{NotFound, Source, Target, of_disk};

use crate::{Failure, say, table};

/// Arguments of `peerbuf topo`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Show every PCI function, not only devices that can share buffers
    #[arg(long)]
    all: bool,
    /// Save the topology to this file, for `--from` on another machine. The file has no serial numbers,
    /// network or memory addresses, or host names
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Draw the tree and the matrix into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Maximum number of devices whose pairs are printed or drawn.
const MOST: usize = 64;
/// Maximum number of devices whose pairs are in JSON. More would give millions of pairs.
const MOST_IN_JSON: usize = 1024;

pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let machine = arguments.source.read()?;
    let write = |path: &PathBuf, text: String| {
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
    };
    if let Some(path) = &arguments.save {
        write(path, peerbuf_topo::save(&machine) + "\n")?;
        say::remark(format_args!(
            "{} PCI functions written to {}",
            machine.functions.len(),
            path.display()
        ));
    }
    let rules = Rules::new(&machine, arguments.source.kernel);
    let labels = tree::labels(&machine);
    let lines = tree::lines(&rules, &labels, arguments.all);
    if let Some(path) = &arguments.svg {
        write(path, svg::draw(&rules, &lines, &labels, MOST))?;
    }
    if arguments.json {
        say::answer(to_json(&rules, &labels))?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.save.is_some() || arguments.svg.is_some() {
        return Ok(ExitCode::SUCCESS);
    }
    let width = table::width();
    let mut text = table::paragraph(&about(&rules), width);
    text += "\n";
    text += &tree::show(&machine, &lines, width);
    if labels.is_empty() {
        text += "no GPU, NVMe disk, network card or other device that buffers are shared with; --all shows the rest\n";
    } else if labels.len() <= MOST {
        text += "\n";
        text += &matrix::show(&rules, &labels, width);
        for line in matrix::LEGEND.split('\n').collect::<Vec<_>>().chunks(2) {
            text += &table::paragraph(&line.join(" "), width);
        }
    } else {
        let count = labels.len();
        text +=
            &format!("\n{count} devices: --json has their pairs, up to {MOST_IN_JSON} devices\n");
    }
    say::answer(text.trim_end())?;
    Ok(ExitCode::SUCCESS)
}

/// One line about the source and the facts that it lacks.
pub fn about(rules: &Rules<'_>) -> String {
    let machine = rules.machine();
    let kernel = match rules.kernel() {
        Some(kernel) => format!("rules of Linux {kernel}"),
        None => "kernel unknown".into(),
    };
    let mut parts = vec![format!("read from {}", machine.format.name()), kernel];
    match machine.is_virtual {
        Some(true) => parts.push("virtual machine: its tree is not the hardware's".into()),
        Some(false) => {}
        None => parts.push("not known whether virtual".into()),
    }
    if machine.in_container == Some(true) {
        parts.push("in a container, which may hide devices".into());
    }
    [parts.join("; ")]
        .into_iter()
        .chain(lacks(machine))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The facts that the source has not, and those that the user may not read.
pub fn lacks(machine: &Machine) -> Vec<String> {
    let mut lines = Vec::new();
    if !machine.format.lacks().is_empty() {
        lines.push(format!(
            "unknown in {}: {}",
            machine.format.name(),
            machine.format.lacks()
        ));
    }
    let is_bridge =
        |f: &&peerbuf_topo::machine::Function| f.kind() == peerbuf_topo::machine::Kind::Bridge;
    let unread = machine
        .functions
        .iter()
        .filter(is_bridge)
        .filter(|f| f.acs.is_none())
        .count();
    if machine.format == peerbuf_topo::machine::Format::Sysfs && unread > 0 {
        lines.push(format!(
            "not read for lack of rights: ACS of {unread} bridges (root may)"
        ));
    }
    lines
}

fn to_json(rules: &Rules<'_>, labels: &[(peerbuf_topo::machine::Index, String)]) -> Value {
    let machine: &Machine = rules.machine();
    let devices: Vec<Value> = labels
        .iter()
        .map(|(index, label)| {
            let function = machine.function(*index);
            json!({
                "label": label,
                "address": function.address.to_string(),
                "kind": function.kind(),
                "names": function.names,
                "id": function.id.map(|(vendor, device)| format!("{vendor:04x}:{device:04x}")),
                "driver": function.driver,
                "bars": function.bars,
                "acs": function.acs,
                "link": function.link,
                "iommu": function.iommu,
                "numa_node": function.node,
                "dma_mask_bits": function.dma_bits,
                "cmb": function.cmb,
                "lends": function.lends,
                "bridges": machine.upwards(*index).skip(1)
                    .map(|at| machine.function(at).address.to_string()).collect::<Vec<_>>(),
                "host_bridge": machine.hosts[function.host as usize].name,
            })
        })
        .collect();
    let above: std::collections::BTreeSet<_> = labels
        .iter()
        .flat_map(|(index, _)| machine.upwards(*index).skip(1))
        .collect();
    let bridges: Vec<Value> = above
        .into_iter()
        .map(|index| {
            let bridge = machine.function(index);
            json!({
                "address": bridge.address.to_string(),
                "port": bridge.port,
                "acs": bridge.acs,
                "link": bridge.link,
                "numa_node": bridge.node,
            })
        })
        .collect();
    let mut pairs = Vec::new();
    let few = labels.len() <= MOST_IN_JSON;
    for (at, (one, a)) in labels.iter().enumerate().filter(|_| few) {
        for (other, b) in &labels[at + 1..] {
            let route = rules.route(*one, *other);
            pairs.push(json!({
                "a": a,
                "b": b,
                "kernel": matrix::word(route.possible),
                "near": route.near.map(|near| near.word()),
                "distance": route.distance,
            }));
        }
    }
    json!({
        "format": machine.format,
        "kernel": rules.kernel().map(|kernel| kernel.to_string()),
        "virtual": machine.is_virtual,
        "functions": machine.functions.len(),
        "container": machine.in_container,
        "nodes": machine.nodes,
        "options": machine.options,
        "unknown": lacks(machine),
        "devices": devices,
        "bridges": bridges,
        "pairs": few.then_some(pairs),
    })
}
