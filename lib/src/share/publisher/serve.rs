//! The event loop: new connections, received messages, and cut-offs.

use std::time::Duration;

use rustix::event::epoll;

use super::super::wire::{self, Message, Note};
use super::connection::Standing;
use super::event::{CutOff, Event};
use super::id::{BufferId, SubscriberId};
use super::owner::{LISTENER, Publisher, failed};
use crate::error::ShareError;
use peerbuf_core::Deadline;

/// Interval between attempts to send descriptors after the kernel refused more.
const RETRY: Duration = Duration::from_millis(10);

/// Time without listening after the publisher could not accept a connection.
const PAUSE: Duration = Duration::from_millis(100);

impl Publisher {
    /// Waits until `until` for events and handles them. Returns the number of events.
    pub(super) fn turn(&mut self, until: Deadline) -> Result<usize, ShareError> {
        self.check_owner()?;
        self.pump_held_back();
        self.listen_again();
        let refused = self.subscribers.iter().filter(|(_, c)| c.refused);
        let refused: Vec<SubscriberId> = refused.map(|(id, _)| *id).collect();
        let mut until = until.earlier(self.next_limit());
        if !refused.is_empty() {
            until = until.earlier(Deadline::after(RETRY));
        }
        for id in refused {
            self.pump(id);
        }
        let mut ready = Vec::with_capacity(64);
        let spare = rustix::buffer::spare_capacity(&mut ready);
        match epoll::wait(&self.waiting, spare, until.timespec().as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(0),
            Err(errno) => return Err(failed("epoll_wait")(errno).into()),
        }
        let handled = ready.len();
        for event in ready {
            // A copy: the field is not aligned.
            let (data, flags) = (event.data.u64(), event.flags);
            if data == LISTENER {
                self.accept();
                continue;
            }
            let id = SubscriberId(data);
            if flags.contains(epoll::EventFlags::OUT) {
                self.pump(id);
            }
            self.receive(id);
        }
        self.cut_off_silent();
        self.pump_held_back();
        Ok(handled)
    }

    /// The earliest of the publisher's own deadlines.
    fn next_limit(&mut self) -> Deadline {
        while let Some((_, id)) = self.ungreeted.front() {
            match self.subscribers.get(id) {
                Some(connection) if !connection.greeted => break,
                // The connection has sent its hello, or has gone.
                _ => drop(self.ungreeted.pop_front()),
            }
        }
        let greeting = self.ungreeted.front().map(|(deadline, _)| *deadline);
        let greeting = greeting.unwrap_or(Deadline::NEVER);
        greeting.earlier(self.deaf_until.unwrap_or(Deadline::NEVER))
    }

    /// Cuts off connections that sent no hello in time.
    fn cut_off_silent(&mut self) {
        while let Some((deadline, id)) = self.ungreeted.front().copied() {
            if !deadline.is_over() {
                return;
            }
            self.ungreeted.pop_front();
            let greeted = |publisher: &Publisher| {
                let connection = publisher.subscribers.get(&id);
                connection.is_none_or(|connection| connection.greeted)
            };
            // The hello may have arrived already: the publisher may be the late side.
            if !greeted(self) {
                self.receive(id);
            }
            if !greeted(self) {
                let limit = self.greeting_limit;
                self.cut_off(id, CutOff::Silent { limit });
            }
        }
    }

    fn accept(&mut self) {
        while let Some(listener) = &self.listener {
            let newcomer = match listener.accept() {
                Ok(newcomer) => newcomer,
                Err(error) if error.would_wait() => {
                    self.told = false;
                    return;
                }
                // The connection still waits, and the loop would report it without end.
                Err(why) => return self.pause(why),
            };
            match self.add(newcomer) {
                Ok(id) => {
                    let deadline = Deadline::after(self.greeting_limit);
                    self.ungreeted.push_back((deadline, id));
                }
                Err(why) if why.is_shortage() => return self.pause(why),
                // The error concerns this connection alone.
                Err(why) => self.events.push_back(Event::NotAccepted { why }),
            }
        }
    }

    /// Stops listening for a while after a failed accept.
    fn pause(&mut self, why: ShareError) {
        if !std::mem::replace(&mut self.told, true) {
            self.events.push_back(Event::NotAccepted { why });
        }
        // A failure here has the same cause, and `listen_again` retries.
        let _ = self.listen(false);
        self.deaf_until = Some(Deadline::after(PAUSE));
    }

    /// Ends a pause whose time is over.
    fn listen_again(&mut self) {
        if self.deaf_until.is_some_and(Deadline::is_over) {
            let heard = self.listen(true);
            self.deaf_until = heard.is_err().then(|| Deadline::after(PAUSE));
        }
    }

    pub(super) fn listen(&mut self, listening: bool) -> Result<(), ShareError> {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        if self.listening != listening {
            let data = epoll::EventData::new_u64(LISTENER);
            let changed = if listening {
                epoll::add(&self.waiting, listener, data, epoll::EventFlags::IN)
            } else {
                epoll::delete(&self.waiting, listener)
            };
            changed.map_err(failed("epoll_ctl"))?;
            self.listening = listening;
        }
        Ok(())
    }

