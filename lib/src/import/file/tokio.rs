//! File I/O for programs that wait with `async` (feature `tokio`).
//!
//! A transfer goes in pieces, each by one of the runtime's threads for what blocks. Dropping a future cancels its
//! transfer: the piece under way is finished, since a disk cannot be told to stop, and no other is begun. Until then
//! the piece keeps file and buffer in use by handles of its own.

use super::FileImporter;
use crate::buffer::BufferRange;
use crate::error::{SystemError, TransferError};
use crate::transfer::Receipt;

/// How many bytes may still move after a transfer was cancelled.
pub const PIECE: u64 = 8 << 20;

impl FileImporter {
    /// As [`Attachment::read`](super::Attachment::read), without holding up the thread. Cancelled when the future is
    /// dropped: at most one more [`PIECE`] of the range is overwritten then, where the transfer was.
    ///
    /// # Errors
    /// Those of that function. After an error an unknown part of the range is overwritten.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn read_into(
        &self,
        range: &BufferRange,
        file_offset: u64,
    ) -> Result<Receipt, TransferError> {
        self.in_pieces(range, move |importer, piece, at| {
            importer
                .attach(&piece)?
                .read(file_offset.saturating_add(at))
        })
        .await
    }

    /// As [`Attachment::write`](super::Attachment::write), likewise.
    ///
    /// # Errors
    /// Those of that function. After an error an unknown part of the file's range is overwritten.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn write_from(
        &self,
        range: &BufferRange,
        file_offset: u64,
    ) -> Result<Receipt, TransferError> {
        self.in_pieces(range, move |importer, piece, at| {
            importer
                .attach(&piece)?
                .write(file_offset.saturating_add(at))
        })
        .await
    }

    async fn in_pieces(
        &self,
        range: &BufferRange,
        carry: impl Fn(&FileImporter, BufferRange, u64) -> Result<Receipt, TransferError>
        + Clone
        + Send
        + 'static,
    ) -> Result<Receipt, TransferError> {
        let mut total: Option<Receipt> = None;
        let mut at = 0;
        loop {
            let piece = range.slice(at, (range.len() - at).min(PIECE))?;
            let (length, importer, carry) = (piece.len(), self.clone(), carry.clone());
            let done = tokio::task::spawn_blocking(move || carry(&importer, piece, at)).await;
            let receipt = match done {
                Ok(receipt) => receipt?,
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                // The runtime ends.
                Err(_) => {
                    let errno = rustix::io::Errno::CANCELED;
                    return Err(SystemError::new("a transfer", self.name(), errno).into());
                }
            };
            at += receipt.bytes;
            let ended = receipt.bytes < length || at == range.len();
            let so_far = match total {
                None => receipt,
                Some(before) => before.followed_by(receipt),
            };
            if ended {
                return Ok(so_far);
            }
            total = Some(so_far);
        }
    }
}
