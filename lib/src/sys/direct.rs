//! `pread` and `pwrite` between a file and mapped memory.
//!
//! The wrappers in rustix and nix take slices, and mapped memory must never be one, hence the
//! raw calls. [`DirectIo`] is the one funnel for them, so that tests can put a kernel that
//! refuses or lies in its place.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

use crate::errno::Errno;
use crate::sys::memory::Window;

/// Positioned I/O between a file and a window of mapped memory, as the system calls define it.
pub(crate) trait DirectIo: Send + Sync {
    /// `pread`. Returns the bytes read, 0 at the end of the file.
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno>;
    /// `pwrite`. Returns the bytes written.
    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno>;
}

/// The kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel;

impl DirectIo for Kernel {
    fn read(&self, file: BorrowedFd<'_>, into: Window<'_>, offset: u64) -> Result<usize, Errno> {
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

    fn write(&self, file: BorrowedFd<'_>, from: Window<'_>, offset: u64) -> Result<usize, Errno> {
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
}

fn retry(mut call: impl FnMut() -> isize) -> Result<usize, Errno> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result as usize);
        }
        // Not nix's or std's enum: numbers that userspace should never see must survive.
        let errno = Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
        if errno.0 != libc::EINTR {
            return Err(errno);
        }
    }
}

/// Kernels that refuse, lie or fail, for tests of what is built on [`DirectIo`].
#[cfg(test)]
pub(crate) mod fake {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use crate::path::Direction;

    /// What happens to I/O on device memory. I/O on system memory always works.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Behaviour {
        /// It works too.
        Works,
        /// The call fails.
        Fails(Errno),
        /// The call reports success and nothing moves.
        Loses(Direction),
        /// The call reports success, and of each the first bytes, so many of them, arrive.
        Cuts(Direction, usize),
        /// Reads report success, and only those of a hole, which the CPU fills, arrive.
        LosesAllButHoles,
        /// Writes report success and write this byte, as a bus does that answers with ones.
        WritesOnly(u8),
        /// So many calls work, and those after them fail.
        FailsAfter(u32, Errno),
    }

    type AtCall = Box<dyn Fn(Direction) + Send + Sync>;

    /// What a test changes while an importer has the fake.
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
        /// Called before each call on device memory: a process that is killed in the call leaves what is there
        /// then.
        pub(crate) at_call: Setting<Option<AtCall>>,
        /// Calls on device memory so far.
        calls: AtomicU32,
    }

    impl Fake {
        pub(crate) fn new(behaviour: Behaviour) -> Fake {
            Fake {
                behaviour: Setting(Mutex::new(behaviour)),
                at_call: Setting(Mutex::new(None)),
                calls: AtomicU32::new(0),
            }
        }

        /// Calls on device memory so far.
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
                return Kernel.read(file, into, offset);
            }
            if self.behaviour.get() == Behaviour::LosesAllButHoles {
                let mut memory = crate::sys::memory::HostMemory::new(into.length())?;
                let moved = Kernel.read(file, memory.window(into.length()), offset)?;
                if memory.bytes().iter().any(|&byte| byte != 0) {
                    return Ok(moved);
                }
            }
            let call = |window| Kernel.read(file, window, offset);
            self.device_call(into, Direction::DiskToBuffer, call)
        }

        fn write(
            &self,
            file: BorrowedFd<'_>,
            from: Window<'_>,
            offset: u64,
        ) -> Result<usize, Errno> {
            if !from.is_shared() {
                return Kernel.write(file, from, offset);
            }
            if let Behaviour::WritesOnly(byte) = self.behaviour.get() {
                let mut memory = crate::sys::memory::HostMemory::new(from.length())?;
                memory.bytes_mut().fill(byte);
                return Kernel.write(file, memory.window(from.length()), offset);
            }
            let call = |window| Kernel.write(file, window, offset);
            self.device_call(from, Direction::BufferToDisk, call)
        }
    }
}
