//! The side that borrows buffers.
//!
//! A separate thread answers the publisher, so a program that is busy or idle still meets the
//! deadline if it drops its leases. Dropping the last handle of a buffer returns the generation
//! ([`Return`]).
//!
//! `fork` copies a subscriber without its thread, and perhaps in the middle of a change. Every
//! access to a [`Session`]'s state therefore checks first whether this process made the
//! session. A forked child's copy is left alone.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::backing::Placement;
use super::channel::{Channel, open_buffer};
use super::policy::Grant;
use super::wire::{self, Entry, Farewell, Message, Note};
use crate::buffer::{Buffer, LastHandle, LeaseState};
use crate::error::{ShareError, SystemError};
use crate::sys::fork::Process;
use peerbuf_core::Deadline;
use peerbuf_core::unpoisoned;

/// Maximum number of messages that the thread reads before it answers them.
const TOGETHER: usize = 64;

/// A process's connection to a [`Publisher`](super::Publisher), and the buffers that it
/// borrows.
///
/// Dropping the subscriber returns the buffers that are not on lease, and ends the connection.
/// The remaining leases stay valid memory, but the publisher no longer waits for them.
///
/// A subscriber works only in the process that made it ([`ShareError::Inherited`]). In a forked
/// child, the subscriber does not answer the publisher, and dropping it does not end the
/// connection.
#[derive(Debug)]
pub struct Subscriber {
    session: Arc<Session>,
    thread: Option<JoinHandle<()>>,
}

/// One generation of a buffer, for as long as this process uses it.
///
/// A lease dereferences to a [`Buffer`]: it can be cloned, mapped and attached. The publisher
/// gets the generation back when all clones, mappings and attachments are gone.
///
/// The publisher lends to one process and does not know of its children. A forked child
/// inherits none of the mappings, and can neither map nor use the buffer
/// ([`BufferError::Inherited`](crate::error::BufferError::Inherited)).
#[derive(Debug, Clone)]
pub struct Lease {
    buffer: Buffer,
    terms: Arc<Terms>,
    session: Arc<Session>,
}

/// The state of one generation of one buffer.
#[derive(Debug)]
struct Terms {
    generation: u64,
    grant: Grant,
    placement: Placement,
    /// The publisher's deadline for the return, once the publisher has asked for it.
    wanted: OnceLock<Instant>,
}

#[derive(Debug)]
pub(super) struct Session {
    owner: Process,
    channel: Channel,
    /// Eventfd that wakes the thread.
    wake: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
    /// Number of threads that wait on `changed`; notifying nobody would cost a system call. The
    /// count rises with the state locked, so a thread that has changed the state sees all
    /// earlier waiters.
    waiting: AtomicUsize,
    /// Notification for async waiters.
    #[cfg(feature = "tokio")]
    news: tokio::sync::Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Offers as received, not yet unpacked.
    parcels: Vec<Parcel>,
    /// Number of offers received so far.
    arrived: u64,
    /// The available buffers, by id. A buffer is absent while it moves.
    offers: BTreeMap<u64, Box<Offer>>,
    outbox: VecDeque<(Message, Note)>,
    /// True while more records are about to follow and should share one message.
    gathering: bool,
    ended: Option<ShareError>,
    /// True once the application drops the subscriber.
    closing: bool,
}

/// The entries of an offer, and their descriptors. A publisher with many buffers sends many
/// offers at once. The subscriber unpacks them after the burst, when a caller needs the list.
#[derive(Debug)]
struct Parcel {
    records: Box<[u8]>,
    descriptors: Vec<OwnedFd>,
}

/// One generation of a buffer, as offered. Most programs use few of very many offers, so each
/// offer stays as received, with its fields checked, until a caller asks for the buffer.
#[derive(Debug)]
struct Offer {
    entry: Entry,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// No caller has asked for the buffer, and the descriptors are unchecked.
    Packed([Option<OwnedFd>; 2]),
    Open(Buffer, Arc<Terms>),
    /// The descriptors do not match the publisher's description.
    Unusable(ShareError),
}

/// The last handle of a generation. Dropping it returns the generation.
#[derive(Debug)]
struct Return {
    session: Weak<Session>,
    borrower: Process,
    note: Note,
}

