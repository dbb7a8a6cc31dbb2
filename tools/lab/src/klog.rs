//! Finds complaints in a guest's kernel log: messages that no good run has.
//!
//! The input is the output of `/dev/kmsg`, record by record. Judging begins at the record `peerbuf-lab:
//! begin`, which the guest's init writes before it loads peerbuf.ko; messages of the stock kernel during boot
//! do not count.
//!
//! A test that provokes a complaint announces it first, by writing `peerbuf-lab: expect: TEXT` to
//! `/dev/kmsg`. Complaints that contain TEXT are then allowed, with the rest of their report.
//!
//! The results of kmemleak are judged, too, except for leaks during boot. In a guest that runs the suite's
//! programs, the records `peerbuf-lab: program NAME` and `peerbuf-lab: test NAME` (after each test) attribute
//! a complaint.

use std::fmt;

/// Judging begins at this record.
pub const BEGIN: &str = "peerbuf-lab: begin";
const OURS: &str = "peerbuf-lab: ";
const EXPECT: &str = "peerbuf-lab: expect: ";
const ERROR: &str = "peerbuf-lab: ERROR: ";
const PROGRAM: &str = "peerbuf-lab: program ";
const TEST: &str = "peerbuf-lab: test ";
const JIFFIES: &str = "peerbuf-lab: jiffies ";

/// Jiffies per second: CONFIG_HZ of debug-kernel.config.
const HZ: f64 = 250.0;

/// Texts that mark the first line of a report.
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

/// Lines that contain such a text but are harmless.
const HARMLESS: &[&str] = &[
    "lockdep: fixing recursive fault",
    "debug: unmapping init",
    // The leaks themselves are judged.
    "new suspected memory leaks",
];

/// Texts that mark further lines of a report.
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

/// Reports in which every line matters, until [`TRACE_ENDS`] after the back trace. (KASAN's reports have
/// several traces; the first is that of the access.)
const TOLD_WHOLE: &[&str] = &[
    "possible circular locking",
    "possible recursive locking",
    "possible irq lock inversion",
    "inconsistent lock state",
    "suspicious RCU usage",
    "KASAN:",
];
const TRACE_ENDS: &str = "</TASK>";

/// An unannounced report of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// The report's lines; one of the first says what is wrong.
    pub lines: Vec<String>,
    /// The program of the suite that was running, if the log says so.
    pub program: Option<String>,
    /// The test that was running; `None` between tests.
    pub test: Option<String>,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(test) = &self.test {
            writeln!(f, "  during {test}:")?;
        }
        self.lines
            .iter()
            .try_for_each(|line| writeln!(f, "    {line}"))
    }
}

/// The messages in raw `/dev/kmsg` records, each with its time in front.
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

