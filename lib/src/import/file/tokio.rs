//! Async file I/O (feature `tokio`).
//!
//! A transfer runs in pieces, each on one of the runtime's threads for blocking work. Dropping
//! a future cancels its transfer: the running piece completes, because a disk cannot be told to
//! stop, and no further piece begins. The running piece keeps the file and the buffer in use.

use super::FileImporter;
use crate::buffer::BufferRange;
use crate::error::{SystemError, TransferError};
use crate::transfer::Receipt;

/// Maximum number of bytes that still move after a cancel.
pub const PIECE: u64 = 8 << 20;

impl FileImporter {
    /// Async version of [`Attachment::read`](super::Attachment::read). Dropping the future
    /// cancels the transfer. At most one more [`PIECE`] of the range is overwritten in that
    /// case.
    ///
    /// # Errors
    /// As [`Attachment::read`](super::Attachment::read). After an error an unknown part of the
    /// range is overwritten.
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

    /// Async version of [`Attachment::write`](super::Attachment::write). Dropping the future
    /// cancels the transfer.
    ///
    /// # Errors
    /// As [`Attachment::write`](super::Attachment::write). After an error an unknown part of
    /// the file's range is overwritten.
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
                // The runtime is shutting down.
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
