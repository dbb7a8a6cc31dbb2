//! The fuzzer of peerbuf.ko's interface: processes of several threads that call at random, with
//! requests that are right, nearly right and wrong, on descriptors that others close meanwhile, while
//! devices are unbound. Some of the processes are killed.
//!
//! It notices: a call that answers what it must not (`calls.rs`), a process that comes no further or
//! does not end, and part of a BAR that is still taken when all processes are gone. The rest (locks,
//! stray accesses, lost memory) is for the kernel that it runs on to notice.

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

/// The exit status of a process that got an answer which it must not get.
const WRONG_ANSWER: i32 = 3;

/// What to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// All that is random follows from it.
    pub seed: u64,
    /// Ends after so many calls,
    pub calls: u64,
    /// or after so long, whichever comes first.
    pub time: Duration,
    /// Threads of each process.
    pub threads: u64,
    /// Only this round of it, and nothing of what goes on beside it.
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

/// Calls of each thread in a round.
const QUOTA: u64 = 1500;

/// Without a call in so long, each thread waits for a device that waits for the process in turn, to
/// give up what it was told to hold. It is killed then.
const STALL: Duration = Duration::from_secs(15);

/// Without an end so long after that, something hangs.
const HANG: Duration = Duration::from_secs(100);

/// What was done.
pub struct Report {
    counts: &'static Counts,
    rounds: u64,
    /// Processes that were killed.
    killed: u64,
    /// Times that a device was unbound meanwhile.
    gone: u64,
}

impl Report {
    /// Calls in all.
    pub fn calls(&self) -> u64 {
        self.counts.all()
    }

    /// The calls that hardly ever got past their checks.
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

/// Does it.
///
/// # Panics
///
/// When something is wrong; it says what, in which round.
pub fn run(plan: &Plan) -> Report {
    let began = Instant::now();
    let mut report = Report {
        counts: shared_counts(),
        rounds: 0,
        killed: 0,
        gone: 0,
    };
    // The core calls every error of an exporter's `vmap` worth a warning, also where the buffer is pinned.
    expect("dma_buf_vmap");
    let cards: Vec<String> = Node::all().into_iter().map(|node| node.bdf).collect();
    // One that can, twice; one that is no device; a card, which cannot.
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
    // SAFETY: New memory, all zero, which is a valid `Counts`; it stays for ever.
    unsafe {
        let at = libc::mmap(ptr::null_mut(), size_of::<Counts>(), prot, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        &*at.cast::<Counts>()
    }
}

/// One process's life.
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
    // Every other one is killed, somewhere.
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
                // Says in the kernel's log who waits, and where.
                let _ = fs::write("/proc/sysrq-trigger", "w");
                // Nothing here can be waited for any more.
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
    // What lingers does so for some milliseconds; then every BAR is free.
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

/// Unbinds devices until it is told that it ended; how often.
fn disturb(cards: &[String], random: &mut Random, ended: &AtomicBool) -> u64 {
    let mut times = 0;
    while !ended.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(random.below(400)));
        let card = &cards[random.below(cards.len() as u64) as usize];
        // Not reset: QEMU 10's emulated processors fall over a BAR that goes while another one uses
        // memory (an assertion in `iotlb_to_section`).
        Node::unbind(card);
        Node::bind(card);
        times += 1;
    }
    times
}
