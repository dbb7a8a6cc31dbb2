//! `/dev/peerbuf/importer` through its ioctls alone, so that a test can send requests that the crate would
//! never send.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use peerbuf_uapi::probe;

use crate::node::{address, ioctl};

/// A dynamic importer: its mappings can be invalidated.
pub const DYNAMIC: u32 = probe::DYNAMIC;
/// Asks for peer memory.
pub const PEER: u32 = probe::PEER;

/// Opens `/dev/peerbuf/importer`.
///
/// # Errors
///
/// The error of `open`.
pub fn open() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/peerbuf/importer")
}

/// A request to attach a dma-buf on behalf of a PCI device, with these `probe::*` flags.
pub fn request(fd: BorrowedFd<'_>, bdf: &str, flags: u32) -> probe::Attach {
    probe::Attach {
        size: size_of::<probe::Attach>() as u32,
        flags,
        dmabuf: fd.as_raw_fd(),
        fd_flags: libc::O_CLOEXEC as u32,
        address: address(bdf),
        ..Default::default()
    }
}

/// An attachment.
#[derive(Debug)]
pub struct Importer {
    /// The attachment's file.
    pub fd: OwnedFd,
    /// Nanoseconds of the attach in the kernel.
    pub attach_ns: u64,
}

impl Importer {
    /// Attaches a dma-buf on behalf of the PCI device `bdf`. After an invalidation the importer
    /// unmaps `late_ms` milliseconds later, or within the callback if `late_ms` is 0.
    ///
    /// # Errors
    ///
    /// The kernel's error for the attach.
    pub fn attach(fd: BorrowedFd<'_>, bdf: &str, flags: u32, late_ms: u32) -> io::Result<Self> {
        let mut request = request(fd, bdf, flags);
        if late_ms != 0 {
            request.on_invalidate = probe::ON_INVALIDATE_HOLD;
            request.hold_ms = late_ms;
        }
        Self::attach_as(request)
    }

    /// Attaches with this request.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn attach_as(mut request: probe::Attach) -> io::Result<Self> {
        let node = open()?;
        let at = (&raw mut request).addr();
        ioctl(node.as_fd(), probe::IOC_ATTACH, at)?;
        // SAFETY: The ioctl has just made this descriptor, and no one else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(request.fd) };
        Ok(Self {
            fd,
            attach_ns: request.ns,
        })
    }

    /// Maps the attachment in both directions; returns the mapping.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn map(&self) -> io::Result<Mapping> {
        self.map_for(probe::BIDIRECTIONAL)?;
        Ok(self.mapping())
    }

    /// Maps the attachment in a `probe::*` direction; returns the nanoseconds in the kernel.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn map_for(&self, direction: u32) -> io::Result<u64> {
        let mut map = probe::Map {
            size: size_of::<probe::Map>() as u32,
            direction,
            ..Default::default()
        };
        let at = (&raw mut map).addr();
        ioctl(self.fd.as_fd(), probe::IOC_MAP, at)?;
        Ok(map.ns)
    }

    /// Unmaps the attachment, if it is mapped.
    pub fn unmap(&self) {
        match self.step(probe::IOC_UNMAP) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOENT), "unmap: {e}"),
        }
    }

    /// Calls an ioctl that takes a [`probe::Step`]; returns the nanoseconds in the kernel.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn step(&self, number: u32) -> io::Result<u64> {
        let mut step = probe::Step {
            size: size_of::<probe::Step>() as u32,
            ..Default::default()
        };
        ioctl(self.fd.as_fd(), number, (&raw mut step).addr())?;
        Ok(step.ns)
    }

    /// Adds a fence with a `probe::FENCE_*` usage, which signals by itself after `timeout_ms`.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn fence(&self, usage: u32, timeout_ms: u32) -> io::Result<()> {
        let mut fence = probe::Fence {
            size: size_of::<probe::Fence>() as u32,
            flags: 0,
            usage,
            timeout_ms,
        };
        let at = (&raw mut fence).addr();
        ioctl(self.fd.as_fd(), probe::IOC_FENCE, at)?;
        Ok(())
    }

    /// The complete query.
    pub fn query(&self) -> probe::Query {
        let mut query = probe::Query {
            size: size_of::<probe::Query>() as u32,
            ..Default::default()
        };
        let at = (&raw mut query).addr();
        ioctl(self.fd.as_fd(), probe::IOC_QUERY, at).expect("query");
        query
    }

    /// The attachment's state.
    pub fn state(&self) -> State {
        let query = self.query();
        State {
            invalidations: query.invalidations as u32,
            mapped: u32::from(query.state & probe::MAPPED != 0),
        }
    }

    /// The bytes of the last mapping, by place and route.
    pub fn mapping(&self) -> Mapping {
        let query = self.query();
        Mapping {
            segments: query.segments,
            bytes: query.bytes,
            system: query.system_bytes,
            bus: query.bus_bytes,
            bridge: query.bridge_bytes,
            other: query.other_bytes,
            provider: match query.provider {
                probe::PROVIDER_NONE => String::new(),
                at => format!(
                    "{:04x}:{:02x}:{:02x}.{}",
                    at >> 16,
                    at >> 8 & 0xff,
                    at >> 3 & 0x1f,
                    at & 7
                ),
            },
        }
    }
}

/// A mapping; in bytes, except for the first and the last field.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// The number of DMA segments.
    pub segments: u64,
    /// The sum of the next four fields.
    pub bytes: u64,
    /// Bytes in system memory.
    pub system: u64,
    /// Bytes in a BAR, by bus address.
    pub bus: u64,
    /// Bytes in a BAR, through the host bridge.
    pub bridge: u64,
    /// Bytes elsewhere.
    pub other: u64,
    /// The PCI address of the device with this BAR.
    pub provider: String,
}

/// The state of an attachment.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The number of calls of `invalidate_mappings`.
    pub invalidations: u32,
    /// 1 while the attachment has a mapping.
    pub mapped: u32,
}
