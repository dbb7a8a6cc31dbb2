// SPDX-License-Identifier: GPL-2.0

//! The state of a buffer as userspace sees it: queries, fdinfo and debugfs.

use kernel::{
    bindings,
    fmt::{self, Write},
    prelude::*,
    seq_file::SeqFile,
    seq_print,
};

use crate::{
    abi,
    buffer::{Buffer, Held, State},
    counters::name,
    devices,
    exporter::Importer,
};

/// The `abi::STATE_*` of a buffer whose lock is held.
fn state_of(buffer: &Buffer) -> u32 {
    match buffer.permanently_revoked() {
        true => abi::STATE_GONE,
        false if buffer.revoked() => abi::STATE_REVOKED,
        false => abi::STATE_LIVE,
    }
}

/// Fills in a `abi::BufferQuery`, except for the lists.
pub(crate) fn query(locked: &Held<'_>, query: &mut abi::BufferQuery) {
    let (buffer, state): (_, &State) = (locked.buffer(), locked);
    query.state = state_of(buffer);
    query.reasons = buffer.reasons() & abi::REASON_FLAGS;
    query.placement = state.pieces.placement();
    query.length = buffer.len;
    query.generation = state.generation;
    query.nr_attachments = locked.attachments().count() as u32;
    query.nr_pieces = state.pieces.len() as u32;
    query.pins = u64::from(state.pins);
    query.vmaps = u64::from(state.kernel_mapping.is_some());
    query.busy_pages = buffer.busy_pages(state, &(0..buffer.len), |_| true) as u64;
    query.moves = state.counters.moves;
    query.invalidations = state.counters.invalidations;
    query.maps = state.counters.maps;
    query.copied = state.counters.copied;
    query.longest_wait_ns = state.counters.longest_wait_ns;
    query.refusals = state.refusal.count;
    query.refused_device = state.refusal.device;
    query.refused_reason = state.refusal.reason;
    query.refused_errno = state.refusal.errno;
}

/// Describes one attachment of a buffer whose lock is held.
fn attachment(state: &State, raw: *mut bindings::dma_buf_attachment) -> abi::Attachment {
    // SAFETY: The lock keeps the attachment, and the attachment its device.
    let (importer, device) = unsafe {
        let device: &kernel::device::Device = kernel::device::Device::from_raw((*raw).dev);
        (Importer::of(raw), device)
    };
    let mut out = abi::Attachment {
        device: name(device.name()),
        flags: importer.flags(),
        pinned: u64::from(importer.pins()),
        ..Default::default()
    };
    for mapping in state
        .mappings
        .iter()
        .filter(|mapping| mapping.attachment == raw)
    {
        out.mapped += 1;
        if out.generation == 0 || mapping.generation < out.generation {
            out.generation = mapping.generation;
        }
        if mapping.generation < state.generation {
            out.flags |= abi::ATTACHMENT_STALE;
        }
    }
    out
}

/// The first `most` attachments. ENOMEM.
pub(crate) fn attachments(locked: &Held<'_>, most: usize) -> Result<KVec<abi::Attachment>> {
    let mut list = KVec::new();
    for raw in locked.attachments().take(most) {
        list.push(attachment(locked, raw), GFP_KERNEL)?;
    }
    Ok(list)
}

/// The first `most` pieces. ENOMEM.
pub(crate) fn pieces(locked: &Held<'_>, most: usize) -> Result<KVec<abi::Piece>> {
    let bar = locked.buffer().bar as u32;
    let mut list = KVec::new();
    for piece in locked.pieces.iter().take(most) {
        let out = abi::Piece {
            length: piece.len,
            offset: piece.home.unwrap_or(u64::MAX),
            bar: piece.home.map_or(u32::MAX, |_| bar),
            placement: piece.placement(),
        };
        list.push(out, GFP_KERNEL)?;
    }
    Ok(list)
}

/// Writes a buffer as text, for the node's `fdinfo` and debugfs.
pub(crate) fn print(locked: &Held<'_>, to: &mut impl Write) -> fmt::Result {
    let mut query = abi::BufferQuery::default();
    self::query(locked, &mut query);
    let placement = match query.placement {
        abi::PLACEMENT_DEVICE => "device",
        abi::PLACEMENT_SYSTEM => "system",
        _ => "mixed",
    };
    let state = match query.state {
        abi::STATE_LIVE => "live",
        abi::STATE_REVOKED => "revoked",
        _ => "gone",
    };
    // SAFETY: The dma-buf, its file and the file's inode are valid.
    let inode = unsafe { (*(*(*locked.dmabuf()).file).f_inode).i_ino };
    to.write_fmt(fmt!(
        "buffer:\t{} bar {} length {} placement {} state {} generation {}\n",
        inode,
        locked.buffer().bar,
        query.length,
        placement,
        state,
        query.generation
    ))?;
    to.write_fmt(fmt!(
        "counters:\tmoves {} invalidations {} maps {} copied {} longest_wait_ns {} pins {} vmaps {} busy_pages {} refusals {}\n",
        query.moves,
        query.invalidations,
        query.maps,
        query.copied,
        query.longest_wait_ns,
        query.pins,
        query.vmaps,
        query.busy_pages,
        query.refusals
    ))?;
    for raw in locked.attachments() {
        let shown = attachment(locked, raw);
        let has = |flag| u32::from(shown.flags & flag != 0);
        // SAFETY: The lock keeps the attachment, and the attachment its device.
        let device: &kernel::device::Device =
            unsafe { kernel::device::Device::from_raw((*raw).dev) };
        to.write_fmt(fmt!(
            "attachment:\t{} dynamic {} revocable {} peer {} needs_system {} mapped {} pinned {} stale {} generation {}\n",
            device.name(),
            has(abi::ATTACHMENT_DYNAMIC),
            has(abi::ATTACHMENT_REVOCABLE),
            has(abi::ATTACHMENT_PEER),
            has(abi::ATTACHMENT_NEEDS_SYSTEM),
            shown.mapped,
            shown.pinned,
            has(abi::ATTACHMENT_STALE),
            shown.generation
        ))?;
    }
    Ok(())
}

/// A seq_file as a `fmt::Write`.
pub(crate) struct Text<'a>(pub(crate) &'a SeqFile);

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        seq_print!(self.0, "{}", text);
        Ok(())
    }
}

/// Prints the contents of `peerbuf/buffers` in debugfs: every device and its buffers.
pub(crate) fn print_all(_: &(), to: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut result = Ok(());
    // Does not hold the list's lock, for which every unbind waits: a buffer's lock may be held for long.
    for device in (0..).map_while(devices::nth) {
        let name = device.name();
        result = result.and_then(|()| to.write_fmt(fmt!("device:\t{}\n", name)));
        device.each_export(|buffer| result = result.and_then(|()| print(buffer, to)));
    }
    result
}
