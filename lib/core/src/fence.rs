//! Fences: signalled when a device has done the work queued on a buffer.
//!
//! A dma-buf carries the fences of the work queued on it. [`DmaBuf::wait`] waits for them.
//! [`DmaBuf::export_sync_file`] exports them as a file descriptor, which may be passed to another process or
//! driver, and [`DmaBuf::import_sync_file`] adds such a descriptor's fences to a dma-buf. See
//! <https://docs.kernel.org/driver-api/sync_file.html>.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::access::Access;
use crate::dmabuf::DmaBuf;
use crate::errno::Errno;
use crate::error::{BufferError, SystemError};
use crate::sys;
use crate::sys::dmabuf::{SYNC_END, SYNC_READ, SYNC_WRITE};

/// A sync file: a snapshot of fences, as a file descriptor. Work queued later does not count.
#[derive(Debug)]
#[doc(alias = "sync_file")]
#[doc(alias = "dma_fence")]
pub struct SyncFile {
    fd: OwnedFd,
}

/// The state of the work behind a [`SyncFile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FenceState {
    /// Some work is not done.
    Pending,
    /// All work is done.
    Done,
    /// All work has ended, and some has failed.
    Failed(Errno),
}

impl SyncFile {
    /// Takes a file descriptor, after a check that it is a sync file (`SYNC_IOC_FILE_INFO`).
    ///
    /// # Errors [`BufferError::System`] with `ENOTTY` or `EINVAL` if it is not a sync file. The descriptor is
    /// then closed.
    pub fn from_fd(fd: OwnedFd) -> Result<SyncFile, BufferError> {
        let file = SyncFile { fd };
        file.state()?;
        Ok(file)
    }

    /// The state of the work.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn state(&self) -> Result<FenceState, BufferError> {
        Ok(match self.info()?.status {
            0 => FenceState::Pending,
            1.. => FenceState::Done,
            errno => FenceState::Failed(Errno(errno.saturating_neg())),
        })
    }

    /// The number of fences that were pending when the sync file was made. For an idle buffer it is 1,
    /// because the kernel then makes a signalled fence.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn fences(&self) -> Result<u32, BufferError> {
        Ok(self.info()?.num_fences)
    }

    fn info(&self) -> Result<sys::sync_file::SyncFileInfo, BufferError> {
        let failed = |errno| SystemError::new("ioctl(SYNC_IOC_FILE_INFO)", "a sync file", errno);
        Ok(sys::sync_file::info(self.fd.as_fd()).map_err(failed)?)
    }

    /// Waits until the work has ended, at most `limit`. The work may have failed; [`SyncFile::state`] tells.
    ///
    /// # Errors
    /// [`BufferError::TimedOut`], or the call that failed.
    pub fn wait(&self, limit: Duration) -> Result<(), BufferError> {
        wait(
            self.fd.as_fd(),
            PollFlags::IN,
            limit,
            "the fences of a sync file",
        )
    }
}

impl AsFd for SyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<SyncFile> for OwnedFd {
    fn from(file: SyncFile) -> OwnedFd {
        file.fd
    }
}

impl TryFrom<OwnedFd> for SyncFile {
    type Error = BufferError;

    fn try_from(fd: OwnedFd) -> Result<SyncFile, BufferError> {
        SyncFile::from_fd(fd)
    }
}

impl DmaBuf {
    /// Waits for the work queued on the buffer, at most `limit`: with [`Access::Read`] for writers, otherwise
    /// for all. [`Mapping::begin_cpu_access`](crate::Mapping::begin_cpu_access) waits for the same work
    /// without a limit.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use peerbuf_core::{Access, Buffer, error::BufferError};
    /// # fn read(buffer: &Buffer) -> Result<(), BufferError> {
    /// let mut mapping = buffer.whole().map(Access::Read)?;
    /// if let Some(dmabuf) = buffer.dmabuf() {
    ///     dmabuf.wait(Access::Read, Duration::from_millis(100))?;
    /// }
    /// let first: u32 = mapping.begin_cpu_access(Access::Read)?.read(0)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`BufferError::TimedOut`], or the call that failed.
    pub fn wait(&self, access: Access, limit: Duration) -> Result<(), BufferError> {
        let events = if access.writes() {
            PollFlags::OUT
        } else {
            PollFlags::IN
        };
        wait(self.as_fd(), events, limit, "the fences of a dma-buf")
    }

