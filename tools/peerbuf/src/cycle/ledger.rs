//! What must be in the buffers, kept by the first process, and the check of each generation
//! against it.
//!
//! Each worker has a lane in every buffer, that only it writes. Its board says which write it has
//! done and which it is at. So of each lane it is known, to the byte, what a move must have
//! brought along; only where a worker was killed or cut off in the middle of a write, either of two
//! writes may be there, or a mixture.

use peerbuf::error::BufferError;

use super::board::{Board, Progress};
use super::pattern::{self, CELL, Cell, Loss};

/// How a buffer is divided among the workers.
#[derive(Debug, Clone, Copy)]
pub struct Lanes {
    /// Bytes in one.
    pub length: usize,
    pub count: usize,
}

impl Lanes {
    pub fn start(&self, slot: usize) -> u64 {
        (slot * self.length) as u64
    }
}

/// The worker that has a slot now.
#[derive(Debug)]
pub struct Writer {
    pub number: u32,
    pub board: Board,
    /// What was in its lane of each buffer when it began.
    pub found: Vec<Vec<u8>>,
}

/// The books.
#[derive(Debug)]
pub struct Ledger {
    pub lanes: Lanes,
    pub key: u64,
    /// By slot.
    pub writers: Vec<Writer>,
    pub losses: Vec<Loss>,
    /// Bytes compared.
    pub verified: u64,
}

impl Ledger {
    /// Each worker's progress on a buffer.
    pub fn progress(&mut self, buffer: usize) -> Result<Vec<Progress>, BufferError> {
        let writers = self.writers.iter_mut();
        writers
            .map(|writer| writer.board.progress(buffer))
            .collect()
    }

    /// Compares a new generation's bytes. `before` is where the workers stood before they were
    /// copied, `after` where they stood afterwards.
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
