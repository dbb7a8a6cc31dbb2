// SPDX-License-Identifier: GPL-2.0

//! Who has which bytes of a BAR.
//!
//! [`Regions`] keeps the taken ranges of one BAR and hands out ranges that no other has. It knows
//! nothing of devices or locks: the owner serialises access.

use kernel::prelude::*;

/// Why a range was given back and cannot be handed out yet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// An export.
    Export,
    /// An export that is gone, but direct I/O started on its CPU mapping still uses the pages.
    Draining,
}

#[derive(Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    holder: Holder,
}

/// Where an export shall begin.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// The lowest offset where it fits.
    Any,
    /// This offset, in bytes.
    At(u64),
}

/// The taken ranges of a BAR.
///
/// # Invariants
///
/// `taken` is sorted by `start`; its ranges are not empty, do not overlap, and end at or below
/// `size`.
pub(crate) struct Regions {
    size: u64,
    taken: KVec<Region>,
}

impl Regions {
    /// A BAR of `size` bytes, all free.
    pub(crate) const fn new(size: u64) -> Self {
        // INVARIANT: There are no ranges.
        Self {
            size,
            taken: KVec::new(),
        }
    }

    /// The gaps between taken ranges, in order: index where a region would be inserted, first
    /// byte, length.
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

    /// Takes `len` bytes, not zero, and returns where they begin.
    ///
    /// Errors: EINVAL where the range does not lie in the BAR, EOVERFLOW where its end is no
    /// 64-bit number, EBUSY where part of it is taken, ENOSPC where nothing is long enough,
    /// ENOMEM. On an error nothing has changed.
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
        // INVARIANT: The region lies in the gap before `index`, so order and disjointness hold.
        self.taken.reserve(1, GFP_KERNEL)?;
        self.taken
            .insert_within_capacity(index, region)
            .map_err(|_| ENOMEM)?;
        Ok(start)
    }

    /// Gives back the exports' ranges that begin in the `len` bytes from `start`; those for which
    /// `in_use(start, len)` says yes stay taken, as draining.
    pub(crate) fn give_back(&mut self, start: u64, len: u64, in_use: impl Fn(u64, u64) -> bool) {
        self.taken.retain(|r| {
            if !(start..start + len).contains(&r.start) {
                return true;
            }
            r.holder = Holder::Draining;
            in_use(r.start, r.len)
        });
    }

    /// Frees the draining ranges for which `in_use(start, len)` says no.
    pub(crate) fn reap(&mut self, in_use: impl Fn(u64, u64) -> bool) {
        self.taken
            .retain(|r| r.holder == Holder::Export || in_use(r.start, r.len));
    }

    /// The number of taken ranges.
    pub(crate) fn count(&self) -> u32 {
        self.taken.len() as u32
    }

    /// Bytes in no range.
    pub(crate) fn free(&self) -> u64 {
        self.gaps().map(|(_, _, len)| len).sum()
    }

    /// The longest run of bytes in no range.
    pub(crate) fn largest_free(&self) -> u64 {
        self.gaps().map(|(_, _, len)| len).max().unwrap_or(0)
    }
}
