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

mod groups;
mod judge;
mod manifest;
mod programs;

pub use manifest::{Place, Room, Run, With};
pub use programs::{Bench, bench, fuzzer, program};

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    cli::GuestArgs,
    history::History,
    kernel,
    progress::note,
    project::Project,
    run::{Deadline, Ending, Outcome, Streams},
    session::{Done, session},
};
use groups::{Group, Work, next_group, take_turns};
use judge::{Verdict, complaints, failure, judge};
use manifest::{guest_args, list};
use programs::select;

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

#[cfg(test)]
mod tests {
    use super::*;
    use groups::tests::{group, work};
    use judge::tests::complained;

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
}
