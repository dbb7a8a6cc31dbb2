//! A registration of a buffer with a card, and its end. `ladder` finds the way to register; `import::ladder`
//! has what it shares with other importers.

mod ladder;

use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, Weak};

use crate::error::RdmaError;
use crate::ladder::{Staging, Standing};
use crate::rung::{Attempt, Rung};
use crate::sys::domain::Domain;
use crate::sys::verbs::{Keys, Local, Region};
use crate::wire::Remote;
use peerbuf::buffer::{Access, BufferRange};
use peerbuf::error::BufferError;
use peerbuf::plan::Plan;
use peerbuf_core::unpoisoned;

/// A user of registrations whose work can be stopped: a connection.
pub(crate) trait Work: Send + Sync {
    /// Stops all work. On return the card accesses no region of it any more.
    fn stop(&self);
}

/// A memory region: a range of a buffer, registered with a card. Clones refer to the same region. After the
/// last clone is dropped and no work is in flight, the card can no longer access the buffer.
#[doc(alias = "MemoryRegion")]
#[doc(alias = "ibv_mr")]
#[derive(Clone)]
pub struct Registration {
    inner: Arc<Inner>,
}

struct Inner {
    /// `None` after [`Registration::end`].
    held: RwLock<Option<Arc<Held>>>,
    /// The connections that use it, for this process's work or the peer's.
    lines: Mutex<Vec<Weak<dyn Work>>>,
    /// The publisher wants the buffer back: work in flight may end, but no new work starts.
    wanted: AtomicBool,
    name: String,
    offset: u64,
    length: u64,
    writable: bool,
    domain: Domain,
    remote: Option<Access>,
    keys: Keys,
    rung: Rung,
    attempts: Vec<Attempt>,
    plan: Plan,
    standing: Standing,
}

/// Keeps the buffer in use.
struct Held {
    // First field, so dropped first: after that no card accesses the other fields.
    region: Region,
    staging: Option<Mutex<Staging>>,
    range: BufferRange,
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("domain", &self.inner.domain)
            .field("buffer", &self.inner.name)
            .field("offset", &self.inner.offset)
            .field("length", &self.inner.length)
            .field("rung", &self.inner.rung)
            .finish_non_exhaustive()
    }
}

impl Registration {
    /// The rung by which the buffer was registered.
    pub fn rung(&self) -> Rung {
        self.inner.rung
    }

    /// The failures of the better rungs.
    pub fn attempts(&self) -> &[Attempt] {
        &self.inner.attempts
    }

    /// The buffer's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The range's offset in the buffer, in bytes.
    pub fn offset(&self) -> u64 {
        self.inner.offset
    }

    /// The range's length in bytes.
    pub fn len(&self) -> u64 {
        self.inner.length
    }

    /// Always false: an empty range cannot be registered.
    pub fn is_empty(&self) -> bool {
        self.inner.length == 0
    }

    /// Whether local work may write the range.
    pub fn is_writable(&self) -> bool {
        self.inner.writable
    }

    /// The registered range. It keeps the buffer in use, like any other handle.
    ///
    /// # Errors [`RdmaError::Stale`] after [`Registration::end`].
    pub fn range(&self) -> Result<BufferRange, RdmaError> {
        Ok(self.hold()?.held.range.clone())
    }

    /// Deregisters the range now, even with work in flight.
    ///
    /// Connections that use it are stopped ([`Connection::is_stopped`](crate::Connection::is_stopped)); their
    /// requests complete as [cut off](crate::WorkError::cut_off), and the peer's requests fail with an error.
    /// On return no card can access the buffer, and this registration does not keep it in use. Clones and
    /// pieces are [stale](RdmaError::Stale).
    ///
    /// Dropping the last clone deregisters, too, once no work on it is in flight, and stops no connection. A
    /// connection whose peer has the key must be announced with
    /// [`Connection::shows`](crate::Connection::shows), or it is not stopped.
    ///
    /// In a forked child it does nothing.
    #[doc(alias = "ibv_dereg_mr")]
    pub fn end(&self) {
        if self.domain().here().is_err() {
            return;
        }
        let mut held = unpoisoned(self.inner.held.write());
        let Some(held) = held.take() else { return };
        let lines = std::mem::take(&mut *self.lines());
        for line in lines.iter().filter_map(Weak::upgrade) {
            line.stop();
        }
        drop(held);
    }

