//! `cargo lab mutants`: breaks peerbuf.ko on purpose, and checks that the suite notices.
//!
//! A test that cannot fail proves nothing. `tests/lab/mutants.toml` lists changes to the module's sources,
//! each with a test that fails on the changed module:
//!
//! ```toml
//! [[mutant]]
//! name = "fences are not waited for"   # what is wrong with it
//! file = "moves.rs"                    # below kmod/
//! replace = "..."                      # found there exactly once
//! with = "..."
//! # A run of tests/lab/Cargo.toml and its test; with its options in brackets, if the first is not meant.
//! noticed_by = "kmod_moves: moves_wait_for_fences_of_every_usage"
//! kernel = "debug"                     # where only that one sees it
//! ```

use std::{
    fs,
    io::{self, Write},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{
    cache::Cache,
    cli::{GuestArgs, KernelArgs},
    kernel::{self, Source},
    lab::{self, Want},
    project::Project,
    run::{Ending, Outcome},
    suite,
};

/// Time limit for one test on a broken module, in a guest of the stock kernel.
const LIMIT: Duration = Duration::from_secs(120);

/// The list of mutants.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutant: Vec<Mutant>,
}

/// A mutant: one change.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    name: String,
    file: String,
    replace: String,
    #[serde(default)]
    with: String,
    noticed_by: String,
    #[serde(default = "stock")]
    kernel: String,
}

fn stock() -> String {
    kernel::STOCK.into()
}

impl Mutant {
    /// The program and its test.
    fn test(&self) -> Result<(&str, &str)> {
        self.noticed_by.split_once(": ").with_context(|| {
            format!(
                "{:?}: noticed_by is not of the form 'PROGRAM: TEST'",
                self.name
            )
        })
    }

    /// Applies the change to the module's sources in `kmod`.
    fn apply(&self, kmod: &Path) -> Result<()> {
        let file = kmod.join(&self.file);
        let text =
            fs::read_to_string(&file).with_context(|| format!("reading kmod/{}", self.file))?;
        match text.matches(&self.replace).count() {
            1 => {}
            n => bail!(
                "{:?} in tests/lab/mutants.toml: its text to replace occurs {n} times in kmod/{}, but must occur once",
                self.name,
                self.file
            ),
        }
        let text = text.replacen(&self.replace, &self.with, 1);
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
    }
}

fn list(project: &Path) -> Result<Vec<Mutant>> {
    let file = project.join("tests/lab/mutants.toml");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let list: List = toml::from_str(&text).context("reading tests/lab/mutants.toml")?;
    Ok(list.mutant)
}

/// Tries each mutant that `filter` selects, and prints what noticed it. Returns the exit status: 1 if a
/// mutant survives.
///
/// # Errors If the list is invalid, selects nothing, or a mutant does not compile.
pub fn run(cache: &Cache, filter: Option<&str>) -> Result<i32> {
    let project = Project::find()?;
    let mut mutants = list(project.root())?;
    if let Some(filter) = filter {
        mutants.retain(|m| m.name.contains(filter) || m.noticed_by.contains(filter));
    }
    if mutants.is_empty() {
        bail!(
            "no mutant in tests/lab/mutants.toml has {:?} in its name or its test's",
            filter.unwrap_or_default()
        );
    }
    let mut living = 0;
    for mutant in &mutants {
        let began = Instant::now();
        let outcome = one(cache, &project, mutant).with_context(|| mutant.name.clone())?;
        let verdict = match noticed(&outcome) {
            Some(how) => format!("noticed ({how}, {} s)", began.elapsed().as_secs()),
            None => {
                living += 1;
                "LIVES".into()
            }
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{}: {verdict}\n    {}", mutant.name, mutant.noticed_by)?;
    }
    let noticed = mutants.len() - living;
    writeln!(io::stdout(), "{noticed} noticed, {living} live")?;
    Ok(i32::from(living > 0))
}

/// How the suite would have reported it; `None` if not at all.
fn noticed(outcome: &Outcome) -> Option<&'static str> {
    match &outcome.ending {
        Ending::Exit(0) if outcome.complaints.is_empty() => None,
        Ending::Exit(0) => Some("the kernel's log"),
        Ending::Exit(_) => Some("the test failed"),
        Ending::TimedOut(_) => Some("the test did not end"),
        Ending::Died(_) | Ending::Crashed(_) => Some("the guest died"),
    }
}

fn one(cache: &Cache, project: &Project, mutant: &Mutant) -> Result<Outcome> {
    let (program, test) = mutant.test()?;
    let (args, file) = suite::program(project, program)?;
    let args = GuestArgs {
        kernel: KernelArgs {
            kernel: mutant.kernel.clone(),
        },
        ..args
    };
    let (ground, mut parts) = lab::made(cache, Some(project), &args, Want::Fixtures)?;
    let source = Source::get(cache, &ground.tree, &ground.kernel.named())?;
    let change = |kmod: &Path| mutant.apply(kmod);
    parts.modules = project.changed_modules(&ground.tree, &source, change)?;
    let mut job = lab::job(&ground, &args, parts)?;
    job.machine.events = true;
    let name = file.file_name().context("a program without a name")?;
    job.command = vec![Path::new("/opt/peerbuf/bin").join(name).into_os_string()];
    job.command
        .extend(["--test-threads=1", "--exact", test].map(Into::into));
    job.programs.push(file);
    job.timeout = Some(LIMIT * lab::slower(&ground));
    let (outcome, out, err) = crate::run_and_keep(&ground, &job)?;
    if let Ending::Crashed(why) = &outcome.ending {
        bail!("{why}; the guest failed before the test ended, so try again");
    }
    if !out.contains(&format!("test {test} ...")) {
        bail!(
            "{} was not run:\n{out}{err}{}",
            mutant.noticed_by,
            outcome.report_of_ending()
        );
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mutant_changes_what_is_there_and_names_a_test_that_is_there() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for mutant in list(&root).unwrap() {
            let copy = tempfile::tempdir().unwrap();
            let file = copy.path().join(&mutant.file);
            fs::copy(root.join("kmod").join(&mutant.file), &file).unwrap();
            mutant.apply(copy.path()).unwrap();
            let (program, test) = mutant.test().unwrap();
            let program = program.split(" [").next().unwrap();
            let tests = root.join(format!("tests/lab/tests/{program}.rs"));
            let tests = fs::read_to_string(&tests).unwrap();
            let there = tests.contains(&format!("#[test]\nfn {test}()"));
            assert!(there, "{}: no test {}", mutant.name, mutant.noticed_by);
            let kernels = [kernel::STOCK, kernel::DEBUG];
            assert!(kernels.contains(&mutant.kernel.as_str()), "{}", mutant.name);
        }
    }
}
