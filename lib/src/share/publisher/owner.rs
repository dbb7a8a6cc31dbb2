//! A publisher as its owner has it: what it is made with, what it publishes, and who is there.

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

/// The listener's number among what is waited for; subscribers count from 1.
pub(super) const LISTENER: u64 = 0;

/// How long whoever connects has to greet, where the publisher's owner sets no other limit.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// The number of what only ends the wait.
#[cfg(feature = "tokio")]
const WAKE: u64 = u64::MAX;

/// Ways to break the guarantees on purpose, for tests of what should notice.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Moves do not wait for subscribers.
    SkipDrain,
}

/// Publishes buffers to any number of processes, and moves them.
///
/// See [the module](super::super) for what is guaranteed. It works in the process that made it: in a
/// child that was forked from that every call returns [`ShareError::Inherited`].
pub struct Publisher {
    pub(super) owner: Process,
    pub(super) waiting: OwnedFd,
    pub(super) listener: Option<Listener>,
    pub(super) listening: bool,
    /// While it does not listen for want of descriptors or memory: when it tries again.
    pub(super) deaf_until: Option<Deadline>,
    /// Its owner was told of the shortage.
    pub(super) told: bool,
    /// How long whoever connects has to greet.
    pub(super) greeting_limit: Duration,
    /// Those who connected, in that order, until they have greeted or gone.
    pub(super) ungreeted: VecDeque<(Deadline, SubscriberId)>,
    pub(super) policy: Box<dyn Policy>,
    pub(super) buffers: BTreeMap<BufferId, Published>,
    pub(super) last_buffer: u64,
    /// What they are published as.
    pub(super) names: BTreeSet<String>,
    pub(super) subscribers: BTreeMap<SubscriberId, Connection>,
    pub(super) last_subscriber: u64,
    pub(super) batch: usize,
    /// How many descriptors may be under way to all subscribers together, and how many are.
    pub(super) budget: usize,
    pub(super) under_way: usize,
    /// Subscribers that have to wait until fewer are.
    pub(super) held_back: BTreeSet<SubscriberId>,
    /// Some have arrived, or their subscriber has gone, since those were last tried.
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
    /// A publisher that nobody can connect to: subscribers are [added](Publisher::add).
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

    /// Gives whoever connects so long to greet, as [`Subscriber::connect`](crate::share::Subscriber::connect)
    /// does at once; ten seconds otherwise. Who does not greet in time is cut off. Subscribers that
    /// are [added](Publisher::add) have no limit.
    #[must_use]
    pub fn with_greeting_limit(mut self, limit: Duration) -> Publisher {
        self.greeting_limit = limit;
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

    /// Publishes a buffer: it is offered to every subscriber that may have it, now and later.
    /// `name` is what they ask for.
    ///
    /// # Errors
    /// [`ShareError::Name`] for a name that is taken, empty, longer than 64 bytes or has control
    /// characters in it; [`ShareError::Inherited`].
    pub fn publish(
        &mut self,
        name: &str,
        backing: impl Backing + 'static,
    ) -> Result<BufferId, ShareError> {
        self.publish_all([(name, Box::new(backing) as Box<dyn Backing>)])?;
        Ok(BufferId::from_number(self.last_buffer))
    }

    /// Publishes many buffers at once, which takes fewer messages than one after the other.
    ///
    /// # Errors
    /// As [`Publisher::publish`]; none of them is published then.
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

    /// The current generation of a buffer. Let go of it before the buffer is moved.
    pub fn buffer(&self, id: BufferId) -> Option<&Buffer> {
        Some(self.buffers.get(&id)?.backing.buffer())
    }

    /// The number of the current generation; the first is 1.
    pub fn generation(&self, id: BufferId) -> Option<u64> {
        Some(self.buffers.get(&id)?.generation)
    }

    /// How many subscribers hold the current generation or were just offered it.
    pub fn holders(&self, id: BufferId) -> usize {
        self.buffers.get(&id).map_or(0, |buffer| buffer.holders)
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
        self.under_way
    }

    /// True when somebody who was cut off, or who died, may still be able to write to the current
    /// generation. Moving the buffer ends that.
    pub fn is_tainted(&self, id: BufferId) -> bool {
        self.buffers.get(&id).is_some_and(|buffer| buffer.tainted)
    }

    /// The subscribers that are there, and the processes that the kernel says they are.
    pub fn subscribers(&self) -> impl Iterator<Item = (SubscriberId, Peer)> + '_ {
        let greeted = self.subscribers.iter().filter(|(_, c)| c.greeted);
        greeted.map(|(id, connection)| (*id, connection.peer))
    }

    /// What happened since the last call; waits up to `timeout` for it, for ever with `None`.
    /// Subscribers are served only in calls of this kind, so call it often.
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

    /// Waits until there is something to do for a subscriber, and does it.
    ///
    /// # Errors
    /// The call that failed.
    pub fn serve_once(&mut self) -> Result<(), ShareError> {
        self.turn(Deadline::NEVER).map(drop)
    }

    /// Serves subscribers for this long. What happened is there for [`Publisher::next_event`].
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

    /// A child shares the sockets with the process that it was forked from, and would take what is
    /// meant for that one.
    pub(super) fn check_owner(&self) -> Result<(), ShareError> {
        if self.owner.is_current() {
            return Ok(());
        }
        let what = "a publisher";
        Err(ShareError::Inherited { what })
    }

    /// Ends a wait, once, each time that something is written to this eventfd.
    #[cfg(feature = "tokio")]
    pub(in crate::share) fn wake_by(&self, wake: impl AsFd) -> Result<(), ShareError> {
        let data = epoll::EventData::new_u64(WAKE);
        let once = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.waiting, wake, data, once).map_err(failed("epoll_ctl"))?)
    }

    /// What has happened already.
    #[cfg(feature = "tokio")]
    pub(in crate::share) fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }
}

impl AsFd for Publisher {
    /// Readable when [`Publisher::next_event`] has something to do, for programs with a loop of
    /// their own.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waiting.as_fd()
    }
}

pub(super) fn failed(call: &'static str) -> impl Fn(rustix::io::Errno) -> SystemError {
    move |errno| SystemError::new(call, "the publisher's sockets", errno)
}
