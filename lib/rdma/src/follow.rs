//! A registration that follows a lent buffer: given back when the publisher wants it, and made again
//! of what the buffer has become.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::card::Card;
use crate::error::RdmaError;
use crate::registration::{Registration, Weaker};
use peerbuf::Deadline;
use peerbuf::buffer::Access;
use peerbuf::error::{ShareError, SystemError};
use peerbuf::share::{Lease, Subscriber};
use peerbuf_core::unpoisoned;

/// How long its end may go unnoticed by the thread.
const SLICE: Duration = Duration::from_millis(100);

/// A buffer that a publisher lends, registered with a card for as long as it stays where it is, and
/// again when it has moved. A thread of its own sees to that.
///
/// When the publisher wants the buffer back, no more work can be posted on its registration
/// ([`RdmaError::Stale`]), and [`Follower::registration`] waits for the next. What is in flight may end,
/// for three quarters of the time that the publisher gives: the buffer goes back when the last
/// clone and piece of the registration is gone. Whatever is left then is
/// [ended](Registration::end).
///
/// Dropping it does the same without waiting for anything, except for what the program has
/// registrations of itself.
///
/// ```no_run
/// use std::sync::Arc;
/// use std::time::Duration;
/// use peerbuf::share::Subscriber;
/// use peerbuf_rdma::{Card, Follower, Link, RdmaError, Span};
///
/// # fn example(connect: impl Fn() -> Result<Link, RdmaError>) -> Result<(), Box<dyn std::error::Error>> {
/// let subscriber = Arc::new(Subscriber::connect("/run/weights")?);
/// let weights = Follower::new(&Card::open("rxe0")?, &subscriber, "weights", None)?;
/// let mut link = connect()?;
/// let span = Span { offset: 0, at: 0, length: 64 << 20 };
/// // `Err` in place of `|_| connect()` would have what was cut off reported, and not done again.
/// let done = weights.write(&mut link, span, |_| connect())?;
/// println!("{} bytes, {} connections", done.bytes, 1 + done.retries);
/// # Ok(())
/// # }
/// ```
pub struct Follower {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    subscriber: Arc<Subscriber>,
    name: String,
    card: Card,
    remote: Option<Access>,
    now: Mutex<Now>,
    changed: Condvar,
    closing: AtomicBool,
    /// How many generations were registered. Not behind the lock, which may be held for ever in a child that was
    /// forked.
    generations: AtomicU64,
    /// How many of them had to be ended with work in flight.
    cut_off: AtomicU64,
}

enum Now {
    /// Between two generations.
    Moving,
    Registered(Registration),
    /// This generation could not be registered.
    Failed(RdmaError),
    /// There will be no other.
    Ended(RdmaError),
}

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follower")
            .field("card", &self.shared.card)
            .field("name", &self.shared.name)
            .finish_non_exhaustive()
    }
}

impl Follower {
    /// Follows the buffer that is published as `name`. `remote` is what the other end may do with it,
    /// as for [`Card::register`].
    ///
    /// # Errors
    /// The call that failed: making a thread. All that is wrong with the buffer is told by
    /// [`Follower::registration`].
    pub fn new(
        card: &Card,
        subscriber: &Arc<Subscriber>,
        name: &str,
        remote: Option<Access>,
    ) -> Result<Follower, RdmaError> {
        let shared = Arc::new(Shared {
            subscriber: Arc::clone(subscriber),
            name: name.to_owned(),
            card: card.clone(),
            remote,
            now: Mutex::new(Now::Moving),
            changed: Condvar::new(),
            closing: AtomicBool::new(false),
            generations: AtomicU64::new(0),
            cut_off: AtomicU64::new(0),
        });
        let followed = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("peerbuf follower".into())
            .spawn(move || followed.follow())
            .map_err(|error| {
                let errno = peerbuf::Errno::from(&error);
                SystemError::new("clone", "a follower's thread", errno)
            })?;
        Ok(Follower {
            shared,
            thread: Some(thread),
        })
    }

