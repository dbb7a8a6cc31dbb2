//! The programs of the suite, built: benches, the fuzzer, single tests, and the tests that a filter selects.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::manifest::{self, Room, Run, guest_args, list, options};
use crate::{
    cli::GuestArgs,
    project::{Program, Project},
};

/// A bench, ready to run.
pub struct Bench {
    /// The guest's options.
    pub args: GuestArgs,
    /// The number of guests, and their clock.
    pub room: Room,
    /// The built program.
    pub program: PathBuf,
}

/// A bench from `tests/lab/Cargo.toml`, with its program built.
///
/// # Errors If there is no such bench, or it does not compile.
pub fn bench(project: &Project, name: &str) -> Result<Bench> {
    let benches = manifest::benches(project)?;
    let Some(bench) = benches.iter().find(|b| b.name == name) else {
        let names: Vec<_> = benches.iter().map(|b| b.name.as_str()).collect();
        bail!(
            "no bench {name:?} in tests/lab/Cargo.toml; there are: {}",
            names.join(", ")
        );
    };
    let args = options(&bench.options, name)?;
    let step = crate::progress::Step::start(format!("building the bench {name}"));
    let package = "--package=peerbuf-lab-suite";
    // A bench that only starts other programs needs no optimised build of its dependencies.
    let profile = match bench.place {
        Room::Guest => "--profile=bench",
        Room::Pair => "--profile=dev",
    };
    let what = ["bench", "--no-run", package, "--bench", name, profile];
    let programs = project.cargo_build(&what)?;
    step.done();
    let program = programs.into_iter().find(|p| p.name == name);
    let program = program.with_context(|| format!("building the bench {name} made no program"))?;
    Ok(Bench {
        args,
        room: bench.place,
        program: program.file,
    })
}

/// The fuzzer, `tests/lab/src/bin/fuzz.rs`, built.
///
/// # Errors If it does not exist or does not compile.
pub fn fuzzer(project: &Project) -> Result<PathBuf> {
    if !project.root().join("tests/lab/src/bin/fuzz.rs").is_file() {
        bail!("there is no fuzzer in this checkout: it would be tests/lab/src/bin/fuzz.rs");
    }
    let step = crate::progress::Step::start("building the fuzzer");
    let package = "--package=peerbuf-lab-suite";
    let programs = project.cargo_build(&["build", "--release", package, "--bin=fuzz"])?;
    step.done();
    let program = programs.into_iter().find(|p| p.name == "fuzz");
    Ok(program.context("building the fuzzer made no program")?.file)
}

/// A test program of the suite, built, with the options of the named run, or of its first run.
///
/// # Errors If there is no such program, or it does not compile.
pub fn program(project: &Project, name: &str) -> Result<(GuestArgs, PathBuf)> {
    let runs = list(project)?;
    let named = runs.iter().find(|run| run.name() == name);
    let run = named
        .or_else(|| runs.iter().find(|run| run.test == name))
        .with_context(|| format!("tests/lab/Cargo.toml lists no run of a test {name:?}"))?;
    let name = &run.test;
    let step = crate::progress::Step::start(format!("building the test {name}"));
    let package = "--package=peerbuf-lab-suite";
    let programs = project.cargo_build(&["test", "--no-run", package, "--test", name])?;
    step.done();
    let program = programs.into_iter().find(|p| p.is_test && p.name == *name);
    let program = program.with_context(|| format!("building the test {name} made no program"))?;
    Ok((guest_args(run)?, program.file))
}

/// The tests of a program that the filter selects; `None` for none, empty for all.
pub(super) fn select(
    run: &Run,
    program: &Program,
    filter: Option<&str>,
) -> Result<Option<Vec<String>>> {
    let Some(filter) = filter else {
        return Ok(Some(Vec::new()));
    };
    if run.name().contains(filter) {
        return Ok(Some(Vec::new()));
    }
    let output = Command::new(&program.file)
        .args(["--list", "--format=terse"])
        .stderr(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let tests: Vec<_> = text
        .lines()
        .filter_map(|l| l.strip_suffix(": test"))
        .filter(|name| name.contains(filter))
        .map(str::to_owned)
        .collect();
    Ok(if tests.is_empty() { None } else { Some(tests) })
}
