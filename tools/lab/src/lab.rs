//! Combines the lab's parts: from the options of a command to a guest that is ready to run.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    accel,
    cache::Cache,
    carried,
    cli::{GuestArgs, Rdma},
    disk, fixtures,
    guest::{self, Accelerator, Machine},
    host,
    kernel::{Kernel, Named, Source},
    project::Project,
    run::{BOOT_LIMIT, DEFAULT_TIMEOUT, Ground, Job},
    rxe, stranger,
    tree::Tree,
};

/// The factor for all time limits on the debug kernel. (It takes about four times as long.)
const SLOWER: u32 = 5;

/// Our own products for guests of one kernel.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// peerbuf.ko and peerbuf_probe.ko, if they can be built.
    pub modules: Vec<PathBuf>,
    /// The command `peerbuf`.
    pub programs: Vec<PathBuf>,
    /// The tests' fixtures.
    pub fixtures: Option<PathBuf>,
}

/// Makes everything that a guest with these options starts from, if necessary.
///
/// # Errors Those of making it.
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

/// The parts of the checkout that guests need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The modules and the command.
    Command,
    /// In addition the crate's examples and the fixtures, for tests.
    Fixtures,
    /// In addition the suite's programs.
    Suite,
}

/// Makes everything that a guest with these options starts from, if necessary, and builds the checkout's
/// parts for it, or what an installed lab has instead. Independent parts are made in parallel.
///
/// # Errors Those of making it; the compiler's messages if something does not compile.
pub fn made(
    cache: &Cache,
    project: Option<&Project>,
    args: &GuestArgs,
    want: Want,
) -> Result<(Ground, Parts)> {
    std::thread::scope(|scope| {
        let programs = scope.spawn(|| {
            let Some(project) = project else {
                return Ok(carried::command().into_iter().collect());
            };
            let programs = project.peerbuf(want != Want::Command)?;
            if want == Want::Suite {
                project.suite()?;
            }
            Ok(programs)
        });
        let tree = Tree::get(cache)?;
        let (ground, source, modules) = ground_and_modules(cache, project, &tree, args)?;
        if modules.is_empty() {
            crate::progress::note("kmod/ has no Makefile, so there is no peerbuf.ko in the guest");
        }
        let fixtures = match (want, project) {
            (Want::Command, _) => None,
            (_, None) => Some(carried::fixtures(cache, &ground.tree)?),
            (_, Some(project)) => Some(fixtures::build(project, &ground, &source)?),
        };
        let parts = Parts {
            modules,
            programs: joined(programs)?,
            fixtures,
        };
        Ok((ground, parts))
    })
}

/// Builds the checkout's modules for a kernel, or those that an installed lab carries, and returns their paths.
///
/// # Errors If one does not compile, with the compiler's messages.
pub fn modules(
    cache: &Cache,
    project: Option<&Project>,
    tree: &Tree,
    source: &Source,
    kernel: &Named,
) -> Result<Vec<PathBuf>> {
    match project {
        Some(project) => project.modules(tree, source),
        None => carried::modules(cache, tree, source, kernel),
    }
}

/// Makes the build tree and the modules, which take longest, in parallel with the guests' parts.
fn ground_and_modules(
    cache: &Cache,
    project: Option<&Project>,
    tree: &Tree,
    args: &GuestArgs,
) -> Result<(Ground, Source, Vec<PathBuf>)> {
    let modules_for = |kernel: &Named| -> Result<_> {
        let source = Source::get(cache, tree, kernel)?;
        let modules = modules(cache, project, tree, &source, kernel)?;
        Ok((source, modules))
    };
    let named = Named::find(cache, tree, &args.kernel.kernel)?;
    std::thread::scope(|scope| {
        let built = named
            .as_ref()
            .map(|named| scope.spawn(|| modules_for(named)));
        let ground = ground(cache, args)?;
        accel::try_all(&ground);
        let kernel = ground.kernel.named();
        let (source, modules) = match built {
            // The list of kernels may have been old, and the kernel another one.
            Some(built) if named.as_ref() == Some(&kernel) => joined(built)?,
            _ => modules_for(&kernel)?,
        };
        Ok((ground, source, modules))
    })
}

/// A guest with these options, ready for a command: with what it starts from and, unless it is to be bare,
/// with the checkout's parts.
///
/// # Errors As for [`made`].
pub fn ready(cache: &Cache, args: &GuestArgs) -> Result<(Ground, Job)> {
    let (ground, parts) = if args.bare {
        (ground(cache, args)?, Parts::default())
    } else {
        made(cache, Project::here()?.as_ref(), args, Want::Fixtures)?
    };
    let job = job(&ground, args, parts)?;
    Ok((ground, job))
}

/// The result of a thread of the lab.
///
/// # Errors The thread's error, or that it panicked.
pub fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(anyhow!("the lab itself failed (above)")))
}

/// A guest with these options and parts. The command is set later.
///
/// # Errors If the shared directory does not exist, or the stranger's program does not compile.
pub fn job(ground: &Ground, args: &GuestArgs, mut parts: Parts) -> Result<Job> {
    if args.stranger {
        let programs = stranger::build(&Project::find()?, ground)?;
        parts.programs.extend(programs);
    }
    let share = args.share.as_deref().map(shared).transpose()?;
    let mut machine = Machine {
        topology: args.topology,
        iommu: args.iommu,
        accelerator: Accelerator::CountingEmulation,
        memory_mib: args.memory,
        processors: args.processors,
        share: share.is_some(),
        shell: false,
        bar_mib: args.bar_size.unwrap_or(guest::BAR_MIB),
        events: args.events,
        boot: args.boot.clone(),
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
        modules: parts.modules,
        fixtures: parts.fixtures,
        timeout: Some(
            args.timeout
                .map_or(DEFAULT_TIMEOUT * slower, Duration::from_secs),
        ),
        boot_limit: BOOT_LIMIT * slower,
        ..Job::default()
    })
}

/// The factor for time limits in a guest, compared with the stock kernel.
pub fn slower(ground: &Ground) -> u32 {
    if ground.kernel.is_debug() { SLOWER } else { 1 }
}

/// The directory of `--share`.
///
/// # Errors If it does not exist.
pub fn shared(dir: &Path) -> Result<PathBuf> {
    let real = fs::canonicalize(dir)
        .with_context(|| format!("--share {}: cannot find the directory", dir.display()))?;
    if !real.is_dir() {
        bail!("--share {}: it is not a directory", dir.display());
    }
    Ok(real)
}
