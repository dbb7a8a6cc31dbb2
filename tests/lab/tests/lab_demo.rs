//! `cargo lab demo`, the README's first command, shows every part, and every byte arrives. Runs on the host and
//! calls the lab.

use std::process::{Command, Stdio};

#[test]
fn every_part_of_the_demo_is_shown_and_all_bytes_arrive() {
    let program = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    let mut command = Command::new(program);
    let output = command.arg("demo").stdin(Stdio::null()).output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert_eq!(output.status.code(), Some(0), "{out}{err}");
    for part in [
        "switch",
        "host-bridge",
        "refused",
        "lying",
        "two machines, the kernel's soft-RoCE",
        "two machines, a soft-RoCE that takes dma-bufs",
        "two machines, a soft-RoCE that takes dma-bufs, both buffers moving",
    ] {
        let heading = format!("== {part} ==");
        assert!(out.lines().any(|line| line == heading), "{part}: {out}");
    }
    // Something to read comes before anything is made: what the host can do.
    assert!(out.starts_with("This host: Linux "), "{out}");
    let last = out.lines().last().unwrap();
    let all_right = "31 transfers, 248 MiB: every byte arrived, all right";
    assert_eq!(last, all_right, "{out}");
    // In the last part the card still gets the dma-buf itself.
    let (_, moving) = out.rsplit_once("both buffers moving ==").unwrap();
    assert!(moving.contains("dma-buf-by-kernel"), "{moving}");
}
