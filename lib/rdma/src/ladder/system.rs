//! The two rungs in system memory: the pages of the memfd behind a buffer, and a bounce buffer.

use std::fmt;

use crate::rung::{Attempt, Layer, Rung};
use peerbuf::buffer::{Access, BufferRange, LazyMapping, Mapping};
use peerbuf::error::{BufferError, ExportError};
use peerbuf::export::memfd;
use peerbuf::plan::ReasonCode;
use peerbuf_core::{in_chunks, memory::Window};

/// Maps the pages of the memfd behind a range.
pub(crate) fn shared_memory(range: &BufferRange) -> Result<Mapping, Attempt> {
    let rung = Rung::SharedMemory;
    if range.buffer().host_memory().is_none() {
        let evidence = "the buffer is not backed by host memory";
        return Err(Attempt::lacking(rung, ReasonCode::NotHostMemory, evidence));
    }
    let mapping = range.map(range.buffer().allowed());
    mapping.map_err(|error| no_mapping(rung, &error))
}

/// A bounce buffer: memory that is registered instead of the buffer.
pub(crate) struct Staging {
    memory: Mapping,
    /// Offset of the range in the memory: the same offset in its page as in the buffer.
    lead: u64,
    buffer: LazyMapping,
}

impl Staging {
    /// Allocates memory as long as the range. Copies nothing.
    pub(crate) fn of(range: &BufferRange) -> Result<Staging, Attempt> {
        let page = rustix::param::page_size() as u64;
        let lead = range.offset() % page;
        let memory = memfd::export("RDMA staging", range.len() + lead);
        let memory = memory
            .and_then(|memory| Ok(memory.whole().map(Access::ReadWrite)?))
            .map_err(|error: ExportError| no_mapping(Rung::Staged, &error))?;
        let buffer = LazyMapping::new(range).and_then(|mut buffer| {
            buffer.reach()?;
            Ok(buffer)
        });
        let buffer = buffer.map_err(|error| no_mapping(Rung::Staged, &error))?;
        Ok(Staging {
            memory,
            lead,
            buffer,
        })
    }

    /// The memory that stands for the range.
    pub(crate) fn window(&self) -> Window<'_> {
        let map = self.memory.map();
        map.window(self.lead as usize, self.buffer.len() as usize)
    }

    /// Copies from the bounce buffer to the buffer. The bytes are inside the range.
    pub(crate) fn deliver(&mut self, offset: u64, length: u64) -> Result<(), BufferError> {
        in_chunks(length, |at, chunk| {
            let at = offset + at;
            let memory = self.memory.begin_cpu_access(Access::Read)?;
            memory.read_at(self.lead + at, chunk)?;
            memory.end()?;
            self.buffer.write_at(at, chunk)
        })
    }

    /// Copies from the buffer to the bounce buffer. The bytes are inside the range.
    pub(crate) fn refresh(&mut self, offset: u64, length: u64) -> Result<(), BufferError> {
        in_chunks(length, |at, chunk| {
            let at = offset + at;
            self.buffer.read_at(at, chunk)?;
            let mut memory = self.memory.begin_cpu_access(Access::Write)?;
            memory.write_at(self.lead + at, chunk)?;
            memory.end()
        })
    }
}

pub(crate) fn no_mapping(rung: Rung, error: &dyn fmt::Display) -> Attempt {
    Attempt {
        layer: Layer::Exporter,
        ..Attempt::lacking(rung, ReasonCode::NotMappable, &error.to_string())
    }
}
