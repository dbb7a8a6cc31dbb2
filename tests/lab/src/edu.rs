//! QEMU's `edu` device with the driver of `fixtures/modules/edu`, which imports dma-bufs: it reads and writes
//! a buffer through its scatter list.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::modules::{find_pci, rebind};
use crate::node::ioctl;

/// The maximum bytes of a fast call of [`Edu::read`] or [`Edu::write`] (a tenth of a second).
pub const CHUNK: usize = 4096;

/// The kind of importer.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Static: its mapping cannot be invalidated.
    Static = 0,
    /// Dynamic, without peer memory.
    Dynamic = 1,
    /// Dynamic, with peer memory.
    Peer = 2,
}

/// A dma-buf that the device has attached and mapped.
#[derive(Debug)]
pub struct Edu(File);

impl Edu {
    /// The device's PCI address, with the driver loaded and bound to it.
    pub fn bdf() -> String {
        let bdf = find_pci(0x1234, 0x11e8);
        if !std::path::Path::new("/dev/edu").exists() {
            let done = Command::new("insmod")
                .arg("/opt/peerbuf/fixtures/edu.ko")
                .status()
                .unwrap();
            assert!(done.success(), "insmod edu.ko");
            rebind(&bdf, "edu");
        }
        bdf
    }

    /// Attaches and maps a dma-buf.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn import(fd: BorrowedFd<'_>, kind: Kind) -> io::Result<Self> {
        Self::bdf();
        let file = OpenOptions::new().read(true).write(true).open("/dev/edu")?;
        let this = Self(file);
        this.call(kind as u32, fd.as_raw_fd() as usize)?;
        Ok(this)
    }

    fn call(&self, number: u32, argument: usize) -> io::Result<u32> {
        let number = u32::from(b'E') << 8 | number;
        ioctl(self.0.as_fd(), number, argument).map(i32::cast_unsigned)
    }

    /// The device reads `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// The device writes these bytes at `offset`.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    /// The number of invalidations of the device's mapping, which stays.
    pub fn stale(&self) -> u32 {
        self.call(3, 0).unwrap()
    }

    /// Unmaps the dma-buf, and maps it again.
    ///
    /// # Errors
    ///
    /// The kernel's error; no mapping is left in that case.
    pub fn remap(&self) -> io::Result<()> {
        self.call(4, 0).map(drop)
    }

    /// The number of entries in the scatter list.
    pub fn segments(&self) -> u32 {
        self.call(5, 0).unwrap()
    }
}
