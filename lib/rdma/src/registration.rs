//! What a card was given: the registration, what holds it together, and its end. How the card gets
//! the buffer is in `ladder`, and what that shares with other importers in `import::ladder`.

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

/// What works on registrations: a connection.
pub(crate) trait Work: Send + Sync {
    /// Ends all of it. When this returns the card is done with every region.
    fn stop(&self);
}

/// A range of a buffer that a card can use: a memory region. Clones are the same; when the last is dropped, and no
/// work on it is in flight, the card cannot reach the buffer any more.
#[doc(alias = "MemoryRegion")]
#[doc(alias = "ibv_mr")]
#[derive(Clone)]
pub struct Registration {
    inner: Arc<Inner>,
}

struct Inner {
    /// `None` once it was ended.
    held: RwLock<Option<Arc<Held>>>,
    /// The connections that use it, on this end's behalf or the other's.
    lines: Mutex<Vec<Weak<dyn Work>>>,
    /// It is wanted back: work in flight may end, and none is begun.
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

/// What keeps the buffer in use.
struct Held {
    // First, so that it is dropped first: from then on no card reaches what comes after it.
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
    /// How the card was given the buffer.
    pub fn rung(&self) -> Rung {
        self.inner.rung
    }

    /// What each better way failed with.
    pub fn attempts(&self) -> &[Attempt] {
        &self.inner.attempts
    }

    /// The buffer's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Where the range begins, in bytes from the buffer's beginning.
    pub fn offset(&self) -> u64 {
        self.inner.offset
    }

    /// The range's length in bytes.
    pub fn len(&self) -> u64 {
        self.inner.length
    }

    /// Never: a range without bytes is not registered.
    pub fn is_empty(&self) -> bool {
        self.inner.length == 0
    }

    /// Whether this end's work may write it.
    pub fn is_writable(&self) -> bool {
        self.inner.writable
    }

    /// What is registered. Like any other handle it keeps the buffer in use.
    ///
    /// # Errors
    /// [`RdmaError::Stale`] when it was ended.
    pub fn range(&self) -> Result<BufferRange, RdmaError> {
        Ok(self.hold()?.held.range.clone())
    }

    /// Takes the range from the card now, also with work in flight: connections that use it are
    /// stopped ([`Connection::is_stopped`](crate::Connection::is_stopped)), their work comes back as
    /// [cut off](crate::WorkError::cut_off), and the other end's ends there with an error. When this
    /// returns no card reaches the buffer, and nothing of this registration keeps it in use. Clones
    /// and pieces are [stale](RdmaError::Stale).
    ///
    /// Dropping the last clone does the same where nothing is in flight, and needs no connection to
    /// be stopped. A connection whose other end has the key must be known for this
    /// ([`Connection::shows`](crate::Connection::shows)).
    #[doc(alias = "ibv_dereg_mr")]
    pub fn end(&self) {
        let mut held = unpoisoned(self.inner.held.write());
        let Some(held) = held.take() else { return };
        let lines = std::mem::take(&mut *self.lines());
        for line in lines.iter().filter_map(Weak::upgrade) {
            line.stop();
        }
        drop(held);
    }

    /// From now on no work is begun.
    pub(crate) fn want_back(&self) {
        self.inner.wanted.store(true, Ordering::Release);
    }

    /// True once [`Registration::want_back`] was called.
    pub(crate) fn is_wanted(&self) -> bool {
        self.inner.wanted.load(Ordering::Acquire)
    }

    /// To look whether it is still in use.
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
        let guard = self.inner.held.read();
        let guard = unpoisoned(guard);
        match &*guard {
            Some(held) => Ok(Holding {
                held: Arc::clone(held),
                _guard: guard,
                of: self,
            }),
            None => Err(self.stale("it was ended, for the buffer to be given back")),
        }
    }

