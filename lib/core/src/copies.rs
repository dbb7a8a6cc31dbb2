//! Copies through a buffer's [`Stage`](crate::Stage), with the checks that a mapping would make.

use std::error::Error;
use std::time::Duration;

use crate::access::Access;
use crate::buffer::BufferRange;
use crate::error::BufferError;
use crate::stage::Shared;
use crate::sys::fork::Process;

impl BufferRange {
    /// Checks that the buffer allows `access`, in this process. Returns the process that the buffer is lent
    /// to.
    pub(crate) fn usable(&self, access: Access) -> Result<Option<Process>, BufferError> {
        let object = || self.buffer().name().to_owned();
        if access.writes() && !self.buffer().is_writable() {
            return Err(BufferError::Access {
                object: object(),
                wanted: "write",
            });
        }
        let borrower = self.buffer().borrower();
        if borrower.is_some_and(|process| !process.is_current()) {
            return Err(BufferError::Inherited { object: object() });
        }
        Ok(borrower)
    }

    /// Copies the range's first bytes out through the stage; `None` without a stage.
    pub(crate) fn download(&self, into: &mut [u8]) -> Option<Result<(), BufferError>> {
        let Shared(stage) = self.buffer().stage()?;
        let copied = self.ready(Access::Read, into.len()).and_then(|()| {
            let copied = stage.download(self.offset(), into);
            copied.map_err(|error| self.failed("download", &*error))
        });
        Some(copied)
    }

    /// Copies bytes to the range's start through the stage; `None` without a stage.
    pub(crate) fn upload(&self, from: &[u8]) -> Option<Result<(), BufferError>> {
        let Shared(stage) = self.buffer().stage()?;
        let copied = self.ready(Access::Write, from.len()).and_then(|()| {
            let copied = stage.upload(self.offset(), from);
            copied.map_err(|error| self.failed("upload", &*error))
        });
        Some(copied)
    }

    /// Makes the checks of a mapping, and waits for the fences.
    fn ready(&self, access: Access, length: usize) -> Result<(), BufferError> {
        let buffer = self.buffer();
        self.slice(0, length as u64)?;
        self.usable(access)?;
        match buffer.dmabuf() {
            Some(dmabuf) => dmabuf.wait(access, Duration::MAX),
            None => Ok(()),
        }
    }

    fn failed(&self, call: &'static str, cause: &dyn Error) -> BufferError {
        BufferError::Stage {
            call,
            object: self.buffer().name().to_owned(),
            cause: cause.to_string(),
        }
    }
}
