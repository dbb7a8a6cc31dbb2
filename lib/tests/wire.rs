//! `docs/wire.md` is true: its bytes are the bytes that the library writes, and a program
//! written from the page alone can talk to the library.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use peerbuf::buffer::Kind;
use peerbuf::export::memfd;
use peerbuf::share::{Channel, Copied, CutOff, Event, Grant, Publisher, Subscriber};

use common::not_run;

/// Time limit for expected events.
const LONG: Duration = Duration::from_secs(20);

fn page() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/wire.md");
    std::fs::read_to_string(path).unwrap()
}

/// Lines of 16 bytes: the offset, the values, and the text. A star stands for lines equal to
/// the previous one. The last line has the length.
fn dump(bytes: &[u8]) -> String {
    let mut dump = String::new();
    let mut before: &[u8] = &[];
    let mut starred = false;
    for (number, line) in bytes.chunks(16).enumerate() {
        if line == before {
            dump += if starred { "" } else { "*\n" };
            starred = true;
            continue;
        }
        (before, starred) = (line, false);
        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let shown = |&byte: &u8| match byte {
            b' '..=b'~' => char::from(byte),
            _ => '.',
        };
        let text: String = line.iter().map(shown).collect();
        dump += &format!("{:04x}  {:<47}  {text}\n", number * 16, hex.join(" "));
    }
    dump + &format!("{:04x}\n", bytes.len())
}

#[test]
#[cfg(target_endian = "little")]
fn the_page_shows_each_message_as_the_library_writes_it() {
    let page = page();
    for (name, bytes) in peerbuf::fuzz::messages() {
        let section = format!("`{name}`:\n\n```text\n{}```\n", dump(&bytes));
        assert!(page.contains(&section), "docs/wire.md lacks\n\n{section}");
    }
}

/// The cells of the table under this heading.
fn table(page: &str, heading: &str) -> Vec<Vec<String>> {
    let (_, below) = page.split_once(heading).unwrap();
    let rows = below
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let cells = |row: &str| {
        row.trim_matches('|')
            .split('|')
            .map(str::trim)
            .map(str::to_owned)
            .collect()
    };
    rows.map(cells).collect()
}

#[test]
fn the_page_says_of_each_kind_of_buffer_what_goes_with_it() {
    let page = page();
    let rows = table(&page, "| kind | memory |");
    for row in &rows {
        let kind = Kind::from_number(row[0].parse().unwrap()).unwrap();
        let allowed: BTreeSet<u32> = (0..4)
            .filter(|which| kind.allows_descriptors(which & 1 != 0, which & 2 != 0))
            .collect();
        let digits = row[2].chars().filter_map(|letter| letter.to_digit(10));
        assert_eq!(digits.collect::<BTreeSet<u32>>(), allowed, "{kind:?}");
        let device = match (kind.allows_device(true), kind.allows_device(false)) {
            (true, true) => "may",
            (true, false) => "must",
            _ => "no",
        };
        let bar = if kind.is_device_memory() { "may" } else { "no" };
        assert_eq!((&*row[3], &*row[4]), (device, bar), "{kind:?}");
    }
    let next = u32::try_from(rows.len()).unwrap() + 1;
    assert_eq!(Kind::from_number(next), None, "a kind that the page lacks");
}

/// `peer.py` in one of its roles, as the peer of a connection.
struct Peer {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Peer {
    /// `None`, with a report, on a machine without Python.
    fn start(test: &str, role: &str) -> Option<(Peer, Channel)> {
        let able = [
            "-c",
            "import os, socket; os.memfd_create; socket.SCM_RIGHTS",
        ];
        match Command::new("python3").args(able).output() {
            Ok(output) if output.status.success() => {}
            other => {
                not_run(
                    test,
                    format!("no python3 with os.memfd_create (3.8): {other:?}"),
                );
                return None;
            }
        }
        let (ours, theirs) = Channel::pair().unwrap();
        let mut child = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peer.py"))
            .arg(role)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Some((Peer { child, said }, ours))
    }

