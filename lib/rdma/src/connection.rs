//! Reliable connections: make an end, connect it, post work, wait for it, and stop all of it at once.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};

use crate::card::Card;
use crate::error::RdmaError;
use crate::registration::{Piece, Registration, Work};
use crate::sys::verbs::{Done, Pair, Peer, QueuePair, Verb};
use crate::wire::{Address, Remote};
use crate::work::{Completion, Operation, Status, WorkError, WorkId};
use peerbuf::error::{BufferError, SystemError};
use peerbuf::{Deadline, Errno};

/// The longest message in bytes; every card supports it.
pub(crate) const LONGEST: u64 = 1 << 30;

/// The part of a connection by which any thread can stop it.
struct Line {
    pair: Arc<Pair>,
    /// Set before the card flushes the posted work: completions from then on count as cut off.
    stopping: AtomicBool,
    /// Set when the card has forgotten all posted work.
    stopped: AtomicBool,
    /// Readable once it is stopped.
    wake: OwnedFd,
}

impl Work for Line {
    /// Ends all work, local and remote. On return the card accesses no region of it; requests in flight
    /// complete as flushed.
    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // Fails only if the card is gone, and its work with it.
        let _ = self.pair.forget();
        self.stopped.store(true, Ordering::Release);
        // Fails only if the counter is full, and so readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// An unconnected end of a connection.
#[doc(alias = "ibv_create_qp")]
pub struct Endpoint {
    queue: QueuePair,
    line: Arc<Line>,
    card: Card,
    sequence: u32,
    mtu: i32,
    depth: u32,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("card", &self.card)
            .field("address", &self.address())
            .finish_non_exhaustive()
    }
}

impl Card {
    /// Makes an end of a reliable connection, with up to `depth` requests in flight in each direction.
    ///
    /// # Errors The failed call: `ENETDOWN` while the card's port is not active, `ENOMEM` and `EINVAL` for
    /// more requests than the card supports.
    pub fn endpoint(&self, depth: u32) -> Result<Endpoint, RdmaError> {
        self.domain().here()?;
        let domain = self.domain().verbs();
        let failed = |call| move |errno| SystemError::new(call, self.name(), errno);
        let port = self.port();
        let now = domain.port(port).map_err(failed("ibv_query_port"))?;
        if !now.is_active() {
            return Err(failed("ibv_query_port")(Errno::NETDOWN).into());
        }
        let mtu = now.mtu();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|errno| failed("eventfd")(errno.into()))?;
        let queue = QueuePair::new(domain, port, depth).map_err(failed("ibv_create_qp"))?;
        let line = Line {
            pair: Arc::clone(queue.pair()),
            stopping: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            wake,
        };
        Ok(Endpoint {
            queue,
            line: Arc::new(line),
            card: self.clone(),
            sequence: rand::random::<u32>() >> 8,
            mtu,
            depth,
        })
    }
}

impl Endpoint {
    /// The address to pass to the peer.
    pub fn address(&self) -> Address {
        let peer = Peer {
            gid: self.card.gid(),
            lid: self.card.place().lid,
            queue: self.queue.number(),
            sequence: self.sequence,
            mtu: self.mtu,
        };
        Address { peer }
    }

    /// Connects it to the peer, which connects to this end likewise. Work can be posted at once, but the peer
    /// must connect within about seven seconds of its arrival. After the same time a dead peer is reported
    /// ([`Status::UNANSWERED`]).
    ///
    /// # Errors [`RdmaError::Mismatch`] for a peer on another network; the failed call: `EINVAL`,
    /// `ENETUNREACH` or `ETIMEDOUT` for an address without a route.
    #[doc(alias = "ibv_modify_qp")]
    pub fn connect(self, peer: &Address) -> Result<Connection, RdmaError> {
        self.card.domain().here()?;
        let route = self.card.place().route(&peer.peer)?;
        let peer = Peer {
            mtu: self.mtu.min(peer.peer.mtu),
            ..peer.peer
        };
        self.queue
            .connect(&peer, route, self.sequence)
            .map_err(|errno| SystemError::new("ibv_modify_qp", self.card.name(), errno))?;
        let failed = |call| move |errno| SystemError::new(call, "a connection", errno);
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("epoll_create1"))?;
        for fd in [self.queue.events(), self.line.wake.as_fd()] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&events, fd, data, epoll::EventFlags::IN).map_err(failed("epoll_ctl"))?;
        }
        Ok(Connection {
            queue: self.queue,
            line: self.line,
            events,
            in_flight: BTreeMap::new(),
            card: self.card,
            last: 0,
            depth: self.depth,
        })
    }
}

