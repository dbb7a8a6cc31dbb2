//! The async version of [`share`](super) (feature `tokio`).
//!
//! A [`Publisher`] here is a handle to a blocking publisher ([`super::Publisher`]) that a
//! separate thread serves from the start. A slow task or a copy of many gigabytes therefore
//! delays nobody else. A [`Subscriber`] hands out the same [`Lease`]s; [`Lease::wanted`] waits
//! until the publisher wants a lease back.
//!
//! Every future may be dropped at any time: a dropped request takes no lease, and a migration
//! that has begun goes on to its end. There are no time limits besides those of the protocol;
//! wrap a future in `tokio::time::timeout` for one. [`Subscriber::connect`] needs a tokio
//! runtime. All other functions run in any runtime.
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

/// Work for the thread. A command that takes the publisher out of the option ends the thread.
type Command = Box<dyn FnOnce(&mut Option<super::Publisher>) + Send>;

/// A publisher with its own thread.
///
/// Many tasks can use a publisher at once; the thread runs their requests one after the other.
/// Dropping the handle ends the thread and the publisher, after a migration that is running.
pub struct Publisher {
    /// `None` only during drop.
    commands: Option<Sender<Command>>,
    owner: Process,
    /// Eventfd that ends the thread's wait.
    wake: Arc<OwnedFd>,
    events: Mutex<mpsc::UnboundedReceiver<Result<Event, ShareError>>>,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}

impl Publisher {
    /// Serves this publisher's subscribers from now on. Set the policy and the batch size
    /// before.
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

    /// Runs `work` with the publisher in its thread, and waits for the result.
    ///
    /// # Errors
    /// [`ShareError::PeerGone`] if the thread has ended; [`Publisher::next_event`] returned the
    /// reason. [`ShareError::Inherited`] in a forked child of the process with the thread.
    pub async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut super::Publisher) -> T + Send + 'static,
    ) -> Result<T, ShareError> {
        self.order(move |publisher| publisher.as_mut().map(work))
            .await
    }

    /// Ends the thread and returns the publisher, with its buffers and subscribers.
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
                // The caller may have dropped its future.
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

    /// Async version of [`super::Publisher::add`].
    ///
    /// # Errors
    /// The same, and as [`Publisher::with`].
    pub async fn add(&self, channel: Channel) -> Result<SubscriberId, ShareError> {
        self.with(|publisher| publisher.add(channel)).await?
    }

    /// Async version of [`super::Publisher::publish`].
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

    /// Async version of [`super::Publisher::publish_all`].
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

    /// Async version of [`super::Publisher::migrate`].
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

    /// Async version of [`super::Publisher::migrate_to`].
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

    /// Async version of [`super::Publisher::migrate_all`].
    ///
    /// # Errors
    /// As [`Publisher::with`]. The results contain the errors of single buffers.
    pub async fn migrate_all(
        &self,
        ids: &[BufferId],
        time_limit: Duration,
    ) -> Result<Vec<Result<Migration, ShareError>>, ShareError> {
        let ids = ids.to_vec();
        self.with(move |publisher| publisher.migrate_all(&ids, time_limit))
            .await
    }

    /// Async version of [`super::Publisher::withdraw`].
    ///
    /// # Errors
    /// The same, and as [`Publisher::with`].
    pub async fn withdraw(&self, id: BufferId, time_limit: Duration) -> Result<(), ShareError> {
        self.with(move |publisher| publisher.withdraw(id, time_limit))
            .await?
    }

    /// Waits for the next event. Events that arrive while no task waits are kept.
    ///
    /// # Errors
    /// The call that failed and ended the thread, once; [`ShareError::PeerGone`] afterwards;
    /// [`ShareError::Inherited`], as for [`Publisher::with`].
    pub async fn next_event(&self) -> Result<Event, ShareError> {
        self.check_owner()?;
        let event = self.events.lock().await.recv().await;
        event.unwrap_or(Err(ShareError::PeerGone))
    }

    /// A forked child has no thread that would answer.
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
            // The fork may have copied the sender in the middle of a send.
            std::mem::forget(commands);
            return;
        }
        // The thread checks whether a sender is left, so the sender must go before the wake-up.
        drop(commands);
        wake(&self.wake);
    }
}

fn wake(eventfd: &OwnedFd) {
    // The write fails only if the counter is full of wake-ups already.
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// The thread: serves subscribers, runs commands, and reports events.
fn serve(
    publisher: super::Publisher,
    wake: &OwnedFd,
    commands: &Receiver<Command>,
    happened: &mpsc::UnboundedSender<Result<Event, ShareError>>,
) {
    let mut publisher = Some(publisher);
    loop {
        loop {
            // A sender wakes the next wait, so a command that arrives meanwhile is not lost.
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
            // The receiver may be gone.
            let _ = happened.send(Ok(event));
        }
        if let Err(error) = publisher.serve_once() {
            let _ = happened.send(Err(error));
            return;
        }
        let _ = rustix::io::read(wake, &mut [0; 8]);
    }
}

/// Async version of [`super::Subscriber`].
///
/// Dropping it waits for the subscriber's thread, which is idle by then.
#[derive(Debug)]
pub struct Subscriber(super::Subscriber);

impl Subscriber {
    /// Async version of [`super::Subscriber::connect`].
    ///
    /// # Errors
    /// The same.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Subscriber, ShareError> {
        let path = path.as_ref().to_owned();
        // Connecting blocks while the publisher has a full backlog.
        let connected = ::tokio::task::spawn_blocking(|| super::Subscriber::connect(path)).await;
        // The closure cannot panic, so only a runtime that shuts down drops it.
        connected
            .unwrap_or(Err(ShareError::PeerGone))
            .map(Subscriber)
    }

    /// Async version of [`super::Subscriber::new`].
    ///
    /// # Errors
    /// The same.
    pub fn new(channel: Channel) -> Result<Subscriber, ShareError> {
        super::Subscriber::new(channel).map(Subscriber)
    }

    /// Async version of [`super::Subscriber::buffer`].
    ///
    /// # Errors
    /// The same.
    pub async fn buffer(&self, name: &str) -> Result<Lease, ShareError> {
        self.0
            .session()
            .changed_until(|| self.0.try_buffer(name).transpose())
            .await
    }

    /// Async version of [`super::Subscriber::names`].
    pub fn names(&self) -> Vec<String> {
        self.0.names()
    }

    /// Async version of [`super::Subscriber::ended`].
    pub fn ended(&self) -> Option<ShareError> {
        self.0.ended()
    }
}

impl Lease {
    /// Waits until the publisher wants the lease back, and returns the deadline; `None` if the
    /// publisher has gone.
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
