//! Mapped memory: `mmap`, and copies to and from shared memory.
//!
//! A [`Map`] may be device memory, or system memory that a device or another process writes at any time. Rust
//! references to such memory would be undefined behaviour, so none is ever made: the CPU uses volatile
//! copies, and the kernel gets the address ([`Window`]).

use std::ffi::c_void;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{Ordering, fence};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};

use crate::errno::Errno;
use crate::sys::copy::{Side, copy};
use crate::sys::fork::Process;

pub use crate::sys::copy::Memory;

/// A shared mapping of a descriptor's bytes.
///
/// # Invariants `base` is the start of a live mapping of `mapped` bytes that this value owns, and `start +
/// length <= mapped`. No Rust reference to those bytes exists. If there is an `owner`, the mapping is live in
/// that process alone.
#[derive(Debug)]
pub struct Map {
    base: NonNull<u8>,
    mapped: usize,
    start: usize,
    length: usize,
    writable: bool,
    is_shared: bool,
    memory: Memory,
    owner: Option<Process>,
}

// SAFETY: the mapping belongs to the process; nothing in this value is tied to a thread.
unsafe impl Send for Map {}
// SAFETY: methods with `&self` read the bytes or return windows. Concurrent writes (by devices, processes, or
// a thread that copies to a window) are allowed: the copies (`copy`) make no reference to the bytes and
// are nothing that the compiler knows of.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `length` bytes of `fd` from `offset`, which need not be page-aligned.
    ///
    /// A descriptor's pages may be huge; its mappings then consist of whole huge pages.
    pub fn shared(
        fd: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        writable: bool,
    ) -> Result<Map, Errno> {
        let page = page_size(fd)?;
        Map::shared_from(fd, offset - offset % page, offset % page, length, writable)
    }

    /// Maps `length` bytes of `fd` that begin `start` bytes after `from`, a multiple of the page size,
    /// together with everything between. For descriptors that must be mapped from `from`.
    pub fn shared_from(
        fd: BorrowedFd<'_>,
        from: u64,
        start: u64,
        length: u64,
        writable: bool,
    ) -> Result<Map, Errno> {
        let page = page_size(fd)? as usize;
        let start = usize::try_from(start).map_err(|_| Errno::NOMEM)?;
        let length = usize::try_from(length).map_err(|_| Errno::NOMEM)?;
        // mmap refuses an empty mapping, so an empty range gets one page.
        let mapped = start
            .checked_add(length.max(1))
            .and_then(|length| length.checked_next_multiple_of(page))
            .ok_or(Errno::NOMEM)?;
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: a fresh mapping at an address that the kernel picks overlaps nothing.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                mapped,
                protection,
                MapFlags::SHARED,
                fd,
                from,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::FAULT)?;
        // INVARIANT: just mapped, and `mapped` is at least `start + length`.
        Ok(Map {
            base,
            mapped,
            start,
            length,
            writable,
            is_shared: true,
            memory: Memory::Device,
            owner: None,
        })
    }

    /// Private memory, page-aligned, to which the kernel may write some bytes while the CPU copies others. (A
    /// [`HostMemory`] allows only one of them at a time.)
    pub fn anonymous(length: usize) -> Result<Map, Errno> {
        let memory = HostMemory::new(length)?;
        // INVARIANT: just mapped, and owned by this value.
        let map = Map {
            base: memory.base,
            mapped: memory.length,
            start: 0,
            length,
            writable: true,
            is_shared: false,
            memory: Memory::Cached,
            owner: None,
        };
        std::mem::forget(memory);
        Ok(map)
    }

    /// The length in bytes.
    #[inline]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Excludes the mapping from children forked from now on (`MADV_DONTFORK`).
    pub(crate) fn keep_from_children(&mut self) -> Result<(), Errno> {
        // SAFETY: this value owns the mapping, which is live (invariant) and does not change in this process.
        unsafe {
            madvise(
                self.base.as_ptr().cast(),
                self.mapped,
                Advice::LinuxDontFork,
            )
        }?;
        // INVARIANT: from now on no child has the mapping.
        self.owner = Some(Process::current());
        Ok(())
    }

    /// Sets the memory type; the default is device memory.
    #[must_use]
    pub fn of(mut self, memory: Memory) -> Map {
        self.memory = memory;
        self
    }

    /// False in a child that did not inherit the mapping.
    #[inline]
    pub(crate) fn is_here(&self) -> bool {
        self.owner.is_none_or(Process::is_current)
    }

    /// The address of byte `offset`, modulo `align` (a power of two).
    #[inline]
    pub fn misalignment(&self, offset: usize, align: usize) -> usize {
        (self.base.as_ptr() as usize + self.start + offset) % align
    }

    /// The part for the kernel to read or write. Panics if it is not inside. In a child that did not inherit
    /// the mapping the kernel returns `EFAULT`.
    #[inline]
    pub fn window(&self, offset: usize, length: usize) -> Window<'_> {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.length)
        );
        let address = match self.is_here() {
            // SAFETY: inside the mapping, by the check and the invariant.
            true => unsafe { self.base.as_ptr().add(self.start + offset) },
            // Something else may be at the address by now. For null the kernel returns EFAULT.
            false => ptr::null_mut(),
        };
        Window {
            address,
            length,
            writable: self.writable,
            is_shared: self.is_shared,
            memory: self.memory,
            map: PhantomData,
        }
    }

    /// Copies bytes out ([`copy`](super::copy)). Panics if they are not all
    /// inside, or the mapping [is not here](Map::is_here).
    ///
    /// Raises SIGBUS if the memory's device has gone.
    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.window(offset, into.len()).copy_out(into);
    }

    /// Copies bytes in ([`copy`](super::copy)). Panics if they are not all inside, or the mapping is
    /// read-only or [is not here](Map::is_here).
    ///
    /// Raises SIGBUS if the memory's device has gone.
    pub fn copy_in(&mut self, offset: usize, from: &[u8]) {
        self.window(offset, from.len()).copy_in(from);
    }

    /// Drains the CPU's write-combining buffers, which hold recent stores to device memory.
    pub fn drain_writes(&self) {
        fence(Ordering::SeqCst);
    }

    /// Reads a byte, which makes the bus deliver earlier posted writes. Only for memory whose reads have no
    /// side effects.
    pub fn read_back(&self, offset: usize) {
        if offset < self.length && self.is_here() {
            let window = self.window(offset, 1);
            // SAFETY: one byte inside the window.
            unsafe { window.address.read_volatile() };
        }
        fence(Ordering::SeqCst);
    }
}