    /// The buffer as it is registered now; waits up to `limit` while it moves. The publisher does not
    /// get the buffer back before this is dropped, or its time is nearly up.
    ///
    /// # Errors
    /// [`RdmaError::TimedOut`]; [`RdmaError::Share`] with [`ShareError::Inherited`] in a child of the
    /// process that made it; why this generation could not be registered, as [`Card::register`];
    /// [`RdmaError::Share`] when the publisher lends it no more.
    pub fn registration(&self, limit: Duration) -> Result<Registration, RdmaError> {
        if let Some(inherited) = self.shared.inherited() {
            return Err(RdmaError::Share(Box::new(inherited)));
        }
        let deadline = Deadline::after(limit);
        let mut now = self.shared.lock();
        loop {
            match &*now {
                Now::Registered(registration) => return Ok(registration.clone()),
                Now::Failed(error) | Now::Ended(error) => return Err(error.clone()),
                Now::Moving => {}
            }
            let left = deadline.left();
            if left.is_zero() {
                let what = format!("the next generation of {}", self.shared.name);
                return Err(RdmaError::TimedOut { what, limit });
            }
            let waited = self.shared.changed.wait_timeout(now, left);
            now = unpoisoned(waited).0;
        }
    }

    /// How many generations were registered so far.
    pub fn generations(&self) -> u64 {
        self.shared.generations.load(Ordering::Relaxed)
    }

    /// How many of them had to be [ended](Registration::end), because they were still in use when the
    /// publisher's time was nearly up.
    pub fn cut_off(&self) -> u64 {
        self.shared.cut_off.load(Ordering::Relaxed)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if self.shared.inherited().is_some() {
            std::mem::forget((self.thread.take(), Arc::clone(&self.shared)));
            return;
        }
        self.shared.closing.store(true, Ordering::Release);
        self.shared.set(Now::Moving);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// In a child there is no thread that would follow, and the state may be locked for ever.
    fn inherited(&self) -> Option<ShareError> {
        let ended = self.subscriber.ended();
        ended.filter(|error| matches!(error, ShareError::Inherited { .. }))
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        unpoisoned(self.now.lock())
    }

    fn set(&self, now: Now) {
        let registered = u64::from(matches!(now, Now::Registered(_)));
        let mut state = self.lock();
        self.generations.fetch_add(registered, Ordering::Relaxed);
        let before = std::mem::replace(&mut *state, now);
        drop(state);
        self.changed.notify_all();
        // Not with the state locked: it may be the last handle, and then the card is asked to let go.
        if let Now::Registered(registration) = before {
            registration.want_back();
        }
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn follow(&self) {
        while !self.is_closing() {
            match self.subscriber.buffer_within(&self.name, SLICE) {
                Ok(lease) => self.hold(lease),
                Err(ShareError::TimedOut { .. }) => {}
                // Of no use, and there may be another.
                Err(error) if self.subscriber.ended().is_none() => {
                    self.set(Now::Failed(RdmaError::Share(Box::new(error))));
                    std::thread::sleep(SLICE);
                }
                Err(error) => return self.set(Now::Ended(RdmaError::Share(Box::new(error)))),
            }
        }
    }

    /// One generation, until it was given back.
    fn hold(&self, lease: Lease) {
        let result = self.card.register(&lease.whole(), self.remote);
        let registered = result.as_ref().ok().map(Registration::downgrade);
        self.set(match result {
            Ok(registration) => Now::Registered(registration),
            Err(error) => Now::Failed(error),
        });
        let deadline = loop {
            if self.is_closing() || self.subscriber.ended().is_some() {
                break None;
            }
            if let Some(deadline) = lease.wait_until_wanted(SLICE) {
                break Some(deadline);
            }
        };
        drop(lease);
        // Should the program be closing, a registration may have been set after that.
        self.set(Now::Moving);
        if let (Some(deadline), Some(registered)) = (deadline, registered) {
            self.give_back(&registered, deadline);
        }
    }

    /// Sees to it that a generation is given back before the publisher's time is up.
    fn give_back(&self, registered: &Weaker, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let end = Instant::now() + left * 3 / 4;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // The next generation comes when everybody has given this one back.
            let next = self.subscriber.buffer_within(&self.name, left.min(SLICE));
            let waiting = matches!(next, Err(ShareError::TimedOut { .. }));
            drop(next);
            match registered.upgrade() {
                Some(registration) if left.is_zero() => {
                    registration.end();
                    self.cut_off.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Some(_) if waiting && !self.is_closing() => {}
                _ => return,
            }
        }
    }
}
