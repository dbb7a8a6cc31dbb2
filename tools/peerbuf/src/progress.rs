//! A line on the terminal for work that takes longer than two seconds.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::ProgressBar;

/// Time before a progress line appears.
const QUIET: Duration = Duration::from_secs(2);

/// Shows the current work on standard error, if that is a terminal, until it is dropped.
pub struct Progress {
    // Dropping the sender ends the thread.
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    pub fn start(what: impl Into<String>) -> Progress {
        let what = what.into();
        let (done, ended) = channel();
        let thread = std::thread::spawn(move || {
            if ended.recv_timeout(QUIET) == Err(RecvTimeoutError::Timeout) {
                // A spinner draws nothing if standard error is not a terminal.
                let line = ProgressBar::new_spinner().with_message(what);
                line.enable_steady_tick(Duration::from_millis(100));
                let _ = ended.recv();
                line.finish_and_clear();
            }
        });
        Progress {
            done: Some(done),
            thread: Some(thread),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.done.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