/// The page size of a descriptor's mappings.
fn page_size(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    let unit = u64::try_from(rustix::fs::fstat(fd)?.st_blksize).unwrap_or(0);
    Ok(unit.max(rustix::param::page_size() as u64))
}

impl Drop for Map {
    fn drop(&mut self) {
        if !self.is_here() {
            return;
        }
        // Calls libc's `munmap` instead of rustix's own system call: caches of memory registrations
        // (libfabric, UCX) intercept libc's function. Without the call they would take the next mapping at
        // this address for this one.
        // SAFETY: this value owns the mapping (invariant), and windows into it cannot outlive it.
        let result = unsafe { libc::munmap(self.base.as_ptr().cast::<c_void>(), self.mapped) };
        debug_assert!(result == 0, "munmap: {}", std::io::Error::last_os_error());
    }
}

/// An address range for the kernel to read or write, valid during its lifetime.
///
/// # Invariants `length` bytes at `address` are inside a live mapping (writable if `writable`) that outlives
/// `'m`, and no Rust reference to them is used while the kernel has them. Or `address` is null, which the
/// kernel refuses: in a child that did not inherit the mapping.
#[derive(Debug, Clone, Copy)]
pub struct Window<'m> {
    address: *mut u8,
    length: usize,
    writable: bool,
    is_shared: bool,
    memory: Memory,
    map: PhantomData<&'m ()>,
}

// SAFETY: an address for the kernel, which accepts it from any thread. Two threads that copy to the same
// bytes mix them, as two processes do; no reference to the bytes is made (invariant).
unsafe impl Send for Window<'_> {}

