//! Moving many bytes between a lent buffer and the other end's, while the publisher moves the buffer.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::connection::Connection;
use crate::error::RdmaError;
use crate::follow::Follower;
use crate::registration::Registration;
use crate::wire::Remote;
use crate::work::WorkId;

/// Bytes in one request: of a size that every card likes.
const REQUEST: u64 = 1 << 20;

/// What a transfer goes over.
#[derive(Debug)]
pub struct Link {
    /// To the other end.
    pub connection: Connection,
    /// The other end's memory.
    pub remote: Remote,
    /// How long one request may take, and the buffer's move from one generation to the next.
    pub limit: Duration,
}

/// Which bytes to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Where they begin in this end's buffer, in bytes.
    pub offset: u64,
    /// Where they begin in the other end's memory, in bytes.
    pub at: u64,
    /// How many.
    pub length: u64,
}

/// What a transfer came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transferred {
    /// Bytes moved, each counted once.
    pub bytes: u64,
    /// Bytes that the processor copied for it on this end.
    pub host_bytes: u64,
    /// How often it went on over another connection.
    pub retries: u32,
}

impl Follower {
    /// Writes part of the buffer to the other end's memory, several requests at a time. When it
    /// returns all of it is there.
    ///
    /// While the publisher moves the buffer this waits, and goes on with the next generation. When
    /// work was cut off, or failed, `again` is told why. It decides: `Err` reports it, and how much
    /// of the span has arrived is not known; another [`Link`] has the requests that were not known
    /// to be done posted again over it. (Writing the same bytes twice does no harm.)
    ///
    /// # Errors
    /// What `again` returned; [`RdmaError::Buffer`] for bytes that are not all inside of both;
    /// otherwise as [`Follower::registration`] and [`Connection::write`].
    pub fn write<E: From<RdmaError>>(
        &self,
        link: &mut Link,
        span: Span,
        again: impl FnMut(RdmaError) -> Result<Link, E>,
    ) -> Result<Transferred, E> {
        self.transfer(link, span, Direction::Write, again)
    }

    /// Reads the other end's memory into part of the buffer. The rest is as for
    /// [`Follower::write`].
    ///
    /// # Errors
    /// As [`Follower::write`], and [`RdmaError::Buffer`] for a buffer that is not writable.
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

    /// Posts what can be posted, and waits for one request if any is in flight.
    fn step(&self, link: &mut Link, work: &mut Work) -> Result<(), RdmaError> {
        if work.to_post().is_some() && work.posted.len() < link.connection.depth() {
            // Not kept while this waits: the pieces in flight are enough.
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

/// Parts of a span, by offset in it and length.
struct Work {
    span: Span,
    direction: Direction,
    /// What was posted before and is to be posted again.
    again: VecDeque<(u64, u64)>,
    /// What comes after it was not posted yet.
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
                // It is on its way back: the next generation gets the rest.
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

    /// After a failure: what is not known to be done is to be done again. Waits until the card has let
    /// go of it.
    fn take_back(&mut self, connection: &mut Connection, limit: Duration) {
        // Of a connection that does not even stop, dropping it is what ends the work.
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
