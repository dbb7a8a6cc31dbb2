//! An end's buffer: lent by this process to itself, so that it can move while the card has it.

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

/// How long one request, one move, or the other end may take.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How long a move waits for the card's work before that is cut off.
const DRAIN: Duration = Duration::from_secs(10);
/// How long the publisher serves before it looks whether anything else is to be done.
const SLICE: Duration = Duration::from_millis(5);
const NAME: &str = "the buffer";

/// Times between moves, in milliseconds: none, or at random up to twice this.
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

/// The buffer, and what moves it.
pub struct Lent {
    follower: Follower,
    moves: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    publisher: Option<JoinHandle<Result<(), ShareError>>>,
    /// Its size in bytes.
    pub size: u64,
    /// Its name and place.
    pub what: String,
}

impl Lent {
    /// Makes it, and has it registered; `remote` is what the other end may do with it.
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
                        // A disk still works on it; it stays where it is, for the next time.
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

    /// What registers it anew when it has moved.
    pub fn follower(&self) -> &Follower {
        &self.follower
    }

    /// As it is now.
    pub fn registration(&self) -> Result<Registration, Failure> {
        Ok(self.follower.registration(PATIENCE)?)
    }

    /// How often it has moved.
    pub fn moves(&self) -> u64 {
        self.moves.load(Ordering::Relaxed)
    }

    /// Ends the moves; why they ended before, if they did.
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
