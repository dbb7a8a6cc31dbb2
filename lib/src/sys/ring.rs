//! io_uring: many requests in flight by one thread (io_uring(7)), by the crate `io-uring`.
//!
//! A ring has no request in flight while nobody runs it, so that it can be kept for the next transfer. It
//! belongs to the process that made it: a child that was forked shares its memory with the parent, and leaves
//! it alone.

use std::os::fd::AsRawFd;
use std::sync::Mutex;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::libc;
use peerbuf_core::unpoisoned;

use super::fork::Process;
use super::request::{Request, Work};
use crate::errno::Errno;
use crate::error::SystemError;
use crate::path::Direction;

/// The most bytes that one system call carries (`MAX_RW_COUNT` in include/linux/fs.h, for pages of 4 KiB).
const LARGEST: usize = 0x7fff_f000;

/// Bytes after which requests go to the kernel at once, and not with the next wait: the thread may copy as
/// much for the next one, and the disk should not wait for that.
const BATCH: usize = 256 << 10;

/// Rings that are not in use.
#[derive(Default)]
pub(crate) struct Rings {
    idle: Mutex<Vec<Ring>>,
}

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rings").finish_non_exhaustive()
    }
}

impl Rings {
    /// A ring for so many requests at a time.
    ///
    /// # Errors
    /// Why there is none: `ENOSYS` or `EPERM` where io_uring is missing or forbidden.
    pub(crate) fn take(&self, depth: u32) -> Result<Ring, SystemError> {
        // Somebody may hold the lock, in a forked child for ever.
        if let Ok(mut idle) = self.idle.try_lock()
            && let Some(ring) = idle.pop()
        {
            match ring.owner.is_current() {
                true if ring.depth >= depth => return Ok(ring),
                true => drop(ring),
                // Its memory is not mapped here, and something else may be there.
                false => std::mem::forget(ring),
            }
        }
        Ring::new(depth)
    }

    pub(crate) fn give_back(&self, ring: Ring) {
        if let Ok(mut idle) = self.idle.try_lock() {
            idle.push(ring);
        }
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        let idle = unpoisoned(self.idle.get_mut());
        for ring in idle.drain(..) {
            if !ring.owner.is_current() {
                std::mem::forget(ring);
            }
        }
    }
}

/// # Invariants
/// `in_flight` requests were pushed and their answers were not taken. It is 0 outside of [`Ring::run`].
pub(crate) struct Ring {
    ring: IoUring,
    depth: u32,
    in_flight: u32,
    /// Bytes of requests that the kernel has not been told of.
    unsent: usize,
    owner: Process,
}

impl Ring {
    fn new(depth: u32) -> Result<Ring, SystemError> {
        let failed = |call: &'static str| {
            move |error: std::io::Error| SystemError::new(call, "io_uring", &error)
        };
        // Answers are handed over when this thread waits for them anyway (since Linux 5.19).
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_coop_taskrun();
        let made = builder.build(depth);
        let mut ring = match made {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().dontfork().setup_clamp().build(depth)
            }
            made => made,
        }
        .map_err(failed("io_uring_setup"))?;
        let mut probe = Probe::new();
        let probed = ring.submitter().register_probe(&mut probe);
        probed.map_err(failed("io_uring_register(PROBE)"))?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::Write::CODE) {
            let missing = "io_uring, which has no positioned reads and writes";
            return Err(SystemError::new(
                "io_uring_register(PROBE)",
                missing,
                Errno::OPNOTSUPP,
            ));
        }
        // A sandbox may allow the set-up and forbid the use. A request that is never taken would be waited for
        // without end, so one that does nothing goes first.
        // SAFETY: it has no memory and no file.
        let pushed = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
        pushed.map_err(|_| SystemError::new("io_uring_enter", "io_uring", Errno::BUSY))?;
        while let Err(error) = ring.submit_and_wait(1) {
            if error.raw_os_error() != Some(libc::EINTR) {
                return Err(failed("io_uring_enter")(error));
            }
        }
        if ring.completion().next().is_none() {
            return Err(SystemError::new("io_uring_enter", "io_uring", Errno::IO));
        }
        let depth = ring.params().sq_entries();
        // INVARIANT: nothing is in flight.
        Ok(Ring {
            ring,
            depth,
            in_flight: 0,
            unsent: 0,
            owner: Process::current(),
        })
    }

    /// As [`DirectIo::run`](super::direct::DirectIo::run).
    pub(crate) fn run<'w>(&mut self, depth: u32, work: &mut dyn Work<'w>) {
        let depth = depth.min(self.depth);
        // Also when the work panics nothing returns while the kernel has memory of `'w`.
        let drained = Drained(self);
        let ring = &mut *drained.0;
        loop {
            while ring.in_flight < depth {
                let Some(request) = work.next() else { break };
                if let Err(errno) = ring.push(&request) {
                    work.done(request.token, Err(errno));
                }
            }
            if ring.in_flight == 0 {
                return;
            }
            let (token, result) = ring.pop();
            work.done(token, result);
        }
    }

    fn push(&mut self, request: &Request<'_>) -> Result<(), Errno> {
        let window = request.window.first(LARGEST);
        if request.direction == Direction::DiskToBuffer && !window.is_writable() {
            return Err(Errno::FAULT);
        }
        let file = types::Fd(request.file.as_raw_fd());
        // `first` has seen to it that it fits.
        let length = window.length() as u32;
        let entry = match request.direction {
            Direction::DiskToBuffer => opcode::Read::new(file, window.address(), length)
                .offset(request.offset)
                .build(),
            Direction::BufferToDisk => opcode::Write::new(file, window.address(), length)
                .offset(request.offset)
                .build(),
        };
        let entry: squeue::Entry = entry.user_data(u64::from(request.token));
        // SAFETY: the window and the file live for `'w`, which outlives `run`, and `run` does not return
        // before the answer was taken.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // No more are in flight than the ring has room for.
        pushed.map_err(|_| Errno::BUSY)?;
        // INVARIANT: one more was pushed.
        self.in_flight += 1;
        self.unsent += window.length();
        if self.unsent >= BATCH {
            // What the kernel does not take now goes with the next wait.
            let _ = self.ring.submit();
            self.unsent = 0;
        }
        Ok(())
    }

    /// Waits for an answer; there is a request in flight.
    fn pop(&mut self) -> (u32, Result<usize, Errno>) {
        loop {
            if let Some(answer) = self.ring.completion().next() {
                // INVARIANT: the answer of one was taken.
                self.in_flight -= 1;
                let result = usize::try_from(answer.result()).map_err(|_| Errno(-answer.result()));
                // The token that was given.
                return (answer.user_data() as u32, result);
            }
            self.unsent = 0;
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.raw_os_error() != Some(libc::EINTR)
            {
                // No memory for a request, say. What is in flight is answered all the same, and then there
                // is room.
                std::thread::yield_now();
            }
        }
    }
}

/// Waits for all that is in flight when it is dropped.
struct Drained<'r>(&'r mut Ring);

impl Drop for Drained<'_> {
    fn drop(&mut self) {
        while self.0.in_flight > 0 {
            let _ = self.0.pop();
        }
    }
}
