//! [`Stage`]: copies to and from a buffer without a mapping.
//!
//! GPU memory often has no CPU mapping (NVIDIA's driver before 13.3 refuses `mmap` of its dma-bufs), or only
//! a slow one. Its owner copies the bytes with other calls, such as `cuMemcpyHtoD` and `cuMemcpyDtoH`. A
//! [`Stage`] wraps these calls. If a buffer has a stage, the CPU's copies go through it; otherwise through a
//! mapping, which is made at the first copy.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// Copies bytes into and out of a buffer without mapping it.
///
/// Offsets are in bytes from the buffer's start. The caller keeps offset and length inside the buffer. Calls
/// may come from any thread, and concurrently.
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
    /// Copies bytes into the buffer. On return they are visible to devices.
    ///
    /// # Errors Any error of the copy.
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Copies bytes out of the buffer. On return all of them are in `into`.
    ///
    /// # Errors Any error of the copy.
    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// A stage, shared by a buffer's handles.
#[derive(Clone)]
pub(crate) struct Shared(pub(crate) Arc<dyn Stage>);

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stage")
    }
}
