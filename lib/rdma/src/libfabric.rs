//! libfabric: registers peerbuf's buffers in a domain of the program (feature `libfabric`).
//!
//! This module is not a provider. The program opens fabric, domain and endpoints with any binding, posts the
//! work and waits for it. It passes the domain to peerbuf, and gets the arguments of that work for a range of
//! a buffer: address, key and descriptor. [`Domain::register`] registers by the best way that works; the
//! [`Registration`] reports the rung, and why each better rung failed:
//!
//! | rung | the provider uses | needs |
//! |---|---|---|
//! | [`Rung::DmaBufByLibrary`] | the dma-buf (`FI_MR_DMABUF`) | a provider that does |
//! | [`Rung::SharedMemory`] | the pages of the memfd behind the buffer, without a copy | a memfd |
//! | [`Rung::Staged`] | a bounce buffer as long as the range; the CPU copies | a mapping |
//!
//! A provider's dma-buf support is trusted only if the provider rejects a descriptor that is not a dma-buf:
//! `tcp` reports success for any number and never checks the descriptor. `docs/libfabric.md` lists the
//! observed behaviour of each provider.
//!
//! ```no_run
//! use std::ffi::c_void;
//! use peerbuf::{Access, export::udmabuf};
//! use peerbuf_rdma::libfabric::{Domain, Opened};
//!
//! # fn fi_write(_: *mut c_void, _: usize, _: *mut c_void, _: (u64, u64)) {}
//! # fn register(
//! #     engines_domain: *mut c_void,
//! #     mr_mode: u64,
//! #     exchange: impl Fn((u64, u64)) -> (u64, u64),
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! // From the engine: `fid_domain *`, and what its `fi_info` says.
//! let opened = Opened {
//!     provider: "verbs;ofi_rxm".into(),   // fabric_attr->prov_name
//!     api_version: 1 << 16 | 20,          // fabric_attr->api_version
//!     mr_mode,                            // domain_attr->mr_mode
//! };
//! // SAFETY: the engine keeps its domain open for longer than this, ...
//! let domain = unsafe { Domain::from_raw(engines_domain, opened)? };
//!
//! let buffer = udmabuf::export("weights", 1 << 20)?;
//! let weights = domain.register(&buffer.whole(), Some(Access::Write), 1)?;
//! println!("{}", weights.rung());
//! for attempt in weights.attempts() {
//!     println!("  not {attempt}");
//! }
//!
//! // What a peer's work names, and what this process's does.
//! let shown = weights.remote(0, 65536)?;
//! let theirs = exchange((shown.address, shown.key));
//! let piece = weights.local(0, 65536)?;
//! fi_write(piece.pointer, piece.length, piece.descriptor, theirs);
//! # Ok(())
//! # }
//! ```
//!
//! # When the buffer moves
//!
//! As [with cards](crate#when-the-buffer-moves): a registered buffer is pinned or copied, and does not move.
//! [`Registration::local`] and [`Registration::remote`] refuse a buffer that was revoked, moved or given back
//! ([`RdmaError::Stale`]); register it again then. The program's own completions report work in flight.
//!
//! # Which binding
//!
//! This crate has its own declarations (`sys/libfabric`): five structures, which the lab compares with the
//! header. The crate `ofi-libfabric-sys` 0.1 (from the libfabric project) runs bindgen over the installed
//! headers, or builds the library: it needs clang and libfabric's headers wherever this crate is built, and
//! links the library. `libfabric-sys` 0.0.2 contains and builds a libfabric from before `FI_MR_DMABUF`.
//! Neither is needed to call the functions in a domain's tables.

use std::ffi::c_void;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Mutex;

use crate::error::RdmaError;
use crate::ladder::{
    self, Climbed, Domain as _, Staging, Standing, climb, no_mapping, registrable, shared_memory,
};
use crate::sys::libfabric::{self as sys, Region};
use peerbuf::Errno;
use peerbuf::buffer::{Access, BufferRange, Mapping};
use peerbuf::error::{BufferError, SystemError};
use peerbuf::export::memfd;
use peerbuf::plan::ReasonCode;
use peerbuf_core::limits::on_pinning;
use peerbuf_core::memory::Window;
use peerbuf_core::unpoisoned;

pub use crate::rung::{Attempt, Layer, Rung};
pub use crate::sys::libfabric::{Domain, Opened};

/// `FI_VERSION(1, 20)`, the first version with `FI_MR_DMABUF`.
const DMABUF_SINCE: u32 = 1 << 16 | 20;

/// The rungs for libfabric, best first.
pub const RUNGS: [Rung; 3] = [Rung::DmaBufByLibrary, Rung::SharedMemory, Rung::Staged];

