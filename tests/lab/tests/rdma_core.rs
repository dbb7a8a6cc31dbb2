//! Other projects' bindings on peerbuf's buffers. First, the dma-buf tests of rdma-core's own Python suite:
//! those that pass, and those that cannot run, with the reason; docs/rdma-core-tests.md has the results.
//! Second, a program with the crate sideway, in whose protection domain a buffer is registered. Runs in the
//! guest, on both soft-RoCEs.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use peerbuf::export::{memfd, udmabuf};
use peerbuf_lab_suite::bytes::get;
use peerbuf_lab_suite::node::Node;
use peerbuf_lab_suite::rdma::{card, good, limit, random, takes_dma_bufs};
use peerbuf_rdma::{Address, Rung};

/// The tests in the order in which they run.
const TESTS: [&str; 10] = [
    "DmaBufMRTest.test_dmabuf_dereg_mr",
    "DmaBufMRTest.test_dmabuf_dereg_mr_twice",
    "DmaBufMRTest.test_dmabuf_lkey",
    "DmaBufMRTest.test_dmabuf_read",
    "DmaBufMRTest.test_dmabuf_reg_mr",
    "DmaBufMRTest.test_dmabuf_reg_mr_bad_flags",
    "DmaBufMRTest.test_dmabuf_rkey",
    "DmaBufMRTest.test_dmabuf_write",
    "DmaBufTestCase.test_dmabuf_rc_traffic",
    "DmaBufTestCase.test_dmabuf_rdma_traffic",
];

/// Tests that do not register with the suite's configurable flags.
const OWN_FLAGS: [&str; 3] = [
    "DmaBufMRTest.test_dmabuf_reg_mr_bad_flags",
    "DmaBufTestCase.test_dmabuf_rc_traffic",
    "DmaBufTestCase.test_dmabuf_rdma_traffic",
];

/// `IBV_ACCESS_REMOTE_ATOMIC` (infiniband/verbs.h).
const REMOTE_ATOMIC: u32 = 8;

/// librxe, which lacks `ibv_reg_dmabuf_mr`, or with a library preloaded that has it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Library {
    AsItIs,
    Completed,
}

/// The result of each test: its line, without the name.
type Became = Vec<(String, String)>;

/// The results of all tests on this buffer, with or without atomics.
fn became(buffer: &str, atomics: &str, library: Library) -> Became {
    static AS_IT_IS: OnceLock<BTreeMap<String, Became>> = OnceLock::new();
    static COMPLETED: OnceLock<BTreeMap<String, Became>> = OnceLock::new();
    let bar = format!("/dev/peerbuf/{}", Node::largest().bdf);
    // Loading the suite takes longest, so the first caller runs all cases.
    let all = match library {
        Library::AsItIs => AS_IT_IS.get_or_init(|| run(library, &["udmabuf", "atomics"])),
        Library::Completed => COMPLETED.get_or_init(|| {
            let own = ["udmabuf", "no-atomics", &bar, "no-atomics"];
            run(
                library,
                &[&["gpu", "atomics", "udmabuf", "atomics"][..], &own].concat(),
            )
        }),
    };
    all[&format!("{buffer} {atomics}")].clone()
}

