//! The side that owns buffers: offers them, takes them back, moves them.
//!
//! One thread does everything: nothing happens but in a call of [`Publisher`]. The state of each
//! subscriber says what it is still to be told, and [`Publisher::pump`] tells it as far as there
//! is room in its socket, so that one that does not read holds nobody up.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::fs::{Mode, OFlags};
use slotmap::{Key, KeyData, SecondaryMap, SlotMap};

use super::backing::{Backing, Order, Placement};
use super::channel::{self, Channel, Listener, MAX_DESCRIPTORS, Peer};
use super::policy::{Grant, Policy, SameUser};
use super::wire::{self, Message, Note};
use crate::buffer::{Access, Buffer};
use crate::errno::Errno;
use crate::error::{BufferError, ShareError, SystemError};

/// A subscriber is sent no further offers while this many descriptors wait for it. The kernel
/// limits what is under way for a user as a whole, so one that does not read must not use it up.
const WINDOW: usize = 3 * MAX_DESCRIPTORS;

/// After so many descriptors a subscriber is asked what has arrived, so that the window moves on
/// before it is used up.
const ASK: usize = MAX_DESCRIPTORS;

/// How many messages each subscriber may have waiting when its time is up: it accepts and gives
/// back, of a few buffers.
const ROUNDS_AFTER: usize = 8;

/// How long until the kernel is asked again whether it takes more descriptors.
const RETRY: Duration = Duration::from_millis(10);

/// The listener's number among what is waited for; subscribers count from 1.
const LISTENER: u64 = 0;

/// The number of what only ends the wait.
#[cfg(feature = "tokio")]
const WAKE: u64 = u64::MAX;

slotmap::new_key_type! {
    /// A buffer that was published. Never used twice.
    pub struct BufferId;
}

impl BufferId {
    /// Its number in messages.
    fn number(self) -> u64 {
        self.data().as_ffi()
    }

    /// The buffer that a message means. There may be none: it is only looked up.
    fn from_number(number: u64) -> BufferId {
        KeyData::from_ffi(number).into()
    }
}

/// A connected subscriber. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriberId(u64);

impl fmt::Display for SubscriberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "subscriber {}", self.0)
    }
}

/// Why a subscriber was cut off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CutOff {
    /// It did not give a buffer back in time.
    #[error("it did not give {name} back within {limit:?}")]
    Late {
        /// What the buffer is published as.
        name: String,
        /// How long it had.
        limit: Duration,
    },
    /// What it sent breaks the protocol.
    #[error("{0}")]
    Rubbish(ShareError),
    /// Nothing could be sent to it.
    #[error("{0}")]
    Unreachable(ShareError),
}

/// Something that happened to a [`Publisher`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A subscriber is there and speaks the protocol.
    Joined {
        /// Which one.
        subscriber: SubscriberId,
        /// The process, as the kernel vouches for it.
        peer: Peer,
    },
    /// A subscriber closed its connection, or died.
    Left {
        /// Which one.
        subscriber: SubscriberId,
        /// The buffers that it had not given back.
        held: Vec<BufferId>,
    },
    /// A subscriber was cut off.
    CutOff {
        /// Which one.
        subscriber: SubscriberId,
        /// The buffers that it had not given back, and whose current generation it can still
        /// reach until they move.
        held: Vec<BufferId>,
        /// Why.
        why: CutOff,
    },
    /// A subscriber did not get a buffer that the policy meant for it, or could not use it.
    NotOffered {
        /// Which one.
        subscriber: SubscriberId,
        /// Which buffer.
        buffer: BufferId,
        /// Why.
        why: String,
    },
    /// Somebody tried to connect, and could not.
    NotAccepted {
        /// Why.
        why: ShareError,
    },
}

/// What a migration did, and how long each of its parts took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migration {
    /// The generation that it made.
    pub generation: u64,
    /// Where the bytes are now.
    pub placement: Placement,
    /// Telling the subscribers.
    pub announce: Duration,
    /// Until the last of them had given the old generation back or was cut off.
    pub drain: Duration,
    /// Making the new generation, once the devices that worked on the old one are done: the copy, or
    /// the kernel's move.
    pub transfer: Duration,
    /// Offering the new generation.
    pub offer: Duration,
    /// Subscribers that gave the old generation back.
    pub released: usize,
    /// Those that were cut off for it, or left meanwhile.
    pub lost: Vec<SubscriberId>,
    /// The new generation was made unreachable from the old, because somebody may still have it.
    pub isolated: bool,
}

impl Migration {
    /// The time from beginning to end.
    pub fn total(&self) -> Duration {
        self.announce + self.drain + self.transfer + self.offer
    }
}

/// Ways to break the guarantees on purpose, for tests of what should notice.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Moves do not wait for subscribers.
    SkipDrain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Offered to everybody who may have it.
    Live,
    /// Being taken back; nobody is offered it.
    Leaving,
    /// A move failed, and the old memory cannot be offered again. The next one may succeed.
    Withheld,
}

