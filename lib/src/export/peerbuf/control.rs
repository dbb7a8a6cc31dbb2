//! What the owner of an exported buffer may do with it through the device's node: move it, take
//! access away and give it again, watch it, and ask who uses it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bytemuck::Zeroable;
use peerbuf_uapi as abi;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::fs::OFlags;

use super::{Device, RangeRequest, RangesRequest, explain};
use crate::buffer::{Buffer, DmaBuf};
use crate::errno::Errno;
use crate::error::{ControlError, ExportError, SystemError};
use crate::sys;

/// Where a buffer's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// In the device's BAR.
    Device,
    /// In system memory.
    System,
    /// Some ranges here, some there.
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

/// Where a move goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MoveTo {
    /// To the BAR.
    Device,
    /// To system memory.
    System,
}

/// What a move did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Moved {
    /// The generation that the buffer has now; the one it had, if nothing had to move.
    pub generation: u64,
    /// Bytes that were copied.
    pub copied: u64,
}

/// How a revoke ended. From the call on, nobody gets new access.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Revoked {
    /// The generation that the buffer has now.
    pub generation: u64,
    /// Mappings that importers still have.
    pub mappings: u32,
    /// Whether a fence is not signalled.
    pub fences: bool,
    /// Pages that direct I/O still uses.
    pub pages: u64,
    /// The importers that still hold a mapping; empty when nobody does.
    pub holders: Vec<Attachment>,
}

impl Revoked {
    /// Whether nobody can reach the memory any more. If not, the time ran out; revoking again
    /// waits again.
    pub fn is_complete(&self) -> bool {
        self.mappings == 0 && !self.fences && self.pages == 0
    }
}

/// Whether a buffer can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Yes.
    Live,
    /// Access was taken away, and can be given again.
    Revoked,
    /// Its device is gone.
    Gone,
}

/// An importer of a buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attachment {
    /// Its device's name; a PCI address for PCI devices.
    pub device: String,
    /// It takes part in the dynamic rules.
    pub dynamic: bool,
    /// It can be told that its mappings are stale.
    pub revocable: bool,
    /// It can use peer memory.
    pub peer: bool,
    /// It keeps the buffer in system memory.
    pub needs_system: bool,
    /// It has a mapping from before the last move or revoke.
    pub stale: bool,
    /// Its mappings.
    pub mapped: u32,
    /// Its pins.
    pub pinned: u32,
    /// The generation of its oldest mapping.
    pub generation: Option<u64>,
}

/// A run of a buffer's bytes in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Piece {
    /// Bytes.
    pub length: u64,
    /// Its place in the BAR in bytes, kept also while the bytes are elsewhere.
    pub home: Option<u64>,
    /// Where the bytes are.
    pub placement: Placement,
}

/// The importer that was refused last.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// Its device's name.
    pub device: String,
    /// Why, in words.
    pub reason: &'static str,
    /// What it was answered.
    pub errno: Errno,
    /// How many were refused by now.
    pub count: u64,
}

/// Where a buffer is, who uses it, and what has happened to it (`PEERBUF_IOC_BUFFER`).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// Whether it can be used.
    pub state: State,
    /// Where its bytes are.
    pub placement: Placement,
    /// Begins at 1 and rises with each move, revoke and restore.
    pub generation: u64,
    /// Its importers.
    pub attachments: Vec<Attachment>,
    /// Its parts, in order.
    pub pieces: Vec<Piece>,
    /// Pins of all importers.
    pub pins: u32,
    /// The kernel has it mapped.
    pub kernel_mapped: bool,
    /// Pages that processes' mappings or direct I/O use now.
    pub busy_pages: u64,
    /// Moves.
    pub moves: u64,
    /// How often importers were told that their mappings are stale.
    pub invalidations: u64,
    /// Mappings made for importers.
    pub maps: u64,
    /// Bytes copied by moves.
    pub copied: u64,
    /// The longest that a move or revoke took.
    pub longest_wait: Duration,
    /// Who was refused last.
    pub refusal: Option<Refusal>,
}

/// Tells of changes of a buffer: each move, revoke and restore. Readable (`AsFd`, for poll) when
/// there is something to tell. Ends with its [`Device`].
#[derive(Debug)]
pub struct Watch {
    event: OwnedFd,
}

