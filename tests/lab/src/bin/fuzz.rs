//! `cargo lab fuzz --minutes N [-- --seed S] [--threads T] [--round R]`: makes random calls of peerbuf.ko's
//! interface for N minutes, and prints the number of results of each call.
//!
//! The calls depend on the seed. `--round R` repeats one round of a run, with nothing in parallel; with
//! `--threads 1` the calls and their order are the same each time.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use peerbuf_lab_suite::fuzz::{Plan, run};

fn main() -> ExitCode {
    let Some(plan) = plan() else {
        eprintln!("usage: fuzz [--minutes N] [--calls N] [--seed S] [--threads T] [--round R]");
        return ExitCode::from(2);
    };
    println!("seed {}, {} threads", plan.seed, plan.threads);
    print!("{}", run(&plan));
    ExitCode::SUCCESS
}

fn plan() -> Option<Plan> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    let mut plan = Plan {
        seed: now.as_millis() as u64,
        ..Plan::default()
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value: u64 = arguments.next()?.parse().ok()?;
        match name.as_str() {
            "--minutes" => plan.time = Duration::from_secs(value * 60),
            "--calls" => plan.calls = value,
            "--seed" => plan.seed = value,
            "--threads" => plan.threads = value.max(1),
            "--round" => plan.only = Some(value),
            _ => return None,
        }
    }
    Some(plan)
}