struct Published {
    /// What a subscriber that may write is sent, ready to be copied.
    entry: wire::Entry,
    name: String,
    backing: Box<dyn Backing>,
    generation: u64,
    state: State,
    /// Subscribers that were sent this generation and have not given it back.
    holders: usize,
    /// One that never gave it back may still reach this generation.
    tainted: bool,
    /// The memory again, open for reading only. Made when it is first needed.
    read_only: OnceCell<OwnedFd>,
}

/// What is between a subscriber and a buffer that it may have to be offered, or holds.
#[derive(Debug, Clone, Copy)]
enum Standing {
    /// It waits in the connection's queue.
    Unseen,
    Held(Holding),
}

#[derive(Debug, Clone, Copy)]
struct Holding {
    generation: u64,
    /// The offer that it came with, counted from 1.
    offer: u64,
}

struct Connection {
    channel: Channel,
    peer: Peer,
    greeted: bool,
    standing: SecondaryMap<BufferId, Standing>,
    /// Buffers that it may have to be offered, each once.
    unseen: VecDeque<BufferId>,
    /// What it is to be told about buffers that it holds.
    notices: VecDeque<(Message, Note)>,
    /// How many offers it was sent.
    sent: u64,
    /// How many descriptors are in each offer that has not arrived yet, and in all of them.
    waiting: VecDeque<usize>,
    under_way: usize,
    /// Descriptors that were sent since it was last asked what has arrived.
    unasked: usize,
    /// Its socket was full; it is waited for.
    full: bool,
    /// The wait for room is registered.
    awaits_room: bool,
    /// The kernel took no more descriptors from this user; tried again after a while.
    refused: bool,
}

/// Publishes buffers to any number of processes, and moves them.
///
/// See [the module](super) for what is guaranteed.
pub struct Publisher {
    waiting: OwnedFd,
    listener: Option<Listener>,
    listening: bool,
    policy: Box<dyn Policy>,
    buffers: SlotMap<BufferId, Published>,
    /// What they are published as.
    names: BTreeSet<String>,
    subscribers: BTreeMap<SubscriberId, Connection>,
    last_subscriber: u64,
    batch: usize,
    events: VecDeque<Event>,
    message: Vec<u8>,
    received: Box<[u8]>,
    fault: Option<Fault>,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher")
            .field("listener", &self.listener)
            .field("buffers", &self.buffers.len())
            .field("subscribers", &self.subscribers.len())
            .finish_non_exhaustive()
    }
}

