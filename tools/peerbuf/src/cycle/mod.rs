//! `peerbuf cycle`: buffers move repeatedly while other processes use them and are stopped and
//! killed, and every byte is checked.
//!
//! This module is the first process: it publishes the buffers, moves them, and keeps the
//! expected contents ([`ledger`]). The other processes ([`worker`]) do the work.

mod board;
mod crew;
mod importers;
mod ledger;
mod memory;
mod pattern;
mod report;
mod schedule;
pub mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use peerbuf::Errno;
use peerbuf::device::drm::Card;
use peerbuf::export::memfd::HugePages;
use peerbuf::export::peerbuf::{self as peerbuf_ko, Device, MoveTo};
use peerbuf::export::provider;
use peerbuf::export::{drm, heap};
use peerbuf::share::{BufferId, Channel, CutOff, Event, Fault, Publisher};

use crate::{Failure, places, say, size};
use board::Counter;
use crew::Process;
use importers::Kind;
use ledger::{Lanes, Ledger, Writer};
use memory::{Bar, Moving, Shared, Source, lock, name};
use pattern::{CELL, Loss};
use report::{Faults, Latencies, Moves, Summary, Work};
use schedule::{Odds, Schedule};
use worker::{Orders, Report};

/// Arguments of `peerbuf cycle`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// The memory behind the buffers
    #[arg(long, value_enum, default_value = "udmabuf")]
    backing: Backing,

    /// The importers that use the buffers
    #[arg(long, value_enum, value_delimiter = ',', default_value = "cpu,nvme")]
    importers: Vec<Kind>,

    /// Number of processes that use the buffers
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u32).range(1..=1024))]
    processes: u32,

    /// Number of buffers
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u32).range(1..=4096))]
    buffers: u32,

    /// Size of each buffer; every process gets an equal part of at least 4096 bytes
    #[arg(long, value_name = "SIZE", default_value = "256K", value_parser = size::parse)]
    size: u64,

    /// Stop after N cycles; a cycle moves one buffer [default: 1000]
    #[arg(long, value_name = "N")]
    cycles: Option<u64>,

    /// Stop after S seconds
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,

    /// Probability that a process is killed, in each cycle
    #[arg(long, value_name = "P", default_value = "0", value_parser = probability)]
    kill: f64,

    /// Probability that a process is stopped for a while, in each cycle
    #[arg(long, value_name = "P", default_value = "0", value_parser = probability)]
    stall: f64,

    /// Time limit for a process to return a buffer, in milliseconds
    #[arg(long, value_name = "MS", default_value = "500", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    time_limit: u64,

    /// Seed of the random numbers [default: a random seed, shown in the summary]
    #[arg(long, value_name = "X")]
    seed: Option<u64>,

    /// Directory for temporary files, which are removed afterwards [default: a filesystem on an NVMe disk]
    #[arg(long, value_name = "DIRECTORY")]
    scratch: Option<PathBuf>,

    /// Print the summary as one JSON object
    #[arg(long)]
    json: bool,

    /// Break a guarantee on purpose, to see that it is noticed
    #[arg(long, value_enum, hide = true, value_name = "GUARANTEE")]
    r#break: Option<Break>,
}

const AFTER_HELP: &str = "\
Each process uses its own part of every buffer: it writes patterns that identify writer, buffer,
generation and position, and checks that they persist. The first process recalls buffers, moves them,
compares every byte with the expected one, and offers the buffers again. A process that died or does not
return a buffer in time is cut off and replaced; its later writes must not reach any other process.

The same seed and options give the same schedule of moves, stops and kills. Ctrl-C ends the run with
its summary. Exit status: 1 when a byte was lost or an importer failed.

  peerbuf cycle --processes 8 --kill 0.05 --stall 0.02 --seconds 30";

fn probability(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.0..=1.0).contains(&number) => Ok(number),
        _ => Err("a probability is a number from 0 to 1".into()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Backing {
    /// System memory with a dma-buf; some of it in huge pages, if the machine has free ones and the size fits
    Udmabuf,
    /// The BAR of a device bound to peerbuf.ko; the kernel moves the buffer to system memory and back
    Bar,
    /// The controller memory buffer of an NVMe disk, published by its driver; the kernel moves the buffer
    /// as one in a BAR
    Cmb,
    /// A dma-heap
    Heap,
    /// Buffers of a graphics driver
    Drm,
    /// System memory without a dma-buf
    Memfd,
    /// All kinds with dma-bufs; every second buffer is in a BAR
    Mixed,
}

/// The guarantees that can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Break {
    /// A buffer moves though processes still use it
    SkipDrain,
    /// The next generation is the memory of the one before
    ReuseGeneration,
    /// A copy leaves a few bytes out
    TearCopy,
}

