//! The publisher as its owner sees it: its settings, its buffers and its subscribers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::epoll;

use super::super::backing::Backing;
use super::super::channel::{Channel, MAX_DESCRIPTORS, Peer};
use super::super::listener::Listener;
use super::super::policy::{Policy, SameUser};
use super::super::wire;
use peerbuf_core::Deadline;

use super::budget;
use super::connection::Connection;
use super::event::Event;
use super::id::{BufferId, SubscriberId};
use super::published::{Published, State};
use crate::buffer::Buffer;
use crate::error::{ShareError, SystemError};
use crate::sys::fork::Process;

/// The listener's number in epoll; subscribers count from 1.
pub(super) const LISTENER: u64 = 0;

/// Default time limit for a new connection's hello.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// The epoll number of the eventfd that only ends the wait.
#[cfg(feature = "tokio")]
const WAKE: u64 = u64::MAX;

/// Deliberate violations of the guarantees, for tests of the checks that should notice them.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Moves do not wait for subscribers.
    SkipDrain,
}

/// Publishes buffers to any number of processes, and moves them.
///
/// See [the module](super::super) for the guarantees. A publisher works only in the process
/// that made it. In a forked child every call returns [`ShareError::Inherited`].
pub struct Publisher {
    pub(super) owner: Process,
    pub(super) waiting: OwnedFd,
    pub(super) listener: Option<Listener>,
    pub(super) listening: bool,
    /// Time of the next attempt to listen, while the publisher does not listen for lack of
    /// descriptors or memory.
    pub(super) deaf_until: Option<Deadline>,
    /// True once the owner was told of the shortage.
    pub(super) told: bool,
    /// Time limit for a new connection's hello.
    pub(super) greeting_limit: Duration,
    /// New connections in order of arrival, until their hello or their end.
    pub(super) ungreeted: VecDeque<(Deadline, SubscriberId)>,
    pub(super) policy: Box<dyn Policy>,
    pub(super) buffers: BTreeMap<BufferId, Published>,
    pub(super) last_buffer: u64,
    /// The published names.
    pub(super) names: BTreeSet<String>,
    pub(super) subscribers: BTreeMap<SubscriberId, Connection>,
    pub(super) last_subscriber: u64,
    pub(super) batch: usize,
    /// Number of descriptors that may be in flight to all subscribers together; `under_way` is
    /// the current number.
    pub(super) budget: usize,
    pub(super) under_way: usize,
    /// Subscribers that wait for fewer descriptors in flight.
    pub(super) held_back: BTreeSet<SubscriberId>,
    /// True if descriptors arrived, or their subscriber left, since the last attempt to serve
    /// `held_back`.
    pub(super) fewer_under_way: bool,
    pub(super) events: VecDeque<Event>,
    pub(super) message: Vec<u8>,
    pub(super) received: Box<[u8]>,
    pub(super) fault: Option<Fault>,
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
    /// Makes a publisher without a socket file: its owner [adds](Publisher::add) the
    /// subscribers.
    ///
    /// # Errors
    /// The call that failed, such as `EMFILE`.
    pub fn new() -> Result<Publisher, ShareError> {
        let waiting = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("epoll_create"))?;
        Ok(Publisher {
            owner: Process::current(),
            waiting,
            listener: None,
            listening: false,
            deaf_until: None,
            told: false,
            greeting_limit: GREETING_LIMIT,
            ungreeted: VecDeque::new(),
            policy: Box::new(SameUser),
            buffers: BTreeMap::new(),
            last_buffer: 0,
            names: BTreeSet::new(),
            subscribers: BTreeMap::new(),
            last_subscriber: 0,
            batch: MAX_DESCRIPTORS,
            budget: budget::budget(),
            under_way: 0,
            held_back: BTreeSet::new(),
            fewer_under_way: false,
            events: VecDeque::new(),
            message: Vec::new(),
            received: vec![0; wire::MAX_MESSAGE].into(),
            fault: None,
        })
    }

    /// Makes a publisher that processes connect to at `path`. Only processes of this user and
    /// root may connect, unless the file's mode and the policy are changed.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub fn bind(path: impl Into<PathBuf>) -> Result<Publisher, ShareError> {
        let mut publisher = Publisher::new()?;
        let listener = Listener::bind(path)?;
        // A client may disconnect before the publisher accepts it. `accept` must not block
        // then.
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

    /// Sets the maximum number of descriptors in one message. The default is
    /// [`MAX_DESCRIPTORS`]. A message always contains at least one buffer.
    #[must_use]
    pub fn with_batches_of(mut self, descriptors: usize) -> Publisher {
        self.batch = descriptors.clamp(1, MAX_DESCRIPTORS);
        self
    }

    /// Sets the time limit for a new connection's hello, which
    /// [`Subscriber::connect`](crate::share::Subscriber::connect) sends at once. The default is
    /// ten seconds. The publisher cuts off a connection that sends no hello in time.
    /// [Added](Publisher::add) subscribers have no limit.
    #[must_use]
    pub fn with_greeting_limit(mut self, limit: Duration) -> Publisher {
        self.greeting_limit = limit;
        self
    }

    #[doc(hidden)]
    pub fn break_on_purpose(&mut self, fault: Option<Fault>) {
        self.fault = fault;
    }

    /// Adds a subscriber that is already connected, such as a child with one end of
    /// [`Channel::pair`].
    ///
    /// # Errors
    /// The call that failed; [`ShareError::Inherited`].
    pub fn add(&mut self, channel: Channel) -> Result<SubscriberId, ShareError> {
        self.check_owner()?;
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
            standing: BTreeMap::new(),
            unseen: VecDeque::new(),
            notices: VecDeque::new(),
            sent: 0,
            waiting: VecDeque::new(),
            under_way: 0,
            unasked: 0,
            proven: false,
            full: false,
            awaits_room: false,
            refused: false,
        };
        self.subscribers.insert(id, connection);
        Ok(id)
    }

    /// Publishes a buffer: the publisher offers the buffer to every present and future
    /// subscriber that may have it. Subscribers ask for the buffer by `name`.
    ///
    /// # Errors
    /// [`ShareError::Name`] for a name that is taken, is empty, is longer than 64 bytes or
    /// contains control characters; [`ShareError::Inherited`].
    pub fn publish(
        &mut self,
        name: &str,
        backing: impl Backing + 'static,
    ) -> Result<BufferId, ShareError> {
        self.publish_all([(name, Box::new(backing) as Box<dyn Backing>)])?;
        Ok(BufferId::from_number(self.last_buffer))
    }

    /// Publishes many buffers at once, with fewer messages than one call for each.
    ///
    /// # Errors
    /// As [`Publisher::publish`]. On an error, none of the buffers is published.
    pub fn publish_all<'n>(
        &mut self,
        buffers: impl IntoIterator<Item = (&'n str, Box<dyn Backing>)>,
    ) -> Result<Vec<BufferId>, ShareError> {
        self.check_owner()?;
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
            self.last_buffer += 1;
            let id = BufferId::from_number(self.last_buffer);
            let mut published = Published {
                entry: bytemuck::Zeroable::zeroed(),
                name: name.to_owned(),
                backing,
                generation: 1,
                state: State::Live,
                holders: 0,
                tainted: false,
                read_only: OnceLock::new(),
            };
            published.describe(id);
            self.buffers.insert(id, published);
            ids.push(id);
        }
        self.offer(&ids);
        Ok(ids)
    }

    /// The current generation of a buffer. Drop clones of it before the buffer is moved.
    pub fn buffer(&self, id: BufferId) -> Option<&Buffer> {
        Some(self.buffers.get(&id)?.backing.buffer())
    }

    /// The number of the current generation. The first is 1.
    pub fn generation(&self, id: BufferId) -> Option<u64> {
        Some(self.buffers.get(&id)?.generation)
    }

    /// Number of subscribers that hold the current generation or were just offered it.
    pub fn holders(&self, id: BufferId) -> usize {
        self.buffers.get(&id).map_or(0, |buffer| buffer.holders)
    }

    /// Number of holders that have acknowledged the current generation.
    pub fn accepted(&self, id: BufferId) -> usize {
        let connections = self.subscribers.values();
        let accepted = |connection: &&Connection| {
            let holding = connection.holding(id);
            holding.is_some_and(|holding| holding.offer <= connection.arrived())
        };
        connections.filter(accepted).count()
    }

    /// Number of descriptors sent to subscribers and not yet acknowledged.
    pub fn unaccepted(&self) -> usize {
        self.under_way
    }

    /// True if a subscriber that was cut off or died may still write to the current generation.
    /// Moving the buffer ends that.
    pub fn is_tainted(&self, id: BufferId) -> bool {
        self.buffers.get(&id).is_some_and(|buffer| buffer.tainted)
    }

    /// The connected subscribers that sent a hello, with the credentials that the kernel
    /// reports.
    pub fn subscribers(&self) -> impl Iterator<Item = (SubscriberId, Peer)> + '_ {
        let greeted = self.subscribers.iter().filter(|(_, c)| c.greeted);
        greeted.map(|(id, connection)| (*id, connection.peer))
    }

    /// Returns the next event. Waits up to `timeout` for an event, forever with `None`. The
    /// publisher serves its subscribers only in calls of this kind, so call it often.
    ///
    /// # Errors
    /// The call that failed.
    pub fn next_event(&mut self, timeout: Option<Duration>) -> Result<Option<Event>, ShareError> {
        let deadline = Deadline::after_some(timeout);
        self.turn(Deadline::after(Duration::ZERO))?;
        while self.events.is_empty() {
            if deadline.is_over() {
                return Ok(None);
            }
            self.turn(deadline)?;
        }
        Ok(self.events.pop_front())
    }

    /// Waits until a subscriber needs service, and serves it.
    ///
    /// # Errors
    /// The call that failed.
    pub fn serve_once(&mut self) -> Result<(), ShareError> {
        self.turn(Deadline::NEVER).map(drop)
    }

    /// Serves subscribers for this long. [`Publisher::next_event`] returns the events
    /// afterwards.
    ///
    /// # Errors
    /// The call that failed.
    pub fn serve_for(&mut self, time: Duration) -> Result<(), ShareError> {
        let deadline = Deadline::after(time);
        loop {
            let over = deadline.is_over();
            self.turn(deadline)?;
            if over {
                return Ok(());
            }
        }
    }

    /// A forked child shares the sockets with its parent, and would read messages that are
    /// meant for the parent.
    pub(super) fn check_owner(&self) -> Result<(), ShareError> {
        if self.owner.is_current() {
            return Ok(());
        }
        let what = "a publisher";
        Err(ShareError::Inherited { what })
    }

    /// Ends one wait each time that a process writes to this eventfd.
    #[cfg(feature = "tokio")]
    pub(in crate::share) fn wake_by(&self, wake: impl AsFd) -> Result<(), ShareError> {
        let data = epoll::EventData::new_u64(WAKE);
        let once = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.waiting, wake, data, once).map_err(failed("epoll_ctl"))?)
    }

    /// The events so far.
    #[cfg(feature = "tokio")]
    pub(in crate::share) fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }
}

impl AsFd for Publisher {
    /// Readable when [`Publisher::next_event`] has work to do, for programs with their own
    /// event loop.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waiting.as_fd()
    }
}

pub(super) fn failed(call: &'static str) -> impl Fn(rustix::io::Errno) -> SystemError {
    move |errno| SystemError::new(call, "the publisher's sockets", errno)
}
