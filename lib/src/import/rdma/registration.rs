//! Giving a card a buffer: the ladder, and what holds a registration together.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Duration;

use super::connection::Line;
use super::{Card, Remote};
use crate::buffer::{Access, Buffer, BufferRange, Kind, Mapping};
use crate::errno::Errno;
use crate::error::{BufferError, RdmaError, SystemError};
use crate::export::memfd;
use crate::export::peerbuf::{Device, State, Watch};
use crate::plan::{Path, Plan, Reason, ReasonCode};
use crate::sys::verbs::{self, DmaBufRequest, Keys, Local, Region};

/// The ways in which a card can be given a buffer, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rung {
    /// The dma-buf, by `ibv_reg_dmabuf_mr`.
    DmaBufByLibrary,
    /// The dma-buf, by the kernel's own method (`UVERBS_METHOD_REG_DMABUF_MR`).
    DmaBufByKernel,
    /// The pages of the memfd behind the buffer, by `ibv_reg_mr`.
    SharedMemory,
    /// System memory of its own, which the processor copies from and to.
    Staged,
}

impl Rung {
    /// All, the best first.
    pub const ALL: [Rung; 4] = [
        Rung::DmaBufByLibrary,
        Rung::DmaBufByKernel,
        Rung::SharedMemory,
        Rung::Staged,
    ];

    /// True where the card is given the dma-buf itself.
    pub fn is_dma_buf(self) -> bool {
        matches!(self, Rung::DmaBufByLibrary | Rung::DmaBufByKernel)
    }

    /// The name used in reports, in kebab case.
    pub fn as_str(self) -> &'static str {
        match self {
            Rung::DmaBufByLibrary => "dma-buf-by-library",
            Rung::DmaBufByKernel => "dma-buf-by-kernel",
            Rung::SharedMemory => "shared-memory",
            Rung::Staged => "staged",
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Who said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layer {
    /// This crate, without asking anybody: the buffer lacks what the rung needs.
    Buffer,
    /// libibverbs, or the card's part of it.
    Library,
    /// The kernel's uverbs.
    Uverbs,
    /// The card's driver.
    Driver,
    /// The exporter of the dma-buf.
    Exporter,
    /// The kernel's memory management.
    Memory,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Layer::Buffer => "the buffer",
            Layer::Library => "the card's part of libibverbs",
            Layer::Uverbs => "uverbs",
            Layer::Driver => "the card's driver",
            Layer::Exporter => "the dma-buf's exporter",
            Layer::Memory => "the kernel's memory management",
        })
    }
}

/// A rung that did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Which.
    pub rung: Rung,
    /// Who said no.
    pub layer: Layer,
    /// Which kind of reason, for programs.
    pub code: ReasonCode,
    /// What was answered; `None` where nobody was asked.
    pub errno: Option<Errno>,
    /// What was tried, on what, and what came back; for people.
    pub evidence: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.rung, self.evidence, self.layer)
    }
}

/// A range of a buffer that a card can use. Clones are the same; when the last is dropped, and no
/// work on it is in flight, the card cannot reach the buffer any more.
#[derive(Clone)]
pub struct Registration {
    inner: Arc<Inner>,
}

struct Inner {
    /// `None` once it was ended.
    held: RwLock<Option<Arc<Held>>>,
    /// The connections that use it, on this end's behalf or the other's.
    lines: Mutex<Vec<Weak<Line>>>,
    /// It is wanted back: work in flight may end, and none is begun.
    wanted: AtomicBool,
    name: String,
    offset: u64,
    length: u64,
    writable: bool,
    card: Card,
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

/// The memory that the card has in place of the buffer, and the buffer.
struct Staging {
    memory: Mapping,
    /// Where in the memory the range begins: its place in a page is that of the range.
    lead: u64,
    buffer: Mapping,
}

/// How a registration knows that its buffer is not what it was.
struct Standing {
    /// Of the module's buffers: who to ask, who tells, and the generation that was registered.
    module: Option<(Device, Watch, u64)>,
    /// Of one that is lent: which generation was.
    lease: Option<u64>,
    /// Found stale before, which does not change any more.
    stale: AtomicBool,
}

impl Standing {
    /// To be called before the card is given the buffer, so that no change goes by unseen.
    fn of(buffer: &Buffer) -> Standing {
        let provenance = buffer.provenance();
        let module = match (provenance.kind, provenance.device, buffer.dmabuf()) {
            (Kind::Bar, Some(device), Some(dmabuf)) => (|| {
                let device = Device::open(device).ok()?;
                let watch = device.watch(dmabuf).ok()?;
                let generation = device.status(dmabuf).ok()?.generation;
                Some((device, watch, generation))
            })(),
            _ => None,
        };
        Standing {
            module,
            lease: buffer.lease().map(|lease| lease.generation),
            stale: AtomicBool::new(false),
        }
    }