/// The offsets that this crate assumes for each field of libfabric's structures, and the constants, by name
/// in C, for the lab's comparison with the header.
#[doc(hidden)]
pub fn layout() -> Vec<(&'static str, u64)> {
    sys::layout()
}

impl Domain {
    /// Registers a range by the best way that works. `remote` is the access allowed to peers; `None` means
    /// only this process's own work, which may always read the range, and write it if the buffer is writable.
    ///
    /// `key` is the key to request, which must be free; a domain with `FI_MR_PROV_KEY` chooses one itself and
    /// ignores it.
    ///
    /// # Errors [`RdmaError::Buffer`] for remote writes to a read-only buffer; [`RdmaError::Empty`] for an
    /// empty range; [`RdmaError::Mismatch`] for a domain with `FI_MR_ENDPOINT` and no endpoint
    /// ([`Domain::for_endpoint`]), or, with remote access, a domain whose keys are not numbers (`FI_MR_RAW`);
    /// and [`RdmaError::NotRegistered`] with the failure of each rung.
    #[doc(alias = "fi_mr_regattr")]
    #[doc(alias = "FI_MR_DMABUF")]
    pub fn register(
        &self,
        range: &BufferRange,
        remote: Option<Access>,
        key: u64,
    ) -> Result<Registration, RdmaError> {
        self.register_by(range, remote, key, &RUNGS)
    }

    /// As [`Domain::register`], by these of the [`RUNGS`] only, in this order.
    ///
    /// # Errors
    /// As [`Domain::register`].
    pub fn register_by(
        &self,
        range: &BufferRange,
        remote: Option<Access>,
        key: u64,
        rungs: &[Rung],
    ) -> Result<Registration, RdmaError> {
        if self.handle().is_inherited() {
            let card = self.opened().provider.clone();
            return Err(RdmaError::Inherited { card });
        }
        let access = self.allowed(range, remote)?;
        let Climbed {
            region,
            rung,
            attempts,
            standing,
        } = climb(self, range, (access, key), rungs)?;
        Ok(Registration {
            region,
            virtual_addresses: self.has(sys::MR_VIRT_ADDR | sys::MR_BASIC),
            remote,
            rung,
            attempts,
            standing,
        })
    }

    fn has(&self, mode: u64) -> bool {
        self.opened().mr_mode & mode != 0
    }

    /// The access flags to request; an error if the request is impossible.
    fn allowed(&self, range: &BufferRange, remote: Option<Access>) -> Result<u64, RdmaError> {
        registrable(range, remote)?;
        if self.has(sys::MR_ENDPOINT) && !self.handle().has_endpoint() {
            let name = self.name();
            let what = format!(
                "the domain of {name} binds regions to an endpoint (FI_MR_ENDPOINT), but has none: use \
                 Domain::for_endpoint"
            );
            return Err(RdmaError::Mismatch { what });
        }
        if self.has(sys::MR_RAW) && remote.is_some() {
            let name = self.name();
            let what = format!(
                "the domain of {name} has keys longer than 64 bits (FI_MR_RAW), which peers cannot be given"
            );
            return Err(RdmaError::Mismatch { what });
        }
        let mut access = sys::SEND | sys::WRITE;
        if range.buffer().is_writable() {
            access |= sys::RECV | sys::READ;
        }
        if remote.is_some_and(Access::writes) {
            access |= sys::REMOTE_WRITE;
        }
        if remote.is_some_and(Access::reads) {
            access |= sys::REMOTE_READ;
        }
        Ok(access)
    }

