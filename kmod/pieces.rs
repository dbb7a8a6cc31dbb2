// SPDX-License-Identifier: GPL-2.0

//! Placement of a buffer's bytes: in its BAR or in system memory, with page granularity.

use core::ops::{Deref, DerefMut, Range};

use kernel::{bindings, page::PAGE_SIZE, prelude::*, sync::Arc};

use crate::{abi, system::System};

/// A page-aligned run of a buffer's bytes with one placement.
#[derive(Clone)]
pub(crate) struct Piece {
    /// Its length in bytes.
    pub(crate) len: u64,
    /// Offset in the BAR, in bytes; the range is reserved as long as the buffer lives. `None` for bytes that
    /// are always in system memory.
    pub(crate) home: Option<u64>,
    /// The system pages that hold the bytes; `None` while they are in the BAR. Never `None` if `home` is.
    pub(crate) system: Option<SystemPart>,
}

/// A range of pages of a [`System`].
#[derive(Clone)]
pub(crate) struct SystemPart {
    pub(crate) pages: Arc<System>,
    /// The first page of the part.
    pub(crate) first: usize,
}

impl Piece {
    /// The system pages that hold the bytes; empty if the bytes are in the BAR.
    pub(crate) fn system_pages(&self) -> &[*mut bindings::page] {
        match &self.system {
            Some(part) => &part.pages.pages()[part.first..][..self.len as usize / PAGE_SIZE],
            None => &[],
        }
    }

    /// The placement, an `abi::PLACEMENT_*`.
    pub(crate) fn placement(&self) -> u32 {
        match self.system {
            Some(_) => abi::PLACEMENT_SYSTEM,
            None => abi::PLACEMENT_DEVICE,
        }
    }

    /// Splits the piece at `len` bytes, a multiple of the page size below its length.
    fn split(self, len: u64) -> (Self, Self) {
        let after = Self {
            len: self.len - len,
            home: self.home.map(|home| home + len),
            system: self.system.clone().map(|part| SystemPart {
                first: part.first + len as usize / PAGE_SIZE,
                ..part
            }),
        };
        (Self { len, ..self }, after)
    }
}

/// All pieces of a buffer, in order.
pub(crate) struct Pieces(KVec<Piece>);

impl Pieces {
    pub(crate) fn new(pieces: KVec<Piece>) -> Self {
        Self(pieces)
    }

    /// The buffer's length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|piece| piece.len).sum()
    }

    /// The ranges of the BAR that hold bytes now, in order: offset and length.
    pub(crate) fn at_home(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let at_home = |piece: &Piece| match &piece.system {
            None => piece.home.map(|home| (home, piece.len)),
            Some(_) => None,
        };
        self.0.iter().filter_map(at_home)
    }

    /// The offset in the BAR, if all bytes are there in one contiguous range.
    pub(crate) fn one_run(&self) -> Option<u64> {
        let (mut first, mut next) = (None, None);
        for piece in &self.0 {
            match (piece.home, &piece.system) {
                (Some(home), None) if next.is_none_or(|next| next == home) => {
                    first.get_or_insert(home);
                    next = Some(home + piece.len);
                }
                _ => return None,
            }
        }
        first
    }

    /// The placement of the whole buffer, an `abi::PLACEMENT_*`.
    pub(crate) fn placement(&self) -> u32 {
        let mut placements = self.0.iter().map(Piece::placement);
        let first = placements.next().unwrap_or(abi::PLACEMENT_SYSTEM);
        match placements.all(|placement| placement == first) {
            true => first,
            false => abi::PLACEMENT_MIXED,
        }
    }

    /// The pieces, each with its offset in the buffer.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (u64, &Piece)> {
        self.0.iter().scan(0, |offset, piece| {
            let start = *offset;
            *offset += piece.len;
            Some((start, piece))
        })
    }

    /// The pieces that overlap `part` of the buffer, each with the overlap, relative to the piece's start.
    pub(crate) fn within(
        &self,
        part: &Range<u64>,
    ) -> impl Iterator<Item = (&Piece, Range<u64>)> + '_ {
        let part = part.clone();
        self.placed().filter_map(move |(start, piece)| {
            let from = part.start.max(start);
            let to = part.end.min(start + piece.len);
            (from < to).then(|| (piece, from - start..to - start))
        })
    }

    /// A copy of the list in which no piece crosses a boundary of `part`. ENOMEM.
    pub(crate) fn cut(&self, part: &Range<u64>) -> Result<Self> {
        let mut cut = KVec::with_capacity(self.0.len() + 2, GFP_KERNEL)?;
        for (mut start, piece) in self.placed() {
            let mut piece = piece.clone();
            for bound in [part.start, part.end] {
                if start < bound && bound < start + piece.len {
                    let (before, after) = piece.split(bound - start);
                    start = bound;
                    cut.push(before, GFP_KERNEL)?;
                    piece = after;
                }
            }
            cut.push(piece, GFP_KERNEL)?;
        }
        Ok(Self(cut))
    }

    /// Merges adjacent pieces that are contiguous in the BAR, so that a partial move and back restores the
    /// list.
    pub(crate) fn join(&mut self) {
        let pieces = &mut self.0;
        let mut i = 1;
        while i < pieces.len() {
            let (before, after) = (&pieces[i - 1], &pieces[i]);
            let at_home = before.system.is_none() && after.system.is_none();
            if at_home && before.home.map(|home| home + before.len) == after.home {
                let len = after.len;
                pieces[i - 1].len += len;
                let _ = pieces.remove(i);
            } else {
                i += 1;
            }
        }
    }
}

impl Deref for Pieces {
    type Target = [Piece];

    fn deref(&self) -> &[Piece] {
        &self.0
    }
}

impl DerefMut for Pieces {
    fn deref_mut(&mut self) -> &mut [Piece] {
        &mut self.0
    }
}
