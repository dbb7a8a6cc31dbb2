//! The contents of the buffers: cells that name their writer, their place and their time, so
//! that a misplaced byte tells its origin.

use serde::{Deserialize, Serialize};

/// Bytes of a cell: two words of the mark, its place, and a checksum over these.
pub const CELL: usize = 32;

/// The writer of a cell and the time of the write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The number of the process. Each process has its own.
    pub writer: u32,
    pub buffer: u32,
    /// The generation that the cell was written to.
    pub generation: u32,
    /// The number of the write among the writer's writes to the buffer, from 1.
    pub count: u32,
}

/// The content of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell {
    /// Zeros: no process wrote here.
    Empty,
    /// The words of the cell do not belong together.
    Torn,
    Whole {
        mark: Mark,
        /// The intended offset in the buffer, in bytes.
        place: u64,
    },
}

/// Wrong bytes, and their origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The process that noticed.
    pub seen_by: String,
    pub buffer: u32,
    pub generation: u64,
    /// Offset in the buffer, in bytes.
    pub offset: u64,
    pub bytes: u64,
    /// `torn`, `stale`, `lost` or `misplaced`.
    pub what: String,
    pub expected: String,
    pub found: String,
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: {} bytes at {:#x} of buffer {}, generation {}: expected {}, found {} (seen by {})",
            self.what,
            self.bytes,
            self.offset,
            self.buffer,
            self.generation,
            self.expected,
            self.found,
            self.seen_by
        )
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "write {} of writer {} to generation {}",
            self.count, self.writer, self.generation
        )
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cell::Empty => f.write_str("nothing written"),
            Cell::Torn => f.write_str("parts of different writes"),
            Cell::Whole { mark, place } => {
                write!(f, "{mark} of buffer {} at {place:#x}", mark.buffer)
            }
        }
    }
}

/// Fills whole cells. `place` is the offset of the first cell in the buffer. `key`
/// distinguishes this run's cells from older ones on the same disk.
pub fn fill(bytes: &mut [u8], mark: Mark, place: u64, key: u64) {
    for (index, cell) in bytes.chunks_exact_mut(CELL).enumerate() {
        let place = place + (index * CELL) as u64;
        let words = words(mark, place);
        for (part, word) in cell.chunks_exact_mut(8).zip(words) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        cell[24..].copy_from_slice(&checksum(words, key).to_le_bytes());
    }
}

/// Reads one cell.
pub fn read(cell: &[u8], key: u64) -> Cell {
    let mut words = [0u64; 4];
    for (word, part) in words.iter_mut().zip(cell.chunks_exact(8)) {
        *word = u64::from_le_bytes(part.try_into().unwrap_or_default());
    }
    if words == [0; 4] {
        return Cell::Empty;
    }
    let [who, when, place, sum] = words;
    if sum != checksum([who, when, place], key) {
        return Cell::Torn;
    }
    let mark = Mark {
        writer: (who >> 32) as u32,
        buffer: who as u32,
        generation: (when >> 32) as u32,
        count: when as u32,
    };
    Cell::Whole { mark, place }
}

fn words(mark: Mark, place: u64) -> [u64; 3] {
    [
        u64::from(mark.writer) << 32 | u64::from(mark.buffer),
        u64::from(mark.generation) << 32 | u64::from(mark.count),
        place,
    ]
}

/// Mixes the words so that each bit of each counts. Detects accidents, not forgeries.
fn checksum(words: [u64; 3], key: u64) -> u64 {
    words.into_iter().fold(key | 1, |sum, word| {
        let mixed = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ mixed >> 29
    })
}

/// Checks every cell of `bytes`; the first cell is at offset `place`. `expected` returns the
/// expected contents of a wrong cell. Neighbouring cells with the same fault count as one loss.
pub fn check(
    bytes: &[u8],
    place: u64,
    key: u64,
    template: &Loss,
    mut expected: impl FnMut(usize, &Cell) -> Option<String>,
) -> Vec<Loss> {
    let mut losses: Vec<Loss> = Vec::new();
    for (index, cell) in bytes.chunks_exact(CELL).enumerate() {
        let offset = place + (index * CELL) as u64;
        let found = read(cell, key);
        let Some(expected) = expected(index * CELL, &found) else {
            continue;
        };
        let what = match found {
            Cell::Torn => "torn",
            Cell::Empty => "lost",
            Cell::Whole { mark, place } if place != offset || mark.buffer != template.buffer => {
                "misplaced"
            }
            Cell::Whole { .. } => "stale",
        };
        match losses.last_mut() {
            Some(last) if last.what == what && last.offset + last.bytes == offset => {
                last.bytes += CELL as u64;
            }
            _ => losses.push(Loss {
                offset,
                bytes: CELL as u64,
                what: what.into(),
                expected,
                found: found.to_string(),
                ..template.clone()
            }),
        }
    }
    losses
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Mark = Mark {
        writer: 3,
        buffer: 2,
        generation: 7,
        count: 9,
    };

    fn template() -> Loss {
        Loss {
            seen_by: "a test".into(),
            buffer: 2,
            generation: 8,
            offset: 0,
            bytes: 0,
            what: String::new(),
            expected: String::new(),
            found: String::new(),
        }
    }

    fn look(bytes: &[u8]) -> Vec<Loss> {
        check(bytes, 4096, 5, &template(), |at, cell| {
            let place = 4096 + at as u64;
            let right = Cell::Whole { mark: MARK, place };
            (*cell != right).then(|| right.to_string())
        })
    }

    #[test]
    fn what_was_filled_is_found_as_it_was() {
        let mut bytes = vec![0; 10 * CELL];
        fill(&mut bytes, MARK, 4096, 5);
        assert_eq!(look(&bytes), []);
        assert_eq!(read(&bytes[..CELL], 6), Cell::Torn, "of another run");
    }

    #[test]
    fn every_changed_byte_is_found_with_its_place() {
        let mut good = vec![0; 3 * CELL];
        fill(&mut good, MARK, 4096, 5);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            let losses = look(&bytes);
            assert_eq!(losses.len(), 1);
            assert_eq!(losses[0].what, "torn");
            assert_eq!(losses[0].offset, 4096 + (at / CELL * CELL) as u64);
        }
    }

    #[test]
    fn other_writes_are_named() {
        let mut bytes = vec![0; 6 * CELL];
        fill(&mut bytes, MARK, 4096, 5);
        let older = Mark { count: 8, ..MARK };
        fill(&mut bytes[CELL..3 * CELL], older, 4096 + 32, 5);
        fill(&mut bytes[3 * CELL..4 * CELL], MARK, 0, 5);
        bytes[5 * CELL..].fill(0);
        let losses = look(&bytes);
        let seen: Vec<_> = losses
            .iter()
            .map(|l| (l.what.as_str(), l.offset, l.bytes))
            .collect();
        assert_eq!(
            seen,
            [
                ("stale", 4128, 64),
                ("misplaced", 4192, 32),
                ("lost", 4256, 32)
            ]
        );
        assert!(
            losses[0].found.contains("write 8 of writer 3"),
            "{}",
            losses[0]
        );
    }
}
