//! `cargo lab test`: the suite in `tests/lab`, each test program in the guest that it asks for.
//!
//! `tests/lab/Cargo.toml` lists the runs:
//!
//! ```toml
//! [[package.metadata.lab.run]]
//! test = "kmod"                         # tests/lab/tests/kmod.rs
//! options = ["--topology", "switch"]    # as for cargo lab run
//! where = "guest"                       # or "host": runs here, with PEERBUF_LAB set
//! ```
//!
//! A test program may have several runs. Each test is reported as it ends up, the last line is
//! `N passed, N failed`, and a kernel that complained counts as one failed test.

use std::{
    ffi::OsString,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{
    cli::GuestArgs,
    project::{Program, Project},
};

/// Where a test program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// In a guest.
    #[default]
    Guest,
    /// On the host, calling the lab itself.
    Host,
}

/// One run of one test program.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    test: String,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default, rename = "where")]
    place: Place,
}

impl Run {
    /// How a person and FILTER call it.
    pub fn name(&self) -> String {
        let mut name = self.test.clone();
        if !self.options.is_empty() {
            name += &format!(" [{}]", self.options.join(" "));
        }
        name
    }
}

/// What came of one run.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed; a run that broke off, and a kernel that complained, count as one.
    pub failed: u32,
    /// What to print.
    pub text: String,
}

/// A program's output and how its guest ended, as the guest side hands it over.
pub struct Finished {
    /// What it printed.
    pub output: String,
    /// What the lab says of the guest, empty if all was well.
    pub trouble: String,
}

/// Starts one program in a guest with these options and waits for its end.
pub type InGuest<'a> = &'a (dyn Fn(&GuestArgs, PathBuf, Vec<OsString>) -> Result<Finished> + Sync);

/// Runs what `filter` selects, `at_once` runs at a time, and returns (passed, failed).
///
/// # Errors
/// When the suite does not compile, its list of runs is wrong or nothing was selected.
pub fn run(
    project: &Project,
    filter: Option<&str>,
    at_once: usize,
    in_guest: InGuest<'_>,
) -> Result<(u32, u32)> {
    let runs = list(project)?;
    let step = crate::progress::Step::start("building the lab's suite");
    let programs =
        project.cargo_build(&["test", "--no-run", "--package=peerbuf-lab-suite", "--tests"])?;
    step.done();
    for program in &programs {
        if program.is_test && !runs.iter().any(|r| r.test == program.name) {
            bail!(
                "tests/lab/tests/{}.rs has no run in tests/lab/Cargo.toml, so it would never run",
                program.name
            );
        }
    }
    let mut work = Vec::new();
    for run in runs {
        let program = programs
            .iter()
            .find(|p| p.name == run.test)
            .with_context(|| {
                format!(
                    "tests/lab/Cargo.toml lists a run of {:?}, which is no test there",
                    run.test
                )
            })?;
        if let Some(tests) = select(&run, program, filter)? {
            let options = guest_args(&run)?;
            work.push((run, program.file.clone(), tests, options));
        }
    }
    if work.is_empty() {
        bail!(
            "no test and no run of the lab's suite has {:?} in its name",
            filter.unwrap_or_default()
        );
    }
    let next = AtomicUsize::new(0);
    let total = Arc::new(Mutex::new((0, 0)));
    std::thread::scope(|scope| {
        for _ in 0..at_once.min(work.len()) {
            scope.spawn(|| {
                while let Some((run, file, tests, options)) =
                    work.get(next.fetch_add(1, Ordering::SeqCst))
                {
                    let finished = match run.place {
                        Place::Host => on_host(file, tests),
                        Place::Guest => in_guest(options, file.clone(), arguments(tests)),
                    };
                    let verdict = judge(&run.name(), finished);
                    if let Ok(mut total) = total.lock() {
                        total.0 += verdict.passed;
                        total.1 += verdict.failed;
                        let _ = std::io::stdout().write_all(verdict.text.as_bytes());
                    }
                }
            });
        }
    });
    let total = total.lock().map_or((0, 1), |t| *t);
    Ok(total)
}

fn list(project: &Project) -> Result<Vec<Run>> {
    let metadata = project.package_metadata("peerbuf-lab-suite")?;
    let runs = metadata["lab"]["run"].clone();
    if runs.is_null() {
        return Ok(Vec::new());
    }
    serde_json::from_value(runs)
        .context("reading [[package.metadata.lab.run]] in tests/lab/Cargo.toml")
}

fn guest_args(run: &Run) -> Result<GuestArgs> {
    use clap::Parser;
    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        guest: GuestArgs,
    }
    let words = std::iter::once("run").chain(run.options.iter().map(String::as_str));
    let options = Options::try_parse_from(words).map_err(|e| {
        anyhow::anyhow!(
            "the options of run {:?} in tests/lab/Cargo.toml: {e}",
            run.name()
        )
    })?;
    Ok(options.guest)
}

