//! `peerbuf matrix`: tries each exporter with each importer, and checks the bytes.

mod exporters;
mod importers;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use peerbuf::error::Unavailable;
use serde::Serialize;

use crate::progress::Progress;
use crate::{Failure, places, say, size, table};

/// Arguments of `peerbuf matrix`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// How large a buffer each exporter makes, where it can choose
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = size::parse)]
    size: u64,

    /// Where the files are made; nothing is left there [default: a filesystem on an NVMe disk]
    #[arg(long, value_name = "DIRECTORY")]
    dir: Option<PathBuf>,

    /// One JSON object instead of the table
    #[arg(long, conflicts_with = "markdown")]
    json: bool,

    /// The table in Markdown
    #[arg(long)]
    markdown: bool,
}

const AFTER_HELP: &str = "\
A cell says by which path the bytes went, after they were written by one side, read by the other
and compared; or the reason why the two do not go together. (asked) means that the kernel would do
it for the importer, which has no way to move bytes by itself.

Test devices without hardware join in when their modules are there: `modprobe -a vgem vivid`. A
device of vfio-pci exports its largest BAR, and QEMU's `edu` does DMA through VFIO.

The command overwrites prefetchable BARs of devices that are bound to peerbuf.ko or vfio-pci. Other BARs
may be registers, and are left alone.

JSON: cells (exporter, importer, outcome, path, reasons, code, evidence) and missing (what, remedy).
Outcomes: bytes-checked, mapped (the importer has no way to move bytes by itself), impossible,
wrong-bytes, failed. The last two are failures of the command too.";

/// The result for one pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    BytesChecked,
    Mapped,
    Impossible,
    WrongBytes,
    Failed,
}

/// One pair, with the fields of `--json`.
#[derive(Debug, Serialize)]
pub struct Cell {
    exporter: String,
    importer: String,
    outcome: Outcome,
    /// The path, if the importer can use the buffer.
    path: Option<&'static str>,
    /// The reasons against better paths.
    reasons: Vec<Reason>,
    /// The reason code, if the importer cannot use the buffer.
    code: Option<&'static str>,
    /// The evidence for this reason.
    evidence: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Reason {
    path: &'static str,
    code: &'static str,
    evidence: String,
}

/// A requirement that the machine lacks.
#[derive(Debug, Serialize)]
struct Missing {
    what: String,
    remedy: String,
}

impl From<Unavailable> for Missing {
    fn from(error: Unavailable) -> Missing {
        Missing {
            what: format!("{}: {}", error.what, error.cause),
            remedy: error.remedy,
        }
    }
}

/// The whole matrix, with the fields of `--json`.
#[derive(Debug, Serialize)]
pub struct Matrix {
    cells: Vec<Cell>,
    missing: Vec<Missing>,
}

/// Makes the matrix. `Err` if bytes were wrong, or a pair failed for an unknown reason.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let directory = match &arguments.dir {
        Some(directory) => directory.clone(),
        None => places::working_directory(),
    };
    let page = rustix::param::page_size() as u64;
    // The bytes of one exchange, and the picture of the video device, must fit.
    let size = arguments.size.max(1 << 18).next_multiple_of(page);
    let mut missing = Vec::new();
    let mut exporters = exporters::all(size, &mut missing);
    let mut importers = importers::all(&directory, &mut missing);
    distinguish(exporters.iter_mut().map(|exporter| &mut exporter.name));
    distinguish(importers.iter_mut().map(|importer| &mut importer.name));
    // An exporter and an importer may lack the same requirement.
    let mut seen = std::collections::HashSet::new();
    missing.retain(|missing: &Missing| seen.insert(missing.what.clone()));

    let mut matrix = Matrix {
        cells: Vec::new(),
        missing,
    };
    for exporter in &exporters {
        for importer in &importers {
            let _progress = Progress::start(format!("{} and {}", exporter.name, importer.name));
            matrix.cells.push(meet(exporter, importer));
        }
    }
    say::answer(match (arguments.json, arguments.markdown) {
        (true, _) => serde_json::to_string(&matrix)?,
        (_, true) => report::markdown(&matrix),
        _ => report::table(&matrix, table::width()).trim_end().to_owned(),
    })?;
    let bad = |cell: &&Cell| matches!(cell.outcome, Outcome::WrongBytes | Outcome::Failed);
    match matrix.cells.iter().filter(bad).count() {
        0 => Ok(ExitCode::SUCCESS),
        bad => Err(format!("{bad} of {} meetings failed", matrix.cells.len()).into()),
    }
}

/// Numbers further devices of one name, such as a second card of the same driver, so that each
/// has its own row or column.
fn distinguish<'n>(names: impl Iterator<Item = &'n mut String>) {
    let mut seen = std::collections::HashMap::new();
    for name in names {
        let number = seen.entry(name.clone()).or_insert(0);
        *number += 1;
        if *number > 1 {
            *name += &format!(" {number}");
        }
    }
}

fn meet(exporter: &exporters::Exporter, importer: &importers::Column) -> Cell {
    let cell = |outcome| Cell {
        exporter: exporter.name.clone(),
        importer: importer.name.clone(),
        outcome,
        path: None,
        reasons: Vec::new(),
        code: None,
        evidence: None,
    };
    // A new buffer each time: the remains of one exchange must not help the next.
    let met = match (exporter.make)() {
        Ok(buffer) => importer.meet(&buffer),
        Err(error) => Err(importers::Refusal::Failed(error.to_string())),
    };
    match met {
        Ok(met) => Cell {
            path: Some(met.plan.path.as_str()),
            reasons: met
                .plan
                .reasons
                .iter()
                .map(|reason| Reason {
                    path: reason.path.as_str(),
                    code: reason.code.as_str(),
                    evidence: reason.evidence.clone(),
                })
                .collect(),
            ..cell(match met.bytes {
                Some(true) => Outcome::BytesChecked,
                Some(false) => Outcome::WrongBytes,
                None => Outcome::Mapped,
            })
        },
        Err(importers::Refusal::Impossible(code, evidence)) => Cell {
            code: Some(code.as_str()),
            evidence: Some(evidence),
            ..cell(Outcome::Impossible)
        },
        Err(importers::Refusal::Failed(evidence)) => Cell {
            evidence: Some(evidence),
            ..cell(Outcome::Failed)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cards_of_one_driver_have_two_names() {
        let mut names =
            ["CPU", "DRM amdgpu", "DRM vgem", "DRM amdgpu", "DRM amdgpu"].map(String::from);
        distinguish(names.iter_mut());
        let expected = [
            "CPU",
            "DRM amdgpu",
            "DRM vgem",
            "DRM amdgpu 2",
            "DRM amdgpu 3",
        ];
        assert_eq!(names, expected);
    }
}
