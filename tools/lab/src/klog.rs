//! Reads a guest's kernel log and finds what no good run has in it.
//!
//! Input is what `/dev/kmsg` gives, record by record. The judgement begins at the record
//! `peerbuf-lab: begin`, which the guest's init writes before it loads peerbuf.ko: what the
//! stock kernel says about the emulated machine while it boots is not the tests' business.
//!
//! A test that provokes a complaint announces it first, by writing
//! `peerbuf-lab: expect: TEXT` to `/dev/kmsg`. Complaints that hold TEXT are then allowed, and so
//! is the rest of their report.

use std::fmt;

/// The record from which on the log is judged.
pub const BEGIN: &str = "peerbuf-lab: begin";
const EXPECT: &str = "peerbuf-lab: expect: ";
const ERROR: &str = "peerbuf-lab: ERROR: ";

/// What a line that starts a report has in it.
const COMPLAINTS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "BUG ",
    "kernel BUG at",
    "Oops",
    "general protection fault",
    "Kernel panic",
    "possible circular locking",
    "possible recursive locking",
    "possible irq lock inversion",
    "inconsistent lock state",
    "suspicious RCU usage",
    "INFO: task ",
    "INFO: rcu",
    "rcu: INFO:",
    "INFO: trying to register",
    "soft lockup",
    "hard LOCKUP",
    "refcount_t:",
    "kmemleak:",
    "UBSAN:",
    "KASAN:",
    "KCSAN:",
    "unable to handle",
    "stack-protector",
    "list_add corruption",
    "list_del corruption",
    "Out of memory:",
    "oom-kill:",
    "Bad page state",
    "Bad rss-counter",
    "scheduling while atomic",
    "sleeping function called",
    "rust_kernel: panicked",
    "DEBUG_LOCKS_WARN_ON",
    "ODEBUG:",
    "double free",
    "use-after-free",
    "segfault at",
    ERROR,
];

/// Lines that hold a word of the list and mean no harm.
const HARMLESS: &[&str] = &["lockdep: fixing recursive fault", "debug: unmapping init"];

/// Lines that go on with a report once it has begun.
const CONTINUES: &[&str] = &[
    "Call Trace:",
    "<TASK>",
    "</TASK>",
    "<IRQ>",
    "</IRQ>",
    "RIP:",
    "Code:",
    "RSP:",
    "RAX:",
    "RDX:",
    "RBP:",
    "R10:",
    "R13:",
    "FS:",
    "CS:",
    "CR2:",
    "CR3:",
    "DR0:",
    "DR3:",
    "PKRU:",
    "Modules linked in:",
    "CPU:",
    "Hardware name:",
    "Tainted:",
    "Workqueue:",
    "---[ end trace",
    "---[ cut here",
    "irq event stamp",
    "hardirqs last",
    "softirqs last",
    "------------[ cut here",
    "other info that might help",
    "stack backtrace",
];

/// A report of the kernel that nobody announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// Its lines, the one that says what is wrong among the first.
    pub lines: Vec<String>,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines
            .iter()
            .try_for_each(|line| writeln!(f, "    {line}"))
    }
}

/// The messages in raw `/dev/kmsg` records, with their time in front.
pub fn messages(raw: &str) -> Vec<String> {
    raw.lines()
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| {
            let (head, text) = line.split_once(';')?;
            let micros: u64 = head.split(',').nth(2)?.parse().ok()?;
            Some(format!(
                "[{:5}.{:06}] {text}",
                micros / 1_000_000,
                micros % 1_000_000
            ))
        })
        .collect()
}

/// The complaints in `messages` (as [`messages`] gives them) that were not announced.
pub fn complaints(messages: &[String]) -> Vec<Complaint> {
    let mut found: Vec<Complaint> = Vec::new();
    let mut expected: Vec<&str> = Vec::new();
    // Whether the report being read is one to keep; none while no report is being read.
    let mut report: Option<bool> = None;
    let begin = messages
        .iter()
        .position(|m| m.contains(BEGIN))
        .map_or(0, |n| n + 1);
    let judged = &messages[begin..];
    for (n, line) in judged.iter().enumerate() {
        let text = line
            .split_once("] ")
            .map_or(line.as_str(), |(_, text)| text);
        if let Some(announced) = text.strip_prefix(EXPECT) {
            expected.push(announced.trim());
            report = None;
        } else if is_complaint(text) {
            let keep = !expected.iter().any(|e| text.contains(e));
            // A second such line inside an announced report belongs to it.
            let inside_announced = report == Some(false) && text_continues(text);
            if keep && !inside_announced {
                match (report, found.last_mut()) {
                    (Some(true), Some(last)) => last.lines.push(line.clone()),
                    _ => found.push(Complaint {
                        lines: with_lead(judged, n),
                    }),
                }
                report = Some(true);
            } else {
                report = Some(false);
            }
        } else if report.is_some() && text_continues(text) {
            if let (Some(true), Some(last)) = (report, found.last_mut()) {
                last.lines.push(line.clone());
            }
            if text.contains("---[ end trace") {
                report = None;
            }
        } else {
            report = None;
        }
    }
    found
}