struct Posted {
    operation: Operation,
    /// Keeps the registration until the card is done with it.
    piece: Option<Piece>,
    host_bytes: u64,
}

/// A reliable connection. The card does the requests in the order in which they were posted.
///
/// Dropping it stops the card first, and then drops the registrations of the work in flight.
#[doc(alias = "ibv_qp")]
#[doc(alias = "QueuePair")]
pub struct Connection {
    // These two first, so that the card has stopped before the registrations are dropped.
    queue: QueuePair,
    line: Arc<Line>,
    /// Readable when the card has an event, or the connection was stopped.
    events: OwnedFd,
    /// By number, which is the order of posting.
    in_flight: BTreeMap<u64, Posted>,
    card: Card,
    last: u64,
    depth: u32,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("card", &self.card)
            .field("in_flight", &self.in_flight.len())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Writes a piece to the peer's memory of the same length. With `immediate` the peer gets the value in a
    /// receive of its own once the bytes have arrived.
    ///
    /// # Errors [`RdmaError::Stale`]; [`RdmaError::Mismatch`] if the piece does not fit the remote memory,
    /// the card or one request; the error of a copy to the staging memory; `EAGAIN` with `depth` requests in
    /// flight; [`RdmaError::Stopped`].
    #[doc(alias = "IBV_WR_RDMA_WRITE")]
    #[doc(alias = "ibv_post_send")]
    pub fn write(
        &mut self,
        from: &Piece,
        to: &Remote,
        immediate: Option<u32>,
    ) -> Result<WorkId, RdmaError> {
        let verb = Verb::Write {
            to: to.address,
            key: to.key,
            immediate,
        };
        self.post(from, Some(to), Operation::Write, verb)
    }

    /// Reads the peer's memory into a piece of the same length.
    ///
    /// # Errors
    /// As [`Connection::write`], and [`BufferError::Access`] for a buffer that is not writable.
    #[doc(alias = "IBV_WR_RDMA_READ")]
    pub fn read(&mut self, into: &Piece, from: &Remote) -> Result<WorkId, RdmaError> {
        writable(into)?;
        let verb = Verb::Read {
            from: from.address,
            key: from.key,
        };
        self.post(into, Some(from), Operation::Read, verb)
    }

    /// Sends a piece, for which the peer has posted a receive.
    ///
    /// # Errors
    /// As [`Connection::write`].
    #[doc(alias = "IBV_WR_SEND")]
    pub fn send(&mut self, piece: &Piece, immediate: Option<u32>) -> Result<WorkId, RdmaError> {
        self.post(piece, None, Operation::Send, Verb::Send { immediate })
    }

    /// Posts a receive for the peer's send; with `None`, for the immediate value of a write.
    ///
    /// # Errors
    /// As [`Connection::read`].
    #[doc(alias = "ibv_post_recv")]
    pub fn receive(&mut self, into: Option<&Piece>) -> Result<WorkId, RdmaError> {
        if let Some(piece) = into {
            self.fits(piece)?;
            writable(piece)?;
        }
        self.has_room()?;
        let id = self.last + 1;
        let line = self.line();
        let failed = |errno| SystemError::new("ibv_post_recv", self.card.name(), errno);
        match into {
            None => self.queue.post_receive(id, Default::default()),
            Some(piece) => {
                let held = piece.registration().use_it(&line)?;
                self.queue.post_receive(id, held.local(piece))
            }
        }
        .map_err(failed)?;
        let posted = Posted {
            operation: Operation::Receive,
            piece: into.cloned(),
            host_bytes: 0,
        };
        Ok(self.posted(id, posted))
    }

