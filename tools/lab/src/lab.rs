//! The lab's parts put together: from a person's options to a guest that can be run.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    accel,
    cache::Cache,
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

/// How many times longer than the stock kernel the instrumented one may take, for all that has a
/// limit. (It takes about four times as long.)
const SLOWER: u32 = 5;

/// What is built from the checkout and put into guests of one kernel.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// peerbuf.ko and peerbuf_probe.ko, if they can be built.
    pub modules: Vec<PathBuf>,
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

/// What of the checkout guests are to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The modules and the command.
    Command,
    /// And the crate's examples and the fixtures, which are for tests.
    Fixtures,
    /// And the suite's programs.
    Suite,
}

/// Makes, if need be, all that a guest with these options starts from, and builds the parts for it. What
/// does not depend on each other is made at the same time.
///
/// # Errors
/// Those of making it; when something does not compile, the compiler's messages.
pub fn made(
    cache: &Cache,
    project: &Project,
    args: &GuestArgs,
    want: Want,
) -> Result<(Ground, Parts)> {
    std::thread::scope(|scope| {
        let programs = scope.spawn(|| {
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
        let fixtures = match want {
            Want::Command => None,
            Want::Fixtures | Want::Suite => Some(fixtures::build(project, &ground, &source)?),
        };
        let parts = Parts {
            modules,
            programs: joined(programs)?,
            fixtures,
        };
        Ok((ground, parts))
    })
}

/// The kernel's source and the modules, and beside them, since they take longest, what guests start from.
fn ground_and_modules(
    cache: &Cache,
    project: &Project,
    tree: &Tree,
    args: &GuestArgs,
) -> Result<(Ground, Source, Vec<PathBuf>)> {
    let modules_for = |kernel: &Named| -> Result<_> {
        let source = Source::get(cache, tree, kernel)?;
        let modules = project.modules(tree, &source)?;
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
            // The list of kernels may have been too old, and so the name.
            Some(built) if named.as_ref() == Some(&kernel) => joined(built)?,
            _ => modules_for(&kernel)?,
        };
        Ok((ground, source, modules))
    })
}

/// A guest with these options, ready for a command: what it starts from, and with the parts that the
/// checkout has for it, unless it is to be bare.
///
/// # Errors
/// As for [`made`].
pub fn ready(cache: &Cache, args: &GuestArgs) -> Result<(Ground, Job)> {
    let (ground, parts) = if args.bare {
        (ground(cache, args)?, Parts::default())
    } else {
        made(cache, &Project::find()?, args, Want::Fixtures)?
    };
    let job = job(&ground, args, parts)?;
    Ok((ground, job))
}

/// What a thread of the lab's own came to.
///
/// # Errors
/// Its own, or that it panicked.
pub fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(anyhow!("the lab itself failed (above)")))
}

/// A guest with these options and parts; the command is still to be set.
///
/// # Errors
/// When the directory to share is none, or the stranger's program does not compile.
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
