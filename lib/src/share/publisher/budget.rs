//! Limits on the number of descriptors in flight, so that a subscriber that does not read
//! leaves some for the others.

use super::super::channel::MAX_DESCRIPTORS;

/// Upper limit of descriptors in flight to one subscriber, whatever the budget. The publisher
/// sends no further offers to a subscriber at this limit.
const WINDOW: usize = 3 * MAX_DESCRIPTORS;

/// Number of descriptors after which the publisher asks a subscriber for an acknowledgement, so
/// that the window moves on before it is full.
pub(super) const ASK: usize = MAX_DESCRIPTORS;

/// Number of descriptors that may be in flight to all subscribers of a publisher.
///
/// The kernel counts descriptors in flight for each user, and refuses more than the process may
/// have open (`too_many_unix_fds` in net/core/scm.c). Descriptors that were sent to a
/// subscriber that does not read stay in flight until that subscriber closes its socket.
/// Cutting the subscriber off would not free them.
pub(super) fn budget() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current.map_or(usize::MAX, |limit| limit as usize)
}

/// Number of descriptors that may be in flight to one subscriber. `left` is the part of
/// `budget` that the other subscribers leave.
///
/// A subscriber that has not yet acknowledged an offer gets a small share, and a smaller one
/// when many such subscribers have used most of the budget. A subscriber that has acknowledged
/// an offer gets at most half of `left`, so that something remains if the subscriber stops
/// reading. Every subscriber may have one offer in flight, because the budget is only an
/// estimate of the kernel's limit.
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
