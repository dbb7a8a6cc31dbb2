//! `/dev/peerbuf/<BDF>` by its ioctls alone, without the crate, so that a test can send what the
//! crate would never send.

use std::ffi::c_void;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use bytemuck::Zeroable;
use peerbuf_uapi as abi;

/// Calls `ioctl` with a raw number and address.
///
/// # Errors
///
/// What the kernel answers.
pub fn ioctl(fd: BorrowedFd<'_>, number: u32, address: usize) -> io::Result<i32> {
    // SAFETY: The numbers used here are those of peerbuf.ko and dma-buf, whose
    // kernel side checks each user address; callers pass that of a struct of the size in question,
    // or one that is meant to be refused.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(number), address) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

/// The errno of a failed call, or 0 if it did not fail.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(e) => e.raw_os_error().expect("an errno"),
    }
}

/// An open node.
pub struct Node {
    /// The open file.
    pub file: File,
    /// The PCI address.
    pub bdf: String,
}

impl Node {
    /// Opens `/dev/peerbuf/<bdf>`.
    ///
    /// # Errors
    ///
    /// What `open` answers.
    pub fn open(bdf: &str) -> io::Result<Self> {
        let path = Path::new("/dev/peerbuf").join(bdf);
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let bdf = bdf.to_owned();
        Ok(Self { file, bdf })
    }

    /// Every node there is, the one with the largest BAR first.
    pub fn all() -> Vec<Self> {
        let entries = fs::read_dir("/dev/peerbuf").expect("/dev/peerbuf");
        let mut nodes: Vec<Self> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "importer")
            .map(|bdf| Self::open(&bdf).unwrap())
            .collect();
        nodes.sort_by_key(|node| std::cmp::Reverse(node.query().unwrap().bars[2].size));
        nodes
    }

    /// The node of the device with the largest BAR.
    pub fn largest() -> Self {
        Self::all().remove(0)
    }

    /// The ioctl with a struct, whatever is in it.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn call<T: bytemuck::Pod>(&self, number: u32, argument: &mut T) -> io::Result<i32> {
        use std::os::fd::AsFd;
        ioctl(
            self.file.as_fd(),
            number,
            std::ptr::from_mut(argument).addr(),
        )
    }

    /// [`abi::IOC_QUERY`].
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn query(&self) -> io::Result<abi::Query> {
        let mut query = abi::Query {
            size: size_of::<abi::Query>() as u32,
            ..Zeroable::zeroed()
        };
        self.call(abi::IOC_QUERY, &mut query)?;
        Ok(query)
    }

    /// BAR 2, the device memory of the lab's devices.
    pub fn bar2(&self) -> abi::Bar {
        self.query().expect("IOC_QUERY").bars[2]
    }

    /// A request for `length` bytes of BAR 2, at `offset` or anywhere.
    pub fn request(offset: Option<u64>, length: u64) -> abi::Export {
        abi::Export {
            size: size_of::<abi::Export>() as u32,
            flags: if offset.is_none() {
                abi::EXPORT_ANY_OFFSET
            } else {
                0
            },
            bar: 2,
            fd_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
            offset: offset.unwrap_or(0),
            length,
            ..Zeroable::zeroed()
        }
    }

    /// [`abi::IOC_EXPORT`] of a request; the dma-buf and where it begins in the BAR.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn export_request(&self, mut request: abi::Export) -> io::Result<(OwnedFd, u64)> {
        self.call(abi::IOC_EXPORT, &mut request)?;
        // SAFETY: The ioctl has just made this descriptor, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(request.fd) };
        Ok((fd, request.offset))
    }

    /// Exports `length` bytes of BAR 2, at `offset` or anywhere.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn export(&self, offset: Option<u64>, length: u64) -> io::Result<(OwnedFd, u64)> {
        self.export_request(Self::request(offset, length))
    }

    /// Takes the device from the driver. Returns when the driver has let go.
    pub fn unbind(bdf: &str) {
        fs::write("/sys/bus/pci/drivers/peerbuf/unbind", bdf).expect("unbind");
    }

    /// Gives the device to the driver again.
    pub fn bind(bdf: &str) {
        fs::write("/sys/bus/pci/drivers/peerbuf/bind", bdf).expect("bind");
    }
}

