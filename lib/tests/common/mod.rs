//! Code that several test programs share.

use std::io::Write;

/// Reports on standard error that a test did not run, with its name. Panics in the lab's guest, which has
/// everything that tests need.
pub fn not_run(test: &str, why: impl std::fmt::Display) {
    let in_the_lab = std::env::var_os("PEERBUF_LAB").is_some();
    assert!(!in_the_lab, "test {test} did not run: {why}");
    // Not a printing macro, whose output the harness shows only for a failed test.
    let _ = writeln!(std::io::stderr(), "test {test} ... NOT RUN: {why}");
}
