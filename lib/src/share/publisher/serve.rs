//! The turns of the loop: who connects, what arrives, and who is cut off.

use std::time::Duration;

use rustix::event::{Timespec, epoll};

use super::super::wire::{self, Message, Note};
use super::connection::Standing;
use super::{BufferId, CutOff, Event, LISTENER, Publisher, SubscriberId, failed};
use crate::errno::Errno;
use crate::error::{ShareError, SystemError};

/// How long until the kernel is asked again whether it takes more descriptors.
const RETRY: Duration = Duration::from_millis(10);

impl Publisher {
    /// Waits up to `timeout` for something to do, and does it. Returns how much there was.
    pub(super) fn turn(&mut self, timeout: Option<Duration>) -> Result<usize, ShareError> {
        let refused = self.subscribers.iter().filter(|(_, c)| c.refused);
        let refused: Vec<SubscriberId> = refused.map(|(id, _)| *id).collect();
        let timeout = match refused.is_empty() {
            true => timeout,
            false => Some(timeout.map_or(RETRY, |timeout| timeout.min(RETRY))),
        };
        for id in refused {
            self.pump(id);
        }
        let mut ready = Vec::with_capacity(64);
        let timeout = timeout.map(timespec);
        let spare = rustix::buffer::spare_capacity(&mut ready);
        match epoll::wait(&self.waiting, spare, timeout.as_ref()) {
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
        Ok(handled)
    }

    pub(super) fn accept(&mut self) {
        while let Some(listener) = &self.listener {
            match listener.accept().and_then(|channel| self.add(channel)) {
                Ok(_) => {}
                Err(ShareError::System(SystemError { errno, .. }))
                    if errno == Errno::from(rustix::io::Errno::AGAIN) =>
                {
                    return;
                }
                Err(why) => {
                    // With no descriptor left the newcomer waits until somebody leaves; to be
                    // told of it again and again would only keep the processor busy.
                    let _ = self.listen(false);
                    self.events.push_back(Event::NotAccepted { why });
                    return;
                }
            }
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

    /// Takes one message of a subscriber. If there are more, the next turn finds them: nobody is
    /// kept waiting by one that sends without end.
    pub(super) fn receive(&mut self, id: SubscriberId) {
        let Some(connection) = self.subscribers.get_mut(&id) else {
            return;
        };
        // Subscribers have no descriptors to send. Those that come are closed at once.
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
            return wrong("a subscriber greets once, and first");
        }
        match message {
            Message::Hello => {
                connection.greeted = true;
                self.buffers.keys().for_each(|id| connection.queue(id));
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
                        return wrong("it accepts what it was not offered");
                    }
                    for _ in arrived..note.id {
                        connection.under_way -= connection.waiting.pop_front().unwrap_or(0);
                    }
                }
            }
            Message::Released => {
                for note in wire::notes(records)? {
                    let buffer = BufferId::from_number(note.id);
                    match connection.holding(buffer) {
                        Some(held) if held.generation == note.generation => {}
                        _ if self.fault.is_some() => continue,
                        _ => return wrong("it gives back what it does not have"),
                    }
                    if note.value > 1 {
                        return wrong("it gives a buffer back in a way that is unknown");
                    }
                    connection.standing.remove(buffer);
                    if let Some(published) = self.buffers.get_mut(buffer) {
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
            CutOff::Unreachable(_) => wire::Farewell::Unreachable,
        };
        if let Some(connection) = self.subscribers.get(&id) {
            wire::encode_into(
                &mut self.message,
                Message::Farewell,
                &[Note::new(0, 0, reason as u32)],
            );
            // It may be gone, or not be reading; it is cut off all the same.
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

    /// Forgets a subscriber. What it held may still be reachable for whoever has its descriptors.
    pub(super) fn remove(&mut self, id: SubscriberId) -> Vec<BufferId> {
        let Some(connection) = self.subscribers.remove(&id) else {
            return Vec::new();
        };
        // Another process may hold a copy of our end, so closing it is not enough.
        let _ = epoll::delete(&self.waiting, &connection.channel);
        let standing = connection.standing.iter();
        let held = standing.filter(|(_, standing)| matches!(standing, Standing::Held(_)));
        let held: Vec<BufferId> = held.map(|(buffer, _)| buffer).collect();
        for buffer in &held {
            if let Some(published) = self.buffers.get_mut(*buffer) {
                published.holders -= 1;
                published.tainted = true;
            }
        }
        drop(connection.channel);
        // There may be room for those who could not be accepted.
        let _ = self.listen(true);
        held
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}