    /// The next line of the peer's output.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The rest of the peer's output after it ended successfully.
    fn rest(mut self) -> String {
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success());
        rest
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_subscriber_in_python_gives_back_what_moves_and_gets_it_again() {
    let name = "a_subscriber_in_python_gives_back_what_moves_and_gets_it_again";
    let Some((mut peer, channel)) = Peer::start(name, "subscribe") else {
        return;
    };
    let policy = |_: &_, name: &str, _: &_| match name {
        "table" => Grant::ReadOnly,
        _ => Grant::ReadWrite,
    };
    let mut publisher = Publisher::new().unwrap().with_policy(policy);
    publisher.add(channel).unwrap();
    let memory = |size| Copied::new(move |_| memfd::export("memory", size)).unwrap();
    let weights = publisher.publish("weights", memory(8192)).unwrap();
    let table = publisher.publish("table", memory(4096)).unwrap();
    publisher
        .buffer(weights)
        .unwrap()
        .whole()
        .write_bytes(&[41])
        .unwrap();

    while publisher.accepted(weights) + publisher.accepted(table) < 2 {
        publisher.serve_for(Duration::from_millis(1)).unwrap();
    }
    assert_eq!(peer.line(), "weights 1 2 8192 41");
    assert_eq!(peer.line(), "table 1 1 4096 0");
    let moved = publisher.migrate(weights, LONG).unwrap();
    assert_eq!((moved.generation, moved.released), (2, 1));
    // The peer wrote the value before it returned the buffer.
    assert_eq!(peer.line(), "weights 2 2 8192 42");
    for moved in publisher.migrate_all(&[weights, table], LONG) {
        assert_eq!(moved.unwrap().released, 1);
    }
    assert_eq!(peer.line(), "weights 3 2 8192 43");
    assert_eq!(peer.line(), "table 2 1 4096 0");
    publisher.withdraw(table, LONG).unwrap();
    publisher.withdraw(weights, LONG).unwrap();
    while let Some(event) = publisher.next_event(Some(Duration::ZERO)).unwrap() {
        assert!(matches!(event, Event::Joined { .. }), "{event:?}");
    }
    drop(publisher);
    assert_eq!(peer.rest(), "gone\n");
}

#[test]
fn a_subscriber_in_python_is_told_why_it_is_cut_off() {
    let name = "a_subscriber_in_python_is_told_why_it_is_cut_off";
    let Some((peer, channel)) = Peer::start(name, "greet twice") else {
        return;
    };
    let mut publisher = Publisher::new().unwrap();
    let id = publisher.add(channel).unwrap();
    loop {
        match publisher.next_event(Some(LONG)).unwrap() {
            Some(Event::Joined { .. }) => {}
            Some(Event::CutOff {
                subscriber, why, ..
            }) => {
                assert!(
                    matches!(why, CutOff::Rubbish(_)) && subscriber == id,
                    "{why}"
                );
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(peer.rest(), "farewell 2\n");
}

#[test]
fn a_publisher_in_python_moves_what_a_subscriber_has_written() {
    let name = "a_publisher_in_python_moves_what_a_subscriber_has_written";
    let Some((peer, channel)) = Peer::start(name, "publish") else {
        return;
    };
    let subscriber = Subscriber::new(channel).unwrap();
    for (generation, found, left) in [(1, b"first", b"again"), (2, b"again", b"third")] {
        let weights = subscriber.buffer_within("weights", LONG).unwrap();
        assert_eq!((weights.generation(), weights.size()), (generation, 4096));
        assert_eq!(weights.range(0, 5).unwrap().to_vec().unwrap(), found);
        weights.range(0, 5).unwrap().write_bytes(left).unwrap();
        weights.wait_until_wanted(LONG).unwrap();
    }
    assert_eq!(peer.rest(), "third\n");
}

#[test]
fn a_buffer_is_handed_over_to_and_by_python() {
    let name = "a_buffer_is_handed_over_to_and_by_python";
    let Some((peer, channel)) = Peer::start(name, "hand over") else {
        return;
    };
    let theirs = channel.receive_buffer_within(LONG).unwrap();
    assert_eq!(theirs.buffer().provenance().kind, Kind::Memfd);
    assert_eq!(
        (theirs.buffer().name(), theirs.len()),
        ("from python", 8192)
    );
    assert_eq!(
        theirs.slice(0, 11).unwrap().to_vec().unwrap(),
        b"from python"
    );
    let ours = memfd::export("from rust", 3 << 12)
        .unwrap()
        .range(5000, 4)
        .unwrap();
    ours.write_bytes(b"here").unwrap();
    channel.send_buffer(&ours).unwrap();
    assert_eq!(peer.rest(), "from rust 1 5000 5004 here\n");
}
