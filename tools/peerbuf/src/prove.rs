//! `peerbuf prove`: moves bytes between two devices, in both directions, and checks whether
//! they arrive.
//!
//! The proof is the library's ([`FileImporter`], `Attachment::plan`), which a transfer makes
//! before it uses a path. It touches nothing that is in use:
//!
//! - the memory is exported for the proof, so nobody else has it, and the proof restores its
//!   bytes;
//! - the proof writes to an unnamed file on the disk's filesystem, or to a range of a raw disk
//!   that the user gives up. It only reads a file that the user names.
//!
//! A platform that loses bytes may log faults and stop a device that it blames.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use peerbuf::Buffer;
use peerbuf::buffer::Access;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::plan::{self, Direction, ProofPolicy, ReasonCode};
use peerbuf_topo::Rules;
use peerbuf_topo::machine::{Index, Kind};
use peerbuf_topo::reasons::{Effect, label};
use serde_json::{Value, json};

use crate::proofs::{FOLDERS, Proof, Seen, Way as Towards};
use crate::topo::{NotFound, Source};
use crate::why::{self, Way};
use crate::{Failure, ask, places, say, size, table};

/// Arguments of `peerbuf prove`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// A device: an address (0000:41:00.0), a name (nvme0n1), a node, or a file or directory on it. In a directory
    /// the proof makes an unnamed file; a named file is only read
    a: String,
    /// The other device. One of the two is a disk, and the other has memory
    b: String,
    /// Write to these bytes of a raw disk, and destroy what they hold: START:LENGTH, such as 1G:1M. Writes to a
    /// disk without a filesystem cannot be proved otherwise
    #[arg(long, value_name = "RANGE", value_parser = range)]
    scratch_range: Option<(u64, u64)>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
  peerbuf prove /mnt/data 0000:03:00.0
  peerbuf prove /dev/nvme1n1 0000:03:00.0 --scratch-range 1G:1M";

fn range(text: &str) -> Result<(u64, u64), String> {
    let (start, length) = text
        .split_once(':')
        .ok_or_else(|| format!("`{text}` is not START:LENGTH"))?;
    Ok((size::parse(start)?, size::parse(length)?))
}

/// Number of bytes of each trial.
const LENGTH: u64 = 64 << 10;

/// The file or disk side of the transfers.
struct Medium {
    importer: FileImporter,
    /// Display name of the file or disk.
    about: String,
}

/// A pair with the trial, or the reason why there was none.
struct Trial {
    way: Way,
    tried: Result<About, String>,
}

