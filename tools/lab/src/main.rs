//! The lab runner behind `cargo lab`: makes a stock-kernel machine out of distribution packages
//! and QEMU, and runs things in it.
//!
//! From the bottom up: [`sandbox`] starts programs in the distribution tree, [`cache`] keeps what
//! is made, [`tree`], [`kernel`] and [`disk`] make the machine's parts, [`project`] builds what is
//! in the checkout, [`guest`] describes the machine, [`run`] lives through one guest's life and
//! [`klog`] judges its kernel log. What the guest itself executes is in `tests/lab/init`.

mod cache;
mod cli;
mod disk;
mod guest;
mod host;
mod kernel;
mod klog;
mod progress;
mod project;
mod run;
mod sandbox;
mod tree;

use std::{ffi::OsString, process::exit, time::Duration};

use anyhow::Result;
use clap::Parser;

use crate::{
    cache::Cache,
    cli::{Cli, Command, GuestArgs, KernelArgs},
    guest::{Accelerator, Machine},
    kernel::{Kernel, Source},
    project::Project,
    run::{Ground, Job, Streams},
    tree::Tree,
};

/// The exit status of a lab that could not do what it was asked.
const LAB_FAILED: i32 = 125;

fn main() {
    let args: Vec<OsString> = std::env::args_os().collect();
    let result = sandbox::main_if_called(&args).unwrap_or_else(|| command(Cli::parse()));
    match result {
        Ok(status) => exit(status),
        Err(error) => {
            eprintln!("peerbuf-lab: {error:#}");
            exit(LAB_FAILED);
        }
    }
}

fn command(cli: Cli) -> Result<i32> {
    if let Command::Run { guest, .. } | Command::Shell { guest } = &cli.command
        && let Some(why) = guest::conflict(guest.topology, guest.iommu)
    {
        eprintln!("peerbuf-lab: {why}");
        return Ok(2);
    }
    host::become_root()?;
    let cache = Cache::open()?;
    match cli.command {
        Command::Run { guest, command } => run_command(cache, &guest, command),
        Command::Kmod { kernel } => kmod(&cache, &kernel),
        Command::Kbuild { dir, kernel } => {
            let tree = Tree::get(&cache)?;
            let kernel = Kernel::get(&cache, &tree, &kernel.kernel)?;
            let source = Source::get(&cache, &tree, kernel.release())?;
            project::build_module(&tree, &source, &dir)?;
            Ok(0)
        }
        Command::Clean => clean(&cache),
        Command::Demo { .. } | Command::Test { .. } | Command::Shell { .. } => anyhow::bail!("not there yet"),
    }
}

fn run_command(cache: Cache, args: &GuestArgs, command: Vec<OsString>) -> Result<i32> {
    let tree = Tree::get(&cache)?;
    let kernel = Kernel::get(&cache, &tree, &args.kernel.kernel)?;
    let disk = disk::get(&cache, &tree)?;
    let layer = if args.with.is_empty() { None } else { Some(tree.layer(&cache, &args.with)?) };
    let (mut module, mut programs) = (None, Vec::new());
    if !args.bare {
        let project = Project::find()?;
        let source = Source::get(&cache, &tree, kernel.release())?;
        module = project.module(&tree, &source, kernel.release())?;
        if module.is_none() {
            eprintln!("peerbuf-lab: kmod/ has no Makefile yet, so there is no peerbuf.ko in the guest");
        }
        programs = project.peerbuf()?;
    }
    let share = args.share.as_ref().map(std::fs::canonicalize).transpose()?;
    let accelerator = if args.icount { Accelerator::CountingEmulation } else { Accelerator::Emulation };
    let job = Job {
        machine: Machine {
            topology: args.topology,
            iommu: args.iommu,
            accelerator,
            memory_mib: args.memory,
            share: share.is_some(),
            shell: false,
        },
        command,
        share,
        programs,
        module,
        fixtures: None,
        timeout: Some(Duration::from_secs(args.timeout.unwrap_or(600))),
    };
    let streams = Streams {
        stdin: Some(Box::new(std::io::stdin())),
        stdout: Box::new(std::io::stdout()),
        stderr: Box::new(std::io::stderr()),
    };
    let ground = Ground { cache, tree, kernel, disk, layer };
    let outcome = run::run(&ground, &job, streams)?;
    eprint!("{}", outcome.report());
    Ok(outcome.status())
}

fn kmod(cache: &Cache, args: &KernelArgs) -> Result<i32> {
    let tree = Tree::get(cache)?;
    let kernel = Kernel::get(cache, &tree, &args.kernel)?;
    let source = Source::get(cache, &tree, kernel.release())?;
    match Project::find()?.module(&tree, &source, kernel.release())? {
        Some(path) => println!("{}", path.display()),
        None => anyhow::bail!("kmod/ has no Kbuild or Makefile, so there is no module to build"),
    }
    Ok(0)
}

fn clean(cache: &Cache) -> Result<i32> {
    let held = cache.clean()?;
    let gib = |bytes: u64| format!("{:8.1} MiB", bytes as f64 / f64::from(1 << 20));
    println!("{}:", cache.dir().display());
    for entry in &held {
        let kept = if entry.removed { "" } else { "  (in use, kept)" };
        println!("{}  {}{kept}", gib(entry.bytes), entry.name);
    }
    println!("{}  in all", gib(held.iter().map(|e| e.bytes).sum()));
    Ok(0)
}
