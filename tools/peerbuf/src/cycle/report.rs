//! The summary, for people and for programs.

use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;
use peerbuf::share::Migration;
use serde::Serialize;

use super::pattern::Loss;
use crate::size;

/// Number of losses that a summary lists. Further losses are only counted.
const LISTED: usize = 10;

/// The results of a run.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub backing: String,
    /// Substitutes for exporters and importers that the machine lacks.
    pub missing: Vec<String>,
    pub importers: Vec<String>,
    pub processes: usize,
    pub buffers: usize,
    pub size: u64,
    pub seed: u64,
    /// A digest of the schedule: equal for equal seed, options and cycles.
    pub schedule: String,
    pub interrupted: bool,
    pub seconds: f64,
    pub cycles: u64,
    pub moves: Moves,
    pub work: Vec<Work>,
    pub verified_bytes: u64,
    pub faults: Faults,
    /// Latencies in microseconds.
    pub latency: Latency,
    pub failures: Vec<String>,
    pub lost_bytes: u64,
    pub losses: Vec<Loss>,
}

#[derive(Debug, Default, Serialize)]
pub struct Moves {
    pub all: u64,
    /// Number of these moves that took a buffer away from a process that was cut off.
    pub evictions: u64,
    /// Number of additional moves, by the kernel, of buffers in use.
    pub underneath: u64,
    /// Number of such moves that the kernel refused (`EBUSY`), because importers needed the
    /// buffer in place.
    pub underneath_refused: u64,
    /// Number of generations that were asked back, counted once per process.
    pub invalidations: u64,
    pub given_back: u64,
    pub not_given_back: u64,
}

#[derive(Debug, Serialize)]
pub struct Work {
    pub importer: String,
    pub jobs: u64,
    /// Number of jobs by path; all zero for an importer that has only one.
    pub peer_to_peer: u64,
    pub shared_host_memory: u64,
    pub staged_copy: u64,
}

#[derive(Debug, Default, Serialize)]
pub struct Faults {
    pub killed: u64,
    pub stopped: u64,
    /// Number of processes that were cut off after they had been stopped.
    pub cut_off: u64,
    /// Number of processes that were cut off although nobody had stopped them: the machine is
    /// too slow for the time limit.
    pub late: u64,
    /// Number of writes, by processes that had been cut off, to memory that they still had.
    pub late_writes: u64,
}

#[derive(Debug, Serialize)]
pub struct Latency {
    pub announce: Part,
    pub drain: Part,
    #[serde(rename = "move")]
    pub transfer: Part,
    pub offer: Part,
    pub total: Part,
}

#[derive(Debug, Serialize)]
pub struct Part {
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

/// The durations of moves.
pub struct Latencies {
    parts: [Histogram<u64>; 5],
}

impl Latencies {
    pub fn new() -> Result<Latencies, hdrhistogram::CreationError> {
        let one = Histogram::new_with_bounds(1, 3_600_000_000, 3)?;
        Ok(Latencies {
            parts: [one.clone(), one.clone(), one.clone(), one.clone(), one],
        })
    }

    pub fn record(&mut self, moved: &Migration) {
        let times = [
            moved.announce,
            moved.drain,
            moved.transfer,
            moved.offer,
            moved.total(),
        ];
        for (part, time) in self.parts.iter_mut().zip(times) {
            part.saturating_record(time.as_micros() as u64);
        }
    }

    pub fn summary(&self) -> Latency {
        let [announce, drain, transfer, offer, total] = &self.parts;
        let part = |histogram: &Histogram<u64>| Part {
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            max: histogram.max(),
        };
        Latency {
            announce: part(announce),
            drain: part(drain),
            transfer: part(transfer),
            offer: part(offer),
            total: part(total),
        }
    }
}

/// The first few losses, for the list.
pub fn listed(losses: Vec<Loss>) -> Vec<Loss> {
    losses.into_iter().take(LISTED).collect()
}

/// The summary for people.
pub fn text(summary: &Summary) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write(&mut text, summary);
    text
}

fn write(out: &mut String, summary: &Summary) -> std::fmt::Result {
    let Summary {
        moves,
        faults,
        latency,
        ..
    } = summary;
    writeln!(
        out,
        "{} processes worked with {} on {} buffers of {} ({}) while these moved; seed {}",
        summary.processes,
        summary.importers.join(", "),
        summary.buffers,
        size::show(summary.size),
        summary.backing,
        summary.seed,
    )?;
    let how = if summary.interrupted {
        ", stopped early"
    } else {
        ""
    };
    writeln!(
        out,
        "cycles          {} in {:.1} s{how}",
        summary.cycles, summary.seconds
    )?;
    writeln!(
        out,
        "moves           {}, of which {} took a buffer away from a process that was cut off",
        moves.all, moves.evictions
    )?;
    if moves.underneath + moves.underneath_refused > 0 {
        writeln!(
            out,
            "underneath      {} more by the kernel, of buffers in use; {} refused as busy",
            moves.underneath, moves.underneath_refused
        )?;
    }
    writeln!(
        out,
        "invalidations   {}: {} given back, {} not (the process was dead or cut off)",
        moves.invalidations, moves.given_back, moves.not_given_back
    )?;
    for work in &summary.work {
        let paths = [
            (work.peer_to_peer, "peer-to-peer"),
            (work.shared_host_memory, "shared-host-memory"),
            (work.staged_copy, "staged-copy"),
        ];
        let paths: Vec<String> = paths
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, name)| format!("{count} {name}"))
            .collect();
        let paths = match paths.is_empty() {
            true => String::new(),
            false => format!(": {}", paths.join(", ")),
        };
        writeln!(out, "{:<15} {} jobs{paths}", work.importer, work.jobs)?;
    }
    writeln!(
        out,
        "verified        {:.1} MiB",
        summary.verified_bytes as f64 / f64::from(1 << 20)
    )?;
    writeln!(
        out,
        "faults          {} killed, {} stopped; {} cut off after a stop, {} late by themselves; \
         {} late writes",
        faults.killed, faults.stopped, faults.cut_off, faults.late, faults.late_writes
    )?;
    writeln!(out, "time of a move         p50        p99        max")?;
    let parts = [
        ("announce", &latency.announce),
        ("drain", &latency.drain),
        ("move", &latency.transfer),
        ("offer", &latency.offer),
        ("all of it", &latency.total),
    ];
    for (name, part) in parts {
        writeln!(
            out,
            "  {name:<12} {:>10} {:>10} {:>10}",
            show_time(part.p50),
            show_time(part.p99),
            show_time(part.max)
        )?;
    }
    for failure in &summary.failures {
        writeln!(out, "failed: {failure}")?;
    }
    for loss in &summary.losses {
        writeln!(out, "LOST  {loss}")?;
    }
    write!(out, "lost: {}", summary.lost_bytes)
}

fn show_time(microseconds: u64) -> String {
    let time = Duration::from_micros(microseconds);
    match microseconds {
        0..10_000 => format!("{microseconds} us"),
        10_000..10_000_000 => format!("{} ms", time.as_millis()),
        _ => format!("{} s", time.as_secs()),
    }
}
