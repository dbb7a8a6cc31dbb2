//! Where generations come from, and the moves between them, each checked against the ledger.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peerbuf::error::{ExportError, ShareError};
use peerbuf::export::{memfd, udmabuf};
use peerbuf::share::{Backing, Order, copy};
use peerbuf::{Access, Buffer};

use super::Break;
use super::ledger::Ledger;

/// Something that buffers can be made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Memfd,
    Udmabuf,
}

impl Source {
    pub fn make(&self, name: &str, size: u64) -> Result<Buffer, ExportError> {
        match self {
            Source::Memfd => memfd::export(name, size),
            Source::Udmabuf => udmabuf::export(name, size),
        }
    }

    /// Names it in the summary.
    pub fn describe(&self) -> &'static str {
        match self {
            Source::Memfd => "memfd",
            Source::Udmabuf => "udmabuf",
        }
    }
}

/// What all buffers of a run have in common.
#[derive(Debug)]
pub struct Shared {
    pub ledger: Ledger,
    pub sources: Vec<Source>,
    /// Which of them the next generation of each buffer comes from.
    pub next: Vec<usize>,
    pub broken: Option<Break>,
    /// How often the switch in `broken` did what it does.
    pub broke: u64,
}

/// One of the run's buffers.
pub struct Moving {
    index: usize,
    buffer: Buffer,
    shared: Arc<Mutex<Shared>>,
}

pub fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What buffer number `index` is published as.
pub fn name(index: usize) -> String {
    format!("buffer {index}")
}

/// All bytes of a buffer.
pub fn read(buffer: &Buffer, offset: u64, length: u64) -> Result<Vec<u8>, ShareError> {
    let mut bytes = vec![0; length as usize];
    let mut mapping = buffer.range(offset, length)?.map(Access::Read)?;
    let cpu = mapping.begin_cpu_access(Access::Read)?;
    cpu.read_at(0, &mut bytes)?;
    cpu.end()?;
    Ok(bytes)
}

impl Moving {
    pub fn new(
        index: usize,
        size: u64,
        shared: &Arc<Mutex<Shared>>,
    ) -> Result<Moving, ExportError> {
        let source = lock(shared).sources[0].clone();
        Ok(Moving {
            index,
            buffer: source.make(&name(index), size)?,
            shared: Arc::clone(shared),
        })
    }
}

impl Backing for Moving {
    fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    fn migrate(&mut self, order: &Order) -> Result<(), ShareError> {
        let mut shared = lock(&self.shared);
        let shared = &mut *shared;
        let before = shared.ledger.progress(self.index)?;
        let next = match shared.broken {
            Some(Break::ReuseGeneration) => {
                shared.broke += 1;
                self.buffer.clone()
            }
            _ => {
                let source = &shared.sources[shared.next[self.index]];
                let next = source.make(&name(self.index), self.buffer.size())?;
                copy(&self.buffer, &next)?;
                next
            }
        };
        if shared.broken == Some(Break::TearCopy) {
            shared.broke += 1;
            tear(&next)?;
        }
        let after = shared.ledger.progress(self.index)?;
        let bytes = read(&next, 0, next.size())?;
        let ledger = &mut shared.ledger;
        ledger.check(self.index, order.generation, &bytes, &before, &after);
        self.buffer = next;
        Ok(())
    }
}

/// Undoes a few bytes of a copy.
fn tear(buffer: &Buffer) -> Result<(), ShareError> {
    let middle = buffer.range(buffer.size() / 2 - 16, 32)?;
    let mut mapping = middle.map(Access::ReadWrite)?;
    let mut cpu = mapping.begin_cpu_access(Access::Write)?;
    cpu.write_at(0, &[0; 32])?;
    Ok(cpu.end()?)
}
