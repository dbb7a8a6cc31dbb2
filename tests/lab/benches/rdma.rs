//! `peerbuf rdma bench` beside perftest's `ib_write_bw` and `ib_read_bw`: the same requests, as many in
//! flight, between the same two guests, in turn. `cargo lab bench rdma`; the table is
//! docs/rdma-bench.md.
//!
//! The second guest serves, one program after the other; the first has a client for each, and prints
//! the table. Both go through the same steps.

use std::io::Write;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

/// perftest's own, for both.
const DEPTH: &str = "128";
/// For one program of either end. It moves some tens of MiB, of which an emulated guest on a busy host
/// moves two in a second.
const LIMIT: Duration = Duration::from_secs(120);
/// perftest does no fewer requests.
const FEWEST: u64 = 5;

/// What to measure, from the program's arguments.
struct Plan {
    /// Of one request, in bytes.
    lengths: Vec<u64>,
    /// Of one figure.
    bytes: u64,
    rounds: usize,
}

impl Plan {
    fn from_arguments() -> Plan {
        let mut plan = Plan {
            lengths: vec![64 << 10, 256 << 10, 1 << 20, 4 << 20],
            bytes: 16 << 20,
            rounds: 9,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let value = words.next().unwrap_or_default();
            let number = |text: &str| -> u64 {
                text.parse()
                    .unwrap_or_else(|_| panic!("{word}: `{text}` is no number"))
            };
            match word.as_str() {
                "--requests" => plan.lengths = value.split(',').map(number).collect(),
                "--bytes" => plan.bytes = number(&value),
                "--rounds" => plan.rounds = number(&value) as usize,
                _ => {
                    panic!("{word}: there are --requests BYTES,BYTES, --bytes BYTES and --rounds N")
                }
            }
        }
        plan
    }

    fn requests(&self, length: u64) -> u64 {
        (self.bytes / length).max(FEWEST)
    }

    /// In the order in which both ends take them: ours between perftest's two, so that all three meet
    /// the same machine.
    fn steps(&self) -> impl Iterator<Item = (usize, Step)> {
        (0..self.rounds).flat_map(move |_| {
            let lengths = self.lengths.iter().enumerate();
            lengths.flat_map(|(row, length)| {
                [Who::Write, Who::Ours, Who::Read].map(|who| {
                    let step = Step {
                        who,
                        length: *length,
                        requests: self.requests(*length),
                    };
                    (row, step)
                })
            })
        })
    }
}

#[derive(Clone, Copy)]
enum Who {
    /// `ib_write_bw`
    Write,
    /// `ib_read_bw`
    Read,
    /// `peerbuf rdma`
    Ours,
}

struct Step {
    who: Who,
    length: u64,
    requests: u64,
}

impl Step {
    fn perftest(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        let (length, requests) = (self.length.to_string(), self.requests.to_string());
        command
            .args(["--ib-dev=rxe0", "--CPU-freq", "--output=bandwidth"])
            .args(["--size", &length, "--iters", &requests])
            .args(["--tx-depth", DEPTH]);
        command
    }

    fn server(&self) -> Command {
        match self.who {
            Who::Write => self.perftest("ib_write_bw"),
            Who::Read => self.perftest("ib_read_bw"),
            Who::Ours => {
                let mut command = Command::new("peerbuf");
                command
                    .args(["rdma", "serve", "--once", "--listen"])
                    .arg(of_lab("ADDRESS") + ":7471")
                    .args(["--size", &self.length.to_string()]);
                command
            }
        }
    }

    fn client(&self) -> Command {
        let mut command = self.server();
        match self.who {
            Who::Write | Who::Read => {
                command.arg(of_lab("PEER"));
            }
            Who::Ours => {
                command = Command::new("peerbuf");
                command
                    .args(["rdma", "bench", "--json", "--wait", "60", "--connect"])
                    .arg(of_lab("PEER") + ":7471")
                    .args(["--size", &self.length.to_string()])
                    .args(["--requests", &self.length.to_string()])
                    .args(["--bytes", &(self.length * self.requests).to_string()])
                    .args(["--depth", DEPTH, "--rounds", "1"]);
            }
        }
        command
    }
}

