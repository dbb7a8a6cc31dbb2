//! The report of the matrix: a table for people, on a terminal or in Markdown, with the
//! evidence below it.

use super::{Cell, Matrix, Outcome};
use crate::table::{self, Notes, Table, paragraph};

/// The amount of text in a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Path and reason codes.
    Full,
    /// The same in one line. The notes need not repeat it.
    Markdown,
    /// Abbreviations, and the numbers of the notes.
    Short,
}

/// The meaning of the abbreviations. The other forms of the table use words.
const LEGEND: [&str; 4] = [
    "P2P: peer-to-peer, shared: shared-host-memory, staged: staged-copy",
    "(in parentheses): the kernel was asked, and no byte was moved",
    "no: the two do not go together",
    "[number]: why not, or why not by a better path",
];

/// The table for a terminal of `width` columns.
pub fn table(matrix: &Matrix, width: usize) -> String {
    let mut notes = Notes::default();
    let [full, short] = [Form::Full, Form::Short].map(|form| rows(matrix, form, &mut notes));
    let table = full.fit(width).map(|table| table + "\n");
    let table = table.or_else(|| {
        let legend = LEGEND.map(|line| paragraph(line, width)).concat();
        Some(format!("{}\n\n{legend}\n", short.pieces(width)?))
    });
    let mut text = table.unwrap_or_else(|| full.list(width) + "\n");
    text += &notes.show(width);
    for missing in &matrix.missing {
        text += &table::missing(&missing.what, &missing.remedy, width);
    }
    text
}

/// The table in Markdown.
pub fn markdown(matrix: &Matrix) -> String {
    let mut notes = Notes::default();
    let table = rows(matrix, Form::Markdown, &mut notes).markdown();
    let mut text = format!("{table}\n\n{}", notes.markdown());
    if !matrix.missing.is_empty() {
        text += "\nMissing there:\n\n";
    }
    for missing in &matrix.missing {
        text += &format!("- {}: {}\n", missing.what, missing.remedy);
    }
    text.trim_end().to_owned()
}

/// The importers as headings, and a row for each exporter.
fn rows(matrix: &Matrix, form: Form, notes: &mut Notes) -> Table {
    let mut exporters: Vec<&str> = Vec::new();
    let mut importers: Vec<&str> = vec![""];
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
    let mut table = Table::new(importers);
    for exporter in &exporters {
        let mut line = vec![(*exporter).to_owned()];
        let of = matrix
            .cells
            .iter()
            .filter(|cell| cell.exporter == *exporter);
        line.extend(of.map(|cell| describe(cell, form, notes)));
        table.row(line);
    }
    table
}

fn describe(cell: &Cell, form: Form, notes: &mut Notes) -> String {
    // The cell has the code, except in the short form.
    let mut note = |path: Option<&str>, code: Option<&str>, evidence: &str| {
        let code = code.filter(|_| form != Form::Markdown);
        notes.number(match (path, code) {
            (Some(path), Some(code)) => format!("not {path} ({code}): {evidence}"),
            (Some(path), None) => format!("not {path}: {evidence}"),
            (None, Some(code)) => format!("{code}: {evidence}"),
            (None, None) => evidence.to_owned(),
        })
    };
    let evidence = cell.evidence.as_deref().unwrap_or_default();
    match cell.outcome {
        Outcome::BytesChecked | Outcome::Mapped => {
            let path = cell.path.unwrap_or_default();
            let asked = cell.outcome == Outcome::Mapped;
            let mut text = match (form, asked) {
                (Form::Short, true) => format!("({})", short(path)),
                (Form::Short, false) => short(path).to_owned(),
                (_, true) => format!("{path} (asked)"),
                (_, false) => path.to_owned(),
            };
            // It is obvious that system memory is not peer memory.
            let reasons = cell.reasons.iter().filter(|reason| {
                !(reason.code == "not-device-memory" || reason.code == "not-host-memory")
            });
            for reason in reasons {
                let (path, code) = (reason.path, reason.code);
                let number = note(Some(path), Some(code), &reason.evidence);
                text += &match form {
                    Form::Full => format!("\n{code} {number}"),
                    Form::Markdown => format!(", {code} {number}"),
                    Form::Short => format!(" {number}"),
                };
            }
            text
        }
        Outcome::Impossible => {
            let code = cell.code.unwrap_or_default();
            let number = note(None, cell.code, evidence);
            match form {
                Form::Short => format!("no {number}"),
                _ => format!("no: {code} {number}"),
            }
        }
        Outcome::WrongBytes => "WRONG BYTES".into(),
        Outcome::Failed => {
            let number = note(None, None, evidence);
            format!("FAILED {number}")
        }
    }
}