impl LastHandle for Return {
    fn lease(&self) -> Option<LeaseState> {
        let session = self.session.upgrade();
        Some(LeaseState {
            generation: self.note.generation,
            current: session.is_some_and(|session| {
                session.check_owner().is_ok() && {
                    let state = session.lock();
                    state.ended.is_none() && !state.closing
                }
            }),
        })
    }

    fn borrower(&self) -> Option<Process> {
        Some(self.borrower)
    }
}

impl Drop for Return {
    fn drop(&mut self) {
        // A forked child's copy: the process that borrowed the generation may still use it.
        if !self.borrower.is_current() {
            return;
        }
        if let Some(session) = self.session.upgrade() {
            session.post(Message::Released, self.note);
        }
    }
}

impl Subscriber {
    /// Connects to the publisher that listens at `path`.
    ///
    /// # Errors
    /// As [`Channel::connect`], and [`Subscriber::new`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Subscriber, ShareError> {
        Subscriber::new(Channel::connect(path)?)
    }

    /// Takes a connection to a publisher.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`], or the call that failed.
    pub fn new(channel: Channel) -> Result<Subscriber, ShareError> {
        channel.send_message(&wire::encode::<Note>(Message::Hello, &[]), &[])?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let failed = |call| move |errno| SystemError::new(call, "a subscriber", errno);
        let wake = eventfd(0, flags).map_err(failed("eventfd"))?;
        let session = Arc::new(Session {
            owner: Process::current(),
            channel,
            wake,
            state: Mutex::default(),
            changed: Condvar::new(),
            waiting: AtomicUsize::new(0),
            #[cfg(feature = "tokio")]
            news: tokio::sync::Notify::new(),
        });
        let served = Arc::clone(&session);
        let thread = std::thread::Builder::new()
            .name("peerbuf subscriber".into())
            .spawn(move || served.serve())
            .map_err(|error| {
                let errno = crate::errno::Errno::from(&error);
                SystemError::new("clone", "a subscriber's thread", errno)
            })?;
        Ok(Subscriber {
            session,
            thread: Some(thread),
        })
    }

    /// Borrows the buffer that is published as `name`. Waits until the publisher offers the
    /// buffer: for the first time, or again after a move.
    ///
    /// # Errors
    /// [`ShareError::Inherited`]; [`ShareError::PeerGone`] if the publisher has gone;
    /// [`ShareError::CutOff`] if the publisher has closed the connection;
    /// [`ShareError::Malformed`] and [`ShareError::Truncated`] if the publisher sent a message
    /// that breaks the protocol; [`ShareError::Buffer`] if the descriptors do not match the
    /// offer.
    pub fn buffer(&self, name: &str) -> Result<Lease, ShareError> {
        self.lease(name, None)
    }

    /// Like [`Subscriber::buffer`], with a time limit.
    ///
    /// # Errors
    /// The same, and [`ShareError::TimedOut`].
    pub fn buffer_within(&self, name: &str, limit: Duration) -> Result<Lease, ShareError> {
        self.lease(name, Some(limit))
    }

    /// The names of the buffers that are offered at this moment.
    pub fn names(&self) -> Vec<String> {
        if self.session.check_owner().is_err() {
            return Vec::new();
        }
        let state = self.session.sorted();
        let offers = state.offers.values();
        offers.map(|offer| offer.entry.name().to_owned()).collect()
    }

    /// The reason why the connection ended; `None` while it is open.
    pub fn ended(&self) -> Option<ShareError> {
        if let Err(inherited) = self.session.check_owner() {
            return Some(inherited);
        }
        self.session.sorted().ended.clone()
    }

    fn lease(&self, name: &str, limit: Option<Duration>) -> Result<Lease, ShareError> {
        let session = &self.session;
        session.check_owner()?;
        let deadline = Deadline::after_some(limit);
        let mut state = session.lock();
        loop {
            if let Some(lease) = session.take_lease(&mut state, name)? {
                return Ok(lease);
            }
            if let Some(limit) = limit.filter(|_| deadline.is_over()) {
                let what = format!("an offer of {name}");
                return Err(ShareError::TimedOut { what, limit });
            }
            state = session.wait(state, deadline);
        }
    }
}

