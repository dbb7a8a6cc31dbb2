//! `/dev/peerbuf/<BDF>` through its ioctls alone, so that a test can send requests that the crate would never
//! send.

use std::ffi::c_void;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use bytemuck::Zeroable;
use peerbuf_uapi as abi;

/// The page size of the lab's machine.
pub const PAGE: u64 = 4096;
/// 2^20 bytes.
pub const MIB: u64 = 1 << 20;

/// Calls `ioctl` with a raw number and address.
///
/// # Errors
///
/// The kernel's error.
pub fn ioctl(fd: BorrowedFd<'_>, number: u32, address: usize) -> io::Result<i32> {
    // SAFETY: The callers use ioctls of peerbuf.ko and dma-buf, whose kernel side checks each user address.
    // The callers pass the address of a struct of the right size, or one that the kernel must refuse.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(number), address) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

/// The errno of a failed call; 0 on success.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(e) => e.raw_os_error().expect("an errno"),
    }
}

/// A request for an export of one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The argument of the ioctl. [`Node::call_export`] fills in the address of the range.
    pub export: abi::Export,
    /// The range.
    pub range: abi::Range,
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
    /// The error of `open`.
    pub fn open(bdf: &str) -> io::Result<Self> {
        let path = Path::new("/dev/peerbuf").join(bdf);
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let bdf = bdf.to_owned();
        Ok(Self { file, bdf })
    }

    /// All nodes, the one with the largest BAR first.
    pub fn all() -> Vec<Self> {
        let entries = fs::read_dir("/dev/peerbuf").expect("/dev/peerbuf");
        let mut nodes: Vec<Self> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(':'))
            .map(|bdf| Self::open(&bdf).unwrap())
            .collect();
        nodes.sort_by_key(|node| std::cmp::Reverse(node.query().unwrap().bars[2].size));
        nodes
    }

    /// The node of the device with the largest BAR.
    pub fn largest() -> Self {
        Self::all().remove(0)
    }

    /// Calls an ioctl with a struct, whatever its contents.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn call<T: bytemuck::Pod>(&self, number: u32, argument: &mut T) -> io::Result<i32> {
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
    /// The kernel's error.
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

    /// A request for `length` bytes of BAR 2, at `offset`, or anywhere if `offset` is `None`.
    pub fn request(offset: Option<u64>, length: u64) -> Request {
        Request {
            export: abi::Export {
                size: size_of::<abi::Export>() as u32,
                fd_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
                nr_ranges: 1,
                range_size: size_of::<abi::Range>() as u32,
                ..Zeroable::zeroed()
            },
            range: abi::Range {
                offset: offset.unwrap_or(0),
                length,
                bar: 2,
                flags: if offset.is_none() {
                    abi::RANGE_ANY_OFFSET
                } else {
                    0
                },
            },
        }
    }

    /// [`abi::IOC_EXPORT`], whatever the request's contents.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn call_export(&self, request: &mut Request) -> io::Result<i32> {
        request.export.ranges = (&raw mut request.range).addr() as u64;
        let answer = self.call(abi::IOC_EXPORT, &mut request.export);
        request.export.ranges = 0;
        answer
    }

    /// [`abi::IOC_EXPORT`]; returns the dma-buf and its offset in the BAR.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn export_request(&self, mut request: Request) -> io::Result<(OwnedFd, u64)> {
        self.call_export(&mut request)?;
        // SAFETY: The ioctl has just made this descriptor, and no one else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(request.export.fd) };
        Ok((fd, request.range.offset))
    }

    /// Exports `length` bytes of BAR 2, at `offset`, or anywhere if `offset` is `None`.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn export(&self, offset: Option<u64>, length: u64) -> io::Result<(OwnedFd, u64)> {
        self.export_request(Self::request(offset, length))
    }

    /// [`abi::IOC_EXPORT`] of several ranges, of BAR 2 where they do not name system memory; returns the dma-buf and
    /// its length, and fills in the ranges' offsets.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn export_ranges(
        &self,
        flags: u32,
        ranges: &mut [abi::Range],
    ) -> io::Result<(OwnedFd, u64)> {
        let mut sent: Vec<abi::Range> = ranges.to_vec();
        for range in &mut sent {
            range.bar = if range.flags & abi::RANGE_SYSTEM == 0 {
                2
            } else {
                0
            };
        }
        let mut request = abi::Export {
            flags,
            ranges: sent.as_mut_ptr().addr() as u64,
            nr_ranges: sent.len() as u32,
            ..Self::request(None, 0).export
        };
        let answer = self.call(abi::IOC_EXPORT, &mut request);
        for (range, sent) in ranges.iter_mut().zip(&sent) {
            range.offset = sent.offset;
        }
        answer?;
        // SAFETY: The ioctl has just made this descriptor, and no one else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(request.fd) };
        Ok((fd, request.length))
    }

    /// Exports `length` bytes of BAR 2 anywhere, with permission to move to system memory for importers that
    /// need it.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn export_movable(&self, length: u64) -> io::Result<OwnedFd> {
        let mut request = Self::request(None, length);
        request.export.flags |= abi::EXPORT_MAY_MOVE;
        Ok(self.export_request(request)?.0)
    }

    /// [`abi::IOC_MOVE`] of the whole buffer, with a limit of 5 seconds; returns the generation and the bytes
    /// copied.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn move_to(&self, fd: &OwnedFd, placement: u32) -> io::Result<(u64, u64)> {
        self.move_part(fd, placement, 0, 0, 5000)
    }

    /// [`abi::IOC_MOVE`].
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn move_part(
        &self,
        fd: &OwnedFd,
        placement: u32,
        offset: u64,
        length: u64,
        timeout_ms: u32,
    ) -> io::Result<(u64, u64)> {
        let mut request = abi::Move {
            size: size_of::<abi::Move>() as u32,
            fd: fd.as_raw_fd(),
            placement,
            offset,
            length,
            timeout_ms,
            ..Zeroable::zeroed()
        };
        self.call(abi::IOC_MOVE, &mut request)?;
        Ok((request.generation, request.copied))
    }

    /// [`abi::IOC_MOVE`] of the whole buffer, which fails with EBUSY: the holders, fences, pages and pins in the way.
    pub fn in_the_way(&self, fd: &OwnedFd, placement: u32, timeout_ms: u32) -> [u64; 4] {
        let mut request = abi::Move {
            size: size_of::<abi::Move>() as u32,
            fd: fd.as_raw_fd(),
            placement,
            timeout_ms,
            ..Zeroable::zeroed()
        };
        assert_eq!(errno(self.call(abi::IOC_MOVE, &mut request)), libc::EBUSY);
        assert_eq!((request.generation, request.copied), (0, 0));
        [request.holders, request.fences, request.pages, request.pins]
    }

    /// [`abi::IOC_REVOKE`].
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn revoke(&self, fd: &OwnedFd, timeout_ms: u32) -> io::Result<abi::Revoke> {
        self.revoke_as(0, fd, timeout_ms)
    }

    /// [`abi::IOC_REVOKE`] with `abi::REVOKE_*`.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn revoke_as(&self, flags: u32, fd: &OwnedFd, timeout_ms: u32) -> io::Result<abi::Revoke> {
        let mut request = abi::Revoke {
            flags,
            size: size_of::<abi::Revoke>() as u32,
            fd: fd.as_raw_fd(),
            timeout_ms,
            ..Zeroable::zeroed()
        };
        self.call(abi::IOC_REVOKE, &mut request)?;
        Ok(request)
    }

    /// [`abi::IOC_RESTORE`]; returns the generation.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn restore(&self, fd: &OwnedFd) -> io::Result<u64> {
        let mut request = abi::Restore {
            size: size_of::<abi::Restore>() as u32,
            fd: fd.as_raw_fd(),
            ..Zeroable::zeroed()
        };
        self.call(abi::IOC_RESTORE, &mut request)?;
        Ok(request.generation)
    }

    /// [`abi::IOC_WATCH`] for each move, revoke and restore, or [`abi::IOC_UNWATCH`].
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn watch(&self, number: u32, fd: &OwnedFd, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let events = match number {
            abi::IOC_WATCH => abi::EVENT_MOVED | abi::EVENT_REVOKED | abi::EVENT_RESTORED,
            _ => 0,
        };
        self.watch_for(number, events, fd, eventfd)
    }

    /// [`abi::IOC_WATCH`] or [`abi::IOC_UNWATCH`] with these `abi::EVENT_*`.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn watch_for(
        &self,
        number: u32,
        events: u64,
        fd: &OwnedFd,
        eventfd: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mut request = abi::Watch {
            events,
            size: size_of::<abi::Watch>() as u32,
            fd: fd.as_raw_fd(),
            eventfd: eventfd.as_raw_fd(),
            ..Zeroable::zeroed()
        };
        self.call(number, &mut request)?;
        Ok(())
    }

    /// [`abi::IOC_BUFFER`], without the lists.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn buffer(&self, fd: &OwnedFd) -> io::Result<abi::BufferQuery> {
        let mut request = abi::BufferQuery {
            size: size_of::<abi::BufferQuery>() as u32,
            fd: fd.as_raw_fd(),
            ..Zeroable::zeroed()
        };
        self.call(abi::IOC_BUFFER, &mut request)?;
        Ok(request)
    }

    /// The lists of [`abi::IOC_BUFFER`].
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn buffer_lists(
        &self,
        fd: &OwnedFd,
    ) -> io::Result<(Vec<abi::Attachment>, Vec<abi::Piece>)> {
        let mut attachments = vec![abi::Attachment::zeroed(); 128];
        let mut pieces = vec![abi::Piece::zeroed(); 128];
        let mut request = abi::BufferQuery {
            size: size_of::<abi::BufferQuery>() as u32,
            fd: fd.as_raw_fd(),
            attachments: attachments.as_mut_ptr().addr() as u64,
            pieces: pieces.as_mut_ptr().addr() as u64,
            nr_attachments: 128,
            attachment_size: size_of::<abi::Attachment>() as u32,
            nr_pieces: 128,
            piece_size: size_of::<abi::Piece>() as u32,
            ..Zeroable::zeroed()
        };
        self.call(abi::IOC_BUFFER, &mut request)?;
        attachments.truncate(request.nr_attachments as usize);
        pieces.truncate(request.nr_pieces as usize);
        Ok((attachments, pieces))
    }

    /// Unbinds the device from its driver, and waits for the removal.
    pub fn unbind(bdf: &str) {
        fs::write("/sys/bus/pci/drivers/peerbuf/unbind", bdf).expect("unbind");
    }

    /// Binds the device to the driver again.
    pub fn bind(bdf: &str) {
        fs::write("/sys/bus/pci/drivers/peerbuf/bind", bdf).expect("bind");
    }
}

