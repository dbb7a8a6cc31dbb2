//! Snapshots of other tools. Facts that a format lacks stay unknown.

mod hwloc;
mod lspci;
mod nccl;
mod numbers;
mod rdma_topo;

use roxmltree::{Document, ParsingOptions};

use crate::machine::Machine;

pub(crate) use lspci::read as lspci;
pub(crate) use rdma_topo::read as rdma_topo;

/// Reads hwloc's or NCCL's XML; `None` for other XML.
pub(crate) fn xml(text: &str) -> Result<Option<Machine>, String> {
    // hwloc's files begin with a document type declaration. roxmltree limits the expansion of entities.
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
