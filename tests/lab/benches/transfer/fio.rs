//! fio, for comparison.

use std::process::Command;

use serde_json::Value;

/// Reads of random places a second, so many from each disk, by fio's own clock: the start of the program is not
/// in it.
pub fn rate(disks: &[String], length: u64, depth: u32, requests: u64) -> f64 {
    let mut command = Command::new("fio");
    command
        .args([
            "--output-format=json",
            "--group_reporting",
            "--ioengine=io_uring",
            "--direct=1",
        ])
        .args([
            "--thread",
            "--rw=randread",
            "--randrepeat=0",
            "--norandommap",
        ])
        .arg(format!("--bs={length}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--size={}", super::SIZE))
        .arg(format!("--io_size={}", requests * length));
    for disk in disks {
        command.arg("--name=it").arg(format!("--filename={disk}"));
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    let begin = text
        .find('{')
        .unwrap_or_else(|| panic!("fio: {text}{error}"));
    let found: Value = serde_json::from_str(&text[begin..]).unwrap();
    let read = &found["jobs"][0]["read"];
    assert_eq!(read["total_ios"], requests * disks.len() as u64, "{text}");
    read["iops"].as_f64().unwrap()
}
