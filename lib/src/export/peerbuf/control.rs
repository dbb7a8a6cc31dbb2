//! Operations on an exported buffer through the device's node: move, revoke and restore, watch, and query
//! its users.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bytemuck::Zeroable;
use peerbuf_uapi as abi;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::fs::OFlags;

use super::{Device, RangeRequest, RangesRequest, explain};
use crate::buffer::{Buffer, DmaBuf};
use crate::errno::Errno;
use crate::error::{ControlError, ExportError, InTheWay, SystemError};
use crate::sys;

/// The location of a buffer's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// In the device's BAR.
    Device,
    /// In system memory.
    System,
    /// Some ranges in the BAR, others in system memory.
    Mixed,
}

impl Placement {
    fn from_raw(raw: u32) -> Placement {
        match raw {
            abi::PLACEMENT_DEVICE => Placement::Device,
            abi::PLACEMENT_SYSTEM => Placement::System,
            _ => Placement::Mixed,
        }
    }
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Placement::Device => "device",
            Placement::System => "system",
            Placement::Mixed => "mixed",
        })
    }
}

/// The target of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MoveTo {
    /// To the BAR.
    Device,
    /// To system memory.
    System,
}

/// The result of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Moved {
    /// The buffer's generation; unchanged if nothing had to move.
    pub generation: u64,
    /// Number of bytes copied.
    pub copied: u64,
}

/// The result of a revoke. From the call on, nobody gets new access.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Revoked {
    /// The buffer's generation after the revoke.
    pub generation: u64,
    /// Number of mappings that importers still have.
    pub mappings: u64,
    /// Number of fences from before the revoke that have not signalled.
    pub fences: u64,
    /// Number of pages that direct I/O still uses.
    pub pages: u64,
    /// The importers that still hold a mapping; empty if there are none.
    pub holders: Vec<Attachment>,
}

impl Revoked {
    /// True if nobody can reach the memory any more. Otherwise the time limit has passed, and
    /// another revoke waits again.
    pub fn is_complete(&self) -> bool {
        self.mappings == 0 && self.fences == 0 && self.pages == 0
    }
}

/// The state of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// The buffer can be used.
    Live,
    /// Access was temporarily revoked.
    Revoked,
    /// Access was permanently revoked: by the owner, or because the device is gone.
    Gone,
}

/// The reasons for which a buffer is revoked; several may hold at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Reasons {
    /// The owner has revoked the buffer ([`Device::revoke`]).
    pub owner: bool,
    /// The device is being reset.
    pub reset: bool,
    /// The device is gone.
    pub gone: bool,
    /// A PCI error was reported, and the device has not recovered.
    pub error: bool,
    /// The device sleeps.
    pub power: bool,
}

impl Reasons {
    fn from_raw(raw: u32) -> Reasons {
        Reasons {
            owner: raw & abi::REASON_OWNER != 0,
            reset: raw & abi::REASON_RESET != 0,
            gone: raw & abi::REASON_GONE != 0,
            error: raw & abi::REASON_ERROR != 0,
            power: raw & abi::REASON_POWER != 0,
        }
    }
}

/// The events that a [`Watch`] reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Events {
    /// Each move.
    pub moved: bool,
    /// Each revoke.
    pub revoked: bool,
    /// Each restore.
    pub restored: bool,
    /// No holder keeps the buffer from a move to this place any more: the last pin, kernel mapping, and for a move
    /// to the BAR importer that requires system memory and old mapping of the BAR is gone. Reported at once if
    /// there is none when the watch begins. The end of fences and direct I/O is not reported: a move waits for them.
    pub movable: Option<MoveTo>,
}

impl Events {
    /// Each move, revoke and restore.
    pub const CHANGES: Events = Events {
        moved: true,
        revoked: true,
        restored: true,
        movable: None,
    };

    /// Only the end of the last obstacle to a move; see [`Events::movable`].
    pub fn movable(to: MoveTo) -> Events {
        Events {
            movable: Some(to),
            ..Events::default()
        }
    }

