//! `cargo lab test`: runs the suite in `tests/lab`, each test program in a guest with the options it needs.
//!
//! `tests/lab/Cargo.toml` lists the runs:
//!
//! ```toml
//! [[package.metadata.lab.run]]
//! test = "kmod"                         # tests/lab/tests/kmod.rs
//! options = ["--topology", "switch"]    # as for cargo lab run
//! where = "guest"                       # or "host": runs here, with PEERBUF_LAB set
//! kernel = "any"                        # or "stock", "debug": runs with that one only; or "each", see below
//! ```
//!
//! With `--within MINUTES` a call runs all runs for its kernel and for "each", and as many of the others as
//! fit into the remaining time, starting with those that passed longest ago; so over several calls all take
//! turns. On a kernel older than the newest supported one, "each" takes turns, too.
//!
//! A test program may have several runs. Runs with the same options share guests (`tests/lab/init/suite`
//! reloads peerbuf.ko for each), longest run first; a group gets more guests as long as they save more than
//! their boot. Each test is reported when it ends, the last line is `N passed, N failed`, and a complaint of
//! the kernel counts as one failed test.

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use crate::{
    cli::GuestArgs,
    history::History,
    kernel,
    progress::note,
    project::{Program, Project},
    run::{Deadline, Ending, Outcome, Streams},
    session::{Done, session},
};

/// The place where a test program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// In a guest.
    #[default]
    Guest,
    /// On the host, where it calls the lab itself.
    Host,
}

/// The kernels with which a test program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum With {
    /// With all; takes turns.
    #[default]
    Any,
    /// With all; takes no turns on the newest supported kernel and on the debug kernel.
    Each,
    /// With a distribution's kernel only.
    Stock,
    /// With the debug kernel only.
    Debug,
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
    #[serde(default)]
    kernel: With,
}

impl Run {
    /// The name in reports, which FILTER matches.
    pub fn name(&self) -> String {
        let mut name = self.test.clone();
        if !self.options.is_empty() {
            name += &format!(" [{}]", self.options.join(" "));
        }
        name
    }
}

/// The result of one run.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed; an aborted run, and a kernel that complained, count as one.
    pub failed: u32,
    /// The report to print.
    pub text: String,
}

/// A run to make.
struct Work {
    run: Run,
    file: PathBuf,
    /// The selected tests; empty for all.
    tests: Vec<String>,
    /// How long it took the last time.
    expected: Duration,
    /// QEMU has already crashed once during this run.
    again: bool,
}

/// Runs with the same options, which can share guests.
struct Group {
    place: Place,
    options: Vec<String>,
    args: GuestArgs,
    /// The programs of all its runs, for every guest.
    files: Vec<PathBuf>,
    /// The waiting runs, longest last.
    waiting: Vec<Work>,
    /// The number of guests working on it.
    guests: u32,
}

/// Runs the suite's programs.
pub struct Runner<'a> {
    /// The checkout.
    pub project: &'a Project,
    /// The kind of kernel, from [`kernel::kind`].
    pub kernel: &'a str,
    /// Time budget for runs that take turns; `None` makes every run.
    pub in_turn: Option<Duration>,
    /// Results of earlier runs on this kernel.
    pub history: &'a History,
    /// The maximum number of guests at a time.
    pub at_once: usize,
    /// Boots a guest with these options and these programs in `/opt/peerbuf/bin`, and runs the suite's script
    /// in it with these streams. The deadline is per program.
    pub in_guest: InGuest<'a>,
}

/// See [`Runner::in_guest`].
pub type InGuest<'a> =
    &'a (dyn Fn(&GuestArgs, &[PathBuf], Streams, &Deadline) -> Result<Outcome> + Sync);