    /// For the processor's writes by somebody who did not announce them to the exporter: has the exporter send on
    /// their way what is not there yet. The writes are over. A writer that still is at work is waited for, no
    /// longer than `limit`.
    #[doc(hidden)]
    pub fn settle(&self, limit: Duration) -> Result<(), BufferError> {
        self.wait(Access::Read, limit)?;
        let failed = |errno| SystemError::new("ioctl(DMA_BUF_IOCTL_SYNC)", "a dma-buf", errno);
        // To read, since that waits for no readers; udmabuf and others want a beginning before an end.
        sys::dmabuf::sync(self.as_fd(), SYNC_READ).map_err(failed)?;
        let end = SYNC_END | SYNC_READ | SYNC_WRITE;
        Ok(sys::dmabuf::sync(self.as_fd(), end).map_err(failed)?)
    }

    /// Exports the fences that work with `access` must wait for (`DMA_BUF_IOCTL_EXPORT_SYNC_FILE`, since
    /// Linux 6.0): for [`Access::Read`] those of writers, otherwise all.
    ///
    /// # Errors
    /// The ioctl's error: `ENOTTY` on an older kernel, `EMFILE`.
    #[doc(alias = "DMA_BUF_IOCTL_EXPORT_SYNC_FILE")]
    pub fn export_sync_file(&self, access: Access) -> Result<SyncFile, BufferError> {
        let call = "ioctl(DMA_BUF_IOCTL_EXPORT_SYNC_FILE)";
        let failed = |errno| SystemError::new(call, "a dma-buf", errno);
        let fd = sys::dmabuf::export_sync_file(self.as_fd(), flags_of(access)).map_err(failed)?;
        Ok(SyncFile { fd })
    }

    /// Adds the fences of work that uses the buffer with `access` (`DMA_BUF_IOCTL_IMPORT_SYNC_FILE`, since
    /// Linux 6.0). Later writers wait for fences added with [`Access::Read`]; all later users wait for
    /// others.
    ///
    /// # Errors
    /// The ioctl's error.
    #[doc(alias = "DMA_BUF_IOCTL_IMPORT_SYNC_FILE")]
    pub fn import_sync_file(&self, fences: &SyncFile, access: Access) -> Result<(), BufferError> {
        let call = "ioctl(DMA_BUF_IOCTL_IMPORT_SYNC_FILE)";
        let failed = |errno| SystemError::new(call, "a dma-buf", errno);
        sys::dmabuf::import_sync_file(self.as_fd(), fences.as_fd(), flags_of(access))
            .map_err(failed)?;
        Ok(())
    }
}

pub(crate) fn flags_of(access: Access) -> u64 {
    match access {
        Access::Read => SYNC_READ,
        Access::Write => SYNC_WRITE,
        Access::ReadWrite => SYNC_READ | SYNC_WRITE,
    }
}

fn wait(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    limit: Duration,
    object: &'static str,
) -> Result<(), BufferError> {
    let begun = Instant::now();
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        // A limit that `Timespec` cannot hold means no timeout.
        let timeout = Timespec::try_from(left).ok();
        let mut waiting = [PollFd::from_borrowed_fd(fd, events)];
        match rustix::event::poll(&mut waiting, timeout.as_ref()) {
            Ok(0) => {
                let object = object.into();
                return Err(BufferError::TimedOut { object, limit });
            }
            Ok(_) => {
                let came = waiting[0].revents();
                if came.intersects(PollFlags::ERR | PollFlags::NVAL) && !came.intersects(events) {
                    return Err(SystemError::new("poll", object, Errno::IO).into());
                }
                return Ok(());
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(SystemError::new("poll", object, errno).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn what_is_no_sync_file_is_refused() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let refused = SyncFile::from_fd(reader.into()).unwrap_err();
        assert!(
            refused.to_string().contains("SYNC_IOC_FILE_INFO"),
            "{refused}"
        );
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn waiting_ends_at_its_limit() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let limit = Duration::from_millis(20);
        let begun = Instant::now();
        let error = wait(reader.as_fd(), PollFlags::IN, limit, "a pipe").unwrap_err();
        assert!(begun.elapsed() >= limit);
        assert_eq!(error.to_string(), "timed out after 20ms waiting for a pipe");
    }
}
