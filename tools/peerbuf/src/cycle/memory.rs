//! The sources of generations, and the moves between generations, each checked against the
//! ledger.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peerbuf::device::drm::Card;
use peerbuf::error::{ExportError, ShareError};
use peerbuf::export::heap::Heap;
use peerbuf::export::memfd::HugePages;
use peerbuf::export::peerbuf::Device;
use peerbuf::export::{drm, memfd, udmabuf};
use peerbuf::share::{Backing, Movable, Order, Placement, copy};
use peerbuf::{Access, Buffer, DmaBuf};

use super::Break;
use super::ledger::Ledger;
use crate::size;

/// A source of buffers.
#[derive(Debug)]
pub enum Source {
    Memfd,
    Udmabuf,
    /// A udmabuf of huge pages.
    HugePages(HugePages),
    Heap(Heap),
    /// Dumb buffers of a card.
    Drm(Card),
}

impl Source {
    pub fn make(&self, name: &str, size: u64) -> Result<Buffer, ExportError> {
        match self {
            Source::Memfd => memfd::export(name, size),
            Source::Udmabuf => udmabuf::export(name, size),
            Source::HugePages(pages) => udmabuf::export_huge(name, size, *pages),
            Source::Heap(heap) => heap.export(name, size),
            Source::Drm(card) => drm::export(card, name, size),
        }
    }

    /// The source's name in the summary.
    pub fn describe(&self) -> String {
        match self {
            Source::Memfd => "memfd".into(),
            Source::Udmabuf => "udmabuf".into(),
            Source::HugePages(pages) => format!("udmabuf of {} pages", size::show(pages.size())),
            Source::Heap(heap) => format!("dma-heap {}", heap.name()),
            Source::Drm(card) => format!("DRM {}", card.driver()),
        }
    }
}

/// Device memory that buffers move into and out of.
#[derive(Debug, Clone)]
pub struct Bar {
    pub device: Arc<Device>,
    pub index: u8,
    /// The memory's name in the summary.
    pub what: &'static str,
}

/// The state shared by all buffers of a run.
#[derive(Debug)]
pub struct Shared {
    pub ledger: Ledger,
    pub sources: Vec<Source>,
    /// The index of the source for the next generation of each buffer.
    pub next: Vec<usize>,
    /// The dma-buf of each buffer that the kernel can move.
    pub movable: Vec<Option<DmaBuf>>,
    pub broken: Option<Break>,
}

/// One of the run's buffers.
pub struct Moving {
    index: usize,
    memory: Memory,
    shared: Arc<Mutex<Shared>>,
}

enum Memory {
    /// Each generation is a separate buffer.
    Made(Buffer),
    /// The kernel moves the buffer.
    InBar(Movable),
}

pub fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The published name of buffer number `index`.
pub fn name(index: usize) -> String {
    format!("buffer {index}")
}

impl Moving {
    pub fn new(
        index: usize,
        size: u64,
        bar: Option<&Bar>,
        shared: &Arc<Mutex<Shared>>,
    ) -> Result<Moving, ShareError> {
        let memory = match bar {
            Some(bar) => {
                let device = Arc::clone(&bar.device);
                Memory::InBar(Movable::new(device, bar.index, size)?)
            }
            None => Memory::Made(lock(shared).sources[0].make(&name(index), size)?),
        };
        let moving = Moving {
            index,
            memory,
            shared: Arc::clone(shared),
        };
        moving.tell(&mut lock(shared))?;
        Ok(moving)
    }

    /// Publishes the dma-buf that the kernel can move without a message to its users.
    fn tell(&self, shared: &mut Shared) -> Result<(), ShareError> {
        let movable = match &self.memory {
            Memory::InBar(movable) => movable.buffer().dmabuf().map(DmaBuf::try_clone),
            Memory::Made(_) => None,
        };
        shared.movable[self.index] = movable.transpose()?;
        Ok(())
    }
}

impl Backing for Moving {
    fn buffer(&self) -> &Buffer {
        match &self.memory {
            Memory::Made(buffer) => buffer,
            Memory::InBar(movable) => movable.buffer(),
        }
    }

    fn placement(&self) -> Placement {
        match &self.memory {
            Memory::Made(buffer) => Placement::of(buffer),
            Memory::InBar(movable) => movable.placement(),
        }
    }

    fn migrate(&mut self, order: &Order) -> Result<(), ShareError> {
        let books = Arc::clone(&self.shared);
        let mut shared = lock(&books);
        let before = shared.ledger.progress(self.index)?;
        let reuse = shared.broken == Some(Break::ReuseGeneration);
        match &mut self.memory {
            Memory::Made(_) if reuse => {}
            Memory::Made(buffer) => {
                let source = &shared.sources[shared.next[self.index]];
                let next = source.make(&name(self.index), buffer.size())?;
                copy(buffer, &next)?;
                *buffer = next;
            }
            Memory::InBar(movable) => {
                let mut order = *order;
                order.isolate &= !reuse;
                movable.migrate(&order)?;
            }
        }
        if shared.broken == Some(Break::TearCopy) {
            tear(self.buffer())?;
        }
        let after = shared.ledger.progress(self.index)?;
        let bytes = self.buffer().whole().to_vec()?;
        let ledger = &mut shared.ledger;
        ledger.check(self.index, order.generation, &bytes, &before, &after);
        self.tell(&mut shared)
    }
}

/// Reverts a few bytes of a copy.
fn tear(buffer: &Buffer) -> Result<(), ShareError> {
    let middle = buffer.range(buffer.size() / 2 - 16, 32)?;
    let mut mapping = middle.map(Access::ReadWrite)?;
    let mut cpu = mapping.begin_cpu_access(Access::Write)?;
    cpu.write_at(0, &[0; 32])?;
    Ok(cpu.end()?)
}
