//! `peerbuf matrix`: the path between each exporter and each importer of the lab, compared cell by cell with
//! docs/matrix.md. Runs in the guest.

use std::process::Command;

use peerbuf_lab_suite::demo::topology;
use peerbuf_lab_suite::machine::expect_what_vfio_loses;
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::Node;
use serde_json::Value;

/// The page in docs. `docs/make-matrix` corrects it.
const PAGE: &str = include_str!("../../../docs/matrix.md");

/// A row: the exporter, and for each importer the path or the reason code.
type Row = (&'static str, &'static [&'static str]);

const P2P: &str = "peer-to-peer";
const SHARED: &str = "shared-host-memory";
const STAGED: &str = "staged-copy";
/// The column of peerbuf_probe.ko, which moves no bytes.
const ASKED: &str = "probe as NVMe driver";

const SWITCH: &[Row] = &[
    ("", &["CPU", "file", "DRM vgem", "V4L2 vivid", ASKED]),
    (
        "peerbuf.ko BAR",
        &[STAGED, P2P, "importer-not-peer", "attach-refused", P2P],
    ),
    (
        "peerbuf.ko BAR, may move",
        &[STAGED, P2P, SHARED, SHARED, P2P],
    ),
    (
        "peerbuf.ko BAR without pages",
        &[
            STAGED,
            STAGED,
            "importer-not-peer",
            "attach-refused",
            "kernel-refused",
        ],
    ),
    (
        "provider's memory",
        &[STAGED, P2P, "importer-not-peer", "attach-refused", P2P],
    ),
    ("provider's, may move", &[STAGED, P2P, SHARED, SHARED, P2P]),
    ("udmabuf", &[SHARED; 5]),
    (
        "udmabuf of pieces",
        &[SHARED, STAGED, SHARED, SHARED, SHARED],
    ),
    ("udmabuf of huge pages", &[SHARED; 5]),
    ("dma-heap system", &[SHARED, STAGED, SHARED, SHARED, SHARED]),
    ("DRM vgem", &[SHARED, STAGED, SHARED, SHARED, SHARED]),
    ("V4L2 vivid", &[SHARED; 5]),
    (
        "memfd",
        &[SHARED, SHARED, "no-dma-buf", "no-dma-buf", "no-dma-buf"],
    ),
];

const IOMMU: &[Row] = &[
    (
        "",
        &["CPU", "file", "DRM vgem", "V4L2 vivid", "VFIO edu", ASKED],
    ),
    (
        "peerbuf.ko BAR",
        &[
            STAGED,
            P2P,
            "importer-not-peer",
            "attach-refused",
            "not-pinnable",
            P2P,
        ],
    ),
    (
        "peerbuf.ko BAR, may move",
        &[STAGED, P2P, SHARED, SHARED, "not-pinnable", P2P],
    ),
    (
        "provider's memory",
        &[
            STAGED,
            P2P,
            "importer-not-peer",
            "attach-refused",
            "not-pinnable",
            P2P,
        ],
    ),
    (
        "provider's, may move",
        &[STAGED, P2P, SHARED, SHARED, "not-pinnable", P2P],
    ),
    (
        "vfio-pci BAR",
        &[
            STAGED,
            STAGED,
            "importer-not-peer",
            "attach-refused",
            P2P,
            P2P,
        ],
    ),
    ("udmabuf", &[SHARED; 6]),
    (
        "udmabuf of pieces",
        &[SHARED, STAGED, SHARED, SHARED, "not-pinnable", SHARED],
    ),
    ("udmabuf of huge pages", &[SHARED; 6]),
    (
        "dma-heap system",
        &[SHARED, STAGED, SHARED, SHARED, "not-pinnable", SHARED],
    ),
    (
        "DRM vgem",
        &[SHARED, STAGED, SHARED, SHARED, "not-pinnable", SHARED],
    ),
    ("V4L2 vivid", &[SHARED; 6]),
    (
        "memfd",
        &[
            SHARED,
            SHARED,
            "no-dma-buf",
            "no-dma-buf",
            SHARED,
            "no-dma-buf",
        ],
    ),
];

/// The additional column of kernels with iommufd, which, like that of the probe, only asks.
const IOMMUFD: (&str, &[&str]) = (
    "iommufd",
    &[
        "attach-refused",
        "attach-refused",
        "attach-refused",
        "attach-refused",
        P2P,
        SHARED,
        "attach-refused",
        SHARED,
        "attach-refused",
        "attach-refused",
        "attach-refused",
        SHARED,
    ],
);

/// The expected cells: exporter, importer, and the path or the reason code.
fn expected(rows: &[Row]) -> Vec<(&'static str, &'static str, &'static str)> {
    let mut all = Vec::new();
    let iommufd = std::path::Path::new("/dev/iommu").exists() && topology() == "host-bridge";
    for (n, (exporter, row)) in rows[1..].iter().enumerate() {
        all.extend(rows[0].1.iter().zip(*row).map(|(i, e)| (*exporter, *i, *e)));
        if iommufd {
            all.push((exporter, IOMMUFD.0, IOMMUFD.1[n]));
        }
    }
    all
}

/// The reason why a path is not the best, unless the buffer's own kind is the reason.
fn reason(exporter: &str, importer: &str, path: &str) -> Option<&'static str> {
    match (exporter, importer, path) {
        (_, "CPU", STAGED) => Some("not-a-device"),
        (_, "file", STAGED) => Some("no-struct-pages"),
        _ => None,
    }
}

fn matrix(format: &str) -> String {
    let output = Command::new("peerbuf")
        .args(["matrix", format])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Makes the devices that docs/make-matrix makes.
fn prepare() -> &'static [Row] {
    modules::vgem();
    modules::vivid_node();
    std::fs::write(
        "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        "2",
    )
    .unwrap();
    if topology() != "host-bridge" {
        return SWITCH;
    }
    expect_what_vfio_loses();
    // An earlier test may have made them.
    if let Some(small) = Node::all()
        .last()
        .filter(|node| node.bar2().size == 1 << 20)
    {
        let bdf = small.bdf.clone();
        modules::load("vfio-pci");
        modules::rebind(&bdf, "vfio-pci");
    }
    drop(modules::edu());
    IOMMU
}

#[test]
fn every_pair_brings_checked_bytes_or_the_reason_why_not() {
    let rows = prepare();
    let answer: Value = serde_json::from_str(&matrix("--json")).unwrap();
    let mut cells = answer["cells"].as_array().unwrap().iter();
    for (exporter, importer, expected) in expected(rows) {
        let cell = cells.next().expect("a cell for each pair");
        assert_eq!(cell["exporter"], exporter, "{cell}");
        assert_eq!(cell["importer"], importer, "{cell}");
        if [P2P, SHARED, STAGED].contains(&expected) {
            let asked = [ASKED, IOMMUFD.0].contains(&importer);
            let outcome = if asked { "mapped" } else { "bytes-checked" };
            assert_eq!(cell["outcome"], outcome, "{cell}");
            assert_eq!(cell["path"], expected, "{cell}");
            let reasons = cell["reasons"].as_array().unwrap();
            assert!(!reasons.is_empty() || expected == P2P || asked, "{cell}");
            if let Some(code) = reason(exporter, importer, expected) {
                assert!(
                    reasons.iter().any(|reason| reason["code"] == code),
                    "{cell}"
                );
            }
        } else {
            assert_eq!(cell["outcome"], "impossible", "{cell}");
            assert_eq!(cell["code"], expected, "{cell}");
            assert!(!cell["evidence"].as_str().unwrap().is_empty(), "{cell}");
        }
    }
    assert!(
        cells.next().is_none(),
        "a row that nobody expected: {answer}"
    );
    // Only what the lab's kernel lacks, or has no device for, may be missing. Vulkan has its row and
    // column in tests/vulkan.rs, and GPUs' runtimes, by stand-ins, in tests/gpu.rs.
    let missing = answer["missing"].as_array().unwrap();
    for missing in missing {
        let what = missing["what"].as_str().unwrap();
        let expected = ["iommufd: ", "VFIO: ", "Vulkan: ", "GPU runtimes: "]
            .iter()
            .any(|lacks| what.starts_with(lacks));
        assert!(expected, "{missing}");
    }
}

#[test]
fn the_docs_have_the_matrix_as_it_is() {
    prepare();
    let markdown = matrix("--markdown");
    let table: Vec<&str> = markdown
        .lines()
        .filter(|line| line.starts_with('|'))
        .collect();
    let table = table.join("\n");
    assert!(
        PAGE.contains(&table),
        "docs/matrix.md is not true any more: run docs/make-matrix\n{table}"
    );
}
