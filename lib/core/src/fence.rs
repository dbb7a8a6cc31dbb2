//! Fences: how a device says that it is not done with a buffer yet.
//!
//! A dma-buf carries the fences of work that was queued on it. [`DmaBuf::wait`] waits for them,
//! [`DmaBuf::export_sync_file`] takes them out as a descriptor of their own, which may go to
//! another process or driver, and [`DmaBuf::import_sync_file`] puts such a descriptor's fences in.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::access::Access;
use crate::dmabuf::DmaBuf;
use crate::errno::Errno;
use crate::error::{BufferError, SystemError};
use crate::sys;
use crate::sys::dmabuf::{SYNC_READ, SYNC_WRITE};

/// Fences as a descriptor: what was queued at one moment, whatever is queued later.
#[derive(Debug)]
#[doc(alias = "sync_file")]
#[doc(alias = "dma_fence")]
pub struct SyncFile {
    fd: OwnedFd,
}

/// How far the work behind a [`SyncFile`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FenceState {
    /// Some of it is not done.
    Pending,
    /// All of it is done.
    Done,
    /// It ended, and at least one part failed.
    Failed(Errno),
}

impl SyncFile {
    /// Takes a descriptor, after a look at what it is (`SYNC_IOC_FILE_INFO`).
    ///
    /// # Errors
    /// [`BufferError::System`], with `ENOTTY` or `EINVAL` for what is no sync file. The
    /// descriptor is closed then.
    pub fn from_fd(fd: OwnedFd) -> Result<SyncFile, BufferError> {
        let file = SyncFile { fd };
        file.state()?;
        Ok(file)
    }

    /// How far the work is.
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

    /// How many fences it holds that were not done when it was made. Of a buffer that nobody
    /// works on this is 1 all the same: the kernel then makes a fence that is done.
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

    /// Waits until the work has ended, but no longer than `limit`. It may have ended badly:
    /// [`SyncFile::state`] says.
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
    /// Waits until devices have done what was queued on the buffer, but no longer than `limit`:
    /// for [`Access::Read`] those that write it, otherwise all. Beginning CPU access waits for
    /// the same without a limit.
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

    /// Takes out the fences that work with `access` has to wait for
    /// (`DMA_BUF_IOCTL_EXPORT_SYNC_FILE`, since Linux 6.0): for [`Access::Read`] those of
    /// writers, otherwise all.
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

    /// Puts in the fences of work that uses the buffer with `access`
    /// (`DMA_BUF_IOCTL_IMPORT_SYNC_FILE`, since Linux 6.0). For [`Access::Read`] later writers
    /// wait for them, otherwise all.
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
        // A limit beyond what the kernel can count is none.
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
        assert_eq!(error.to_string(), "a pipe: nothing happened within 20ms");
    }
}
