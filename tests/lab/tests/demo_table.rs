//! `peerbuf demo` takes the path that each topology allows, gives the reason against better paths, and moves
//! every byte; `why`, `prove` and `doctor` agree. Runs in the guest, in each topology.

use std::process::{Command, Output};

use peerbuf_lab_suite::demo::{alone, topology, transfers};
use peerbuf_lab_suite::node::{Node, nvme_bdf};
use serde_json::Value;

fn reason<'v>(transfer: &'v Value, path: &str) -> &'v Value {
    let reasons = transfer["reasons"].as_array().unwrap();
    let found = reasons.iter().find(|reason| reason["path"] == path);
    found.unwrap_or_else(|| panic!("no reason against {path}: {transfer}"))
}

fn check(transfers: &[Value], size: u64) {
    assert_eq!(transfers.len(), 4);
    for transfer in transfers {
        assert_eq!(transfer["verified"], true, "{transfer}");
        assert_eq!(transfer["bytes"], size, "{transfer}");
    }
    let (bar, udmabuf) = transfers.split_at(2);
    let device = Node::largest().bdf;
    for (transfer, direction) in bar.iter().zip(["disk to buffer", "buffer to disk"]) {
        let name = transfer["buffer"].as_str().unwrap();
        assert!(name.starts_with(&format!("{device} BAR 2")), "{name}");
        let (path, code) = match topology().as_str() {
            "switch" | "host-bridge" => ("peer-to-peer", None),
            "refused" => ("staged-copy", Some("kernel-refused")),
            "lying" => ("staged-copy", Some("proof-failed")),
            other => panic!("what does {other} promise?"),
        };
        assert_eq!(transfer["path"], path, "{transfer}");
        match code {
            None => {
                // Only the part of a last, incomplete block may pass through the CPU.
                assert_eq!(transfer["host_bytes"], size % 512, "{transfer}");
                assert_eq!(transfer["reasons"].as_array().unwrap().len(), 0);
            }
            Some(code) => {
                assert_eq!(transfer["host_bytes"], size, "{transfer}");
                let why = reason(transfer, "peer-to-peer");
                assert_eq!(why["code"], code);
                let evidence = why["evidence"].as_str().unwrap();
                for words in [device.as_str(), &nvme_bdf(), direction] {
                    assert!(
                        evidence.contains(words),
                        "{evidence:?} does not say {words:?}"
                    );
                }
                assert_eq!(
                    reason(transfer, "shared-host-memory")["code"],
                    "not-host-memory"
                );
            }
        }
    }
    for transfer in udmabuf {
        assert_eq!(transfer["buffer"], "udmabuf");
        assert_eq!(transfer["path"], "shared-host-memory", "{transfer}");
        assert_eq!(
            reason(transfer, "peer-to-peer")["code"],
            "not-device-memory"
        );
    }
}

#[test]
fn each_buffer_takes_the_path_that_the_topology_allows() {
    let _alone = alone();
    check(&transfers(&[]), 8 << 20);
}

#[test]
fn a_size_off_every_border_takes_the_same_paths() {
    let _alone = alone();
    check(&transfers(&["--size", "1000003"]), 1_000_003);
}

#[test]
fn the_demo_leaves_every_byte_free_and_no_file() {
    let _alone = alone();
    let files = || std::fs::read_dir("/mnt/nvme").unwrap().count();
    let before = files();
    transfers(&["--size", "1M"]);
    assert_eq!(files(), before);
    for node in Node::all() {
        let bar = node.bar2();
        assert_eq!((bar.free, bar.exports), (bar.size, 0), "{}", node.bdf);
    }
}

#[test]
fn the_files_are_on_the_nvme_disk_unless_told_otherwise() {
    let _alone = alone();
    let transfers = transfers(&["--size", "64K"]);
    let source = transfers[0]["source"].as_str().unwrap();
    assert!(source.contains(&nvme_bdf()), "{source}");
}

#[test]
fn a_bar_without_struct_pages_is_carried_by_the_cpu_and_says_so() {
    let _alone = alone();
    let small = Node::all().pop().unwrap().bdf;
    let transfers = transfers(&["--device", &small, "--size", "64K"]);
    for transfer in &transfers[..2] {
        assert_eq!(transfer["path"], "staged-copy", "{transfer}");
        assert_eq!(transfer["verified"], true, "{transfer}");
        assert_eq!(transfer["host_bytes"], 64 << 10, "{transfer}");
        let why = reason(transfer, "peer-to-peer");
        assert_eq!(why["code"], "no-struct-pages", "{transfer}");
    }
}

