//! What is remembered of the suite's runs, for each kernel: how long each took, so that the longest begins
//! first, and when it last passed, so that those which take turns do.
//!
//! It is in the cache, for every checkout. Only a memory: without it any order does.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{cache::Cache, kernel};

/// What a run is taken to need of which nothing is known.
const UNKNOWN: u64 = 30;
/// How much longer one takes on the instrumented kernel, about.
const SLOWER: u64 = 5;

/// Of one run.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Past {
    /// How long it took the last time, in seconds.
    took: u64,
    /// When it last passed whole, in seconds since 1970.
    passed: Option<u64>,
}

/// Of all runs with one kind of kernel.
pub struct History {
    file: PathBuf,
    known: Mutex<HashMap<String, Past>>,
    /// What is known of the stock kernel: where this one's is not, it takes so many times as long.
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
    /// Reads it; `kernel` is of [`kernel::kind`].
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

    /// How long a run will take, about; more than nothing.
    pub fn expected(&self, run: &str) -> Duration {
        let took = |past: &Past| past.took.max(1);
        let known = self.lock().get(run).map(took);
        let elsewhere = || self.stock.get(run).map(|past| self.slower * took(past));
        Duration::from_secs(known.or_else(elsewhere).unwrap_or(UNKNOWN))
    }

    /// When a run last passed; none if that is not known.
    pub fn passed(&self, run: &str) -> Option<u64> {
        self.lock().get(run)?.passed
    }

    /// It took so long, and passed whole or did not.
    pub fn note(&self, run: &str, took: Duration, passed: bool) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        let past = Past {
            took: took.as_secs(),
            passed: passed.then_some(now),
        };
        self.write(run, past);
    }

    /// It did not pass after all.
    pub fn failed(&self, run: &str) {
        // One of which nothing is known has not passed.
        let past = self.lock().get(run).copied();
        if let Some(past) = past {
            let passed = None;
            self.write(run, Past { passed, ..past });
        }
    }

    fn write(&self, run: &str, past: Past) {
        let mut known = self.lock();
        // Another lab may have written meanwhile; of the two the last word on a run counts.
        let mut all = read(&self.file);
        all.insert(run.to_owned(), past);
        if let Ok(text) = serde_json::to_string_pretty(&all) {
            // Whole or not at all: who reads half of it would take it for empty, and write that.
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
        // As another lab reads it, and with what it adds.
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
