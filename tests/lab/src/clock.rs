//! Limits that hold on a busy host, too.
//!
//! A guest's clock goes on while the host lets the guest wait, so a limit by that clock fails on a busy host.
//! A [`Stopwatch`] counts the time in which this process could run: a thread of it sleeps again and again for
//! a moment, and one that oversleeps counts as one moment.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long the thread sleeps.
const MOMENT: Duration = Duration::from_millis(5);

/// Nanoseconds that this process could run, since the thread was started.
static PASSED: AtomicU64 = AtomicU64::new(0);
/// The process that the thread is of: a child has none yet.
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

/// Time in which this process could run, for upper limits. It lags by up to 5 ms; what takes at least so
/// long is measured by an [`Instant`].
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Duration);

impl Stopwatch {
    /// Begins now.
    #[must_use]
    pub fn start() -> Self {
        Self(passed())
    }

    /// How long this process could run since.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        passed().saturating_sub(self.0)
    }
}
