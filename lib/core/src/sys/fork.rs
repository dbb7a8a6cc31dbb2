//! Detects that this process is a forked child of the one that made an object.
//!
//! `fork` copies memory but no threads, and code may call it in ways that no handler sees. A page that the
//! kernel clears in the child (`MADV_WIPEONFORK`, since Linux 4.14) distinguishes the two with one load.
//! Without such pages this module compares process IDs.

use std::mem::size_of;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Identifies a process. A forked child is another process, even if it has the same process ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process(u64);

impl Process {
    /// The current process.
    #[inline]
    pub fn current() -> Process {
        let Some(mark) = mark() else {
            return Process(u64::from(std::process::id()));
        };
        let number = mark.load(Ordering::Relaxed);
        if number != 0 {
            return Process(number);
        }
        // The first call in this process. The child inherits the count, so no ancestor has the new number.
        let number = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
        let set = mark.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
        Process(set.map_or_else(|other_thread| other_thread, |_| number))
    }

    /// False in a forked child.
    #[inline]
    pub fn is_current(self) -> bool {
        self == Process::current()
    }
}

static COUNT: AtomicU64 = AtomicU64::new(0);

/// The page: null before the first call, dangling if the kernel has no such pages.
///
/// Not a lock: if another thread of the parent held it during the fork, the child would wait forever.
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());

#[inline]
fn mark() -> Option<&'static AtomicU64> {
    let none = NonNull::dangling().as_ptr();
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        let made = make().map_or(none, NonNull::as_ptr);
        let set = PAGE.compare_exchange(page, made, Ordering::AcqRel, Ordering::Acquire);
        page = set.map_or_else(|other_thread| other_thread, |_| made);
        if page != made && made != none {
            // SAFETY: just mapped, with this length, and no one else has seen it.
            let _ = unsafe { munmap(made.cast(), size_of::<AtomicU64>()) };
        }
    }
    if page == none {
        return None;
    }
    // SAFETY: not null and not dangling, so the page is from `make`: zeroed or written as this type, aligned,
    // and never unmapped once it is in `PAGE`.
    Some(unsafe { &*page })
}

fn make() -> Option<NonNull<AtomicU64>> {
    let length = size_of::<AtomicU64>();
    // SAFETY: a fresh private mapping at an address that the kernel picks.
    let page = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    };
    let page = NonNull::new(page.ok()?)?;
    // SAFETY: just mapped, whole pages of it.
    let advised = unsafe { madvise(page.as_ptr(), length, Advice::LinuxWipeOnFork) };
    if advised.is_err() {
        // SAFETY: just mapped, and no one else has seen it.
        let _ = unsafe { munmap(page.as_ptr(), length) };
        return None;
    }
    Some(page.cast())
}
