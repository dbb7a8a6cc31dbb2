//! `cargo lab demo`: `peerbuf demo` in each topology, then transfers of a file between two machines.
//!
//! There are four guests, one for each topology. The first two are joined by a network; after all four demos
//! they run the transfers. So the transfers need no further boots, each of which takes as long as a demo.

use std::{
    fs,
    io::{self, Write},
    path::Path,
    thread::ScopedJoinHandle,
};

use anyhow::{Context, Result};

use crate::{
    cache::Cache,
    cli::{GuestArgs, KernelArgs},
    guest::{End, Topology},
    host,
    lab::{self, Want, joined},
    pair,
    progress::note,
    project::Project,
    run::{Ground, Job, Outcome},
    rxe,
    session::{self, Done, Session},
};

/// Holds a Vulkan driver that needs no GPU, so that each demo ends with a compute shader.
const VULKAN: &str = "mesa-vulkan-drivers";

/// The transfers between the two machines: title, and the command in both.
const TRANSFERS: [(&str, &str); 3] = [
    (
        "the kernel's soft-RoCE",
        "sh /opt/peerbuf/init/two-machines",
    ),
    (
        "a soft-RoCE that takes dma-bufs",
        "env RXE=/mnt/share/rdma_rxe.ko sh /opt/peerbuf/init/two-machines",
    ),
    (
        "a soft-RoCE that takes dma-bufs, both buffers moving",
        "env MOVE_EVERY=40 SIZE=1M sh /opt/peerbuf/init/two-machines",
    ),
];

/// The number of successful parts of the demo.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    transfers: u64,
    bytes: u64,
    failures: u32,
}

impl Tally {
    /// Adds the numbers in the last line of `peerbuf demo`.
    fn add(&mut self, last_line: &str) {
        match read_summary(last_line) {
            Some((transfers, bytes)) => {
                self.transfers += transfers;
                self.bytes += bytes;
            }
            None => self.failures += 1,
        }
    }

    /// The summary line.
    fn line(&self) -> String {
        let mib = self.bytes as f64 / f64::from(1 << 20);
        let moved = format!("{} transfers, {mib:.0} MiB", self.transfers);
        match self.failures {
            0 => format!("{moved}: every byte arrived, all right"),
            n => format!("{moved} arrived whole; {n} part(s) of the demo failed (above)"),
        }
    }
}

/// Parses `4 transfers, 33554432 bytes: every byte arrived`.
fn read_summary(line: &str) -> Option<(u64, u64)> {
    let (figures, _) = line.split_once(" bytes: every byte arrived")?;
    let (transfers, bytes) = figures.split_once(" transfers, ")?;
    Some((transfers.parse().ok()?, bytes.parse().ok()?))
}

/// Two running guests.
struct Two<'scope> {
    sessions: [Session; 2],
    guests: ScopedJoinHandle<'scope, Result<[(End, Outcome); 2]>>,
}

/// Runs the demo. Returns the exit status: 1 if a byte was wrong, or a part did not run.
///
/// # Errors Those of making the guests' parts.
pub fn run(cache: &Cache, kernel: &KernelArgs) -> Result<i32> {
    writeln!(io::stdout(), "{}", host::summary())?;
    let project = Project::find()?;
    let plain = GuestArgs {
        with: vec![VULKAN.to_owned()],
        ..GuestArgs::plain(kernel)
    };
    let (ground, parts) = lab::made(cache, Some(&project), &plain, Want::Command)?;
    // The patched soft-RoCE is put here once it is built, so that the first tables need not wait for it.
    let share = cache.run_dir()?;
    let mut tally = Tally::default();
    std::thread::scope(|scope| -> Result<()> {
        let (ground, parts, share) = (&ground, &parts, share.path());
        let start = |topologies: [Topology; 2]| -> Result<Two<'_>> {
            let job = |topology| -> Result<Job> {
                let args = GuestArgs {
                    topology,
                    share: Some(share.to_owned()),
                    ..GuestArgs::plain(kernel)
                };
                let mut job = lab::job(ground, &args, parts.clone())?;
                job.command = session::script();
                Ok(job)
            };
            let jobs = [job(topologies[0])?, job(topologies[1])?];
            let deadlines = jobs.each_ref().map(|job| job.deadline.clone());
            let [first, second] = deadlines.map(session::session);
            let streams = [first.1, second.1];
            let guests = scope.spawn(move || pair::run_joined(ground, jobs, streams));
            Ok(Two {
                sessions: [first.0, second.0],
                guests,
            })
        };

        let [switch, host_bridge, refused, lying] = Topology::ALL;
        let mut two = start([switch, host_bridge])?;
        show_topologies(&mut two, [switch, host_bridge], &mut tally)?;
        let rxe = scope.spawn(move || patched_rxe(ground, share));
        let mut others = start([refused, lying])?;
        show_topologies(&mut others, [refused, lying], &mut tally)?;
        end(others, &mut tally);
        joined(rxe)?;
        for (what, command) in TRANSFERS {
            show_transfer(&mut two, what, command, &mut tally)?;
        }
        end(two, &mut tally);
        Ok(())
    })?;
    writeln!(io::stdout(), "{}", tally.line())?;
    Ok(i32::from(tally.failures > 0))
}

