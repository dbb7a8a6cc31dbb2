//! I/O between a file and mapped memory, many requests at a time.
//!
//! A disk reaches its full speed only with many requests in flight, and mapped memory must stay
//! mapped while the kernel has a request for it. No caller therefore owns a queue:
//! [`DirectIo::run`] asks a [`Work`] for requests, passes the results back, and returns when no
//! request is in flight. A [`Request`] borrows its memory and its file for longer than the
//! call, so both outlive the request by construction.
//!
//! The kernel takes requests by io_uring (`ring.rs`). If io_uring is missing or forbidden,
//! threads make one system call at a time each. All I/O goes through [`DirectIo`], so that
//! tests can replace the kernel by one that refuses or lies. The wrappers in rustix and nix
//! take slices, and mapped memory must never be a slice, hence the raw calls.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;

use nix::libc;
use peerbuf_core::unpoisoned;

use crate::errno::Errno;
use crate::error::SystemError;
use crate::path::Direction;
use crate::queue::Queue;
use crate::sys::memory::Window;

pub(crate) use super::request::{Request, Work};

/// Positioned I/O between a file and a window of mapped memory, as the system calls define it.
pub(crate) trait DirectIo: Send + Sync {
    /// `pread`. Returns the bytes read, 0 at the end of the file.
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno>;

    /// `pwrite`. Returns the bytes written.
    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno>;

    /// Carries out one request.
    fn one(&self, request: &Request<'_>) -> Result<usize, Errno> {
        match request.direction {
            Direction::DiskToBuffer => self.read(request.file, request.window, request.offset),
            Direction::BufferToDisk => self.write(request.file, request.window, request.offset),
        }
    }

    /// Carries out all requests of `work`, up to `depth` at a time and in any order. Returns
    /// the kind of queue that it used.
    fn run<'w>(&self, _depth: u32, work: &mut dyn Work<'w>) -> Queue {
        while let Some(request) = work.next() {
            let result = self.one(&request);
            work.done(request.token, result);
        }
        Queue::Calls
    }
}

#[cfg(feature = "io-uring")]
use super::ring::Rings;

/// A build without io_uring.
#[cfg(not(feature = "io-uring"))]
#[derive(Debug, Default)]
struct Rings;

/// The real kernel.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    rings: Rings,
}

impl Kernel {
    #[cfg(feature = "io-uring")]
    fn queue<'w>(&self, depth: u32, work: &mut dyn Work<'w>) -> Queue {
        match self.rings.take(depth) {
            Ok(mut ring) => {
                ring.run(depth, work);
                self.rings.give_back(ring);
                Queue::IoUring
            }
            Err(why) => threads(depth, work, why),
        }
    }

    #[cfg(not(feature = "io-uring"))]
    fn queue<'w>(&self, depth: u32, work: &mut dyn Work<'w>) -> Queue {
        let Rings = self.rings;
        let why = SystemError::new(
            "io_uring_setup",
            "a build without io-uring",
            Errno::OPNOTSUPP,
        );
        threads(depth, work, why)
    }
}

impl DirectIo for Kernel {
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno> {
        pread(file, into, offset)
    }

    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno> {
        pwrite(file, from, offset)
    }

    fn run<'w>(&self, depth: u32, work: &mut dyn Work<'w>) -> Queue {
        while let Some(first) = work.next() {
            let second = (depth > 1).then(|| work.next()).flatten();
            let Some(second) = second else {
                // A single request is a plain system call, which costs less than a queue.
                work.done(first.token, call(&first));
                continue;
            };
            let mut work = Resumed {
                taken: [Some(second), Some(first)],
                work,
            };
            return self.queue(depth, &mut work);
        }
        Queue::Calls
    }
}

/// A work whose first two requests were already taken; `taken` has the later one first.
struct Resumed<'a, 'w> {
    taken: [Option<Request<'w>>; 2],
    work: &'a mut dyn Work<'w>,
}

impl<'w> Work<'w> for Resumed<'_, 'w> {
    fn next(&mut self) -> Option<Request<'w>> {
        let [second, first] = &mut self.taken;
        first
            .take()
            .or_else(|| second.take())
            .or_else(|| self.work.next())
    }

    fn done(&mut self, token: u32, result: Result<usize, Errno>) {
        self.work.done(token, result);
    }
}

/// Maximum number of threads that replace io_uring. Each has one request in flight.
const THREADS: usize = 16;