impl Window<'_> {
    /// The start address. Make no Rust reference from it: the bytes are shared.
    #[inline]
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// The length in bytes.
    #[inline]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Whether the kernel may write to it.
    #[inline]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it is part of a [`Map`]; tests treat that as device memory.
    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    fn side(&self) -> Side {
        Side {
            address: self.address,
            memory: self.memory,
        }
    }

    /// Copies the first bytes out. Panics if the window is shorter, or its mapping [is not
    /// here](Map::is_here).
    pub fn copy_out(&self, into: &mut [u8]) {
        assert!(into.len() <= self.length && !self.address.is_null());
        // Orders the reads after the caller's begin-access.
        fence(Ordering::SeqCst);
        let target = Side {
            address: into.as_mut_ptr(),
            memory: Memory::Cached,
        };
        // SAFETY: inside the window (invariant), and all of a slice that is ours.
        unsafe { copy(self.side(), target, into.len()) }
    }

    /// Copies bytes to the window's start. Panics if the window is shorter or read-only, or its mapping [is
    /// not here](Map::is_here).
    pub fn copy_in(&self, from: &[u8]) {
        assert!(self.writable && from.len() <= self.length && !self.address.is_null());
        let source = Side {
            address: from.as_ptr().cast_mut(),
            memory: Memory::Cached,
        };
        // SAFETY: all of a slice, which is only read, and inside the window, which is writable.
        unsafe { copy(source, self.side(), from.len()) }
    }

    /// Copies the whole window to the start of another ([`copy`](super::copy)). Panics if the
    /// other is shorter or read-only, or a mapping [is not here](Map::is_here).
    ///
    /// Raises SIGBUS if the memory's device has gone.
    pub fn copy_to(&self, to: &Window<'_>) {
        assert!(to.writable && self.length <= to.length);
        assert!(!self.address.is_null() && !to.address.is_null());
        // Orders the reads after the caller's begin-access.
        fence(Ordering::SeqCst);
        // SAFETY: both are mapped (invariant), and no reference to their bytes is used (`Map`), or their
        // owner is borrowed (`HostMemory`).
        unsafe { copy(self.side(), to.side(), self.length) }
    }

    /// The rest after the first `length` bytes; empty if there are fewer.
    #[must_use]
    pub fn after(mut self, length: usize) -> Self {
        let length = self.length.min(length);
        // INVARIANT: the new range is inside the old one.
        // SAFETY: the address is inside the window, or at its end.
        self.address = unsafe { self.address.add(length) };
        self.length -= length;
        self
    }

    /// The first `length` bytes, or all if there are fewer.
    #[must_use]
    #[inline]
    pub fn first(mut self, length: usize) -> Self {
        // INVARIANT: the new range is inside the old one.
        self.length = self.length.min(length);
        self
    }
}

/// Page-aligned private system memory. No one else writes it, so ordinary slices of it are sound.
///
/// # Invariants `base` is the start of a live, private, readable and writable mapping of `length` bytes that
/// this value owns.
#[derive(Debug)]
pub struct HostMemory {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: plain memory; access follows the borrow rules of the slices.
unsafe impl Send for HostMemory {}

impl HostMemory {
    /// `length` zero bytes.
    pub fn new(length: usize) -> Result<HostMemory, Errno> {
        let length = length.max(1);
        // SAFETY: a fresh private mapping at an address that the kernel picks.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::FAULT)?;
        // INVARIANT: just mapped.
        Ok(HostMemory { base, length })
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: initialised (zeroed by the kernel), owned by this value, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.length) }
    }

    /// All bytes, mutably.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: initialised, owned by this value, and borrowed mutably with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.length) }
    }

    /// The first `length` bytes, for the kernel. The borrow excludes slices meanwhile.
    pub fn window(&mut self, length: usize) -> Window<'_> {
        assert!(length <= self.length);
        Window {
            address: self.base.as_ptr(),
            length,
            writable: true,
            is_shared: false,
            memory: Memory::Cached,
            map: PhantomData,
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping (invariant), and no borrow of it is left.
        let result = unsafe { libc::munmap(self.base.as_ptr().cast::<c_void>(), self.length) };
        debug_assert!(result == 0, "munmap: {}", std::io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Private anonymous memory, which also works under Miri.
    fn anonymous(start: usize, length: usize) -> Map {
        let mut map = Map::anonymous(start + length).unwrap();
        (map.start, map.length) = (start, length);
        map
    }

    #[test]
    fn every_byte_crosses_once_at_any_alignment() {
        let mut map = anonymous(3, 64);
        for offset in 0..16 {
            for length in 0..=40 {
                map.copy_in(0, &[0xee; 64]);
                let sent: Vec<u8> = (1..=length as u8).collect();
                map.copy_in(offset, &sent);
                let mut all = [0; 64];
                map.copy_out(0, &mut all);
                let mut expected = [0xee; 64];
                expected[offset..offset + length].copy_from_slice(&sent);
                assert_eq!(all, expected, "{length} bytes at {offset}");
                let mut received = vec![0; length];
                map.copy_out(offset, &mut received);
                assert_eq!(received, sent);
            }
        }
        map.drain_writes();
        map.read_back(63);
        map.read_back(64);
    }

    #[test]
    fn a_window_beyond_the_end_is_refused() {
        let map = anonymous(8, 64);
        for (offset, length) in [(65, 0), (64, 1), (0, 65), (usize::MAX, 2)] {
            let outside = std::panic::AssertUnwindSafe(|| map.window(offset, length).length);
            assert!(
                std::panic::catch_unwind(outside).is_err(),
                "{length} at {offset}"
            );
        }
        assert_eq!(map.window(64, 0).length, 0);
    }

    #[test]
    fn host_memory_is_zero_at_first_and_keeps_what_is_written() {
        let mut memory = HostMemory::new(5000).unwrap();
        assert!(memory.bytes().iter().all(|&byte| byte == 0));
        memory.bytes_mut()[4999] = 7;
        assert_eq!((memory.bytes()[4999], memory.bytes().len()), (7, 5000));
    }
}