/// Builds the soft-RoCE with dma-buf support, and puts it where the guests see it.
fn patched_rxe(ground: &Ground, share: &Path) -> Result<()> {
    let made = rxe::get(&ground.cache, &ground.tree, &ground.kernel)?;
    let module = made.path().join(rxe::MODULE);
    fs::copy(&module, share.join(rxe::MODULE))
        .with_context(|| format!("copying {}", module.display()))?;
    Ok(())
}

/// Runs a command in both guests at once. Passes each guest's result, in order, to `tell` as soon as it is
/// known.
fn in_both(
    two: &mut Two<'_>,
    command: &str,
    mut tell: impl FnMut(End, Result<Done, String>) -> Result<()>,
) -> Result<()> {
    let [first, second] = &mut two.sessions;
    std::thread::scope(|scope| {
        let second = scope.spawn(move || second.run(command));
        tell(End::First, first.run(command))?;
        let lost = |_| Err("the lab itself failed (above)".into());
        tell(End::Second, second.join().unwrap_or_else(lost))
    })
}

fn show_topologies(two: &mut Two<'_>, topologies: [Topology; 2], tally: &mut Tally) -> Result<()> {
    in_both(two, "peerbuf demo", |end, done| {
        let name = topologies[end as usize].name();
        let mut out = io::stdout().lock();
        match done {
            Ok(Done { output, status: 0 }) => {
                writeln!(out, "== {name} ==\n{}\n", output.trim_end())?;
                tally.add(output.trim_end().lines().last().unwrap_or_default());
            }
            Ok(Done { output, status }) => {
                writeln!(out, "== {name} ==\n{}\n", output.trim_end())?;
                note(format_args!("`peerbuf demo` on {name} ended with {status}"));
                tally.failures += 1;
            }
            // The end of the guest reports how it ended.
            Err(output) => {
                writeln!(out, "== {name} ==\n{output}")?;
                tally.failures += 1;
            }
        }
        Ok(out.flush()?)
    })
}

/// Transfers a file from one guest's disk to the other's; prints the path of each hop.
fn show_transfer(two: &mut Two<'_>, what: &str, command: &str, tally: &mut Tally) -> Result<()> {
    let mut ends = Vec::new();
    in_both(two, command, |end, done| {
        ends.push((end, done));
        Ok(())
    })?;
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "== two machines, {what} ==\ndisk -> BAR -> RDMA -> BAR -> disk"
    )?;
    let mut sums = Vec::new();
    for (end, done) in ends {
        let output = match &done {
            Ok(done) => &done.output,
            Err(rest) => rest,
        };
        let output = output.trim_end();
        let (told, sum) = output.rsplit_once('\n').unwrap_or(("", output));
        if !told.is_empty() {
            writeln!(out, "{told}")?;
        }
        writeln!(out, "{}: {sum}", end.name())?;
        match done {
            Ok(Done { status: 0, .. }) => sums.push(sum.to_owned()),
            Ok(Done { status, .. }) => note(format_args!(
                "the {} guest's part of it ended with {status}",
                end.name()
            )),
            Err(_) => {}
        }
    }
    writeln!(out)?;
    out.flush()?;
    // One line from each end: checksum, name and size of its file.
    let bytes: Option<u64> = match &sums[..] {
        [first, second] if first == second => {
            let (_, size) = first.rsplit_once(' ').unwrap_or_default();
            size.parse().ok()
        }
        _ => None,
    };
    match bytes {
        Some(bytes) => {
            tally.transfers += 1;
            tally.bytes += bytes;
        }
        None => tally.failures += 1,
    }
    Ok(())
}

/// Ends two guests, and reports their failures and kernel logs.
fn end(two: Two<'_>, tally: &mut Tally) {
    drop(two.sessions);
    match joined(two.guests) {
        Ok(outcomes) => tally.failures += u32::from(pair::report(&outcomes) != 0),
        Err(error) => {
            note(format_args!("{error:#}"));
            tally.failures += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_adds_up_what_arrived_and_names_failures() {
        let mut tally = Tally::default();
        tally.add("4 transfers, 33554432 bytes: every byte arrived");
        tally.add("4 transfers, 33554432 bytes: every byte arrived");
        assert_eq!(
            tally.line(),
            "8 transfers, 64 MiB: every byte arrived, all right"
        );
        tally.add("something else");
        assert!(tally.line().contains("1 part(s) of the demo failed"));
        assert_eq!(tally.bytes, 64 << 20);
    }
}
