//! The same for programs that wait with `async` (feature `tokio`).
//!
//! A [`Publisher`] here is a handle to a blocking one ([`super::Publisher`]) that a thread of its own
//! serves from its beginning on, so neither a slow task nor a copy of many gigabytes keeps anybody
//! else waiting. A [`Subscriber`] lends the same [`Lease`]s; [`Lease::wanted`] waits for the moment
//! at which one is wanted back.
//!
//! Every future may be dropped at any time: a lease is then not taken; a migration that was begun
//! goes on to its end. There are no time limits besides those of the protocol:
//! `tokio::time::timeout` makes one of any of these. [`Subscriber::connect`] needs a tokio runtime,
//! everything else runs in any.
//!
//! ```
//! use std::time::Duration;
//! use peerbuf::export::memfd;
//! use peerbuf::share::tokio::{Publisher, Subscriber};
//! use peerbuf::share::{Channel, Copied};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (ours, theirs) = Channel::pair()?;
//! let publisher = Publisher::serve(peerbuf::share::Publisher::new()?)?;
//! publisher.add(ours).await?;
//! let memory = Copied::new(|_| memfd::export("weights", 1 << 20))?;
//! let weights = publisher.publish("weights", memory).await?;
//!
//! let subscriber = Subscriber::new(theirs)?;
//! let lease = subscriber.buffer("weights").await?;
//! let (moved, wanted) = tokio::join!(
//!     publisher.migrate(weights, Duration::from_secs(1)),
//!     async {
//!         let wanted = lease.wanted().await;
//!         drop(lease);
//!         wanted
//!     },
//! );
//! assert!(wanted.is_some());
//! assert_eq!(moved?.generation, 2);
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use ::tokio::sync::{Mutex, mpsc, oneshot};
use rustix::event::{EventfdFlags, eventfd};

use super::backing::{Backing, Placement};
use super::channel::Channel;
use super::publisher::{BufferId, Event, Migration, SubscriberId};
use super::subscriber::Lease;
use crate::error::{ShareError, SystemError};
use crate::sys::fork::Process;

/// Something for the thread to do. Gives the publisher up by taking it.
type Command = Box<dyn FnOnce(&mut Option<super::Publisher>) + Send>;

/// A publisher that a thread of its own serves.
///
/// Can be used by many tasks at once; what they ask is done one after the other. Dropping it ends
/// the thread, and the publisher with it, as soon as a migration that is under way has ended.
pub struct Publisher {
    /// Taken when it is dropped.
    commands: Option<Sender<Command>>,
    owner: Process,
    /// Ends the thread's wait.
    wake: Arc<OwnedFd>,
    events: Mutex<mpsc::UnboundedReceiver<Result<Event, ShareError>>>,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}

