//! Other tools' snapshots. What a format lacks stays unknown.

mod hwloc;
mod lspci;
mod nccl;
mod numbers;
mod rdma_topo;

use roxmltree::{Document, ParsingOptions};

use crate::machine::Machine;

pub(crate) use lspci::read as lspci;
pub(crate) use rdma_topo::read as rdma_topo;

/// hwloc's or NCCL's; `None` for other XML.
pub(crate) fn xml(text: &str) -> Result<Option<Machine>, String> {
    // hwloc's begins with a DTD's name. Entities are not expanded without end (roxmltree's own limit).
    let options = ParsingOptions {
        allow_dtd: true,
        ..ParsingOptions::default()
    };
    let document =
        Document::parse_with_options(text, options).map_err(|error| error.to_string())?;
    let root = document.root_element();
    match root.tag_name().name() {
        "topology" => hwloc::read(root).map(Some),
        "system" => nccl::read(root).map(Some),
        _ => Ok(None),
    }
}
