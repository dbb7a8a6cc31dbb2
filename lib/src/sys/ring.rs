//! io_uring with the crate `io-uring`: many requests in flight from one thread (io_uring(7)).
//!
//! A ring has no request in flight outside of [`Ring::run`], so a ring can be kept for the next
//! transfer. A ring belongs to the process that made it. A forked child shares the ring's
//! memory with its parent, and leaves the ring alone.

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

/// Maximum number of bytes of one system call (`MAX_RW_COUNT` in include/linux/fs.h, for 4 KiB
/// pages).
const LARGEST: usize = 0x7fff_f000;

/// Number of queued bytes after which requests go to the kernel at once instead of with the
/// next wait. The thread may copy as many bytes for the next request, and the disk should not
/// wait for that copy. (With 1 MiB, requests of 64 KiB bunch: the disk of docs/performance.md
/// then gives 0.89 of what it gives fio, where it was 0.97.)
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
    /// A ring for `depth` requests at a time.
    ///
    /// # Errors
    /// The reason why there is none: `ENOSYS` or `EPERM` if io_uring is missing or forbidden.
    pub(crate) fn take(&self, depth: u32) -> Result<Ring, SystemError> {
        // Another thread may hold the lock, in a forked child forever.
        if let Ok(mut idle) = self.idle.try_lock()
            && let Some(ring) = idle.pop()
        {
            match ring.owner.is_current() {
                true if ring.depth >= depth => return Ok(ring),
                true => drop(ring),
                // The ring's memory is not mapped in this process, and something else may be at
                // its address.
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
/// `in_flight` is the number of requests that were pushed and whose results were not taken. It
/// is 0 outside of [`Ring::run`].
pub(crate) struct Ring {
    ring: IoUring,
    depth: u32,
    in_flight: u32,
    /// Bytes of requests that were not yet submitted to the kernel.
    unsent: usize,
    owner: Process,
}

impl Ring {
    fn new(depth: u32) -> Result<Ring, SystemError> {
        let failed = |call: &'static str| {
            move |error: std::io::Error| SystemError::new(call, "io_uring", &error)
        };
        // The kernel posts results when this thread waits for them anyway (since Linux 5.19).
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
        // A sandbox may allow the set-up of a ring and forbid its use. A request that the
        // kernel never takes would make `run` wait forever, so a no-op goes first.
        // SAFETY: the request has no memory and no file.
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

    /// Implements [`DirectIo::run`](super::direct::DirectIo::run).
    pub(crate) fn run<'w>(&mut self, depth: u32, work: &mut dyn Work<'w>) {
        let depth = depth.min(self.depth);
        // Even if the work panics, this function does not return while the kernel has memory of
        // `'w`.
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
        // `first` ensures that the length fits.
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
        // SAFETY: the window and the file live for `'w`, which outlives `run`, and `run` does
        // not return before the result was taken.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // The ring has room for all requests in flight.
        pushed.map_err(|_| Errno::BUSY)?;
        // INVARIANT: one more request was pushed.
        self.in_flight += 1;
        self.unsent += window.length();
        if self.unsent >= BATCH {
            // The next wait submits the requests that the kernel does not take now.
            let _ = self.ring.submit();
            self.unsent = 0;
        }
        Ok(())
    }

    /// Waits for a result. The caller ensures that a request is in flight.
    fn pop(&mut self) -> (u32, Result<usize, Errno>) {
        loop {
            if let Some(answer) = self.ring.completion().next() {
                // INVARIANT: one result was taken.
                self.in_flight -= 1;
                let result = usize::try_from(answer.result()).map_err(|_| Errno(-answer.result()));
                // The token of the request.
                return (answer.user_data() as u32, result);
            }
            self.unsent = 0;
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.raw_os_error() != Some(libc::EINTR)
            {
                // The kernel may lack memory for a request, for example. The requests in flight
                // still complete and free some.
                std::thread::yield_now();
            }
        }
    }
}

/// Waits for all requests in flight when it is dropped.
struct Drained<'r>(&'r mut Ring);

impl Drop for Drained<'_> {
    fn drop(&mut self) {
        while self.0.in_flight > 0 {
            let _ = self.0.pop();
        }
    }
}
