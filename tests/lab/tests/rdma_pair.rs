//! Two machines: `cargo lab pair`, and the transfer of a file from one machine's disk to the other's. Runs on
//! the host and calls the lab. One pair of guests makes all transfers, one after the other: a boot takes
//! longer than any of them.

use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

fn pair(options: &[&str], command: &[&str]) -> Output {
    let program = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    Command::new(program)
        .args([&["pair"], options, &["--"], command].concat())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The lines of one guest, without its name.
fn lines<'t>(text: &'t str, end: &str) -> Vec<&'t str> {
    let name = format!("{end}: ");
    text.lines()
        .filter_map(|line| line.strip_prefix(name.as_str()))
        .collect()
}

/// The script of both guests; a line `== NAME` precedes the output of each part.
fn script() -> String {
    let two_machines = "sh /opt/peerbuf/init/two-machines --json";
    let moving = format!("MOVE_EVERY=40 SIZE=1M {two_machines}");
    let parts = [
        ("dmabuf", two_machines),
        ("dmabuf moving", &moving),
        ("cut", CUT),
        ("stock", two_machines),
        ("stock moving", &moving),
    ];
    let mut script = ". /opt/peerbuf/init/functions\n".to_owned();
    for (name, part) in parts {
        if name == "stock" {
            script += "soft_roce stock\n";
        }
        script += &format!("echo '== {name}'\n(\n{part}\n) || exit\n");
    }
    script
}

