//! Two machines: `cargo lab pair`, and the whole way of a file from one's disk to the other's. Runs
//! on the host and calls the lab.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn pair(options: &[&str], command: &[&str]) -> Output {
    let program = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    Command::new(program)
        .args([&["pair"], options, &["--"], command].concat())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The lines of one end, without its name.
fn lines<'t>(text: &'t str, end: &str) -> Vec<&'t str> {
    let name = format!("{end}: ");
    text.lines()
        .filter_map(|line| line.strip_prefix(name.as_str()))
        .collect()
}

fn a_file_goes_from_disk_to_disk(rdma: &str, registration: &str) {
    let script = ["sh", "/opt/peerbuf/init/two-machines", "--json"];
    let output = pair(&["--rdma", rdma], &script);
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{out}{err}");
    let (first, second) = (lines(&out, "first"), lines(&out, "second"));
    let summary: Value = serde_json::from_str(first[0]).unwrap();
    assert_eq!(summary["bytes"], 8 << 20, "{summary}");
    assert_eq!(summary["verified"], true, "{summary}");
    for end in ["here", "there"] {
        assert_eq!(summary[end]["registration"], registration, "{summary}");
        let file = &summary[format!("file_{end}")];
        assert_eq!(file["path"], "peer-to-peer", "{summary}");
        assert_eq!(file["host_bytes"], 0, "{summary}");
        let copied = if registration == "staged" { 8 << 20 } else { 0 };
        assert_eq!(summary[format!("copied_{end}")], copied, "{summary}");
    }
    // The files, by another program than ours.
    assert_eq!(first[1], second[0], "{out}");
    assert!(
        first[1].starts_with(summary["sha256"].as_str().unwrap()),
        "{out}"
    );
}

#[test]
fn with_the_kernels_soft_roce_the_bytes_are_staged() {
    a_file_goes_from_disk_to_disk("stock", "staged");
}

#[test]
fn with_dma_bufs_they_go_from_bar_to_bar() {
    a_file_goes_from_disk_to_disk("dmabuf", "dma-buf-by-kernel");
}

#[test]
fn the_higher_status_is_the_pairs_and_lines_are_named() {
    let script = "echo a $PEERBUF_LAB_END; [ $PEERBUF_LAB_END = first ] || exit 7";
    let output = pair(&["--bare"], &["sh", "-c", script]);
    assert_eq!(output.status.code(), Some(7));
    let mut lines: Vec<&str> = std::str::from_utf8(&output.stdout)
        .unwrap()
        .lines()
        .collect();
    lines.sort_unstable();
    assert_eq!(lines, ["first: a first", "second: a second"]);
}
