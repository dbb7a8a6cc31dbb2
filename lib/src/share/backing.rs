//! What a published buffer is made of, and how its next generation comes to be.

use crate::buffer::{Access, Buffer};
use crate::error::{ExportError, ShareError};

/// Where a buffer's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// In a device.
    Device,
    /// In system memory.
    System,
    /// Nobody knows.
    Unknown,
}

impl Placement {
    /// What a buffer's kind says about it.
    pub fn of(buffer: &Buffer) -> Placement {
        let provenance = buffer.provenance();
        if provenance.kind.is_host_memory() {
            Placement::System
        } else if provenance.device.is_some() {
            Placement::Device
        } else {
            Placement::Unknown
        }
    }
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Placement::Device => "device",
            Placement::System => "system",
            Placement::Unknown => "unknown",
        })
    }
}

/// What [`Backing::migrate`] has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// The number of the generation to be made.
    pub generation: u64,
    /// Somebody who was cut off, or died without giving the old generation back, may still reach
    /// it. The new one must not be reachable through any descriptor or mapping of the old.
    pub isolate: bool,
}

/// The memory behind a published buffer, and how it moves.
pub trait Backing: Send {
    /// The current generation.
    fn buffer(&self) -> &Buffer;

    /// Where its bytes are.
    fn placement(&self) -> Placement {
        Placement::of(self.buffer())
    }

    /// False while something in this process besides the backing has a handle on the current
    /// generation, so that it cannot be given up.
    fn is_idle(&self) -> bool {
        self.buffer().handles() == 1
    }

    /// Makes the next generation, of the same size and with the same bytes, and lets go of the
    /// current one. Called when no live subscriber uses that any more.
    ///
    /// # Errors
    /// Why there is no next generation. [`Backing::buffer`] is then still the current one.
    fn migrate(&mut self, order: &Order) -> Result<(), ShareError>;
}

/// A backing that moves by copying: each generation is a buffer of its own, so nothing that
/// reaches the old one reaches the new one.
///
/// ```
/// use peerbuf::export::memfd;
/// use peerbuf::share::Copied;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let backing = Copied::new(|_generation| memfd::export("weights", 1 << 20))?;
/// # Ok(())
/// # }
/// ```
pub struct Copied<F> {
    buffer: Buffer,
    make: F,
}

impl<F: FnMut(u64) -> Result<Buffer, ExportError>> Copied<F> {
    /// Has `make` make each generation, of which it is given the number; the first is 1. They may
    /// be of different kinds, but must be of one size.
    ///
    /// # Errors
    /// What `make` returned.
    pub fn new(mut make: F) -> Result<Copied<F>, ExportError> {
        let buffer = make(1)?;
        Ok(Copied { buffer, make })
    }
}

impl<F> std::fmt::Debug for Copied<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copied")
            .field("buffer", &self.buffer)
            .finish_non_exhaustive()
    }
}

impl<F: FnMut(u64) -> Result<Buffer, ExportError> + Send> Backing for Copied<F> {
    fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    fn migrate(&mut self, order: &Order) -> Result<(), ShareError> {
        let next = (self.make)(order.generation)?;
        copy(&self.buffer, &next)?;
        self.buffer = next;
        Ok(())
    }
}

/// How much the CPU copies at a time.
const CHUNK: u64 = 256 << 10;

/// Copies all bytes of one buffer to another of the same size.
///
/// # Errors
/// [`ShareError::Backing`] when the sizes differ; otherwise what mapping or access failed with.
pub fn copy(from: &Buffer, to: &Buffer) -> Result<(), ShareError> {
    if from.size() != to.size() {
        let what = format!(
            "{from} has {} bytes, and {to}, which was to replace it, {}",
            from.size(),
            to.size()
        );
        return Err(ShareError::Backing { what });
    }
    let mut source = from.whole().map(Access::Read)?;
    let mut target = to.whole().map(Access::ReadWrite)?;
    let reading = source.begin_cpu_access(Access::Read)?;
    let mut writing = target.begin_cpu_access(Access::Write)?;
    let mut bytes = vec![0; from.size().min(CHUNK) as usize];
    let mut at = 0;
    while at < from.size() {
        let length = (from.size() - at).min(CHUNK) as usize;
        reading.read_at(at, &mut bytes[..length])?;
        writing.write_at(at, &bytes[..length])?;
        at += length as u64;
    }
    writing.end()?;
    reading.end()?;
    Ok(())
}
