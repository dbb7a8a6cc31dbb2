//! A worker's board: memory that the worker and the first process share, so that the worker reports without
//! messages. A board outlives its worker, so the progress of a killed worker is known.

use peerbuf::buffer::Mapping;
use peerbuf::error::BufferError;
use peerbuf::{Access, Buffer};

/// Numbers that a worker counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Counter {
    /// Bytes that it compared.
    Verified,
    /// Jobs done, by importer; the importer's index is added.
    Jobs,
    /// Jobs that went peer to peer, through shared host memory, and by a staged copy: three
    /// counters.
    Paths = Self::Jobs as u64 + IMPORTERS as u64,
    /// Writes to memory of which it knew that it is not the truth any more.
    LateWrites = Self::Paths as u64 + 3,
}

/// Room for so many kinds of importer.
pub const IMPORTERS: usize = 8;
const COUNTERS: u64 = Counter::LateWrites as u64 + 1;

/// A worker's progress on one buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The write that it is at, or has done last.
    pub begun: u64,
    /// The last write that it has done. Everything in its lane is of it when the two are equal.
    pub done: u64,
}

/// The board of one worker.
#[derive(Debug)]
pub struct Board {
    mapping: Mapping,
}

/// The size of a board in bytes.
pub fn size(buffers: usize) -> u64 {
    (COUNTERS + 2 * buffers as u64) * 8
}

impl Board {
    pub fn open(buffer: &Buffer) -> Result<Board, BufferError> {
        let mapping = buffer.whole().map(Access::ReadWrite)?;
        Ok(Board { mapping })
    }

    pub fn progress(&mut self, buffer: usize) -> Result<Progress, BufferError> {
        let at = (COUNTERS + 2 * buffer as u64) * 8;
        let cpu = self.mapping.begin_cpu_access(Access::Read)?;
        let progress = Progress {
            begun: cpu.read(at)?,
            done: cpu.read(at + 8)?,
        };
        cpu.end()?;
        Ok(progress)
    }

    pub fn set_progress(&mut self, buffer: usize, progress: Progress) -> Result<(), BufferError> {
        let at = (COUNTERS + 2 * buffer as u64) * 8;
        let mut cpu = self.mapping.begin_cpu_access(Access::ReadWrite)?;
        cpu.write(at, &progress.begun)?;
        cpu.write(at + 8, &progress.done)?;
        cpu.end()
    }

    pub fn count(&mut self, counter: Counter, which: usize, by: u64) -> Result<(), BufferError> {
        let at = (counter as u64 + which as u64) * 8;
        let mut cpu = self.mapping.begin_cpu_access(Access::ReadWrite)?;
        let value: u64 = cpu.read(at)?;
        cpu.write(at, &(value + by))?;
        cpu.end()
    }

    pub fn counted(&mut self, counter: Counter, which: usize) -> Result<u64, BufferError> {
        let cpu = self.mapping.begin_cpu_access(Access::Read)?;
        let value = cpu.read((counter as u64 + which as u64) * 8)?;
        cpu.end()?;
        Ok(value)
    }
}
