//! The events of each cycle, drawn from the seed alone: the same seed and options give the same
//! schedule, whatever the machine does.
//!
//! A cycle is the move of one buffer. A step is a group of cycles that run together, as they do
//! if a device's memory is vacated.

use std::time::Duration;

use peerbuf::export::peerbuf::MoveTo;
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};

/// A worker is stopped or killed in a cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub slot: usize,
    /// Delay after the beginning of the cycle.
    pub after: Duration,
    /// Duration of the stop; `None` kills the worker.
    pub stopped_for: Option<Duration>,
}

/// The move of one buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cycle {
    pub buffer: usize,
    /// The index of the source of the next generation.
    pub source: usize,
}

/// The cycles of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub cycles: Vec<Cycle>,
    /// Buffers that the kernel moves before the cycles, while they are in use, with their
    /// targets.
    pub underneath: Vec<(usize, MoveTo)>,
    /// Time that the workers run undisturbed before the cycles.
    pub pause: Duration,
    pub faults: Vec<Fault>,
}

/// Maximum number of cycles in a step.
const TOGETHER: usize = 8;

/// The parameters of the draw.
#[derive(Debug, Clone, Copy)]
pub struct Odds {
    pub buffers: usize,
    pub processes: usize,
    pub sources: usize,
    /// True if the kernel can move some of the buffers.
    pub underneath: bool,
    /// Probability that a worker is killed in a cycle.
    pub kill: f64,
    /// Probability that a worker is stopped in a cycle.
    pub stall: f64,
    /// Time limit for workers to return a buffer. Stalls last up to twice as long.
    pub time_limit: Duration,
}

/// The sequence of steps.
#[derive(Debug)]
pub struct Schedule {
    random: StdRng,
    odds: Odds,
    digest: u64,
}

/// Upper limit of a pause.
const PAUSE: Duration = Duration::from_millis(2);

impl Schedule {
    pub fn new(seed: u64, odds: Odds) -> Schedule {
        Schedule {
            random: StdRng::seed_from_u64(seed),
            odds,
            digest: 0,
        }
    }

    /// A digest of all steps so far, which distinguishes schedules.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    pub fn next(&mut self) -> Step {
        let Odds {
            buffers,
            processes,
            sources,
            underneath,
            kill,
            stall,
            time_limit,
        } = self.odds;
        let random = &mut self.random;
        // Everything is drawn every time, so that one result does not shift the next.
        let pause = PAUSE.mul_f64(random.random());
        let together = random.random_range(1..=buffers.min(TOGETHER));
        let which = sample(random, buffers, together);
        let mut cycles = Vec::new();
        let mut faults = Vec::new();
        for buffer in which {
            let source = random.random_range(0..sources);
            cycles.push(Cycle { buffer, source });
            for (stops, probability) in [(false, kill), (true, stall)] {
                let happens = random.random_bool(probability);
                let slot = random.random_range(0..processes);
                let after = (PAUSE * 2).mul_f64(random.random());
                let length = (time_limit * 2).mul_f64(random.random());
                if happens {
                    faults.push(Fault {
                        slot,
                        after,
                        stopped_for: stops.then_some(length),
                    });
                }
            }
        }
        let mut moves = Vec::new();
        if underneath {
            for buffer in sample(random, buffers, together) {
                let to = match random.random_bool(0.5) {
                    true => MoveTo::Device,
                    false => MoveTo::System,
                };
                moves.push((buffer, to));
            }
        }
        let step = Step {
            cycles,
            underneath: moves,
            pause,
            faults,
        };
        self.digest = digest(self.digest, &step);
        step
    }
}

fn digest(before: u64, step: &Step) -> u64 {
    let nanoseconds = |time: Duration| time.as_nanos() as u64;
    let mut numbers = vec![nanoseconds(step.pause)];
    for cycle in &step.cycles {
        numbers.extend([cycle.buffer as u64, cycle.source as u64]);
    }
    for (buffer, to) in &step.underneath {
        numbers.push((*buffer as u64) << 1 | u64::from(*to == MoveTo::Device));
    }
    for fault in &step.faults {
        let length = fault.stopped_for.map_or(0, |time| nanoseconds(time) + 1);
        numbers.extend([fault.slot as u64, nanoseconds(fault.after), length]);
    }
    numbers.into_iter().fold(before, |sum, number| {
        let mixed = (sum ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ mixed >> 31
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ODDS: Odds = Odds {
        buffers: 4,
        processes: 8,
        sources: 2,
        underneath: true,
        kill: 0.2,
        stall: 0.1,
        time_limit: Duration::from_millis(100),
    };

    fn steps(seed: u64, odds: Odds) -> (Vec<Step>, u64) {
        let mut schedule = Schedule::new(seed, odds);
        let steps = (0..1000).map(|_| schedule.next()).collect();
        (steps, schedule.digest())
    }

    #[test]
    fn a_seed_gives_one_schedule_and_another_seed_another() {
        assert_eq!(steps(7, ODDS), steps(7, ODDS));
        assert_ne!(steps(7, ODDS), steps(8, ODDS));
        assert_ne!(steps(7, ODDS).1, steps(8, ODDS).1);
    }

    #[test]
    fn faults_come_as_often_as_they_should() {
        let (drawn, _) = steps(7, ODDS);
        let cycles: usize = drawn.iter().map(|step| step.cycles.len()).sum();
        assert!((2300..2700).contains(&cycles), "{cycles} of 4 buffers");
        let faults: Vec<Fault> = drawn.iter().flat_map(|step| step.faults.clone()).collect();
        let kills = faults.iter().filter(|fault| fault.stopped_for.is_none());
        let stalls = faults.iter().filter(|fault| fault.stopped_for.is_some());
        assert!((400..600).contains(&kills.count()));
        assert!((180..320).contains(&stalls.count()));
        let none = Odds {
            kill: 0.0,
            stall: 0.0,
            ..ODDS
        };
        assert!(steps(7, none).0.iter().all(|step| step.faults.is_empty()));
    }
}