#[cfg(feature = "tokio")]
impl Subscriber {
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// A lease, if the buffer is offered at this moment.
    pub(super) fn try_buffer(&self, name: &str) -> Result<Option<Lease>, ShareError> {
        self.session.check_owner()?;
        self.session.take_lease(&mut self.session.lock(), name)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        if self.session.check_owner().is_err() {
            // The thread does not exist here, and its state may be in the middle of a change.
            std::mem::forget((self.thread.take(), Arc::clone(&self.session)));
            return;
        }
        let offers = {
            let mut state = self.session.sorted();
            state.closing = true;
            std::mem::take(&mut state.offers)
        };
        for offer in offers.into_values() {
            offer.give_back(&self.session);
        }
        self.session.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Leases keep the session alive, and so the socket.
        self.session.channel.shut_down();
    }
}

impl Lease {
    /// The number of the generation. Every move raises it.
    pub fn generation(&self) -> u64 {
        self.terms.generation
    }

    /// True if the lease allows writing.
    pub fn is_writable(&self) -> bool {
        self.terms.grant == Grant::ReadWrite && self.buffer.is_writable()
    }

    /// The placement of the bytes when the publisher offered them.
    pub fn placement(&self) -> Placement {
        self.terms.placement
    }

    #[cfg(feature = "tokio")]
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// The time by which the publisher wants the generation back; `None` if it has not asked.
    /// Check it now and then during long work. In a forked child of the borrower the time is
    /// now.
    pub fn wanted_back(&self) -> Option<Instant> {
        if self.session.check_owner().is_err() {
            return Some(Instant::now());
        }
        self.terms.wanted.get().copied()
    }

    /// Waits up to `limit` until the publisher wants the generation back or has gone.
    pub fn wait_until_wanted(&self, limit: Duration) -> Option<Instant> {
        if self.session.check_owner().is_err() {
            return self.wanted_back();
        }
        let deadline = Deadline::after(limit);
        let mut state = self.session.lock();
        while self.wanted_back().is_none() && state.ended.is_none() && !deadline.is_over() {
            state = self.session.wait(state, deadline);
        }
        self.wanted_back()
    }
}

impl Deref for Lease {
    type Target = Buffer;

    fn deref(&self) -> &Buffer {
        &self.buffer
    }
}

impl State {
    fn unpack(&mut self, parcel: Parcel) -> Result<(), ShareError> {
        let mut descriptors = parcel.descriptors.into_iter();
        for (entry, count) in wire::entries(&parcel.records)? {
            if self.offers.contains_key(&entry.id) {
                let what =
                    "a buffer is offered again before it was invalidated or withdrawn".into();
                return Err(ShareError::Malformed { what });
            }
            let mut own = [None, None];
            own.iter_mut()
                .zip(descriptors.by_ref().take(count))
                .for_each(|(place, descriptor)| *place = Some(descriptor));
            let content = Content::Packed(own);
            let offer = Box::new(Offer { entry, content });
            self.offers.insert(offer.entry.id, offer);
        }
        Ok(())
    }
}

impl Offer {
    /// The lease. The first call checks the descriptors.
    fn open(&mut self, session: &Arc<Session>) -> Result<Lease, ShareError> {
        if let Content::Packed(descriptors) = &mut self.content {
            let descriptors = std::mem::take(descriptors);
            self.content = match unpack(&self.entry, descriptors, session) {
                Ok((buffer, terms)) => Content::Open(buffer, Arc::new(terms)),
                Err(error) => Content::Unusable(error),
            };
        }
        match &self.content {
            Content::Open(buffer, terms) => Ok(Lease {
                buffer: buffer.clone(),
                terms: Arc::clone(terms),
                session: Arc::clone(session),
            }),
            Content::Unusable(error) => Err(error.clone()),
            Content::Packed(_) => Err(ShareError::Malformed {
                what: "it has no descriptor".into(),
            }),
        }
    }

    /// Drops the session's own handle. The caller must not hold the state's lock: this handle
    /// may be the last one.
    fn give_back(self, session: &Session) {
        let note = |value| Note::new(self.entry.id, self.entry.generation, value);
        match self.content {
            Content::Open(buffer, _) => drop(buffer),
            Content::Packed(descriptors) => {
                drop(descriptors);
                session.post(Message::Released, note(0));
            }
            Content::Unusable(_) => session.post(Message::Released, note(1)),
        }
    }
}

