//! The lab runner behind `cargo lab`: makes a machine with a stock kernel out of distribution packages and
//! QEMU, and runs programs in it.
//!
//! The modules from the bottom up: [`sandbox`] starts programs in the distribution tree; [`cache`] keeps what
//! is made; [`tree`], [`kernel`] and [`disk`] make the machine's parts; [`project`] and [`fixtures`] build
//! the checkout, and [`carried`] what an installed lab has instead; [`guest`] describes the machine; [`run`]
//! runs one guest; [`events`] changes its hardware at its tests' request; [`klog`] checks its kernel log;
//! [`lab`] combines these for [`suite`] and the commands here; [`package`] is apart from all that.
//! `tests/lab/init` has the programs that the guest itself executes.

mod accel;
mod cache;
mod carried;
mod cli;
mod contents;
mod demo;
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
mod package;
mod pair;
mod progress;
mod project;
mod rdma_core;
mod run;
mod rxe;
mod sandbox;
mod seal;
mod selftests;
mod session;
mod stranger;
mod suite;
mod terminal;
mod tree;
mod trouble;

use std::{
    ffi::OsString,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::exit,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{
    cache::Cache,
    cli::{Cli, Command, GuestArgs, KernelArgs},
    guest::End,
    history::History,
    kernel::{Kernel, Source},
    lab::{Parts, Want},
    progress::note,
    project::Project,
    run::{Deadline, Job, Outcome, Streams},
    sandbox::{Mount, Sandbox},
    suite::{Room, Runner},
    tree::Tree,
    trouble::size,
};

/// The exit status if the lab itself failed.
const LAB_FAILED: i32 = 125;

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
    if let Command::Package { out, dev } = &cli.command {
        return package::package(out, *dev);
    }
    host::become_root()?;
    end_well_on_signals()?;
    let cache = Cache::open()?;
    match cli.command {
        Command::Demo { kernel } => demo::run(&cache, &kernel),
        Command::Test {
            filter,
            kernel,
            within,
        } => {
            let within = within.map(|minutes| Duration::from_secs(60 * minutes));
            test(&cache, filter.as_deref(), &kernel, within)
        }
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
        Command::Pair { guest, command } => pair::pair(&cache, &guest, &command),
        Command::Shell { guest } => shell(&cache, &guest),
        Command::Kmod { kernel } => kmod(&cache, &kernel),
        Command::Kbuild { dir, kernel } => kbuild(&cache, &dir, &kernel),
        Command::Tree {
            share,
            with,
            kernel,
            command,
        } => in_tree(&cache, share.as_deref(), &with, kernel.as_deref(), &command),
        Command::Package { out, dev } => package::package(&out, dev),
        Command::Cache => list(&cache),
        Command::Clean { entries } => clean(&cache, &entries),
    }
}

/// Ends the lab on Ctrl-C and similar signals. Guests and builds die with the lab; this restores the terminal
/// and removes the directories of the runs.
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

fn person() -> Streams {
    Streams {
        stdin: Some(Box::new(io::stdin())),
        stdout: Box::new(io::stdout()),
        stderr: Box::new(io::stderr()),
    }
}

fn run_command(cache: &Cache, args: &GuestArgs, command: Vec<OsString>) -> Result<i32> {
    let (command, program) = run::brought(command)?;
    let (ground, mut job) = lab::ready(cache, args)?;
    job.command = command;
    job.programs.extend(program);
    let outcome = run::run(&ground, &job, person())?;
    let _ = write!(io::stderr(), "{}", outcome.report());
    Ok(outcome.status())
}

fn shell(cache: &Cache, args: &GuestArgs) -> Result<i32> {
    let (ground, mut job) = lab::ready(cache, args)?;
    job.machine.shell = true;
    if args.timeout.is_none() {
        job.timeout = None;
    }
    let outcome = run::run(&ground, &job, person())?;
    let _ = write!(io::stderr(), "{}", outcome.report());
    Ok(outcome.status())
}

/// A buffer for a guest's standard output or error.
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

