//! What several test programs need.

use std::io::Write;

/// Says by name that a test did not run, on standard error.
pub fn not_run(test: &str, why: impl std::fmt::Display) {
    // Not a macro that prints, whose output is shown only when a test fails.
    let _ = writeln!(std::io::stderr(), "test {test} ... NOT RUN: {why}");
}
