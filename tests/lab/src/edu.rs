//! QEMU's `edu` with the driver of `fixtures/modules/edu`, which imports dma-bufs: a device that reads
//! and writes a buffer by its scatter list, and shows what it found.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::modules::{find_pci, rebind};
use crate::node::ioctl;

/// Most bytes that one call of [`Edu::read`] or [`Edu::write`] is quick for: a tenth of a second.
pub const CHUNK: usize = 4096;

/// What kind of importer it is.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Cannot be told that its mapping is stale.
    Static = 0,
    /// Can, and takes no peer memory.
    Dynamic = 1,
    /// Can, and does.
    Peer = 2,
}

/// A dma-buf that the device has imported and mapped.
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

    /// Attaches and maps.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
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

    /// The device reads so many bytes from `offset`.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// The device writes these bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    /// How often it was told that its mapping is stale. It keeps the mapping.
    pub fn stale(&self) -> u32 {
        self.call(3, 0).unwrap()
    }

    /// Gives the mapping back, and maps again.
    ///
    /// # Errors
    ///
    /// What the kernel answers; there is no mapping then.
    pub fn remap(&self) -> io::Result<()> {
        self.call(4, 0).map(drop)
    }

    /// Entries of the scatter list.
    pub fn segments(&self) -> u32 {
        self.call(5, 0).unwrap()
    }
}
