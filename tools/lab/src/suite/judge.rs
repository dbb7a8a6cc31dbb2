//! Verdicts: of a test program's output, and of what the guest's kernel complained about.

use super::groups::Work;
use crate::run::Outcome;

/// The result of one run.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed; an aborted run, and a kernel that complained, count as one.
    pub failed: u32,
    /// The report to print.
    pub text: String,
}

/// Parses a test program's output.
pub(super) fn judge(name: &str, output: &str) -> Verdict {
    let mut verdict = Verdict::default();
    let mut complete = false;
    for line in output.lines() {
        if let Some(rest) = line.strip_prefix("test result: ") {
            complete = true;
            verdict.passed += count(rest, " passed");
            verdict.failed += count(rest, " failed");
        } else if let Some(test) = line.strip_prefix("test ")
            && [" ... ok", " ... FAILED"]
                .iter()
                .any(|end| test.ends_with(end))
                | test.contains(" ... ignored")
        {
            verdict.text += &format!("{name}: {test}\n");
        }
    }
    let tests_failed = verdict.failed > 0;
    if !complete {
        verdict.failed += 1;
        verdict.text += &format!("{name}: the run, which broke off ... FAILED\n");
    }
    if tests_failed || !complete {
        verdict.text += &format!("---- output of {name}\n{output}----\n");
    }
    verdict
}

/// The number before `what` in libtest's summary.
fn count(summary: &str, what: &str) -> u32 {
    let before = summary.split(what).next().unwrap_or_default();
    before
        .rsplit(|c: char| !c.is_ascii_digit())
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

/// A failure outside the tests.
pub(super) fn failure(name: &str, what: &str, text: &str) -> Verdict {
    Verdict {
        passed: 0,
        failed: 1,
        text: format!("{text}{name}: {what} ... FAILED\n"),
    }
}

/// The complaints of a guest's kernel, as runs with a failure: one for each run and test.
pub(super) fn complaints(outcome: &Outcome, done: &[Work]) -> Vec<(String, Verdict)> {
    let mut verdicts: Vec<(String, String, String)> = Vec::new();
    for complaint in &outcome.complaints {
        let of = |work: &&Work| {
            work.file.file_name().and_then(|f| f.to_str()) == complaint.program.as_deref()
        };
        let run = done.iter().rev().find(of);
        let run = run.map_or_else(
            || "the guest of ".to_owned() + &done.first().map(|w| w.run.name()).unwrap_or_default(),
            |w| w.run.name(),
        );
        let what = match &complaint.test {
            Some(test) => format!("kernel log during {test}"),
            None => "kernel log".into(),
        };
        let lines = complaint.lines.join("\n    ");
        match verdicts.iter_mut().find(|v| v.0 == run && v.1 == what) {
            Some(verdict) => verdict.2 += &format!("    {lines}\n"),
            None => verdicts.push((run, what, format!("    {lines}\n"))),
        }
    }
    verdicts
        .into_iter()
        .map(|(run, what, text)| {
            let verdict = failure(&run, &what, &format!("peerbuf-lab: the guest's kernel complained, and nobody had announced it:\n{text}"));
            (run, verdict)
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{klog::Complaint, run::Ending, suite::groups::tests::work};

    const GOOD: &str = "running 2 tests\ntest a ... ok\ntest b ... ok\n\n\
                        test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n";

    #[test]
    fn a_good_run_is_one_line_per_test() {
        let verdict = judge("kmod [--icount]", GOOD);
        assert_eq!((verdict.passed, verdict.failed), (2, 0));
        assert_eq!(
            verdict.text,
            "kmod [--icount]: a ... ok\nkmod [--icount]: b ... ok\n"
        );
    }

    #[test]
    fn a_failed_test_brings_its_output() {
        let output = "test a ... ok\ntest b ... FAILED\n\nb panicked: why\n\
                      test result: FAILED. 1 passed; 1 failed; 0 ignored\n";
        let verdict = judge("kmod", output);
        assert_eq!((verdict.passed, verdict.failed), (1, 1));
        assert!(
            verdict.text.contains("kmod: b ... FAILED") && verdict.text.contains("b panicked: why")
        );
    }

    #[test]
    fn a_run_that_broke_off_has_failed() {
        let verdict = judge("kmod", "test a ... ok\nthe guest ended\n");
        assert_eq!((verdict.passed, verdict.failed), (0, 1));
        assert!(verdict.text.contains("the guest ended"));
    }

    pub(in crate::suite) fn complained(complaints: Vec<Complaint>) -> Outcome {
        Outcome {
            ending: Ending::Exit(0),
            complaints,
            console: String::new(),
        }
    }

    #[test]
    fn a_kernels_complaints_are_failures_that_name_the_test() {
        let one = |test: Option<&str>, line: &str| Complaint {
            lines: vec![line.into()],
            program: Some("kmod-1".into()),
            test: test.map(String::from),
        };
        let outcome = complained(vec![
            one(Some("a"), "BUG: x"),
            one(Some("a"), "BUG: y"),
            one(None, "BUG: z"),
        ]);
        let found = complaints(&outcome, &[work("paths", 1), work("kmod", 1)]);
        assert!(found.iter().all(|(run, _)| run == "kmod"));
        let found: Vec<Verdict> = found.into_iter().map(|(_, verdict)| verdict).collect();
        assert_eq!(found.len(), 2);
        assert!(found[0].text.contains("BUG: x\n    BUG: y"));
        assert!(
            found[0]
                .text
                .ends_with("kmod: kernel log during a ... FAILED\n")
        );
        assert!(found[1].text.ends_with("kmod: kernel log ... FAILED\n"));
    }
}
