//! `/dev/peerbuf/importer` by its ioctls alone, without the crate, so that a test can send what the
//! crate would never send.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use peerbuf_uapi::probe;

use crate::node::ioctl;

/// Can be told that its mappings are stale.
pub const DYNAMIC: u32 = probe::DYNAMIC;
/// Asks for peer memory.
pub const PEER: u32 = probe::PEER;

/// Opens `/dev/peerbuf/importer`.
///
/// # Errors
///
/// What `open` answers.
pub fn open() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/peerbuf/importer")
}

/// A request to attach a dma-buf on behalf of a PCI device, with these `probe::*` flags.
pub fn request(fd: BorrowedFd<'_>, bdf: &str, flags: u32) -> probe::Attach {
    let mut request = probe::Attach {
        size: size_of::<probe::Attach>() as u32,
        flags,
        dmabuf: fd.as_raw_fd(),
        fd_flags: libc::O_CLOEXEC as u32,
        ..Default::default()
    };
    request.bdf[..bdf.len()].copy_from_slice(bdf.as_bytes());
    request
}

/// One attachment.
#[derive(Debug)]
pub struct Importer {
    /// Its file.
    pub fd: OwnedFd,
    /// Nanoseconds that attaching took in the kernel.
    pub attach_ns: u64,
}

impl Importer {
    /// Attaches a dma-buf on behalf of the PCI device `bdf`. After an invalidation it unmaps
    /// `late_ms` milliseconds later, or within the call if that is 0.
    ///
    /// # Errors
    ///
    /// What the kernel answers to the attachment.
    pub fn attach(fd: BorrowedFd<'_>, bdf: &str, flags: u32, late_ms: u32) -> io::Result<Self> {
        let mut request = request(fd, bdf, flags);
        if late_ms != 0 {
            request.on_invalidate = probe::ON_INVALIDATE_HOLD;
            request.hold_ms = late_ms;
        }
        Self::attach_as(request)
    }

    /// Attaches as a request says.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn attach_as(mut request: probe::Attach) -> io::Result<Self> {
        let node = open()?;
        let at = (&raw mut request).addr();
        ioctl(node.as_fd(), probe::IOC_ATTACH, at)?;
        // SAFETY: The ioctl has just made this descriptor, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(request.fd) };
        Ok(Self {
            fd,
            attach_ns: request.ns,
        })
    }

    /// Maps the attachment, for the device to read and write; what it was given.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn map(&self) -> io::Result<Mapping> {
        self.map_for(probe::BIDIRECTIONAL)?;
        Ok(self.mapping())
    }

    /// Maps the attachment in an `probe::*` direction; the nanoseconds that it took in the kernel.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
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

    /// Unmaps it, if it is mapped.
    pub fn unmap(&self) {
        match self.step(probe::IOC_UNMAP) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOENT), "unmap: {e}"),
        }
    }

    /// One of the ioctls that take an [`probe::Step`]; the nanoseconds that it took in the
    /// kernel.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn step(&self, number: u32) -> io::Result<u64> {
        let mut step = probe::Step {
            size: size_of::<probe::Step>() as u32,
            ..Default::default()
        };
        ioctl(self.fd.as_fd(), number, (&raw mut step).addr())?;
        Ok(step.ns)
    }

    /// Leaves a fence of an `probe::FENCE_*` usage that signals by itself after `timeout_ms`.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
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

    /// All that is known of it.
    pub fn query(&self) -> probe::Query {
        let mut query = probe::Query {
            size: size_of::<probe::Query>() as u32,
            ..Default::default()
        };
        let at = (&raw mut query).addr();
        ioctl(self.fd.as_fd(), probe::IOC_QUERY, at).expect("query");
        query
    }

    /// What became of it.
    pub fn state(&self) -> State {
        let query = self.query();
        State {
            invalidations: query.invalidations as u32,
            mapped: u32::from(query.state & probe::MAPPED != 0),
        }
    }

    /// Where the bytes of the last mapping are.
    pub fn mapping(&self) -> Mapping {
        let query = self.query();
        let text = query.provider.split(|&byte| byte == 0).next();
        Mapping {
            segments: query.segments,
            bytes: query.bytes,
            system: query.system_bytes,
            bus: query.bus_bytes,
            bridge: query.bridge_bytes,
            other: query.other_bytes,
            provider: String::from_utf8(text.unwrap_or_default().into()).expect("an address"),
        }
    }
}

/// What the kernel gave for a mapping. Bytes, but for the first and the last.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// DMA segments.
    pub segments: u32,
    /// Sum of the four that follow.
    pub bytes: u64,
    /// In system memory.
    pub system: u64,
    /// In a BAR, by bus address.
    pub bus: u64,
    /// In a BAR, through the host bridge.
    pub bridge: u64,
    /// Elsewhere.
    pub other: u64,
    /// The address of the device whose BAR it is.
    pub provider: String,
}

/// What became of the attachment.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Calls of `invalidate_mappings`.
    pub invalidations: u32,
    /// 1 while it has a mapping.
    pub mapped: u32,
}
