//! One published buffer: its state, and the descriptors that go with an offer of it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

use super::super::backing::Backing;
use super::super::channel;
use super::super::grant::Grant;
use super::super::wire;
use super::id::BufferId;
use crate::buffer::Buffer;
use crate::error::{BufferError, ShareError, SystemError};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Offered to all subscribers that may have it.
    Live,
    /// Being taken back, and offered to nobody.
    Leaving,
    /// A move failed, and the old memory cannot be offered again. The next move may succeed.
    Withheld,
}

pub(super) struct Published {
    /// The record for a subscriber that may write, ready to be copied.
    pub(super) entry: wire::Entry,
    pub(super) name: String,
    pub(super) backing: Box<dyn Backing>,
    pub(super) generation: u64,
    pub(super) state: State,
    /// Number of subscribers that were sent this generation and have not returned it.
    pub(super) holders: usize,
    /// True if a subscriber that never returned this generation may still reach it.
    pub(super) tainted: bool,
    /// The same memory, opened for reading only, on first use.
    pub(super) read_only: OnceLock<OwnedFd>,
}

impl Published {
    /// Prepares the record of the current generation.
    pub(super) fn describe(&mut self, id: BufferId) {
        let placement = self.backing.placement();
        let buffer = self.backing.buffer();
        let id = id.number();
        self.entry = wire::entry(id, self.generation, placement, &self.name, buffer);
    }

    /// The descriptors of an offer, in the order of the message.
    pub(super) fn descriptors<'p>(
        &'p self,
        buffer: &'p Buffer,
        grant: Grant,
    ) -> Result<[Option<BorrowedFd<'p>>; 2], ShareError> {
        if grant == Grant::ReadOnly
            && let Some(memory) = self.read_only(buffer)?
        {
            return Ok([Some(memory), None]);
        }
        Ok(channel::descriptors(buffer))
    }

    /// The descriptor for readers, if it differs from the writers' descriptor.
    pub(super) fn read_only(&self, buffer: &Buffer) -> Result<Option<BorrowedFd<'_>>, ShareError> {
        if let Some(memory) = self.read_only.get() {
            return Ok(Some(memory.as_fd()));
        }
        let Some(memory) = buffer.host_memory() else {
            if !buffer.is_writable() {
                return Ok(None);
            }
            // Every descriptor of a dma-buf is the same open file, with the same mode.
            let object = self.name.clone();
            let wanted = "read-only";
            return Err(BufferError::Access { object, wanted }.into());
        };
        let failed = |call| {
            let name = self.name.clone();
            move |errno| SystemError::new(call, name, errno)
        };
        // A process with a descriptor can open the file behind it again, as far as the mode
        // allows.
        rustix::fs::fchmod(memory, Mode::RUSR | Mode::WUSR).map_err(failed("fchmod"))?;
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let again = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open"))?;
        Ok(Some(self.read_only.get_or_init(|| again).as_fd()))
    }
}
