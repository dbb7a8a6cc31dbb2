//! A registration that follows a lent buffer: it is given back when the publisher wants the buffer, and made
//! again for the next generation.

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

/// How often the thread checks whether the follower is dropped.
const SLICE: Duration = Duration::from_millis(100);

/// A lent buffer that stays registered with a card across its moves: a thread registers each generation.
///
/// When the publisher wants the buffer back, no new work can be posted on its registration
/// ([`RdmaError::Stale`]), and [`Follower::registration`] waits for the next one. Work in flight may end,
/// within three quarters of the publisher's time limit; the buffer goes back when the last clone and piece of
/// the registration is dropped. After that time a registration still in use is [ended](Registration::end).
///
/// Dropping a follower does the same without waiting, except for registrations that the program itself holds.
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
    /// The number of registered generations. Not under the lock, which a forked child may find locked
    /// forever.
    generations: AtomicU64,
    /// The number of generations that were ended with work in flight.
    cut_off: AtomicU64,
}

enum Now {
    /// Between two generations.
    Moving,
    Registered(Registration),
    /// This generation could not be registered.
    Failed(RdmaError),
    /// No generation will follow.
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
    /// Follows the buffer published as `name`. `remote` is the access allowed to the peer, as for
    /// [`Card::register`].
    ///
    /// # Errors The failed call: creating a thread. [`Follower::registration`] reports all errors of the
    /// buffer.
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

    /// The current registration of the buffer; waits up to `limit` while the buffer moves. The publisher gets
    /// the buffer back when the result is dropped, or when its time limit is nearly over.
    ///
    /// # Errors [`RdmaError::TimedOut`]; [`RdmaError::Share`] with [`ShareError::Inherited`] in a child of
    /// the process that made the follower; an error of [`Card::register`] for this generation;
    /// [`RdmaError::Share`] if the publisher no longer lends the buffer.
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

    /// The number of generations registered so far.
    pub fn generations(&self) -> u64 {
        self.shared.generations.load(Ordering::Relaxed)
    }

    /// The number of generations that were [ended](Registration::end), because they were still in use when
    /// the publisher's time limit was nearly over.
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
    /// An error in a forked child: it has no thread that follows, and the state may be locked forever.
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
        // Dropped with the state unlocked: the last handle calls into the card's driver.
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
                // An unusable generation; another may follow.
                Err(error) if self.subscriber.ended().is_none() => {
                    self.set(Now::Failed(RdmaError::Share(Box::new(error))));
                    std::thread::sleep(SLICE);
                }
                Err(error) => return self.set(Now::Ended(RdmaError::Share(Box::new(error)))),
            }
        }
    }

    /// Handles one generation, until it is given back.
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
        // If the program is closing, a registration may have been set meanwhile.
        self.set(Now::Moving);
        if let (Some(deadline), Some(registered)) = (deadline, registered) {
            self.give_back(&registered, deadline);
        }
    }

    /// Ensures that a generation is given back before the publisher's time limit.
    fn give_back(&self, registered: &Weaker, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let end = Instant::now() + left * 3 / 4;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // The next generation comes after every subscriber has given this one back.
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
