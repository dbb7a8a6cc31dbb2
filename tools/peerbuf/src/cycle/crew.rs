//! The workers' processes: the first process starts, stops, kills, reads and reaps them.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use peerbuf::error::ShareError;
use peerbuf::export::memfd;
use peerbuf::share::{Channel, SubscriberId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::board::{self, Board};
use super::schedule::Fault;
use super::worker::{MAX_MESSAGE, Orders, Report};
use crate::Failure;

/// A worker's process.
pub struct Process {
    pub slot: usize,
    pub subscriber: SubscriberId,
    child: Child,
    /// Identifies the process even after the kernel has reused its process id.
    handle: Arc<OwnedFd>,
    control: Channel,
    /// True if the process was stopped at least once, so that it may be late.
    pub stopped: bool,
    /// True if the process was cut off alive, so the kernel may have revoked a buffer in use.
    pub cut_off: bool,
    pub joined: bool,
}

/// The parts of a new process.
pub struct Started {
    pub child: Child,
    pub control: Channel,
    pub board: Board,
}

/// Starts a worker. `theirs` is the worker's end of the connection to the publisher.
pub fn start(theirs: Channel, orders: &Orders) -> Result<Started, Failure> {
    let (control, their_control) = Channel::pair()?;
    let memory = memfd::export("board", board::size(orders.buffers))?;
    control.send_message(&serde_json::to_vec(orders)?, &[])?;
    control.send_buffer(&memory.whole())?;
    let child = Command::new(std::env::current_exe()?)
        .arg("cycle-worker")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(OwnedFd::from(their_control)))
        // A Ctrl-C at the terminal is for the first process alone.
        .process_group(0)
        .spawn()?;
    Ok(Started {
        child,
        control,
        board: Board::open(&memory)?,
    })
}

impl Process {
    pub fn new(
        slot: usize,
        subscriber: SubscriberId,
        child: Child,
        control: Channel,
    ) -> Result<Process, Failure> {
        let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Process {
            slot,
            subscriber,
            child,
            handle: Arc::new(handle),
            control,
            stopped: false,
            cut_off: false,
            joined: false,
        })
    }

    /// Kills or stops the process after the fault's delay, and continues a stopped one after
    /// its time.
    pub fn strike(&mut self, fault: Fault) -> JoinHandle<()> {
        self.stopped |= fault.stopped_for.is_some();
        let handle = Arc::clone(&self.handle);
        std::thread::spawn(move || {
            // The process may have ended by then.
            let send = |signal| {
                let _ = pidfd_send_signal(&*handle, signal);
            };
            std::thread::sleep(fault.after);
            match fault.stopped_for {
                None => send(Signal::KILL),
                Some(time) => {
                    send(Signal::STOP);
                    std::thread::sleep(time);
                    send(Signal::CONT);
                }
            }
        })
    }

    /// Takes the reports that have arrived.
    pub fn reports(&self) -> Result<VecDeque<Report>, Failure> {
        let mut reports = VecDeque::new();
        loop {
            let mut waiting = [PollFd::new(&self.control, PollFlags::IN)];
            let now = Timespec::default();
            match poll(&mut waiting, Some(&now)) {
                Ok(0) => return Ok(reports),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
                Ok(_) => {}
            }
            match self.control.receive_message(MAX_MESSAGE) {
                Ok((message, _)) => reports.push_back(serde_json::from_slice(&message)?),
                Err(ShareError::PeerGone) => return Ok(reports),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The exit status, if the process has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, Failure> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for the process to end, and kills it after `limit`.
    pub fn end(&mut self, limit: Duration) -> Result<ExitStatus, Failure> {
        let timeout = Timespec::try_from(limit)?;
        let begun = Instant::now();
        loop {
            // The pidfd is readable when the process has ended.
            let mut waiting = [PollFd::from_borrowed_fd(self.handle.as_fd(), PollFlags::IN)];
            match poll(&mut waiting, Some(&timeout)) {
                Ok(0) => break,
                Err(rustix::io::Errno::INTR) if begun.elapsed() < limit => {}
                _ => return Ok(self.child.wait()?),
            }
        }
        self.child.kill()?;
        Ok(self.child.wait()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// True for a process that followed its orders, or that the first process killed. After a cut-off, a process's
/// access to a revoked buffer may also end it by SIGBUS.
pub fn is_orderly(status: ExitStatus, cut_off: bool) -> bool {
    let ended_by = |signal: Signal| status.signal() == Some(signal.as_raw());
    status.success() || ended_by(Signal::KILL) || cut_off && ended_by(Signal::BUS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_was_cut_off_may_end_by_a_revoked_buffer() {
        let by = |signal: Signal| ExitStatus::from_raw(signal.as_raw());
        assert!(is_orderly(ExitStatus::from_raw(0), false));
        assert!(is_orderly(by(Signal::KILL), false));
        assert!(is_orderly(by(Signal::BUS), true));
        assert!(!is_orderly(by(Signal::BUS), false));
        assert!(!is_orderly(by(Signal::SEGV), true));
        assert!(!is_orderly(ExitStatus::from_raw(1 << 8), true));
    }
}