    fn try_dmabuf(
        &self,
        range: &BufferRange,
        access: u64,
        key: u64,
    ) -> Result<Region<Kept>, Attempt> {
        const CALL: &str = "fi_mr_regattr(FI_MR_DMABUF)";
        let rung = Rung::DmaBufByLibrary;
        let buffer = range.buffer();
        let Some(dmabuf) = buffer.dmabuf() else {
            let evidence = "the buffer is host memory without a dma-buf";
            return Err(Attempt::lacking(rung, ReasonCode::NoDmaBuf, evidence));
        };
        let code = match buffer.provenance().kind.is_device_memory() {
            true => ReasonCode::ImporterNotPeer,
            false => ReasonCode::AttachRefused,
        };
        let refused = |layer, evidence: String| Attempt {
            layer,
            ..Attempt::lacking(rung, code, &evidence)
        };
        let version = self.opened().api_version;
        if version < DMABUF_SINCE {
            let [major, minor] = [version >> 16, version & 0xffff];
            let evidence = format!(
                "the program asked libfabric for version {major}.{minor} of its interface, and \
                 FI_MR_DMABUF is of 1.20"
            );
            return Err(refused(Layer::Domain, evidence));
        }
        // First with an invalid descriptor. A provider that accepts it does not check, so its answers to both
        // calls are not an exporter's. (The kernel answers EBADF to the first.)
        let nobodys = self.register_nobodys(access, key);
        if nobodys.is_ok() {
            let evidence = format!(
                "{CALL} on {}: the provider also accepted an invalid descriptor, so its answer proves nothing",
                self.name()
            );
            return Err(refused(Layer::Provider, evidence));
        }
        let mapping = range.map(buffer.allowed());
        let mapping = mapping.map_err(|error| no_mapping(rung, &error))?;
        let kept = Kept::new(Memory::Mapped(mapping), range);
        let part = Some((Some(dmabuf.as_fd()), range.offset()));
        let region = Region::register(self.handle(), kept, Kept::window, part, access, key);
        region.map_err(|errno| {
            let layer = match nobodys {
                Err(other) if other == errno => Layer::Provider,
                _ => Layer::Exporter,
            };
            let evidence = SystemError::new(CALL, buffer.name(), errno).to_string();
            Attempt {
                errno: Some(errno),
                ..refused(layer, evidence)
            }
        })
    }

    /// Registers a page of ordinary memory as a dma-buf with an invalid descriptor; expected to fail.
    fn register_nobodys(&self, access: u64, key: u64) -> Result<(), Errno> {
        let page = rustix::param::page_size() as u64;
        let memory = memfd::export("no dma-buf", page).map_err(|_| Errno::NOMEM)?;
        let range = memory.whole();
        let mapping = range.map(Access::ReadWrite).map_err(|_| Errno::NOMEM)?;
        let kept = Kept::new(Memory::Mapped(mapping), &range);
        let part = Some((None, 0));
        Region::register(self.handle(), kept, Kept::window, part, access, key).map(drop)
    }
}

impl ladder::Domain for Domain {
    /// `FI_SEND` and other flags, and the key.
    type Access = (u64, u64);
    type Region = Region<Kept>;

    fn name(&self) -> String {
        format!("libfabric's {}", self.opened().provider)
    }

    fn try_rung(
        &self,
        range: &BufferRange,
        (access, key): (u64, u64),
        rung: Rung,
    ) -> Result<Region<Kept>, Attempt> {
        let memory = match rung {
            Rung::DmaBufByLibrary => return self.try_dmabuf(range, access, key),
            Rung::SharedMemory => Memory::Mapped(shared_memory(range)?),
            Rung::Staged => Memory::Staged(Staging::of(range)?),
            other => {
                let evidence = "libfabric knows no such way";
                let attempt = Attempt::lacking(other, ReasonCode::AttachRefused, evidence);
                let layer = Layer::Provider;
                return Err(Attempt { layer, ..attempt });
            }
        };
        let kept = Kept::new(memory, range);
        let region = Region::register(self.handle(), kept, Kept::window, None, access, key);
        region.map_err(|errno| {
            let cause = SystemError::new("fi_mr_regattr", range.buffer().name(), errno);
            let evidence = format!("{cause}{}", on_pinning(errno));
            let code = ReasonCode::NotPinnable;
            Attempt {
                layer: match errno {
                    Errno::FAULT | Errno::NOMEM => Layer::Memory,
                    _ => Layer::Provider,
                },
                errno: Some(errno),
                ..Attempt::lacking(rung, code, &evidence)
            }
        })
    }
}

/// The memory behind a region.
pub(crate) struct Kept {
    memory: Mutex<Memory>,
    /// Keeps the buffer in use.
    range: BufferRange,
}

enum Memory {
    /// The buffer's own bytes.
    Mapped(Mapping),
    /// Copies in a bounce buffer.
    Staged(Staging),
}

impl Kept {
    fn new(memory: Memory, range: &BufferRange) -> Kept {
        Kept {
            memory: Mutex::new(memory),
            range: range.clone(),
        }
    }

    fn window(&mut self) -> Window<'_> {
        let memory = self.memory.get_mut();
        match unpoisoned(memory) {
            Memory::Mapped(mapping) => mapping.map().window(0, mapping.len() as usize),
            Memory::Staged(staging) => staging.window(),
        }
    }
}

/// A registered range of a buffer. Dropping it closes the region and gives the buffer back. If the provider
/// refuses to close it, both are leaked until the process ends.
pub struct Registration {
    region: Region<Kept>,
    /// Peers use this process's virtual addresses, not offsets from 0.
    virtual_addresses: bool,
    remote: Option<Access>,
    rung: Rung,
    attempts: Vec<Attempt>,
    standing: Standing,
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("buffer", &self.range().buffer().name())
            .field("offset", &self.range().offset())
            .field("length", &self.range().len())
            .field("rung", &self.rung)
            .finish_non_exhaustive()
    }
}