/// The state that the threads share with the thread that runs the work.
#[derive(Default)]
struct Board<'w> {
    state: Mutex<State<'w>>,
    posted: Condvar,
    answered: Condvar,
}

#[derive(Default)]
struct State<'w> {
    requests: VecDeque<Request<'w>>,
    answers: VecDeque<(u32, Result<usize, Errno>)>,
    closed: bool,
}

impl<'w> Board<'w> {
    /// No thread panics with the lock held.
    fn lock(&self) -> MutexGuard<'_, State<'w>> {
        unpoisoned(self.state.lock())
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(request) = state.requests.pop_front() {
                drop(state);
                let result = call(&request);
                state = self.lock();
                state.answers.push_back((request.token, result));
                self.answered.notify_one();
            } else if state.closed {
                return;
            } else {
                state = unpoisoned(self.posted.wait(state));
            }
        }
    }
}

/// Ends the threads on drop, even if the work panics, because the scope waits for them.
struct Close<'b, 'w>(&'b Board<'w>);

impl Drop for Close<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.posted.notify_all();
    }
}

/// Runs the work with threads, which it starts as requests come.
pub(crate) fn threads<'w>(depth: u32, work: &mut dyn Work<'w>, why: SystemError) -> Queue {
    let most = (depth as usize).min(THREADS);
    let board = Board::default();
    {
        let mut state = board.lock();
        state.requests.reserve(most);
        state.answers.reserve(most);
    }
    thread::scope(|scope| {
        let _close = Close(&board);
        let (mut started, mut in_flight) = (0, 0);
        loop {
            while in_flight < most {
                let Some(request) = work.next() else { break };
                if started <= in_flight {
                    let thread = thread::Builder::new()
                        .name("peerbuf-io".into())
                        .stack_size(64 << 10);
                    match thread.spawn_scoped(scope, || board.work()) {
                        Ok(_) => started += 1,
                        // The system starts no more threads. A running thread takes the
                        // request, or this thread does.
                        Err(_) if started == 0 => {
                            work.done(request.token, call(&request));
                            continue;
                        }
                        Err(_) => {}
                    }
                }
                board.lock().requests.push_back(request);
                board.posted.notify_one();
                in_flight += 1;
            }
            if in_flight == 0 {
                return;
            }
            let mut state = board.lock();
            let answer = loop {
                match state.answers.pop_front() {
                    Some(answer) => break answer,
                    None => {
                        let woken = board.answered.wait(state);
                        state = unpoisoned(woken);
                    }
                }
            };
            drop(state);
            in_flight -= 1;
            work.done(answer.0, answer.1);
        }
    });
    Queue::Threads { why }
}

fn call(request: &Request<'_>) -> Result<usize, Errno> {
    match request.direction {
        Direction::DiskToBuffer => pread(request.file, request.window, request.offset),
        Direction::BufferToDisk => pwrite(request.file, request.window, request.offset),
    }
}

fn pread(file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno> {
    if !into.is_writable() {
        return Err(Errno::FAULT);
    }
    let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::INVAL)?;
    retry(|| {
        // SAFETY: the window's bytes are mapped, writable and not referenced (invariant).
        unsafe {
            libc::pread64(
                file.as_raw_fd(),
                into.address().cast(),
                into.length(),
                offset,
            )
        }
    })
}

fn pwrite(file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::INVAL)?;
    retry(|| {
        // SAFETY: the window's bytes are mapped (invariant), and the kernel only reads them.
        unsafe {
            libc::pwrite64(
                file.as_raw_fd(),
                from.address().cast(),
                from.length(),
                offset,
            )
        }
    })
}

fn retry(mut call: impl FnMut() -> isize) -> Result<usize, Errno> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result as usize);
        }
        // Not nix's or std's enum: error numbers that userspace should never see must survive.
        let errno = Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
        if errno.0 != libc::EINTR {
            return Err(errno);
        }
    }
}

/// Kernels that refuse, lie or fail, for tests of the users of [`DirectIo`].
#[cfg(test)]
pub(crate) mod fake {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use crate::path::Direction;

