//! Taking buffers back: moves, withdrawals, and the wait for holders of the old generation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::super::backing::{Order, Placement};
use super::super::wire::{Message, Note};
use super::event::{CutOff, Migration};
use super::id::{BufferId, SubscriberId};
use super::owner::{Fault, Publisher};
use super::published::State;
use crate::buffer::Access;
use crate::error::{BufferError, ShareError};
use peerbuf_core::Deadline;

/// Number of messages that the publisher still reads from each subscriber after the time limit:
/// acknowledgements and returns of a few buffers.
const ROUNDS_AFTER: usize = 8;

impl Publisher {
    /// Takes back the current generation, makes the next one, and offers it.
    ///
    /// When this call returns, no live subscriber uses the old generation, and the new
    /// generation contains every byte that was written to the old one before. A subscriber that
    /// has not returned the old generation within `time_limit` is cut off.
    ///
    /// # Errors
    /// [`ShareError::Inherited`]; [`ShareError::Unknown`]; [`ShareError::StillInUse`] if this
    /// process itself has handles on the current generation; [`ShareError::DeviceBusy`]; the
    /// error of [`Backing::migrate`](crate::share::Backing::migrate). After an error of the
    /// backing, the publisher offers the old memory again, unless a subscriber that was cut off
    /// may still reach that memory. In that case, and with a busy device, the publisher
    /// withholds the buffer and its bytes until a later call succeeds.
    pub fn migrate(&mut self, id: BufferId, time_limit: Duration) -> Result<Migration, ShareError> {
        self.migrate_one(id, None, time_limit)
    }

    /// Like [`Publisher::migrate`], to this placement, which the backing may refuse.
    ///
    /// # Errors
    /// As [`Publisher::migrate`].
    pub fn migrate_to(
        &mut self,
        id: BufferId,
        to: Placement,
        time_limit: Duration,
    ) -> Result<Migration, ShareError> {
        self.migrate_one(id, Some(to), time_limit)
    }

    fn migrate_one(
        &mut self,
        id: BufferId,
        to: Option<Placement>,
        time_limit: Duration,
    ) -> Result<Migration, ShareError> {
        let moved = self.move_together(&[id], to, time_limit).pop();
        moved.unwrap_or_else(|| {
            let name = format!("number {}", id.number());
            Err(ShareError::Unknown { name })
        })
    }

    /// Like [`Publisher::migrate`], for several buffers at once. The publisher takes the
    /// buffers back together, within one time limit, and offers them together. The results are
    /// in the order of `ids`. Durations of common steps are those of the whole group.
    ///
    /// # Errors
    /// As [`Publisher::migrate`], for each buffer by itself. The second mention of a buffer is
    /// refused.
    pub fn migrate_all(
        &mut self,
        ids: &[BufferId],
        time_limit: Duration,
    ) -> Vec<Result<Migration, ShareError>> {
        self.move_together(ids, None, time_limit)
    }

    fn move_together(
        &mut self,
        ids: &[BufferId],
        to: Option<Placement>,
        time_limit: Duration,
    ) -> Vec<Result<Migration, ShareError>> {
        if let Err(error) = self.check_owner() {
            return ids.iter().map(|_| Err(error.clone())).collect();
        }
        let begun = Instant::now();
        let mut seen = BTreeSet::new();
        let checked: Vec<Result<BufferId, ShareError>> = ids
            .iter()
            .map(|&id| {
                let name = self.named(id)?;
                let idle = self
                    .buffers
                    .get(&id)
                    .is_some_and(|buffer| buffer.backing.is_idle());
                match idle && seen.insert(id) {
                    true => Ok(id),
                    false => Err(ShareError::StillInUse { name }),
                }
            })
            .collect();
        let going: Vec<BufferId> = checked.iter().flatten().copied().collect();
        let before: BTreeMap<BufferId, Vec<SubscriberId>> =
            going.iter().map(|&id| (id, self.holding(id))).collect();
        self.take_back(&going, Message::Invalidate, time_limit);
        let announced = Instant::now();
        if self.fault == Some(Fault::SkipDrain) {
            self.forget_holders(&going);
        }
        if let Err(error) = self.drain(&going, begun, time_limit) {
            return ids.iter().map(|_| Err(error.clone())).collect();
        }
        let drained = Instant::now();
        let mut results: Vec<Result<Migration, ShareError>> = Vec::new();
        for checked in checked {
            let holders = checked.as_ref().ok().and_then(|id| before.get(id));
            let holders = holders.map(Vec::as_slice).unwrap_or_default();
            let lost = holders.iter().copied();
            let lost: Vec<SubscriberId> = lost
                .filter(|id| !self.subscribers.contains_key(id))
                .collect();
            let replaced = checked.and_then(|id| self.replace(id, to, begun, time_limit));
            results.push(replaced.map(|migration| Migration {
                announce: announced - begun,
                drain: drained - announced,
                released: holders.len() - lost.len(),
                lost,
                ..migration
            }));
        }
        let offering = Instant::now();
        self.offer(&going);
        for migration in results.iter_mut().flatten() {
            migration.offer = offering.elapsed();
        }
        results
    }

