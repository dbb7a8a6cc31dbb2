// SPDX-License-Identifier: GPL-2.0

//! What can be seen of a buffer from outside: events, counters, and who is attached.

use core::ptr;

use kernel::{
    bindings,
    error::from_err_ptr,
    ffi::*,
    fmt::{self, Write},
    prelude::*,
    seq_file::SeqFile,
    seq_print,
};

use crate::{
    abi,
    buffer::{revoked, Held, State},
    devices,
    exporter::Importer,
};

/// What has happened to a buffer.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) moves: u64,
    pub(crate) invalidations: u64,
    /// Mappings made for importers.
    pub(crate) maps: u64,
    /// Bytes that moves have copied.
    pub(crate) copied: u64,
    longest_wait_ns: u64,
}

impl Counters {
    /// A move or revoke took `ns`.
    pub(crate) fn waited(&mut self, ns: u64) {
        self.longest_wait_ns = self.longest_wait_ns.max(ns);
    }
}

/// The importers that were refused.
#[derive(Default)]
pub(crate) struct Refusal {
    count: u64,
    device: [u8; 32],
    /// `abi::REFUSED_*`.
    reason: u32,
    /// Positive.
    errno: u32,
}

impl Refusal {
    /// `device` was refused for `reason`, an `abi::REFUSED_*`, with `error`.
    pub(crate) fn note(&mut self, device: &CStr, reason: u32, error: Error) {
        *self = Self {
            count: self.count + 1,
            device: name(device),
            reason,
            errno: error.to_errno().unsigned_abs(),
        };
    }
}

/// A device's name, cut short where it has more than 31 bytes.
fn name(device: &CStr) -> [u8; 32] {
    let mut name = [0; 32];
    let bytes = device.to_bytes();
    let len = bytes.len().min(name.len() - 1);
    name[..len].copy_from_slice(&bytes[..len]);
    name
}

/// A wait with a limit, and how long it took.
pub(crate) struct Wait {
    began_ns: u64,
    limit_ms: u32,
}

impl Wait {
    pub(crate) fn begin(limit_ms: u32) -> Self {
        Self {
            began_ns: now_ns(),
            limit_ms,
        }
    }

    /// Since it began.
    pub(crate) fn ns(&self) -> u64 {
        now_ns().saturating_sub(self.began_ns)
    }

    /// Until its limit.
    pub(crate) fn left_ms(&self) -> u32 {
        let gone = self.ns() / 1_000_000;
        u64::from(self.limit_ms).saturating_sub(gone) as u32
    }

    pub(crate) fn left_jiffies(&self) -> usize {
        Self::jiffies(self.left_ms())
    }

    /// `ms` for a kernel function that takes jiffies and knows zero as "do not wait".
    pub(crate) fn jiffies(ms: u32) -> usize {
        // SAFETY: It only computes.
        unsafe { bindings::__msecs_to_jiffies(ms) }
    }
}

fn now_ns() -> u64 {
    // SAFETY: It may be called everywhere.
    unsafe { bindings::ktime_get_mono_fast_ns() }
}

/// An eventfd that is signalled, and the open file of the node by which it was asked for: it ends
/// with that.
struct Watcher {
    ctx: *mut bindings::eventfd_ctx,
    owner: *mut bindings::file,
}

impl Watcher {
    /// Errors: EBADF, EINVAL where `eventfd` is something else.
    fn new(eventfd: i32, owner: *mut bindings::file) -> Result<Self> {
        // SAFETY: It checks what the number stands for.
        let ctx = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(eventfd) })?;
        Ok(Self { ctx, owner })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // SAFETY: `new` has taken the reference.
        unsafe { bindings::eventfd_ctx_put(self.ctx) };
    }
}

/// The watchers of a buffer.
pub(crate) struct Watchers(KVec<Watcher>);

// SAFETY: The pointers are not tied to a thread; `owner` is never followed.
unsafe impl Send for Watchers {}

impl Watchers {
    /// So many that nobody honest is refused, and that the kernel's memory is safe.
    const MOST: usize = 1024;

    pub(crate) const fn new() -> Self {
        Self(KVec::new())
    }

    /// Errors: EBADF, EINVAL (no eventfd), ENOSPC (too many), ENOMEM.
    pub(crate) fn add(&mut self, eventfd: i32, owner: *mut bindings::file) -> Result {
        let watcher = Watcher::new(eventfd, owner)?;
        if self.0.len() >= Self::MOST {
            return Err(ENOSPC);
        }
        Ok(self.0.push(watcher, GFP_KERNEL_ACCOUNT)?)
    }

