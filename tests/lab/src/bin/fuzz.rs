//! `cargo lab fuzz --minutes N [-- --seed S] [--threads T] [--round R]`: calls peerbuf.ko's interface at
//! random for N minutes, and prints how often each call answered what.
//!
//! What is called follows from the seed. `--round R` does one round of a run again, with nothing beside
//! it; with `--threads 1` it is the same calls in the same order each time.

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