impl Runner<'_> {
    /// Runs the tests that `filter` selects, and returns (passed, failed).
    ///
    /// # Errors If the suite does not compile, its list of runs is invalid, or the filter selects nothing.
    pub fn run(&self, filter: Option<&str>) -> Result<(u32, u32)> {
        let groups = Mutex::new(self.groups(filter)?);
        let total = Mutex::new((0, 0));
        let tell = |verdict: Verdict| {
            let mut total = lock(&total);
            total.0 += verdict.passed;
            total.1 += verdict.failed;
            let _ = io::stdout().write_all(verdict.text.as_bytes());
        };
        std::thread::scope(|scope| {
            for _ in 0..self.at_once {
                scope.spawn(|| {
                    while let Some((n, first)) = next_group(&groups, self.boot()) {
                        self.work(&groups, n, first, &tell);
                        lock(&groups)[n].guests -= 1;
                    }
                });
            }
        });
        Ok(*lock(&total))
    }

    fn debug(&self) -> bool {
        self.kernel == kernel::DEBUG
    }

    /// The approximate cost of booting an idle guest.
    fn boot(&self) -> Duration {
        Duration::from_secs(if self.debug() { 60 } else { 10 })
    }

    fn takes_turns(&self, run: &Run) -> bool {
        let often = [kernel::STOCK, kernel::DEBUG].contains(&self.kernel);
        match run.kernel {
            With::Any => true,
            With::Each => !often,
            With::Stock | With::Debug => false,
        }
    }

    /// Drops the runs that exceed the time budget.
    fn chosen(&self, works: Vec<Work>) -> Vec<Work> {
        let Some(time) = self.in_turn else {
            return works;
        };
        let (others, mut chosen): (Vec<Work>, Vec<Work>) = works
            .into_iter()
            .partition(|work| self.takes_turns(&work.run));
        let (all, always) = (others.len(), chosen.len());
        let mut time = time * u32::try_from(self.at_once).unwrap_or(u32::MAX);
        if chosen.is_empty() {
            // At least a second: the first run takes its turn even if making the kernel has used up the time.
            time = time.max(Duration::from_secs(1));
        }
        take_turns(others, &mut chosen, self.history, time, self.boot());
        note(format_args!(
            "{always} runs that are always made with it, and {} of {all} others, which take turns \
             ({} s of guests' time this time)",
            chosen.len() - always,
            time.as_secs()
        ));
        chosen
    }

    fn groups(&self, filter: Option<&str>) -> Result<Vec<Group>> {
        let runs = list(self.project)?;
        let programs = self.project.suite()?;
        for program in &programs {
            if program.is_test && !runs.iter().any(|r| r.test == program.name) {
                bail!(
                    "tests/lab/tests/{}.rs has no run in tests/lab/Cargo.toml, so it would never run",
                    program.name
                );
            }
        }
        let other = match self.debug() {
            true => With::Stock,
            false => With::Debug,
        };
        let mut works = Vec::new();
        for run in runs.into_iter().filter(|run| run.kernel != other) {
            let program = programs
                .iter()
                .find(|p| p.is_test && p.name == run.test)
                .with_context(|| {
                    format!(
                        "tests/lab/Cargo.toml lists a run of {:?}, but tests/lab/tests has no such program",
                        run.test
                    )
                })?;
            if let Some(tests) = select(&run, program, filter)? {
                works.push(Work {
                    expected: self.history.expected(&run.name()),
                    run,
                    file: program.file.clone(),
                    tests,
                    again: false,
                });
            }
        }
        let mut groups: Vec<Group> = Vec::new();
        for work in self.chosen(works) {
            let args = guest_args(&work.run)?;
            let same = |g: &Group| g.place == work.run.place && g.options == work.run.options;
            let n = match groups.iter().position(same) {
                Some(n) => n,
                None => {
                    groups.push(Group {
                        place: work.run.place,
                        options: work.run.options.clone(),
                        args,
                        files: Vec::new(),
                        waiting: Vec::new(),
                        guests: 0,
                    });
                    groups.len() - 1
                }
            };
            let group = &mut groups[n];
            group.files.push(work.file.clone());
            group.waiting.push(work);
        }
        if groups.is_empty() {
            bail!(
                "no test and no run of the lab's suite for this kernel has {:?} in its name",
                filter.unwrap_or_default()
            );
        }
        for group in &mut groups {
            group.waiting.sort_by_key(|w| w.expected);
        }
        Ok(groups)
    }

    /// Runs `first`, and then other waiting runs of group `n`, in one guest as long as it lives.
    fn work(
        &self,
        groups: &Mutex<Vec<Group>>,
        n: usize,
        first: Work,
        tell: &(dyn Fn(Verdict) + Sync),
    ) {
        let next = || lock(groups)[n].waiting.pop();
        let tell_of = |work: &Work, began: Instant, ran: Option<Duration>, mut verdict: Verdict| {
            let (name, took) = (work.run.name(), began.elapsed().as_secs());
            let ran = ran.map_or(String::new(), |ran| {
                format!(" ({} s of the host's processors)", ran.as_secs())
            });
            verdict.text += &format!("{name}: {} passed in {took} s{ran}\n", verdict.passed);
            if work.tests.is_empty() {
                let passed = verdict.failed == 0;
                self.history.note(&work.run.name(), began.elapsed(), passed);
            }
            tell(verdict);
        };
        let (place, args, files) = {
            let group = &lock(groups)[n];
            (group.place, group.args.clone(), group.files.clone())
        };
        if place == Place::Host {
            let mut work = Some(first);
            while let Some(w) = work {
                let began = Instant::now();
                let verdict = match on_host(&w, self.debug()) {
                    Ok(output) => judge(&w.run.name(), &output),
                    Err(error) => failure(&w.run.name(), "the run", &format!("{error:#}\n")),
                };
                tell_of(&w, began, None, verdict);
                work = next();
            }
            return;
        }

        let mut done: Vec<Work> = Vec::new();
        let (outcome, broken_off) = std::thread::scope(|scope| {
            let deadline = Deadline::default();
            let (mut session, streams) = session(deadline.clone());
            let guest = scope.spawn(move || (self.in_guest)(&args, &files, streams, &deadline));
            let mut current = Some(first);
            while let Some(work) = current.take() {
                let (began, before) = (Instant::now(), session.ran());
                match session.run(&line(&work)) {
                    Ok(Done { output, .. }) => {
                        let ran = session.ran().saturating_sub(before);
                        let verdict = judge(&work.run.name(), &output);
                        tell_of(&work, began, Some(ran), verdict);
                        done.push(work);
                        current = next();
                    }
                    Err(rest) => {
                        drop(session);
                        return (guest.join(), Some((work, rest)));
                    }
                }
            }
            drop(session);
            (guest.join(), None)
        });
        let outcome = outcome.unwrap_or_else(|_| Err(anyhow!("the lab itself failed")));
        let name = |work: &Work| work.run.name();
        match (outcome, broken_off) {
            // The crash also loses the kernel log of the programs that have run.
            (
                Ok(Outcome {
                    ending: Ending::Crashed(why),
                    ..
                }),
                broken_off,
            ) if !done.iter().any(|work| work.again)
                && !broken_off.as_ref().is_some_and(|(work, _)| work.again) =>
            {
                done.extend(broken_off.map(|(work, _)| work));
                let names: Vec<_> = done.iter().map(name).collect();
                note(format_args!("{why}; running again: {}", names.join(", ")));
                let again = done.into_iter().map(|work| Work {
                    again: true,
                    ..work
                });
                lock(groups)[n].waiting.extend(again);
            }
            (Ok(outcome), broken_off) => {
                if let Some((work, output)) = &broken_off {
                    self.history.failed(&name(work));
                    let text = output.clone() + &outcome.report_of_ending();
                    tell(judge(&name(work), &text));
                } else if outcome.ending != Ending::Exit(0) {
                    let last = done.last().map(name).unwrap_or_default();
                    self.history.failed(&last);
                    let what = format!("the guest's end ({:?})", outcome.ending);
                    tell(failure(&last, &what, &outcome.report_of_ending()));
                }
                done.extend(broken_off.map(|(work, _)| work));
                for (run, verdict) in complaints(&outcome, &done) {
                    self.history.failed(&run);
                    tell(verdict);
                }
            }
            (Err(error), broken_off) => {
                let work = broken_off.map(|(work, _)| work).or(done.pop());
                let name = work.as_ref().map(name).unwrap_or_default();
                self.history.failed(&name);
                tell(failure(&name, "the run", &format!("{error:#}\n")));
            }
        }
    }
}

