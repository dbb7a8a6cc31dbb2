//! What the command prints. Whoever reads it may leave before the end (`peerbuf info | head`),
//! which the standard macros answer with a panic.

use std::fmt::Display;
use std::io::{ErrorKind, Write, stderr, stdout};

use crate::Failure;

/// Prints an answer on standard output.
///
/// # Errors
/// Standard output's own; see [`is_nobody_listening`].
pub fn answer(text: impl Display) -> Result<(), Failure> {
    let mut out = stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// Prints a remark on standard error, if it is still there.
pub fn remark(text: impl Display) {
    let _ = writeln!(stderr().lock(), "{text}");
}

/// True for the failure of an answer that nobody reads any more, which is not worth a remark.
pub fn is_nobody_listening(failure: &Failure) -> bool {
    failure
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}
