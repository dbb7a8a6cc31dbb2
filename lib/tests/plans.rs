//! A cached joint plan: a lookup allocates nothing, works from any thread, and never returns a
//! stale plan.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use peerbuf::error::ImportError;
use peerbuf::export::memfd;
use peerbuf::import::cpu::Processor;
use peerbuf::joint::{self, JointPlan, KeptPlan, Sink};
use peerbuf::plan::{Plan, forget_proofs};
use peerbuf::{Buffer, BufferRange};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: all calls go to the system's allocator; the count is a plain number of this thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller guarantees a valid `layout`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller guarantees that `at` came from `alloc` with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The CPU, with a generation as its name.
struct Named(u64);

impl Sink for Named {
    fn name(&self) -> String {
        self.0.to_string()
    }

    fn plan(&self, source: &BufferRange) -> Result<Plan, ImportError> {
        Sink::plan(&Processor, source)
    }
}

fn made(buffer: &Buffer, generation: u64) -> Result<JointPlan, ImportError> {
    joint::plan(&buffer.whole(), &[&Named(generation), &Processor])
}

/// Dropped proofs end the plans of the whole process, so one test at a time makes some.
static PROOFS: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    PROOFS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_lookup_takes_no_memory_and_a_plan_of_another_generation_is_not_there() {
    let _alone = alone();
    let buffer = memfd::export("kept", 4096).unwrap();
    let kept = KeptPlan::new();
    assert!(kept.get(0).is_none());
    let plan = kept.get_or_make(1, || made(&buffer, 1)).unwrap();
    let before = ALLOCATIONS.get();
    for _ in 0..1000 {
        assert!(kept.get(1).is_some() && kept.get(0).is_none() && kept.get(2).is_none());
        assert_eq!(
            *kept.get_or_make(1, || panic!("it is there")).unwrap(),
            *plan
        );
    }
    assert_eq!(ALLOCATIONS.get(), before, "a lookup allocates");
    // A plan is stale after its proof was dropped.
    forget_proofs();
    assert!(kept.get(1).is_none());
    // A slow thread does not replace a newer plan by an older one.
    kept.get_or_make(3, || made(&buffer, 3)).unwrap();
    kept.get_or_make(2, || made(&buffer, 2)).unwrap();
    assert!(kept.get(2).is_none());
    assert_eq!(kept.get(3).unwrap().parts[0].sink, "3");
}

#[test]
fn threads_that_look_up_while_the_buffer_moves_never_get_a_stale_plan() {
    let _alone = alone();
    const GENERATIONS: u64 = 500;
    let buffer = memfd::export("moving", 4096).unwrap();
    let (kept, current) = (KeptPlan::new(), AtomicU64::new(1));
    let mut looked_up = 0;
    thread::scope(|scope| {
        let reader = || {
            let mut hits = 0_u64;
            loop {
                let generation = current.load(Ordering::Acquire);
                if let Some(plan) = kept.get(generation) {
                    assert_eq!(plan.parts[0].sink, generation.to_string());
                    hits += 1;
                }
                if generation == GENERATIONS && hits > 0 {
                    return hits;
                }
            }
        };
        let readers = [(); 3].map(|()| scope.spawn(reader));
        for generation in 1..=GENERATIONS {
            current.store(generation, Ordering::Release);
            kept.get_or_make(generation, || made(&buffer, generation))
                .unwrap();
        }
        looked_up = readers
            .into_iter()
            .map(|reader| reader.join().unwrap())
            .sum();
    });
    assert!(looked_up >= 3);
}

/// `cargo test -p peerbuf --test plans -- --ignored --nocapture`
#[test]
#[ignore = "measures"]
fn how_long_a_lookup_takes() {
    const ROUNDS: u32 = 2_000_000;
    let buffer = memfd::export("timed", 4096).unwrap();
    let kept = KeptPlan::new();
    kept.get_or_make(1, || made(&buffer, 1)).unwrap();
    for threads in [1, 2] {
        let mut times = [0.0; 5];
        for time in &mut times {
            let begun = Instant::now();
            thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        for _ in 0..ROUNDS {
                            black_box(kept.get(black_box(1)));
                        }
                    });
                }
            });
            *time = begun.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS);
        }
        times.sort_by(f64::total_cmp);
        println!(
            "{threads} threads: {:.1} ns a lookup (median of 5)",
            times[2]
        );
    }
}
