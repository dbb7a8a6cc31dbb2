//! Sending offers and notices to subscribers, as far as their sockets have room.

use std::os::fd::BorrowedFd;

use rustix::event::epoll;

use super::super::grant::Grant;
use super::super::wire::{self, Message, Note};
use super::budget::{ASK, share};
use super::connection::{Holding, Standing};
use super::event::{CutOff, Event};
use super::id::{BufferId, SubscriberId};
use super::owner::Publisher;
use super::published::State;
use crate::errno::Errno;
use crate::error::{ShareError, SystemError};

impl Publisher {
    /// Offers buffers to all subscribers that may have them.
    pub(super) fn offer(&mut self, ids: &[BufferId]) {
        let subscribers: Vec<SubscriberId> = self.subscribers.keys().copied().collect();
        for subscriber in subscribers {
            if let Some(connection) = self.subscribers.get_mut(&subscriber) {
                ids.iter().for_each(|id| connection.queue(*id));
            }
            self.pump(subscriber);
        }
    }

    /// Sends a subscriber its pending messages, as far as its socket has room.
    pub(super) fn pump(&mut self, id: SubscriberId) {
        let sent = self.send_notices(id).and_then(|()| self.send_offers(id));
        match sent {
            Ok(()) => {}
            // The publisher still has to read the subscriber's last messages; that read finds
            // the end, too.
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
            // The descriptor exists and is registered.
            let _ = epoll::modify(&self.waiting, &connection.channel, data, interest);
            connection.awaits_room = connection.full;
        }
    }

    pub(super) fn send_notices(&mut self, id: SubscriberId) -> Result<(), ShareError> {
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

    pub(super) fn send_offers(&mut self, id: SubscriberId) -> Result<(), ShareError> {
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return Ok(());
        };
        if !connection.greeted || connection.full {
            return Ok(());
        }
        let others = self.under_way - connection.under_way;
        let left = self.budget.saturating_sub(others);
        let allowed = share(self.budget, left, connection.proven);
        loop {
            let room = allowed.saturating_sub(connection.under_way);
            if room == 0 && connection.unasked == 0 {
                if !connection.unseen.is_empty() {
                    self.held_back.insert(id);
                }
                return Ok(());
            }
            let batch_size = self.batch.min(room);
            let most = batch_size.min(connection.unseen.len());
            let mut batch: Vec<BufferId> = Vec::with_capacity(most);
            let mut fds: Vec<BorrowedFd<'_>> = Vec::with_capacity(most);
            let mut follow = false;
            let mut message = wire::begin(&mut self.message);
            while let Some(&buffer) = connection.unseen.front() {
                if room == 0 {
                    break;
                }
                let published = self.buffers.get(&buffer);
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
                if !batch.is_empty() && fds.len() + count > batch_size {
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
            // The buffers that were to follow may have been withdrawn. The request for an
            // acknowledgement then goes alone.
            if batch.is_empty() && connection.unasked == 0 {
                return Ok(());
            }
            let used_up = descriptors >= room;
            let ask = !follow || used_up || connection.unasked + descriptors >= ASK;
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
                // Too many descriptors of this user are in flight. The condition passes.
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
                let Some(published) = self.buffers.get_mut(&buffer) else {
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
            self.under_way += descriptors;
            connection.unasked = if ask {
                0
            } else {
                connection.unasked + descriptors
            };
        }
    }

    /// Resumes the subscribers that waited for fewer descriptors in flight, if there are fewer
    /// now.
    pub(super) fn pump_held_back(&mut self) {
        if !std::mem::take(&mut self.fewer_under_way) {
            return;
        }
        for id in std::mem::take(&mut self.held_back) {
            self.pump(id);
        }
    }
}
