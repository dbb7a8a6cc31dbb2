//! The lab runner behind `cargo lab`: makes a stock-kernel machine out of distribution packages
//! and QEMU, and runs things in it.
//!
//! From the bottom up: [`sandbox`] starts programs in the distribution tree, [`cache`] keeps what
//! is made, [`tree`], [`kernel`] and [`disk`] make the machine's parts, [`project`] and
//! [`fixtures`] build what is in the checkout, [`guest`] describes the machine, [`run`] lives
//! through one guest's life, [`events`] does to the machine what its tests ask for, [`klog`] judges its kernel log, and [`lab`] puts these together for
//! [`suite`] and the commands here. What the guest itself executes is in `tests/lab/init`.

mod accel;
mod cache;
mod cli;
mod contents;
mod disk;
mod events;
mod fixtures;
mod guest;
mod history;
mod host;
mod kernel;
mod klog;
mod lab;
mod mutants;
mod progress;
mod project;
mod rdma_core;
mod run;
mod rxe;
mod sandbox;
mod seal;
mod selftests;
mod suite;
mod terminal;
mod tree;
mod trouble;

use std::{
    collections::HashMap,
    ffi::OsString,
    io::{self, Write},
    path::{Path, PathBuf},
    process::exit,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{
    cache::Cache,
    cli::{Cli, Command, GuestArgs, KernelArgs, Rdma},
    guest::{End, Topology},
    history::History,
    kernel::{Kernel, Source},
    lab::Parts,
    progress::note,
    project::Project,
    run::{Deadline, Ending, Job, Outcome, Streams},
    suite::{Room, Runner},
    tree::Tree,
    trouble::size,
};

/// The exit status of a lab that could not do what it was asked.
const LAB_FAILED: i32 = 125;

/// For how long, in a call that runs everything, runs have their turn on the debug kernel, all of which take
/// the better part of an hour there. What this call took to build that kernel comes off it.
const IN_TURN: Duration = Duration::from_secs(6 * 60);

fn main() {
    let args: Vec<OsString> = std::env::args_os().collect();
    let result = sandbox::main_if_called(&args).unwrap_or_else(|| command(Cli::parse()));
    match result {
        Ok(status) => exit(status),
        Err(error) => {
            let nobody_reads = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
            if !error.downcast_ref().is_some_and(nobody_reads) {
                let error = trouble::at_the_end(error, Cache::place().ok().as_deref());
                note(format_args!("{error:#}"));
            }
            exit(LAB_FAILED);
        }
    }
}

fn command(cli: Cli) -> Result<i32> {
    if let Command::Run { guest, .. } | Command::Pair { guest, .. } | Command::Shell { guest } =
        &cli.command
        && let Some(why) = guest::conflict(guest.topology, guest.iommu)
    {
        note(why);
        return Ok(2);
    }
    host::become_root()?;
    end_well_on_signals()?;
    let cache = Cache::open()?;
    match cli.command {
        Command::Demo { kernel } => demo(&cache, &kernel),
        Command::Test { filter, kernel } => test(&cache, filter.as_deref(), kernel),
        Command::Bench {
            name,
            kernel,
            arguments,
        } => bench(&cache, &name, &kernel, arguments),
        Command::Fuzz {
            minutes,
            kernel,
            arguments,
        } => fuzz(&cache, minutes, kernel, arguments),
        Command::Mutants { filter } => mutants::run(&cache, filter.as_deref()),
        Command::Run { guest, command } => run_command(&cache, &guest, command),
        Command::Pair { guest, command } => pair(&cache, &guest, &command),
        Command::Shell { guest } => shell(&cache, &guest),
        Command::Kmod { kernel } => kmod(&cache, &kernel),
        Command::Kbuild { dir, kernel } => kbuild(&cache, &dir, &kernel),
        Command::Cache => list(&cache),
        Command::Clean { entries } => clean(&cache, &entries),
    }
}

/// Ctrl-C and its like end the lab. Guests and builds die with it by themselves; what is left to
/// do is to give the terminal back and to remove the runs' directories.
fn end_well_on_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("listening for signals")?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            terminal::restore();
            cache::abandon_runs();
            exit(128 + signal);
        }
    });
    Ok(())
}