fn of_lab(name: &str) -> String {
    let name = format!("PEERBUF_LAB_{name}");
    std::env::var(&name).unwrap_or_else(|_| panic!("no {name}: run this by `cargo lab bench rdma`"))
}

/// Runs a program to its end: its standard output, or what it said on the other.
fn run(mut command: Command) -> Result<String, String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let begun = Instant::now();
    let mut late = false;
    // What they print fits into a pipe.
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > LIMIT && !late {
            late = true;
            child.kill().unwrap();
        }
        sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(out);
    }
    let err = String::from_utf8_lossy(&output.stderr);
    let how = if late { "too slow, ended" } else { "failed" };
    Err(format!("{command:?}: {how}, {}\n{out}{err}", output.status))
}

/// Runs one end's program of a step until it has worked. perftest's client does not wait for its server,
/// and once in some two hundred runs on a busy machine the two lost each other while they said hello: both ends
/// begin such a step anew, and say so. Ours has to work at once.
fn persist(step: &Step, program: fn(&Step) -> Command) -> String {
    let begun = Instant::now();
    let mut failures = 0;
    loop {
        let why = match run(program(step)) {
            Ok(out) => return out,
            Err(why) => why,
        };
        let waits = why.contains("Couldn't connect");
        failures += usize::from(!waits);
        let ours = matches!(step.who, Who::Ours);
        assert!(!ours && failures < 3 && begun.elapsed() < LIMIT, "{why}");
        if !waits {
            eprintln!("again, after {why}");
        }
        sleep(Duration::from_millis(300));
    }
}

/// Of one row.
#[derive(Default)]
struct Figures {
    /// Write and read, MiB in a second.
    theirs: [Vec<f64>; 2],
    ours: [Vec<f64>; 2],
}

fn client(step: &Step, figures: &mut Figures) {
    let out = persist(step, Step::client);
    let figure = || {
        let last = out
            .split_whitespace()
            .last()
            .and_then(|word| word.parse().ok());
        last.unwrap_or_else(|| panic!("no figure in: {out}"))
    };
    match step.who {
        Who::Write => figures.theirs[0].push(figure()),
        Who::Read => figures.theirs[1].push(figure()),
        Who::Ours => {
            let report: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}"));
            assert_eq!(report["there"]["registration"], "shared-memory", "{report}");
            let row = &report["rows"][0];
            for (ours, name) in figures.ours.iter_mut().zip(["write", "read"]) {
                let figure = row[format!("{name}_mib_per_second")].as_f64();
                ours.push(figure.unwrap_or_else(|| panic!("{report}")));
            }
        }
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut figures = figures.to_vec();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn main() {
    let plan = Plan::from_arguments();
    if of_lab("END") == "second" {
        for (_, step) in plan.steps() {
            persist(&step, Step::server);
        }
        return;
    }
    let mut all: Vec<Figures> = plan.lengths.iter().map(|_| Figures::default()).collect();
    for (row, step) in plan.steps() {
        client(&step, &mut all[row]);
    }
    print(&plan, &all).unwrap();
}

/// The ratio of a row is the median of its rounds', so that it is of what ran close to each other.
fn print(plan: &Plan, all: &[Figures]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "| request, bytes | requests | verb | perftest, MiB/s | ours, MiB/s | ours / perftest (each round) |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|")?;
    for (figures, length) in all.iter().zip(&plan.lengths) {
        for (n, verb) in ["write", "read"].into_iter().enumerate() {
            let (theirs, ours) = (&figures.theirs[n], &figures.ours[n]);
            let mut ratios: Vec<f64> = ours.iter().zip(theirs).map(|(o, t)| o / t).collect();
            ratios.sort_by(f64::total_cmp);
            let each: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:.2}")).collect();
            writeln!(
                out,
                "| {length} | {} | {verb} | {:.2} | {:.2} | {:.2} ({}) |",
                plan.requests(*length),
                median(theirs),
                median(ours),
                median(&ratios),
                each.join(" ")
            )?;
        }
    }
    Ok(())
}
