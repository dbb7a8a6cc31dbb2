//! Code that several test programs share.

use std::io::Write;

/// Reports on standard error that a test did not run, with its name.
pub fn not_run(test: &str, why: impl std::fmt::Display) {
    // Not a printing macro, whose output the harness shows only for a failed test.
    let _ = writeln!(std::io::stderr(), "test {test} ... NOT RUN: {why}");
}
