//! Transfers between a lent buffer and a peer's memory, across moves of the buffer.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::connection::Connection;
use crate::error::RdmaError;
use crate::follow::Follower;
use crate::registration::Registration;
use crate::wire::Remote;
use crate::work::WorkId;

/// Bytes per request; a size that suits every card.
const REQUEST: u64 = 1 << 20;

/// The connection and the memory for a transfer.
#[derive(Debug)]
pub struct Link {
    /// The connection to the peer.
    pub connection: Connection,
    /// The peer's memory.
    pub remote: Remote,
    /// Time limit for one request, and for the buffer's move to the next generation.
    pub limit: Duration,
}

/// The bytes to transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Offset in the local buffer, in bytes.
    pub offset: u64,
    /// Offset in the peer's memory, in bytes.
    pub at: u64,
    /// Length in bytes.
    pub length: u64,
}

/// The result of a transfer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transferred {
    /// Bytes transferred, each counted once.
    pub bytes: u64,
    /// Bytes that the local CPU copied.
    pub host_bytes: u64,
    /// The number of times that it continued over another connection.
    pub retries: u32,
}

impl Follower {
    /// Writes part of the buffer to the peer's memory, with several requests in flight. On return all bytes
    /// have arrived.
    ///
    /// While the publisher moves the buffer this function waits, and then continues with the next generation.
    /// If a request was cut off or failed, it calls `again` with the error. If `again` returns `Err`, the
    /// transfer fails, and an unknown part of the span has arrived. If `again` returns another [`Link`], all
    /// requests not known to be done are posted again over it. (Writing the same bytes twice is harmless.)
    ///
    /// # Errors The error of `again`; [`RdmaError::Buffer`] if the span is not inside both; otherwise as
    /// [`Follower::registration`] and [`Connection::write`].
    pub fn write<E: From<RdmaError>>(
        &self,
        link: &mut Link,
        span: Span,
        again: impl FnMut(RdmaError) -> Result<Link, E>,
    ) -> Result<Transferred, E> {
        self.transfer(link, span, Direction::Write, again)
    }

    /// Reads the peer's memory into part of the buffer, otherwise as [`Follower::write`].
    ///
    /// # Errors As [`Follower::write`], and [`RdmaError::Buffer`] for a read-only buffer.
    pub fn read<E: From<RdmaError>>(
        &self,
        link: &mut Link,
        span: Span,
        again: impl FnMut(RdmaError) -> Result<Link, E>,
    ) -> Result<Transferred, E> {
        self.transfer(link, span, Direction::Read, again)
    }

    fn transfer<E: From<RdmaError>>(
        &self,
        link: &mut Link,
        span: Span,
        direction: Direction,
        mut again: impl FnMut(RdmaError) -> Result<Link, E>,
    ) -> Result<Transferred, E> {
        let mut work = Work::new(span, direction);
        while !work.is_done() {
            let Err(error) = self.step(link, &mut work) else {
                continue;
            };
            if !matches!(error, RdmaError::Work(_) | RdmaError::Stopped { .. }) {
                return Err(error.into());
            }
            work.take_back(&mut link.connection, link.limit);
            *link = again(error)?;
            work.done.retries += 1;
        }
        Ok(work.done)
    }