/// Runs the storm. `Ok` holds the failure status when a byte was lost.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&signals, flags)?;

    let mut storm = Storm::begin(arguments)?;
    let progress = storm.progress_bar();
    let mut interrupted = false;
    while !storm.is_over() && !interrupted {
        storm.step()?;
        progress.set_position(storm.position());
        progress.set_message(format!("{} moves", storm.moves.all));
        interrupted = signals.read_signal()?.is_some();
    }
    progress.finish_and_clear();
    let summary = storm.finish(interrupted)?;
    if arguments.json {
        say::answer(serde_json::to_string(&summary)?)?;
    } else {
        say::answer(report::text(&summary))?;
    }
    if summary.lost_bytes > 0 {
        return Err(format!("{} bytes were lost", summary.lost_bytes).into());
    }
    if !summary.failures.is_empty() {
        return Err(format!("{} failures", summary.failures.len()).into());
    }
    Ok(ExitCode::SUCCESS)
}

struct Storm<'a> {
    arguments: &'a Arguments,
    seed: u64,
    missing: Vec<String>,
    begun: Instant,
    time_limit: Duration,
    scratch: PathBuf,
    importers: Vec<Kind>,
    bar: Option<Bar>,
    rest: f64,
    lanes: Lanes,
    schedule: Schedule,
    shared: Arc<Mutex<Shared>>,
    publisher: Publisher,
    ids: Vec<BufferId>,
    /// The workers' processes, by slot.
    crew: Vec<Process>,
    /// Workers that were cut off and are still alive.
    outcasts: Vec<(Process, Writer)>,
    strikes: Vec<JoinHandle<()>>,
    writers: u32,
    cycles: u64,
    moves: Moves,
    faults: Faults,
    latencies: Latencies,
    failures: Vec<String>,
    totals: Totals,
}

/// The sums over the boards of former workers.
#[derive(Default)]
struct Totals {
    verified: u64,
    jobs: [u64; board::IMPORTERS],
    paths: [u64; 3],
    late_writes: u64,
}

impl Totals {
    fn add(&mut self, writer: &mut Writer) -> Result<(), Failure> {
        let board = &mut writer.board;
        self.verified += board.counted(Counter::Verified, 0)?;
        self.late_writes += board.counted(Counter::LateWrites, 0)?;
        for (which, jobs) in self.jobs.iter_mut().enumerate() {
            *jobs += board.counted(Counter::Jobs, which)?;
        }
        for (which, count) in self.paths.iter_mut().enumerate() {
            *count += board.counted(Counter::Paths, which)?;
        }
        Ok(())
    }
}