impl Publisher {
    /// Serves this publisher's subscribers from now on. Its policy and the size of its batches are
    /// set before.
    ///
    /// # Errors
    /// The call that failed, such as `EMFILE`.
    pub fn serve(publisher: super::Publisher) -> Result<Publisher, ShareError> {
        let failed = |call| move |errno| SystemError::new(call, "a publisher's thread", errno);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(failed("eventfd"))?);
        publisher.wake_by(&*wake)?;
        let (commands, received) = channel();
        let (happened, events) = mpsc::unbounded_channel();
        let kept = Arc::clone(&wake);
        std::thread::Builder::new()
            .name("peerbuf publisher".into())
            .spawn(move || serve(publisher, &kept, &received, &happened))
            .map_err(|error| {
                let errno = crate::errno::Errno::from(&error);
                SystemError::new("clone", "a publisher's thread", errno)
            })?;
        Ok(Publisher {
            commands: Some(commands),
            owner: Process::current(),
            wake,
            events: Mutex::new(events),
        })
    }

    /// Does something with the publisher, in its thread, and waits for the answer.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`] when the thread has ended, as [`Publisher::next_event`] explained;
    /// [`ShareError::Inherited`] in a child that was forked from the process with the thread.
    pub async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut super::Publisher) -> T + Send + 'static,
    ) -> Result<T, ShareError> {
        self.order(move |publisher| publisher.as_mut().map(work))
            .await
    }

    /// Ends the thread and gives the publisher back, with its buffers and subscribers.
    ///
    /// # Errors
    /// As [`Publisher::with`].
    pub async fn stop(self) -> Result<super::Publisher, ShareError> {
        self.order(Option::take).await
    }

    async fn order<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Option<super::Publisher>) -> Option<T> + Send + 'static,
    ) -> Result<T, ShareError> {
        self.check_owner()?;
        let (answer, answered) = oneshot::channel();
        let command: Command = Box::new(move |publisher| {
            if let Some(done) = work(publisher) {
                // Whoever asked may have gone.
                let _ = answer.send(done);
            }
        });
        let sent = self
            .commands
            .as_ref()
            .map(|commands| commands.send(command));
        if !matches!(sent, Some(Ok(()))) {
            return Err(ShareError::PeerGone);
        }
        wake(&self.wake);
        answered.await.map_err(|_| ShareError::PeerGone)
    }

    /// As [`super::Publisher::add`].
    ///
    /// # Errors
    /// The same, and as [`Publisher::with`].
    pub async fn add(&self, channel: Channel) -> Result<SubscriberId, ShareError> {
        self.with(|publisher| publisher.add(channel)).await?
    }

    /// As [`super::Publisher::publish`].
    ///
    /// # Errors
    /// The same, and as [`Publisher::with`].
    pub async fn publish(
        &self,
        name: &str,
        backing: impl Backing + 'static,
    ) -> Result<BufferId, ShareError> {
        let name = name.to_owned();
        self.with(move |publisher| publisher.publish(&name, backing))
            .await?
    }

    /// As [`super::Publisher::publish_all`].
    ///
    /// # Errors
    /// The same, and as [`Publisher::with`].
    pub async fn publish_all(
        &self,
        buffers: Vec<(String, Box<dyn Backing>)>,
    ) -> Result<Vec<BufferId>, ShareError> {
        self.with(|publisher| {
            let (names, backings): (Vec<_>, Vec<_>) = buffers.into_iter().unzip();
            publisher.publish_all(names.iter().map(String::as_str).zip(backings))
        })
        .await?
    }

    /// As [`super::Publisher::migrate`].
    ///
    /// # Errors
    /// The same, and as [`Publisher::with`].
    pub async fn migrate(
        &self,
        id: BufferId,
        time_limit: Duration,
    ) -> Result<Migration, ShareError> {
        self.with(move |publisher| publisher.migrate(id, time_limit))
            .await?
    }

    /// As [`super::Publisher::migrate_to`].
    ///
    /// # Errors
    /// The same, and as [`Publisher::with`].
    pub async fn migrate_to(
        &self,
        id: BufferId,
        to: Placement,
        time_limit: Duration,
    ) -> Result<Migration, ShareError> {
        self.with(move |publisher| publisher.migrate_to(id, to, time_limit))
            .await?
    }

    /// As [`super::Publisher::migrate_all`].
    ///
    /// # Errors
    /// As [`Publisher::with`]; the rest is in the answers.
    pub async fn migrate_all(
        &self,
        ids: &[BufferId],
        time_limit: Duration,
    ) -> Result<Vec<Result<Migration, ShareError>>, ShareError> {
        let ids = ids.to_vec();
        self.with(move |publisher| publisher.migrate_all(&ids, time_limit))
            .await
    }

    /// As [`super::Publisher::withdraw`].
    ///
    /// # Errors
    /// The same, and as [`Publisher::with`].
    pub async fn withdraw(&self, id: BufferId, time_limit: Duration) -> Result<(), ShareError> {
        self.with(move |publisher| publisher.withdraw(id, time_limit))
            .await?
    }

    /// Waits for something to happen. What happened while nobody waited is kept.
    ///
    /// # Errors
    /// The call that failed and ended the thread, once; [`ShareError::PeerGone`] afterwards;
    /// [`ShareError::Inherited`], as for [`Publisher::with`].
    pub async fn next_event(&self) -> Result<Event, ShareError> {
        self.check_owner()?;
        let event = self.events.lock().await.recv().await;
        event.unwrap_or(Err(ShareError::PeerGone))
    }

    /// A child has no thread that would answer.
    fn check_owner(&self) -> Result<(), ShareError> {
        if self.owner.is_current() {
            return Ok(());
        }
        let what = "a publisher";
        Err(ShareError::Inherited { what })
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        let commands = self.commands.take();
        if self.check_owner().is_err() {
            // It may have been copied while somebody sent.
            std::mem::forget(commands);
            return;
        }
        // The thread looks whether anybody can still ask for something; that has ended when the
        // sender goes, so it goes first.
        drop(commands);
        wake(&self.wake);
    }
}