fn run(library: Library, cases: &[&str]) -> BTreeMap<String, Became> {
    let fixtures = "/opt/peerbuf/fixtures";
    let mut command = Command::new("python3");
    command.arg(format!("{fixtures}/rdma_core.py")).args(cases);
    if library == Library::Completed {
        command.env("LD_PRELOAD", format!("{fixtures}/reg_dmabuf_mr.so"));
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let out = String::from_utf8(output.stdout).unwrap();
    let mut all: BTreeMap<String, Became> = BTreeMap::new();
    let mut case = None;
    for line in out.lines() {
        match (line.strip_prefix("== "), line.split_once(": "), &mut case) {
            (Some(name), ..) => case = Some(all.entry(name.to_owned()).or_default()),
            (None, Some((name, what)), Some(case)) => case.push((name.to_owned(), what.to_owned())),
            _ => panic!("{out}{said}"),
        }
    }
    all
}

fn all(what: &str) -> Became {
    TESTS.map(|name| (name.to_owned(), what.to_owned())).into()
}

const NO_GPU: &str = "skipped: Device /dev/dri/renderD128 is not present";
const NO_DRIVER: &str = "skipped: Reg dma-buf MR is not supported by the RDMA driver";

#[test]
fn with_a_graphics_cards_memory_none_runs_since_there_is_none() {
    assert_eq!(became("gpu", "atomics", Library::Completed), all(NO_GPU));
}

#[test]
fn without_the_entry_in_librxe_none_runs() {
    assert_eq!(
        became("udmabuf", "atomics", Library::AsItIs),
        all(NO_DRIVER)
    );
}

#[test]
fn with_it_all_pass_where_the_driver_takes_dma_bufs() {
    let bar = format!("/dev/peerbuf/{}", Node::largest().bdf);
    let expected = all(if takes_dma_bufs() {
        "passed"
    } else {
        NO_DRIVER
    });
    for buffer in ["udmabuf", &bar] {
        assert_eq!(
            became(buffer, "no-atomics", Library::Completed),
            expected,
            "{buffer}"
        );
    }
}

#[test]
fn remote_atomics_are_refused_and_nothing_else() {
    let expected: Became = TESTS
        .map(|name| {
            let what = match OWN_FLAGS.contains(&name) {
                true => "passed",
                false => "failed",
            };
            (name.to_owned(), what.to_owned())
        })
        .into();
    if !takes_dma_bufs() {
        assert_eq!(
            became("udmabuf", "atomics", Library::Completed),
            all(NO_DRIVER)
        );
        return;
    }
    let mut became = became("udmabuf", "atomics", Library::Completed);
    for (name, what) in &mut became {
        let Some((kind, why)) = what.split_once(": ") else {
            continue;
        };
        assert!(
            why.contains("Failed to register a dma-buf MR"),
            "{name}: {why}"
        );
        let flags = why.split("access flags: ").nth(1).unwrap();
        let flags: u32 = flags.split('.').next().unwrap().parse().unwrap();
        assert_ne!(flags & REMOTE_ATOMIC, 0, "{name}: {why}");
        assert!(why.contains("Operation not supported"), "{name}: {why}");
        *what = kind.to_owned();
    }
    assert_eq!(became, expected);
}

/// The program of `lib/examples/stranger`: its own RDMA with sideway, and a dma-buf from this program.
#[test]
fn a_stranger_reads_a_file_into_a_foreign_buffer_and_sends_it_from_his_own_domain() {
    const SIZE: u64 = 256 << 10;
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = (
        directory.path().join("file"),
        directory.path().join("socket"),
    );
    let bytes = random(SIZE - 100, 5);
    std::fs::write(&file, &bytes).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let theirs = udmabuf::export("the stranger's", SIZE).unwrap();
    let dmabuf = theirs.dmabuf().unwrap().as_fd().try_clone_to_owned();
    let stranger = Command::new("/opt/peerbuf/bin/stranger")
        .arg(&file)
        .args(["rxe0"])
        .arg(&socket)
        .stdin(dmabuf.unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();

    let card = card();
    let buffer = memfd::export("received", SIZE).unwrap();
    let region = card.register(&buffer.whole(), None).unwrap();
    let end = card.endpoint(4).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut address = [0; 32];
    stream.read_exact(&mut address).unwrap();
    let ours = end.address().to_bytes();
    let mut here = end
        .connect(&Address::from_bytes(&address).unwrap())
        .unwrap();
    let all = region.slice(0, SIZE).unwrap();
    here.receive(Some(&all)).unwrap();
    stream.write_all(&ours).unwrap();

    assert_eq!(good(here.wait(limit()).unwrap()), SIZE - 100);
    assert!(get(&buffer.range(0, SIZE - 100).unwrap()) == bytes);
    assert!(get(&theirs.range(0, SIZE - 100).unwrap()) == bytes);
    let output = stranger.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    let rung = match takes_dma_bufs() {
        true => Rung::DmaBufByKernel,
        // The memfd behind a foreign udmabuf is unknown.
        false => Rung::Staged,
    };
    let expected = format!("{} bytes, read by staged-copy, sent by {rung}", SIZE - 100);
    assert!(said.contains(&expected), "{said}");
}

/// The same with rdma-mummy-sys instead of sideway: the `ibv_mr` is the library's, and the domain ends up
/// empty.
#[test]
fn a_region_in_a_raw_protection_domain_is_the_librarys_and_goes_with_its_registration() {
    let output = Command::new("/opt/peerbuf/bin/stranger-raw")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let failed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{failed}");
    assert!(said.starts_with("rxe0: lkey 0x"), "{said}");
}
