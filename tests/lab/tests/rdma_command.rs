//! `peerbuf rdma` between two processes of one guest, and against peers that violate its protocol.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::machine::{expect_what_rxe_says_of_a_killed_program, seconds};
use peerbuf_lab_suite::node::{Node, assert_all_free};
use peerbuf_lab_suite::pci::wait_until;
use rand::Rng;
use rustix::process::{Resource, Rlimit};
use serde_json::Value;

/// The address of the servers in these tests.
const ADDRESS: &str = "127.0.0.1:7471";

struct Server {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Server {
    fn start(arguments: &[&str]) -> Server {
        let mut child = Command::new("peerbuf")
            .args(["rdma", "serve", "--listen", ADDRESS])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        // The server prints a line once it listens.
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        if !line.contains(ADDRESS) {
            let mut why = String::new();
            let _ = child.stderr.take().unwrap().read_to_string(&mut why);
            panic!("{line}{why}");
        }
        Server { child, out }
    }

    /// Waits until the server ends by itself.
    fn end(mut self) -> (bool, String) {
        let status = self.child.wait().unwrap();
        let mut said = String::new();
        let _ = self.out.read_to_string(&mut said);
        let _ = self.child.stderr.take().unwrap().read_to_string(&mut said);
        (status.success(), said)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn client(what: &str, arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new("peerbuf")
        .args(["rdma", what, "--connect", ADDRESS])
        .args(arguments)
        .output()
        .unwrap();
    (
        output.status.success(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn summary(what: &str, arguments: &[&str]) -> Value {
    let (good, out, err) = client(what, &[&["--json"], arguments].concat());
    assert!(good, "{err}");
    serde_json::from_str(&out).unwrap()
}

fn random_file(path: &str, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::rng().fill_bytes(&mut bytes);
    std::fs::write(path, &bytes).unwrap();
    std::fs::File::open(path).unwrap().sync_all().unwrap();
    bytes
}

fn bar() -> String {
    format!("bar:{}:2", Node::largest().bdf)
}

/// The best rung for this kind of buffer in this guest.
fn best(buffer: &str) -> &'static str {
    let dma_bufs = std::env::var("PEERBUF_LAB_RDMA").unwrap() == "dmabuf";
    match (dma_bufs, buffer) {
        (true, _) => "dma-buf-by-kernel",
        (false, "udmabuf") => "shared-memory",
        (false, _) => "staged",
    }
}

#[test]
fn what_is_measured_moves_the_bytes_of_each_kind_of_buffer() {
    let bar = bar();
    for (there, here) in [("udmabuf", bar.as_str()), (bar.as_str(), "udmabuf")] {
        let server = Server::start(&["--once", "--buffer", there, "--size", "256K"]);
        let own = ["--buffer", here, "--size", "128K", "--requests", "3000,64K"];
        let few = ["--bytes", "400000", "--rounds", "2", "--depth", "7"];
        let report = summary("bench", &[&own[..], &few[..]].concat());
        let (good, said) = server.end();
        assert!(good, "{said}");
        assert_eq!(report["verified"], true, "{report}");
        for (end, buffer) in [("here", here), ("there", there)] {
            assert_eq!(report[end]["registration"], best(buffer), "{report}");
        }
        for (row, (bytes, requests)) in [(3000, 134), (65536, 7)].into_iter().enumerate() {
            let row = &report["rows"][row];
            assert_eq!(row["bytes"], bytes, "{report}");
            assert_eq!(row["requests"], requests, "{report}");
            for figure in ["write_mib_per_second", "read_mib_per_second"] {
                assert!(row[figure].as_f64().unwrap() > 0.0, "{report}");
            }
        }
    }

    let server = Server::start(&["--size", "64K"]);
    let (good, _, why) = client("bench", &["--requests", "64K,65K"]);
    assert!(
        !good && why.contains("requests of 65 KiB and buffers of 64 KiB"),
        "{why}"
    );
    // The server serves the next client.
    let report = summary(
        "bench",
        &["--requests", "64K", "--bytes", "1", "--rounds", "1"],
    );
    assert_eq!(report["rows"][0]["requests"], 1, "{report}");
    drop(server);
}

#[test]
fn a_file_goes_from_disk_to_disk_through_both_buffers() {
    let (from, to) = ("/mnt/nvme/rdma-from", "/mnt/nvme/rdma-to");
    let bar = bar();
    for (there, here, size) in [
        ("udmabuf", bar.as_str(), 3 << 20),
        (bar.as_str(), "udmabuf", (1 << 20) + 4097),
        (bar.as_str(), bar.as_str(), 2 << 20),
    ] {
        let bytes = random_file(from, size);
        std::fs::write(to, "").unwrap();
        let server = Server::start(&["--once", "--buffer", there, "--size", "1M", "--file", to]);
        let summary = summary("put", &["--buffer", here, "--size", "2M", from]);
        let (good, said) = server.end();
        assert!(good, "{said}");
        assert!(std::fs::read(to).unwrap() == bytes, "{here} to {there}");
        assert_eq!(summary["bytes"], size, "{summary}");
        assert_eq!(summary["verified"], true, "{summary}");
        for (end, buffer) in [("here", here), ("there", there)] {
            assert_eq!(
                summary[end]["registration"],
                best(buffer),
                "{end}: {summary}"
            );
            let copied = summary[format!("copied_{end}")].as_u64().unwrap();
            let staged = best(buffer) == "staged";
            assert_eq!(
                copied,
                if staged { size as u64 } else { 0 },
                "{end}: {summary}"
            );
        }
        // Peer to peer between the disk and a BAR if the length is whole blocks.
        for (end, buffer) in [("file_here", here), ("file_there", there)] {
            let path = summary[end]["path"].as_str().unwrap();
            let expected = match buffer {
                "udmabuf" => "shared-host-memory",
                _ => "peer-to-peer",
            };
            if size % 4096 == 0 {
                assert_eq!(path, expected, "{end}: {summary}");
            }
        }
    }
}

#[test]
fn a_buffer_is_read_into_a_file() {
    let (held, got) = ("/mnt/nvme/rdma-held", "/mnt/nvme/rdma-got");
    let bytes = random_file(held, 1 << 20);
    for buffer in ["udmabuf", &bar()] {
        let _ = std::fs::remove_file(got);
        let server = Server::start(&["--once", "--buffer", buffer, "--size", "1M", "--file", held]);
        // The transfer takes several rounds.
        let summary = summary("get", &["--buffer", "udmabuf", "--size", "256K", got]);
        assert_eq!(summary["verified"], true, "{summary}");
        assert_eq!(summary["there"]["registration"], best(buffer));
        assert!(server.end().0);
        assert!(std::fs::read(got).unwrap() == bytes, "{buffer}");
        assert!(std::fs::read(held).unwrap() == bytes, "{buffer}");
    }
}

#[test]
fn a_file_arrives_whole_while_both_buffers_move_at_random() {
    let (from, to) = ("/mnt/nvme/rdma-moved-from", "/mnt/nvme/rdma-moved-to");
    let bar = bar();
    let moving = ["--move-every", "40", "--size", "1M"];
    for (there, here) in [(bar.as_str(), bar.as_str()), ("udmabuf", bar.as_str())] {
        let bytes = random_file(from, 8 << 20);
        std::fs::write(to, "").unwrap();
        let of_server = [&["--once", "--buffer", there, "--file", to], &moving[..]].concat();
        let server = Server::start(&of_server);
        let summary = summary("put", &[&["--buffer", here, from], &moving[..]].concat());
        let (good, said) = server.end();
        assert!(good, "{said}");
        assert!(std::fs::read(to).unwrap() == bytes, "{here} to {there}");
        assert_eq!(summary["bytes"], 8 << 20, "{summary}");
        assert_eq!(summary["verified"], true, "{summary}");
        for end in ["moves_here", "moves_there"] {
            assert!(summary[end].as_u64().unwrap() > 0, "{end}: {summary}");
        }
    }
}

/// A message in the protocol's framing.
fn framed(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn begin(address: [u8; 32]) -> Vec<u8> {
    framed(&serde_json::json!({"Begin": {"connect": address}}).to_string())
}

#[test]
fn forged_messages_end_their_own_connection_and_no_other() {
    let server = Server::start(&["--buffer", "udmabuf", "--size", "64K"]);
    // A valid address without a card.
    let mut address = [0; 32];
    address[10..12].fill(0xff);
    address[12..16].copy_from_slice(&[10, 0, 2, 15]);
    address[18] = 7;
    address[24] = 3;
    let right = serde_json::json!({"version": 2, "size": 65536});
    let mut other_version = right.clone();
    other_version["version"] = 3.into();
    let mut more = right.clone();
    more["more"] = 1.into();
    let greeted = |rest: &[u8]| [framed(&right.to_string()).as_slice(), rest].concat();
    let request = |text: &str| greeted(&[begin(address), framed(text)].concat());
    let forged: Vec<(&str, Vec<u8>)> = vec![
        ("a huge length", vec![0xff; 4]),
        ("no JSON", framed("hello")),
        ("a message that is cut off", vec![0, 0, 1, 0, 0x7b]),
        ("another version", framed(&other_version.to_string())),
        ("an unknown field", framed(&more.to_string())),
        ("no address", greeted(&begin([0; 32]))),
        (
            "bytes for no connection",
            greeted(&framed(r#"{"Written":{"at":0,"length":1}}"#)),
        ),
        (
            "a buffer for no connection",
            greeted(&framed(r#"{"Begin":{"connect":null}}"#)),
        ),
        (
            "more bytes than there are",
            request(r#"{"Written":{"at":0,"length":65537}}"#),
        ),
        (
            "a range that wraps",
            request(r#"{"Read":{"at":18446744073709551615,"length":2}}"#),
        ),
        ("an unknown request", request(r#"{"Erase":{}}"#)),
    ];
    for (what, bytes) in &forged {
        let mut stream = TcpStream::connect(ADDRESS).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // The server may answer, and then ends the connection.
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(e) => panic!("{what}: {e}"),
        }
        let text = String::from_utf8_lossy(&rest);
        assert!(!text.contains("Done"), "{what}: {text}");
    }
    // The server still serves others.
    let from = "/mnt/nvme/rdma-after";
    random_file(from, 64 << 10);
    let summary = summary("put", &["--size", "64K", from]);
    assert_eq!(summary["verified"], true);
    drop(server);
    assert!(Path::new(from).exists());
}

/// The number of packets that the card has sent.
fn packets() -> u64 {
    let counters = "/sys/class/infiniband/rxe0/ports/1/hw_counters";
    let count = std::fs::read_to_string(format!("{counters}/sent_pkts")).unwrap();
    count.trim().parse().unwrap()
}

#[test]
fn a_command_that_is_killed_in_mid_transfer_is_noticed_and_others_are_served() {
    expect_what_rxe_says_of_a_killed_program();
    const LENGTH: usize = 16 << 20;
    let (from, bar) = ("/mnt/nvme/rdma-killed", bar());
    random_file(from, LENGTH);
    let serve = || Server::start(&["--buffer", &bar, "--size", "16M"]);
    let mut server = serve();
    // Starts another client, whose transfer has begun when the closure returns.
    let begin = || {
        let before = packets();
        let mut client = Command::new("peerbuf");
        client.args(["rdma", "put", "--connect", ADDRESS, from]);
        client.args(["--buffer", &bar, "--size", "16M"]);
        client.stdout(Stdio::null()).stderr(Stdio::piped());
        let client = client.spawn().unwrap();
        wait_until("packets", || packets() > before + 1000);
        client
    };
    let put = || summary("put", &["--buffer", &bar, "--size", "16M", from]);

    // The writing client is killed: the server reports its end and serves the next client.
    let mut client = begin();
    client.kill().unwrap();
    let killed = client.wait().unwrap();
    assert_eq!(killed.code(), None, "it had ended");
    assert_eq!(put()["verified"], true);

    // The server is killed.
    let client = begin();
    server.child.kill().unwrap();
    let begun = Stopwatch::start();
    let output = client.wait_with_output().unwrap();
    let took = begun.elapsed();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("IBV_WC_RETRY_EXC_ERR"), "{said}");
    assert!(said.contains("the peer does not answer"), "{said}");
    assert!(took < seconds(20), "{took:?}: {said}");
    let said = server.end().1;
    assert!(said.contains("closed the connection"), "{said}");
    let server = serve();
    assert_eq!(put()["verified"], true);
    drop(server);
    assert_all_free(&Node::largest());
}

#[test]
fn a_server_that_runs_out_of_descriptors_serves_again() {
    let mut server = Server::start(&["--buffer", "udmabuf", "--size", "64K"]);
    let pid = rustix::process::Pid::from_child(&server.child);
    let open = |n: &u64| Path::new(&format!("/proc/{}/fd/{n}", server.child.id())).exists();
    let free = (0..).find(|n| !open(n)).unwrap();
    let limit = |current| {
        let before = rustix::process::getrlimit(Resource::Nofile);
        let new = Rlimit { current, ..before };
        rustix::process::prlimit(Some(pid), Resource::Nofile, new).unwrap()
    };
    let before = limit(Some(free)).current;

    // A server that waits in accept has a descriptor for one client already: the next one is refused.
    drop(TcpStream::connect(ADDRESS).unwrap());
    let remarks = BufReader::new(server.child.stderr.take().unwrap()).lines();
    let mut remarks = remarks.map(Result::unwrap);
    let short = remarks.find(|remark| remark.contains("will retry"));
    assert!(short.unwrap().contains("os error 24"));
    limit(before);

    let from = "/mnt/nvme/rdma-short";
    random_file(from, 64 << 10);
    assert_eq!(summary("put", &["--size", "64K", from])["verified"], true);
    assert_eq!(
        server.child.try_wait().unwrap(),
        None,
        "the server has ended"
    );
}

#[test]
fn a_client_that_nobody_answers_says_what_it_tried() {
    let (good, _, err) = client("put", &["--size", "64K", "/etc/passwd"]);
    assert!(!good);
    assert!(err.contains(ADDRESS) && err.contains("refused"), "{err}");
}