fn ready(cache: &Cache, args: &GuestArgs) -> Result<(run::Ground, Job)> {
    let ground = lab::ground(cache, args)?;
    let parts = if args.bare {
        Parts::default()
    } else {
        lab::parts(&Project::find()?, &ground)?
    };
    let job = lab::job(&ground, args, parts)?;
    Ok((ground, job))
}

fn person() -> Streams {
    Streams {
        stdin: Some(Box::new(io::stdin())),
        stdout: Box::new(io::stdout()),
        stderr: Box::new(io::stderr()),
    }
}

fn run_command(cache: &Cache, args: &GuestArgs, command: Vec<OsString>) -> Result<i32> {
    let (ground, mut job) = ready(cache, args)?;
    job.command = command;
    let outcome = run::run(&ground, &job, person())?;
    let _ = write!(io::stderr(), "{}", outcome.report());
    Ok(outcome.status())
}

/// Runs a command in two guests at a time, with further programs in their `/opt/peerbuf/bin`, and returns
/// what became of each.
fn run_pair(
    cache: &Cache,
    args: &GuestArgs,
    command: &[OsString],
    programs: &[PathBuf],
    streams: &(dyn Fn(End) -> Streams + Sync),
) -> Result<Vec<(End, Outcome)>> {
    let ground = lab::ground(cache, args)?;
    let mut parts = if args.bare {
        Parts::default()
    } else {
        lab::parts(&Project::find()?, &ground)?
    };
    parts.programs.extend_from_slice(programs);
    let wire = cache.run_dir()?;
    let deadlines = End::BOTH.map(|_| Deadline::default());
    let one = |end: End| -> Result<Outcome> {
        let mut job = lab::job(&ground, args, parts.clone())?;
        job.machine.end = Some(end);
        job.wire = Some(wire.path().to_owned());
        job.command = command.to_vec();
        job.deadline = deadlines[end as usize].clone();
        let outcome = run::run(&ground, &job, streams(end));
        // Without one, the other may wait for ever.
        if !matches!(&outcome, Ok(outcome) if matches!(outcome.ending, Ending::Exit(_))) {
            let why = format!("the {} guest is gone, so this one was ended", end.name());
            deadlines[end.other() as usize].give_up(why);
        }
        outcome
    };
    std::thread::scope(|scope| {
        let one = &one;
        let started = End::BOTH.map(|end| (end, scope.spawn(move || one(end))));
        started
            .into_iter()
            .map(|(end, guest)| {
                let outcome = guest
                    .join()
                    .map_err(|_| anyhow!("the lab itself failed on the {} guest", end.name()))?;
                Ok((end, outcome?))
            })
            .collect()
    })
}

fn pair(cache: &Cache, args: &GuestArgs, command: &[OsString]) -> Result<i32> {
    let streams = |end: End| Streams {
        stdin: None,
        stdout: Box::new(Named::new(end, io::stdout())),
        stderr: Box::new(Named::new(end, io::stderr())),
    };
    let outcomes = run_pair(cache, args, command, &[], &streams)?;
    Ok(report_of_pair(&outcomes))
}

/// Says what went wrong in either guest, and returns the higher status.
fn report_of_pair(outcomes: &[(End, Outcome)]) -> i32 {
    for (end, outcome) in outcomes {
        let report = outcome.report();
        if !report.is_empty() {
            let _ = write!(io::stderr(), "the {} guest: {report}", end.name());
        }
    }
    let statuses = outcomes.iter().map(|(_, outcome)| outcome.status());
    statuses.max().unwrap_or(LAB_FAILED)
}

/// Writes whole lines, with a guest's name in front.
struct Named<W: Write> {
    end: End,
    to: W,
    line: Vec<u8>,
}

impl<W: Write> Drop for Named<W> {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            let _ = self.write_all(b"\n");
        }
    }
}

impl<W: Write> Named<W> {
    fn new(end: End, to: W) -> Self {
        let line = Vec::new();
        Self { end, to, line }
    }
}

impl<W: Write> Write for Named<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        while let Some(at) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=at).collect();
            let mut named = format!("{}: ", self.end.name()).into_bytes();
            named.extend_from_slice(&line);
            self.to.write_all(&named)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn shell(cache: &Cache, args: &GuestArgs) -> Result<i32> {
    let (ground, mut job) = ready(cache, args)?;
    job.machine.shell = true;
    if args.timeout.is_none() {
        job.timeout = None;
    }
    let outcome = run::run(&ground, &job, person())?;
    let _ = write!(io::stderr(), "{}", outcome.report());
    Ok(outcome.status())
}

