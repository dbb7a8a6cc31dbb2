//! The expected contents of the buffers, kept by the first process, and the check of each
//! generation against them.
//!
//! Each worker has a lane in every buffer, which only this worker writes. The worker's board
//! has the numbers of its last and its current write. The ledger therefore knows, to the byte,
//! what a move must preserve of each lane. If a worker was killed or cut off during a write,
//! the lane may contain either of two writes, or a mixture.

use peerbuf::error::BufferError;

use super::board::{Board, Progress};
use super::pattern::{self, CELL, Cell, Loss};

/// The division of a buffer among the workers.
#[derive(Debug, Clone, Copy)]
pub struct Lanes {
    /// Length of a lane in bytes.
    pub length: usize,
    pub count: usize,
}

impl Lanes {
    pub fn start(&self, slot: usize) -> u64 {
        (slot * self.length) as u64
    }
}

/// The current worker of a slot.
#[derive(Debug)]
pub struct Writer {
    pub number: u32,
    pub board: Board,
    /// The contents of the worker's lane in each buffer when the worker began.
    pub found: Vec<Vec<u8>>,
}

/// The records of all workers.
#[derive(Debug)]
pub struct Ledger {
    pub lanes: Lanes,
    pub key: u64,
    /// The workers, by slot.
    pub writers: Vec<Writer>,
    pub losses: Vec<Loss>,
    /// Number of bytes compared.
    pub verified: u64,
}

impl Ledger {
    /// The progress of each worker on a buffer.
    pub fn progress(&mut self, buffer: usize) -> Result<Vec<Progress>, BufferError> {
        let writers = self.writers.iter_mut();
        writers
            .map(|writer| writer.board.progress(buffer))
            .collect()
    }

    /// Compares the bytes of a new generation. `before` is the workers' progress before the
    /// copy, `after` their progress afterwards.
    pub fn check(
        &mut self,
        buffer: usize,
        generation: u64,
        bytes: &[u8],
        before: &[Progress],
        after: &[Progress],
    ) {
        let Lanes { length, .. } = self.lanes;
        let template = Loss {
            seen_by: "the publisher, after the move".into(),
            buffer: buffer as u32,
            generation,
            offset: 0,
            bytes: 0,
            what: String::new(),
            expected: String::new(),
            found: String::new(),
        };
        let lanes = bytes
            .chunks_exact(length)
            .zip(self.writers.iter().enumerate());
        for (lane, (slot, writer)) in lanes {
            let start = self.lanes.start(slot);
            let (before, after) = (before[slot], after[slot]);
            let settled = before.begun == before.done && after == before;
            let found = &writer.found[buffer];
            let losses = pattern::check(lane, start, self.key, &template, |at, cell| {
                let untouched = lane[at..at + CELL] == found[at..at + CELL];
                let right = match cell {
                    _ if before.done == 0 && untouched => true,
                    Cell::Empty => false,
                    Cell::Torn => !settled,
                    Cell::Whole { mark, place } => {
                        let counts = before.done.max(1)..=after.begun;
                        *place == start + at as u64
                            && mark.buffer == buffer as u32
                            && mark.writer == writer.number
                            && counts.contains(&mark.count.into())
                            && u64::from(mark.generation) <= generation
                    }
                };
                (!right).then(|| match (before.done, settled) {
                    (0, true) => "what was there before its writer began".into(),
                    (done, true) => format!("write {done} of writer {}", writer.number),
                    (done, false) => format!(
                        "write {done} to {} of writer {}",
                        after.begun, writer.number
                    ),
                })
            });
            self.losses.extend(losses);
        }
        self.verified += bytes.len() as u64;
    }
}