impl<'a> Storm<'a> {
    fn begin(arguments: &'a Arguments) -> Result<Storm<'a>, Failure> {
        let processes = arguments.processes as usize;
        let buffers = arguments.buffers as usize;
        let page = rustix::param::page_size() as u64;
        if arguments.size == 0 || !arguments.size.is_multiple_of(page) {
            return Err(format!("--size must be a multiple of the page size, {page}").into());
        }
        // Direct I/O needs whole blocks, and a page is a multiple of every disk's block.
        let length = arguments.size / u64::from(arguments.processes) / page * page;
        if length == 0 {
            let least = size::show(page * u64::from(arguments.processes));
            return Err(format!("--size must be {least} for {processes} processes").into());
        }
        let lanes = Lanes {
            length: length as usize,
            count: processes,
        };
        debug_assert_eq!(lanes.length % CELL, 0);
        let mut missing = Vec::new();
        let bar = match arguments.backing {
            Backing::Bar | Backing::Mixed => Some(find_bar(arguments.size)),
            Backing::Cmb => Some(find_lent(arguments.size)),
            _ => None,
        };
        let bar = bar.and_then(|found| found.map_err(|e| missing.push(e.to_string())).ok());
        let no_bar = bar.is_none();
        let sources = sources(arguments.backing, arguments.size, no_bar, &mut missing)?;
        let scratch = arguments
            .scratch
            .clone()
            .unwrap_or_else(places::working_directory);
        let importers = &arguments.importers;
        let importers = importers::usable(
            importers,
            &sources,
            bar.as_ref(),
            &scratch,
            length,
            &mut missing,
        )?;
        for text in &missing {
            say::remark(format_args!("missing: {text}"));
        }
        if importers.is_empty() {
            return Err("none of the importers can be used".into());
        }
        let seed = arguments.seed.unwrap_or_else(rand::random);
        let time_limit = Duration::from_millis(arguments.time_limit);
        let odds = Odds {
            buffers,
            processes,
            sources: sources.len().max(1),
            underneath: bar.is_some(),
            kill: arguments.kill,
            stall: arguments.stall,
            time_limit,
        };
        let shared = Arc::new(Mutex::new(Shared {
            ledger: Ledger {
                lanes,
                key: seed,
                writers: Vec::new(),
                losses: Vec::new(),
                verified: 0,
            },
            sources,
            next: vec![0; buffers],
            movable: (0..buffers).map(|_| None).collect(),
            broken: arguments.r#break,
        }));
        let mut publisher = Publisher::new()?;
        if arguments.r#break == Some(Break::SkipDrain) {
            publisher.break_on_purpose(Some(Fault::SkipDrain));
        }
        let mut ids = Vec::new();
        for index in 0..buffers {
            let in_bar = bar
                .as_ref()
                .filter(|_| arguments.backing != Backing::Mixed || index % 2 == 1);
            let moving = Moving::new(index, arguments.size, in_bar, &shared)?;
            ids.push(publisher.publish(&name(index), moving)?);
        }
        let mut storm = Storm {
            arguments,
            seed,
            missing,
            begun: Instant::now(),
            time_limit,
            scratch,
            importers,
            bar,
            rest: rest(processes),
            lanes,
            schedule: Schedule::new(seed, odds),
            shared,
            publisher,
            ids,
            crew: Vec::new(),
            outcasts: Vec::new(),
            strikes: Vec::new(),
            writers: 0,
            cycles: 0,
            moves: Moves::default(),
            faults: Faults::default(),
            latencies: Latencies::new()?,
            failures: Vec::new(),
            totals: Totals::default(),
        };
        for slot in 0..processes {
            let (process, writer) = storm.hire(slot)?;
            storm.crew.push(process);
            lock(&storm.shared).ledger.writers.push(writer);
        }
        let waiting = Instant::now();
        while !storm.crew.iter().all(|process| process.joined) {
            storm.publisher.serve_for(Duration::from_millis(5))?;
            storm.tend()?;
            if waiting.elapsed() > Duration::from_secs(60) {
                return Err("the processes did not start within a minute".into());
            }
        }
        storm.begun = Instant::now();
        Ok(storm)
    }

    /// Starts a worker for a slot. The present contents of the slot's lanes are its starting
    /// point, because nobody writes them.
    fn hire(&mut self, slot: usize) -> Result<(Process, Writer), Failure> {
        self.writers += 1;
        let lane = self.lanes.start(slot);
        let mut found = Vec::new();
        for id in &self.ids {
            let buffer = self.publisher.buffer(*id).ok_or("a buffer is gone")?;
            found.push(buffer.range(lane, self.lanes.length as u64)?.to_vec()?);
        }
        let orders = Orders {
            writer: self.writers,
            slot,
            seed: self.seed ^ u64::from(self.writers) << 32,
            key: self.seed,
            buffers: self.ids.len(),
            lane,
            lane_length: self.lanes.length,
            importers: self.importers.clone(),
            scratch: self.scratch.clone(),
            rest: self.rest,
        };
        let (ours, theirs) = Channel::pair()?;
        let started = crew::start(theirs, &orders)?;
        let subscriber = self.publisher.add(ours)?;
        let process = Process::new(slot, subscriber, started.child, started.control)?;
        let writer = Writer {
            number: orders.writer,
            board: started.board,
            found,
        };
        Ok((process, writer))
    }

    fn is_over(&self) -> bool {
        let (cycles, seconds) = self.limits();
        cycles.is_some_and(|cycles| self.cycles >= cycles)
            || seconds.is_some_and(|seconds| self.begun.elapsed().as_secs() >= seconds)
    }

    fn limits(&self) -> (Option<u64>, Option<u64>) {
        match (self.arguments.cycles, self.arguments.seconds) {
            (None, None) => (Some(1000), None),
            limits => limits,
        }
    }