    fn post(
        &mut self,
        piece: &Piece,
        remote: Option<&Remote>,
        operation: Operation,
        verb: Verb,
    ) -> Result<WorkId, RdmaError> {
        self.fits(piece)?;
        if let Some(remote) = remote
            && remote.length != piece.len()
        {
            let what = format!(
                "the local range has {} bytes, the remote range {}",
                piece.len(),
                remote.length
            );
            return Err(RdmaError::Mismatch { what });
        }
        self.has_room()?;
        // From here on the registration cannot be ended before the card has the request. After that, ending
        // it stops this connection.
        let held = piece.registration().use_it(&self.line())?;
        let host_bytes = match operation {
            Operation::Write | Operation::Send => held.refresh(piece.offset(), piece.len())?,
            _ => 0,
        };
        let id = self.last + 1;
        self.queue
            .post(id, held.local(piece), verb)
            .map_err(|errno| SystemError::new("ibv_post_send", self.card.name(), errno))?;
        drop(held);
        let posted = Posted {
            operation,
            piece: Some(piece.clone()),
            host_bytes,
        };
        Ok(self.posted(id, posted))
    }

    fn line(&self) -> Weak<dyn Work> {
        let line: Weak<Line> = Arc::downgrade(&self.line);
        line
    }

    fn posted(&mut self, id: u64, posted: Posted) -> WorkId {
        self.last = id;
        self.in_flight.insert(id, posted);
        WorkId(id)
    }

    /// Refuses requests that the card cannot do.
    fn fits(&self, piece: &Piece) -> Result<(), RdmaError> {
        let registration = piece.registration();
        if !registration.domain().is(self.card.domain()) {
            let what = format!(
                "the buffer is registered with {}, the connection belongs to {}",
                registration.domain().name(),
                self.card.name()
            );
            return Err(RdmaError::Mismatch { what });
        }
        if piece.len() > LONGEST {
            let what = format!(
                "the request has {} bytes, the limit is {LONGEST}",
                piece.len()
            );
            return Err(RdmaError::Mismatch { what });
        }
        registration.check()
    }

    /// Notes that the peer has the registration's key. Ending the registration ([`Registration::end`]) then
    /// stops this connection first.
    pub fn shows(&self, registration: &Registration) {
        // An ended registration needs no connection to be stopped.
        let _ = registration.use_it(&self.line());
    }

    /// True once the connection was stopped, permanently, because a registration that it used was ended.
    pub fn is_stopped(&self) -> bool {
        self.line.stopped.load(Ordering::Acquire)
    }

    fn stopped(&self) -> RdmaError {
        let card = self.card.name().to_owned();
        RdmaError::Stopped { card }
    }

    fn has_room(&self) -> Result<(), RdmaError> {
        self.card.domain().here()?;
        if self.is_stopped() {
            return Err(self.stopped());
        }
        // The completion queue has room for `depth` requests in each direction.
        if self.in_flight.len() < 2 * self.depth as usize {
            return Ok(());
        }
        Err(SystemError::new("ibv_post_send", self.card.name(), Errno::AGAIN).into())
    }

    /// The maximum number of requests in flight in each direction.
    pub fn depth(&self) -> usize {
        self.depth as usize
    }

    /// The number of requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The next completion, if there is one.
    ///
    /// # Errors The failed call; [`RdmaError::Inherited`] in a forked child.
    #[doc(alias = "ibv_poll_cq")]
    pub fn poll(&mut self) -> Result<Option<Completion>, RdmaError> {
        self.card.domain().here()?;
        // Read first: after the stop no new completion appears.
        let stopped = self.is_stopped();
        let done = self
            .queue
            .poll()
            .map_err(|errno| SystemError::new("ibv_poll_cq", self.card.name(), errno))?;
        let forgotten = || Done {
            id: self.in_flight.first_key_value().map_or(0, |(id, _)| *id),
            status: Status::FLUSHED.0,
            ..Done::default()
        };
        let done = match done {
            None if stopped && !self.in_flight.is_empty() => Some(forgotten()),
            done => done,
        };
        done.map(|done| self.complete(&done)).transpose()
    }

