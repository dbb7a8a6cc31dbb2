//! libfabric: a program that has an engine over it registers peerbuf's buffers in its domain
//! (feature `libfabric`).
//!
//! This is no fabric. The program opens fabric, domain and endpoints, posts the work and waits for
//! it, by whichever bindings it has; peerbuf is given the domain, and gives for a range of a buffer
//! what that work names: address, key and descriptor. [`Domain::register`] does it in the best way that
//! works, and the [`Registration`] says which, and what each better one failed with:
//!
//! | rung | the provider uses | needs |
//! |---|---|---|
//! | [`Rung::DmaBufByLibrary`] | the dma-buf (`FI_MR_DMABUF`) | a provider that does |
//! | [`Rung::SharedMemory`] | the pages of the memfd behind the buffer: no copy | a memfd |
//! | [`Rung::Staged`] | memory of its own, as much as the range; the processor copies | a mapping |
//!
//! A provider is believed to use a dma-buf only if it refuses what is none. `tcp` reports success for
//! any number, and never looks whose descriptor it is. `docs/libfabric.md` has what each was seen to
//! do.
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
//! As [with cards](crate#when-the-buffer-moves): what is registered is pinned or copied, and does not move.
//! [`Registration::local`] and [`Registration::remote`] refuse a buffer that was revoked, moved or
//! given back ([`RdmaError::Stale`]); register it again then. Of work in flight the program hears from
//! its own completions.
//!
//! # Which binding
//!
//! The declarations are this crate's own (`sys/libfabric`): five structures, compared with the header
//! in the lab. Of the crates, `ofi-libfabric-sys` 0.1 (the libfabric project's) runs bindgen over the
//! installed headers, or builds the library: it needs clang, and libfabric's headers, wherever this
//! crate is built, and links it. `libfabric-sys` 0.0.2 carries a libfabric of
//! before `FI_MR_DMABUF`, and builds it. Neither is needed to call what a domain brings along.

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

/// `FI_VERSION(1, 20)`, the first with `FI_MR_DMABUF`.
const DMABUF_SINCE: u32 = 1 << 16 | 20;

/// The rungs there are, the best first.
pub const RUNGS: [Rung; 3] = [Rung::DmaBufByLibrary, Rung::SharedMemory, Rung::Staged];

/// Where this crate takes each field of libfabric's structures to be, and each constant: name in C and
/// number. For the lab's comparison with the header.
#[doc(hidden)]
pub fn layout() -> Vec<(&'static str, u64)> {
    sys::layout()
}

impl Domain {
    /// Registers a range, in the best way that works. `remote` is what peers may do with it; with
    /// `None` only this process's own work uses it. This process's work reads it always, and writes it
    /// where the buffer is writable.
    ///
    /// `key` is the key to have, which must be free; a domain with `FI_MR_PROV_KEY` chooses one
    /// itself and does not look at it.
    ///
    /// # Errors
    /// [`RdmaError::Buffer`] for writing from afar what is not writable, [`RdmaError::Empty`] for a
    /// range without bytes, [`RdmaError::Mismatch`] for a domain with `FI_MR_ENDPOINT` and no endpoint
    /// ([`Domain::for_endpoint`]), or with keys that are no numbers (`FI_MR_RAW`) where peers are to
    /// use it, and [`RdmaError::NotRegistered`] with each rung's failure.
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

    /// As [`Domain::register`], by these of the [`RUNGS`] only, in their order.
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

