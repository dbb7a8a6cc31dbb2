//! Accepting connections in spite of errors. A shortage of descriptors or memory, and a client that leaves
//! before it is accepted, are no reason for a server to end. It says so once, pauses, and accepts again.

use std::fmt::Display;
use std::time::Duration;

use peerbuf::Deadline;

use crate::say;

/// The pause after an error: the client still waits, and a server without a pause would fail again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// The state of a server between two connections.
#[derive(Default)]
pub struct Accepting {
    pause: Option<Deadline>,
    told: bool,
}

impl Accepting {
    /// The rest of the pause; `None` when the server may accept.
    pub fn pause(&mut self) -> Option<Duration> {
        self.pause = self.pause.filter(|pause| !pause.is_over());
        self.pause.map(|pause| pause.left())
    }

    /// The connection. An error begins a pause; only the first of several errors in a row is printed.
    pub fn take<T, E: Display>(&mut self, accepted: Result<T, E>) -> Option<T> {
        match accepted {
            Ok(connection) => {
                self.told = false;
                Some(connection)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    say::remark(format_args!(
                        "cannot accept connections at present, will retry: {error}"
                    ));
                }
                self.pause = Some(Deadline::after(PAUSE));
                None
            }
        }
    }
}