    /// Posts as much as possible, and waits for one request if any is in flight.
    fn step(&self, link: &mut Link, work: &mut Work) -> Result<(), RdmaError> {
        if work.to_post().is_some() && work.posted.len() < link.connection.depth() {
            // Dropped before the wait: the pieces in flight keep what they need.
            let registration = match work.posted.is_empty() {
                true => Some(self.registration(link.limit)?),
                false => self.registration(Duration::ZERO).ok(),
            };
            if let Some(registration) = registration {
                work.post(link, &registration)?;
            }
        }
        if work.posted.is_empty() {
            return Ok(());
        }
        let done = link.connection.wait(link.limit)?;
        let posted = work.posted.remove(&done.id.number());
        match done.result {
            Ok(_) => {
                work.done.host_bytes += done.host_bytes;
                work.done.bytes += posted.map_or(0, |(_, length)| length);
                Ok(())
            }
            Err(error) => {
                work.again.extend(posted);
                // Another connection would not make the copy succeed.
                Err(match error.copy {
                    Some(copy) => copy.into(),
                    None => error.into(),
                })
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Write,
    Read,
}

/// Parts of a span, by offset in the span and length.
struct Work {
    span: Span,
    direction: Direction,
    /// Parts to post again.
    again: VecDeque<(u64, u64)>,
    /// The offset of the part not posted yet.
    next: u64,
    posted: BTreeMap<u64, (u64, u64)>,
    done: Transferred,
}

impl Work {
    fn new(span: Span, direction: Direction) -> Work {
        Work {
            span,
            direction,
            again: VecDeque::new(),
            next: 0,
            posted: BTreeMap::new(),
            done: Transferred::default(),
        }
    }

    fn to_post(&self) -> Option<(u64, u64)> {
        let rest = self.span.length - self.next;
        let fresh = (rest > 0).then(|| (self.next, rest.min(REQUEST)));
        self.again.front().copied().or(fresh)
    }

    fn posted(&mut self, id: u64, (from, length): (u64, u64)) {
        if self.again.pop_front().is_none() {
            self.next += length;
        }
        self.posted.insert(id, (from, length));
    }

    fn is_done(&self) -> bool {
        self.to_post().is_none() && self.posted.is_empty()
    }

    fn post(&mut self, link: &mut Link, registration: &Registration) -> Result<(), RdmaError> {
        while self.posted.len() < link.connection.depth() {
            let Some(part) = self.to_post() else { break };
            match self.post_one(link, registration, part) {
                Ok(id) => self.posted(id.number(), part),
                // The buffer is being given back: the next generation gets the rest.
                Err(RdmaError::Stale { .. }) if registration.is_wanted() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn post_one(
        &self,
        link: &mut Link,
        registration: &Registration,
        (from, length): (u64, u64),
    ) -> Result<WorkId, RdmaError> {
        let begin = |start: u64| start.saturating_add(from);
        let piece = registration.slice(begin(self.span.offset), length)?;
        let remote = link.remote.slice(begin(self.span.at), length)?;
        match self.direction {
            Direction::Write => link.connection.write(&piece, &remote, None),
            Direction::Read => link.connection.read(&piece, &remote),
        }
    }

    /// After a failure: marks all requests not known to be done for posting again. Waits until the card is
    /// done with them.
    fn take_back(&mut self, connection: &mut Connection, limit: Duration) {
        // If the connection cannot even be drained, dropping it ends its work.
        for completion in connection.drain(limit).unwrap_or_default() {
            if completion.result.is_ok()
                && let Some((_, length)) = self.posted.remove(&completion.id.number())
            {
                self.done.bytes += length;
                self.done.host_bytes += completion.host_bytes;
            }
        }
        let posted = std::mem::take(&mut self.posted);
        self.again.extend(posted.into_values());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_cut_into_parts_without_gaps() {
        for (length, parts) in [
            (0, 0),
            (1, 1),
            (REQUEST, 1),
            (REQUEST + 1, 2),
            (3 * REQUEST, 3),
        ] {
            let span = Span {
                offset: 7,
                at: 9,
                length,
            };
            let mut work = Work::new(span, Direction::Read);
            let (mut at, mut id) = (0, 0);
            while let Some((from, length)) = work.to_post() {
                assert_eq!(from, at);
                assert!((1..=REQUEST).contains(&length));
                at += length;
                id += 1;
                work.posted(id, (from, length));
            }
            assert_eq!((at, id), (length, parts));
            assert_eq!(work.is_done(), length == 0);
        }
    }
}
