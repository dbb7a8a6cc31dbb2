//! A worker: a process that borrows the buffers, works on its lane of each buffer with every
//! importer, and checks that its bytes stay.
//!
//! Standard input is the worker's connection to the publisher. Standard output is its
//! connection for orders and reports.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use peerbuf::error::ShareError;
use peerbuf::import::Importer;
use peerbuf::plan::{Path as Way, Plan};
use peerbuf::share::{Channel, Lease, Subscriber};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use super::board::{Board, Counter, Progress};
use super::importers::{self, Kind};
use super::memory::name;
use super::pattern::{self, Cell, Loss, Mark};
use crate::Failure;

/// The longest message in either direction.
pub const MAX_MESSAGE: usize = 64 << 10;

/// A message to a worker, sent with the descriptor of its board.
#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    pub writer: u32,
    pub slot: usize,
    pub seed: u64,
    pub key: u64,
    pub buffers: usize,
    pub lane: u64,
    pub lane_length: usize,
    pub importers: Vec<Kind>,
    pub scratch: PathBuf,
    /// Upper limit of the rest after a job, as a multiple of the job's duration.
    pub rest: f64,
}

/// A message of a worker.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// Bytes are wrong.
    Lost(Loss),
    /// An importer failed, and the worker no longer uses it.
    Failed { importer: Kind, why: String },
}

/// Time that a worker waits for a buffer before it takes another.
const PATIENCE: Duration = Duration::from_millis(20);

/// Time limit for the news of a cut-off, after an importer has failed.
const NEWS: Duration = Duration::from_millis(500);

/// Number of writes after a cut-off.
const LATE_WRITES: u64 = 20;

struct Worker {
    orders: Orders,
    control: Channel,
    board: Board,
    random: StdRng,
    /// The last completed write to each buffer, with its generation.
    written: Vec<Option<Mark>>,
    importers: Vec<(Kind, Box<dyn Importer>)>,
    bytes: Vec<u8>,
}