/// Runs the command on a terminal of 80 columns, with a separate folder for proofs.
fn peerbuf(cache: &tempfile::TempDir, arguments: &[&str]) -> (Option<i32>, String) {
    let output: Output = Command::new("peerbuf")
        .args(arguments)
        .env("COLUMNS", "80")
        .env("XDG_CACHE_HOME", cache.path())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

fn json((_, text): (Option<i32>, String)) -> Value {
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn why_tells_a_newcomer_in_less_than_25_lines_before_and_after_a_proof() {
    let _alone = alone();
    let (cache, device) = (tempfile::tempdir().unwrap(), Node::largest().bdf);
    for proved in [false, true] {
        let (code, text) = peerbuf(&cache, &["why", "/dev/nvme0n1", &device]);
        // On a busy machine a quick step may take a minute.
        let text = text.replace("1 minute ago", "just now");
        let (expected, words): (_, &[&str]) = match (topology().as_str(), proved) {
            ("switch" | "host-bridge", false) => (0, &["yes", "not proved here"]),
            ("switch" | "host-bridge", true) => (0, &["yes, proved", "arrived, just now"]),
            ("refused", false) => (
                1,
                &[
                    "host-bridge-not-listed",
                    "not tried",
                    "what would change it",
                ],
            ),
            ("refused", true) => (1, &["host-bridge-not-listed", "kernel-refused, just now"]),
            ("lying", false) => (
                0,
                &[
                    "bytes may be lost",
                    "iommu-in-guest",
                    "what would change it",
                ],
            ),
            ("lying", true) => (1, &["proof-failed, just now", "iommu-in-guest", "iommu=pt"]),
            (other, _) => panic!("what does {other} promise?"),
        };
        assert_eq!(code, Some(expected), "{text}");
        assert!(text.lines().count() < 25, "{text}");
        assert!(
            text.lines().all(|line| line.chars().count() <= 80),
            "{text}"
        );
        for words in words {
            assert!(text.contains(words), "no {words:?} in\n{text}");
        }
        peerbuf(&cache, &["prove", "/dev/nvme0n1", &device]);
    }
}

#[test]
fn bytes_are_proved_each_way_and_doctor_begins_with_those_that_were_lost() {
    let _alone = alone();
    let (cache, device) = (tempfile::tempdir().unwrap(), Node::largest().bdf);
    let files = || std::fs::read_dir("/mnt/nvme").unwrap().count();
    let before = files();
    let proof = json(peerbuf(&cache, &["prove", "/mnt/nvme", &device, "--json"]));
    let code = match topology().as_str() {
        "refused" => Some("kernel-refused"),
        "lying" => Some("proof-failed"),
        _ => None,
    };
    assert_eq!(proof["proved"], code.is_none(), "{proof}");
    let forth = &proof["ways"][0];
    assert_eq!(
        (&forth["client"], &forth["provider"]),
        (&nvme_bdf().into(), &device.clone().into())
    );
    for direction in ["into", "out_of"] {
        let seen = &forth["bytes"][direction];
        assert_eq!(seen["arrived"], code.is_none(), "{proof}");
        assert_eq!(seen["code"].as_str(), code, "{proof}");
    }
    let back = &proof["ways"][1];
    assert!(
        back["not_tried"]
            .as_str()
            .unwrap()
            .starts_with("no-dma-engine"),
        "{proof}"
    );
    assert_eq!(files(), before);
    for node in Node::all() {
        let bar = node.bar2();
        assert_eq!((bar.free, bar.exports), (bar.size, 0), "{}", node.bdf);
    }
    // The kernel allows the pair and the bytes were lost, so this finding comes first.
    let (_, text) = peerbuf(&cache, &["doctor"]);
    let first: Vec<&str> = text.lines().take(3).collect();
    let lost = topology() == "lying";
    assert_eq!(
        first[1].contains("proof-failed") || first[2].contains("proof-failed"),
        lost,
        "{text}"
    );
    assert_eq!(text.contains("proof-failed"), lost, "{text}");
    let pairs = json(peerbuf(&cache, &["doctor", "--json"]));
    let pairs = pairs["pairs"].as_array().unwrap();
    let pair = pairs
        .iter()
        .find(|pair| pair["client"] == nvme_bdf().as_str() && pair["provider"] == device.as_str());
    for direction in ["into", "out_of"] {
        let (kept, seen) = (
            &pair.unwrap()["bytes"][direction],
            &forth["bytes"][direction],
        );
        assert_eq!(
            (&kept["arrived"], &kept["evidence"]),
            (&seen["arrived"], &seen["evidence"])
        );
        assert!(kept["age_seconds"].is_u64(), "{kept}");
    }
    // Another user's cache does not have the proof.
    let other = tempfile::tempdir().unwrap();
    let (_, text) = peerbuf(&other, &["doctor"]);
    assert!(!text.contains("proof-failed"), "{text}");
}

#[test]
fn a_raw_disk_is_written_only_where_the_user_says_so() {
    let _alone = alone();
    let (cache, device) = (tempfile::tempdir().unwrap(), Node::largest().bdf);
    let good = matches!(topology().as_str(), "switch" | "host-bridge");
    let arguments = ["prove", &device, "/dev/nvme0n2", "--scratch-range", "1M:1M"];
    let (code, text) = peerbuf(&cache, &arguments);
    assert_eq!(code, Some(if good { 0 } else { 1 }), "{text}");
    assert!(
        text.contains("/dev/nvme0n2, which is written from 1048576 on"),
        "{text}"
    );
    let (code, text) = peerbuf(&cache, &["prove", &device, &Node::all().pop().unwrap().bdf]);
    assert!(
        code == Some(1) && text.contains("no bytes were tried"),
        "{text}"
    );
    let (code, text) = peerbuf(&cache, &["prove", &device, "nonsense"]);
    assert!(
        code == Some(2) && text.contains("nonsense: no such device"),
        "{text}"
    );
}