    fn raw(self) -> u64 {
        let flag = |wanted, flag| if wanted { flag } else { 0 };
        flag(self.moved, abi::EVENT_MOVED)
            | flag(self.revoked, abi::EVENT_REVOKED)
            | flag(self.restored, abi::EVENT_RESTORED)
            | match self.movable {
                Some(MoveTo::Device) => abi::EVENT_MOVABLE_TO_DEVICE,
                Some(MoveTo::System) => abi::EVENT_MOVABLE_TO_SYSTEM,
                None => 0,
            }
    }
}

impl State {
    fn from_raw(state: u32) -> State {
        match state {
            abi::STATE_LIVE => State::Live,
            abi::STATE_REVOKED => State::Revoked,
            _ => State::Gone,
        }
    }
}

/// An importer of a buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attachment {
    /// The name of the importer's device: a PCI address for PCI devices.
    pub device: String,
    /// The importer is dynamic: it has importer operations (`struct dma_buf_attach_ops`).
    pub dynamic: bool,
    /// The importer can be notified that its mappings are stale.
    pub revocable: bool,
    /// The importer accepts peer-to-peer memory.
    pub peer: bool,
    /// The importer requires the buffer in system memory.
    pub needs_system: bool,
    /// The importer still has a mapping from before the last move or revoke.
    pub stale: bool,
    /// Number of the importer's mappings.
    pub mapped: u64,
    /// Number of the importer's pins.
    pub pinned: u64,
    /// The generation of the importer's oldest mapping.
    pub generation: Option<u64>,
}

/// A contiguous run of a buffer's bytes with one placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Piece {
    /// Length in bytes.
    pub length: u64,
    /// The run's offset in the BAR in bytes, kept while the bytes are elsewhere.
    pub home: Option<u64>,
    /// The location of the bytes.
    pub placement: Placement,
}

/// The last refused importer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The name of the importer's device.
    pub device: String,
    /// The reason, in words.
    pub reason: &'static str,
    /// The error that the importer got.
    pub errno: Errno,
    /// Number of refusals so far.
    pub count: u64,
}

/// A buffer's location, users and history (`PEERBUF_IOC_BUFFER`).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// Whether the buffer can be used.
    pub state: State,
    /// Why not.
    pub reasons: Reasons,
    /// The location of the bytes.
    pub placement: Placement,
    /// The generation: starts at 1 and rises with each move, revoke and restore.
    pub generation: u64,
    /// The buffer's importers.
    pub attachments: Vec<Attachment>,
    /// The buffer's runs, in order.
    pub pieces: Vec<Piece>,
    /// Number of pins of all importers.
    pub pins: u64,
    /// The kernel has a mapping of the buffer.
    pub kernel_mapped: bool,
    /// Number of pages in use by processes' mappings or direct I/O.
    pub busy_pages: u64,
    /// Number of moves.
    pub moves: u64,
    /// Number of times that importers were notified of stale mappings.
    pub invalidations: u64,
    /// Number of mappings made for importers.
    pub maps: u64,
    /// Bytes copied by moves.
    pub copied: u64,
    /// The longest duration of a move or revoke.
    pub longest_wait: Duration,
    /// The last refusal.
    pub refusal: Option<Refusal>,
}

/// Reports [`Events`] of a buffer. The descriptor (`AsFd`, for poll) is readable if an event has not been reported yet.
/// A watch ends with its [`Device`].
#[derive(Debug)]
pub struct Watch {
    event: OwnedFd,
}