    /// Makes the next generation of a buffer that has no holder any more.
    fn replace(
        &mut self,
        id: BufferId,
        to: Option<Placement>,
        begun: Instant,
        time_limit: Duration,
    ) -> Result<Migration, ShareError> {
        let transferring = Instant::now();
        self.wait_for_devices(id, begun, time_limit)?;
        let name = self.named(id)?;
        let Some(published) = self.buffers.get_mut(&id) else {
            return Err(ShareError::Unknown { name });
        };
        let order = Order {
            generation: published.generation + 1,
            to,
            limit: time_limit,
            isolate: published.tainted,
        };
        let moved = published.backing.migrate(&order);
        if moved.is_err() && order.isolate {
            published.state = State::Withheld;
        } else {
            published.generation = order.generation;
            published.tainted = moved.is_err() && published.tainted;
            published.read_only = OnceLock::new();
            published.state = State::Live;
            published.describe(id);
        }
        moved?;
        Ok(Migration {
            generation: order.generation,
            placement: published.backing.placement(),
            announce: Duration::ZERO,
            drain: Duration::ZERO,
            transfer: transferring.elapsed(),
            offer: Duration::ZERO,
            released: 0,
            lost: Vec::new(),
            isolated: order.isolate,
        })
    }

    /// Takes a buffer back for good. A subscriber that does not return the buffer within
    /// `time_limit` is cut off.
    ///
    /// # Errors
    /// [`ShareError::Inherited`]; [`ShareError::Unknown`]; [`ShareError::DeviceBusy`], after
    /// which the publisher withholds the buffer, and the caller may withdraw it again.
    pub fn withdraw(&mut self, id: BufferId, time_limit: Duration) -> Result<(), ShareError> {
        self.check_owner()?;
        let begun = Instant::now();
        let name = self.named(id)?;
        self.take_back(&[id], Message::Withdraw, time_limit);
        self.drain(&[id], begun, time_limit)?;
        self.wait_for_devices(id, begun, time_limit)?;
        self.buffers.remove(&id);
        self.names.remove(&name);
        Ok(())
    }

    fn named(&self, id: BufferId) -> Result<String, ShareError> {
        match self.buffers.get(&id) {
            Some(buffer) => Ok(buffer.name.clone()),
            None => Err(ShareError::Unknown {
                name: format!("number {}", id.number()),
            }),
        }
    }

    fn holding(&self, id: BufferId) -> Vec<SubscriberId> {
        let holders = self
            .subscribers
            .iter()
            .filter(|(_, c)| c.holding(id).is_some());
        holders.map(|(subscriber, _)| *subscriber).collect()
    }

    /// Tells all holders of these buffers to return them.
    fn take_back(&mut self, ids: &[BufferId], message: Message, time_limit: Duration) {
        let milliseconds = u32::try_from(time_limit.as_millis()).unwrap_or(u32::MAX);
        for id in ids {
            if let Some(published) = self.buffers.get_mut(id) {
                published.state = State::Leaving;
            }
        }
        let subscribers: Vec<SubscriberId> = self.subscribers.keys().copied().collect();
        for subscriber in subscribers {
            let Some(connection) = self.subscribers.get_mut(&subscriber) else {
                continue;
            };
            for id in ids {
                if let Some(holding) = connection.holding(*id) {
                    let note = Note::new(id.number(), holding.generation, milliseconds);
                    connection.notices.push_back((message, note));
                }
            }
            if !connection.notices.is_empty() {
                self.pump(subscriber);
            }
        }
    }

    /// Waits until the buffers have no holder, and cuts off the holders that are left at the
    /// time limit.
    fn drain(
        &mut self,
        ids: &[BufferId],
        begun: Instant,
        limit: Duration,
    ) -> Result<(), ShareError> {
        let deadline = Deadline::since(begun, limit);
        let mut rounds_after = 0;
        while ids.iter().any(|id| self.holders(*id) > 0) && rounds_after < ROUNDS_AFTER {
            let over = deadline.is_over();
            let handled = self.turn(deadline)?;
            if over {
                // The answers may have arrived already.
                rounds_after += 1;
                if handled == 0 {
                    break;
                }
            }
        }
        for id in ids {
            let name = self.named(*id)?;
            for subscriber in self.holding(*id) {
                let name = name.clone();
                self.cut_off(subscriber, CutOff::Late { name, limit });
            }
        }
        Ok(())
    }

    /// Waits until devices have finished their work on a buffer, including work that a former
    /// subscriber began.
    fn wait_for_devices(
        &mut self,
        id: BufferId,
        begun: Instant,
        limit: Duration,
    ) -> Result<(), ShareError> {
        let Some(published) = self.buffers.get_mut(&id) else {
            return Ok(());
        };
        let Some(dmabuf) = published.backing.buffer().dmabuf() else {
            return Ok(());
        };
        let left = Deadline::since(begun, limit).left();
        match dmabuf.wait(Access::Write, left) {
            Err(BufferError::TimedOut { .. }) => {
                published.state = State::Withheld;
                let name = published.name.clone();
                Err(ShareError::DeviceBusy { name, limit })
            }
            // An exporter without fences answers with another error, and there is nothing to
            // wait for.
            _ => Ok(()),
        }
    }

    fn forget_holders(&mut self, ids: &[BufferId]) {
        for id in ids {
            for connection in self.subscribers.values_mut() {
                if connection.holding(*id).is_some() {
                    connection.standing.remove(id);
                }
            }
            if let Some(published) = self.buffers.get_mut(id) {
                published.holders = 0;
            }
        }
    }
}