/// The line that starts a report, after what WARN() itself was told to say: that stands before
/// it, below the cut.
fn with_lead(messages: &[String], at: usize) -> Vec<String> {
    let before = &messages[at.saturating_sub(4)..at];
    let cut = before.iter().rposition(|m| m.contains("[ cut here ]"));
    let lead = cut.map_or(&[][..], |cut| &before[cut + 1..]);
    lead.iter().chain([&messages[at]]).cloned().collect()
}

fn is_complaint(text: &str) -> bool {
    COMPLAINTS.iter().any(|c| text.contains(c)) && !HARMLESS.iter().any(|h| text.contains(h))
}

/// Registers, back traces and the like: either named, or indented as the kernel indents them.
fn text_continues(text: &str) -> bool {
    text.starts_with(' ') || text.is_empty() || CONTINUES.iter().any(|c| text.contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: &[&str]) -> Vec<String> {
        let raw: String = lines
            .iter()
            .enumerate()
            .map(|(n, l)| format!("4,{n},{},-;{l}\n", n * 1000))
            .collect();
        messages(&raw)
    }

    const WARN: [&str; 6] = [
        "------------[ cut here ]------------",
        "WARNING: CPU: 1 PID: 77 at kernel/hello.c:12 hello_init+0x10/0x20 [hello]",
        "Modules linked in: hello(OE+)",
        "Call Trace:",
        " <TASK>",
        "---[ end trace 0000000000000000 ]---",
    ];

    #[test]
    fn records_become_lines_with_their_time_and_continuations_are_left_out() {
        let raw =
            "6,1,4111222,-;hello; world\n SUBSYSTEM=pci\n DEVICE=+pci:0000\n4,2,5000001,-;two\n";
        assert_eq!(
            messages(raw),
            ["[    4.111222] hello; world", "[    5.000001] two"]
        );
        assert!(messages("rubbish\n").is_empty());
    }

    #[test]
    fn a_warning_is_found_with_its_trace() {
        let found = complaints(&log(&WARN));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].lines.len(), 5);
        assert!(found[0].lines[0].contains("hello_init"));
    }

    #[test]
    fn what_the_warning_says_is_part_of_it() {
        let mut lines = WARN.to_vec();
        lines.insert(1, "the pages are gone");
        let found = complaints(&log(&lines));
        assert_eq!(found.len(), 1);
        assert!(
            found[0].lines[0].ends_with("the pages are gone")
                && found[0].lines[1].contains("WARNING:")
        );
    }

    #[test]
    fn each_kind_of_trouble_is_found() {
        for line in [
            "BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "Oops: Oops: 0002 [#1] SMP",
            "WARNING: possible circular locking dependency detected",
            "WARNING: possible recursive locking detected",
            "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            "refcount_t: underflow; use-after-free.",
            "INFO: task fio:123 blocked for more than 60 seconds.",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
            "Out of memory: Killed process 99 (a)",
            "peerbuf-lab: ERROR: peerbuf.ko did not load",
        ] {
            assert_eq!(
                complaints(&log(&["fine", line, "fine again"])).len(),
                1,
                "{line}"
            );
        }
    }

    #[test]
    fn ordinary_lines_are_no_trouble() {
        for line in [
            "nvme nvme0: 2/0/0 default/read/poll queues",
            "peerbuf: loading out-of-tree module taints kernel.",
            "peerbuf: module verification failed: signature and/or required key missing - tainting kernel",
            "EXT4-fs (nvme0n1): mounted filesystem r/w with ordered data mode",
            "pci 0000:03:00.0: cannot be used for peer-to-peer DMA",
            "rdma_rxe: loaded",
        ] {
            assert_eq!(complaints(&log(&[line])), [], "{line}");
        }
    }

    #[test]
    fn what_the_boot_says_before_the_marker_does_not_count() {
        let lines = [&WARN[..], &["peerbuf-lab: begin", "fine"]].concat();
        assert_eq!(complaints(&log(&lines)), []);
        let lines = [&["peerbuf-lab: begin"], &WARN[..]].concat();
        assert_eq!(complaints(&log(&lines)).len(), 1);
    }

    #[test]
    fn an_announced_complaint_is_allowed_with_the_rest_of_its_report_and_no_other() {
        let lines = [&["peerbuf-lab: expect: hello.c:12"], &WARN[..]].concat();
        assert_eq!(complaints(&log(&lines)), []);
        let other = [&lines[..], &["BUG: something else"]].concat();
        assert_eq!(complaints(&log(&other)).len(), 1);
        let late = [&WARN[..], &["peerbuf-lab: expect: hello.c:12"]].concat();
        assert_eq!(complaints(&log(&late)).len(), 1);
    }
}