impl Watch {
    /// Waits for an event, at most `limit`. Returns the number of events since the last call;
    /// zero if none came in time.
    ///
    /// # Errors
    /// The error of `poll` or `read` on the eventfd.
    pub fn wait(&self, limit: Duration) -> Result<u64, ControlError> {
        let failed = |call, errno: rustix::io::Errno| ControlError {
            cause: SystemError::new(call, "the eventfd of a watch", errno),
            hint: String::new(),
            in_the_way: None,
        };
        let mut poll = [PollFd::new(&self.event, PollFlags::IN)];
        let limit = rustix::event::Timespec::try_from(limit).unwrap_or(rustix::event::Timespec {
            tv_sec: i64::MAX,
            tv_nsec: 0,
        });
        match rustix::event::poll(&mut poll, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed("poll", errno)),
        }
        let mut count = [0; 8];
        match rustix::io::read(&self.event, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(rustix::io::Errno::AGAIN) => Ok(0),
            Err(errno) => Err(failed("read", errno)),
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Maximum number of attachments or pieces that a query asks for.
const LIST: usize = 1 << 16;

impl Device {
    /// Exports several ranges as one buffer (`PEERBUF_IOC_EXPORT`). The buffer's name
    /// contains the offset of the first range.
    ///
    /// # Errors
    /// [`ExportError::System`] with the module's answer: as [`Device::export`], `EBUSY` also
    /// for ranges that overlap, `ENOMEM` without enough system memory.
    pub fn export_ranges(&self, request: &RangesRequest) -> Result<Buffer, ExportError> {
        let info = self.query()?;
        let mut ranges: Vec<abi::Range> = request
            .ranges
            .iter()
            .map(|range| raw_range(range, request.bar))
            .collect();
        let writes = if request.access.writes() {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let flag = |wanted, flag| if wanted { flag } else { 0 };
        let mut argument = abi::Export {
            flags: flag(request.may_move, abi::EXPORT_MAY_MOVE)
                | flag(request.devices_read, abi::EXPORT_DEVICES_READ)
                | flag(request.uncached, abi::EXPORT_UNCACHED),
            fd_flags: (writes | OFlags::CLOEXEC).bits(),
            ..abi::Export::zeroed()
        };
        let exported = sys::peerbuf::export(self.fd.as_fd(), &mut argument, &mut ranges);
        let fd = exported.map_err(|errno| ExportError::System {
            cause: SystemError::new(
                "ioctl(PEERBUF_IOC_EXPORT)",
                format!("{} BAR {}", info.address, request.bar),
                errno,
            ),
            hint: explain(errno, &info, request.bar, &request.ranges),
        })?;
        let first = ranges.first().map_or(0, |range| range.offset);
        let mut name = format!("{} BAR {} at {first:#x}", info.address, request.bar);
        if ranges.len() > 1 {
            name += &format!(", {} ranges", ranges.len());
        }
        self.exported(fd, &info, request.bar, name)
    }

    /// Moves a buffer of this device (`PEERBUF_IOC_MOVE`). On return every byte is in the new
    /// place, and importers were notified.
    ///
    /// # Errors
    /// The module's answer: `EBUSY` (pinned, mapped by the kernel, required in place by an
    /// importer, or fences or direct I/O did not end within `limit`; the error names the
    /// importers), `ENODEV` (revoked, or the device is gone), `ENOMEM`, `EINVAL` (not a buffer
    /// of this device). Nothing has moved on an error.
    pub fn move_buffer(
        &self,
        buffer: &DmaBuf,
        to: MoveTo,
        limit: Duration,
    ) -> Result<Moved, ControlError> {
        self.move_part(buffer, 0..buffer.size(), to, limit)
    }

    /// Like [`Device::move_buffer`], for a page-aligned part of the buffer. `part` is in bytes.
    ///
    /// # Errors
    /// As [`Device::move_buffer`]; `EINVAL` also for a part that is empty, not page-aligned or
    /// outside the buffer, `EOPNOTSUPP` for a move to the BAR of a range without a place in the
    /// BAR.
    pub fn move_part(
        &self,
        buffer: &DmaBuf,
        part: std::ops::Range<u64>,
        to: MoveTo,
        limit: Duration,
    ) -> Result<Moved, ControlError> {
        let length = part.end.saturating_sub(part.start);
        if length == 0 {
            // The module reads a length of zero as the rest of the buffer.
            return Err(self.failed("ioctl(PEERBUF_IOC_MOVE)", buffer, Errno::INVAL));
        }
        let mut argument = abi::Move {
            fd: buffer.as_fd().as_raw_fd(),
            placement: match to {
                MoveTo::Device => abi::PLACEMENT_DEVICE,
                MoveTo::System => abi::PLACEMENT_SYSTEM,
            },
            offset: part.start,
            length,
            timeout_ms: milliseconds(limit),
            ..abi::Move::zeroed()
        };
        sys::peerbuf::move_buffer(self.fd.as_fd(), &mut argument).map_err(|errno| {
            let error = self.failed("ioctl(PEERBUF_IOC_MOVE)", buffer, errno);
            match errno {
                Errno::BUSY => error.with(&argument),
                _ => error,
            }
        })?;
        Ok(Moved {
            generation: argument.generation,
            copied: argument.copied,
        })
    }

    /// Temporarily revokes access to a buffer (`PEERBUF_IOC_REVOKE`): processes get `SIGBUS`,
    /// importers get `ENODEV`. Waits at most `limit` for the holders of access.
    ///
    /// # Errors
    /// The module's answer, such as `EINVAL` for a buffer of another device.
    pub fn revoke(&self, buffer: &DmaBuf, limit: Duration) -> Result<Revoked, ControlError> {
        self.revoke_as(0, buffer, limit)
    }

    /// As [`Device::revoke`], permanently: [`Device::restore`] fails from then on. Also makes a temporary revoke
    /// permanent.
    ///
    /// # Errors
    /// Those of [`Device::revoke`].
    pub fn revoke_permanently(
        &self,
        buffer: &DmaBuf,
        limit: Duration,
    ) -> Result<Revoked, ControlError> {
        self.revoke_as(abi::REVOKE_PERMANENT, buffer, limit)
    }

    fn revoke_as(
        &self,
        flags: u32,
        buffer: &DmaBuf,
        limit: Duration,
    ) -> Result<Revoked, ControlError> {
        let mut argument = abi::Revoke {
            flags,
            fd: buffer.as_fd().as_raw_fd(),
            timeout_ms: milliseconds(limit),
            ..abi::Revoke::zeroed()
        };
        sys::peerbuf::revoke(self.fd.as_fd(), &mut argument)
            .map_err(|errno| self.failed("ioctl(PEERBUF_IOC_REVOKE)", buffer, errno))?;
        let mut holders = Vec::new();
        if argument.holders != 0 {
            holders = self.status(buffer)?.attachments;
            holders.retain(|attachment| attachment.mapped != 0);
        }
        Ok(Revoked {
            generation: argument.generation,
            mappings: argument.holders,
            fences: argument.fences,
            pages: argument.pages,
            holders,
        })
    }

    /// Restores access to a revoked buffer (`PEERBUF_IOC_RESTORE`). Returns the buffer's
    /// generation.
    ///
    /// # Errors
    /// The module's answer: `EBUSY` (a holder still has access from before the revoke),
    /// `EALREADY` (the owner has not revoked the buffer), `ENODEV` (the revoke is permanent, or
    /// the device is gone), `EINVAL`.
    pub fn restore(&self, buffer: &DmaBuf) -> Result<u64, ControlError> {
        let mut argument = abi::Restore {
            fd: buffer.as_fd().as_raw_fd(),
            ..abi::Restore::zeroed()
        };
        sys::peerbuf::restore(self.fd.as_fd(), &mut argument)
            .map_err(|errno| self.failed("ioctl(PEERBUF_IOC_RESTORE)", buffer, errno))?;
        Ok(argument.generation)
    }

    /// Watches a buffer for each move, revoke and restore (`PEERBUF_IOC_WATCH`).
    ///
    /// # Errors
    /// The error of `eventfd` or of the module: `ENOSPC` (too many watchers), `ENODEV` (the device
    /// is gone), `EINVAL`.
    pub fn watch(&self, buffer: &DmaBuf) -> Result<Watch, ControlError> {
        self.watch_for(buffer, Events::CHANGES)
    }

    /// Watches a buffer for these events (`PEERBUF_IOC_WATCH`).
    ///
    /// # Errors
    /// Those of [`Device::watch`]; `EINVAL` also for no event.
    pub fn watch_for(&self, buffer: &DmaBuf, events: Events) -> Result<Watch, ControlError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| self.failed("eventfd", buffer, errno.into()))?;
        let mut argument = abi::Watch {
            fd: buffer.as_fd().as_raw_fd(),
            eventfd: event.as_raw_fd(),
            events: events.raw(),
            ..abi::Watch::zeroed()
        };
        sys::peerbuf::watch(self.fd.as_fd(), &mut argument)
            .map_err(|errno| self.failed("ioctl(PEERBUF_IOC_WATCH)", buffer, errno))?;
        Ok(Watch { event })
    }

    /// Queries a buffer's location, users and history (`PEERBUF_IOC_BUFFER`).
    ///
    /// # Errors
    /// The module's answer, such as `EINVAL` for a buffer of another device.
    pub fn status(&self, buffer: &DmaBuf) -> Result<Status, ControlError> {
        let (mut attachments, mut pieces) = (Vec::new(), Vec::new());
        let query = loop {
            let mut query = abi::BufferQuery {
                fd: buffer.as_fd().as_raw_fd(),
                ..abi::BufferQuery::zeroed()
            };
            sys::peerbuf::buffer(self.fd.as_fd(), &mut query, &mut attachments, &mut pieces)
                .map_err(|errno| self.failed("ioctl(PEERBUF_IOC_BUFFER)", buffer, errno))?;
            let has = (query.nr_attachments as usize, query.nr_pieces as usize);
            if (has.0 <= attachments.len() && has.1 <= pieces.len()) || has.0.max(has.1) > LIST {
                attachments.truncate(has.0);
                pieces.truncate(has.1);
                break query;
            }
            // Extra room for attachments that arrive meanwhile.
            attachments.resize(has.0 + 8, abi::Attachment::zeroed());
            pieces.resize(has.1 + 8, abi::Piece::zeroed());
        };
        Ok(Status {
            state: State::from_raw(query.state),
            reasons: Reasons::from_raw(query.reasons),
            placement: Placement::from_raw(query.placement),
            generation: query.generation,
            attachments: attachments.iter().map(attachment).collect(),
            pieces: pieces.iter().map(piece).collect(),
            pins: query.pins,
            kernel_mapped: query.vmaps != 0,
            busy_pages: query.busy_pages,
            moves: query.moves,
            invalidations: query.invalidations,
            maps: query.maps,
            copied: query.copied,
            longest_wait: Duration::from_nanos(query.longest_wait_ns),
            refusal: (query.refusals != 0).then(|| Refusal {
                device: text(&query.refused_device),
                reason: refusal_reason(query.refused_reason),
                errno: Errno(query.refused_errno as i32),
                count: query.refusals,
            }),
        })
    }

    /// The state, place and generation of a buffer alone: one system call.
    pub(crate) fn glance(
        &self,
        buffer: &DmaBuf,
    ) -> Result<(State, Reasons, Placement, u64), Errno> {
        let mut query = abi::BufferQuery {
            fd: buffer.as_fd().as_raw_fd(),
            ..abi::BufferQuery::zeroed()
        };
        sys::peerbuf::buffer(self.fd.as_fd(), &mut query, &mut [], &mut [])?;
        Ok((
            State::from_raw(query.state),
            Reasons::from_raw(query.reasons),
            Placement::from_raw(query.placement),
            query.generation,
        ))
    }

    /// An error with a hint about its reason.
    fn failed(&self, call: &'static str, buffer: &DmaBuf, errno: Errno) -> ControlError {
        let object = format!("{} through {}", buffer.exporter(), self.path.display());
        let hint = if errno == Errno::BUSY {
            self.who_is_busy(buffer)
        } else if errno == Errno::INVAL {
            ": the buffer is not this device's, or the part is not made of whole pages of it".into()
        } else {
            String::new()
        };
        ControlError {
            cause: SystemError::new(call, object, errno),
            hint,
            in_the_way: None,
        }
    }

    /// Lists the importers that may have blocked the call. The list comes from a later query,
    /// so it may have changed.
    fn who_is_busy(&self, buffer: &DmaBuf) -> String {
        let Ok(status) = self.status(buffer) else {
            return String::new();
        };
        let mut words = Vec::new();
        for importer in &status.attachments {
            let mut does = Vec::new();
            if importer.pinned != 0 {
                does.push("has pinned it");
            }
            if importer.needs_system {
                does.push("needs it in system memory");
            }
            if importer.stale {
                does.push("has not given an old mapping back");
            } else if importer.mapped != 0 {
                does.push("has it mapped");
            }
            if !does.is_empty() {
                words.push(format!("{} {}", importer.device, does.join(" and ")));
            }
        }
        if status.kernel_mapped {
            words.push("the kernel has it mapped".into());
        }
        if status.busy_pages != 0 {
            words.push(format!(
                "direct I/O or mappings use {} of its pages",
                status.busy_pages
            ));
        }
        if words.is_empty() {
            return String::new();
        }
        format!(": {}", words.join("; "))
    }
}

impl ControlError {
    /// Adds what was in the way of a move that failed with `EBUSY`. The names in the hint come from a later query; these
    /// numbers are those of the moment in which the move gave up.
    fn with(mut self, answer: &abi::Move) -> ControlError {
        let count = |count: u64, one: &str, many: &str| match count {
            0 => None,
            1 => Some(format!("1 {one}")),
            more => Some(format!("{more} {many}")),
        };
        let words: Vec<String> = [
            count(answer.holders, "holder", "holders"),
            count(answer.fences, "fence", "fences"),
            count(answer.pages, "page in use", "pages in use"),
            count(answer.pins, "pin", "pins"),
        ]
        .into_iter()
        .flatten()
        .collect();
        let was = match words.is_empty() {
            true => "another move".into(),
            false => words.join(", "),
        };
        self.hint = format!(": in the way: {was}{}", self.hint.replacen(": ", "; ", 1));
        self.in_the_way = Some(InTheWay {
            holders: answer.holders,
            fences: answer.fences,
            pages: answer.pages,
            pins: answer.pins,
        });
        self
    }
}

fn milliseconds(limit: Duration) -> u32 {
    // Rounded up, so that a limit above zero never becomes zero.
    u32::try_from(limit.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

fn raw_range(range: &RangeRequest, bar: u8) -> abi::Range {
    match *range {
        RangeRequest::Bar { offset, length } => abi::Range {
            offset: offset.unwrap_or(0),
            length,
            bar: bar.into(),
            flags: if offset.is_none() {
                abi::RANGE_ANY_OFFSET
            } else {
                0
            },
        },
        RangeRequest::System { length } => abi::Range {
            length,
            flags: abi::RANGE_SYSTEM,
            ..abi::Range::zeroed()
        },
    }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

fn attachment(raw: &abi::Attachment) -> Attachment {
    let has = |flag| raw.flags & flag != 0;
    Attachment {
        device: text(&raw.device),
        dynamic: has(abi::ATTACHMENT_DYNAMIC),
        revocable: has(abi::ATTACHMENT_REVOCABLE),
        peer: has(abi::ATTACHMENT_PEER),
        needs_system: has(abi::ATTACHMENT_NEEDS_SYSTEM),
        stale: has(abi::ATTACHMENT_STALE),
        mapped: raw.mapped,
        pinned: raw.pinned,
        generation: (raw.generation != 0).then_some(raw.generation),
    }
}

fn piece(raw: &abi::Piece) -> Piece {
    Piece {
        length: raw.length,
        home: (raw.offset != u64::MAX).then_some(raw.offset),
        placement: Placement::from_raw(raw.placement),
    }
}

fn refusal_reason(raw: u32) -> &'static str {
    match raw {
        abi::REFUSED_NOT_PEER => "it did not ask for peer memory",
        abi::REFUSED_NOT_REVOCABLE => "it cannot be told that a mapping is stale",
        abi::REFUSED_NO_ROUTE => "the kernel sees no route between the devices",
        abi::REFUSED_MOVE_FAILED => "the buffer could not be moved to system memory for it",
        _ => "for a reason that this version does not know",
    }
}