/// Adds to `chosen` as many of the other runs as fit into this much guest time: first those that never passed
/// or passed longest ago. Options that no chosen run has cost a guest's boot in addition. If there is any
/// time at all, the first run takes its turn even if it alone exceeds the time.
fn take_turns(
    mut others: Vec<Work>,
    chosen: &mut Vec<Work>,
    history: &History,
    mut time: Duration,
    boot: Duration,
) {
    others.sort_by_cached_key(|work| (history.passed(&work.run.name()), work.run.name()));
    for (n, work) in others.into_iter().enumerate() {
        let mut needs = work.expected;
        if !chosen.iter().any(|c| c.run.options == work.run.options) {
            needs += boot;
        }
        if needs <= time || (n == 0 && !time.is_zero()) {
            time = time.saturating_sub(needs);
            chosen.push(work);
        }
    }
}

/// The group that profits most from another guest, and its longest run.
fn next_group(groups: &Mutex<Vec<Group>>, boot: Duration) -> Option<(usize, Work)> {
    let mut groups = lock(groups);
    let worth = |g: &Group| {
        let waiting: Duration = g.waiting.iter().map(|w| w.expected).sum();
        waiting / (g.guests + 1)
    };
    let (n, group) = groups
        .iter_mut()
        .enumerate()
        .filter(|(_, g)| !g.waiting.is_empty())
        // A group that is nearly done is left to its current guest.
        .filter(|(_, g)| g.guests == 0 || worth(g) > boot)
        .max_by_key(|(_, g)| worth(g))?;
    group.guests += 1;
    Some((n, group.waiting.pop()?))
}

