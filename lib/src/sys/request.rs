//! Requests between a file and mapped memory, and the trait of their source.

use std::os::fd::BorrowedFd;

use crate::errno::Errno;
use crate::path::Direction;
use crate::sys::memory::Window;

/// One request: a transfer between a file and memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'w> {
    /// Identifies the result; unique among the requests in flight.
    pub(crate) token: u32,
    pub(crate) file: BorrowedFd<'w>,
    pub(crate) window: Window<'w>,
    /// Offset in the file, in bytes.
    pub(crate) offset: u64,
    pub(crate) direction: Direction,
}

/// A source of requests and a receiver of their results.
pub(crate) trait Work<'w> {
    /// The next request. `None` if there is none before another result arrives, or none at all.
    fn next(&mut self) -> Option<Request<'w>>;
    /// Receives the result of a request: the number of bytes moved; 0 for a read at the end of
    /// a file.
    fn done(&mut self, token: u32, result: Result<usize, Errno>);
}
