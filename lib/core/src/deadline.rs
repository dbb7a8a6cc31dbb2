//! [`Deadline`]: the end of a wait.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

/// The end of a wait; possibly never.
///
/// `Instant + Duration` panics for a limit that the clock cannot represent, such as [`Duration::MAX`]. A
/// deadline accepts every limit: one that the clock cannot represent is [`Deadline::NEVER`].
///
/// ```
/// use std::time::Duration;
/// use peerbuf_core::Deadline;
///
/// let soon = Deadline::after(Duration::from_millis(5));
/// assert!(soon.left() <= Duration::from_millis(5));
/// assert!(!Deadline::after(Duration::MAX).is_over());
/// assert_eq!(Deadline::NEVER.earlier(soon), soon);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// A wait without an end.
    pub const NEVER: Deadline = Deadline(None);

    /// A deadline `limit` from now.
    pub fn after(limit: Duration) -> Deadline {
        Deadline::since(Instant::now(), limit)
    }

    /// A deadline `limit` after `begun`.
    pub fn since(begun: Instant, limit: Duration) -> Deadline {
        Deadline(begun.checked_add(limit))
    }

    /// A deadline `limit` from now; [`Deadline::NEVER`] for `None`.
    pub fn after_some(limit: Option<Duration>) -> Deadline {
        limit.map_or(Deadline::NEVER, Deadline::after)
    }

    /// The time left: zero once it is over, [`Duration::MAX`] if it never ends.
    pub fn left(self) -> Duration {
        self.0.map_or(Duration::MAX, |at| {
            at.saturating_duration_since(Instant::now())
        })
    }

    /// True once no time is left.
    pub fn is_over(self) -> bool {
        self.left().is_zero()
    }

    /// The moment; `None` if it never ends.
    pub fn instant(self) -> Option<Instant> {
        self.0
    }

    /// The earlier of the two.
    #[must_use]
    pub fn earlier(self, other: Deadline) -> Deadline {
        match (self.0, other.0) {
            (Some(one), Some(two)) => Deadline(Some(one.min(two))),
            (one, two) => Deadline(one.or(two)),
        }
    }

    /// The time left, for `poll` and `epoll_wait`; `None` means no timeout.
    #[doc(hidden)]
    pub fn timespec(self) -> Option<Timespec> {
        self.0?;
        Timespec::try_from(self.left()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_is_too_long() {
        let long = [
            Duration::MAX,
            Duration::from_secs(u64::MAX),
            Duration::from_secs(i64::MAX as u64),
        ];
        for limit in long {
            let deadline = Deadline::after(limit);
            assert!(!deadline.is_over());
            assert!(deadline.left() > Duration::from_secs(1 << 40));
            let sooner = deadline.earlier(Deadline::after(Duration::ZERO));
            assert!(sooner.is_over());
        }
        assert_eq!(Deadline::after(Duration::MAX), Deadline::NEVER);
        assert_eq!(Deadline::NEVER.timespec(), None);
    }

    #[test]
    fn the_time_that_is_left_ends_at_zero() {
        let begun = Instant::now();
        let deadline = Deadline::since(begun, Duration::ZERO);
        assert!(deadline.is_over());
        assert_eq!(deadline.left(), Duration::ZERO);
        assert_eq!(deadline.instant(), Some(begun));
    }
}