/// A failure outside the tests.
fn failure(name: &str, what: &str, text: &str) -> Verdict {
    Verdict {
        passed: 0,
        failed: 1,
        text: format!("{text}{name}: {what} ... FAILED\n"),
    }
}

/// The complaints of a guest's kernel, as runs with a failure: one for each run and test.
fn complaints(outcome: &Outcome, done: &[Work]) -> Vec<(String, Verdict)> {
    let mut verdicts: Vec<(String, String, String)> = Vec::new();
    for complaint in &outcome.complaints {
        let of = |work: &&Work| {
            work.file.file_name().and_then(|f| f.to_str()) == complaint.program.as_deref()
        };
        let run = done.iter().rev().find(of);
        let run = run.map_or_else(
            || "the guest of ".to_owned() + &done.first().map(|w| w.run.name()).unwrap_or_default(),
            |w| w.run.name(),
        );
        let what = match &complaint.test {
            Some(test) => format!("kernel log during {test}"),
            None => "kernel log".into(),
        };
        let lines = complaint.lines.join("\n    ");
        match verdicts.iter_mut().find(|v| v.0 == run && v.1 == what) {
            Some(verdict) => verdict.2 += &format!("    {lines}\n"),
            None => verdicts.push((run, what, format!("    {lines}\n"))),
        }
    }
    verdicts
        .into_iter()
        .map(|(run, what, text)| {
            let verdict = failure(&run, &what, &format!("peerbuf-lab: the guest's kernel complained, and nobody had announced it:\n{text}"));
            (run, verdict)
        })
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The line that makes the suite's script in the guest start a program.
fn line(work: &Work) -> String {
    let program = work.file.file_name().unwrap_or_default().to_string_lossy();
    let mut line = format!("{program} --test-threads=1");
    if !work.tests.is_empty() {
        line += " --exact ";
        line += &work.tests.join(" ");
    }
    line
}

/// A bench of the suite.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    name: String,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default, rename = "where")]
    place: Room,
}