/// Serves the first process until it ends the connection.
pub fn run() -> Result<ExitCode, Failure> {
    // The signal arrives even while the worker is stopped.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let by_hand = "`cycle-worker` is started by `peerbuf cycle`, not by hand";
    let publisher = std::io::stdin().as_fd().try_clone_to_owned()?;
    let publisher = Channel::from_fd(publisher).map_err(|_| by_hand)?;
    let control = std::io::stdout().as_fd().try_clone_to_owned()?;
    let control = Channel::from_fd(control).map_err(|_| by_hand)?;
    let (orders, _) = control.receive_message(MAX_MESSAGE)?;
    let orders: Orders = serde_json::from_slice(&orders)?;
    let board = control.receive_buffer()?;
    let mut worker = Worker {
        board: Board::open(board.buffer())?,
        random: StdRng::seed_from_u64(orders.seed),
        written: vec![None; orders.buffers],
        importers: Vec::new(),
        bytes: vec![0; orders.lane_length],
        control,
        orders,
    };
    for kind in worker.orders.importers.clone() {
        match importers::open(kind, &worker.orders.scratch) {
            Ok(importer) => worker.importers.push((kind, importer)),
            Err(error) => worker.report(&Report::Failed {
                importer: kind,
                why: error.to_string(),
            })?,
        }
    }
    if worker.importers.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    let subscriber = Subscriber::new(publisher).map_err(Failure::from);
    match subscriber.and_then(|subscriber| worker.work(&subscriber)) {
        // The first process ended the connection, perhaps before this worker began, or cut this
        // worker off.
        Err(error) if is_end(&error) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(error),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

fn is_end(error: &Failure) -> bool {
    matches!(
        error.downcast_ref(),
        Some(ShareError::PeerGone | ShareError::CutOff { .. })
    )
}

/// The reason why the connection ended, if it ends within `limit`.
fn end_within(subscriber: &Subscriber, limit: Duration) -> Option<ShareError> {
    let begun = Instant::now();
    loop {
        let ended = subscriber.ended();
        if ended.is_some() || begun.elapsed() >= limit {
            return ended;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Worker {
    fn work(&mut self, subscriber: &Subscriber) -> Result<(), Failure> {
        loop {
            let buffer = self.random.random_range(0..self.orders.buffers);
            let lease = match subscriber.buffer_within(&name(buffer), PATIENCE) {
                Ok(lease) => lease,
                Err(ShareError::TimedOut { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            let begun = Instant::now();
            let which = self.random.random_range(0..self.importers.len());
            let writes = self.written[buffer].is_none() || self.random.random_bool(0.5);
            let result = if writes {
                self.write(buffer, &lease, which)
            } else {
                self.verify(buffer, &lease, which)
            };
            let ended = match &result {
                Ok(_) => subscriber.ended(),
                // The kernel may revoke the memory before the message arrives.
                Err(_) => end_within(subscriber, NEWS),
            };
            if let Some(ended) = ended {
                // The publisher cut this worker off, perhaps during the job. Later writes of
                // this worker to this memory must not reach anybody.
                if matches!(ended, ShareError::CutOff { .. }) {
                    self.write_late(buffer, &lease)?;
                }
                return Err(ended.into());
            }
            match result {
                Ok(None) => {}
                // All other importers have one path.
                Ok(Some(_)) if self.importers[which].0 != Kind::Nvme => {}
                Ok(Some(plan)) => {
                    let which = match plan.path {
                        Way::PeerToPeer => 0,
                        Way::SharedHostMemory => 1,
                        Way::StagedCopy => 2,
                    };
                    self.board.count(Counter::Paths, which, 1)?;
                }
                Err(error) => {
                    let importer = self.importers.remove(which).0;
                    let why = format!("{lease}: {error}");
                    self.report(&Report::Failed { importer, why })?;
                    // The failed write left unknown bytes, which must not count as lost.
                    self.written[buffer] = None;
                    if self.importers.is_empty() {
                        return Ok(());
                    }
                    continue;
                }
            }
            let kind = self.importers[which].0 as usize;
            self.board.count(Counter::Jobs, kind, 1)?;
            drop(lease);
            let rest = begun
                .elapsed()
                .mul_f64(self.orders.rest * self.random.random::<f64>());
            std::thread::sleep(rest.min(PATIENCE));
        }
    }

    fn mark(&self, buffer: usize, lease: &Lease, count: u64) -> Mark {
        Mark {
            writer: self.orders.writer,
            buffer: buffer as u32,
            generation: lease.generation() as u32,
            count: count as u32,
        }
    }

    fn write(
        &mut self,
        buffer: usize,
        lease: &Lease,
        which: usize,
    ) -> Result<Option<Plan>, Failure> {
        let before = self.board.progress(buffer)?;
        let count = before.begun + 1;
        let mark = self.mark(buffer, lease, count);
        pattern::fill(&mut self.bytes, mark, self.orders.lane, self.orders.key);
        let begun = Progress {
            begun: count,
            ..before
        };
        self.board.set_progress(buffer, begun)?;
        let range = lease.range(self.orders.lane, self.orders.lane_length as u64)?;
        let done = self.importers[which].1.attach(&range)?.write(&self.bytes)?;
        self.written[buffer] = Some(mark);
        let progress = Progress {
            begun: count,
            done: count,
        };
        self.board.set_progress(buffer, progress)?;
        Ok(done)
    }

    fn verify(
        &mut self,
        buffer: usize,
        lease: &Lease,
        which: usize,
    ) -> Result<Option<Plan>, Failure> {
        let Some(mark) = self.written[buffer] else {
            return Ok(None);
        };
        let range = lease.range(self.orders.lane, self.orders.lane_length as u64)?;
        // A proof of a path changes bytes and restores them, so they are in doubt meanwhile.
        let settled = self.board.progress(buffer)?;
        let in_doubt = Progress {
            begun: settled.begun + 1,
            ..settled
        };
        self.board.set_progress(buffer, in_doubt)?;
        self.bytes.fill(0);
        let done = self.importers[which]
            .1
            .attach(&range)?
            .read(&mut self.bytes)?;
        self.board.set_progress(buffer, settled)?;
        let seen_by = format!(
            "writer {}, by {}",
            self.orders.writer,
            self.importers[which].0.name()
        );
        let template = Loss {
            seen_by,
            buffer: buffer as u32,
            generation: lease.generation(),
            offset: 0,
            bytes: 0,
            what: String::new(),
            expected: String::new(),
            found: String::new(),
        };
        let (lane, key) = (self.orders.lane, self.orders.key);
        let losses = pattern::check(&self.bytes, lane, key, &template, |at, cell| {
            let place = lane + at as u64;
            let right = Cell::Whole { mark, place };
            (*cell != right).then(|| mark.to_string())
        });
        if !losses.is_empty() {
            // Reports a loss once, not at every later check.
            self.written[buffer] = None;
        }
        for loss in losses {
            self.report(&Report::Lost(loss))?;
        }
        let verified = self.bytes.len() as u64;
        self.board.count(Counter::Verified, 0, verified)?;
        Ok(done)
    }

    /// Writes after the cut-off, like a program that did not notice it.
    fn write_late(&mut self, buffer: usize, lease: &Lease) -> Result<(), Failure> {
        let range = lease.range(self.orders.lane, self.orders.lane_length as u64)?;
        for late in 1..=LATE_WRITES {
            let mut progress = self.board.progress(buffer)?;
            progress.begun += 1;
            let mark = self.mark(buffer, lease, progress.begun);
            pattern::fill(&mut self.bytes, mark, self.orders.lane, self.orders.key);
            self.board.set_progress(buffer, progress)?;
            if range.write_bytes(&self.bytes).is_err() {
                // The kernel revoked the memory.
                return Ok(());
            }
            self.board.count(Counter::LateWrites, 0, 1)?;
            std::thread::sleep(Duration::from_micros(50 * late));
        }
        Ok(())
    }

    fn report(&self, report: &Report) -> Result<(), Failure> {
        Ok(self
            .control
            .send_message(&serde_json::to_vec(report)?, &[])?)
    }
}
