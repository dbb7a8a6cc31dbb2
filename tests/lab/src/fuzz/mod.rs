//! The fuzzer of peerbuf.ko's interface. Processes with several threads make random calls, valid, nearly
//! valid and invalid, on descriptors that other threads close meanwhile, while devices are unbound. Some of
//! the processes are killed.
//!
//! The fuzzer detects results that are not allowed (`calls.rs`), processes that hang, and BAR space that is
//! still allocated after all processes have ended. The guest's kernel detects the rest (locks, stray
//! accesses, leaks).

mod calls;
mod random;
mod worker;

use std::fs;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::machine::expect;
use crate::node::{Node, in_child, nvme_bdf};
use calls::{CALLS, Counts};
use random::Random;
use worker::{Shared, Worker};

/// The exit status of a process that got a result that is not allowed.
const WRONG_ANSWER: i32 = 3;

/// The parameters of a run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The seed of all random choices.
    pub seed: u64,
    /// Ends after this many calls,
    pub calls: u64,
    /// or after this time, whichever comes first.
    pub time: Duration,
    /// The number of threads of each process.
    pub threads: u64,
    /// Runs only this round, with nothing in parallel.
    pub only: Option<u64>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            seed: 1,
            calls: u64::MAX,
            time: Duration::MAX,
            threads: 4,
            only: None,
        }
    }
}

/// The number of calls of each thread in a round.
const QUOTA: u64 = 1500;

/// If no thread makes a call for this long, all threads wait for a device that waits for the process, in
/// turn, to drop something it holds. The process is then killed.
const STALL: Duration = Duration::from_secs(15);

/// If the process has not ended this long after the kill, it hangs.
const HANG: Duration = Duration::from_secs(100);

/// The result of a run.
pub struct Report {
    counts: &'static Counts,
    rounds: u64,
    /// The number of killed processes.
    killed: u64,
    /// The number of times that a device was unbound meanwhile.
    gone: u64,
}

impl Report {
    /// The number of calls.
    pub fn calls(&self) -> u64 {
        self.counts.all()
    }

    /// The calls that almost never succeeded.
    pub fn in_vain(&self, least: u64) -> Vec<&'static str> {
        let calls = CALLS.iter().enumerate();
        calls
            .filter(|(call, about)| about.must_succeed && self.counts.succeeded(*call) < least)
            .map(|(_, about)| about.name)
            .collect()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{}{} processes, of which {} were killed; {} times a device was unbound",
            self.counts.table(),
            self.rounds,
            self.killed,
            self.gone
        )
    }
}

/// Runs the fuzzer.
///
/// # Panics
///
/// On any failure, with its description and round.
pub fn run(plan: &Plan) -> Report {
    let began = Instant::now();
    let mut report = Report {
        counts: shared_counts(),
        rounds: 0,
        killed: 0,
        gone: 0,
    };
    // The core WARNs on every error of an exporter's `vmap`, also if the buffer is pinned.
    expect("dma_buf_vmap");
    let cards: Vec<String> = Node::all().into_iter().map(|node| node.bdf).collect();
    // A device that can import, twice; an address without a device; a card, which cannot import.
    let devices = vec![
        nvme_bdf(),
        nvme_bdf(),
        "0000:ff:1f.7".into(),
        cards[0].clone(),
    ];
    let mut said = Instant::now();
    let first = plan.only.unwrap_or(0);
    for round in first.. {
        round_of(plan, round, &cards, &devices, &mut report);
        report.rounds += 1;
        let over = report.calls() >= plan.calls || began.elapsed() >= plan.time;
        if over || plan.only.is_some() {
            break;
        }
        if said.elapsed() > Duration::from_secs(30) {
            said = Instant::now();
            println!(
                "seed {}, round {round}: {} calls",
                plan.seed,
                report.calls()
            );
        }
    }
    report
}

fn shared_counts() -> &'static Counts {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: New zeroed memory is a valid `Counts`, and is never unmapped.
    unsafe {
        let at = libc::mmap(ptr::null_mut(), size_of::<Counts>(), prot, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        &*at.cast::<Counts>()
    }
}

/// Runs one process.
fn round_of(plan: &Plan, round: u64, cards: &[String], devices: &[String], report: &mut Report) {
    let whose = format!("seed {}, round {round}", plan.seed);
    let mut random = Random::new(plan.seed ^ round.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let seeds: Vec<u64> = (0..plan.threads).map(|_| random.next()).collect();
    let counts = report.counts;
    let child = in_child(|| {
        let shared = Shared::new(cards.to_vec(), devices.to_vec()).expect("what all share");
        thread::scope(|scope| {
            for &seed in &seeds {
                let shared = &shared;
                scope.spawn(move || {
                    let mut worker = Worker::new(shared, counts, seed).expect("a worker");
                    for _ in 0..QUOTA {
                        worker.step();
                    }
                });
            }
        });
        0
    });
    // Every other process is killed at a random time.
    let killed_at = (random.once_in(2) && plan.only.is_none())
        .then(|| counts.all() + random.below(plan.threads * QUOTA));
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let ended = &ended;
        let going = scope.spawn(move || match plan.only {
            None => disturb(cards, &mut random, ended),
            Some(_) => 0,
        });
        let (mut seen, mut at) = (counts.all(), Instant::now());
        let mut killed = false;
        let ending = loop {
            if let Some(ending) = child.has_ended() {
                break ending;
            }
            let now = counts.all();
            if now != seen {
                (seen, at) = (now, Instant::now());
            }
            if at.elapsed() > HANG {
                // Makes the kernel log which tasks wait, and where.
                let _ = fs::write("/proc/sysrq-trigger", "w");
                // No process can be waited for any more.
                eprintln!(
                    "{whose}: no call has ended in {HANG:?}, {}",
                    if killed { "killed" } else { "alive" }
                );
                std::process::exit(1);
            }
            let stalled = at.elapsed() > STALL;
            if !killed && (stalled || killed_at.is_some_and(|end| now >= end)) {
                child.kill(libc::SIGKILL);
                killed = true;
                (seen, at) = (now, Instant::now());
            }
            thread::sleep(Duration::from_millis(5));
        };
        ended.store(true, Ordering::Relaxed);
        report.gone += going.join().expect("the device comes and goes");
        report.killed += u64::from(killed);
        match ending {
            Ok(0) => {}
            Err(libc::SIGKILL) if killed => {}
            ending => panic!("{whose}: ended with {ending:?}"),
        }
    });
    // Some releases take a few milliseconds; after that every BAR is free.
    let end = Instant::now() + Duration::from_secs(20);
    for card in cards {
        let node = Node::open(card).expect("the card is back");
        while node.bar2().exports != 0 {
            assert!(
                Instant::now() < end,
                "{whose}: {} of {card} are still taken: {:?}",
                node.bar2().exports,
                node.bar2()
            );
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(node.bar2().free, node.bar2().size, "{whose}: {card}");
    }
}

/// Unbinds devices until `ended` is set; returns how often.
fn disturb(cards: &[String], random: &mut Random, ended: &AtomicBool) -> u64 {
    let mut times = 0;
    while !ended.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(random.below(400)));
        let card = &cards[random.below(cards.len() as u64) as usize];
        // No resets: QEMU 10's emulated CPUs fail an assertion (in `iotlb_to_section`) if a BAR disappears
        // while another one uses memory.
        Node::unbind(card);
        Node::bind(card);
        times += 1;
    }
    times
}