    fn generation(&self) -> Option<u64> {
        let module = self.module.as_ref().map(|(_, _, generation)| *generation);
        self.lease.or(module)
    }

    /// Why it is stale; `None` while it is not.
    fn staleness(&self, buffer: &Buffer, rung: Rung) -> Option<String> {
        if self.stale.load(Ordering::Relaxed) {
            return Some("it was found to be so before".into());
        }
        let why = self.look(buffer, rung);
        if why.is_some() {
            self.stale.store(true, Ordering::Relaxed);
        }
        why
    }

    fn look(&self, buffer: &Buffer, rung: Rung) -> Option<String> {
        if self.lease.is_some() && !buffer.lease().is_some_and(|lease| lease.current) {
            return Some("the publisher does not lend it any more".into());
        }
        let (device, watch, registered) = self.module.as_ref()?;
        // Without an event nothing has happened, which takes one system call to see.
        if watch.wait(Duration::ZERO).is_ok_and(|events| events == 0) {
            return None;
        }
        let status = match device.status(buffer.dmabuf()?) {
            Ok(status) => status,
            Err(error) => return Some(error.to_string()),
        };
        match status.state {
            State::Live => {}
            State::Revoked => return Some("the buffer is revoked".into()),
            _ => return Some("the buffer's device is gone".into()),
        }
        // Copies go by the buffer's own mapping, which follows it when it moves.
        (rung.is_dma_buf() && status.generation != *registered).then(|| {
            format!(
                "the buffer is at generation {}, and {registered} was registered",
                status.generation
            )
        })
    }
}

impl Card {
    /// Gives the card a range, in the best way that works. `remote` is what the other end may do
    /// with it; with `None` only this end's own work uses it. This end's work reads it always, and
    /// writes it where the buffer is writable.
    ///
    /// # Errors
    /// [`RdmaError::Buffer`] for writing from afar what is not writable, [`RdmaError::Empty`] for a
    /// range without bytes, and [`RdmaError::NotRegistered`] with each rung's failure.
    pub fn register(
        &self,
        range: &BufferRange,
        remote: Option<Access>,
    ) -> Result<Registration, RdmaError> {
        self.register_by(range, remote, &Rung::ALL)
    }

    /// As [`Card::register`], by these rungs only, in their order.
    ///
    /// # Errors
    /// As [`Card::register`].
    pub fn register_by(
        &self,
        range: &BufferRange,
        remote: Option<Access>,
        rungs: &[Rung],
    ) -> Result<Registration, RdmaError> {
        let buffer = range.buffer();
        if range.is_empty() {
            let buffer = buffer.name().to_owned();
            return Err(RdmaError::Empty { buffer });
        }
        if remote.is_some_and(Access::writes) && !buffer.is_writable() {
            let object = buffer.name().to_owned();
            let wanted = "write";
            return Err(BufferError::Access { object, wanted }.into());
        }
        let mut access = 0;
        if buffer.is_writable() {
            access |= verbs::LOCAL_WRITE;
        }
        if remote.is_some_and(Access::writes) {
            access |= verbs::REMOTE_WRITE;
        }
        if remote.is_some_and(Access::reads) {
            access |= verbs::REMOTE_READ;
        }
        let standing = Standing::of(buffer);
        let mut attempts = Vec::new();
        for &rung in rungs {
            match self.try_rung(range, access, rung) {
                Ok((region, staging)) => {
                    name_the_layer(&mut attempts, Some(rung));
                    let inner = Inner {
                        lines: Mutex::default(),
                        wanted: AtomicBool::new(false),
                        name: buffer.name().to_owned(),
                        offset: range.offset(),
                        length: range.len(),
                        writable: buffer.is_writable(),
                        card: self.clone(),
                        remote,
                        keys: region.keys(),
                        rung,
                        // What a card has does not move, so this stays true.
                        plan: plan(buffer, self, rung, &attempts),
                        attempts,
                        standing,
                        held: RwLock::new(Some(Arc::new(Held {
                            region,
                            staging: staging.map(Mutex::new),
                            range: range.clone(),
                        }))),
                    };
                    return Ok(Registration {
                        inner: Arc::new(inner),
                    });
                }
                Err(attempt) => attempts.push(attempt),
            }
        }
        name_the_layer(&mut attempts, None);
        Err(RdmaError::NotRegistered {
            card: self.name().to_owned(),
            buffer: buffer.name().to_owned(),
            attempts,
        })
    }

