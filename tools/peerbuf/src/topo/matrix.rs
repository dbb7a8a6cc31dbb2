//! The matrix of pairs: the kernel's predicted answer, and the distance in nvidia-smi's words.

use peerbuf_topo::Rules;
use peerbuf_topo::machine::Index;
use peerbuf_topo::rules::{Map, Possible, Route};

/// The word for the kernel's predicted answer.
pub fn word(possible: Possible) -> &'static str {
    match (possible.known(), possible.allowed()) {
        (Some(Map::BusAddress), _) => "bus",
        (Some(Map::HostBridge), _) => "host",
        (Some(Map::NotSupported), _) => "no",
        (None, Some(true)) => "yes",
        (None, _) => "?",
    }
}

/// nvidia-smi's word for the distance.
pub fn near(route: &Route) -> &'static str {
    route.near.map_or("?", |near| near.word())
}

pub const LEGEND: &str = "\
left of the X, what the kernel will say: bus = by bus addresses, below a common bridge; host = through the host
bridge; yes = one of these; no = refused; ? = a fact is missing (`peerbuf why A B`)
right of it, in nvidia-smi's words: PIX = at most one PCIe switch; PXB = several; PHB = a host bridge; NODE = two
of one NUMA node; SYS = the link between NUMA nodes";

/// The kernel's answer below the diagonal, the distance above it. Both are symmetric. A matrix
/// that is too wide becomes several.
pub fn show(rules: &Rules<'_>, labels: &[(Index, String)], width: usize) -> String {
    let cell = labels
        .iter()
        .map(|(_, label)| label.len())
        .max()
        .unwrap_or(0)
        .max(4);
    let columns = (width.saturating_sub(cell) / (cell + 1)).max(1);
    let mut text = String::new();
    for (piece, chunk) in labels.chunks(columns).enumerate() {
        if piece > 0 {
            text.push('\n');
        }
        let heads: String = chunk
            .iter()
            .map(|(_, label)| format!(" {label:>cell$}"))
            .collect();
        text += &format!("{:cell$}{heads}\n", "");
        for (row, (one, label)) in labels.iter().enumerate() {
            let mut line = format!("{label:cell$}");
            for (column, (other, _)) in chunk.iter().enumerate() {
                let column = piece * columns + column;
                let route = rules.route(*one, *other);
                let word = match row.cmp(&column) {
                    std::cmp::Ordering::Equal => "X",
                    std::cmp::Ordering::Greater => word(route.possible),
                    std::cmp::Ordering::Less => near(&route),
                };
                line += &format!(" {word:>cell$}");
            }
            text += line.trim_end();
            text.push('\n');
        }
    }
    text
}