    /// The result of I/O on device memory. I/O on system memory always works.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Behaviour {
        /// It works too.
        Works,
        /// The call fails.
        Fails(Errno),
        /// The call reports success and nothing moves.
        Loses(Direction),
        /// The call reports success, and only this many first bytes of each request arrive.
        Cuts(Direction, usize),
        /// Reads report success, and only bytes of a hole arrive, which the CPU fills.
        LosesAllButHoles,
        /// Writes report success and write this byte, like a bus that answers with ones.
        WritesOnly(u8),
        /// Writes report success and write the bytes of the first one again, like a stale cache.
        WritesTheFirst,
        /// This many calls work, and later ones fail.
        FailsAfter(u32, Errno),
    }

    type AtCall = Box<dyn Fn(Direction) + Send + Sync>;

    /// A value that a test changes while an importer uses the fake.
    pub(crate) struct Setting<T>(Mutex<T>);

    impl<T: Copy> Setting<T> {
        pub(crate) fn get(&self) -> T {
            *self.0.lock().unwrap()
        }
    }

    impl<T> Setting<T> {
        pub(crate) fn set(&self, value: T) {
            *self.0.lock().unwrap() = value;
        }
    }

    pub(crate) struct Fake {
        /// May change between calls, as a machine does.
        pub(crate) behaviour: Setting<Behaviour>,
        /// Called before each call on device memory, so that a test sees the state that a
        /// process killed in the call would leave.
        pub(crate) at_call: Setting<Option<AtCall>>,
        /// Number of calls on device memory so far.
        calls: AtomicU32,
        /// The bytes of the first write, for [`Behaviour::WritesTheFirst`].
        first: Mutex<Vec<u8>>,
    }

    impl Fake {
        pub(crate) fn new(behaviour: Behaviour) -> Fake {
            Fake {
                behaviour: Setting(Mutex::new(behaviour)),
                at_call: Setting(Mutex::new(None)),
                calls: AtomicU32::new(0),
                first: Mutex::default(),
            }
        }

        /// Number of calls on device memory so far.
        pub(crate) fn calls(&self) -> u32 {
            self.calls.load(Ordering::Relaxed)
        }

        fn device_call<'w>(
            &self,
            window: Window<'w>,
            direction: Direction,
            call: impl Fn(Window<'w>) -> Result<usize, Errno>,
        ) -> Result<usize, Errno> {
            if let Some(at_call) = &*self.at_call.0.lock().unwrap() {
                at_call(direction);
            }
            let calls = self.calls.fetch_add(1, Ordering::Relaxed);
            match self.behaviour.get() {
                Behaviour::Fails(errno) => Err(errno),
                Behaviour::FailsAfter(works, errno) if calls >= works => Err(errno),
                Behaviour::Loses(lost) if lost == direction => Ok(window.length()),
                Behaviour::Cuts(cut, kept) if cut == direction => {
                    call(window.first(kept))?;
                    Ok(window.length())
                }
                _ => call(window),
            }
        }
    }

    impl DirectIo for Fake {
        fn read(
            &self,
            file: BorrowedFd<'_>,
            into: Window<'_>,
            offset: u64,
        ) -> Result<usize, Errno> {
            if !into.is_shared() {
                return pread(file, into, offset);
            }
            if self.behaviour.get() == Behaviour::LosesAllButHoles {
                let mut memory = crate::sys::memory::HostMemory::new(into.length())?;
                let moved = pread(file, memory.window(into.length()), offset)?;
                if memory.bytes().iter().any(|&byte| byte != 0) {
                    return Ok(moved);
                }
            }
            let call = |window| pread(file, window, offset);
            self.device_call(into, Direction::DiskToBuffer, call)
        }

        fn write(
            &self,
            file: BorrowedFd<'_>,
            from: Window<'_>,
            offset: u64,
        ) -> Result<usize, Errno> {
            if !from.is_shared() {
                return pwrite(file, from, offset);
            }
            if let Behaviour::WritesOnly(byte) = self.behaviour.get() {
                let mut memory = crate::sys::memory::HostMemory::new(from.length())?;
                memory.bytes_mut().fill(byte);
                return pwrite(file, memory.window(from.length()), offset);
            }
            if self.behaviour.get() == Behaviour::WritesTheFirst {
                let mut first = self.first.lock().unwrap();
                if first.len() != from.length() {
                    first.resize(from.length(), 0);
                    from.copy_out(&mut first);
                }
                let mut memory = crate::sys::memory::HostMemory::new(from.length())?;
                memory.bytes_mut().copy_from_slice(&first);
                return pwrite(file, memory.window(from.length()), offset);
            }
            let call = |window| pwrite(file, window, offset);
            self.device_call(from, Direction::BufferToDisk, call)
        }
    }
}