/// [`abi::IOC_PROVIDER_OPEN`]: the P2PDMA memory of the driver of `bdf`, as a node.
///
/// # Errors
///
/// The kernel's error.
pub fn open_provider(bdf: &str) -> io::Result<Node> {
    open_provider_at(address(bdf), bdf)
}

/// [`open_provider`] by a number.
///
/// # Errors
///
/// The kernel's error.
pub fn open_provider_at(address: u64, bdf: &str) -> io::Result<Node> {
    let node = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/peerbuf/provider")?;
    let mut request = abi::ProviderOpen {
        size: size_of::<abi::ProviderOpen>() as u32,
        fd_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
        address,
        ..Zeroable::zeroed()
    };
    let at = (&raw mut request).addr();
    ioctl(node.as_fd(), abi::IOC_PROVIDER_OPEN, at)?;
    // SAFETY: The ioctl has just made this descriptor, and no one else knows it.
    let file = unsafe { File::from_raw_fd(request.fd) };
    let bdf = bdf.to_owned();
    Ok(Node { file, bdf })
}

/// The PCI address `DDDD:BB:DD.F` as a number.
pub fn address(bdf: &str) -> u64 {
    let at: peerbuf::topology::PciAddress = bdf.parse().expect("an address");
    abi::pci_address(at.domain, at.bus, at.device, at.function)
}

