//! How many descriptors may be under way, so that a subscriber that does not read leaves some for
//! the others.

use super::super::channel::MAX_DESCRIPTORS;

/// A subscriber is sent no further offers while this many descriptors wait for it, however many
/// may be under way.
const WINDOW: usize = 3 * MAX_DESCRIPTORS;

/// After so many descriptors a subscriber is asked what has arrived, so that the window moves on
/// before it is used up.
pub(super) const ASK: usize = MAX_DESCRIPTORS;

/// How many descriptors may be under way to all subscribers of a publisher.
///
/// The kernel counts what is under way for a user as a whole, and refuses more than the process
/// may have open (`too_many_unix_fds` in net/core/scm.c). What was sent to a subscriber that does
/// not read stays under way until that one closes its socket: to cut it off would not help.
pub(super) fn budget() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current.map_or(usize::MAX, |limit| limit as usize)
}

/// How many descriptors may be under way to one subscriber, of a budget of which the others have
/// left `left`.
///
/// One that has not shown yet that it reads gets little, and less when many like it have used up
/// most. One that has shown it gets at most half of what is left, so that something is left
/// whenever it stops. Each may have one offer under way in any case: the budget is a guess, and
/// the kernel the one that knows.
pub(super) fn share(budget: usize, left: usize, proven: bool) -> usize {
    let unproven = if left > budget / 2 {
        budget / 16
    } else if left > budget / 8 {
        budget / 64
    } else {
        1
    };
    let share = if proven {
        unproven.max(left / 2)
    } else {
        unproven
    };
    share.clamp(1, WINDOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscribers_that_never_read_leave_something_for_the_next() {
        for budget in [256, 1024, 4096] {
            let mut used = 0;
            let mut silent = 0;
            while used < budget {
                used += share(budget, budget - used, false);
                silent += 1;
            }
            assert!(silent > 60, "{silent} of {budget}");
        }
    }

    #[test]
    fn subscribers_that_stop_reading_leave_something_for_the_next() {
        let budget = 1024;
        let mut left = budget;
        for stopped in 0..5 {
            let used = share(budget, left, true);
            assert!(used <= left / 2, "{used} of {left} for number {stopped}");
            left -= used;
        }
        assert!(share(budget, left, true) >= 8);
    }

    #[test]
    fn each_may_have_an_offer_under_way_and_none_more_than_the_window() {
        for proven in [false, true] {
            assert_eq!(share(1024, 0, proven), 1);
            assert_eq!(share(0, 0, proven), 1);
            assert_eq!(share(usize::MAX, usize::MAX, proven), WINDOW);
        }
    }
}
