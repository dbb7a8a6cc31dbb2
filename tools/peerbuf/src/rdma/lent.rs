//! An end's buffer, which this process lends to itself, so that it can move while the card uses
//! it.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use peerbuf::Access;
use peerbuf::error::ShareError;
use peerbuf::share::{Channel, Publisher, Subscriber};
use peerbuf_rdma::{Card, Follower, Registration};

use super::place::Place;
use crate::Failure;

/// Time limit for one request, one move, or the peer.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Time limit for the card's work before a move cuts it off.
const DRAIN: Duration = Duration::from_secs(10);
/// Time that the publisher serves before it checks for other work.
const SLICE: Duration = Duration::from_millis(5);
const NAME: &str = "the buffer";

/// Interval between moves in milliseconds: no moves, or a random interval up to twice this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Every(u32);

impl FromStr for Every {
    type Err = String;

    fn from_str(text: &str) -> Result<Every, String> {
        match text.parse() {
            Ok(ms @ 1..=60_000) => Ok(Every(ms)),
            _ => Err(format!("`{text}` is not between 1 and 60000 milliseconds")),
        }
    }
}

/// The buffer, and the thread that moves it.
pub struct Lent {
    follower: Follower,
    moves: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    publisher: Option<JoinHandle<Result<(), ShareError>>>,
    /// The buffer's size in bytes.
    pub size: u64,
    /// The buffer's name and place.
    pub what: String,
}

impl Lent {
    /// Makes and registers the buffer. `remote` is the peer's access.
    pub fn new(
        card: &Card,
        place: &Place,
        size: u64,
        every: Option<Every>,
        remote: Option<Access>,
    ) -> Result<Lent, Failure> {
        let backing = place.make(size)?;
        let (size, what) = (backing.buffer().size(), backing.buffer().to_string());
        let (ours, theirs) = Channel::pair()?;
        let mut publisher = Publisher::new()?;
        publisher.add(ours)?;
        let id = publisher.publish(NAME, backing)?;
        let (moves, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (counted, stopped) = (Arc::clone(&moves), Arc::clone(&stop));
        let publisher = std::thread::Builder::new()
            .name("publisher".into())
            .spawn(move || {
                loop {
                    let mut left = every.map_or(Duration::MAX, |Every(ms)| {
                        Duration::from_millis(rand::random_range(0..=2 * u64::from(ms)))
                    });
                    while !left.is_zero() {
                        if stopped.load(Ordering::Relaxed) {
                            return Ok(());
                        }
                        let now = left.min(SLICE);
                        publisher.serve_for(now)?;
                        left -= now;
                    }
                    match publisher.migrate(id, DRAIN) {
                        Ok(_) => counted.fetch_add(1, Ordering::Relaxed),
                        // A disk still works on the buffer, which stays in place until the next
                        // time.
                        Err(ShareError::DeviceBusy { .. }) => continue,
                        Err(error) => return Err(error),
                    };
                }
            })?;
        let subscriber = Arc::new(Subscriber::new(theirs)?);
        Ok(Lent {
            follower: Follower::new(card, &subscriber, NAME, remote)?,
            moves,
            stop,
            publisher: Some(publisher),
            size,
            what,
        })
    }

    /// The follower, which registers the buffer again after a move.
    pub fn follower(&self) -> &Follower {
        &self.follower
    }

    /// The present registration.
    pub fn registration(&self) -> Result<Registration, Failure> {
        Ok(self.follower.registration(PATIENCE)?)
    }

    /// Number of moves.
    pub fn moves(&self) -> u64 {
        self.moves.load(Ordering::Relaxed)
    }

    /// Ends the moves. Returns the error that ended them before, if any.
    pub fn end(mut self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Relaxed);
        match self.publisher.take().map(JoinHandle::join) {
            Some(Ok(result)) => Ok(result?),
            Some(Err(_)) => Err("the thread that moves the buffer has panicked".into()),
            None => Ok(()),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
