//! `peerbuf cycle` on real dma-bufs: it loses no byte, and reports a broken guarantee. Runs in the guest.

use std::process::{Command, Output};

use peerbuf_lab_suite::demo::alone;
use peerbuf_lab_suite::node::Node;
use peerbuf_lab_suite::{machine, modules};
use serde_json::Value;

/// Time limit for subscribers, for an emulated CPU on a busy machine: only stopped processes may exceed it.
const LIMIT: &str = "2000";

fn cycle(seed: u32, arguments: &[&str]) -> Output {
    let mut command = Command::new("peerbuf");
    command.args(["cycle", "--json", "--seed", &seed.to_string()]);
    command.args(arguments).output().unwrap()
}

fn summary(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let summary = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    println!("{summary:#}");
    summary
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// Asserts that a run loses nothing and makes the requested cycles.
fn loses_nothing(arguments: &[&str], cycles: u64, importers: &[&str]) -> Value {
    let (importers_text, cycles_text) = (importers.join(","), cycles.to_string());
    let more = ["--importers", &importers_text, "--cycles", &cycles_text];
    let output = cycle(
        7,
        &[arguments, &more[..], &["--time-limit", LIMIT]].concat(),
    );
    let summary = summary(&output);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(summary["lost_bytes"], 0);
    assert_eq!(number(&summary["cycles"]), cycles);
    // The lab has everything, so nothing may be replaced by a substitute.
    assert_eq!(summary["missing"].as_array().unwrap().len(), 0, "{summary}");
    let work = summary["work"].as_array().unwrap();
    assert_eq!(work.len(), importers.len());
    for work in work {
        assert!(number(&work["jobs"]) > 0, "{work}");
    }
    summary
}

/// The number of cycles, and the probabilities that a process is killed or stopped in each: both must happen.
/// The debug kernel takes several times as long for each cycle.
fn storm() -> (u64, [&'static str; 4]) {
    match machine::is_debug_kernel() {
        false => (10_000, ["--kill", "0.002", "--stall", "0.0004"]),
        true => (1_000, ["--kill", "0.01", "--stall", "0.003"]),
    }
}

#[test]
fn nothing_is_lost_in_memory_that_a_disk_lends() {
    let _alone = alone();
    let summary = loses_nothing(
        &[
            "--backing",
            "cmb",
            "--processes",
            "3",
            "--buffers",
            "2",
            "--size",
            "64K",
            "--kill",
            "0.01",
        ],
        150,
        &["cpu", "nvme", "probe"],
    );
    let backing = summary["backing"].as_str().unwrap();
    assert!(backing.contains("lent memory"), "{backing}");
}

#[test]
fn nothing_is_lost_on_udmabufs_whoever_is_killed_or_stopped() {
    let _alone = alone();
    modules::vgem();
    let (cycles, faults) = storm();
    let what = ["--backing", "udmabuf", "--size", "32K"];
    let many = ["--processes", "8", "--buffers", "8"];
    let summary = loses_nothing(
        &[&what[..], &many, &faults].concat(),
        cycles,
        &["cpu", "nvme", "drm", "probe"],
    );
    assert!(number(&summary["faults"]["killed"]) > 0);
    assert!(number(&summary["faults"]["stopped"]) > 0);
}

#[test]
fn nothing_is_lost_when_the_kernel_moves_a_bar_underneath() {
    let _alone = alone();
    modules::vgem();
    let before = Node::largest().bar2().free;
    let (cycles, faults) = storm();
    let what = ["--backing", "bar", "--size", "32K"];
    let many = ["--processes", "4", "--buffers", "8"];
    let summary = loses_nothing(
        &[&what[..], &many, &faults].concat(),
        cycles,
        &["cpu", "nvme", "drm", "probe"],
    );
    assert!(number(&summary["moves"]["underneath"]) > 0);
    let disk = &summary["work"].as_array().unwrap()[1];
    assert!(number(&disk["peer_to_peer"]) > 0, "{disk}");
    // A process that was cut off had a revoked export; its range is free after the process ended.
    assert_eq!(Node::largest().bar2().free, before);
}

#[test]
fn nothing_is_lost_from_one_kind_of_memory_to_another() {
    let _alone = alone();
    modules::vgem();
    loses_nothing(
        &[
            "--backing",
            "mixed",
            "--processes",
            "2",
            "--buffers",
            "4",
            "--size",
            "16K",
        ],
        100,
        &["cpu", "nvme", "drm", "probe"],
    );
}

/// Asserts that a run with a broken guarantee fails, and reports what was lost and by which process.
fn is_noticed(backing: &str, guarantee: &str) {
    let _alone = alone();
    // A broken guarantee does harm only if a process is stopped at the wrong moment. With several schedules
    // that is all but certain.
    let broken = |seed: u32| {
        let arguments = [
            "--backing",
            backing,
            "--importers",
            "cpu",
            "--processes",
            "4",
            "--buffers",
            "2",
            "--size",
            "64K",
            "--cycles",
            "60",
            "--stall",
            "0.4",
            "--time-limit",
            "100",
            "--break",
            guarantee,
        ];
        cycle(seed, &arguments)
    };
    let output = (1..8)
        .map(broken)
        .find(|output| output.status.code() != Some(0))
        .unwrap_or_else(|| broken(8));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let summary = summary(&output);
    assert!(number(&summary["lost_bytes"]) > 0);
    let loss = &summary["losses"][0];
    for field in ["what", "expected", "found", "seen_by"] {
        assert!(!loss[field].as_str().unwrap().is_empty(), "{loss}");
    }
    assert!(number(&loss["generation"]) > 1, "{loss}");
}

#[test]
fn a_drain_that_is_skipped_is_noticed() {
    is_noticed("udmabuf", "skip-drain");
}

#[test]
fn a_generation_that_is_used_again_is_noticed() {
    is_noticed("udmabuf", "reuse-generation");
}

#[test]
fn a_copy_that_is_torn_is_noticed() {
    is_noticed("udmabuf", "tear-copy");
}

#[test]
fn a_bar_that_is_not_taken_from_those_who_were_cut_off_is_noticed() {
    is_noticed("bar", "reuse-generation");
}

#[test]
fn the_example_shares_a_bar_through_moves() {
    let _alone = alone();
    let output = Command::new("share_through_a_move").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let places: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split(": ").nth(1))
        .collect();
    assert_eq!(places, ["system", "device"].repeat(5), "{text}");
}