/// Standard output or error of a guest, kept.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .map_err(|_| io::ErrorKind::Other)?
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Kept {
    fn text(&self) -> String {
        self.0
            .lock()
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }
}

fn run_and_keep(ground: &run::Ground, job: &Job) -> Result<(Outcome, String, String)> {
    let (out, err) = (Kept::default(), Kept::default());
    let streams = Streams {
        stdin: None,
        stdout: Box::new(out.clone()),
        stderr: Box::new(err.clone()),
    };
    let outcome = run::run(ground, job, streams)?;
    Ok((outcome, out.text(), err.text()))
}

fn demo(cache: &Cache, kernel: &KernelArgs) -> Result<i32> {
    let args = |topology| GuestArgs {
        topology,
        ..GuestArgs::plain(kernel)
    };
    let parts = lab::parts(
        &Project::find()?,
        &lab::ground(cache, &args(Topology::Switch))?,
    )?;
    let one = |topology| -> Result<(Outcome, String, String)> {
        let args = args(topology);
        let ground = lab::ground(cache, &args)?;
        let mut job = lab::job(&ground, &args, parts.clone())?;
        job.command = vec!["peerbuf".into(), "demo".into()];
        run_and_keep(&ground, &job)
    };
    let mut failed = 0;
    for pair in Topology::ALL.chunks(host::guests_at_once()) {
        let results = std::thread::scope(|scope| {
            let started: Vec<_> = pair.iter().map(|t| (*t, scope.spawn(|| one(*t)))).collect();
            started
                .into_iter()
                .map(|(t, s)| (t, s.join()))
                .collect::<Vec<_>>()
        });
        for (topology, result) in results {
            let (outcome, out, err) =
                result.map_err(|_| anyhow!("the lab itself failed on {}", topology.name()))??;
            writeln!(io::stdout(), "== {} ==\n{out}", topology.name())?;
            io::stdout().flush()?;
            let _ = write!(io::stderr(), "{err}{}", outcome.report());
            if outcome.status() != 0 {
                note(format_args!(
                    "`peerbuf demo` on {} ended with {}",
                    topology.name(),
                    outcome.status()
                ));
                failed += 1;
            }
        }
    }
    for (rdma, moving) in [
        (Rdma::Stock, false),
        (Rdma::Dmabuf, false),
        (Rdma::Dmabuf, true),
    ] {
        failed += two_machines(cache, kernel, rdma, moving)?;
    }
    Ok(i32::from(failed > 0))
}

/// A file goes from one guest's disk to another's, where asked while both buffers move at random;
/// prints what each hop was. How many failed.
fn two_machines(cache: &Cache, kernel: &KernelArgs, rdma: Rdma, moving: bool) -> Result<i32> {
    let args = GuestArgs {
        rdma,
        ..GuestArgs::plain(kernel)
    };
    let kept = End::BOTH.map(|_| (Kept::default(), Kept::default()));
    let streams = |end: End| {
        let (out, err) = &kept[end as usize];
        Streams {
            stdin: None,
            stdout: Box::new(out.clone()),
            stderr: Box::new(err.clone()),
        }
    };
    let settings = if moving { "MOVE_EVERY=40 SIZE=1M " } else { "" };
    let line = format!("{settings}exec sh /opt/peerbuf/init/two-machines");
    let script = ["sh".into(), "-c".into(), line.into()];
    let outcomes = run_pair(cache, &args, &script, &[], &streams)?;
    let card = match rdma {
        Rdma::Stock => "the kernel's soft-RoCE",
        Rdma::Dmabuf => "a soft-RoCE that takes dma-bufs",
    };
    let moves = if moving { ", both buffers moving" } else { "" };
    writeln!(
        io::stdout(),
        "== two machines, {card}{moves} ==\ndisk -> BAR -> RDMA -> BAR -> disk"
    )?;
    let mut failed = 0;
    for (end, outcome) in outcomes {
        let (out, err) = &kept[end as usize];
        let out = out.text();
        let (told, sum) = out.trim_end().rsplit_once('\n').unwrap_or(("", &out));
        if !told.is_empty() {
            writeln!(io::stdout(), "{told}")?;
        }
        writeln!(io::stdout(), "{}: {}", end.name(), sum.trim_end())?;
        let _ = write!(io::stderr(), "{}{}", err.text(), outcome.report());
        failed += i32::from(outcome.status() != 0);
    }
    io::stdout().flush()?;
    Ok(failed)
}

