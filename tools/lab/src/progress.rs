//! Shows slow steps on standard error.
//!
//! A step that ends within two seconds shows nothing. On a terminal, a longer one shows a spinner with the
//! elapsed time. Otherwise it prints one line after two seconds and one at its end, so that a log stays
//! readable, and a warm `cargo lab run` adds nothing to CMD's own output.

use std::{
    fmt::Display,
    io::{IsTerminal, Write, stderr},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

const QUIET: Duration = Duration::from_secs(2);

/// Prints a line on standard error. Ignores a closed stderr, on which the standard macro would panic.
pub fn note(text: impl Display) {
    let _ = writeln!(stderr(), "peerbuf-lab: {text}");
}

/// A step in progress; ends when dropped or by [`done`](Step::done).
pub struct Step {
    shown: Option<(Sender<bool>, JoinHandle<()>)>,
}

impl Step {
    /// Begins a step; `what` is a phrase such as 'making the distribution tree'.
    pub fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let (tell, told) = channel();
        let thread = std::thread::spawn(move || {
            let began = Instant::now();
            let mut ended = told.recv_timeout(QUIET);
            if !matches!(ended, Err(RecvTimeoutError::Timeout)) {
                return;
            }
            let bar = stderr().is_terminal().then(|| spinner(&what, began));
            if bar.is_none() {
                note(format_args!("{what} ..."));
            }
            ended = told.recv().map_err(|_| RecvTimeoutError::Disconnected);
            match bar {
                Some(bar) => bar.finish_and_clear(),
                None => {
                    let how = if ended == Ok(true) { "done" } else { "ended" };
                    let seconds = began.elapsed().as_secs_f64();
                    note(format_args!("{what}: {how} in {seconds:.0} s"));
                }
            }
        });
        Self {
            shown: Some((tell, thread)),
        }
    }

    /// A step shown only on a terminal, for what every warm call does, such as booting.
    pub fn start_on_terminal(what: impl Into<String>) -> Self {
        if stderr().is_terminal() {
            Self::start(what)
        } else {
            Self { shown: None }
        }
    }

    /// Ends the step as a success.
    pub fn done(mut self) {
        self.end(true);
    }

    fn end(&mut self, good: bool) {
        if let Some((tell, thread)) = self.shown.take() {
            let _ = tell.send(good);
            drop(tell);
            let _ = thread.join();
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.end(false);
    }
}

fn spinner(what: &str, began: Instant) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_elapsed(began.elapsed());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}