/// A path's abbreviation, as in the legend.
fn short(path: &str) -> &str {
    match path {
        "peer-to-peer" => "P2P",
        "shared-host-memory" => "shared",
        "staged-copy" => "staged",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::{Missing, Reason};
    use crate::table::check;

    const PAGE: &str = include_str!("../../../../docs/matrix.md");

    fn leak(text: &str) -> &'static str {
        String::leak(text.to_owned())
    }

    /// A cell of the page.
    fn cell(exporter: &str, importer: &str, text: &str, notes: &[&str]) -> Cell {
        let (text, note) = match text
            .strip_suffix(']')
            .and_then(|text| text.split_once(" ["))
        {
            Some((text, number)) => (text, notes[number.parse::<usize>().unwrap() - 1]),
            None => (text, ""),
        };
        let mut cell = Cell {
            exporter: exporter.into(),
            importer: importer.into(),
            outcome: Outcome::BytesChecked,
            path: None,
            reasons: Vec::new(),
            code: None,
            evidence: None,
        };
        if let Some(code) = text.strip_prefix("no: ") {
            cell.outcome = Outcome::Impossible;
            cell.code = Some(leak(code));
            cell.evidence = Some(note.into());
            return cell;
        }
        let (path, code) = text.split_once(", ").unwrap_or((text, ""));
        let asked = path.strip_suffix(" (asked)");
        if asked.is_some() {
            cell.outcome = Outcome::Mapped;
        }
        cell.path = Some(leak(asked.unwrap_or(path)));
        if !code.is_empty() {
            let note = note.strip_prefix("not ").unwrap();
            let (path, evidence) = note.split_once(": ").unwrap();
            cell.reasons.push(Reason {
                path: leak(path),
                code: leak(code),
                evidence: evidence.into(),
            });
        }
        cell
    }

    /// The matrices of the page.
    fn matrices() -> Vec<Matrix> {
        let sections = PAGE.split("\n## ").skip(1);
        let matrices = sections.map(|section| {
            let notes = section.lines().filter_map(|line| line.strip_prefix("- ["));
            let notes: Vec<&str> = notes.map(|note| note.split_once("] ").unwrap().1).collect();
            let missing = section.lines().filter(|line| line.starts_with("- "));
            let missing = missing.filter(|line| !line.starts_with("- ["));
            let missing = missing.map(|line| {
                let (what, remedy) = line[2..].rsplit_once("): ").unwrap();
                Missing {
                    what: format!("{what})"),
                    remedy: remedy.into(),
                }
            });
            let lines = section.lines().filter(|line| line.starts_with("| "));
            let rows: Vec<Vec<&str>> = lines
                .map(|line| line.split('|').map(str::trim).collect())
                .collect();
            let mut cells = Vec::new();
            for row in &rows[1..] {
                for column in 2..row.len() - 1 {
                    cells.push(cell(row[1], rows[0][column], row[column], &notes));
                }
            }
            let missing = missing.collect();
            Matrix { cells, missing }
        });
        matrices.collect()
    }

    /// A large machine: three graphics cards, and devices that failed.
    fn large() -> Matrix {
        let mut matrix = matrices().pop().unwrap();
        let cells: Vec<Cell> = std::mem::take(&mut matrix.cells);
        for cell in cells {
            let copy = |importer: &str, outcome, evidence: &str| Cell {
                exporter: cell.exporter.clone(),
                importer: importer.into(),
                outcome,
                path: None,
                reasons: Vec::new(),
                code: None,
                evidence: Some(evidence.into()),
            };
            if cell.importer == "file" {
                for (importer, outcome) in [
                    ("DRM virtio_gpu", Outcome::Failed),
                    ("DRM amdgpu 2", Outcome::WrongBytes),
                    ("DRM nouveau", Outcome::Failed),
                ] {
                    let failure = format!("{importer}: EIO (Input/output error)");
                    matrix.cells.push(copy(importer, outcome, &failure));
                }
            }
            matrix.cells.push(cell);
        }
        matrix
    }

    #[test]
    fn the_page_has_the_tables_as_they_are() {
        let matrices = matrices();
        assert_eq!(matrices.len(), 3);
        for matrix in &matrices {
            let text = markdown(matrix);
            assert!(PAGE.contains(&text), "docs/matrix.md does not have\n{text}");
        }
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_and_nothing_is_lost() {
        for matrix in matrices().iter().chain([&large()]) {
            for width in [100, 80, 60, 40, 24] {
                let text = table(matrix, width);
                check::fits(&text, width);
                for cell in &matrix.cells {
                    check::names(&text, &cell.exporter);
                    check::names(&text, &cell.importer);
                    check::tells(&text, cell.path.unwrap_or_default());
                    check::tells(&text, cell.code.unwrap_or_default());
                    if cell.outcome != Outcome::WrongBytes {
                        check::tells(&text, cell.evidence.as_deref().unwrap_or_default());
                    }
                    for Reason {
                        path,
                        code,
                        evidence,
                    } in &cell.reasons
                    {
                        check::tells(&text, &format!("not {path} ({code}): {evidence}"));
                    }
                }
                for missing in &matrix.missing {
                    check::tells(
                        &text,
                        &format!("missing: {}{}", missing.what, missing.remedy),
                    );
                }
            }
        }
    }

    #[test]
    fn the_labs_importers_have_one_table_down_to_80_columns() {
        for matrix in matrices() {
            for width in [100, 80] {
                let text = table(&matrix, width);
                assert_eq!(text.matches("═\n").count(), 1, "{text}");
            }
        }
        let text = table(&large(), 80);
        assert_eq!(text.matches("═\n").count(), 2, "{text}");
        assert!(text.contains("WRONG"), "{text}");
    }

    #[test]
    fn a_small_matrix_needs_no_abbreviations() {
        let mut matrix = matrices().remove(0);
        matrix
            .cells
            .retain(|cell| ["CPU", "file"].contains(&cell.importer.as_str()));
        let text = table(&matrix, 80);
        assert!(text.contains("no-struct-pages [2]"), "{text}");
        assert!(!text.contains(LEGEND[0]), "{text}");
    }
}