fn test(cache: &Cache, filter: Option<&str>, kernel: Option<String>) -> Result<i32> {
    let everything = filter.is_none() && kernel.is_none();
    let kernel = kernel.unwrap_or_else(|| kernel::STOCK.into());
    let (mut passed, mut failed) = test_on(cache, filter, &KernelArgs { kernel }, None)?;
    if everything {
        note("on the debug kernel:");
        let kernel = kernel::DEBUG.into();
        let more = test_on(cache, None, &KernelArgs { kernel }, Some(IN_TURN))?;
        (passed, failed) = (passed + more.0, failed + more.1);
    }
    writeln!(io::stdout(), "{passed} passed, {failed} failed")?;
    Ok(i32::from(failed > 0))
}

/// Runs the suite, or what asks for this kernel and as much more as that time allows, and returns
/// (passed, failed).
fn test_on(
    cache: &Cache,
    filter: Option<&str>,
    kernel: &KernelArgs,
    in_turn: Option<Duration>,
) -> Result<(u32, u32)> {
    let project = Project::find()?;
    // The parts for each kernel are built once, before the first guest that needs them.
    let built: Mutex<HashMap<String, Parts>> = Mutex::default();
    let parts_for = |ground: &run::Ground| -> Result<Parts> {
        let mut built = built
            .lock()
            .map_err(|_| anyhow!("another run failed in the middle of a build"))?;
        let release = ground.kernel.release();
        if let Some(parts) = built.get(release) {
            return Ok(parts.clone());
        }
        let parts = lab::parts(&project, ground)?;
        built.insert(release.to_owned(), parts.clone());
        Ok(parts)
    };
    let began = Instant::now();
    // What does not compile is said before anything runs.
    parts_for(&lab::ground(cache, &GuestArgs::plain(kernel))?)?;
    let in_turn = in_turn.map(|time| time.saturating_sub(began.elapsed()));
    let in_guest = |args: &GuestArgs, files: &[PathBuf], streams: Streams, deadline: &Deadline| {
        let mut args = args.clone();
        args.kernel = kernel.clone();
        if let Some(why) = guest::conflict(args.topology, args.iommu) {
            bail!(why);
        }
        let ground = lab::ground(cache, &args)?;
        let parts = if args.bare {
            Parts::default()
        } else {
            parts_for(&ground)?
        };
        let mut job = lab::job(&ground, &args, parts)?;
        job.machine.events = true;
        job.command = vec!["/bin/sh".into(), "/opt/peerbuf/init/suite".into()];
        job.programs.extend_from_slice(files);
        job.deadline = deadline.clone();
        run::run(&ground, &job, streams)
    };
    let debug = kernel.kernel == kernel::DEBUG;
    let runner = Runner {
        project: &project,
        debug,
        in_turn,
        history: &History::of(cache, debug),
        at_once: host::guests_at_once(),
        in_guest: &in_guest,
    };
    runner.run(filter)
}

fn bench(cache: &Cache, name: &str, kernel: &KernelArgs, arguments: Vec<OsString>) -> Result<i32> {
    let suite::Bench {
        mut args,
        room,
        program,
    } = suite::bench(&Project::find()?, name)?;
    args.kernel = kernel.clone();
    match room {
        Room::Guest => {
            args.icount = true;
            run_program(cache, &args, program, arguments)
        }
        Room::Pair => {
            let command = command_of(&program, arguments)?;
            // The first one tells what there is to tell.
            let streams = |end: End| Streams {
                stdin: None,
                stdout: match end {
                    End::First => Box::new(io::stdout()),
                    End::Second => Box::new(Named::new(end, io::stderr())),
                },
                stderr: Box::new(Named::new(end, io::stderr())),
            };
            let outcomes = run_pair(cache, &args, &command, &[program], &streams)?;
            Ok(report_of_pair(&outcomes))
        }
    }
}

/// The words that start a program of the checkout in a guest.
fn command_of(program: &Path, arguments: Vec<OsString>) -> Result<Vec<OsString>> {
    let file = program.file_name().context("a program without a name")?;
    let mut words = vec![Path::new("/opt/peerbuf/bin").join(file).into_os_string()];
    words.extend(arguments);
    Ok(words)
}