/// Runs the suite on one kernel. With `within`, it runs only the tests for that kernel, and as many others as
/// fit into that time.
fn test(
    cache: &Cache,
    filter: Option<&str>,
    kernel: &KernelArgs,
    within: Option<Duration>,
) -> Result<i32> {
    let project = Project::find()?;
    let began = Instant::now();
    // Compiles first, so that errors show before anything runs.
    let (_, parts) = lab::made(
        cache,
        Some(&project),
        &GuestArgs::plain(kernel),
        Want::Suite,
    )?;
    let in_turn = within.map(|time| time.saturating_sub(began.elapsed()));
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
            parts.clone()
        };
        let mut job = lab::job(&ground, &args, parts)?;
        job.machine.events = true;
        job.command = session::script();
        job.programs.extend_from_slice(files);
        job.deadline = deadline.clone();
        run::run(&ground, &job, streams)
    };
    let kind = kernel::kind(&kernel.kernel);
    let runner = Runner {
        project: &project,
        kernel: kind,
        in_turn,
        history: &History::of(cache, kind),
        at_once: host::guests_at_once(),
        in_guest: &in_guest,
    };
    let (passed, failed) = runner.run(filter)?;
    writeln!(io::stdout(), "{passed} passed, {failed} failed")?;
    Ok(i32::from(failed > 0))
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
            // The first guest prints the result; the second guest's output goes to standard error.
            let streams = End::BOTH.map(|end| Streams {
                stdin: None,
                stdout: match end {
                    End::First => Box::new(io::stdout()),
                    End::Second => Box::new(pair::Named::new(end, io::stderr())),
                },
                stderr: Box::new(pair::Named::new(end, io::stderr())),
            });
            let outcomes = pair::run_command(cache, &args, &command, &[program], streams)?;
            Ok(pair::report(&outcomes))
        }
    }
}

/// The command that starts a program of the checkout in a guest.
fn command_of(program: &Path, arguments: Vec<OsString>) -> Result<Vec<OsString>> {
    let file = program.file_name().context("a program without a name")?;
    let mut words = vec![Path::new("/opt/peerbuf/bin").join(file).into_os_string()];
    words.extend(arguments);
    Ok(words)
}

/// How many seconds the fuzzer may take beyond the requested time.
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

/// Runs a program of the checkout in a guest, with its output on this terminal.
fn run_program(
    cache: &Cache,
    args: &GuestArgs,
    program: PathBuf,
    arguments: Vec<OsString>,
) -> Result<i32> {
    let (ground, mut job) = lab::ready(cache, args)?;
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
    let source = Source::get(cache, &tree, &kernel.named())?;
    let modules = lab::modules(
        cache,
        Project::here()?.as_ref(),
        &tree,
        &source,
        &kernel.named(),
    )?;
    if modules.is_empty() {
        bail!("kmod/ has no Makefile, so there is no module to build");
    }
    for module in modules {
        writeln!(io::stdout(), "{}", module.display())?;
    }
    Ok(0)
}

fn kbuild(cache: &Cache, dir: &Path, args: &KernelArgs) -> Result<i32> {
    let tree = Tree::get(cache)?;
    let kernel = Kernel::get(cache, &tree, &args.kernel)?;
    let source = Source::get(cache, &tree, &kernel.named())?;
    project::build_module(&tree, &source, dir)?;
    Ok(0)
}

/// Runs a command in the distribution tree, with its own streams.
fn in_tree(
    cache: &Cache,
    share: Option<&Path>,
    with: &[String],
    kernel: Option<&str>,
    command: &[OsString],
) -> Result<i32> {
    let tree = Tree::get(cache)?;
    let share = share.map(lab::shared).transpose()?;
    let mut lower = vec![tree.root()];
    let layer = match with {
        [] => None,
        packages => Some(tree.layer(cache, packages)?),
    };
    if let Some(layer) = &layer {
        lower.insert(0, layer.path().join("upper"));
    }
    // Removed with all that the command wrote. Not in memory: a command may unpack a kernel.
    let dir = cache.run_dir()?;
    let [upper, work, merged] = ["upper", "work", "root"].map(|name| dir.path().join(name));
    for dir in [&upper, &work, &merged] {
        fs::create_dir(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    let mut sandbox = Sandbox::new(&merged, "/usr/bin/env")
        .own_processes()
        .overlay_root(lower, Some((upper, work)))
        .network()
        .mount(Mount::Tmpfs { at: "/tmp".into() })
        .args(command);
    if let Some(share) = share {
        sandbox = sandbox.bind(share, "/mnt/share");
    }
    let source = match kernel {
        None => None,
        Some(wanted) => {
            let kernel = Kernel::get(cache, &tree, wanted)?;
            Some((Source::get(cache, &tree, &kernel.named())?, kernel))
        }
    };
    if let Some((source, kernel)) = &source {
        sandbox = sandbox
            .env("PEERBUF_LAB_RELEASE", kernel.release())
            .bind_read_only(source.dir(), "/lab/linux");
    }
    let status = sandbox
        .command()?
        .status()
        .context("starting the sandbox")?;
    Ok(sandbox::exit_code(status))
}

/// Prints the cache's contents, at most 80 columns wide unless names or packages are longer.
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