fn unpack(
    entry: &Entry,
    descriptors: [Option<OwnedFd>; 2],
    session: &Arc<Session>,
) -> Result<(Buffer, Terms), ShareError> {
    let checked = entry.check()?;
    let buffer = open_buffer(&checked.what, &mut descriptors.into_iter().flatten())?;
    let borrower = session.owner;
    let session = Arc::downgrade(session);
    let note = Note::new(checked.id, checked.generation, 0);
    let terms = Terms {
        generation: checked.generation,
        grant: checked.grant,
        placement: checked.what.placement,
        wanted: OnceLock::new(),
    };
    let buffer = buffer.with_last_handle(Box::new(Return {
        session,
        borrower,
        note,
    }));
    Ok((buffer, terms))
}

#[cfg(feature = "tokio")]
impl Session {
    pub(super) fn has_ended(&self) -> bool {
        self.check_owner().is_err() || self.lock().ended.is_some()
    }

    /// Calls `ask` after each change until it returns an answer.
    pub(super) async fn changed_until<T>(&self, mut ask: impl FnMut() -> Option<T>) -> T {
        loop {
            // A change after this line ends the wait.
            let mut changed = std::pin::pin!(self.news.notified());
            changed.as_mut().enable();
            if let Some(answer) = ask() {
                return answer;
            }
            changed.await;
        }
    }
}

impl Session {
    /// Must run before any access to the state: in a forked child the lock may be held forever.
    fn check_owner(&self) -> Result<(), ShareError> {
        if self.owner.is_current() {
            return Ok(());
        }
        let what = "a subscriber";
        Err(ShareError::Inherited { what })
    }

    /// A lease of the offer with this name.
    fn take_lease(
        self: &Arc<Session>,
        state: &mut State,
        name: &str,
    ) -> Result<Option<Lease>, ShareError> {
        self.unpack(state);
        if let Some(error) = &state.ended {
            return Err(error.clone());
        }
        let mut offers = state.offers.values_mut();
        let offer = offers.find(|offer| offer.entry.name() == name);
        offer.map(|offer| offer.open(self)).transpose()
    }