/// The tests of a program that the filter selects; `None` for none, empty for all.
fn select(run: &Run, program: &Program, filter: Option<&str>) -> Result<Option<Vec<String>>> {
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

fn arguments(tests: &[String]) -> Vec<OsString> {
    let mut args = vec![OsString::from("--test-threads=1")];
    if !tests.is_empty() {
        args.push("--exact".into());
        args.extend(tests.iter().map(OsString::from));
    }
    args
}

fn on_host(file: &PathBuf, tests: &[String]) -> Result<Finished> {
    let output = Command::new(file)
        .args(arguments(tests))
        .env("PEERBUF_LAB", std::env::current_exe()?)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", file.display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Finished {
        output: text(&output.stdout) + &text(&output.stderr),
        trouble: String::new(),
    })
}

/// Reads a test program's output.
fn judge(name: &str, finished: Result<Finished>) -> Verdict {
    let mut verdict = Verdict::default();
    let finished = match finished {
        Ok(finished) => finished,
        Err(error) => {
            verdict.failed = 1;
            verdict.text = format!("{name}: the run ... FAILED\n{error:#}\n");
            return verdict;
        }
    };
    let mut complete = false;
    for line in finished.output.lines() {
        if let Some(rest) = line.strip_prefix("test result: ") {
            complete = true;
            verdict.passed += count(rest, " passed");
            verdict.failed += count(rest, " failed");
        } else if let Some(test) = line.strip_prefix("test ")
            && [" ... ok", " ... FAILED"]
                .iter()
                .any(|end| test.ends_with(end))
                | test.contains(" ... ignored")
        {
            verdict.text += &format!("{name}: {test}\n");
        }
    }
    let tests_failed = verdict.failed > 0;
    if !complete {
        verdict.failed += 1;
        verdict.text += &format!("{name}: the run, which broke off ... FAILED\n");
    }
    if tests_failed || !complete {
        verdict.text += &format!("---- output of {name}\n{}----\n", finished.output);
    }
    if !finished.trouble.is_empty() {
        verdict.text += &finished.trouble;
        if complete {
            verdict.failed += 1;
            verdict.text += &format!("{name}: kernel log ... FAILED\n");
        }
    }
    verdict
}

/// The number before `what` in libtest's summary.
fn count(summary: &str, what: &str) -> u32 {
    let before = summary.split(what).next().unwrap_or_default();
    before
        .rsplit(|c: char| !c.is_ascii_digit())
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(output: &str, trouble: &str) -> Result<Finished> {
        Ok(Finished {
            output: output.into(),
            trouble: trouble.into(),
        })
    }

    const GOOD: &str = "running 2 tests\ntest a ... ok\ntest b ... ok\n\n\
                        test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n";

    #[test]
    fn a_good_run_is_one_line_per_test() {
        let verdict = judge("kmod [--icount]", finished(GOOD, ""));
        assert_eq!((verdict.passed, verdict.failed), (2, 0));
        assert_eq!(
            verdict.text,
            "kmod [--icount]: a ... ok\nkmod [--icount]: b ... ok\n"
        );
    }

    #[test]
    fn a_failed_test_brings_its_output() {
        let output = "test a ... ok\ntest b ... FAILED\n\nb panicked: why\n\
                      test result: FAILED. 1 passed; 1 failed; 0 ignored\n";
        let verdict = judge("kmod", finished(output, ""));
        assert_eq!((verdict.passed, verdict.failed), (1, 1));
        assert!(
            verdict.text.contains("kmod: b ... FAILED") && verdict.text.contains("b panicked: why")
        );
    }

    #[test]
    fn a_run_that_broke_off_has_failed() {
        let verdict = judge("kmod", finished("test a ... ok\n", "the guest ended\n"));
        assert_eq!((verdict.passed, verdict.failed), (0, 1));
        assert!(verdict.text.contains("the guest ended"));
    }

    #[test]
    fn a_kernel_that_complained_is_a_failed_test() {
        let verdict = judge("kmod", finished(GOOD, "BUG: x\n"));
        assert_eq!((verdict.passed, verdict.failed), (2, 1));
        assert!(verdict.text.ends_with("kmod: kernel log ... FAILED\n"));
    }

    #[test]
    fn a_run_reads_from_the_manifest_and_its_options_are_those_of_run() {
        let json = r#"{"test": "t", "options": ["--topology", "lying"], "where": "host"}"#;
        let run: Run = serde_json::from_str(json).unwrap();
        assert_eq!(run.place, Place::Host);
        assert_eq!(run.name(), "t [--topology lying]");
        assert_eq!(
            guest_args(&run).unwrap().topology,
            crate::guest::Topology::Lying
        );
        let wrong = Run {
            options: vec!["--ring".into()],
            ..run
        };
        assert!(
            guest_args(&wrong)
                .unwrap_err()
                .to_string()
                .contains("--ring")
        );
        assert!(serde_json::from_str::<Run>(r#"{"test": "t", "option": []}"#).is_err());
    }
}
