//! The user's terminal, while a guest's shell uses it.

use std::{io::stdin, sync::Mutex};

use nix::sys::termios::{self, SetArg, Termios};

/// The terminal's original settings, for an abnormal end of the lab.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal is in raw mode while this lives.
pub struct Raw;

impl Raw {
    /// Enters raw mode; does nothing if standard input is not a terminal.
    pub fn enter() -> Self {
        if let Ok(before) = termios::tcgetattr(stdin()) {
            let mut raw = before.clone();
            termios::cfmakeraw(&mut raw);
            if termios::tcsetattr(stdin(), SetArg::TCSANOW, &raw).is_ok()
                && let Ok(mut kept) = BEFORE.lock()
            {
                *kept = Some(before);
            }
        }
        Self
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal's settings.
pub fn restore() {
    if let Ok(mut kept) = BEFORE.lock()
        && let Some(before) = kept.take()
    {
        let _ = termios::tcsetattr(stdin(), SetArg::TCSANOW, &before);
    }
}