impl Publisher {
    /// A publisher that nobody can connect to: subscribers are [added](Publisher::add).
    ///
    /// # Errors
    /// The call that failed, such as `EMFILE`.
    pub fn new() -> Result<Publisher, ShareError> {
        let waiting = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("epoll_create"))?;
        Ok(Publisher {
            waiting,
            listener: None,
            listening: false,
            policy: Box::new(SameUser),
            buffers: SlotMap::with_key(),
            names: BTreeSet::new(),
            subscribers: BTreeMap::new(),
            last_subscriber: 0,
            batch: MAX_DESCRIPTORS,
            events: VecDeque::new(),
            message: Vec::new(),
            received: vec![0; wire::MAX_MESSAGE].into(),
            fault: None,
        })
    }

    /// A publisher that processes connect to at `path`: those of this user and root, unless the
    /// file's mode and the policy are changed.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub fn bind(path: impl Into<PathBuf>) -> Result<Publisher, ShareError> {
        let mut publisher = Publisher::new()?;
        let listener = Listener::bind(path)?;
        // A client that has gone again by the time it is accepted must not make this one wait.
        rustix::io::ioctl_fionbio(&listener, true).map_err(failed("ioctl(FIONBIO)"))?;
        publisher.listener = Some(listener);
        publisher.listen(true)?;
        Ok(publisher)
    }

    /// Uses this policy instead of [`SameUser`].
    #[must_use]
    pub fn with_policy(mut self, policy: impl Policy + 'static) -> Publisher {
        self.policy = Box::new(policy);
        self
    }

    /// Sends at most so many descriptors with one message; [`MAX_DESCRIPTORS`] otherwise. At
    /// least one buffer goes with each.
    #[must_use]
    pub fn with_batches_of(mut self, descriptors: usize) -> Publisher {
        self.batch = descriptors.clamp(1, MAX_DESCRIPTORS);
        self
    }

    #[doc(hidden)]
    pub fn break_on_purpose(&mut self, fault: Option<Fault>) {
        self.fault = fault;
    }

    /// Adds a subscriber that is connected already, such as a child with one end of
    /// [`Channel::pair`].
    ///
    /// # Errors
    /// The call that failed.
    pub fn add(&mut self, channel: Channel) -> Result<SubscriberId, ShareError> {
        let peer = channel.peer()?;
        self.last_subscriber += 1;
        let id = SubscriberId(self.last_subscriber);
        let data = epoll::EventData::new_u64(id.0);
        epoll::add(&self.waiting, &channel, data, epoll::EventFlags::IN)
            .map_err(failed("epoll_ctl"))?;
        let connection = Connection {
            channel,
            peer,
            greeted: false,
            standing: SecondaryMap::new(),
            unseen: VecDeque::new(),
            notices: VecDeque::new(),
            sent: 0,
            waiting: VecDeque::new(),
            under_way: 0,
            unasked: 0,
            full: false,
            awaits_room: false,
            refused: false,
        };
        self.subscribers.insert(id, connection);
        Ok(id)
    }

    /// Publishes a buffer: it is offered to every subscriber that may have it, now and later.
    /// `name` is what they ask for.
    ///
    /// # Errors
    /// [`ShareError::Name`] for a name that is taken, empty, longer than 64 bytes or has control
    /// characters in it.
    pub fn publish(
        &mut self,
        name: &str,
        backing: impl Backing + 'static,
    ) -> Result<BufferId, ShareError> {
        let mut ids = self.publish_all([(name, Box::new(backing) as Box<dyn Backing>)])?;
        // One went in, so one came out.
        Ok(ids.pop().unwrap_or_default())
    }

    /// Publishes many buffers at once, which takes fewer messages than one after the other.
    ///
    /// # Errors
    /// As [`Publisher::publish`]; none of them is published then.
    pub fn publish_all<'n>(
        &mut self,
        buffers: impl IntoIterator<Item = (&'n str, Box<dyn Backing>)>,
    ) -> Result<Vec<BufferId>, ShareError> {
        let buffers: Vec<_> = buffers.into_iter().collect();
        let mut new = BTreeSet::new();
        for (name, _) in &buffers {
            let refuse = |why| {
                Err(ShareError::Name {
                    name: (*name).to_owned(),
                    why,
                })
            };
            if name.is_empty() || name.len() > wire::MAX_NAME {
                return refuse("a name has 1 to 64 bytes");
            }
            if name.chars().any(char::is_control) {
                return refuse("it has a control character in it");
            }
            if self.names.contains(*name) || !new.insert(*name) {
                return refuse("the name is taken");
            }
        }
        let mut ids = Vec::new();
        for (name, backing) in buffers {
            self.names.insert(name.to_owned());
            ids.push(self.buffers.insert_with_key(|id| {
                let mut published = Published {
                    entry: bytemuck::Zeroable::zeroed(),
                    name: name.to_owned(),
                    backing,
                    generation: 1,
                    state: State::Live,
                    holders: 0,
                    tainted: false,
                    read_only: OnceCell::new(),
                };
                published.describe(id);
                published
            }));
        }
        self.offer(&ids);
        Ok(ids)
    }

    /// The current generation of a buffer. Let go of it before the buffer is moved.
    pub fn buffer(&self, id: BufferId) -> Option<&Buffer> {
        Some(self.buffers.get(id)?.backing.buffer())
    }

    /// The number of the current generation; the first is 1.
    pub fn generation(&self, id: BufferId) -> Option<u64> {
        Some(self.buffers.get(id)?.generation)
    }

    /// How many subscribers hold the current generation or were just offered it.
    pub fn holders(&self, id: BufferId) -> usize {
        self.buffers.get(id).map_or(0, |buffer| buffer.holders)
    }

    /// How many of them have confirmed that it arrived.
    pub fn accepted(&self, id: BufferId) -> usize {
        let connections = self.subscribers.values();
        let accepted = |connection: &&Connection| {
            let holding = connection.holding(id);
            holding.is_some_and(|holding| holding.offer <= connection.arrived())
        };
        connections.filter(accepted).count()
    }

    /// How many descriptors are on their way to subscribers that have not confirmed them.
    pub fn unaccepted(&self) -> usize {
        self.subscribers.values().map(|c| c.under_way).sum()
    }

    /// True when somebody who was cut off, or who died, may still be able to write to the current
    /// generation. Moving the buffer ends that.
    pub fn is_tainted(&self, id: BufferId) -> bool {
        self.buffers.get(id).is_some_and(|buffer| buffer.tainted)
    }

    /// The subscribers that are there, and the processes that the kernel says they are.
    pub fn subscribers(&self) -> impl Iterator<Item = (SubscriberId, Peer)> + '_ {
        let greeted = self.subscribers.iter().filter(|(_, c)| c.greeted);
        greeted.map(|(id, connection)| (*id, connection.peer))
    }

    /// Takes back the current generation, makes the next one, and offers that.
    ///
    /// When this returns no live subscriber uses the old generation, and every byte that was
    /// written to it before is in the new one. A subscriber that has not given the old one back
    /// within `time_limit` is cut off.
    ///
    /// # Errors
    /// [`ShareError::Unknown`]; [`ShareError::StillInUse`] while this process itself has handles
    /// on the current generation; [`ShareError::DeviceBusy`]; what [`Backing::migrate`] failed with.
    /// After the last of these the old memory is offered again, unless somebody was cut off who may
    /// still reach it. In that case, and with a busy device, the buffer is withheld, with its bytes,
    /// until a later call succeeds.
    pub fn migrate(&mut self, id: BufferId, time_limit: Duration) -> Result<Migration, ShareError> {
        self.migrate_one(id, None, time_limit)
    }

    /// As [`Publisher::migrate`], to a place that the backing may have to refuse.
    ///
    /// # Errors
    /// As [`Publisher::migrate`].
    pub fn migrate_to(
        &mut self,
        id: BufferId,
        to: Placement,
        time_limit: Duration,
    ) -> Result<Migration, ShareError> {
        self.migrate_one(id, Some(to), time_limit)
    }

    fn migrate_one(
        &mut self,
        id: BufferId,
        to: Option<Placement>,
        time_limit: Duration,
    ) -> Result<Migration, ShareError> {
        let moved = self.move_together(&[id], to, time_limit).pop();
        moved.unwrap_or_else(|| {
            let name = format!("number {}", id.number());
            Err(ShareError::Unknown { name })
        })
    }

    /// As [`Publisher::migrate`], for several buffers at once: they are taken back together, within
    /// one time limit, and offered together. The answers are in the order of `ids`; each says of the
    /// common parts how long they took for all.
    ///
    /// # Errors
    /// As [`Publisher::migrate`], for each buffer by itself. One that is named twice is refused the
    /// second time.
    pub fn migrate_all(
        &mut self,
        ids: &[BufferId],
        time_limit: Duration,
    ) -> Vec<Result<Migration, ShareError>> {
        self.move_together(ids, None, time_limit)
    }

    fn move_together(
        &mut self,
        ids: &[BufferId],
        to: Option<Placement>,
        time_limit: Duration,
    ) -> Vec<Result<Migration, ShareError>> {
        let begun = Instant::now();
        let mut seen = BTreeSet::new();
        let checked: Vec<Result<BufferId, ShareError>> = ids
            .iter()
            .map(|&id| {
                let name = self.named(id)?;
                let idle = self
                    .buffers
                    .get(id)
                    .is_some_and(|buffer| buffer.backing.is_idle());
                match idle && seen.insert(id) {
                    true => Ok(id),
                    false => Err(ShareError::StillInUse { name }),
                }
            })
            .collect();
        let going: Vec<BufferId> = checked.iter().flatten().copied().collect();
        let before: BTreeMap<BufferId, Vec<SubscriberId>> =
            going.iter().map(|&id| (id, self.holding(id))).collect();
        self.take_back(&going, Message::Invalidate, time_limit);
        let announced = Instant::now();
        if self.fault == Some(Fault::SkipDrain) {
            self.forget_holders(&going);
        }
        if let Err(error) = self.drain(&going, begun, time_limit) {
            return ids.iter().map(|_| Err(error.clone())).collect();
        }
        let drained = Instant::now();
        let mut results: Vec<Result<Migration, ShareError>> = Vec::new();
        for checked in checked {
            let holders = checked.as_ref().ok().and_then(|id| before.get(id));
            let holders = holders.map(Vec::as_slice).unwrap_or_default();
            let lost = holders.iter().copied();
            let lost: Vec<SubscriberId> = lost
                .filter(|id| !self.subscribers.contains_key(id))
                .collect();
            let replaced = checked.and_then(|id| self.replace(id, to, begun, time_limit));
            results.push(replaced.map(|migration| Migration {
                announce: announced - begun,
                drain: drained - announced,
                released: holders.len() - lost.len(),
                lost,
                ..migration
            }));
        }
        let offering = Instant::now();
        self.offer(&going);
        for migration in results.iter_mut().flatten() {
            migration.offer = offering.elapsed();
        }
        results
    }

    /// Makes the next generation of a buffer that nobody holds any more.
    fn replace(
        &mut self,
        id: BufferId,
        to: Option<Placement>,
        begun: Instant,
        time_limit: Duration,
    ) -> Result<Migration, ShareError> {
        let transferring = Instant::now();
        self.wait_for_devices(id, begun, time_limit)?;
        let name = self.named(id)?;
        let Some(published) = self.buffers.get_mut(id) else {
            return Err(ShareError::Unknown { name });
        };
        let order = Order {
            generation: published.generation + 1,
            to,
            limit: time_limit,
            isolate: published.tainted,
        };
        let moved = published.backing.migrate(&order);
        if moved.is_err() && order.isolate {
            published.state = State::Withheld;
        } else {
            published.generation = order.generation;
            published.tainted = moved.is_err() && published.tainted;
            published.read_only = OnceCell::new();
            published.state = State::Live;
            published.describe(id);
        }
        moved?;
        Ok(Migration {
            generation: order.generation,
            placement: published.backing.placement(),
            announce: Duration::ZERO,
            drain: Duration::ZERO,
            transfer: transferring.elapsed(),
            offer: Duration::ZERO,
            released: 0,
            lost: Vec::new(),
            isolated: order.isolate,
        })
    }

    /// Takes a buffer back for good. Subscribers that do not give it back within `time_limit` are
    /// cut off.
    ///
    /// # Errors
    /// [`ShareError::Unknown`]; [`ShareError::DeviceBusy`], after which it is withheld and may be
    /// withdrawn again.
    pub fn withdraw(&mut self, id: BufferId, time_limit: Duration) -> Result<(), ShareError> {
        let begun = Instant::now();
        let name = self.named(id)?;
        self.take_back(&[id], Message::Withdraw, time_limit);
        self.drain(&[id], begun, time_limit)?;
        self.wait_for_devices(id, begun, time_limit)?;
        self.buffers.remove(id);
        self.names.remove(&name);
        Ok(())
    }

    /// What happened since the last call; waits up to `timeout` for it, for ever with `None`.
    /// Subscribers are served only in calls of this kind, so call it often.
    ///
    /// # Errors
    /// The call that failed.
    pub fn next_event(&mut self, timeout: Option<Duration>) -> Result<Option<Event>, ShareError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        self.turn(Some(Duration::ZERO))?;
        while self.events.is_empty() {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            self.turn(left)?;
        }
        Ok(self.events.pop_front())
    }

    /// Waits until there is something to do for a subscriber, and does it.
    ///
    /// # Errors
    /// The call that failed.
    pub fn serve_once(&mut self) -> Result<(), ShareError> {
        self.turn(None).map(drop)
    }

    /// Serves subscribers for this long. What happened is there for [`Publisher::next_event`].
    ///
    /// # Errors
    /// The call that failed.
    pub fn serve_for(&mut self, time: Duration) -> Result<(), ShareError> {
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            self.turn(Some(left))?;
            if left.is_zero() {
                return Ok(());
            }
        }
    }

    /// Ends a wait, once, each time that something is written to this eventfd.
    #[cfg(feature = "tokio")]
    pub(super) fn wake_by(&self, wake: impl AsFd) -> Result<(), ShareError> {
        let data = epoll::EventData::new_u64(WAKE);
        let once = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.waiting, wake, data, once).map_err(failed("epoll_ctl"))?)
    }

    /// What has happened already.
    #[cfg(feature = "tokio")]
    pub(super) fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    fn named(&self, id: BufferId) -> Result<String, ShareError> {
        match self.buffers.get(id) {
            Some(buffer) => Ok(buffer.name.clone()),
            None => Err(ShareError::Unknown {
                name: format!("number {}", id.number()),
            }),
        }
    }

    fn holding(&self, id: BufferId) -> Vec<SubscriberId> {
        let holders = self
            .subscribers
            .iter()
            .filter(|(_, c)| c.holding(id).is_some());
        holders.map(|(subscriber, _)| *subscriber).collect()
    }

    /// Tells everybody who holds these buffers to give them back.
    fn take_back(&mut self, ids: &[BufferId], message: Message, time_limit: Duration) {
        let milliseconds = u32::try_from(time_limit.as_millis()).unwrap_or(u32::MAX);
        for id in ids {
            if let Some(published) = self.buffers.get_mut(*id) {
                published.state = State::Leaving;
            }
        }
        let subscribers: Vec<SubscriberId> = self.subscribers.keys().copied().collect();
        for subscriber in subscribers {
            let Some(connection) = self.subscribers.get_mut(&subscriber) else {
                continue;
            };
            for id in ids {
                if let Some(holding) = connection.holding(*id) {
                    let note = Note::new(id.number(), holding.generation, milliseconds);
                    connection.notices.push_back((message, note));
                }
            }
            if !connection.notices.is_empty() {
                self.pump(subscriber);
            }
        }
    }

    /// Waits until nobody holds the buffers, and cuts off who still does when the time is up.
    fn drain(
        &mut self,
        ids: &[BufferId],
        begun: Instant,
        limit: Duration,
    ) -> Result<(), ShareError> {
        let mut rounds_after = 0;
        while ids.iter().any(|id| self.holders(*id) > 0) && rounds_after < ROUNDS_AFTER {
            let left = (begun + limit).saturating_duration_since(Instant::now());
            let handled = self.turn(Some(left))?;
            if left.is_zero() {
                // The answers may be there already.
                rounds_after += 1;
                if handled == 0 {
                    break;
                }
            }
        }
        for id in ids {
            let name = self.named(*id)?;
            for subscriber in self.holding(*id) {
                let name = name.clone();
                self.cut_off(subscriber, CutOff::Late { name, limit });
            }
        }
        Ok(())
    }

    /// Waits until devices are done with a buffer: also with what a subscriber that is gone had
    /// begun.
    fn wait_for_devices(
        &mut self,
        id: BufferId,
        begun: Instant,
        limit: Duration,
    ) -> Result<(), ShareError> {
        let Some(published) = self.buffers.get_mut(id) else {
            return Ok(());
        };
        let Some(dmabuf) = published.backing.buffer().dmabuf() else {
            return Ok(());
        };
        let left = (begun + limit).saturating_duration_since(Instant::now());
        match dmabuf.wait(Access::Write, left) {
            Err(BufferError::TimedOut { .. }) => {
                published.state = State::Withheld;
                let name = published.name.clone();
                Err(ShareError::DeviceBusy { name, limit })
            }
            // An exporter without fences answers with another error; there is nothing to wait for.
            _ => Ok(()),
        }
    }

    fn forget_holders(&mut self, ids: &[BufferId]) {
        for id in ids {
            for connection in self.subscribers.values_mut() {
                if connection.holding(*id).is_some() {
                    connection.standing.remove(*id);
                }
            }
            if let Some(published) = self.buffers.get_mut(*id) {
                published.holders = 0;
            }
        }
    }

    /// Offers buffers to everybody who may have them.
    fn offer(&mut self, ids: &[BufferId]) {
        let subscribers: Vec<SubscriberId> = self.subscribers.keys().copied().collect();
        for subscriber in subscribers {
            if let Some(connection) = self.subscribers.get_mut(&subscriber) {
                ids.iter().for_each(|id| connection.queue(*id));
            }
            self.pump(subscriber);
        }
    }

    /// Sends a subscriber what it is still to be told, as far as there is room.
    fn pump(&mut self, id: SubscriberId) {
        let sent = self.send_notices(id).and_then(|()| self.send_offers(id));
        match sent {
            Ok(()) => {}
            // What it sent before it went is still to be read; that finds the end, too.
            Err(ShareError::PeerGone) => {}
            Err(error) => self.cut_off(id, CutOff::Unreachable(error)),
        }
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return;
        };
        if connection.full != connection.awaits_room {
            let mut interest = epoll::EventFlags::IN;
            if connection.full {
                interest |= epoll::EventFlags::OUT;
            }
            let data = epoll::EventData::new_u64(id.0);
            // The descriptor is there and registered.
            let _ = epoll::modify(&self.waiting, &connection.channel, data, interest);
            connection.awaits_room = connection.full;
        }
    }

    fn send_notices(&mut self, id: SubscriberId) -> Result<(), ShareError> {
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return Ok(());
        };
        connection.full = false;
        connection.refused = false;
        while let Some(&(message, _)) = connection.notices.front() {
            let same = connection
                .notices
                .iter()
                .take_while(|(kind, _)| *kind == message);
            let notes: Vec<Note> = same
                .map(|(_, note)| *note)
                .take(wire::MAX_RECORDS)
                .collect();
            wire::encode_into(&mut self.message, message, &notes);
            if !connection.channel.try_send(&self.message, &[])? {
                connection.full = true;
                return Ok(());
            }
            connection.notices.drain(..notes.len());
        }
        Ok(())
    }

    fn send_offers(&mut self, id: SubscriberId) -> Result<(), ShareError> {
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return Ok(());
        };
        if !connection.greeted || connection.full {
            return Ok(());
        }
        while connection.under_way < WINDOW {
            let most = self.batch.min(connection.unseen.len());
            let mut batch: Vec<BufferId> = Vec::with_capacity(most);
            let mut fds: Vec<BorrowedFd<'_>> = Vec::with_capacity(most);
            let mut follow = false;
            let mut message = wire::begin(&mut self.message);
            while let Some(&buffer) = connection.unseen.front() {
                let published = self.buffers.get(buffer);
                let Some(published) = published.filter(|p| p.state == State::Live) else {
                    connection.skip();
                    continue;
                };
                let current = published.backing.buffer();
                let grant = self
                    .policy
                    .grant(&connection.peer, &published.name, current);
                if grant == Grant::Nothing {
                    connection.skip();
                    continue;
                }
                let given = match published.descriptors(current, grant) {
                    Ok(given) => given,
                    Err(error) => {
                        let event = Event::NotOffered {
                            subscriber: id,
                            buffer,
                            why: error.to_string(),
                        };
                        self.events.push_back(event);
                        connection.skip();
                        continue;
                    }
                };
                let count = given.iter().flatten().count();
                if !batch.is_empty() && fds.len() + count > self.batch {
                    follow = true;
                    break;
                }
                match grant {
                    Grant::ReadWrite => message.push(&published.entry),
                    _ => message.push(&published.entry.granted(grant)),
                }
                fds.extend(given.into_iter().flatten());
                batch.push(buffer);
                connection.unseen.pop_front();
            }
            let descriptors = fds.len();
            // Those that were to follow may have gone meanwhile; then the question goes alone.
            if batch.is_empty() && connection.unasked == 0 {
                return Ok(());
            }
            let ask = !follow || connection.unasked + descriptors >= ASK;
            let kind = if ask {
                Message::LastOffer
            } else {
                Message::Offer
            };
            let sent = connection.channel.try_send(message.end(kind), &fds);
            if !matches!(sent, Ok(true)) {
                for buffer in batch.iter().rev() {
                    connection.unseen.push_front(*buffer);
                }
            }
            match sent {
                Ok(true) => {}
                Ok(false) => {
                    connection.full = true;
                    return Ok(());
                }
                // Too many descriptors are under way for this user. It will pass.
                Err(ShareError::System(SystemError { errno, .. }))
                    if errno == Errno::from(rustix::io::Errno::TOOMANYREFS) =>
                {
                    connection.refused = true;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            connection.sent += 1;
            for buffer in batch {
                let Some(published) = self.buffers.get_mut(buffer) else {
                    continue;
                };
                published.holders += 1;
                let holding = Holding {
                    generation: published.generation,
                    offer: connection.sent,
                };
                connection.standing.insert(buffer, Standing::Held(holding));
            }
            connection.waiting.push_back(descriptors);
            connection.under_way += descriptors;
            connection.unasked = if ask {
                0
            } else {
                connection.unasked + descriptors
            };
        }
        Ok(())
    }

    /// Waits up to `timeout` for something to do, and does it. Returns how much there was.
    fn turn(&mut self, timeout: Option<Duration>) -> Result<usize, ShareError> {
        let refused = self.subscribers.iter().filter(|(_, c)| c.refused);
        let refused: Vec<SubscriberId> = refused.map(|(id, _)| *id).collect();
        let timeout = match refused.is_empty() {
            true => timeout,
            false => Some(timeout.map_or(RETRY, |timeout| timeout.min(RETRY))),
        };
        for id in refused {
            self.pump(id);
        }
        let mut ready = Vec::with_capacity(64);
        let timeout = timeout.map(timespec);
        let spare = rustix::buffer::spare_capacity(&mut ready);
        match epoll::wait(&self.waiting, spare, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(0),
            Err(errno) => return Err(failed("epoll_wait")(errno).into()),
        }
        let handled = ready.len();
        for event in ready {
            // A copy: the field is not aligned.
            let (data, flags) = (event.data.u64(), event.flags);
            if data == LISTENER {
                self.accept();
                continue;
            }
            let id = SubscriberId(data);
            if flags.contains(epoll::EventFlags::OUT) {
                self.pump(id);
            }
            self.receive(id);
        }
        Ok(handled)
    }

    fn accept(&mut self) {
        while let Some(listener) = &self.listener {
            match listener.accept().and_then(|channel| self.add(channel)) {
                Ok(_) => {}
                Err(ShareError::System(SystemError { errno, .. }))
                    if errno == Errno::from(rustix::io::Errno::AGAIN) =>
                {
                    return;
                }
                Err(why) => {
                    // With no descriptor left the newcomer waits until somebody leaves; to be
                    // told of it again and again would only keep the processor busy.
                    let _ = self.listen(false);
                    self.events.push_back(Event::NotAccepted { why });
                    return;
                }
            }
        }
    }

    fn listen(&mut self, listening: bool) -> Result<(), ShareError> {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        if self.listening != listening {
            let data = epoll::EventData::new_u64(LISTENER);
            let changed = if listening {
                epoll::add(&self.waiting, listener, data, epoll::EventFlags::IN)
            } else {
                epoll::delete(&self.waiting, listener)
            };
            changed.map_err(failed("epoll_ctl"))?;
            self.listening = listening;
        }
        Ok(())
    }

    /// Takes one message of a subscriber. If there are more, the next turn finds them: nobody is
    /// kept waiting by one that sends without end.
    fn receive(&mut self, id: SubscriberId) {
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return;
        };
        // Subscribers have no descriptors to send. Those that come are closed at once.
        let mut descriptors = Vec::new();
        let received = connection
            .channel
            .try_receive(&mut self.received, &mut descriptors);
        let outcome = match received {
            Ok(None) => return,
            Ok(Some(_)) if !descriptors.is_empty() => Err(ShareError::Malformed {
                what: "a subscriber's message came with descriptors".into(),
            }),
            Ok(Some(bytes)) => self.handle(id, bytes),
            Err(ShareError::PeerGone) => {
                let held = self.remove(id);
                self.events.push_back(Event::Left {
                    subscriber: id,
                    held,
                });
                return;
            }
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            self.cut_off(id, CutOff::Rubbish(error));
        }
    }

    fn handle(&mut self, id: SubscriberId, bytes: usize) -> Result<(), ShareError> {
        let wrong = |what: &str| Err(ShareError::Malformed { what: what.into() });
        let (message, records) = wire::open(&self.received[..bytes])?;
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return Ok(());
        };
        if connection.greeted == (message == Message::Hello) {
            return wrong("a subscriber greets once, and first");
        }
        match message {
            Message::Hello => {
                connection.greeted = true;
                self.buffers.keys().for_each(|id| connection.queue(id));
                let peer = connection.peer;
                let event = Event::Joined {
                    subscriber: id,
                    peer,
                };
                self.events.push_back(event);
            }
            Message::Accepted => {
                for note in wire::notes(records)? {
                    let arrived = connection.arrived();
                    let news = arrived + 1..=connection.sent;
                    if !news.contains(&note.id) || (note.generation, note.value) != (0, 0) {
                        return wrong("it accepts what it was not offered");
                    }
                    for _ in arrived..note.id {
                        connection.under_way -= connection.waiting.pop_front().unwrap_or(0);
                    }
                }
            }
            Message::Released => {
                for note in wire::notes(records)? {
                    let buffer = BufferId::from_number(note.id);
                    match connection.holding(buffer) {
                        Some(held) if held.generation == note.generation => {}
                        _ if self.fault.is_some() => continue,
                        _ => return wrong("it gives back what it does not have"),
                    }
                    if note.value > 1 {
                        return wrong("it gives a buffer back in a way that is unknown");
                    }
                    connection.standing.remove(buffer);
                    if let Some(published) = self.buffers.get_mut(buffer) {
                        published.holders -= 1;
                    }
                    if note.value == 1 {
                        let why = "the subscriber could not use it".into();
                        let event = Event::NotOffered {
                            subscriber: id,
                            buffer,
                            why,
                        };
                        self.events.push_back(event);
                    }
                }
            }
            _ => return wrong("a subscriber does not send this"),
        }
        self.pump(id);
        Ok(())
    }

    fn cut_off(&mut self, id: SubscriberId, why: CutOff) {
        let reason = match why {
            CutOff::Late { .. } => wire::Farewell::Late,
            CutOff::Rubbish(_) => wire::Farewell::Rubbish,
            CutOff::Unreachable(_) => wire::Farewell::Unreachable,
        };
        if let Some(connection) = self.subscribers.get(&id) {
            wire::encode_into(
                &mut self.message,
                Message::Farewell,
                &[Note::new(0, 0, reason as u32)],
            );
            // It may be gone, or not be reading; it is cut off all the same.
            let _ = connection.channel.try_send(&self.message, &[]);
            connection.channel.shut_down();
            let subscriber = id;
            let held = self.remove(id);
            self.events.push_back(Event::CutOff {
                subscriber,
                held,
                why,
            });
        }
    }

    /// Forgets a subscriber. What it held may still be reachable for whoever has its descriptors.
    fn remove(&mut self, id: SubscriberId) -> Vec<BufferId> {
        let Some(connection) = self.subscribers.remove(&id) else {
            return Vec::new();
        };
        // Another process may hold a copy of our end, so closing it is not enough.
        let _ = epoll::delete(&self.waiting, &connection.channel);
        let standing = connection.standing.iter();
        let held = standing.filter(|(_, standing)| matches!(standing, Standing::Held(_)));
        let held: Vec<BufferId> = held.map(|(buffer, _)| buffer).collect();
        for buffer in &held {
            if let Some(published) = self.buffers.get_mut(*buffer) {
                published.holders -= 1;
                published.tainted = true;
            }
        }
        drop(connection.channel);
        // There may be room for those who could not be accepted.
        let _ = self.listen(true);
        held
    }
}

