//! Runs with the same options, which share guests, and the order in which runs take turns.

use std::{path::PathBuf, sync::Mutex, time::Duration};

use super::{
    lock,
    manifest::{Place, Run},
};
use crate::{cli::GuestArgs, history::History};

/// A run to make.
pub(super) struct Work {
    pub(super) run: Run,
    pub(super) file: PathBuf,
    /// The selected tests; empty for all.
    pub(super) tests: Vec<String>,
    /// How long it took the last time.
    pub(super) expected: Duration,
    /// QEMU has already crashed once during this run.
    pub(super) again: bool,
}

/// Runs with the same options, which can share guests.
pub(super) struct Group {
    pub(super) place: Place,
    pub(super) options: Vec<String>,
    pub(super) args: GuestArgs,
    /// The programs of all its runs, for every guest.
    pub(super) files: Vec<PathBuf>,
    /// The waiting runs, longest last.
    pub(super) waiting: Vec<Work>,
    /// The number of guests working on it.
    pub(super) guests: u32,
}

/// Adds to `chosen` as many of the other runs as fit into this much guest time: first those that never passed
/// or passed longest ago. Options that no chosen run has cost a guest's boot in addition. If there is any
/// time at all, the first run takes its turn even if it alone exceeds the time.
pub(super) fn take_turns(
    mut others: Vec<Work>,
    chosen: &mut Vec<Work>,
    history: &History,
    mut time: Duration,
    boot: Duration,
) {
    others.sort_by_cached_key(|work| (history.passed(&work.run.name()), work.run.name()));
    for (n, work) in others.into_iter().enumerate() {
        let mut needs = work.expected;
        if !chosen.iter().any(|c| c.run.options == work.run.options) {
            needs += boot;
        }
        if needs <= time || (n == 0 && !time.is_zero()) {
            time = time.saturating_sub(needs);
            chosen.push(work);
        }
    }
}

/// The group that profits most from another guest, and its longest run.
pub(super) fn next_group(groups: &Mutex<Vec<Group>>, boot: Duration) -> Option<(usize, Work)> {
    let mut groups = lock(groups);
    let worth = |g: &Group| {
        let waiting: Duration = g.waiting.iter().map(|w| w.expected).sum();
        waiting / (g.guests + 1)
    };
    let (n, group) = groups
        .iter_mut()
        .enumerate()
        .filter(|(_, g)| !g.waiting.is_empty())
        // A group that is nearly done is left to its current guest.
        .filter(|(_, g)| g.guests == 0 || worth(g) > boot)
        .max_by_key(|(_, g)| worth(g))?;
    group.guests += 1;
    Some((n, group.waiting.pop()?))
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use super::*;
    use crate::{kernel, suite::manifest::guest_args};

    pub(in crate::suite) fn work(name: &str, seconds: u64) -> Work {
        Work {
            run: serde_json::from_str(&format!(r#"{{"test": "{name}"}}"#)).unwrap(),
            file: format!("/t/{name}-1").into(),
            tests: vec![],
            expected: Duration::from_secs(seconds),
            again: false,
        }
    }

    pub(in crate::suite) fn group(works: Vec<Work>) -> Group {
        Group {
            place: Place::Guest,
            options: vec![],
            args: guest_args(&works[0].run).unwrap(),
            files: vec![],
            waiting: works,
            guests: 0,
        }
    }

    #[test]
    fn guests_go_where_they_are_worth_their_boot() {
        let groups = Mutex::new(vec![
            group(vec![work("a", 5), work("b", 9)]),
            group(vec![work("c", 1), work("d", 30), work("e", 40)]),
        ]);
        let mut order = Vec::new();
        while let Some((n, work)) = next_group(&groups, Duration::from_secs(10)) {
            order.push((n, work.run.name()));
        }
        // No guest ran c after the second guest of its group ended, so c waits for the first.
        let expected = [(1, "e"), (1, "d"), (0, "b")].map(|(n, s)| (n, s.to_owned()));
        assert_eq!(order, expected);
    }

    #[test]
    fn runs_take_turns_the_one_that_passed_longest_ago_first() {
        let directory = tempfile::tempdir().unwrap();
        let cache = crate::cache::Cache::at(directory.path()).unwrap();
        let history = History::of(&cache, kernel::DEBUG);
        let run = |name: &str, memory: &str| Run {
            options: vec!["--memory".into(), memory.into()],
            ..work(name, 1).run
        };
        for (name, took) in [("d", 20), ("b", 30), ("a", 100)] {
            history.note(&run(name, "1").name(), Duration::from_secs(took), false);
        }
        // As if they had passed in this order, and c never. c takes 30 s, and each takes a boot.
        let file = directory.path().join("locks/runs-debug.json");
        let mut known: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        for (when, name) in (1..).zip(["d", "a", "b"]) {
            known[run(name, "1").name()]["passed"] = when.into();
        }
        fs::write(&file, known.to_string()).unwrap();
        let history = History::of(&cache, kernel::DEBUG);
        let waiting = |name: &str, memory: &str| Work {
            expected: history.expected(&run(name, memory).name()),
            run: run(name, memory),
            ..work(name, 1)
        };
        let turn = |time| {
            let mut chosen = vec![waiting("always", "2")];
            let others = ["a", "b", "c", "d"].map(|name| waiting(name, "1")).into();
            let (time, boot) = (Duration::from_secs(time), Duration::from_secs(10));
            take_turns(others, &mut chosen, &history, time, boot);
            let names = chosen[1..].iter().map(|work| work.run.test.clone());
            names.collect::<String>()
        };
        assert_eq!(turn(0), "");
        assert_eq!(turn(40), "c");
        assert_eq!(turn(60), "cd");
        // A run that does not fit lets the next one pass.
        assert_eq!(turn(90), "cdb");
        assert_eq!(turn(200), "cdab");
        // A run that passes goes to the end of the queue; one that fails goes to the front.
        history.note(&run("c", "1").name(), Duration::from_secs(30), true);
        history.note(&run("b", "1").name(), Duration::from_secs(30), false);
        assert_eq!(turn(200), "bdac");
        // A run longer than the whole budget waits until it is first in the queue, and then runs.
        assert_eq!(turn(15), "b");
        history.note(&run("b", "1").name(), Duration::from_secs(30), true);
        history.note(&run("d", "1").name(), Duration::from_secs(20), true);
        assert_eq!(turn(50), "a");
    }
}