/// The place where a bench runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Room {
    /// In a guest whose clock counts instructions.
    #[default]
    Guest,
    /// In two joined guests, measured in real time.
    Pair,
}

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
    let metadata = &project.package_metadata("peerbuf-lab-suite")?["lab"]["bench"];
    let benches: Vec<Listed> = match metadata {
        serde_json::Value::Null => Vec::new(),
        list => serde_json::from_value(list.clone())
            .context("reading [[package.metadata.lab.bench]] in tests/lab/Cargo.toml")?,
    };
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
    options(&run.options, &run.name())
}

/// Parses the options of a run or a bench, which are those of `cargo lab run`.
fn options(options: &[String], name: &str) -> Result<GuestArgs> {
    use clap::Parser;
    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        guest: GuestArgs,
    }
    let words = std::iter::once("run").chain(options.iter().map(String::as_str));
    let options = Options::try_parse_from(words)
        .map_err(|e| anyhow::anyhow!("the options of {name:?} in tests/lab/Cargo.toml: {e}"))?;
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

fn on_host(work: &Work, debug: bool) -> Result<String> {
    let mut args = vec![OsString::from("--test-threads=1")];
    if !work.tests.is_empty() {
        args.push("--exact".into());
        args.extend(work.tests.iter().map(OsString::from));
    }
    let output = Command::new(&work.file)
        .args(args)
        .env("PEERBUF_LAB", std::env::current_exe()?)
        .env("PEERBUF_LAB_KERNEL", if debug { "debug" } else { "stock" })
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", work.file.display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(text(&output.stdout) + &text(&output.stderr))
}

