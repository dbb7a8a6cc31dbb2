//! The debug kernel reports the errors that it is for, and the lab notices. Runs on the host.

use std::process::{Command, Stdio};

#[test]
fn locks_in_the_wrong_order_sleep_stray_writes_and_lost_memory_fail_a_run() {
    let program = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    let load = "insmod /opt/peerbuf/fixtures/bad.ko";
    let output = Command::new(program)
        .args(["run", "--kernel", "debug", "--", "sh", "-c", load])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    for report in [
        "possible circular locking dependency",
        "sleeping function called from invalid context",
        "KASAN: slab-out-of-bounds in bad_write",
        "unreferenced object",
        "bad_loss",
        "(the command itself ended with 0)",
    ] {
        assert!(said.contains(report), "{report} in:\n{said}");
    }
}