    /// The access to ask for, where this request can be made at all.
    fn allowed(&self, range: &BufferRange, remote: Option<Access>) -> Result<u64, RdmaError> {
        registrable(range, remote)?;
        if self.has(sys::MR_ENDPOINT) && !self.handle().has_endpoint() {
            let name = self.name();
            let what = format!(
                "a domain of {name}, whose regions are an endpoint's (FI_MR_ENDPOINT), and no \
                 endpoint: see Domain::for_endpoint"
            );
            return Err(RdmaError::Mismatch { what });
        }
        if self.has(sys::MR_RAW) && remote.is_some() {
            let name = self.name();
            let what = format!(
                "a domain of {name}, whose keys are no numbers (FI_MR_RAW), and memory for peers"
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
            let evidence = "it is memory alone, without a dma-buf over it";
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
        // First with what is no descriptor. A provider that takes that does not look, and what it
        // answers to both is no exporter's answer. (The kernel's to this is EBADF.)
        let nobodys = self.register_nobodys(access, key);
        if nobodys.is_ok() {
            let evidence = format!(
                "{CALL} on {}: it takes what is no descriptor, too",
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

    /// Registers a page of ordinary memory as a dma-buf without a descriptor, which is to fail.
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
    /// `FI_SEND` and so on, and the key.
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

/// What a region is made of.
pub(crate) struct Kept {
    memory: Mutex<Memory>,
    /// It stays in use.
    range: BufferRange,
}

enum Memory {
    /// The buffer's own bytes.
    Mapped(Mapping),
    /// Copies of them.
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

/// A range of a buffer that a provider can use. Dropping it closes the region, and gives the buffer
/// back; where the provider refuses that, both stay as they are until the process ends.
pub struct Registration {
    region: Region<Kept>,
    /// Peers address the region as this process does, and not from 0.
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

/// What this process's own work names: the arguments of `fi_send`, `fi_write` and others. Good for as
/// long as the registration is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// `buf`. No Rust reference may be made of it: others change the bytes.
    pub pointer: *mut c_void,
    /// `len`, in bytes.
    pub length: usize,
    /// `desc`
    pub descriptor: *mut c_void,
}

/// What a peer's work names: `addr` and `key` of `fi_write`, `fi_read` and others. Good for as long as
/// the registration is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// `addr`: as the domain has it, an address of this process or one that counts from the
    /// registered range's beginning.
    pub address: u64,
    /// In bytes.
    pub length: u64,
    /// `key`
    pub key: u64,
}

impl Registration {
    /// How the provider was given the buffer.
    pub fn rung(&self) -> Rung {
        self.rung
    }

    /// What each better way failed with.
    pub fn attempts(&self) -> &[Attempt] {
        &self.attempts
    }

    /// What is registered.
    pub fn range(&self) -> &BufferRange {
        &self.region.kept().range
    }

    /// The number of the buffer's generation that was registered; `None` where it has none that
    /// this process can see.
    pub fn generation(&self) -> Option<u64> {
        self.standing.generation()
    }

    /// Whether the buffer is still what was registered.
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

    /// Part of it for this process's own work; `offset` counts from the range's beginning. Of a
    /// [staged](Rung::Staged) registration, call [`Registration::refresh`] before work that reads it,
    /// and [`Registration::deliver`] after work that has written it.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] when the bytes are not all inside, [`RdmaError::Stale`].
    pub fn local(&self, offset: u64, length: u64) -> Result<Local, RdmaError> {
        self.inside(offset, length)?;
        self.check()?;
        Ok(Local {
            pointer: self.region.address(offset),
            length: length as usize,
            descriptor: self.region.descriptor(),
        })
    }

    /// Part of it for a peer's work; likewise. Of a staged registration the peer says when it has
    /// written or is about to read.
    ///
    /// # Errors
    /// As [`Registration::local`], and [`RdmaError::NotShared`] for what was registered for this
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

    /// Brings what was written to its place in the buffer: of a staged registration the processor
    /// copies it, of any other nothing is to be done. Returns the bytes copied. `offset` counts from
    /// the range's beginning.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`], or what access to the buffer failed with.
    pub fn deliver(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        self.copy(offset, length, Staging::deliver)
    }

    /// Brings the buffer's bytes to where they will be read; the reverse of
    /// [`Registration::deliver`].
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