    fn progress_bar(&self) -> ProgressBar {
        let (cycles, seconds) = self.limits();
        let (length, unit) = match (cycles, seconds) {
            (Some(cycles), _) => (cycles, "cycles"),
            (None, seconds) => (seconds.unwrap_or(0), "s"),
        };
        let template = format!("{{bar:30}} {{pos}} of {{len}} {unit}, {{msg}}");
        // indicatif draws nothing if standard error is not a terminal.
        let bar = ProgressBar::new(length);
        match ProgressStyle::with_template(&template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }

    fn position(&self) -> u64 {
        match self.limits() {
            (Some(_), _) => self.cycles,
            _ => self.begun.elapsed().as_secs(),
        }
    }

    /// Runs the cycles of one step.
    fn step(&mut self) -> Result<(), Failure> {
        let step = self.schedule.next();
        for fault in &step.faults {
            match fault.stopped_for {
                None => self.faults.killed += 1,
                Some(_) => self.faults.stopped += 1,
            }
            let strike = self.crew[fault.slot].strike(*fault);
            self.strikes.push(strike);
        }
        self.publisher.serve_for(step.pause)?;
        for (buffer, to) in step.underneath {
            self.move_underneath(buffer, to)?;
        }
        let mut buffers: Vec<usize> = Vec::new();
        for cycle in step.cycles {
            lock(&self.shared).next[cycle.buffer] = cycle.source;
            buffers.push(cycle.buffer);
        }
        if let (Some(cycles), _) = self.limits() {
            buffers.truncate((cycles - self.cycles) as usize);
        }
        self.migrate(&buffers)?;
        self.cycles += buffers.len() as u64;
        self.tend()
    }

    /// Lets the kernel move a buffer while workers use it, without a message to them.
    fn move_underneath(&mut self, buffer: usize, to: MoveTo) -> Result<(), Failure> {
        let shared = lock(&self.shared);
        let (Some(bar), Some(dmabuf)) = (&self.bar, &shared.movable[buffer]) else {
            return Ok(());
        };
        match bar.device.move_buffer(dmabuf, to, self.time_limit) {
            Ok(moved) if moved.copied > 0 => self.moves.underneath += 1,
            Ok(_) => {}
            // Importers need the buffer in place.
            Err(error) if error.cause.errno == Errno::BUSY => self.moves.underneath_refused += 1,
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn migrate(&mut self, buffers: &[usize]) -> Result<(), Failure> {
        let ids: Vec<BufferId> = buffers.iter().map(|buffer| self.ids[*buffer]).collect();
        for moved in self.publisher.migrate_all(&ids, self.time_limit) {
            let moved = moved?;
            let lost = moved.lost.len() as u64;
            self.moves.all += 1;
            self.moves.invalidations += moved.released as u64 + lost;
            self.moves.given_back += moved.released as u64;
            self.moves.not_given_back += lost;
            self.latencies.record(&moved);
        }
        Ok(())
    }

    /// Reads the workers' reports, and replaces the workers that are gone.
    fn tend(&mut self) -> Result<(), Failure> {
        self.hear()?;
        loop {
            let mut gone = Vec::new();
            while let Some(event) = self.publisher.next_event(Some(Duration::ZERO))? {
                match event {
                    Event::Joined { subscriber, .. } => {
                        let joined = self.crew.iter_mut().find(|p| p.subscriber == subscriber);
                        if let Some(process) = joined {
                            process.joined = true;
                        }
                    }
                    Event::Left { subscriber, .. } => gone.push((subscriber, None)),
                    Event::CutOff {
                        subscriber, why, ..
                    } => gone.push((subscriber, Some(why))),
                    other => return Err(format!("{other:?}").into()),
                }
            }
            if gone.is_empty() {
                return Ok(());
            }
            let mut slots = Vec::new();
            for (subscriber, why) in gone {
                let slot = self.crew.iter().position(|p| p.subscriber == subscriber);
                let slot = slot.ok_or("an unknown process left")?;
                slots.push((slot, why.is_some()));
                match why {
                    None => {}
                    Some(CutOff::Late { .. }) if self.crew[slot].stopped => {
                        self.faults.cut_off += 1;
                    }
                    Some(CutOff::Late { .. }) => self.faults.late += 1,
                    Some(why) => self.failures.push(why.to_string()),
                }
            }
            // A worker that was cut off alive can still reach the present generation of the
            // other buffers.
            if slots.iter().any(|(_, alive)| *alive) {
                let mut reachable: Vec<usize> = (0..self.ids.len()).collect();
                reachable.retain(|buffer| self.publisher.is_tainted(self.ids[*buffer]));
                self.migrate(&reachable)?;
                self.moves.evictions += reachable.len() as u64;
            }
            for (slot, alive) in slots {
                self.replace(slot, alive)?;
            }
        }
    }

    fn replace(&mut self, slot: usize, alive: bool) -> Result<(), Failure> {
        let (process, writer) = self.hire(slot)?;
        let mut process = std::mem::replace(&mut self.crew[slot], process);
        process.cut_off = alive;
        let writer = {
            let writers = &mut lock(&self.shared).ledger.writers;
            std::mem::replace(&mut writers[slot], writer)
        };
        if alive {
            self.outcasts.push((process, writer));
            return Ok(());
        }
        self.bury(&mut process, writer, Duration::from_secs(5))
    }

    /// Waits for a process to end, reads its last reports, and adds up its counters.
    fn bury(
        &mut self,
        process: &mut Process,
        mut writer: Writer,
        limit: Duration,
    ) -> Result<(), Failure> {
        let status = process.end(limit)?;
        for report in process.reports()? {
            self.note(process.slot, report);
        }
        if !crew::is_orderly(status, process.cut_off) {
            let failure = format!("process {} ended by itself: {status}", process.slot);
            self.failures.push(failure);
        }
        self.totals.add(&mut writer)
    }

    /// Takes the workers' reports.
    fn hear(&mut self) -> Result<(), Failure> {
        let mut heard = Vec::new();
        let outcasts = self.outcasts.iter().map(|(process, _)| process);
        for process in self.crew.iter().chain(outcasts) {
            let reports = process.reports()?;
            heard.extend(reports.into_iter().map(|report| (process.slot, report)));
        }
        for (slot, report) in heard {
            self.note(slot, report);
        }
        for (mut process, writer) in std::mem::take(&mut self.outcasts) {
            match process.ended()? {
                None => self.outcasts.push((process, writer)),
                Some(_) => self.bury(&mut process, writer, Duration::ZERO)?,
            }
        }
        self.strikes.retain(|strike| !strike.is_finished());
        Ok(())
    }

    fn note(&mut self, slot: usize, report: Report) {
        match report {
            Report::Lost(loss) => lock(&self.shared).ledger.losses.push(loss),
            Report::Failed { importer, why } => {
                let failure = format!("process {slot}, importer {}: {why}", importer.name());
                self.failures.push(failure);
            }
        }
    }

    /// Moves every buffer once more, ends the workers, and adds up.
    fn finish(mut self, interrupted: bool) -> Result<Summary, Failure> {
        for strike in std::mem::take(&mut self.strikes) {
            let _ = strike.join();
        }
        let seconds = self.begun.elapsed().as_secs_f64();
        self.tend()?;
        let all: Vec<usize> = (0..self.ids.len()).collect();
        self.migrate(&all)?;
        self.tend()?;
        let publisher = std::mem::replace(&mut self.publisher, Publisher::new()?);
        drop(publisher);
        let writers = std::mem::take(&mut lock(&self.shared).ledger.writers);
        let crew = std::mem::take(&mut self.crew).into_iter().zip(writers);
        let all: Vec<_> = crew.chain(std::mem::take(&mut self.outcasts)).collect();
        for (mut process, writer) in all {
            self.bury(&mut process, writer, Duration::from_secs(10))?;
        }
        let mut shared = lock(&self.shared);
        let ledger = &mut shared.ledger;
        let losses: Vec<Loss> = std::mem::take(&mut ledger.losses);
        self.faults.late_writes = self.totals.late_writes;
        let work = self.importers.iter().map(|kind| {
            let disk = u64::from(*kind == Kind::Nvme);
            Work {
                importer: kind.name().into(),
                jobs: self.totals.jobs[*kind as usize],
                peer_to_peer: disk * self.totals.paths[0],
                shared_host_memory: disk * self.totals.paths[1],
                staged_copy: disk * self.totals.paths[2],
            }
        });
        let mut kinds: Vec<String> = shared.sources.iter().map(Source::describe).collect();
        kinds.extend(
            self.bar
                .as_ref()
                .map(|bar| format!("{} and system memory, by peerbuf.ko", bar.what)),
        );
        Ok(Summary {
            backing: kinds.join(", "),
            missing: self.missing.clone(),
            importers: self.importers.iter().map(|k| k.name().into()).collect(),
            processes: self.lanes.count,
            buffers: self.ids.len(),
            size: self.arguments.size,
            seed: self.seed,
            schedule: format!("{:016x}", self.schedule.digest()),
            interrupted,
            seconds,
            cycles: self.cycles,
            moves: std::mem::take(&mut self.moves),
            work: work.collect(),
            verified_bytes: self.totals.verified + shared.ledger.verified,
            faults: std::mem::take(&mut self.faults),
            latency: self.latencies.summary(),
            failures: std::mem::take(&mut self.failures),
            lost_bytes: losses.iter().map(|loss| loss.bytes).sum(),
            losses: report::listed(losses),
        })
    }
}

/// The workers' rest, as a multiple of their work, so that on average they leave half of the
/// CPUs to the moves. The storm needs moves to be a test.
fn rest(processes: usize) -> f64 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    4.0 * processes as f64 / processors as f64
}

/// The BAR with the most room that files can reach.
fn find_bar(size: u64) -> Result<Bar, Failure> {
    let mut best = None;
    for node in peerbuf_ko::probe()? {
        let device = Arc::new(Device::open_node(node)?);
        for bar in device.query()?.bars {
            let key = (bar.pages, bar.largest_free);
            if bar.exportable
                && bar.largest_free >= size
                && best.as_ref().is_none_or(|(k, _)| *k < key)
            {
                let device = Arc::clone(&device);
                let index = bar.index;
                let what = "BAR";
                best = Some((
                    key,
                    Bar {
                        device,
                        index,
                        what,
                    },
                ));
            }
        }
    }
    let (_, bar) = best.ok_or_else(|| format!("no BAR has {size} bytes free"))?;
    Ok(bar)
}

/// The provider with the most room.
fn find_lent(size: u64) -> Result<Bar, Failure> {
    let mut best = None;
    for address in provider::probe()? {
        let device = Arc::new(provider::open(address)?);
        let info = device.query()?;
        let Some(bar) = info.exportable() else {
            continue;
        };
        if bar.free >= size && best.as_ref().is_none_or(|(free, _)| *free < bar.free) {
            let index = bar.index;
            let what = "lent memory";
            best = Some((
                bar.free,
                Bar {
                    device,
                    index,
                    what,
                },
            ));
        }
    }
    let (_, bar) = best.ok_or_else(|| format!("no driver lends {size} bytes"))?;
    Ok(bar)
}

/// The sources of generations, each tried.
fn sources(
    backing: Backing,
    size: u64,
    no_bar: bool,
    missing: &mut Vec<String>,
) -> Result<Vec<Source>, Failure> {
    let mut candidates: Vec<Result<Source, Failure>> = Vec::new();
    let wants = |one| backing == one || backing == Backing::Mixed;
    if wants(Backing::Udmabuf) {
        candidates.push(Ok(Source::Udmabuf));
        let huge = HugePages::TwoMebibytes;
        if size.is_multiple_of(huge.size()) {
            candidates.push(Ok(Source::HugePages(huge)));
        }
    }
    if wants(Backing::Heap) {
        match heap::probe() {
            Ok(heaps) => candidates.extend(heaps.into_iter().map(|heap| Ok(Source::Heap(heap)))),
            Err(error) => candidates.push(Err(error.into())),
        }
    }
    if wants(Backing::Drm) {
        let card = drm::probe().and_then(|nodes| Card::open(&nodes[0]));
        candidates.push(card.map(Source::Drm).map_err(Failure::from));
    }
    if backing == Backing::Memfd {
        candidates.push(Ok(Source::Memfd));
    }
    let mut sources = Vec::new();
    for candidate in candidates {
        let tried = candidate.and_then(|source| {
            source.make("a try", size)?;
            Ok(source)
        });
        match tried {
            Ok(source) => sources.push(source),
            Err(error) => missing.push(error.to_string()),
        }
    }
    if sources.is_empty() && (!matches!(backing, Backing::Bar | Backing::Cmb) || no_bar) {
        missing.push("memfds stand in for what moves".into());
        sources.push(Source::Memfd);
    }
    Ok(sources)
}
