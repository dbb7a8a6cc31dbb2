//! What the matrix tells: a table for people, on a terminal or in Markdown, and below it the
//! evidence, which has no room in a cell.

use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width, presets};

use super::{Cell, Matrix, Outcome};
use crate::table;

/// The table for a terminal.
pub fn table(matrix: &Matrix) -> String {
    let (mut lines, notes) = rows(matrix, "\n");
    let headings: Vec<String> = lines.remove(0);
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    let mut table = table::new(&headings);
    // Paths and codes have hyphens, at which they must not be broken, and names should not be.
    let columns = headings.len() as u16;
    for (number, column) in table.column_iter_mut().enumerate() {
        let width = if number == 0 { 16 } else { 20 };
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width)));
    }
    let needed = 18 + 21 * columns;
    if table.width().is_none_or(|width| width < needed) {
        table.set_width(needed);
    }
    table.add_rows(lines);
    let mut text = format!("{table}\n");
    for (number, note) in notes.iter().enumerate() {
        text += &format!("[{}] {note}\n", number + 1);
    }
    for missing in &matrix.missing {
        text += &format!("missing: {}\n    {}\n", missing.what, missing.remedy);
    }
    text
}

/// The same in Markdown.
pub fn markdown(matrix: &Matrix) -> String {
    let (mut lines, notes) = rows(matrix, ", ");
    let mut table = Table::new();
    table
        .load_preset(presets::ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(lines.remove(0))
        .add_rows(lines);
    let mut text = format!("{table}\n\n");
    for (number, note) in notes.iter().enumerate() {
        text += &format!("- [{}] {note}\n", number + 1);
    }
    if !matrix.missing.is_empty() {
        text += "\nMissing there:\n\n";
    }
    for missing in &matrix.missing {
        text += &format!("- {}: {}\n", missing.what, missing.remedy);
    }
    text.trim_end().to_owned()
}

/// The headings, a line for each exporter, and the notes that they refer to. `and` is between a
/// path and the reasons against better ones.
fn rows(matrix: &Matrix, and: &str) -> (Vec<Vec<String>>, Vec<String>) {
    let mut exporters: Vec<&str> = Vec::new();
    let mut importers: Vec<&str> = Vec::new();
    for cell in &matrix.cells {
        for (names, name) in [
            (&mut exporters, &cell.exporter),
            (&mut importers, &cell.importer),
        ] {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
    }
    let mut notes = Vec::new();
    let mut headings = vec![String::new()];
    headings.extend(importers.iter().map(|name| (*name).to_owned()));
    let mut lines = vec![headings];
    for exporter in &exporters {
        let mut line = vec![(*exporter).to_owned()];
        let of = matrix
            .cells
            .iter()
            .filter(|cell| cell.exporter == *exporter);
        line.extend(of.map(|cell| describe(cell, and, &mut notes)));
        lines.push(line);
    }
    (lines, notes)
}

fn describe(cell: &Cell, and: &str, notes: &mut Vec<String>) -> String {
    let mut note = |text: String| {
        let known = notes.iter().position(|note| *note == text);
        known.unwrap_or_else(|| {
            notes.push(text);
            notes.len() - 1
        }) + 1
    };
    match cell.outcome {
        Outcome::BytesChecked | Outcome::Mapped => {
            let mut text = cell.path.unwrap_or_default().to_owned();
            if cell.outcome == Outcome::Mapped {
                text += " (asked)";
            }
            // That system memory is no peer goes without saying.
            let reasons = cell.reasons.iter().filter(|reason| {
                !(reason.code == "not-device-memory" || reason.code == "not-host-memory")
            });
            for reason in reasons {
                let number = note(format!("not {}: {}", reason.path, reason.evidence));
                text += &format!("{and}{} [{number}]", reason.code);
            }
            text
        }
        Outcome::Impossible => {
            let number = note(cell.evidence.clone().unwrap_or_default());
            format!("no: {} [{number}]", cell.code.unwrap_or_default())
        }
        Outcome::WrongBytes => "WRONG BYTES".into(),
        Outcome::Failed => {
            let number = note(cell.evidence.clone().unwrap_or_default());
            format!("FAILED [{number}]")
        }
    }
}