/// How much longer than asked for the fuzzer may take to end.
const FUZZ_GRACE: u64 = 600;

fn fuzz(cache: &Cache, minutes: u64, kernel: String, arguments: Vec<OsString>) -> Result<i32> {
    let program = suite::fuzzer(&Project::find()?)?;
    let args = GuestArgs {
        timeout: Some(minutes * 60 + FUZZ_GRACE),
        ..GuestArgs::plain(&KernelArgs { kernel })
    };
    let mut words = vec!["--minutes".into(), minutes.to_string().into()];
    words.extend(arguments);
    run_program(cache, &args, program, words)
}

/// Runs a program of the checkout in a guest, with its output to here.
fn run_program(
    cache: &Cache,
    args: &GuestArgs,
    program: PathBuf,
    arguments: Vec<OsString>,
) -> Result<i32> {
    let (ground, mut job) = ready(cache, args)?;
    job.command = command_of(&program, arguments)?;
    job.programs.push(program);
    let streams = Streams {
        stdin: None,
        ..person()
    };
    let outcome = run::run(&ground, &job, streams)?;
    let _ = write!(io::stderr(), "{}", outcome.report());
    Ok(outcome.status())
}

fn kmod(cache: &Cache, args: &KernelArgs) -> Result<i32> {
    let tree = Tree::get(cache)?;
    let kernel = Kernel::get(cache, &tree, &args.kernel)?;
    let source = Source::get(cache, &tree, &kernel)?;
    match Project::find()?.module(&tree, &source, kernel.release())? {
        Some(path) => writeln!(io::stdout(), "{}", path.display())?,
        None => bail!("kmod/ has no Makefile, so there is no module to build"),
    }
    Ok(0)
}

fn kbuild(cache: &Cache, dir: &Path, args: &KernelArgs) -> Result<i32> {
    let tree = Tree::get(cache)?;
    let kernel = Kernel::get(cache, &tree, &args.kernel)?;
    let source = Source::get(cache, &tree, &kernel)?;
    project::build_module(&tree, &source, dir)?;
    Ok(0)
}

/// Prints what the cache holds, at most 80 columns wide where names and packages allow it.
fn list(cache: &Cache) -> Result<i32> {
    let list = cache.list()?;
    let mut out = io::stdout().lock();
    writeln!(out, "{}:", cache.dir().display())?;
    for entry in &list.entries {
        let used = match entry.in_use {
            true => "in use now".to_owned(),
            false => format!("used {} ago", cache::age(entry.unused)),
        };
        let bytes = size(entry.bytes);
        writeln!(out, "{bytes:>7}  {}  ({used})", entry.name)?;
        writeln!(out, "         {}", entry.what)?;
        writeln!(out, "         for: {}", entry.why)?;
        if let Some(damage) = &entry.damage {
            writeln!(
                out,
                "         DAMAGED: {damage}; `cargo lab clean {}`, and what needs it makes it again",
                entry.name
            )?;
        }
    }
    for (name, bytes) in &list.making {
        writeln!(out, "{:>7}  {name}  (being made)", size(*bytes))?;
    }
    writeln!(
        out,
        "{:>7}  running guests, locks, notes",
        size(list.others)
    )?;
    writeln!(
        out,
        "{:>7}  in all, of at most {}",
        size(list.total()),
        size(cache::LIMIT)
    )?;
    if let Some(room) = trouble::Room::at(cache.dir()) {
        let mount = room.mount.display();
        writeln!(
            out,
            "{:>7}  free on its file system, {mount}",
            size(room.free)
        )?;
    }
    writeln!(
        out,
        "An entry that no command has asked for the longest goes first when room is needed."
    )?;
    Ok(0)
}

fn clean(cache: &Cache, entries: &[String]) -> Result<i32> {
    let held = cache.clean(entries)?;
    let mib = |bytes: u64| format!("{:8.1} MiB", bytes as f64 / f64::from(1 << 20));
    let mut out = io::stdout().lock();
    writeln!(out, "{}:", cache.dir().display())?;
    for entry in &held {
        let what = if entry.removed {
            "removed"
        } else {
            "in use, kept"
        };
        writeln!(out, "{}  {}  ({what})", mib(entry.bytes), entry.name)?;
    }
    writeln!(out, "{}  in all", mib(held.iter().map(|e| e.bytes).sum()))?;
    Ok(0)
}