    /// Takes one message of a subscriber. The next turn handles further messages, so a
    /// subscriber that sends without end delays nobody.
    pub(super) fn receive(&mut self, id: SubscriberId) {
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return;
        };
        // Subscribers send no descriptors. Received ones are closed at once.
        let mut descriptors = Vec::new();
        let received = connection
            .channel
            .try_receive(&mut self.received, &mut descriptors);
        let outcome = match received {
            Ok(None) => return,
            Ok(Some(_)) if !descriptors.is_empty() => Err(ShareError::Malformed {
                what: "a subscriber's message came with descriptors".into(),
            }),
            Ok(Some(bytes)) => self.handle(id, bytes),
            Err(ShareError::PeerGone) => {
                let held = self.remove(id);
                self.events.push_back(Event::Left {
                    subscriber: id,
                    held,
                });
                return;
            }
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            self.cut_off(id, CutOff::Rubbish(error));
        }
    }

    pub(super) fn handle(&mut self, id: SubscriberId, bytes: usize) -> Result<(), ShareError> {
        let wrong = |what: &str| Err(ShareError::Malformed { what: what.into() });
        let (message, records) = wire::open(&self.received[..bytes])?;
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return Ok(());
        };
        if connection.greeted == (message == Message::Hello) {
            return wrong("a hello must be the first message, and the only one");
        }
        match message {
            Message::Hello => {
                connection.greeted = true;
                self.buffers.keys().for_each(|id| connection.queue(*id));
                let peer = connection.peer;
                let event = Event::Joined {
                    subscriber: id,
                    peer,
                };
                self.events.push_back(event);
            }
            Message::Accepted => {
                for note in wire::notes(records)? {
                    let arrived = connection.arrived();
                    let news = arrived + 1..=connection.sent;
                    if !news.contains(&note.id) || (note.generation, note.value) != (0, 0) {
                        return wrong("it accepts a buffer that it was not offered");
                    }
                    for _ in arrived..note.id {
                        let descriptors = connection.waiting.pop_front().unwrap_or(0);
                        connection.under_way -= descriptors;
                        self.under_way -= descriptors;
                    }
                    connection.proven = true;
                    self.fewer_under_way = true;
                }
            }
            Message::Released => {
                for note in wire::notes(records)? {
                    let buffer = BufferId::from_number(note.id);
                    match connection.holding(buffer) {
                        Some(held) if held.generation == note.generation => {}
                        _ if self.fault.is_some() => continue,
                        _ => return wrong("it returns a buffer that it does not hold"),
                    }
                    if note.value > 1 {
                        return wrong("it returns a buffer with an unknown status");
                    }
                    connection.standing.remove(&buffer);
                    if let Some(published) = self.buffers.get_mut(&buffer) {
                        published.holders -= 1;
                    }
                    if note.value == 1 {
                        let why = "the subscriber could not use it".into();
                        let event = Event::NotOffered {
                            subscriber: id,
                            buffer,
                            why,
                        };
                        self.events.push_back(event);
                    }
                }
            }
            _ => return wrong("a subscriber does not send this"),
        }
        self.pump(id);
        Ok(())
    }

    pub(super) fn cut_off(&mut self, id: SubscriberId, why: CutOff) {
        let reason = match why {
            CutOff::Late { .. } => wire::Farewell::Late,
            CutOff::Rubbish(_) => wire::Farewell::Rubbish,
            CutOff::Silent { .. } => wire::Farewell::Silent,
            CutOff::Unreachable(_) => wire::Farewell::Unreachable,
        };
        if let Some(connection) = self.subscribers.get(&id) {
            wire::encode_into(
                &mut self.message,
                Message::Farewell,
                &[Note::new(0, 0, reason as u32)],
            );
            // The subscriber may be gone or not reading, and is cut off in any case.
            let _ = connection.channel.try_send(&self.message, &[]);
            connection.channel.shut_down();
            let subscriber = id;
            let held = self.remove(id);
            self.events.push_back(Event::CutOff {
                subscriber,
                held,
                why,
            });
        }
    }

    /// Forgets a subscriber. A process with the subscriber's descriptors may still reach its
    /// buffers.
    pub(super) fn remove(&mut self, id: SubscriberId) -> Vec<BufferId> {
        let Some(connection) = self.subscribers.remove(&id) else {
            return Vec::new();
        };
        // Another process may hold a copy of this end, so closing it is not enough.
        let _ = epoll::delete(&self.waiting, &connection.channel);
        let standing = connection.standing.iter();
        let held = standing.filter(|(_, standing)| matches!(standing, Standing::Held(_)));
        let held: Vec<BufferId> = held.map(|(buffer, _)| *buffer).collect();
        for buffer in &held {
            if let Some(published) = self.buffers.get_mut(buffer) {
                published.holders -= 1;
                published.tainted = true;
            }
        }
        self.under_way -= connection.under_way;
        self.held_back.remove(&id);
        self.fewer_under_way = true;
        drop(connection.channel);
        // There may be room now for connections that could not be accepted.
        if self.deaf_until.is_some() {
            self.deaf_until = Some(Deadline::after(Duration::ZERO));
        }
        held
    }
}
