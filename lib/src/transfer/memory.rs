//! From one buffer to another, by the processor: one copy, without memory in between.

use std::time::Instant;

use super::{Queue, Receipt, Watch};
use crate::buffer::{Access, BufferRange};
use crate::error::TransferError;
use crate::path::{Path, Plan, Reason, ReasonCode};

/// How much is copied before somebody who watches is told, or may cancel.
const STEP: u64 = 1 << 20;

/// Copies bytes from the beginning of one range to the beginning of another, as many as the first one has. What
/// ranges that overlap have in the end is not said.
///
/// ```
/// use peerbuf::export::memfd;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (from, to) = (memfd::export("from", 4096)?, memfd::export("to", 8192)?);
/// from.whole().write_bytes(b"weights")?;
/// let receipt = peerbuf::transfer::copy(&from.whole(), &to.range(4096, 4096)?)?;
/// assert_eq!((receipt.bytes, receipt.copied), (4096, 4096));
/// assert_eq!(to.range(4096, 7)?.to_vec()?, b"weights");
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`TransferError::Buffer`] for a range that cannot be mapped or accessed, and a second one that is
/// shorter or not writable.
pub fn copy(from: &BufferRange, to: &BufferRange) -> Result<Receipt, TransferError> {
    copy_watched(from, to, &Watch::default())
}

/// As [`copy`], where others see how far it is, and may cancel it.
///
/// # Errors
/// As [`copy`], and [`TransferError::Cancelled`].
pub fn copy_watched(
    from: &BufferRange,
    to: &BufferRange,
    watch: &Watch,
) -> Result<Receipt, TransferError> {
    let begun = Instant::now();
    let length = from.len();
    let to = to.slice(0, length)?;
    let mut source = from.map(Access::Read)?;
    let mut target = to.map(Access::ReadWrite)?;
    let reading = source.begin_cpu_access(Access::Read)?;
    let mut writing = target.begin_cpu_access(Access::Write)?;
    let mut done = 0;
    while done < length && !watch.is_cancelled() {
        let step = STEP.min(length - done) as usize;
        let bytes = reading.mapping().map().window(done as usize, step);
        bytes.copy_to(&writing.mapping().map().window(done as usize, step));
        done += step as u64;
        writing.copied_in(done);
        watch.arrived(step as u64);
    }
    writing.end()?;
    reading.end()?;
    if done < length {
        return Err(TransferError::Cancelled {
            object: to.buffer().name().to_owned(),
            arrived: done,
            wanted: length,
            prefix: done,
        });
    }
    let reason = |path| {
        let why = "the CPU has no DMA engine: it loads and stores";
        Reason::new(path, ReasonCode::NotADevice, why)
    };
    Ok(Receipt {
        plan: Plan {
            path: Path::StagedCopy,
            reasons: vec![reason(Path::PeerToPeer), reason(Path::SharedHostMemory)],
        },
        bytes: length,
        host_bytes: length,
        copied: length,
        requests: 0,
        queue: Queue::Calls,
        moves: 0,
        time: begun.elapsed(),
    })
}
