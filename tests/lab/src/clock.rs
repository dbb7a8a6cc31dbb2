//! Time limits that hold on a busy host, too.
//!
//! A guest's clock continues while the host does not run the guest, so a limit by that clock fails on a busy
//! host. A [`Stopwatch`] counts the time in which this process could run: one of its threads sleeps
//! repeatedly for a moment, and an overlong sleep counts as one moment.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The duration of each sleep.
const MOMENT: Duration = Duration::from_millis(5);

/// Nanoseconds in which this process could run, since the thread started.
static PASSED: AtomicU64 = AtomicU64::new(0);
/// The process with the thread: a forked child has none yet.
static PROCESS: AtomicU32 = AtomicU32::new(0);

fn passed() -> Duration {
    let process = std::process::id();
    if PROCESS.swap(process, Ordering::Relaxed) != process {
        thread::spawn(|| {
            loop {
                let began = Instant::now();
                thread::sleep(MOMENT);
                let moment = began.elapsed().min(2 * MOMENT);
                PASSED.fetch_add(moment.as_nanos() as u64, Ordering::Relaxed);
            }
        });
    }
    Duration::from_nanos(PASSED.load(Ordering::Relaxed))
}

/// Time in which this process could run, for upper limits. It lags by up to 5 ms; measure lower limits with
/// an [`Instant`].
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Duration);

impl Stopwatch {
    /// Starts it.
    #[must_use]
    pub fn start() -> Self {
        Self(passed())
    }

    /// The time in which this process could run since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        passed().saturating_sub(self.0)
    }
}
