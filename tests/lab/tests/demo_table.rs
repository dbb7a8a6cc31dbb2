//! `peerbuf demo` takes the path that each topology allows, gives the reason against better paths, and moves
//! every byte. Runs in the guest, in each topology.

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
