// SPDX-License-Identifier: GPL-2.0

//! The allocator of one BAR.
//!
//! [`Regions`] keeps the allocated ranges and allocates ranges that do not overlap. It knows neither devices
//! nor locks: the owner serialises access.

use kernel::prelude::*;

/// The user of a range.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// An export.
    Export,
    /// A released export whose pages are still in use by direct I/O that began on its CPU mapping.
    Draining,
}

#[derive(Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    holder: Holder,
}

/// The offset at which an export shall begin.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// The lowest offset with enough room.
    Any,
    /// This offset, in bytes.
    At(u64),
}

/// The allocated ranges of a BAR.
///
/// # Invariants
///
/// `taken` is sorted by `start`. Its ranges are not empty, do not overlap, and end at or below `size`.
pub(crate) struct Regions {
    size: u64,
    taken: KVec<Region>,
}

impl Regions {
    /// A BAR of `size` bytes, all free.
    pub(crate) const fn new(size: u64) -> Self {
        // INVARIANT: `taken` is empty.
        Self {
            size,
            taken: KVec::new(),
        }
    }

    /// The gaps between the ranges in `taken`, in order: the index at which to insert a region, the first
    /// byte, the length.
    fn gaps(&self) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        (0..=self.taken.len()).map(|i| {
            let start = match i.checked_sub(1).and_then(|i| self.taken.get(i)) {
                Some(before) => before.start + before.len,
                None => 0,
            };
            let end = self.taken.get(i).map_or(self.size, |after| after.start);
            (i, start, end - start)
        })
    }

    /// Allocates `len` bytes, not zero, and returns their offset.
    ///
    /// Errors: EINVAL if the range is not in the BAR, EOVERFLOW if its end exceeds 64 bits, EBUSY if part of
    /// it is taken, ENOSPC if no gap is long enough, ENOMEM. On an error nothing has changed.
    pub(crate) fn take(&mut self, place: Place, len: u64) -> Result<u64> {
        let (index, start) = match place {
            Place::Any => {
                if len > self.size {
                    return Err(EINVAL);
                }
                let gap = self.gaps().find(|&(_, _, gap)| gap >= len);
                let (index, start, _) = gap.ok_or(ENOSPC)?;
                (index, start)
            }
            Place::At(start) => {
                let end = start.checked_add(len).ok_or(EOVERFLOW)?;
                if end > self.size {
                    return Err(EINVAL);
                }
                let fits =
                    |&(_, first, gap): &(usize, u64, u64)| first <= start && end <= first + gap;
                let (index, _, _) = self.gaps().find(fits).ok_or(EBUSY)?;
                (index, start)
            }
        };
        let region = Region {
            start,
            len,
            holder: Holder::Export,
        };
        // INVARIANT: The region lies in the gap before `index`, which keeps the order and the disjointness.
        self.taken.reserve(1, GFP_KERNEL)?;
        self.taken
            .insert_within_capacity(index, region)
            .map_err(|_| ENOMEM)?;
        Ok(start)
    }

    /// Frees the ranges that begin in the `len` bytes from `start`. A range for which `in_use(start, len)`
    /// returns true stays taken, as draining.
    pub(crate) fn give_back(&mut self, start: u64, len: u64, in_use: impl Fn(u64, u64) -> bool) {
        self.taken.retain(|r| {
            if !(start..start + len).contains(&r.start) {
                return true;
            }
            r.holder = Holder::Draining;
            in_use(r.start, r.len)
        });
    }

    /// Frees the draining ranges for which `in_use(start, len)` returns false.
    pub(crate) fn reap(&mut self, in_use: impl Fn(u64, u64) -> bool) {
        self.taken
            .retain(|r| r.holder == Holder::Export || in_use(r.start, r.len));
    }

    /// The number of taken ranges.
    pub(crate) fn count(&self) -> u64 {
        self.taken.len() as u64
    }

    /// The number of free bytes.
    pub(crate) fn free(&self) -> u64 {
        self.gaps().map(|(_, _, len)| len).sum()
    }

    /// The length of the longest gap.
    pub(crate) fn largest_free(&self) -> u64 {
        self.gaps().map(|(_, _, len)| len).max().unwrap_or(0)
    }
}
