//! The person's terminal, while a guest's shell has it.

use std::{io::stdin, sync::Mutex};

use nix::sys::termios::{self, SetArg, Termios};

/// How the terminal was, for whoever ends the lab in an unusual way.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal passes every key on unchanged while this lives.
pub struct Raw;

impl Raw {
    /// Does nothing where standard input is no terminal.
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

/// Gives the terminal back as it was.
pub fn restore() {
    if let Ok(mut kept) = BEFORE.lock()
        && let Some(before) = kept.take()
    {
        let _ = termios::tcsetattr(stdin(), SetArg::TCSANOW, &before);
    }
}