    fn tell(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.changed.notify_all();
        }
        #[cfg(feature = "tokio")]
        self.news.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }

    /// Like [`Session::lock`], with all offers unpacked.
    fn sorted(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        self.unpack(&mut state);
        state
    }

    /// Checks each received offer. A malformed offer ends the connection.
    fn unpack(&self, state: &mut State) {
        for parcel in std::mem::take(&mut state.parcels) {
            if let Err(error) = state.unpack(parcel) {
                state.ended.get_or_insert(error);
                self.channel.shut_down();
            }
        }
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>, deadline: Deadline) -> MutexGuard<'s, State> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let state = match deadline.instant() {
            None => unpoisoned(self.changed.wait(state)),
            Some(_) => {
                let waited = self.changed.wait_timeout(state, deadline.left());
                unpoisoned(waited).0
            }
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        state
    }

    fn wake(&self) {
        // The write fails only if the counter is full of wake-ups already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Sends a note to the publisher, at once or when the socket has room.
    fn post(&self, message: Message, note: Note) {
        let mut state = self.lock();
        state.outbox.push_back((message, note));
        if !state.gathering && !self.flush(&mut state) {
            self.wake();
        }
    }

    /// Sends the outbox; false if the socket had no room for all of it.
    fn flush(&self, state: &mut State) -> bool {
        while let Some(&(message, _)) = state.outbox.front() {
            let same = state.outbox.iter().take_while(|(kind, _)| *kind == message);
            let notes: Vec<Note> = same
                .map(|(_, note)| *note)
                .take(wire::MAX_RECORDS)
                .collect();
            match self.channel.try_send(&wire::encode(message, &notes), &[]) {
                Ok(true) => drop(state.outbox.drain(..notes.len())),
                Ok(false) => return false,
                // The thread learns the reason; nobody is left to be told.
                Err(_) => state.outbox.clear(),
            }
        }
        true
    }

    /// Answers the publisher until either side ends the connection.
    fn serve(self: &Arc<Session>) {
        let mut message = vec![0; wire::MAX_MESSAGE];
        let ended = loop {
            match self.turn(&mut message) {
                Ok(true) => {}
                Ok(false) => break ShareError::PeerGone,
                Err(error) => break error,
            }
        };
        let mut state = self.lock();
        let said = state.ended.take();
        // A farewell says more than the end of the connection that follows it.
        state.ended = said.or(Some(ended));
        // Offers that are not on lease are of no further use.
        let unused = (
            std::mem::take(&mut state.parcels),
            std::mem::take(&mut state.offers),
        );
        drop(state);
        drop(unused);
        self.channel.shut_down();
        self.tell();
    }

    /// Waits for work and does it; false if the application has dropped the subscriber.
    fn turn(self: &Arc<Session>, message: &mut [u8]) -> Result<bool, ShareError> {
        let mut interest = PollFlags::IN;
        {
            let mut state = self.lock();
            let all_sent = self.flush(&mut state);
            if state.closing {
                return Ok(false);
            }
            if !all_sent {
                interest |= PollFlags::OUT;
            }
        }
        let mut waiting = [
            PollFd::new(&self.channel, interest),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        match poll(&mut waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(SystemError::new("poll", "a unix socket", errno).into()),
        }
        if !waiting[1].revents().is_empty() {
            // The wake-up counts, not their number.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        // Messages that arrived together are answered together.
        for _ in 0..TOGETHER {
            let mut descriptors = Vec::new();
            match self.channel.try_receive(message, &mut descriptors)? {
                Some(bytes) => self.handle(&message[..bytes], descriptors)?,
                None => break,
            }
        }
        Ok(true)
    }

    fn handle(
        self: &Arc<Session>,
        message: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), ShareError> {
        let wrong = |what: String| Err(ShareError::Malformed { what });
        let (kind, records) = wire::open(message)?;
        let offers = matches!(kind, Message::Offer | Message::LastOffer);
        if !offers && !descriptors.is_empty() {
            return wrong(format!("{kind:?} came with descriptors"));
        }
        match kind {
            Message::Offer | Message::LastOffer => {
                let announced = wire::announced(records)?;
                if announced != descriptors.len() {
                    return wrong(format!(
                        "{} descriptors came with an offer, {announced} were announced",
                        descriptors.len()
                    ));
                }
                let mut state = self.lock();
                state.parcels.push(Parcel {
                    records: records.into(),
                    descriptors,
                });
                state.arrived += 1;
                if kind == Message::LastOffer {
                    let arrived = Note::new(state.arrived, 0, 0);
                    state.outbox.push_back((Message::Accepted, arrived));
                    self.flush(&mut state);
                }
                drop(state);
                self.tell();
                Ok(())
            }
            Message::Invalidate | Message::Withdraw => {
                let notes = wire::notes(records)?;
                self.lock().gathering = true;
                let result = notes.into_iter().try_for_each(|note| self.give_back(note));
                // The next turn sends the gathered notes.
                self.lock().gathering = false;
                self.tell();
                result
            }
            Message::Farewell => {
                let notes = wire::notes(records)?;
                let why = Farewell::explain(notes.first().map_or(0, |note| note.value));
                let error = ShareError::CutOff { why };
                self.lock().ended = Some(error.clone());
                Err(error)
            }
            _ => wrong(format!("a publisher does not send {kind:?}")),
        }
    }

    fn give_back(&self, note: Note) -> Result<(), ShareError> {
        let mut state = self.sorted();
        let offer = state.offers.remove(&note.id);
        drop(state);
        let Some(offer) = offer.filter(|offer| offer.entry.generation == note.generation) else {
            let what = "a buffer is invalidated or withdrawn that was not offered".into();
            return Err(ShareError::Malformed { what });
        };
        if let Content::Open(_, terms) = &offer.content {
            let limit = Duration::from_millis(note.value.into());
            // The deadline is set once for each generation: an absent offer cannot be asked
            // back again.
            let _ = terms.wanted.set(Instant::now() + limit);
        }
        offer.give_back(self);
        Ok(())
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, generation {}", self.buffer, self.generation())
    }
}
