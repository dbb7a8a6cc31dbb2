//! The kernel's own tests of other exporters pass before and after peerbuf.ko's work. Runs in
//! the guest. The tests are unchanged from the kernel's source. The test of udmabuf takes 4 GiB
//! of huge pages.

use std::fs;
use std::os::fd::AsFd;
use std::process::Command;

use peerbuf_lab_suite::demo;
use peerbuf_lab_suite::importer::{DYNAMIC, Importer, PEER};
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::{Node, nvme_bdf};

/// Runs one of the kernel's tests. Each prints `ok N ...`, `not ok N ...` or `ok N ... # SKIP ...`
/// per check.
fn passes(name: &str, checks: usize) {
    let output = Command::new(format!("/opt/peerbuf/fixtures/selftest-{name}"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("not ok") && !said.contains("SKIP"), "{said}");
    let passed = text.lines().filter(|l| l.starts_with("ok ")).count();
    assert!(passed >= checks, "{passed} of {checks}:\n{said}");
}

fn all_pass() {
    // Two buffers of 1024 huge pages each, and the pages that the buffers need besides.
    fs::write("/proc/sys/vm/nr_hugepages", "2056").unwrap();
    passes("udmabuf", 7);
    passes("dmabuf-heap", 11);
    fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
}

#[test]
fn the_kernels_own_tests_pass_before_and_after_peerbufs_work() {
    // The importer that the heaps' test needs.
    modules::load("vgem");
    all_pass();

    let node = Node::largest();
    for _ in 0..20 {
        let (fd, _) = node.export(None, 1 << 20).unwrap();
        let importer = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0).unwrap();
        assert_eq!(importer.map().unwrap().bytes, 1 << 20);
    }
    Node::unbind(&node.bdf);
    Node::bind(&node.bdf);
    assert!(!demo::transfers(&[]).is_empty());

    all_pass();
}