fn wake(eventfd: &OwnedFd) {
    // It can only be full of wake-ups already.
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// The thread: serves subscribers, does what it is told, and tells what happened.
fn serve(
    publisher: super::Publisher,
    wake: &OwnedFd,
    commands: &Receiver<Command>,
    happened: &mpsc::UnboundedSender<Result<Event, ShareError>>,
) {
    let mut publisher = Some(publisher);
    loop {
        loop {
            // Whoever sends a command wakes the next wait; one that comes meanwhile is not lost.
            match commands.try_recv() {
                Ok(command) => command(&mut publisher),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        let Some(publisher) = &mut publisher else {
            return;
        };
        for event in publisher.take_events() {
            // Nobody may be there to be told.
            let _ = happened.send(Ok(event));
        }
        if let Err(error) = publisher.serve_once() {
            let _ = happened.send(Err(error));
            return;
        }
        let _ = rustix::io::read(wake, &mut [0; 8]);
    }
}

/// As [`super::Subscriber`], for programs that wait with `async`.
///
/// Dropping it waits for the subscriber's thread, which is idle by then.
#[derive(Debug)]
pub struct Subscriber(super::Subscriber);

impl Subscriber {
    /// As [`super::Subscriber::connect`].
    ///
    /// # Errors
    /// The same.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Subscriber, ShareError> {
        let path = path.as_ref().to_owned();
        // Connecting waits while the publisher has many to accept.
        let connected = ::tokio::task::spawn_blocking(|| super::Subscriber::connect(path)).await;
        // It cannot panic, so only a runtime that shuts down drops it.
        connected
            .unwrap_or(Err(ShareError::PeerGone))
            .map(Subscriber)
    }

    /// As [`super::Subscriber::new`].
    ///
    /// # Errors
    /// The same.
    pub fn new(channel: Channel) -> Result<Subscriber, ShareError> {
        super::Subscriber::new(channel).map(Subscriber)
    }

    /// As [`super::Subscriber::buffer`].
    ///
    /// # Errors
    /// The same.
    pub async fn buffer(&self, name: &str) -> Result<Lease, ShareError> {
        self.0
            .session()
            .changed_until(|| self.0.try_buffer(name).transpose())
            .await
    }

    /// As [`super::Subscriber::names`].
    pub fn names(&self) -> Vec<String> {
        self.0.names()
    }

    /// As [`super::Subscriber::ended`].
    pub fn ended(&self) -> Option<ShareError> {
        self.0.ended()
    }
}

impl Lease {
    /// Waits until it is wanted back, and says by when; `None` when the publisher is gone.
    pub async fn wanted(&self) -> Option<Instant> {
        let session = self.session();
        let wanted = || match self.wanted_back() {
            None if session.has_ended() => Some(None),
            None => None,
            wanted => Some(wanted),
        };
        session.changed_until(wanted).await
    }
}