    /// Refuses new work from now on.
    pub(crate) fn want_back(&self) {
        self.inner.wanted.store(true, Ordering::Release);
    }

    /// True after [`Registration::want_back`].
    pub(crate) fn is_wanted(&self) -> bool {
        self.inner.wanted.load(Ordering::Acquire)
    }

    /// A weak handle, to see whether the registration is still in use.
    pub(crate) fn downgrade(&self) -> Weaker {
        Weaker(Arc::downgrade(&self.inner))
    }

    fn lines(&self) -> MutexGuard<'_, Vec<Weak<dyn Work>>> {
        unpoisoned(self.inner.lines.lock())
    }

    fn stale(&self, why: &str) -> RdmaError {
        RdmaError::Stale {
            buffer: self.inner.name.clone(),
            why: why.to_owned(),
        }
    }

    /// Keeps it from being ended. Not reentrant: deadlocks if another thread waits in [`Registration::end`].
    pub(crate) fn hold(&self) -> Result<Holding<'_>, RdmaError> {
        // Before the lock, which a forked child may find locked forever.
        self.domain().here()?;
        let guard = self.inner.held.read();
        let guard = unpoisoned(guard);
        match &*guard {
            Some(held) => Ok(Holding {
                held: Arc::clone(held),
                _guard: guard,
                of: self,
            }),
            None => Err(self.stale("it was ended to return the buffer")),
        }
    }

    /// As [`Registration::hold`]; also records the connection, which a later end stops.
    pub(crate) fn use_it(&self, line: &Weak<dyn Work>) -> Result<Holding<'_>, RdmaError> {
        let held = self.hold()?;
        let mut lines = self.lines();
        if !lines.iter().any(|known| known.ptr_eq(line)) {
            lines.retain(|known| known.strong_count() > 0);
            lines.push(line.clone());
        }
        Ok(held)
    }

    /// The protection domain of the region.
    pub fn domain(&self) -> &Domain {
        &self.inner.domain
    }

    /// The local key, for local work requests.
    pub fn lkey(&self) -> u32 {
        self.inner.keys.local
    }

    /// The remote key, for the peer's work requests.
    pub fn rkey(&self) -> u32 {
        self.inner.keys.remote
    }

    /// libibverbs's `struct ibv_mr *`, owned by this registration. `None` if the kernel made the region
    /// without the library ([`Rung::DmaBufByKernel`]), and after [`Registration::end`].
    #[doc(alias = "ibv_mr")]
    pub fn as_raw(&self) -> Option<NonNull<c_void>> {
        self.hold().ok()?.held.region.raw()
    }

    /// A scatter/gather element for part of the range, for the program's own work requests; `offset` is
    /// relative to the range. The element's address is an offset in the buffer, on every rung.
    ///
    /// For a [staged](Rung::Staged) registration, call [`Registration::refresh`] before work that reads it
    /// and [`Registration::deliver`] after work that has written it. Dropping or ending the registration
    /// makes work in flight fail.
    ///
    /// # Errors [`BufferError::OutOfRange`] if the bytes are not all inside, [`RdmaError::Stale`].
    #[doc(alias = "ibv_sge")]
    pub fn sge(&self, offset: u64, length: u32) -> Result<Sge, RdmaError> {
        self.inside(offset, length.into())?;
        self.check()?;
        Ok(Sge {
            address: self.inner.offset + offset,
            length,
            lkey: self.inner.keys.local,
        })
    }

    /// The registered generation of the buffer; `None` if the buffer has none visible to this process.
    pub fn generation(&self) -> Option<u64> {
        self.inner.standing.generation()
    }

    /// The path of the bytes between the buffer and the card. For a software card and device memory the CPU
    /// copies the bytes, even from a registered dma-buf.
    pub fn plan(&self) -> &Plan {
        &self.inner.plan
    }

    /// The address, length and key by which the peer accesses the whole range.
    ///
    /// # Errors [`RdmaError::NotShared`] if the range was registered for local work only.
    pub fn remote(&self) -> Result<Remote, RdmaError> {
        let Inner {
            name,
            offset,
            length,
            remote,
            keys,
            ..
        } = &*self.inner;
        if remote.is_none() {
            let buffer = name.clone();
            return Err(RdmaError::NotShared { buffer });
        }
        Ok(Remote::new(*offset, *length, keys.remote))
    }

    /// Part of the range, for local work; `offset` is relative to the range.
    ///
    /// # Errors [`BufferError::OutOfRange`] if the bytes are not all inside.
    pub fn slice(&self, offset: u64, length: u64) -> Result<Piece, BufferError> {
        self.inside(offset, length)?;
        Ok(Piece {
            registration: self.clone(),
            offset,
            length,
        })
    }

    fn inside(&self, offset: u64, length: u64) -> Result<(), BufferError> {
        let size = self.inner.length;
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(BufferError::OutOfRange {
                object: self.inner.name.clone(),
                offset,
                length,
                size,
            }),
        }
    }

    /// Whether the registration is still valid for the buffer. Every request is checked before it reaches the
    /// card.
    ///
    /// # Errors [`RdmaError::Stale`]; [`RdmaError::Inherited`] in a forked child.
    pub fn check(&self) -> Result<(), RdmaError> {
        if self.is_wanted() {
            return Err(self.stale("the publisher wants it back"));
        }
        let held = self.hold()?;
        let Inner { rung, standing, .. } = &*self.inner;
        match standing.staleness(held.held.range.buffer(), *rung) {
            None => Ok(()),
            Some(why) => Err(self.stale(&why)),
        }
    }

    /// Makes the peer's writes visible in the buffer: for a staged registration the CPU copies them, for
    /// others nothing is needed. Returns the number of bytes copied. `offset` is relative to the range.
    ///
    /// # Errors [`BufferError::OutOfRange`], or the error of accessing the buffer; [`RdmaError::Stale`] after
    /// [`Registration::end`], which discards the bytes.
    pub fn deliver(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        Ok(self.hold()?.deliver(offset, length)?)
    }

    /// Makes the buffer's bytes available to the peer's reads; the reverse of [`Registration::deliver`].
    ///
    /// # Errors
    /// As [`Registration::deliver`].
    pub fn refresh(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        Ok(self.hold()?.refresh(offset, length)?)
    }
}