/// Arguments for this process's own work: those of `fi_send`, `fi_write` and others. Valid as long as the
/// registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// `buf`. Make no Rust reference from it: the bytes are shared.
    pub pointer: *mut c_void,
    /// `len`, in bytes.
    pub length: usize,
    /// `desc`
    pub descriptor: *mut c_void,
}

/// Arguments for a peer's work: `addr` and `key` of `fi_write`, `fi_read` and others. Valid as long as the
/// registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// `addr`: depending on the domain, a virtual address of this process or an offset in the registered
    /// range.
    pub address: u64,
    /// The length in bytes.
    pub length: u64,
    /// `key`
    pub key: u64,
}

impl Registration {
    /// The rung by which the buffer was registered.
    pub fn rung(&self) -> Rung {
        self.rung
    }

    /// The failures of the better rungs.
    pub fn attempts(&self) -> &[Attempt] {
        &self.attempts
    }

    /// The registered range.
    pub fn range(&self) -> &BufferRange {
        &self.region.kept().range
    }

    /// The registered generation of the buffer; `None` if the buffer has none visible to this process.
    pub fn generation(&self) -> Option<u64> {
        self.standing.generation()
    }

    /// Whether the registration is still valid for the buffer.
    ///
    /// # Errors
    /// [`RdmaError::Stale`].
    pub fn check(&self) -> Result<(), RdmaError> {
        let buffer = self.range().buffer();
        match self.standing.staleness(buffer, self.rung) {
            None => Ok(()),
            Some(why) => Err(RdmaError::Stale {
                buffer: buffer.name().to_owned(),
                why,
            }),
        }
    }

    /// The arguments for this process's work on part of the range; `offset` is relative to the range. For a
    /// [staged](Rung::Staged) registration, call [`Registration::refresh`] before work that reads it, and
    /// [`Registration::deliver`] after work that has written it.
    ///
    /// # Errors [`BufferError::OutOfRange`] if the bytes are not all inside, [`RdmaError::Stale`].
    pub fn local(&self, offset: u64, length: u64) -> Result<Local, RdmaError> {
        self.inside(offset, length)?;
        self.check()?;
        Ok(Local {
            pointer: self.region.address(offset),
            length: length as usize,
            descriptor: self.region.descriptor(),
        })
    }

    /// The arguments for a peer's work on part of the range, in the same way. For a staged registration, the
    /// peer must tell when it has written or is about to read.
    ///
    /// # Errors As [`Registration::local`], and [`RdmaError::NotShared`] if the range was registered for this
    /// process only.
    pub fn remote(&self, offset: u64, length: u64) -> Result<Remote, RdmaError> {
        self.inside(offset, length)?;
        self.check()?;
        let key = self.region.key().filter(|_| self.remote.is_some());
        let key = key.ok_or_else(|| RdmaError::NotShared {
            buffer: self.range().buffer().name().to_owned(),
        })?;
        let address = match self.virtual_addresses {
            true => self.region.address(offset).expose_provenance() as u64,
            false => offset,
        };
        Ok(Remote {
            address,
            length,
            key,
        })
    }

    /// Makes written bytes visible in the buffer: for a staged registration the CPU copies them, for others
    /// nothing is needed. Returns the number of bytes copied. `offset` is relative to the range.
    ///
    /// # Errors [`BufferError::OutOfRange`], or the error of accessing the buffer.
    pub fn deliver(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        self.copy(offset, length, Staging::deliver)
    }

    /// Makes the buffer's bytes available to reads; the reverse of [`Registration::deliver`].
    ///
    /// # Errors
    /// As [`Registration::deliver`].
    pub fn refresh(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        self.copy(offset, length, Staging::refresh)
    }

    fn copy(
        &self,
        offset: u64,
        length: u64,
        step: impl FnOnce(&mut Staging, u64, u64) -> Result<(), BufferError>,
    ) -> Result<u64, RdmaError> {
        self.inside(offset, length)?;
        let memory = self.region.kept().memory.lock();
        match &mut *unpoisoned(memory) {
            Memory::Mapped(_) => Ok(0),
            Memory::Staged(staging) => {
                step(staging, offset, length)?;
                Ok(length)
            }
        }
    }

    fn inside(&self, offset: u64, length: u64) -> Result<(), BufferError> {
        self.range().slice(offset, length).map(drop)
    }
}
