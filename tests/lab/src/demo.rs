//! The command `peerbuf demo` and its output.

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

/// The topology that the guest was started with.
pub fn topology() -> String {
    std::env::var("PEERBUF_LAB_TOPOLOGY").expect("PEERBUF_LAB_TOPOLOGY, which the lab sets")
}

/// Runs `peerbuf demo --json` with these additional arguments; returns an object per transfer.
pub fn transfers(arguments: &[&str]) -> Vec<Value> {
    let mut command = Command::new("peerbuf");
    let output = command
        .args(["demo", "--json"])
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    // The lab has everything, so nothing may be replaced by a substitute.
    assert!(!said.contains("missing"), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Excludes other tests of this binary that call `alone`. For tests that check the free space
/// of a BAR, which any export changes.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