/// The details of a trial, and the files of its verdict.
struct About {
    medium: String,
    memory: String,
    kept: Vec<PathBuf>,
    not_kept: Option<String>,
    /// Directions without a result, with the reasons.
    unproved: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let source = Source::live();
    let machine = source.read()?;
    let find = |text| source.find(&machine, text);
    let (a, b) = match (find(&arguments.a), find(&arguments.b)) {
        (Ok(a), Ok(b)) => (a, b),
        (Err(NotFound(error)), _) | (_, Err(NotFound(error))) => {
            say::remark(format_args!("peerbuf: {error}"));
            return Ok(ExitCode::from(2));
        }
    };
    let rules = Rules::new(&machine, None);
    let mut pairs = Vec::new();
    for (client, named, provider) in [(&a, &arguments.a, &b), (&b, &arguments.b, &a)] {
        for one in &client.functions {
            for other in &provider.functions {
                if !pairs.iter().any(|(c, _, p)| (c, p) == (one, other)) {
                    pairs.push((*one, named.as_str(), *other));
                }
            }
        }
    }
    let trials: Vec<Trial> = pairs
        .iter()
        .map(|(client, named, provider)| {
            attempt(&rules, *client, named, *provider, arguments.scratch_range)
        })
        .collect();
    let tried: Vec<&Trial> = trials.iter().filter(|trial| trial.tried.is_ok()).collect();
    // A pair has two devices, and one of them is the disk. The other way round there is nothing
    // to try, which is not a failure.
    let good = !tried.is_empty() && tried.iter().all(|trial| trial.way.is_proved());
    if arguments.json {
        let all: Vec<Value> = trials.iter().map(|trial| to_json(&rules, trial)).collect();
        say::answer(json!({ "proved": good, "ways": all }))?;
    } else {
        let shown = if tried.is_empty() {
            trials.iter().collect()
        } else {
            tried
        };
        let width = table::width();
        let mut texts: Vec<String> = shown
            .iter()
            .map(|trial| show(&rules, trial, width))
            .collect();
        for reason in a.reasons.iter().chain(&b.reasons) {
            texts.push(table::labelled(
                reason.code.as_str(),
                &reason.evidence,
                width,
            ));
        }
        say::answer(texts.join("\n").trim_end())?;
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Tries one device's use of another device's memory in both directions, and keeps the results.
fn attempt(
    rules: &Rules<'_>,
    client: Index,
    named: &str,
    provider: Index,
    scratch: Option<(u64, u64)>,
) -> Trial {
    let machine = rules.machine();
    let mut way = Way::of(rules, client, provider, true);
    way.proof = None;
    let unable = way
        .argument
        .reasons
        .iter()
        .find(|reason| reason.effect == Effect::Blocks)
        .filter(|_| way.is_unable())
        .map(|reason| format!("{}: {}", reason.code, reason.evidence));
    let found = match unable {
        Some(why) => Err(why),
        None => medium(rules, client, named, scratch).and_then(|medium| {
            let buffer = ask::lend(machine.function(provider).address, u64::MAX)?;
            Ok((medium, buffer))
        }),
    };
    let (medium, buffer) = match found {
        Ok(found) => found,
        Err(why) => {
            let tried = Err(why);
            return Trial { way, tried };
        }
    };
    let mut proof = Proof::now(machine, client, provider);
    let mut unproved = Vec::new();
    for (towards, direction) in [
        (Towards::In, Direction::DiskToBuffer),
        (Towards::Out, Direction::BufferToDisk),
    ] {
        match prove(&medium, &buffer, direction) {
            Ok(seen) => proof.add(towards, seen),
            Err(why) => unproved.push(format!("{direction}: {why}")),
        }
    }
    let (kept, not_kept) = match [Towards::In, Towards::Out].map(|way| proof.seen(way)) {
        [None, None] => (Vec::new(), None),
        _ => FOLDERS.keep(machine, client, provider, &proof),
    };
    way.proof = Some(proof);
    let about = About {
        medium: medium.about,
        memory: format!("{} of {}", size::show(buffer.size()), buffer.name()),
        kept,
        not_kept,
        unproved,
    };
    Trial {
        way,
        tried: Ok(about),
    }
}

/// Moves bytes in one direction at the first, the last and another place of the buffer. `Err`
/// is the reason why there is no result.
fn prove(medium: &Medium, buffer: &Buffer, direction: Direction) -> Result<Seen, String> {
    let length = LENGTH.min(buffer.size());
    let places = places_of(buffer.size(), length, rand::random());
    // The result of one place says nothing about the next.
    let importer = medium.importer.clone().with_proofs(ProofPolicy::Every);
    for place in &places {
        let plan = buffer
            .range(*place, length)
            .map_err(Into::into)
            .and_then(|range| importer.attach(&range))
            .and_then(|mut attachment| attachment.plan(direction, 0))
            .map_err(|error| error.to_string())?;
        if plan.path == plan::Path::PeerToPeer {
            continue;
        }
        let reason = plan.reasons.first();
        let evidence = reason.map_or(String::new(), |reason| reason.evidence.clone());
        let evidence = format!("at {place:#x} of {}: {evidence}", buffer.name());
        return match reason.map(|reason| reason.code) {
            Some(
                code @ (ReasonCode::ProofFailed
                | ReasonCode::KernelRefused
                | ReasonCode::NoStructPages),
            ) => Ok(Seen::failed(code.as_str(), evidence)),
            Some(code) => Err(format!("{code}: {evidence}")),
            None => Err(evidence),
        };
    }
    let at: Vec<String> = places.iter().map(|place| format!("{place:#x}")).collect();
    Ok(Seen::arrived(format!(
        "{} each at {} of {}",
        size::show(length),
        at.join(", "),
        buffer.name()
    )))
}

/// The first place of `length` bytes, a random one, and the last, each once.
fn places_of(size: u64, length: u64, random: u64) -> Vec<u64> {
    let last = size.saturating_sub(length);
    let between = random % (last / length.max(1) + 1) * length;
    let mut places = vec![0, between, last];
    places.sort_unstable();
    places.dedup();
    places
}

/// The file or disk for the device's transfers: the one that the user named, else a filesystem
/// on the device, else the raw disk.
fn medium(
    rules: &Rules<'_>,
    client: Index,
    named: &str,
    scratch: Option<(u64, u64)>,
) -> Result<Medium, String> {
    let function = rules.machine().function(client);
    if !matches!(function.kind(), Kind::Nvme | Kind::Disk) {
        return Err(format!(
            "{} is a {}, and only disks move bytes for this proof; `peerbuf rdma` moves some by a network card",
            label(function),
            function.kind().name()
        ));
    }
    let path = Path::new(named);
    if path.is_dir() {
        return unnamed_in(path).map_err(|error| format!("{named}: {error}"));
    }
    if path.is_file() {
        let importer = FileImporter::open(path).map_err(|error| error.to_string())?;
        let about = format!("{named}, which is only read, and a file without a name beside it");
        return Ok(Medium { importer, about });
    }
    if scratch.is_none() {
        let here = places::mounts().into_iter().filter(|mount| {
            let disk = mount.disk.as_ref();
            disk.is_some_and(|disk| disk.layer.is_none() && disk.functions == [function.address])
        });
        let has_direct_io = |medium: &Medium| medium.importer.alignment().is_some();
        let found = here.filter_map(|mount| unnamed_in(&mount.at).ok());
        if let Some(medium) = { found }.find(has_direct_io) {
            return Ok(medium);
        }
    }
    raw(function, path, scratch)
}

fn unnamed_in(directory: &Path) -> Result<Medium, String> {
    let file: File = unnamed_file(directory).map_err(|error| error.to_string())?;
    let about = format!("a file without a name in {}", places::describe(directory));
    let importer = FileImporter::from_fd(file.into(), about.clone());
    let importer = importer.map_err(|error| error.to_string())?;
    Ok(Medium {
        importer: importer.with_scratch_directory(directory),
        about,
    })
}

/// The raw disk. The proof writes only to the range that the user gives up.
fn raw(
    function: &peerbuf_topo::machine::Function,
    named: &Path,
    scratch: Option<(u64, u64)>,
) -> Result<Medium, String> {
    let path = if named.starts_with("/dev") {
        named.to_owned()
    } else {
        let disk = peerbuf_topo::reasons::short_name(function)
            .ok_or_else(|| format!("{} has no disk that can be opened", function.address))?;
        Path::new("/dev").join(disk)
    };
    let access = match scratch {
        Some(_) => Access::ReadWrite,
        None => Access::Read,
    };
    let importer = FileImporter::open_for(&path, access).map_err(|error| {
        format!("{error}: name a directory on the disk, or a disk that this user may read")
    })?;
    let (importer, written) = match scratch {
        Some((start, length)) => (
            importer.with_scratch_range(start..start.saturating_add(length)),
            format!("written from {start} on"),
        ),
        None => (importer, "only read".to_owned()),
    };
    Ok(Medium {
        importer,
        about: format!("{}, which is {written}", path.display()),
    })
}

fn show(rules: &Rules<'_>, trial: &Trial, width: usize) -> String {
    let machine = rules.machine();
    let argument = &trial.way.argument;
    let (client, provider) = (
        machine.function(argument.client),
        machine.function(argument.provider),
    );
    let about = match &trial.tried {
        Ok(about) => about,
        Err(why) => {
            let text = format!(
                "{} and memory of {}: no bytes were tried: {why}",
                label(client),
                label(provider)
            );
            return table::paragraph(&text, width);
        }
    };
    let mut text = why::heading(&trial.way, client, provider, None, width);
    text += &table::labelled("    by       ", &about.medium, width);
    let memory = format!("{}, whose bytes are what they were", about.memory);
    text += &table::labelled("    and      ", &memory, width);
    for why in &about.unproved {
        text += &table::labelled("    unproved ", why, width);
    }
    for file in &about.kept {
        text += &table::labelled("    kept in  ", &file.display().to_string(), width);
    }
    if let (true, Some(why)) = (about.kept.is_empty(), &about.not_kept) {
        text += &table::labelled("    not kept ", why, width);
    }
    text
}

fn to_json(rules: &Rules<'_>, trial: &Trial) -> Value {
    let machine = rules.machine();
    let argument = &trial.way.argument;
    let address = |index| machine.function(index).address.to_string();
    let about = trial.tried.as_ref().ok();
    json!({
        "client": address(argument.client),
        "provider": address(argument.provider),
        "predicted": argument.verdict.name(),
        "kernel": trial.way.answer_text(),
        "verdict": trial.way.verdict().name(),
        "bytes": why::proof_json(trial.way.proof.as_ref()),
        "not_tried": trial.tried.as_ref().err(),
        "by": about.map(|about| &about.medium),
        "memory": about.map(|about| &about.memory),
        "unproved": about.map(|about| &about.unproved),
        "kept_in": about.map(|about| &about.kept),
        "not_kept": about.and_then(|about| about.not_kept.as_ref()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_the_last_and_a_random_place_are_tried_and_none_is_outside() {
        for (size, length, random, places) in [
            (4096, 4096, 7, &[0][..]),
            (1 << 20, 65_536, 0, &[0, 983_040]),
            (1 << 20, 65_536, 17, &[0, 65_536, 983_040]),
            (100_000, 65_536, u64::MAX, &[0, 34_464]),
        ] {
            let found = places_of(size, length, random);
            assert!(
                found.iter().all(|place| place + length <= size),
                "{found:x?}"
            );
            assert_eq!(found, places);
        }
    }

    #[test]
    fn a_range_has_a_start_and_a_length() {
        assert_eq!(range("1G:64K"), Ok((1 << 30, 64 << 10)));
        for bad in ["", "1G", "x:1", "1:-1"] {
            assert!(range(bad).is_err(), "{bad}");
        }
    }
}
