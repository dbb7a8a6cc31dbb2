//! Output of the command. A reader may close the pipe early (`peerbuf info | head`), and the
//! standard macros panic in that case.

use std::fmt::Display;
use std::io::{ErrorKind, Write, stderr, stdout};

use crate::Failure;

/// Prints an answer on standard output.
///
/// # Errors
/// The error of standard output; see [`is_nobody_listening`].
pub fn answer(text: impl Display) -> Result<(), Failure> {
    let mut out = stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// Prints a remark on standard error, if standard error is open.
pub fn remark(text: impl Display) {
    let _ = writeln!(stderr().lock(), "{text}");
}

/// True if an answer failed because its reader has gone, which needs no remark.
pub fn is_nobody_listening(failure: &Failure) -> bool {
    failure
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}
