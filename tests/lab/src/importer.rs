//! `/dev/lab-importer`, the fixture module that attaches dma-bufs. The numbers and structs are
//! those of `fixtures/modules/importer/importer.c`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::Command;

use crate::node::ioctl;

/// Can be told that its mappings are stale.
pub const DYNAMIC: u32 = 1;
/// Asks for peer memory.
pub const PEER: u32 = 2;

/// `DMA_BIDIRECTIONAL`.
pub const BIDIRECTIONAL: u32 = 0;

#[repr(C)]
struct Attach {
    fd: i32,
    flags: u32,
    late_ms: u32,
    domain: u32,
    bus: u32,
    devfn: u32,
}

/// What the kernel gave for a mapping.
#[repr(C)]
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    dir: u32,
    /// DMA segments.
    pub segments: u32,
    /// DMA address of the first.
    pub first: u64,
    /// Sum of their lengths.
    pub bytes: u64,
}

/// What became of the attachment.
#[repr(C)]
#[derive(Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Calls of `invalidate_mappings`.
    pub invalidations: u32,
    /// 1 while it has a mapping.
    pub mapped: u32,
}

const fn number(dir: u32, nr: u32, size: usize) -> u32 {
    (dir << 30) | ((size as u32) << 16) | (0xBC << 8) | nr
}

/// One attachment.
pub struct Importer(File);

impl Importer {
    /// Attaches a dma-buf on behalf of the PCI device `bdf`. After an invalidation it unmaps
    /// `late_ms` milliseconds later, or within the callback if that is 0.
    ///
    /// # Errors
    ///
    /// What the kernel answers to the attachment.
    pub fn attach(fd: BorrowedFd<'_>, bdf: &str, flags: u32, late_ms: u32) -> io::Result<Self> {
        if !Path::new("/dev/lab-importer").exists() {
            let done = Command::new("insmod")
                .arg("/opt/peerbuf/fixtures/importer.ko")
                .status()?;
            assert!(done.success(), "insmod importer.ko");
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/lab-importer")?;
        let hex = |text: &str| u32::from_str_radix(text, 16).unwrap();
        let mut ask = Attach {
            fd: fd.as_raw_fd(),
            flags,
            late_ms,
            domain: hex(&bdf[..4]),
            bus: hex(&bdf[5..7]),
            devfn: (hex(&bdf[8..10]) << 3) | hex(&bdf[11..]),
        };
        ioctl(
            file.as_fd(),
            number(1, 0, size_of::<Attach>()),
            (&raw mut ask).addr(),
        )?;
        Ok(Self(file))
    }

    /// Maps the attachment.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn map(&self) -> io::Result<Mapping> {
        let mut mapping = Mapping {
            dir: BIDIRECTIONAL,
            ..Mapping::default()
        };
        let ioc = number(3, 1, size_of::<Mapping>());
        ioctl(self.0.as_fd(), ioc, (&raw mut mapping).addr())?;
        Ok(mapping)
    }

    /// Unmaps it, if it is mapped.
    pub fn unmap(&self) {
        ioctl(self.0.as_fd(), number(0, 2, 0), 0).expect("unmap");
    }

    /// What became of it.
    pub fn state(&self) -> State {
        let mut state = State::default();
        let ioc = number(2, 3, size_of::<State>());
        ioctl(self.0.as_fd(), ioc, (&raw mut state).addr()).expect("state");
        state
    }
}