    /// Errors: EBADF, EINVAL (no eventfd), ENOENT.
    pub(crate) fn remove(&mut self, eventfd: i32, owner: *mut bindings::file) -> Result {
        let wanted = Watcher::new(eventfd, owner)?;
        let same = |has: &Watcher| ptr::eq(has.ctx, wanted.ctx) && ptr::eq(has.owner, wanted.owner);
        let index = self.0.iter().position(same).ok_or(ENOENT)?;
        let _ = self.0.remove(index);
        Ok(())
    }

    /// Ends all that was asked for by an open file, which is being closed.
    pub(crate) fn remove_all(&mut self, owner: *mut bindings::file) {
        self.0.retain(|has| !ptr::eq(has.owner, owner));
    }

    /// Adds 1 to each eventfd.
    pub(crate) fn signal(&self) {
        for watcher in &self.0 {
            // SAFETY: The watcher has a reference. Nothing here waits on an eventfd, which is
            // what the mask would be for.
            unsafe { bindings::eventfd_signal_mask(watcher.ctx, 0) };
        }
    }
}

/// `abi::STATE_*`.
fn state_of(reasons: u32) -> u32 {
    match reasons {
        0 => abi::STATE_LIVE,
        why if why & revoked::GONE != 0 => abi::STATE_GONE,
        _ => abi::STATE_REVOKED,
    }
}

/// Fills in what `abi::BufferQuery` answers, but for the lists.
pub(crate) fn query(locked: &Held<'_>, query: &mut abi::BufferQuery) {
    let (buffer, state): (_, &State) = (locked.buffer(), locked);
    query.state = state_of(locked.buffer().reasons());
    query.placement = state.placement();
    query.bar = buffer.bar as u32;
    query.length = buffer.len;
    query.generation = state.generation;
    query.nr_attachments = locked.attachments().count() as u32;
    query.nr_pieces = state.pieces.len() as u32;
    query.pins = state.pins;
    query.vmaps = u32::from(state.kernel_mapping.is_some());
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

/// One attachment of a buffer whose lock is held.
fn attachment(state: &State, raw: *mut bindings::dma_buf_attachment) -> abi::Attachment {
    // SAFETY: The lock keeps the attachment, and that its device.
    let (importer, device) = unsafe {
        let device: &kernel::device::Device = kernel::device::Device::from_raw((*raw).dev);
        (Importer::of(raw), device)
    };
    let mut out = abi::Attachment {
        device: name(device.name()),
        flags: importer.flags(),
        pinned: importer.pins(),
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
pub(crate) fn pieces(state: &State, most: usize) -> Result<KVec<abi::Piece>> {
    let mut list = KVec::new();
    for piece in state.pieces.iter().take(most) {
        let out = abi::Piece {
            length: piece.len,
            offset: piece.home.unwrap_or(u64::MAX),
            placement: piece.placement(),
            reserved: 0,
        };
        list.push(out, GFP_KERNEL)?;
    }
    Ok(list)
}

/// Writes a buffer as text, as `fdinfo` of a node and debugfs show it.
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
    // SAFETY: The dma-buf is valid, and so is its file's inode.
    let inode = unsafe { (*(*(*locked.dmabuf()).file).f_inode).i_ino };
    to.write_fmt(fmt!(
        "buffer:\t{} bar {} length {} placement {} state {} generation {}\n",
        inode,
        query.bar,
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
        // SAFETY: As in `attachment`.
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

/// A file of procfs as a sink for text.
pub(crate) struct Text<'a>(pub(crate) &'a SeqFile);

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        seq_print!(self.0, "{}", text);
        Ok(())
    }
}

/// What `peerbuf/buffers` in debugfs shows: every device, and its buffers as [`print`] has them.
pub(crate) fn print_all(_: &(), to: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut result = Ok(());
    // Without the lock of the list, for which every unbinding waits: a buffer's may be held for long.
    for device in (0..).map_while(devices::nth) {
        let name = device.name();
        result = result.and_then(|()| to.write_fmt(fmt!("device:\t{}\n", name)));
        device.each_export(|buffer| result = result.and_then(|()| print(buffer, to)));
    }
    result
}
