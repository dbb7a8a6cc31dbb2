//! [`Deadline`]: the moment at which a wait ends.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

/// The moment at which a wait ends, or never.
///
/// `Instant + Duration` panics for a limit that the clock cannot reach, such as
/// [`Duration::MAX`]. A deadline takes every limit: one that the clock cannot reach never ends.
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

    /// Ends after `limit`, counted from now.
    pub fn after(limit: Duration) -> Deadline {
        Deadline::since(Instant::now(), limit)
    }

    /// Ends after `limit`, counted from `begun`.
    pub fn since(begun: Instant, limit: Duration) -> Deadline {
        Deadline(begun.checked_add(limit))
    }

    /// Ends after `limit` if there is one.
    pub fn after_some(limit: Option<Duration>) -> Deadline {
        limit.map_or(Deadline::NEVER, Deadline::after)
    }

    /// The time that is left: zero when it is over, [`Duration::MAX`] when it never will be.
    pub fn left(self) -> Duration {
        self.0.map_or(Duration::MAX, |at| {
            at.saturating_duration_since(Instant::now())
        })
    }

    /// True when no time is left.
    pub fn is_over(self) -> bool {
        self.left().is_zero()
    }

    /// The moment; `None` when there is none.
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

    /// The time that is left, for `poll` and `epoll_wait`; `None` waits without an end.
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