    fn try_rung(
        &self,
        range: &BufferRange,
        access: u32,
        rung: Rung,
    ) -> Result<(Region, Option<Staging>), Attempt> {
        let buffer = range.buffer();
        let domain = &self.inner.domain;
        let lacks = |code, evidence: &str| Attempt {
            rung,
            layer: Layer::Buffer,
            code,
            errno: None,
            evidence: evidence.to_owned(),
        };
        let refused = |call, layer: fn(Errno) -> Layer, code| {
            move |errno| Attempt {
                rung,
                layer: layer(errno),
                code,
                errno: Some(errno),
                evidence: SystemError::new(call, buffer.name(), errno).to_string(),
            }
        };
        let no_mapping = |error: &dyn fmt::Display| Attempt {
            layer: Layer::Exporter,
            ..lacks(ReasonCode::NotMappable, &error.to_string())
        };
        match rung {
            Rung::DmaBufByLibrary | Rung::DmaBufByKernel => {
                let Some(dmabuf) = buffer.dmabuf() else {
                    let evidence = "it is memory alone, without a dma-buf over it";
                    return Err(lacks(ReasonCode::NoDmaBuf, evidence));
                };
                let request = DmaBufRequest {
                    dmabuf: dmabuf.as_fd(),
                    offset: range.offset(),
                    length: range.len(),
                    iova: range.offset(),
                    access,
                };
                let code = match buffer.provenance().kind.is_device_memory() {
                    true => ReasonCode::ImporterNotPeer,
                    false => ReasonCode::AttachRefused,
                };
                // 'Not supported' is also what an exporter answers that does not serve the driver. The
                // same request for what is no dma-buf tells them apart: no exporter is asked then.
                let nobodys = DmaBufRequest {
                    dmabuf: domain.uverbs(),
                    ..request
                };
                let by_exporter = |attempt: Attempt, again: Option<Errno>| match attempt.errno {
                    Some(Errno::OPNOTSUPP) if again.is_some_and(|e| e != Errno::OPNOTSUPP) => {
                        let layer = Layer::Exporter;
                        Attempt { layer, ..attempt }
                    }
                    _ => attempt,
                };
                if rung == Rung::DmaBufByKernel {
                    let call = "ioctl(UVERBS_METHOD_REG_DMABUF_MR)";
                    let region = Region::by_kernel(domain, &request);
                    let region = region.map_err(refused(call, layer_in_kernel, code));
                    let region = region.map_err(|attempt| {
                        by_exporter(attempt, Region::by_kernel(domain, &nobodys).err())
                    });
                    return Ok((region?, None));
                }
                let Some(region) = Region::by_library(domain, &request) else {
                    let evidence = "libibverbs has no ibv_reg_dmabuf_mr (rdma-core 34 has)";
                    let layer = Layer::Library;
                    return Err(Attempt {
                        layer,
                        ..lacks(code, evidence)
                    });
                };
                let call = "ibv_reg_dmabuf_mr";
                let region = region.map_err(refused(call, layer_by_library, code));
                let region = region.map_err(|attempt| {
                    let again = Region::by_library(domain, &nobodys);
                    by_exporter(attempt, again.and_then(Result::err))
                });
                Ok((region?, None))
            }
            Rung::SharedMemory => {
                if buffer.host_memory().is_none() {
                    let evidence = "no memory of the host is behind it";
                    return Err(lacks(ReasonCode::NotHostMemory, evidence));
                }
                let mapping = range
                    .map(whole_access(buffer))
                    .map_err(|error| no_mapping(&error))?;
                let window = mapping.map().window(0, range.len() as usize);
                let region = Region::of_pages(domain, window, range.offset(), access);
                let code = ReasonCode::NotPinnable;
                Ok((
                    region.map_err(refused("ibv_reg_mr", |_| Layer::Memory, code))?,
                    None,
                ))
            }
            Rung::Staged => {
                let page = rustix::param::page_size() as u64;
                let lead = range.offset() % page;
                let staging = || -> Result<Staging, RdmaError> {
                    let memory = memfd::export("RDMA staging", range.len() + lead)
                        .map_err(|error| RdmaError::Export(Box::new(error)))?;
                    Ok(Staging {
                        memory: memory.whole().map(Access::ReadWrite)?,
                        lead,
                        buffer: range.map(whole_access(buffer))?,
                    })
                };
                let staging = staging().map_err(|error| no_mapping(&error))?;
                let map = staging.memory.map();
                let window = map.window(lead as usize, range.len() as usize);
                let region = Region::of_pages(domain, window, range.offset(), access);
                let code = ReasonCode::NotPinnable;
                let region = region.map_err(refused("ibv_reg_mr", |_| Layer::Memory, code))?;
                Ok((region, Some(staging)))
            }
        }
    }
}

/// The most that a mapping of the buffer can be used for.
fn whole_access(buffer: &Buffer) -> Access {
    if buffer.is_writable() {
        Access::ReadWrite
    } else {
        Access::Read
    }
}

fn layer_by_library(errno: Errno) -> Layer {
    match errno {
        Errno::OPNOTSUPP => Layer::Library,
        other => layer_in_kernel(other),
    }
}

fn layer_in_kernel(errno: Errno) -> Layer {
    match errno {
        // uverbs' answers for a driver without it. (That it was not the exporter is found out by the
        // caller.)
        Errno::PROTONOSUPPORT | Errno::OPNOTSUPP => Layer::Driver,
        // ENOTTY: a kernel, or a node, without such methods; EACCES, EBADF
        Errno(25) | Errno(13) | Errno(9) => Layer::Uverbs,
        // ENOMEM
        Errno(12) => Layer::Driver,
        // What an exporter answers that cannot serve the driver, or not any more.
        _ => Layer::Exporter,
    }
}

/// 'Not supported' from the library comes from the card's part of it or from the kernel, with one
/// number for both. The kernel's own answer, when it was asked next, tells them apart.
fn name_the_layer(attempts: &mut [Attempt], taken: Option<Rung>) {
    let by_kernel = attempts
        .iter()
        .find(|attempt| attempt.rung == Rung::DmaBufByKernel)
        .map(|attempt| attempt.layer);
    if taken == Some(Rung::DmaBufByKernel) {
        return;
    }
    for attempt in attempts {
        if attempt.rung == Rung::DmaBufByLibrary
            && attempt.errno == Some(Errno::OPNOTSUPP)
            && by_kernel == Some(Layer::Driver)
        {
            attempt.layer = Layer::Driver;
        }
    }
}

fn plan(buffer: &Buffer, card: &Card, rung: Rung, attempts: &[Attempt]) -> Plan {
    if rung == Rung::Staged {
        let failed = attempts.iter().map(|attempt| {
            let path = match attempt.rung {
                Rung::SharedMemory | Rung::Staged => Path::SharedHostMemory,
                _ if buffer.provenance().kind.is_host_memory() => Path::SharedHostMemory,
                _ => Path::PeerToPeer,
            };
            Reason::new(path, attempt.code, attempt.to_string())
        });
        return Plan {
            path: Path::StagedCopy,
            reasons: failed.collect(),
        };
    }
    let plan = Plan::in_place(buffer);
    if plan.path != Path::PeerToPeer || !card.is_software() {
        return plan;
    }
    let software = format!(
        "{} is software: the processor carries the bytes between the buffer and its packets",
        card.name()
    );
    let host = "the bytes are in device memory";
    Plan {
        path: Path::StagedCopy,
        reasons: vec![
            Reason::new(Path::PeerToPeer, ReasonCode::NotADevice, software),
            Reason::new(Path::SharedHostMemory, ReasonCode::NotHostMemory, host),
        ],
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("card", &self.inner.card)
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
    /// stopped ([`Connection::is_stopped`](super::Connection::is_stopped)), their work comes back as
    /// [cut off](super::WorkError::cut_off), and the other end's ends there with an error. When this
    /// returns no card reaches the buffer, and nothing of this registration keeps it in use. Clones
    /// and pieces are [stale](RdmaError::Stale).
    ///
    /// Dropping the last clone does the same where nothing is in flight, and needs no connection to
    /// be stopped. A connection whose other end has the key must be known for this
    /// ([`Connection::shows`](super::Connection::shows)).
    pub fn end(&self) {
        let mut held = self
            .inner
            .held
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(held) = held.take() else { return };
        let lines = std::mem::take(&mut *self.lines());
        for line in lines.iter().filter_map(Weak::upgrade) {
            line.stop();
        }
        drop(held);
    }

    /// From now on no work is begun.
    pub(super) fn want_back(&self) {
        self.inner.wanted.store(true, Ordering::Release);
    }

    /// True once [`Registration::want_back`] was called.
    pub(super) fn is_wanted(&self) -> bool {
        self.inner.wanted.load(Ordering::Acquire)
    }

    /// To look whether it is still in use.
    pub(super) fn downgrade(&self) -> Weaker {
        Weaker(Arc::downgrade(&self.inner))
    }

    fn lines(&self) -> MutexGuard<'_, Vec<Weak<Line>>> {
        self.inner
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn stale(&self, why: &str) -> RdmaError {
        RdmaError::Stale {
            buffer: self.inner.name.clone(),
            why: why.to_owned(),
        }
    }

    /// Keeps it from being ended. Not to be called by who has it already: somebody waiting to end it
    /// would stop both.
    fn hold(&self) -> Result<Holding<'_>, RdmaError> {
        let guard = self.inner.held.read();
        let guard = guard.unwrap_or_else(PoisonError::into_inner);
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
    pub(super) fn use_it(&self, line: &Weak<Line>) -> Result<Holding<'_>, RdmaError> {
        let held = self.hold()?;
        let mut lines = self.lines();
        if !lines.iter().any(|known| known.ptr_eq(line)) {
            lines.retain(|known| known.strong_count() > 0);
            lines.push(line.clone());
        }
        Ok(held)
    }

    /// The card.
    pub fn card(&self) -> &Card {
        &self.inner.card
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
        self.hold()?.copy(offset, length, |staging, at, chunk| {
            let memory = staging.memory.begin_cpu_access(Access::Read)?;
            memory.read_at(staging.lead + at, chunk)?;
            memory.end()?;
            let mut buffer = staging.buffer.begin_cpu_access(Access::Write)?;
            buffer.write_at(at, chunk)?;
            buffer.end()
        })
    }

    /// Brings the buffer's bytes to where the other end reads them; the reverse of
    /// [`Registration::deliver`].
    ///
    /// # Errors
    /// As [`Registration::deliver`].
    pub fn refresh(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        self.hold()?.refresh(offset, length)
    }
}

/// A registration that nobody keeps in use by this.
pub(super) struct Weaker(Weak<Inner>);

impl Weaker {
    /// The registration, if anybody still has it.
    pub(super) fn upgrade(&self) -> Option<Registration> {
        let inner = self.0.upgrade()?;
        Some(Registration { inner })
    }
}

/// A registration that is not ended for as long as this is there.
pub(super) struct Holding<'r> {
    // Before the guard, so that whoever waits to end it finds no other handle.
    held: Arc<Held>,
    _guard: RwLockReadGuard<'r, Option<Arc<Held>>>,
    of: &'r Registration,
}

