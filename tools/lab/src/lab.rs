//! The lab's parts put together: from a person's options to a guest that can be run.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    accel,
    cache::Cache,
    cli::{GuestArgs, Rdma},
    disk, fixtures,
    guest::{self, Accelerator, Machine},
    host,
    kernel::{Kernel, Source},
    project::Project,
    run::{BOOT_LIMIT, DEFAULT_TIMEOUT, Ground, Job},
    rxe,
    tree::Tree,
};

/// How many times longer than the stock kernel the instrumented one may take, for all that has a
/// limit. (It takes about four times as long.)
const SLOWER: u32 = 5;

/// What is built from the checkout and put into guests of one kernel.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// peerbuf.ko, if there is one to build.
    pub module: Option<PathBuf>,
    /// The command `peerbuf`.
    pub programs: Vec<PathBuf>,
    /// The tests' fixtures.
    pub fixtures: Option<PathBuf>,
}

/// Makes, if need be, all that a guest with these options starts from.
///
/// # Errors
/// Those of making it.
pub fn ground(cache: &Cache, args: &GuestArgs) -> Result<Ground> {
    let tree = Tree::get(cache)?;
    let kernel = Kernel::get(cache, &tree, &args.kernel.kernel)?;
    let disk = disk::get(cache, &tree)?;
    let layer = if args.with.is_empty() {
        None
    } else {
        Some(tree.layer(cache, &args.with)?)
    };
    let rxe = match args.rdma {
        Rdma::Stock => None,
        Rdma::Dmabuf => Some(rxe::get(cache, &tree, &kernel)?),
    };
    Ok(Ground {
        cache: cache.clone(),
        tree,
        kernel,
        disk,
        layer,
        rxe,
    })
}

/// Builds the module, the command and the fixtures for the kernel of `ground`.
///
/// # Errors
/// When one does not compile; holds the compiler's messages.
pub fn parts(project: &Project, ground: &Ground) -> Result<Parts> {
    let release = ground.kernel.release();
    let source = Source::get(&ground.cache, &ground.tree, &ground.kernel)?;
    let module = project.module(&ground.tree, &source, release)?;
    if module.is_none() {
        crate::progress::note("kmod/ has no Makefile, so there is no peerbuf.ko in the guest");
    }
    let fixtures = fixtures::build(project, ground, &source)?;
    Ok(Parts {
        module,
        programs: project.peerbuf()?,
        fixtures: Some(fixtures),
    })
}

/// A guest with these options and parts; the command is still to be set.
///
/// # Errors
/// When the directory to share is none.
pub fn job(ground: &Ground, args: &GuestArgs, parts: Parts) -> Result<Job> {
    let share = args.share.as_deref().map(shared).transpose()?;
    let mut machine = Machine {
        topology: args.topology,
        iommu: args.iommu,
        accelerator: Accelerator::CountingEmulation,
        memory_mib: args.memory,
        share: share.is_some(),
        shell: false,
        bar_mib: args.bar_size.unwrap_or(guest::BAR_MIB),
        events: args.events,
        end: None,
        tsc_khz: host::tsc_khz(),
    };
    if !args.icount {
        machine.accelerator = accel::choose(ground, &machine);
    }
    let slower = slower(ground);
    Ok(Job {
        machine,
        share,
        programs: parts.programs,
        module: parts.module,
        fixtures: parts.fixtures,
        timeout: Some(
            args.timeout
                .map_or(DEFAULT_TIMEOUT * slower, Duration::from_secs),
        ),
        boot_limit: BOOT_LIMIT * slower,
        ..Job::default()
    })
}

/// How many times the limits of the stock kernel a guest is given.
pub fn slower(ground: &Ground) -> u32 {
    if ground.kernel.is_debug() { SLOWER } else { 1 }
}

fn shared(dir: &Path) -> Result<PathBuf> {
    let real = fs::canonicalize(dir)
        .with_context(|| format!("--share {}: cannot share what is not there", dir.display()))?;
    if !real.is_dir() {
        bail!("--share {}: it is not a directory", dir.display());
    }
    Ok(real)
}