/// The unannounced complaints in `messages` (from [`messages`]).
pub fn complaints(messages: &[String]) -> Vec<Complaint> {
    let mut found: Vec<Complaint> = Vec::new();
    let mut expected: Vec<&str> = Vec::new();
    // Whether to keep the report that is being read; `None` outside a report.
    let mut report: Option<bool> = None;
    let mut whole = false;
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
            // A second such line inside an announced report belongs to that report.
            let inside_announced = report == Some(false) && text_continues(text);
            if keep && !inside_announced {
                match (report, found.last_mut()) {
                    (Some(true), Some(last)) => last.lines.push(line.clone()),
                    _ => {
                        let (program, test) = whose(judged, n);
                        found.push(Complaint {
                            lines: with_lead(judged, n),
                            program,
                            test,
                        });
                    }
                }
                report = Some(true);
            } else {
                report = Some(false);
            }
            whole = TOLD_WHOLE.iter().any(|w| text.contains(w));
        } else if report.is_some() && (text_continues(text) || (whole && !text.starts_with(OURS))) {
            whole &= !text.contains(TRACE_ENDS);
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

/// The leaks in `found`, the contents of `/sys/kernel/debug/kmemleak`, except for announced ones and those
/// from before judging began (according to `messages`).
pub fn leaks(found: &str, messages: &[String]) -> Vec<Complaint> {
    let text = |m: &String| m.split_once("] ").map(|(_, text)| text.to_owned());
    let after = |word: &str| {
        let found = messages
            .iter()
            .rev()
            .find_map(|m| Some((time(m)?, text(m)?.strip_prefix(word)?.trim().to_owned())));
        found.unwrap_or_default()
    };
    let (begin, _) = after(BEGIN);
    let (now, jiffies) = after(JIFFIES);
    let jiffies: f64 = jiffies.parse().unwrap_or_default();
    let expected: Vec<_> = messages
        .iter()
        .filter_map(|m| Some(text(m)?.strip_prefix(EXPECT)?.trim().to_owned()))
        .collect();
    let mut reports: Vec<Vec<String>> = Vec::new();
    for line in found.lines() {
        if line.starts_with("unreferenced ") {
            reports.push(Vec::new());
        }
        if let Some(report) = reports.last_mut() {
            report.push(line.to_owned());
        }
    }
    let mut complaints = Vec::new();
    for lines in reports {
        let born = lines.iter().find_map(|l| {
            let (_, n) = l.split_once(", jiffies ")?;
            n.split_whitespace().next()?.parse::<f64>().ok()
        });
        // A leak without an age counts.
        let born = born.map_or(now, |born| now - (jiffies - born) / HZ);
        let announced = |line: &String| expected.iter().any(|e| line.contains(e));
        if born < begin || lines.iter().any(announced) {
            continue;
        }
        let at = messages
            .iter()
            .position(|m| time(m).is_some_and(|t| t > born))
            .unwrap_or(messages.len());
        let (program, test) = whose(messages, at);
        complaints.push(Complaint {
            lines,
            program,
            test,
        });
    }
    complaints
}

/// The message's time, in seconds since boot.
fn time(message: &str) -> Option<f64> {
    let (time, _) = message.strip_prefix('[')?.split_once(']')?;
    time.trim().parse().ok()
}

/// The program and the test to which the message at index `at` belongs.
fn whose(messages: &[String], at: usize) -> (Option<String>, Option<String>) {
    let named = |message: &String, word: &str| {
        let (_, text) = message.split_once("] ")?;
        let name = text.strip_prefix(word)?.split_whitespace().next()?;
        Some(name.to_owned())
    };
    let (before, after) = messages.split_at(at);
    let program = before.iter().rev().find_map(|m| named(m, PROGRAM));
    let test = after
        .iter()
        .take_while(|m| named(m, PROGRAM).is_none())
        .find_map(|m| named(m, TEST));
    (program, test)
}

/// The first line of a report, preceded by WARN()'s own message, which comes before it, below the cut.
fn with_lead(messages: &[String], at: usize) -> Vec<String> {
    let before = &messages[at.saturating_sub(4)..at];
    let cut = before.iter().rposition(|m| m.contains("[ cut here ]"));
    let lead = cut.map_or(&[][..], |cut| &before[cut + 1..]);
    lead.iter().chain([&messages[at]]).cloned().collect()
}

fn is_complaint(text: &str) -> bool {
    COMPLAINTS.iter().any(|c| text.contains(c)) && !HARMLESS.iter().any(|h| text.contains(h))
}

/// Whether a line continues a report: registers, back traces and the like, marked by name or by the kernel's
/// indentation.
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
    fn a_report_on_locks_is_told_whole() {
        let lines = [
            "WARNING: possible circular locking dependency detected",
            "insmod/77 is trying to acquire lock:",
            "ffffffffc0 (first){+.+.}-{3:3}, at: hello_init+0x10/0x20 [hello]",
            "peerbuf-lab: test a",
            "which lock already depends on the new lock.",
            " <TASK>",
            " </TASK>",
            "fine again",
        ];
        let found = complaints(&log(&lines[..3]));
        assert_eq!(found[0].lines.len(), 3, "{found:?}");
        let with_trace = [&lines[..3], &lines[4..]].concat();
        let found = complaints(&log(&with_trace));
        assert_eq!((found.len(), found[0].lines.len()), (1, 6), "{found:?}");
        // A test's message in between ends the report.
        assert_eq!(complaints(&log(&lines))[0].lines.len(), 3);
    }

    #[test]
    fn each_kind_of_trouble_is_found() {
        for line in [
            "BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "Oops: Oops: 0002 [#1] SMP",
            "WARNING: possible circular locking dependency detected",
            "WARNING: possible recursive locking detected",
            "kmemleak: Cannot allocate a kmemleak_object structure",
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
    fn a_complaint_belongs_to_the_test_that_ends_next_and_to_the_program_that_runs() {
        let lines = [
            "peerbuf-lab: begin",
            "peerbuf-lab: program kmod --test-threads=1",
            "peerbuf-lab: test a",
            "BUG: one",
            "peerbuf-lab: test b",
            "BUG: two",
            "peerbuf-lab: program paths",
            "peerbuf-lab: test c",
        ];
        let found = complaints(&log(&lines));
        let whose: Vec<_> = found
            .iter()
            .map(|c| (c.program.as_deref(), c.test.as_deref()))
            .collect();
        assert_eq!(whose, [(Some("kmod"), Some("b")), (Some("kmod"), None)]);
        assert!(found[0].to_string().starts_with("  during b:\n"));
    }

    const LEAK: &str = "unreferenced object 0xffff88800a (size 32):\n  \
                        comm \"kmod\", pid 77, jiffies 4294892800\n  backtrace (crc 0):\n    \
                        hello_init+0x10/0x20 [hello]\n";

    /// The log of a guest whose tests began at 2 s, and whose jiffies were 4294893296 at 10 s.
    fn log_of_leaky_guest(more: &str) -> Vec<String> {
        let lines = [
            (2_000_000, "peerbuf-lab: begin"),
            (3_000_000, more),
            (7_000_000, "peerbuf-lab: test a"),
            (8_500_000, "peerbuf-lab: test b"),
            (10_000_000, "peerbuf-lab: jiffies 4294893296"),
        ];
        let records = lines.map(|(time, text)| format!("4,1,{time},-;{text}\n"));
        messages(&records.concat())
    }

    #[test]
    fn lost_memory_is_of_the_test_in_whose_time_it_was_taken() {
        // Allocated 496 jiffies before 10 s, at 8.016 s.
        let found = leaks(LEAK, &log_of_leaky_guest("peerbuf-lab: program kmod"));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].program.as_deref(), Some("kmod"));
        assert_eq!(found[0].test.as_deref(), Some("b"));
        assert_eq!(found[0].lines.len(), 4);
        assert_eq!(leaks(&LEAK.repeat(2), &log_of_leaky_guest("")).len(), 2);
    }

    #[test]
    fn what_the_boot_lost_or_a_test_announced_is_no_trouble() {
        let early = LEAK.replace("4294892800", "4294891200");
        assert_eq!(leaks(&early, &log_of_leaky_guest("")), []);
        let announced = log_of_leaky_guest("peerbuf-lab: expect: hello_init");
        assert_eq!(leaks(LEAK, &announced), []);
        assert_eq!(leaks("", &announced), []);
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