/// Parses a test program's output.
fn judge(name: &str, output: &str) -> Verdict {
    let mut verdict = Verdict::default();
    let mut complete = false;
    for line in output.lines() {
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
        verdict.text += &format!("---- output of {name}\n{output}----\n");
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
    use std::fs;

    use super::*;
    use crate::klog::Complaint;

    const GOOD: &str = "running 2 tests\ntest a ... ok\ntest b ... ok\n\n\
                        test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n";

    #[test]
    fn a_good_run_is_one_line_per_test() {
        let verdict = judge("kmod [--icount]", GOOD);
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
        let verdict = judge("kmod", output);
        assert_eq!((verdict.passed, verdict.failed), (1, 1));
        assert!(
            verdict.text.contains("kmod: b ... FAILED") && verdict.text.contains("b panicked: why")
        );
    }

    #[test]
    fn a_run_that_broke_off_has_failed() {
        let verdict = judge("kmod", "test a ... ok\nthe guest ended\n");
        assert_eq!((verdict.passed, verdict.failed), (0, 1));
        assert!(verdict.text.contains("the guest ended"));
    }

    fn work(name: &str, seconds: u64) -> Work {
        Work {
            run: serde_json::from_str(&format!(r#"{{"test": "{name}"}}"#)).unwrap(),
            file: format!("/t/{name}-1").into(),
            tests: vec![],
            expected: Duration::from_secs(seconds),
            again: false,
        }
    }

    fn complained(complaints: Vec<Complaint>) -> Outcome {
        Outcome {
            ending: Ending::Exit(0),
            complaints,
            console: String::new(),
        }
    }

    #[test]
    fn a_kernels_complaints_are_failures_that_name_the_test() {
        let one = |test: Option<&str>, line: &str| Complaint {
            lines: vec![line.into()],
            program: Some("kmod-1".into()),
            test: test.map(String::from),
        };
        let outcome = complained(vec![
            one(Some("a"), "BUG: x"),
            one(Some("a"), "BUG: y"),
            one(None, "BUG: z"),
        ]);
        let found = complaints(&outcome, &[work("paths", 1), work("kmod", 1)]);
        assert!(found.iter().all(|(run, _)| run == "kmod"));
        let found: Vec<Verdict> = found.into_iter().map(|(_, verdict)| verdict).collect();
        assert_eq!(found.len(), 2);
        assert!(found[0].text.contains("BUG: x\n    BUG: y"));
        assert!(
            found[0]
                .text
                .ends_with("kmod: kernel log during a ... FAILED\n")
        );
        assert!(found[1].text.ends_with("kmod: kernel log ... FAILED\n"));
    }

    fn group(works: Vec<Work>) -> Group {
        Group {
            place: Place::Guest,
            options: vec![],
            args: guest_args(&works[0].run).unwrap(),
            files: vec![],
            waiting: works,
            guests: 0,
        }
    }

    /// Runs programs with one passing test each. QEMU of the first `crashes` guests crashes during the second
    /// program. Returns the number of guests, and (passed, failed).
    fn with_crashes(crashes: u32) -> (u32, u32, u32) {
        let directory = tempfile::tempdir().unwrap();
        let cache = crate::cache::Cache::at(directory.path()).unwrap();
        let guests = Mutex::new(0);
        let in_guest = |_: &GuestArgs, _: &[PathBuf], streams: Streams, _: &Deadline| {
            let crashes = {
                let mut guests = lock(&guests);
                *guests += 1;
                *guests <= crashes
            };
            let (mut out, programs) = (streams.stdout, streams.stdin.unwrap());
            let mut programs = io::BufRead::lines(io::BufReader::new(programs));
            let mut ran = 0;
            while programs.next().is_some() {
                ran += 1;
                if crashes && ran == 2 {
                    break;
                }
                let text = "test a ... ok\ntest result: ok. 1 passed; 0 failed\n\n\x1e ended 0\n";
                out.write_all(text.as_bytes())?;
            }
            let mut outcome = complained(vec![]);
            if crashes {
                outcome.ending = Ending::Crashed("QEMU itself crashed".into());
            }
            Ok(outcome)
        };
        let runner = Runner {
            project: &Project::find().unwrap(),
            kernel: kernel::STOCK,
            in_turn: None,
            history: &History::of(&cache, kernel::STOCK),
            at_once: 1,
            in_guest: &in_guest,
        };
        let groups = Mutex::new(vec![group(vec![work("a", 1), work("b", 2)])]);
        let total = Mutex::new((0, 0));
        let tell = |verdict: Verdict| {
            let mut total = lock(&total);
            *total = (total.0 + verdict.passed, total.1 + verdict.failed);
        };
        while let Some((n, first)) = next_group(&groups, runner.boot()) {
            runner.work(&groups, n, first, &tell);
            lock(&groups)[n].guests -= 1;
        }
        let (guests, (passed, failed)) = (*lock(&guests), *lock(&total));
        (guests, passed, failed)
    }

    #[test]
    fn what_ran_in_a_guest_whose_qemu_crashed_runs_once_more_and_not_twice() {
        assert_eq!(with_crashes(0), (1, 2, 0));
        // The first program, then both again.
        assert_eq!(with_crashes(1), (2, 3, 0));
        // The first program twice; the second was aborted each time.
        assert_eq!(with_crashes(2), (2, 2, 1));
    }

    #[test]
    fn guests_go_where_they_are_worth_their_boot() {
        let groups = Mutex::new(vec![
            group(vec![work("a", 5), work("b", 9)]),
            group(vec![work("c", 1), work("d", 30), work("e", 40)]),
        ]);
        let mut order = Vec::new();
        while let Some((n, work)) = next_group(&groups, Duration::from_secs(10)) {
            order.push((n, work.run.name()));
        }
        // No guest ran c after the second guest of its group ended, so c waits for the first.
        let expected = [(1, "e"), (1, "d"), (0, "b")].map(|(n, s)| (n, s.to_owned()));
        assert_eq!(order, expected);
    }

    #[test]
    fn runs_take_turns_the_one_that_passed_longest_ago_first() {
        let directory = tempfile::tempdir().unwrap();
        let cache = crate::cache::Cache::at(directory.path()).unwrap();
        let history = History::of(&cache, kernel::DEBUG);
        let run = |name: &str, memory: &str| Run {
            options: vec!["--memory".into(), memory.into()],
            ..work(name, 1).run
        };
        for (name, took) in [("d", 20), ("b", 30), ("a", 100)] {
            history.note(&run(name, "1").name(), Duration::from_secs(took), false);
        }
        // As if they had passed in this order, and c never. c takes 30 s, and each takes a boot.
        let file = directory.path().join("locks/runs-debug.json");
        let mut known: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        for (when, name) in (1..).zip(["d", "a", "b"]) {
            known[run(name, "1").name()]["passed"] = when.into();
        }
        fs::write(&file, known.to_string()).unwrap();
        let history = History::of(&cache, kernel::DEBUG);
        let waiting = |name: &str, memory: &str| Work {
            expected: history.expected(&run(name, memory).name()),
            run: run(name, memory),
            ..work(name, 1)
        };
        let turn = |time| {
            let mut chosen = vec![waiting("always", "2")];
            let others = ["a", "b", "c", "d"].map(|name| waiting(name, "1")).into();
            let (time, boot) = (Duration::from_secs(time), Duration::from_secs(10));
            take_turns(others, &mut chosen, &history, time, boot);
            let names = chosen[1..].iter().map(|work| work.run.test.clone());
            names.collect::<String>()
        };
        assert_eq!(turn(0), "");
        assert_eq!(turn(40), "c");
        assert_eq!(turn(60), "cd");
        // A run that does not fit lets the next one pass.
        assert_eq!(turn(90), "cdb");
        assert_eq!(turn(200), "cdab");
        // A run that passes goes to the end of the queue; one that fails goes to the front.
        history.note(&run("c", "1").name(), Duration::from_secs(30), true);
        history.note(&run("b", "1").name(), Duration::from_secs(30), false);
        assert_eq!(turn(200), "bdac");
        // A run longer than the whole budget waits until it is first in the queue, and then runs.
        assert_eq!(turn(15), "b");
        history.note(&run("b", "1").name(), Duration::from_secs(30), true);
        history.note(&run("d", "1").name(), Duration::from_secs(20), true);
        assert_eq!(turn(50), "a");
    }

    #[test]
    fn on_an_older_kernel_what_is_for_each_takes_turns_and_one_run_is_made_whatever_the_time() {
        let directory = tempfile::tempdir().unwrap();
        let cache = crate::cache::Cache::at(directory.path()).unwrap();
        let in_guest = |_: &GuestArgs, _: &[PathBuf], _: Streams, _: &Deadline| bail!("no guest");
        let chosen = |kernel, minutes: u64| {
            let runner = Runner {
                project: &Project::find().unwrap(),
                kernel,
                in_turn: Some(Duration::from_secs(60 * minutes)),
                history: &History::of(&cache, kernel),
                at_once: 1,
                in_guest: &in_guest,
            };
            let each = |name, kernel| Work {
                run: Run {
                    kernel,
                    ..work(name, 20).run
                },
                ..work(name, 20)
            };
            let works = vec![
                each("a", With::Any),
                each("b", With::Each),
                each("c", With::Each),
            ];
            let chosen = runner.chosen(works);
            chosen
                .iter()
                .map(|work| work.run.test.as_str())
                .collect::<String>()
        };
        assert_eq!(chosen(kernel::STOCK, 0), "bc");
        assert_eq!(chosen(kernel::DEBUG, 5), "bca");
        assert_eq!(chosen("7.2", 1), "ab");
        assert_eq!(chosen("7.2", 0), "a");
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
