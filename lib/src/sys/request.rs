//! Requests between a file and mapped memory, and the work that they come from.

use std::os::fd::BorrowedFd;

use crate::errno::Errno;
use crate::path::Direction;
use crate::sys::memory::Window;

/// One request: bytes between a file and memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'w> {
    /// Identifies the answer; unique among the requests in flight.
    pub(crate) token: u32,
    pub(crate) file: BorrowedFd<'w>,
    pub(crate) window: Window<'w>,
    /// Offset in the file, in bytes.
    pub(crate) offset: u64,
    pub(crate) direction: Direction,
}

/// A source of requests, and where their answers go.
pub(crate) trait Work<'w> {
    /// The next request; `None` where there is none before another answer has come, or none at all.
    fn next(&mut self) -> Option<Request<'w>>;
    /// The result of a request: the bytes moved; 0 at the end of a file that was read.
    fn done(&mut self, token: u32, result: Result<usize, Errno>);
}
