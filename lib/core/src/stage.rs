//! [`Stage`]: the bytes of a buffer by its owner's own copies.
//!
//! Memory of a GPU often has no mapping for the processor (NVIDIA's driver before 13.3 refuses `mmap` of its
//! dma-bufs), or only a slow one. Its owner has another way to its bytes, such as `cuMemcpyHtoD` and
//! `cuMemcpyDtoH`. A [`Stage`] is that way. Copies by the processor go through a buffer's stage if it has one,
//! and otherwise through a mapping, which is made when it is first needed.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// Copies bytes into a buffer and out of it without mapping it: the way of the memory's owner.
///
/// Offsets are in bytes and count from the buffer's beginning; they and the lengths are inside the buffer. Calls
/// may come from any thread, and from several at once.
///
/// ```
/// use std::error::Error;
/// use std::sync::Mutex;
/// use peerbuf_core::{Buffer, Stage, memfd};
///
/// /// A library's memory, which only its own copies reach.
/// struct Theirs(Mutex<Vec<u8>>);
///
/// impl Stage for Theirs {
///     fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
///         let mut memory = self.0.lock().map_err(|_| "a copy panicked")?;
///         memory[offset as usize..][..from.len()].copy_from_slice(from);
///         Ok(())
///     }
///
///     fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
///         let memory = self.0.lock().map_err(|_| "a copy panicked")?;
///         into.copy_from_slice(&memory[offset as usize..][..into.len()]);
///         Ok(())
///     }
/// }
///
/// # fn main() -> Result<(), peerbuf_core::error::BufferError> {
/// # let imported = memfd::buffer("example", 4096)?;
/// // let imported = Buffer::import(fd)?;
/// let buffer = imported.with_stage(Theirs(Mutex::new(vec![0; 4096])));
/// buffer.range(100, 5)?.write_bytes(b"hello")?;
/// assert_eq!(buffer.range(102, 3)?.to_vec()?, b"llo");
/// # Ok(())
/// # }
/// ```
pub trait Stage: Send + Sync {
    /// Copies bytes into the buffer. When it returns, devices see them.
    ///
    /// # Errors
    /// Whatever the copy failed with.
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Copies bytes out of the buffer. It returns when all are there.
    ///
    /// # Errors
    /// Whatever the copy failed with.
    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// A stage that a buffer's handles share.
#[derive(Clone)]
pub(crate) struct Shared(pub(crate) Arc<dyn Stage>);

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stage")
    }
}
