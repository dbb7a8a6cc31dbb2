//! Killing either process of the demo at any point leaves nothing behind. Runs in the guest.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::machine::{is_debug_kernel, seconds};
use peerbuf_lab_suite::node::Node;
use rand::RngExt;

/// The number of kills: enough to hit every step. On the debug kernel, where each round takes five times as
/// long, a run hits only some steps.
fn rounds() -> u32 {
    if is_debug_kernel() { 30 } else { 100 }
}

/// Time limit for the remaining process to notice.
fn prompt() -> Duration {
    seconds(10)
}

fn start() -> Child {
    let mut command = Command::new("peerbuf");
    // Small, so that most of the time, and of the kills, is not in random bytes and checksums.
    command.args(["demo", "--dir", "/mnt/nvme", "--size", "1M"]);
    command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The process's only child, once there is one.
fn child_of(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    // The process may have ended by itself, so an error is ignored.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// True if the process runs; false if it is gone or a zombie.
fn runs(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat.rsplit(") ").next().unwrap_or_default();
    !state.starts_with(['Z', 'X'])
}

fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Stopwatch::start();
    while !reached() {
        assert!(
            start.elapsed() < prompt(),
            "not within {:?}: {what}",
            prompt()
        );
        sleep(Duration::from_millis(2));
    }
}

fn everything_is_free() -> bool {
    Node::all().iter().all(|node| {
        let bar = node.bar2();
        (bar.free, bar.exports, bar.largest_free) == (bar.size, 0, bar.size)
    })
}

fn files() -> usize {
    fs::read_dir("/mnt/nvme").unwrap().count()
}

fn free_blocks() -> u64 {
    // A deleted file's blocks are free only after a commit of the journal.
    let directory = fs::File::open("/mnt/nvme").unwrap();
    rustix::fs::syncfs(&directory).unwrap();
    rustix::fs::fstatvfs(&directory).unwrap().f_bfree
}

#[test]
fn a_kill_at_any_point_leaves_no_allocation_no_process_and_no_file() {
    let begin = Instant::now();
    let output = start().wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let whole = begin.elapsed();
    assert!(everything_is_free());
    let (files_before, blocks_before) = (files(), free_blocks());

    let mut random = rand::rng();
    let (mut first_killed, mut second_killed, mut finished) = (0, 0, 0);
    for round in 0..rounds() {
        let mut first = start();
        let delay = whole.mul_f64(random.random_range(0.0..1.0));
        sleep(delay);
        let second = child_of(first.id());
        let kill_second = random.random() && second.is_some();
        kill(if kill_second {
            second.unwrap()
        } else {
            first.id()
        });

        let at = format!("round {round}, {delay:?} of {whole:?}, second: {kill_second}");
        let mut status = None;
        wait_until(&format!("the first process ends ({at})"), || {
            status = first.try_wait().unwrap();
            status.is_some()
        });
        if let Some(second) = second {
            wait_until(&format!("the second process ends ({at})"), || !runs(second));
        }
        wait_until(&format!("the BARs are free ({at})"), everything_is_free);
        assert_eq!(files(), files_before, "{at}");

        let status = status.unwrap();
        let output = first.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        match (kill_second, status.code()) {
            (_, Some(0)) => finished += 1,
            (true, code) => {
                assert_eq!(code, Some(1), "{at}: {said}");
                assert!(
                    said.contains("the second process was killed by signal 9"),
                    "{at}: {said}"
                );
                second_killed += 1;
            }
            (false, _) => first_killed += 1,
        }
    }
    println!("killed first: {first_killed}, second: {second_killed}, too late: {finished}");
    let enough = rounds() / 10;
    assert!(
        first_killed > enough && second_killed > enough,
        "the kills missed"
    );
    assert_eq!(free_blocks(), blocks_before);
}
