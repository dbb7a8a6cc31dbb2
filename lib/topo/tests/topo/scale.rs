//! A machine of ten thousand functions: answers take no allocation, however many there are.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Write;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use peerbuf_topo::Rules;
use peerbuf_topo::machine::Index;
use peerbuf_topo::rules::{Map, Near};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: Everything is the system's; the count is a plain number of this thread's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: The caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from `alloc` with this layout, by the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// 100 host bridges in domains of their own, each with a root port, a switch of 24 ports and a device of three
/// functions below each: 98 functions and some.
fn large() -> String {
    let mut text = String::new();
    let mut function = |domain: u32, bus: u32, slot: u32, number: u32, class: &str, rest: &str| {
        let _ = writeln!(
            text,
            "{domain:04x}:{bus:02x}:{slot:02x}.{number} Thing [{class}]: It [8086:09a2]\n{rest}"
        );
    };
    let bridge = |kind: &str, from: u32, to: u32| {
        format!(
            "\tControl: I/O+ Mem+\n\tBus: primary=00, secondary={from:02x}, subordinate={to:02x}, sec-latency=0\n\
             \tCapabilities: [40] Express (v2) {kind}, MSI 00\n\t\tACSCtl:\tSrcValid- ReqRedir-\n"
        )
    };
    let endpoint = "\tControl: I/O+ Mem+\n\tCapabilities: [40] Express (v2) Endpoint, MSI 00\n";
    for domain in 0..100 {
        function(domain, 0, 0, 0, "0600", endpoint);
        function(
            domain,
            0,
            1,
            0,
            "0604",
            &bridge("Root Port (Slot+)", 1, 0x40),
        );
        function(domain, 1, 0, 0, "0604", &bridge("Upstream Port", 2, 0x40));
        for slot in 0..24 {
            let bus = 0x10 + slot;
            function(
                domain,
                2,
                slot,
                0,
                "0604",
                &bridge("Downstream Port (Slot+)", bus, bus),
            );
            for number in 0..3 {
                function(domain, bus, 0, number, "0302", endpoint);
            }
        }
    }
    text
}

#[test]
fn ten_thousand_functions_are_read_and_a_million_pairs_answered_without_an_allocation() {
    let machine = peerbuf_topo::read(&large(), Path::new("large")).unwrap();
    assert_eq!(machine.functions.len(), 100 * (3 + 24 * 4));
    assert_eq!(machine.hosts.len(), 100);
    let rules = Rules::new(&machine, None);
    let devices: Vec<Index> = machine
        .devices_that_matter()
        .into_iter()
        .take(1000)
        .collect();
    assert_eq!(devices.len(), 1000);
    let before = ALLOCATIONS.get();
    let (mut near, mut below) = (0_u32, 0_u32);
    for one in &devices {
        for other in &devices {
            let route = rules.route(*one, *other);
            near += u32::from(route.near == Some(Near::Pix));
            below += u32::from(route.possible.known() == Some(Map::BusAddress));
        }
    }
    assert_eq!(ALLOCATIONS.get(), before, "a pair's answer allocates");
    // Below 13 switches of 72 functions and one of 64: itself by itself counts as below, and not as near.
    let pairs = 13 * 72 * 72 + 64 * 64;
    assert_eq!((below, near), (pairs, pairs - 1000));
}

/// `cargo test -p peerbuf-topo --test topo -- --ignored --nocapture`
#[test]
#[ignore = "measures"]
fn how_long_a_large_machine_takes() {
    let text = large();
    let milliseconds = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
    for _ in 0..3 {
        let begun = Instant::now();
        let machine = peerbuf_topo::read(&text, Path::new("large")).unwrap();
        let read = milliseconds(begun);
        let begun = Instant::now();
        let rules = Rules::new(&machine, None);
        let prepared = milliseconds(begun);
        let devices: Vec<Index> = machine.devices_that_matter();
        // One of each seven devices, so that pairs are near and far.
        let some: Vec<Index> = devices.into_iter().step_by(7).take(1000).collect();
        let begun = Instant::now();
        let mut allowed = 0_u32;
        for one in &some {
            for other in &some {
                let route = rules.route(black_box(*one), black_box(*other));
                allowed += u32::from(route.possible.allowed() == Some(true));
            }
        }
        let pairs = milliseconds(begun);
        println!(
            "{} functions: text read in {read:.0} ms, rules prepared in {prepared:.1} ms; all pairs of {} devices in \
             {pairs:.0} ms, {:.0} ns a pair ({allowed} allowed)",
            machine.functions.len(),
            some.len(),
            pairs * 1e6 / (some.len() * some.len()) as f64
        );
    }
}
