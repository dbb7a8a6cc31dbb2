//! The fuzzer, for as many calls as fit into a test. Runs in the guest.
//!
//! `cargo lab fuzz --minutes N` runs longer, with other seeds.

use peerbuf_lab_suite::fuzz::{Plan, run};

#[test]
fn two_hundred_thousand_random_calls_do_no_harm() {
    let plan = Plan {
        seed: 20,
        calls: 200_000,
        ..Plan::default()
    };
    let report = run(&plan);
    println!("{report}");
    assert!(report.calls() >= 200_000);
    // Calls that are all refused in their first checks would test only those checks.
    let in_vain = report.in_vain(25);
    assert!(
        in_vain.is_empty(),
        "hardly ever done: {in_vain:?}\n{report}"
    );
}
