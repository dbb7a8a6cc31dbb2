//! Two guests joined by a network; `cargo lab pair`, which runs a command in both.

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::Result;

use crate::{
    cache::Cache,
    cli::GuestArgs,
    guest::End,
    lab::{self, joined},
    run::{self, Ending, Ground, Job, Outcome, Streams},
};

/// Runs a job in each of two guests joined by a network, and returns both outcomes.
///
/// # Errors If one guest could not be started.
pub fn run_joined(
    ground: &Ground,
    jobs: [Job; 2],
    streams: [Streams; 2],
) -> Result<[(End, Outcome); 2]> {
    let wire = ground.cache.run_dir()?;
    let deadlines = [&jobs[0], &jobs[1]].map(|job| job.deadline.clone());
    let one = |end: End, mut job: Job, streams: Streams| -> Result<Outcome> {
        job.machine.end = Some(end);
        job.wire = Some(wire.path().to_owned());
        let outcome = run::run(ground, &job, streams);
        // Without its peer, the other guest may wait forever.
        if !matches!(&outcome, Ok(outcome) if matches!(outcome.ending, Ending::Exit(_))) {
            let why = format!("the {} guest is gone, so this one was ended", end.name());
            deadlines[end.other() as usize].give_up(why);
        }
        outcome
    };
    std::thread::scope(|scope| {
        let one = &one;
        let [first, second] = jobs;
        let [to_first, to_second] = streams;
        let first = scope.spawn(move || one(End::First, first, to_first));
        let second = one(End::Second, second, to_second);
        Ok([(End::First, joined(first)?), (End::Second, second?)])
    })
}

/// Runs a command in two guests with the same options and additional programs in `/opt/peerbuf/bin`, and
/// returns both outcomes.
///
/// # Errors Those of making the guests' parts, and of starting the guests.
pub fn run_command(
    cache: &Cache,
    args: &GuestArgs,
    command: &[OsString],
    programs: &[PathBuf],
    streams: [Streams; 2],
) -> Result<[(End, Outcome); 2]> {
    let (command, program) = run::brought(command.to_vec())?;
    let (ground, mut job) = lab::ready(cache, args)?;
    job.command = command;
    job.programs.extend_from_slice(programs);
    job.programs.extend(program);
    let mut other = job.clone();
    // Each guest has its own deadline.
    other.deadline = run::Deadline::default();
    run_joined(&ground, [job, other], streams)
}

/// `cargo lab pair`.
///
/// # Errors
/// As for [`run_command`].
pub fn pair(cache: &Cache, args: &GuestArgs, command: &[OsString]) -> Result<i32> {
    let streams = End::BOTH.map(|end| Streams {
        stdin: None,
        stdout: Box::new(Named::new(end, io::stdout())),
        stderr: Box::new(Named::new(end, io::stderr())),
    });
    let outcomes = run_command(cache, args, command, &[], streams)?;
    Ok(report(&outcomes))
}

/// Reports the failures of both guests, and returns the higher status.
pub fn report(outcomes: &[(End, Outcome); 2]) -> i32 {
    for (end, outcome) in outcomes {
        let report = outcome.report();
        if !report.is_empty() {
            let _ = write!(io::stderr(), "the {} guest: {report}", end.name());
        }
    }
    let [first, second] = outcomes;
    first.1.status().max(second.1.status())
}

/// Writes whole lines, prefixed with a guest's name.
pub struct Named<W: Write> {
    end: End,
    to: W,
    line: Vec<u8>,
}

impl<W: Write> Drop for Named<W> {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            let _ = self.write_all(b"\n");
        }
    }
}

impl<W: Write> Named<W> {
    /// A writer for the lines of one guest.
    pub fn new(end: End, to: W) -> Self {
        let line = Vec::new();
        Self { end, to, line }
    }
}

impl<W: Write> Write for Named<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        while let Some(at) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=at).collect();
            let mut named = format!("{}: ", self.end.name()).into_bytes();
            named.extend_from_slice(&line);
            self.to.write_all(&named)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