/// A scatter/gather element (`struct ibv_sge`): local memory in a work request. Valid as long as the
/// registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sge {
    /// `addr`
    pub address: u64,
    /// `length`, in bytes.
    pub length: u32,
    /// `lkey`
    pub lkey: u32,
}

/// A weak handle of a registration, which does not keep the buffer in use.
pub(crate) struct Weaker(Weak<Inner>);

impl Weaker {
    /// The registration, if a handle still exists.
    pub(crate) fn upgrade(&self) -> Option<Registration> {
        let inner = self.0.upgrade()?;
        Some(Registration { inner })
    }
}

/// A guard that keeps a registration from being ended.
pub(crate) struct Holding<'r> {
    // Dropped before the guard, so that a waiter in `end` finds no other handle.
    held: Arc<Held>,
    _guard: RwLockReadGuard<'r, Option<Arc<Held>>>,
    of: &'r Registration,
}

impl Holding<'_> {
    /// The scatter/gather element of a piece. The caller has checked the length.
    pub(crate) fn local(&self, piece: &Piece) -> Local {
        Local {
            iova: self.of.inner.offset + piece.offset,
            length: piece.length as u32,
            key: self.held.region.keys().local,
        }
    }

    /// See [`Registration::refresh`].
    pub(crate) fn refresh(&self, offset: u64, length: u64) -> Result<u64, BufferError> {
        self.copy(offset, length, Staging::refresh)
    }

    /// See [`Registration::deliver`].
    pub(crate) fn deliver(&self, offset: u64, length: u64) -> Result<u64, BufferError> {
        self.copy(offset, length, Staging::deliver)
    }

    fn copy(
        &self,
        offset: u64,
        length: u64,
        step: impl FnOnce(&mut Staging, u64, u64) -> Result<(), BufferError>,
    ) -> Result<u64, BufferError> {
        self.of.inside(offset, length)?;
        let Some(staging) = &self.held.staging else {
            return Ok(0);
        };
        let mut staging = unpoisoned(staging.lock());
        step(&mut staging, offset, length)?;
        Ok(length)
    }
}

/// Part of a registration, for local work.
#[derive(Debug, Clone)]
#[doc(alias = "ibv_sge")]
#[doc(alias = "Sge")]
pub struct Piece {
    registration: Registration,
    offset: u64,
    length: u64,
}

impl Piece {
    /// The registration.
    pub fn registration(&self) -> &Registration {
        &self.registration
    }

    /// The offset in the registered range, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True if the piece is empty.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}