impl Holding<'_> {
    /// A piece as a request names it. The caller has checked the length.
    pub(super) fn local(&self, piece: &Piece) -> Local {
        Local {
            iova: self.of.inner.offset + piece.offset,
            length: piece.length as u32,
            key: self.held.region.keys().local,
        }
    }

    /// See [`Registration::refresh`].
    pub(super) fn refresh(&self, offset: u64, length: u64) -> Result<u64, RdmaError> {
        self.copy(offset, length, |staging, at, chunk| {
            let buffer = staging.buffer.begin_cpu_access(Access::Read)?;
            buffer.read_at(at, chunk)?;
            buffer.end()?;
            let mut memory = staging.memory.begin_cpu_access(Access::Write)?;
            memory.write_at(staging.lead + at, chunk)?;
            memory.end()
        })
    }

    fn copy(
        &self,
        offset: u64,
        length: u64,
        step: impl Fn(&mut Staging, u64, &mut [u8]) -> Result<(), BufferError>,
    ) -> Result<u64, RdmaError> {
        const CHUNK: u64 = 256 << 10;
        self.of.inside(offset, length)?;
        let Some(staging) = &self.held.staging else {
            return Ok(0);
        };
        let mut staging: MutexGuard<'_, Staging> =
            staging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; length.min(CHUNK) as usize];
        let mut done = 0;
        while done < length {
            let now = (length - done).min(CHUNK) as usize;
            step(&mut staging, offset + done, &mut bytes[..now])?;
            done += now as u64;
        }
        Ok(length)
    }
}

/// Part of a registration, for this end's work.
#[derive(Debug, Clone)]
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