    /// The same, for a connection, which is stopped when it is ended later.
    pub(crate) fn use_it(&self, line: &Weak<dyn Work>) -> Result<Holding<'_>, RdmaError> {
        let held = self.hold()?;
        let mut lines = self.lines();
        if !lines.iter().any(|known| known.ptr_eq(line)) {
            lines.retain(|known| known.strong_count() > 0);
            lines.push(line.clone());
        }
        Ok(held)
    }

    /// The protection domain that it is in.
    pub fn domain(&self) -> &Domain {
        &self.inner.domain
    }

    /// The local key, for the program's own work requests.
    pub fn lkey(&self) -> u32 {
        self.inner.keys.local
    }

    /// The remote key, for the other end's work requests.
    pub fn rkey(&self) -> u32 {
        self.inner.keys.remote
    }

    /// The `struct ibv_mr *` of libibverbs, which this registration deregisters. `None` where the kernel made the
    /// region without the library ([`Rung::DmaBufByKernel`]), and when it was ended.
    #[doc(alias = "ibv_mr")]
    pub fn as_raw(&self) -> Option<NonNull<c_void>> {
        self.hold().ok()?.held.region.raw()
    }

    /// Part of it as a scatter/gather element of the program's own work requests; `offset` counts from the range's
    /// beginning. Addresses are offsets in the buffer, whatever the rung.
    ///
    /// With a [staged](Rung::Staged) registration, call [`Registration::refresh`] before work that reads it, and
    /// [`Registration::deliver`] after work that has written it. Work that is in flight when the registration is
    /// dropped or ended fails.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] when the bytes are not all inside, [`RdmaError::Stale`].
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

    /// The number of the buffer's generation that was registered; `None` where it has none that
    /// this process can see.
    pub fn generation(&self) -> Option<u64> {
        self.inner.standing.generation()
    }

    /// How the bytes get between the buffer and the card. Where the card is software and the
    /// buffer device memory, the processor carries them, also from a registered dma-buf.
    pub fn plan(&self) -> &Plan {
        &self.inner.plan
    }

    /// What the other end needs to know to use the whole range.
    ///
    /// # Errors
    /// [`RdmaError::NotShared`] for one that was registered for this end only.
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

    /// Part of it, for this end's work; `offset` counts from the range's beginning.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] when the bytes are not all inside.
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

    /// Whether the buffer is still what was registered. Work is refused before the card sees it
    /// when it is not.
    ///
    /// # Errors
    /// [`RdmaError::Stale`].
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

    /// Brings what the other end has written to its place in the buffer: of a staged registration
    /// the processor copies it, of any other nothing is to be done. Returns the bytes copied.
    /// `offset` counts from the range's beginning.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`], or what access to the buffer failed with; [`RdmaError::Stale`] when
    /// it was ended, and the bytes with it.
    pub fn deliver(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        Ok(self.hold()?.deliver(offset, length)?)
    }

    /// Brings the buffer's bytes to where the other end reads them; the reverse of
    /// [`Registration::deliver`].
    ///
    /// # Errors
    /// As [`Registration::deliver`].
    pub fn refresh(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        Ok(self.hold()?.refresh(offset, length)?)
    }
}

/// A scatter/gather element (`struct ibv_sge`): memory of this end, as a work request names it. Good for as long as
/// the registration is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sge {
    /// `addr`
    pub address: u64,
    /// `length`, in bytes.
    pub length: u32,
    /// `lkey`
    pub lkey: u32,
}

/// A registration that nobody keeps in use by this.
pub(crate) struct Weaker(Weak<Inner>);

impl Weaker {
    /// The registration, if anybody still has it.
    pub(crate) fn upgrade(&self) -> Option<Registration> {
        let inner = self.0.upgrade()?;
        Some(Registration { inner })
    }
}

/// A registration that is not ended for as long as this is there.
pub(crate) struct Holding<'r> {
    // Before the guard, so that whoever waits to end it finds no other handle.
    held: Arc<Held>,
    _guard: RwLockReadGuard<'r, Option<Arc<Held>>>,
    of: &'r Registration,
}

impl Holding<'_> {
    /// A piece as a request names it. The caller has checked the length.
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

/// Part of a registration, for this end's work.
#[derive(Debug, Clone)]
#[doc(alias = "ibv_sge")]
#[doc(alias = "Sge")]
pub struct Piece {
    registration: Registration,
    offset: u64,
    length: u64,
}

impl Piece {
    /// What it is part of.
    pub fn registration(&self) -> &Registration {
        &self.registration
    }

    /// Where it begins, in bytes from the registered range's beginning.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True when it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}
