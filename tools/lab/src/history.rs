//! The history of the suite's runs, for each kernel: how long each run took, so that the longest starts
//! first, and when it last passed, so that runs can take turns.
//!
//! The history is in the cache and shared by all checkouts. It is only a hint: without it, the order is
//! arbitrary.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{cache::Cache, kernel};

/// Assumed duration in seconds of a run without history.
const UNKNOWN: u64 = 30;
/// Approximate slowdown of a run on the debug kernel.
const SLOWER: u64 = 5;

/// The history of one run.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Past {
    /// The duration of the last run, in seconds.
    took: u64,
    /// When the run last passed completely, in seconds since 1970.
    passed: Option<u64>,
}

/// The history of all runs on one kind of kernel.
pub struct History {
    file: PathBuf,
    known: Mutex<HashMap<String, Past>>,
    /// The history on the stock kernel: the basis for estimates, times the slowdown.
    stock: HashMap<String, Past>,
    slower: u64,
}

fn read(file: &PathBuf) -> HashMap<String, Past> {
    fs::read_to_string(file)
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default()
}

impl History {
    /// Reads the history; `kernel` is a [`kernel::kind`].
    pub fn of(cache: &Cache, kernel: &str) -> Self {
        let file = |kernel| cache.dir().join(format!("locks/runs-{kernel}.json"));
        Self {
            known: Mutex::new(read(&file(kernel))),
            file: file(kernel),
            stock: read(&file(kernel::STOCK)),
            slower: if kernel == kernel::DEBUG { SLOWER } else { 1 },
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Past>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The expected duration of a run; never zero.
    pub fn expected(&self, run: &str) -> Duration {
        let took = |past: &Past| past.took.max(1);
        let known = self.lock().get(run).map(took);
        let elsewhere = || self.stock.get(run).map(|past| self.slower * took(past));
        Duration::from_secs(known.or_else(elsewhere).unwrap_or(UNKNOWN))
    }

    /// When a run last passed; `None` if unknown.
    pub fn passed(&self, run: &str) -> Option<u64> {
        self.lock().get(run)?.passed
    }

    /// Records a run's duration, and whether it passed completely.
    pub fn note(&self, run: &str, took: Duration, passed: bool) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        let past = Past {
            took: took.as_secs(),
            passed: passed.then_some(now),
        };
        self.write(run, past);
    }

    /// Records that a run did not pass after all.
    pub fn failed(&self, run: &str) {
        // A run without history has no recorded pass.
        let past = self.lock().get(run).copied();
        if let Some(past) = past {
            let passed = None;
            self.write(run, Past { passed, ..past });
        }
    }

    fn write(&self, run: &str, past: Past) {
        let mut known = self.lock();
        // Another lab may have written meanwhile; the later result of a run counts.
        let mut all = read(&self.file);
        all.insert(run.to_owned(), past);
        if let Ok(text) = serde_json::to_string_pretty(&all) {
            // Replaced atomically: a reader of half a file would consider it empty, and write that.
            let new = self
                .file
                .with_extension(format!("{}.new", std::process::id()));
            if fs::write(&new, text).is_ok() {
                let _ = fs::rename(&new, &self.file);
            }
        }
        *known = all;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passed_and_then_failed_has_not_passed() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let seconds = Duration::from_secs;
        let history = History::of(&cache, kernel::DEBUG);
        history.note("a", seconds(7), true);
        assert!(history.passed("a").is_some());
        history.failed("a");
        history.failed("nobody");
        // As another lab reads it, and adds to it.
        let other = History::of(&cache, kernel::DEBUG);
        other.note("b", seconds(3), true);
        history.note("c", seconds(1), true);
        let all = History::of(&cache, kernel::DEBUG);
        assert_eq!((all.passed("a"), all.expected("a")), (None, seconds(7)));
        assert!(all.passed("b").is_some() && all.passed("c").is_some());
        assert_eq!(all.passed("nobody"), None);
        let names = fs::read_dir(directory.path().join("locks")).unwrap();
        assert_eq!(names.count(), 1, "no half of a file stays");
    }

    #[test]
    fn what_is_unknown_is_taken_from_the_stock_kernel_and_five_times_as_long_on_the_debug_kernel() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        History::of(&cache, kernel::STOCK).note("a", Duration::from_secs(4), true);
        let debug = History::of(&cache, kernel::DEBUG);
        assert_eq!(debug.expected("a"), Duration::from_secs(20));
        assert_eq!(debug.expected("b"), Duration::from_secs(UNKNOWN));
        assert_eq!(debug.passed("a"), None, "it did not pass on this kernel");
        let older = History::of(&cache, "7.2");
        assert_eq!(older.expected("a"), Duration::from_secs(4));
        older.note("a", Duration::from_secs(6), true);
        assert_eq!(older.expected("a"), Duration::from_secs(6));
        assert_eq!(debug.passed("a"), None, "it passed on another kernel");
    }
}