/// The PCI address of the NVMe disk.
pub fn nvme_bdf() -> String {
    let device: PathBuf = fs::canonicalize("/sys/class/nvme/nvme0/device").expect("an NVMe disk");
    device.file_name().unwrap().to_str().unwrap().to_owned()
}

/// A shared mapping of a dma-buf or memfd, read and written one word at a time.
pub struct Map {
    base: *mut u64,
    /// Bytes.
    pub len: usize,
}

// SAFETY: The memory is accessed by volatile words only; a test that shares it between threads
// does not rely on what they read of each other.
unsafe impl Send for Map {}
// SAFETY: As above.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `len` bytes, with `PROT_WRITE` or without.
    ///
    /// # Errors
    ///
    /// What `mmap` answers.
    pub fn new(fd: BorrowedFd<'_>, len: usize, write: bool) -> io::Result<Self> {
        Self::with(fd, len, 0, write, libc::MAP_SHARED)
    }

    /// Maps `len` bytes from `offset`, with these `MAP_*` flags.
    ///
    /// # Errors
    ///
    /// What `mmap` answers.
    pub fn with(
        fd: BorrowedFd<'_>,
        len: usize,
        offset: i64,
        write: bool,
        flags: i32,
    ) -> io::Result<Self> {
        let prot = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        // SAFETY: A new mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                prot,
                flags,
                fd.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = base.cast();
        Ok(Self { base, len })
    }

    /// Where it is mapped, for system calls.
    pub fn as_ptr(&self) -> *mut c_void {
        self.base.cast()
    }

    /// Reads the word at byte `at`, a multiple of 8.
    pub fn read(&self, at: usize) -> u64 {
        assert!(at + 8 <= self.len && at.is_multiple_of(8));
        // SAFETY: In the mapping and aligned, by the check; a fault is the test's business.
        unsafe { self.base.add(at / 8).read_volatile() }
    }

    /// Writes the word at byte `at`, a multiple of 8.
    pub fn write(&self, at: usize, word: u64) {
        assert!(at + 8 <= self.len && at.is_multiple_of(8));
        // SAFETY: As in `read`.
        unsafe { self.base.add(at / 8).write_volatile(word) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: It was mapped by `with` and is not used any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Runs `work` in a child process and returns how it ended: `Ok(status)`, or `Err(signal)`.
///
/// The child shares what is mapped shared, and has copies of the descriptors.
pub fn in_child(work: impl FnOnce() -> i32) -> Child {
    // SAFETY: The child only runs `work` and leaves without unwinding or running destructors. The
    // test harness runs one test at a time, so no other thread holds a lock that matters here.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", io::Error::last_os_error()),
        0 => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // SAFETY: Ends the child at once.
            unsafe { libc::_exit(status.unwrap_or(101)) }
        }
        pid => Child(pid),
    }
}

/// A child process of [`in_child`].
pub struct Child(i32);

impl Child {
    /// Waits for its end: `Ok(status)`, or `Err(signal)`.
    ///
    /// # Errors
    ///
    /// The signal that killed it.
    pub fn wait(self) -> Result<i32, i32> {
        let mut status = 0;
        // SAFETY: The child is ours and was not waited for.
        let pid = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        assert_eq!(pid, self.0);
        if libc::WIFSIGNALED(status) {
            Err(libc::WTERMSIG(status))
        } else {
            Ok(libc::WEXITSTATUS(status))
        }
    }

    /// Sends it a signal.
    pub fn kill(&self, signal: i32) {
        // SAFETY: The child is ours and was not waited for.
        assert_eq!(unsafe { libc::kill(self.0, signal) }, 0);
    }
}