/// The output of the first and the second guest in one part of the script.
fn part(name: &str) -> [Vec<&'static str>; 2] {
    static OUTPUT: OnceLock<(String, String)> = OnceLock::new();
    let (out, err) = OUTPUT.get_or_init(|| {
        let output = pair(&["--rdma", "dmabuf", "--events"], &["sh", "-c", &script()]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        let status = output.status.code();
        (out, format!("the pair ended with {status:?}\n{err}"))
    });
    let head = format!("== {name}");
    ["first", "second"].map(|end| {
        let lines = lines(out, end);
        let begin = lines.iter().position(|line| *line == head);
        let begin = begin.unwrap_or_else(|| panic!("{end} did not come to {name}: {out}{err}"));
        let part = lines[begin + 1..].iter();
        part.take_while(|line| !line.starts_with("== "))
            .copied()
            .collect()
    })
}

/// The summary of a transfer from one guest's disk to the other's, after a check of the checksums in it and
/// of those that another program computed for the files.
fn from_disk_to_disk(name: &str) -> Value {
    let [first, second] = part(name);
    let [summary, here] = first[..] else {
        panic!("{first:?}");
    };
    let summary: Value = serde_json::from_str(summary).unwrap();
    assert_eq!(summary["bytes"], 8 << 20, "{summary}");
    assert_eq!(summary["verified"], true, "{summary}");
    assert_eq!(second, [here]);
    let sum = summary["sha256"].as_str().unwrap();
    assert!(here.starts_with(sum), "{here}");
    summary
}

fn a_file_goes_from_disk_to_disk(rdma: &str, registration: &str) {
    let summary = from_disk_to_disk(rdma);
    for end in ["here", "there"] {
        assert_eq!(summary[end]["registration"], registration, "{summary}");
        let file = &summary[format!("file_{end}")];
        assert_eq!(file["path"], "peer-to-peer", "{summary}");
        assert_eq!(file["host_bytes"], 0, "{summary}");
        let copied = if registration == "staged" { 8 << 20 } else { 0 };
        assert_eq!(summary[format!("copied_{end}")], copied, "{summary}");
    }
}

#[test]
fn with_the_kernels_soft_roce_the_bytes_are_staged() {
    a_file_goes_from_disk_to_disk("stock", "staged");
}

#[test]
fn with_dma_bufs_they_go_from_bar_to_bar() {
    a_file_goes_from_disk_to_disk("dmabuf", "dma-buf-by-kernel");
}

/// Transfers a file by RDMA from one BAR to the other. The second guest's link is cut in mid-transfer, for
/// two seconds; then, in a second transfer, for longer than a card waits for an answer. After an undisturbed
/// transfer, the first guest's link is cut in mid-transfer, which ends the transfer, and another one follows
/// when the link is up again.
const CUT: &str = r#"
for d in /dev/peerbuf/0*; do
    bar=bar:${d##*/}:2
    [ "$($b stat -c %s "/sys/bus/pci/devices/${d##*/}/resource2")" -ge 67108864 ] && break
done
for d in /sys/class/virtio-ports/*; do
    read -r name <"$d/name"
    [ "$name" = peerbuf.events ] && events=/dev/${d##*/}
done
exec 8<>"$events"
link() {
    echo "t link net0 $1" >&8
    read -r answer <&8
    [ "$answer" = "t ok" ] || echo "link $1: $answer"
}
nic=$(cd /sys/class/net && for n in *; do [ -e "$n/device" ] && echo "$n"; done)
count() { read -r n <"/sys/class/net/$nic/statistics/$1_bytes"; echo "$n"; }
after_2_mib() { # rx|tx
    before=$(count "$1")
    until [ $(($(count "$1") - before)) -gt 2097152 ]; do $b usleep 10000; done
}
file=/mnt/nvme/cut

if [ "$PEERBUF_LAB_END" = second ]; then
    cut() { # SECONDS
        after_2_mib rx
        link down
        $b usleep 500000
        had=$(count rx)
        $b sleep "$1"
        echo "$((had - before < 16777216)) $(($(count rx) - had))"
        link up
    }
    step() { $b nc -l -p 7472 </dev/null; }
    : >$file
    peerbuf rdma serve --listen "$PEERBUF_LAB_ADDRESS:7471" --buffer "$bar" --size 16M --file $file >/dev/null &
    serve=$!
    cut 2
    step
    cut 12
    step
    step
    $b sha256sum <$file
    kill $serve
    exit 0
fi
step() { until echo "$1" | $b nc "$PEERBUF_LAB_PEER" 7472; do $b usleep 200000; done; }
put() { peerbuf rdma put --wait 120 --connect "$PEERBUF_LAB_PEER:7471" --buffer "$bar" --size 16M --json $file 2>/tmp/err; }
file() { $b dd if=/dev/urandom of=$file bs=1M count=16 2>/dev/null; $b sync; }
file
put
step short
file
put
step long
put
file
put &
after_2_mib tx
link down
wait $!
echo $?
$b cat /tmp/err
link up
put
$b sha256sum <$file
step here
"#;

#[test]
fn a_short_cut_of_the_cable_costs_time_and_a_long_one_another_connection() {
    let [first, second] = part("cut");
    let [short, long, after, here, why_here, after_here, sum] = first[..] else {
        panic!("{first:?} {second:?}");
    };
    let arrived = [(short, 0), (long, 1), (after, 0), (after_here, 0)];
    for (summary, further_connections) in arrived {
        let summary: Value = serde_json::from_str(summary).unwrap();
        assert_eq!(summary["bytes"], 16 << 20, "{summary}");
        assert_eq!(summary["verified"], true, "{summary}");
        assert_eq!(summary["here"]["registration"], "dma-buf-by-kernel");
        assert_eq!(summary["retries"], further_connections, "{summary}");
    }
    // Cut before the last byte, and no byte arrived during the cut.
    assert_eq!(second, ["1 0", "short", "1 0", "long", "here", sum]);
    // While the local link is down no other connection can be made.
    assert_eq!(here, "1", "{why_here}");
    let down = ["IBV_WC_WR_FLUSH_ERR", "ENETDOWN"];
    assert!(
        down.iter().any(|what| why_here.contains(what)),
        "{why_here}"
    );
}

#[test]
fn with_both_buffers_moving_at_random_no_byte_is_lost() {
    for rdma in ["stock moving", "dmabuf moving"] {
        let summary = from_disk_to_disk(rdma);
        for end in ["moves_here", "moves_there"] {
            assert!(summary[end].as_u64().unwrap() > 0, "{end}: {summary}");
        }
    }
}

#[test]
fn both_programs_measure_beside_each_other() {
    let program = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    let small = [
        "--rounds",
        "2",
        "--requests",
        "65536,262144",
        "--bytes",
        "1048576",
    ];
    let output = Command::new(program)
        .args([&["bench", "rdma", "--"], &small[..]].concat())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{out}{err}");
    // After the two lines of the table's head.
    let rows: Vec<Vec<&str>> = out
        .lines()
        .skip(2)
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    let named: Vec<_> = rows.iter().map(|row| (row[1], row[2], row[3])).collect();
    let expected = [
        ("65536", "16", "write"),
        ("65536", "16", "read"),
        ("262144", "5", "write"),
        ("262144", "5", "read"),
    ];
    assert_eq!(named, expected, "{out}");
    for row in &rows {
        // The machine is shared, so the test checks only that there is a speed, not its value.
        for figure in &row[4..=5] {
            assert!(figure.parse::<f64>().unwrap() > 0.0, "{out}");
        }
        assert_eq!(row[6].split(' ').count(), 3, "{out}");
    }
}

#[test]
fn the_higher_status_is_the_pairs_and_lines_are_named() {
    let script = "echo a $PEERBUF_LAB_END; [ $PEERBUF_LAB_END = first ] || exit 7";
    let output = pair(&["--bare", "--processors", "1"], &["sh", "-c", script]);
    assert_eq!(output.status.code(), Some(7));
    let mut lines: Vec<&str> = std::str::from_utf8(&output.stdout)
        .unwrap()
        .lines()
        .collect();
    lines.sort_unstable();
    assert_eq!(lines, ["first: a first", "second: a second"]);
}