    fn complete(&mut self, done: &Done) -> Result<Completion, RdmaError> {
        let Some(posted) = self.in_flight.remove(&done.id) else {
            let what = format!(
                "{} reported a completion for an unknown request",
                self.card.name()
            );
            return Err(RdmaError::Malformed { what });
        };
        let cut_off = self.line.stopping.load(Ordering::Acquire);
        let failed = |operation, status| WorkError {
            operation,
            status: Status(status),
            vendor: done.vendor,
            cut_off,
            copy: None,
        };
        let Posted {
            operation,
            piece,
            mut host_bytes,
        } = posted;
        let arrived = match operation {
            // For a write without bytes in the receive, the card reports the number of bytes written.
            Operation::Receive => done.bytes.into(),
            _ => piece.as_ref().map_or(0, Piece::len),
        };
        let mut result = match done.status {
            0 => Ok(arrived),
            status => Err(failed(operation, status)),
        };
        if let (Ok(_), Operation::Read | Operation::Receive, Some(piece)) =
            (&result, operation, &piece)
        {
            let length = arrived.min(piece.len());
            let delivered = match piece.registration().hold() {
                Ok(held) => held.deliver(piece.offset(), length),
                // The bytes arrived, but had not been copied yet.
                Err(_) => {
                    result = Err(WorkError {
                        cut_off: true,
                        ..failed(operation, Status::FLUSHED.0)
                    });
                    Ok(0)
                }
            };
            match delivered {
                Ok(bytes) => host_bytes += bytes,
                Err(error) => {
                    result = Err(WorkError {
                        cut_off: false,
                        copy: Some(error),
                        ..failed(operation, Status::SUCCESS.0)
                    });
                }
            }
        }
        Ok(Completion {
            id: WorkId(done.id),
            operation,
            result,
            immediate: done.immediate,
            host_bytes,
        })
    }

    /// Waits for the next completion, with the card's event.
    ///
    /// # Errors As [`Connection::poll`], and [`RdmaError::TimedOut`]; [`RdmaError::Stopped`] if it was
    /// stopped and every request has completed.
    #[doc(alias = "ibv_get_cq_event")]
    pub fn wait(&mut self, limit: Duration) -> Result<Completion, RdmaError> {
        let deadline = Deadline::after(limit);
        loop {
            if let Some(completion) = self.arm()? {
                return Ok(completion);
            }
            if deadline.is_over() {
                let what = format!("a completion from {}", self.card.name());
                return Err(RdmaError::TimedOut { what, limit });
            }
            let mut wanted = [PollFd::new(&self.events, PollFlags::IN)];
            match poll(&mut wanted, deadline.timespec().as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(SystemError::new("poll", self.card.name(), errno).into()),
            }
        }
    }

    /// The next completion, as [`Connection::poll`]. Without one, the descriptor ([`AsFd`]) becomes readable
    /// at the next completion. For event loops: call it, wait for the descriptor if it returned `None`, and
    /// call it again.
    ///
    /// # Errors As [`Connection::poll`]; [`RdmaError::Stopped`] if it was stopped and every request has
    /// completed.
    pub fn arm(&mut self) -> Result<Option<Completion>, RdmaError> {
        let name = self.card.name().to_owned();
        let failed = |call| move |errno: Errno| SystemError::new(call, name, errno);
        if let Some(completion) = self.poll()? {
            return Ok(Some(completion));
        }
        // Takes the event of an earlier wait.
        let mut event = [PollFd::from_borrowed_fd(self.queue.events(), PollFlags::IN)];
        let waiting = poll(&mut event, Some(&Timespec::default()));
        if waiting.map_err(|errno| failed.clone()("poll")(errno.into()))? > 0 {
            self.queue
                .take_event()
                .map_err(failed.clone()("ibv_get_cq_event"))?;
        }
        self.queue.arm().map_err(failed("ibv_req_notify_cq"))?;
        // A completion before the queue was armed causes no event.
        if let Some(completion) = self.poll()? {
            return Ok(Some(completion));
        }
        if self.is_stopped() && self.in_flight.is_empty() {
            return Err(self.stopped());
        }
        Ok(None)
    }

    /// Stops the card's work and waits until all posted requests have completed, at most `limit`. Unfinished
    /// requests complete as [`Status::FLUSHED`].
    ///
    /// # Errors As [`Connection::wait`].
    pub fn drain(&mut self, limit: Duration) -> Result<Vec<Completion>, RdmaError> {
        if !self.is_stopped() {
            self.line
                .pair
                .stop()
                .map_err(|errno| SystemError::new("ibv_modify_qp", self.card.name(), errno))?;
        }
        let deadline = Deadline::after(limit);
        let mut all = Vec::new();
        while !self.in_flight.is_empty() {
            all.push(self.wait(deadline.left())?);
        }
        Ok(all)
    }
}

/// Readable after [`Connection::arm`] has returned `None` and a completion arrived, and when the connection
/// was stopped.
impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

fn writable(piece: &Piece) -> Result<(), BufferError> {
    let registration = piece.registration();
    if registration.is_writable() {
        return Ok(());
    }
    Err(BufferError::Access {
        object: registration.name().to_owned(),
        wanted: "write",
    })
}
