//! What the demo tells: a table for people, objects for programs.

use comfy_table::{ColumnConstraint, Width};
use serde::Serialize;

use super::protocol::{Account, Reason};
use crate::{size, table};

/// One transfer, with the fields of `--json`.
#[derive(Debug, Serialize)]
pub struct Transfer {
    buffer: String,
    source: String,
    sink: String,
    path: String,
    reasons: Vec<Reason>,
    bytes: u64,
    host_bytes: u64,
    /// Every byte was compared and right.
    pub verified: bool,
}

impl Transfer {
    pub fn new(
        buffer: &str,
        source: &str,
        sink: &str,
        account: Account,
        verified: bool,
    ) -> Transfer {
        Transfer {
            buffer: buffer.into(),
            source: source.into(),
            sink: sink.into(),
            path: account.path,
            reasons: account.reasons,
            bytes: account.bytes,
            host_bytes: account.host_bytes,
            verified,
        }
    }
}

/// The last line: how much was moved. All of it was checked; `cargo lab demo` adds such lines up.
pub fn summary(transfers: &[Transfer]) -> String {
    let bytes: u64 = transfers.iter().map(|transfer| transfer.bytes).sum();
    format!(
        "{} transfers, {bytes} bytes: every byte arrived",
        transfers.len()
    )
}

/// The table, with the evidence below it: there it has room. `place` is where the files are.
pub fn table(transfers: &[Transfer], place: &str) -> String {
    let mut table = table::new(&[
        "buffer",
        "from",
        "to",
        "path used",
        "why not a better one",
        "bytes",
        "through system memory",
        "checked",
    ]);
    // Paths and codes have hyphens, at which they must not be broken.
    for (column, width) in [(3, 20), (4, 26)] {
        if let Some(column) = table.column_mut(column) {
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width)));
        }
    }
    // Every row would repeat where the files are.
    let suffix = format!(" in {place}");
    let mut notes: Vec<&Reason> = Vec::new();
    for transfer in transfers {
        let end = |name: &str| match name.strip_suffix(&suffix) {
            Some(file) => file.to_owned(),
            None => "the buffer".to_owned(),
        };
        let mut why = Vec::new();
        for reason in &transfer.reasons {
            let known = notes.iter().position(|note| *note == reason);
            let number = known.unwrap_or_else(|| {
                notes.push(reason);
                notes.len() - 1
            });
            why.push(format!(
                "{}:\n  {} [{}]",
                reason.path,
                reason.code,
                number + 1
            ));
        }
        table.add_row([
            transfer.buffer.clone(),
            end(&transfer.source),
            end(&transfer.sink),
            transfer.path.clone(),
            if why.is_empty() {
                "it is the best".into()
            } else {
                why.join("\n")
            },
            size::show(transfer.bytes),
            size::show(transfer.host_bytes),
            if transfer.verified {
                "every byte".into()
            } else {
                "WRONG BYTES".to_string()
            },
        ]);
    }
    let mut text = format!("files in {place}, of random bytes\n{table}\n");
    for (number, note) in notes.iter().enumerate() {
        text += &format!("[{}] not {}: {}\n", number + 1, note.path, note.evidence);
    }
    text
}
