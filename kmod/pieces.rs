// SPDX-License-Identifier: GPL-2.0

//! Where a buffer's bytes are: in its BAR, or in system memory, page by page.

use core::ops::{Deref, DerefMut, Range};

use kernel::{bindings, page::PAGE_SIZE, prelude::*, sync::Arc};

use crate::{abi, system::System};

/// A page-aligned run of a buffer's bytes, in one place.
#[derive(Clone)]
pub(crate) struct Piece {
    /// Its length in bytes.
    pub(crate) len: u64,
    /// Its place in the BAR, in bytes, its own as long as the buffer lives. `None` for memory
    /// that is always system memory.
    pub(crate) home: Option<u64>,
    /// Where the bytes are now, if not at home. Never `None` where `home` is.
    pub(crate) system: Option<SystemPart>,
}

/// Part of some system memory.
#[derive(Clone)]
pub(crate) struct SystemPart {
    pub(crate) pages: Arc<System>,
    /// The first page of the part.
    pub(crate) first: usize,
}

impl Piece {
    /// The pages, where the bytes are in system memory; otherwise none.
    pub(crate) fn system_pages(&self) -> &[*mut bindings::page] {
        match &self.system {
            Some(part) => &part.pages.pages()[part.first..][..self.len as usize / PAGE_SIZE],
            None => &[],
        }
    }

    /// The `PLACEMENT_*` of the interface.
    pub(crate) fn placement(&self) -> u32 {
        match self.system {
            Some(_) => abi::PLACEMENT_SYSTEM,
            None => abi::PLACEMENT_DEVICE,
        }
    }

    /// Two pieces that meet at `len` bytes, a multiple of the page size below this one's length.
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

/// The whole of a buffer, in order.
pub(crate) struct Pieces(KVec<Piece>);

impl Pieces {
    pub(crate) fn new(pieces: KVec<Piece>) -> Self {
        Self(pieces)
    }

    /// The buffer's length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|piece| piece.len).sum()
    }

    /// The places in the BAR of the pieces that are there, in order: offset and length.
    pub(crate) fn at_home(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let at_home = |piece: &Piece| match &piece.system {
            None => piece.home.map(|home| (home, piece.len)),
            Some(_) => None,
        };
        self.0.iter().filter_map(at_home)
    }

    /// Where the buffer begins in the BAR, if it is there in one run.
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

    /// The `PLACEMENT_*` of the whole.
    pub(crate) fn placement(&self) -> u32 {
        let mut placements = self.0.iter().map(Piece::placement);
        let first = placements.next().unwrap_or(abi::PLACEMENT_SYSTEM);
        match placements.all(|placement| placement == first) {
            true => first,
            false => abi::PLACEMENT_MIXED,
        }
    }

    /// The pieces with where each begins in the buffer.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (u64, &Piece)> {
        self.0.iter().scan(0, |offset, piece| {
            let start = *offset;
            *offset += piece.len;
            Some((start, piece))
        })
    }

    /// The pieces that `part` of the buffer touches, each with the common range, from the piece's
    /// beginning.
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

    /// The same, but that `part` of the buffer is cut out of its neighbours: none lies across its bounds.
    /// ENOMEM.
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

    /// Joins neighbours that are one run at home, so that moving parts there and back leaves no trace.
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
