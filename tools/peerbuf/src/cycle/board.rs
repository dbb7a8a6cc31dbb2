//! A worker's board: memory that the worker shares with the first process, so that the worker
//! reports without messages. A board outlives its worker, so the progress of a killed worker is
//! known.

use peerbuf::buffer::Mapping;
use peerbuf::error::BufferError;
use peerbuf::{Access, Buffer};

/// The counters of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Counter {
    /// Number of bytes compared.
    Verified,
    /// Number of jobs done, by importer: add the importer's index.
    Jobs,
    /// Number of jobs by path: peer to peer, shared host memory, and staged copy. Three
    /// counters.
    Paths = Self::Jobs as u64 + IMPORTERS as u64,
    /// Number of writes after the publisher cut the worker off.
    LateWrites = Self::Paths as u64 + 3,
}

/// Maximum number of kinds of importer.
pub const IMPORTERS: usize = 8;
const COUNTERS: u64 = Counter::LateWrites as u64 + 1;

/// A worker's progress on one buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The number of the current or the last write.
    pub begun: u64,
    /// The number of the last completed write. If it equals `begun`, the whole lane is of this
    /// write.
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