impl Watch {
    /// Waits for a change, at most `limit`. Returns how many there were since the last call; zero
    /// if none came in time.
    ///
    /// # Errors
    /// What `poll` or `read` of the eventfd answered.
    pub fn wait(&self, limit: Duration) -> Result<u64, ControlError> {
        let failed = |call, errno: rustix::io::Errno| ControlError {
            cause: SystemError::new(call, "the eventfd of a watch", errno),
            hint: String::new(),
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

/// The most attachments or pieces that are asked for.
const LIST: usize = 1 << 16;

impl Device {
    /// Exports several ranges as one buffer (`PEERBUF_IOC_EXPORT_RANGES`). The first range's place
    /// is in the buffer's name.
    ///
    /// # Errors
    /// [`ExportError::System`] with the module's answer: as [`Device::export`], `EBUSY` also for
    /// ranges that overlap, `ENOMEM` without enough system memory.
    pub fn export_ranges(&self, request: &RangesRequest) -> Result<Buffer, ExportError> {
        let info = self.query()?;
        let mut ranges: Vec<abi::Range> = request.ranges.iter().map(raw_range).collect();
        let writes = if request.access.writes() {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let flag = |wanted, flag| if wanted { flag } else { 0 };
        let mut argument = abi::ExportRanges {
            flags: flag(request.may_move, abi::EXPORT_MAY_MOVE)
                | flag(request.devices_read, abi::EXPORT_DEVICES_READ),
            bar: request.bar.into(),
            fd_flags: (writes | OFlags::CLOEXEC).bits(),
            ..abi::ExportRanges::zeroed()
        };
        let exported = sys::peerbuf::export_ranges(self.fd.as_fd(), &mut argument, &mut ranges);
        let fd = exported.map_err(|errno| ExportError::System {
            cause: SystemError::new(
                "ioctl(PEERBUF_IOC_EXPORT_RANGES)",
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

    /// Moves a buffer that this device has exported (`PEERBUF_IOC_MOVE`). When it returns, every
    /// byte is in the new place, and importers were told.
    ///
    /// # Errors
    /// The module's answer: `EBUSY` (pinned, mapped by the kernel, an importer needs it where it
    /// is, or fences or direct I/O did not end within `limit`; the error names the importers),
    /// `ENODEV` (revoked, or the device is gone), `ENOMEM`, `EINVAL` (not this device's buffer).
    /// Nothing has moved then.
    pub fn move_buffer(
        &self,
        buffer: &DmaBuf,
        to: MoveTo,
        limit: Duration,
    ) -> Result<Moved, ControlError> {
        self.move_part(buffer, 0..buffer.size(), to, limit)
    }

    /// As [`Device::move_buffer`], for a page-aligned part: `part` in bytes of the buffer.
    ///
    /// # Errors
    /// As [`Device::move_buffer`]; `EINVAL` also for a part that is empty, off a page or not
    /// inside, `EOPNOTSUPP` for a move to the BAR of a range without a place there.
    pub fn move_part(
        &self,
        buffer: &DmaBuf,
        part: std::ops::Range<u64>,
        to: MoveTo,
        limit: Duration,
    ) -> Result<Moved, ControlError> {
        let length = part.end.saturating_sub(part.start);
        if length == 0 {
            // The module takes zero for all that follows.
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
        sys::peerbuf::move_buffer(self.fd.as_fd(), &mut argument)
            .map_err(|errno| self.failed("ioctl(PEERBUF_IOC_MOVE)", buffer, errno))?;
        Ok(Moved {
            generation: argument.generation,
            copied: argument.copied,
        })
    }

    /// Takes access to a buffer away (`PEERBUF_IOC_REVOKE`): processes get `SIGBUS`, importers
    /// `ENODEV`. Waits at most `limit` for those who have access.
    ///
    /// # Errors
    /// The module's answer, such as `EINVAL` for a buffer that is not this device's.
    pub fn revoke(&self, buffer: &DmaBuf, limit: Duration) -> Result<Revoked, ControlError> {
        let mut argument = abi::Revoke {
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
            fences: argument.fences != 0,
            pages: argument.pages,
            holders,
        })
    }

    /// Gives access to a revoked buffer again (`PEERBUF_IOC_RESTORE`). Returns its generation.
    ///
    /// # Errors
    /// The module's answer: `EBUSY` (somebody still has access from before), `EALREADY` (it is not
    /// revoked), `ENODEV` (the device is gone), `EINVAL`.
    pub fn restore(&self, buffer: &DmaBuf) -> Result<u64, ControlError> {
        let mut argument = abi::Restore {
            fd: buffer.as_fd().as_raw_fd(),
            ..abi::Restore::zeroed()
        };
        sys::peerbuf::restore(self.fd.as_fd(), &mut argument)
            .map_err(|errno| self.failed("ioctl(PEERBUF_IOC_RESTORE)", buffer, errno))?;
        Ok(argument.generation)
    }

    /// Watches a buffer (`PEERBUF_IOC_WATCH`).
    ///
    /// # Errors
    /// What `eventfd` or the module answered: `ENOSPC` (too many watchers), `ENODEV` (the device
    /// is gone), `EINVAL`.
    pub fn watch(&self, buffer: &DmaBuf) -> Result<Watch, ControlError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| self.failed("eventfd", buffer, errno.into()))?;
        let mut argument = abi::Watch {
            fd: buffer.as_fd().as_raw_fd(),
            eventfd: event.as_raw_fd(),
            ..abi::Watch::zeroed()
        };
        sys::peerbuf::watch(self.fd.as_fd(), &mut argument)
            .map_err(|errno| self.failed("ioctl(PEERBUF_IOC_WATCH)", buffer, errno))?;
        Ok(Watch { event })
    }

    /// Where a buffer is and who uses it (`PEERBUF_IOC_BUFFER`).
    ///
    /// # Errors
    /// The module's answer, such as `EINVAL` for a buffer that is not this device's.
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
            // Some room for those that come meanwhile.
            attachments.resize(has.0 + 8, abi::Attachment::zeroed());
            pieces.resize(has.1 + 8, abi::Piece::zeroed());
        };
        Ok(Status {
            state: match query.state {
                abi::STATE_LIVE => State::Live,
                abi::STATE_REVOKED => State::Revoked,
                _ => State::Gone,
            },
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

    /// An error with what is known about its reason.
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
        }
    }

    /// Who may be in the way. Told a moment after the fact: the list may have changed.
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

fn milliseconds(limit: Duration) -> u32 {
    // Rounded up, so that a limit above zero is never none.
    u32::try_from(limit.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

fn raw_range(range: &RangeRequest) -> abi::Range {
    match *range {
        RangeRequest::Bar { offset, length } => abi::Range {
            offset: offset.unwrap_or(0),
            length,
            flags: if offset.is_none() {
                abi::RANGE_ANY_OFFSET
            } else {
                0
            },
            reserved: 0,
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