impl Connection {
    /// How many offers it says have arrived.
    fn arrived(&self) -> u64 {
        self.sent - self.waiting.len() as u64
    }

    fn holding(&self, buffer: BufferId) -> Option<&Holding> {
        match self.standing.get(buffer)? {
            Standing::Held(holding) => Some(holding),
            Standing::Unseen => None,
        }
    }

    /// Has a buffer offered, if it is neither held nor waiting.
    fn queue(&mut self, buffer: BufferId) {
        if !self.standing.contains_key(buffer) {
            self.standing.insert(buffer, Standing::Unseen);
            self.unseen.push_back(buffer);
        }
    }

    /// The first buffer that waits is not offered.
    fn skip(&mut self) {
        if let Some(buffer) = self.unseen.pop_front() {
            self.standing.remove(buffer);
        }
    }
}

impl Published {
    /// Makes ready what is said of the current generation.
    fn describe(&mut self, id: BufferId) {
        let placement = self.backing.placement();
        let buffer = self.backing.buffer();
        let id = id.number();
        self.entry = wire::entry(id, self.generation, placement, &self.name, buffer);
    }

    /// The descriptors that go with an offer, in their order.
    fn descriptors<'p>(
        &'p self,
        buffer: &'p Buffer,
        grant: Grant,
    ) -> Result<[Option<BorrowedFd<'p>>; 2], ShareError> {
        if grant == Grant::ReadOnly
            && let Some(memory) = self.read_only(buffer)?
        {
            return Ok([Some(memory), None]);
        }
        Ok(channel::descriptors(buffer))
    }

    /// What those get who may only read, where it is not what the others get.
    fn read_only(&self, buffer: &Buffer) -> Result<Option<BorrowedFd<'_>>, ShareError> {
        if let Some(memory) = self.read_only.get() {
            return Ok(Some(memory.as_fd()));
        }
        let Some(memory) = buffer.host_memory() else {
            if !buffer.is_writable() {
                return Ok(None);
            }
            // Every descriptor of a dma-buf is the same open file, with the same mode.
            let object = self.name.clone();
            let wanted = "read-only";
            return Err(BufferError::Access { object, wanted }.into());
        };
        let failed = |call| {
            let name = self.name.clone();
            move |errno| SystemError::new(call, name, errno)
        };
        // Whoever gets a descriptor can open the file behind it again, as its mode allows.
        rustix::fs::fchmod(memory, Mode::RUSR | Mode::WUSR).map_err(failed("fchmod"))?;
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let again = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open"))?;
        Ok(Some(self.read_only.get_or_init(|| again).as_fd()))
    }
}

impl AsFd for Publisher {
    /// Readable when [`Publisher::next_event`] has something to do, for programs with a loop of
    /// their own.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waiting.as_fd()
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}

fn failed(call: &'static str) -> impl Fn(rustix::io::Errno) -> SystemError {
    move |errno| SystemError::new(call, "the publisher's sockets", errno)
}