/// The PCI address of the NVMe disk.
pub fn nvme_bdf() -> String {
    let device: PathBuf = fs::canonicalize("/sys/class/nvme/nvme0/device").expect("an NVMe disk");
    device.file_name().unwrap().to_str().unwrap().to_owned()
}

/// A shared mapping of a dma-buf or memfd, read and written one word at a time.
pub struct Map {
    base: *mut u64,
    /// Length in bytes.
    pub len: usize,
}

// SAFETY: The memory is accessed only by volatile words; a test that shares it between threads relies on no
// order between them.
unsafe impl Send for Map {}
// SAFETY: All accesses are volatile words, as for `Send`.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `len` bytes, with `PROT_WRITE` or without.
    ///
    /// # Errors
    ///
    /// The error of `mmap`.
    pub fn new(fd: BorrowedFd<'_>, len: usize, write: bool) -> io::Result<Self> {
        Self::with(fd, len, 0, write, libc::MAP_SHARED)
    }

    /// Maps `len` bytes from `offset`, with these `MAP_*` flags.
    ///
    /// # Errors
    ///
    /// The error of `mmap`.
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

    /// The address, for system calls.
    pub fn as_ptr(&self) -> *mut c_void {
        self.base.cast()
    }

    /// Reads the word at byte `at`, a multiple of 8.
    pub fn read(&self, at: usize) -> u64 {
        assert!(at + 8 <= self.len && at.is_multiple_of(8));
        // SAFETY: In the mapping and aligned, by the check; a fault kills only the test.
        unsafe { self.base.add(at / 8).read_volatile() }
    }

    /// Writes the word at byte `at`, a multiple of 8.
    pub fn write(&self, at: usize, word: u64) {
        assert!(at + 8 <= self.len && at.is_multiple_of(8));
        // SAFETY: In the mapping and aligned, by the check; a fault kills only the test.
        unsafe { self.base.add(at / 8).write_volatile(word) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: `with` made the mapping, which is not used any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Runs `work` in a child process.
///
/// The child shares shared mappings, and has copies of the file descriptors.
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
    /// Waits for the child to end: `Ok(status)`, or `Err(signal)`.
    ///
    /// # Errors
    ///
    /// The signal that killed the child.
    pub fn wait(self) -> Result<i32, i32> {
        let mut status = 0;
        // SAFETY: the process is a child of this one and has not been waited for.
        let pid = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        assert_eq!(pid, self.0);
        ending(status)
    }

    /// The result of [`Child::wait`], if the child has ended. Do not wait for the child again
    /// afterwards.
    pub fn has_ended(&self) -> Option<Result<i32, i32>> {
        let mut status = 0;
        // SAFETY: the process is a child of this one.
        let pid = unsafe { libc::waitpid(self.0, &raw mut status, libc::WNOHANG) };
        (pid == self.0).then(|| ending(status))
    }

    /// Sends the child a signal.
    pub fn kill(&self, signal: i32) {
        // SAFETY: the process is a child of this one and has not been waited for.
        assert_eq!(unsafe { libc::kill(self.0, signal) }, 0);
    }
}

fn ending(status: i32) -> Result<i32, i32> {
    if libc::WIFSIGNALED(status) {
        Err(libc::WTERMSIG(status))
    } else {
        Ok(libc::WEXITSTATUS(status))
    }
}

/// Word `i` of a pattern; each `salt` gives a different one.
pub fn pattern(salt: u64, i: usize) -> u64 {
    (i as u64 + 1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(salt)
}

/// Writes the pattern to a part of a mapping.
pub fn fill(map: &Map, at: usize, len: usize, salt: u64) {
    for i in (at..at + len).step_by(8) {
        map.write(i, pattern(salt, i));
    }
}

/// The offset of the first byte that differs from the pattern.
pub fn differs(map: &Map, at: usize, len: usize, salt: u64) -> Option<usize> {
    (at..at + len)
        .step_by(8)
        .find(|&i| map.read(i) != pattern(salt, i))
}

/// `DMA_BUF_IOCTL_SYNC`.
///
/// # Errors
///
/// The kernel's error.
pub fn sync(fd: &OwnedFd, mut flags: u64) -> io::Result<i32> {
    const DMA_BUF_IOCTL_SYNC: u32 = 0x4008_6200;
    ioctl(fd.as_fd(), DMA_BUF_IOCTL_SYNC, (&raw mut flags).addr())
}

/// Begins a read access of the CPU; with [`SYNC_END`], ends it.
pub const SYNC_READ: u64 = 1;
/// Like [`SYNC_READ`], for writing.
pub const SYNC_WRITE: u64 = 2;
/// Ends an access; see [`SYNC_READ`].
pub const SYNC_END: u64 = 4;

/// Asserts that all BARs are free. Waits for completed direct I/O, whose pages the block layer releases a
/// moment later.
pub fn assert_all_free(node: &Node) {
    for _ in 0..200 {
        if node.bar2().exports == 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let bar = node.bar2();
    assert_eq!((bar.free, bar.exports), (bar.size, 0), "{}", node.bdf);
    assert_eq!(bar.largest_free, bar.size);
}
