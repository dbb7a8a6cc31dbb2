//! The engine: it cuts a transfer into requests, and keeps as many in flight as the queue is deep.
//!
//! A transfer is a list of [`Piece`]s, each at one place of the file and one of the mapping. There are three
//! kinds of parts of a piece:
//!
//! - *direct*: whole blocks of the file whose place in memory is aligned, too. The disk's own engine moves them.
//! - *staged*: whole blocks, by way of memory of this process. The processor copies one while the disk is at
//!   work on others.
//! - *edges*, only when writing: less than a block, through the page cache, since the rest of the block has to
//!   stay. They come last: the page of an edge has blocks that direct writes are changing, and the page cache
//!   would write the old ones back over them. When reading, an edge is read with the block around it.
//!
//! Requests are answered in any order, so what has arrived is counted by request, and what is not known to have
//! arrived is known by place: the first such byte is where a transfer that failed is taken up again.
//!
//! A buffer may move while a transfer is under way. Then direct requests reach its new place, on a path that nobody
//! has chosen or proved. So what they carry is believed only when the buffer is seen to be where it was: now and
//! then, and at the end. If it is not, nothing more is begun, and [`Done::Moved`] says that a path has to be chosen
//! anew, on which those bytes are carried again. The processor's copies are right wherever the buffer is.

use std::sync::OnceLock;

use super::file::{Direct, Endpoint};
use super::{Merged, Piece, Queue, Watch};
use crate::buffer::{Access, BufferRange, CpuAccess, LazyMapping};
use crate::errno::Errno;
use crate::error::{BufferError, SystemError, TransferError};
use crate::path::Direction;
use crate::sys::direct::{DirectIo, Request, Work};
use crate::sys::memory::{HostMemory, Map, Window};

/// How much one request carries between a file and the buffer itself: so much that requests cost nothing beside
/// the transfer, and so little that a transfer of some MiB is many of them.
pub(crate) const REQUEST: u64 = 512 << 10;

/// How much one request carries of a staged copy: some of them stay in the processor's caches between the disk
/// and the copy.
pub(crate) const CHUNK: u64 = 256 << 10;

/// How many requests may be in flight.
pub(crate) const DEPTH: u32 = 32;

/// More than any disk takes at a time.
pub(crate) const DEEPEST: u32 = 4096;

/// How much memory a staged copy may have.
pub(crate) const STAGING: u64 = 32 << 20;

/// After how many bytes of direct requests a buffer is looked at.
const LOOK: u64 = 64 << 20;

/// What is kept from one transfer to the next, so that a transfer allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    /// A chunk for each lane. Made when the first one is needed.
    staging: OnceLock<Map>,
    bounce: Vec<u8>,
    lanes: Vec<Lane>,
    free: Vec<u32>,
    again: Vec<u32>,
    spans: Vec<Span>,
    edges: Vec<Span>,
    recent: Vec<Span>,
}

/// What is to be done.
pub(crate) struct Order<'a> {
    pub(crate) io: &'a dyn DirectIo,
    pub(crate) file: &'a Endpoint,
    pub(crate) pieces: &'a [Piece],
    pub(crate) direction: Direction,
    /// Moves straight between the file and the buffer what can be moved so.
    pub(crate) direct: Option<&'a Direct>,
    /// When direct I/O fails, copy.
    pub(crate) may_copy: bool,
    pub(crate) depth: u32,
    pub(crate) staging: u64,
    pub(crate) watch: Option<&'a Watch>,
    /// Whether the buffer is not any more where it was when this path was chosen.
    pub(crate) moved: &'a dyn Fn() -> bool,
}

impl Order<'_> {
    fn total(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.length).sum()
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Carried {
    /// Bytes that are known to have arrived by direct I/O, and by way of the processor.
    pub(crate) direct: u64,
    pub(crate) copied: u64,
    /// How many bytes of the pieces, in their order, are known to have arrived without a gap.
    pub(crate) prefix: u64,
    /// A read that came to the end of the file.
    pub(crate) ended: bool,
    /// Direct I/O failed with this.
    pub(crate) broken: Option<Errno>,
    pub(crate) requests: u64,
    pub(crate) queue: Queue,
}

/// How far a transfer is.
pub(crate) struct Progress<'p> {
    pub(crate) carried: Carried,
    /// Pieces of which nothing was cut yet.
    pieces: Merged<'p>,
    /// Where they begin in the transfer.
    position: u64,
    /// Nothing is carried from here on, a position in the transfer: its end, or the file's.
    end: u64,
    /// `None` before it has begun.
    pass: Option<Pass>,
}

impl<'p> Progress<'p> {
    pub(crate) fn new(pieces: &'p [Piece]) -> Progress<'p> {
        Progress {
            carried: Carried::default(),
            pieces: Merged(pieces),
            position: 0,
            end: pieces.iter().map(|piece| piece.length).sum(),
            pass: None,
        }
    }
}

/// How far it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// All of it, or to the end of the file.
    All,
    /// The buffer has moved: the rest is to be carried on a new path.
    Moved,
}

/// Bytes that are still to be carried.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    /// Where they are in the transfer, counted over all pieces.
    position: u64,
    file: u64,
    buffer: u64,
    length: u64,
    /// Direct I/O is not to be tried (again).
    copy: bool,
}

impl Span {
    fn first(&self, length: u64) -> Span {
        Span { length, ..*self }
    }

    fn advance(&mut self, length: u64) {
        self.position += length;
        self.file += length;
        self.buffer += length;
        self.length -= length;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Direct,
    /// By way of the lane's memory, in whole units of the file around the bytes.
    Staged {
        unit: u64,
    },
}

/// A place in the queue, and the part that has it.
#[derive(Debug, Clone, Copy)]
struct Lane {
    /// What is left of the part.
    span: Span,
    how: How,
}

/// Which parts of a transfer are carried now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    All,
    Blocks,
    Edges,
}

/// Carries a transfer out, or on. Nothing is in flight when it returns.
///
/// # Errors
/// What kept it from beginning. In the result: what stopped it.
pub(crate) fn carry(
    order: &Order<'_>,
    progress: &mut Progress<'_>,
    lanes: &mut Lanes,
    buffer: &mut LazyMapping,
) -> Result<Result<Done, TransferError>, BufferError> {
    if order.total() == 0 {
        // Not even a mapping is needed.
        return Ok(Ok(Done::All));
    }
    let range = buffer.range().clone();
    let by_stage = range.buffer().has_stage().then_some(&range);
    if by_stage.is_some() && order.direct.is_none() {
        let reach = Reach {
            map: None,
            stage: by_stage,
        };
        let (_, result) = flow(order, progress, lanes, &reach);
        return Ok(result);
    }
    // The disk's engine knows nothing of the buffer's fences: whoever else writes it, or reads what
    // is overwritten, has to be done first, as before a copy by the processor.
    let mut access: CpuAccess<'_> = buffer.mapping()?.begin_cpu_access(match order.direction {
        Direction::DiskToBuffer => Access::Write,
        Direction::BufferToDisk => Access::Read,
    })?;
    let reach = Reach {
        map: Some(access.mapping().map()),
        stage: by_stage,
    };
    let (copied_in, result) = flow(order, progress, lanes, &reach);
    access.copied_in(copied_in);
    let ended = access.end();
    Ok(match result {
        // Access may have been taken away as well, which is seen when it is looked at.
        Ok(Done::Moved) => Ok(Done::Moved),
        result => result.and_then(|done| Ok(ended.map(|()| done)?)),
    })
}

/// How bytes get into the buffer and out of it.
struct Reach<'w> {
    /// For direct I/O, and for copies where there is no stage.
    map: Option<&'w Map>,
    /// The range, if copies go by its owner's own.
    stage: Option<&'w BufferRange>,
}

/// Says also up to where bytes were copied into the mapping.
fn flow(
    order: &Order<'_>,
    progress: &mut Progress<'_>,
    lanes: &mut Lanes,
    reach: &Reach<'_>,
) -> (u64, Result<Done, TransferError>) {
    let unit = order.file.unit();
    let chunk = CHUNK.next_multiple_of(unit);
    let depth = lanes.prepare(order, chunk, progress.pass.is_none());
    let pass = progress.pass.unwrap_or(match order.direction {
        Direction::BufferToDisk if unit > 1 => Pass::Blocks,
        _ => Pass::All,
    });
    let mut flow = Flow {
        order,
        reach,
        staging: &lanes.staging,
        bounce: &mut lanes.bounce,
        unit,
        chunk,
        lanes: &mut lanes.lanes,
        free: &mut lanes.free,
        again: &mut lanes.again,
        spans: &mut lanes.spans,
        edges: &mut lanes.edges,
        recent: &mut lanes.recent,
        unseen: 0,
        moved: false,
        pieces: progress.pieces,
        position: progress.position,
        pass,
        end: progress.end,
        failed: None,
        copied_in: 0,
        carried: std::mem::take(&mut progress.carried),
    };
    loop {
        let queue = order.io.run(depth, &mut flow);
        if flow.carried.queue == Queue::Calls {
            flow.carried.queue = queue;
        }
        flow.settle();
        if flow.failed.is_some() || flow.moved || flow.pass != Pass::Blocks {
            break;
        }
        flow.pass = Pass::Edges;
        std::mem::swap(flow.spans, flow.edges);
    }
    let copied_in = flow.copied_in;
    let moved = flow.moved;
    progress.pieces = flow.pieces;
    progress.position = flow.position;
    progress.end = flow.end;
    progress.pass = Some(flow.pass);
    let (carried, result) = flow.finish();
    progress.carried = carried;
    let done = if moved { Done::Moved } else { Done::All };
    (copied_in, result.map(|()| done))
}

impl Lanes {
    /// Makes room for everything that is in flight at a time; how many requests that is.
    fn prepare(&mut self, order: &Order<'_>, chunk: u64, is_new: bool) -> u32 {
        let most = (order.total() / chunk).saturating_add(3 * order.pieces.len() as u64);
        let room = order.staging / chunk;
        let depth = u64::from(order.depth.min(DEEPEST))
            .min(most)
            .min(room)
            .max(1) as u32;
        let length = u64::from(depth) * chunk;
        let staging = self.staging.get().map(Map::length);
        if staging.is_some_and(|staging| (staging as u64) < length) {
            self.staging.take();
        }
        let nothing = Lane {
            span: Span::default(),
            how: How::Direct,
        };
        self.lanes.clear();
        self.lanes.resize(depth as usize, nothing);
        self.free.clear();
        self.free.extend((0..depth).rev());
        self.again.clear();
        self.again.reserve(depth as usize);
        self.recent.clear();
        if is_new {
            self.spans.clear();
            self.edges.clear();
        }
        self.spans.reserve(depth as usize + 1);
        depth
    }
}

/// A transfer that is under way.
struct Flow<'l, 'w, 'p> {
    order: &'w Order<'w>,
    reach: &'w Reach<'w>,
    staging: &'w OnceLock<Map>,
    /// A lane's bytes on their way to or from a stage.
    bounce: &'l mut Vec<u8>,
    /// Requests of files with direct I/O are of whole ones of these, in bytes.
    unit: u64,
    chunk: u64,
    lanes: &'l mut Vec<Lane>,
    /// Lanes without a part.
    free: &'l mut Vec<u32>,
    /// Lanes whose part goes on.
    again: &'l mut Vec<u32>,
    /// What no lane has: the piece that is being cut, and above it what came back from a lane.
    spans: &'l mut Vec<Span>,
    /// What is left for the last pass.
    edges: &'l mut Vec<Span>,
    /// What direct requests have carried since the buffer was looked at.
    recent: &'l mut Vec<Span>,
    /// How many bytes that is.
    unseen: u64,
    /// The buffer was seen elsewhere: nothing more is begun.
    moved: bool,
    /// As in [`Progress`].
    pieces: Merged<'p>,
    position: u64,
    end: u64,
    pass: Pass,
    failed: Option<Failure>,
    /// Up to where bytes were copied into the buffer.
    copied_in: u64,
    carried: Carried,
}

/// Why a transfer stops.
enum Failure {
    Call {
        at: Span,
        errno: Errno,
    },
    /// A write that took nothing, without an error.
    Short {
        at: Span,
    },
    NoMemory(SystemError),
    /// The buffer's own copy.
    Copy(BufferError),
    Cancelled,
    /// Direct I/O failed, and nothing else may be used. `Carried::broken` has the error.
    Broken,
}

impl<'w> Work<'w> for Flow<'_, 'w, '_> {
    fn next(&mut self) -> Option<Request<'w>> {
        if self.failed.is_none() && self.order.watch.is_some_and(Watch::is_cancelled) {
            self.failed = Some(Failure::Cancelled);
        }
        if self.failed.is_some() || self.moved {
            return None;
        }
        if let Some(token) = self.again.pop() {
            return self.request(token);
        }
        let token = *self.free.last()?;
        self.lanes[token as usize] = self.part()?;
        self.free.pop();
        self.request(token)
    }

    fn done(&mut self, token: u32, result: Result<usize, Errno>) {
        self.carried.requests += 1;
        let Lane { span, how } = self.lanes[token as usize];
        match (result, how) {
            (Err(Errno::INTR), _) => self.again.push(token),
            (Ok(moved), How::Direct) => self.moved(token, span, moved as u64),
            (Ok(moved), How::Staged { unit }) => match self.order.direction {
                Direction::DiskToBuffer => self.was_read(token, span, unit, moved as u64),
                Direction::BufferToDisk => self.was_written(token, span, moved as u64),
            },
            (Err(errno), How::Direct) => {
                // What failed may have been the way to where it was.
                self.moved = self.moved || (self.order.moved)();
                if !self.moved {
                    self.carried.broken.get_or_insert(errno);
                    if !self.order.may_copy {
                        self.fail(Failure::Broken);
                    }
                }
                self.give_back(token, span);
            }
            (Err(errno), How::Staged { .. }) => {
                self.fail(Failure::Call { at: span, errno });
                self.give_back(token, span);
            }
        }
    }
}

impl<'w> Flow<'_, 'w, '_> {
    /// Cuts the next part off what is to be done.
    fn part(&mut self) -> Option<Lane> {
        loop {
            let mut span = match self.spans.pop() {
                Some(span) => span,
                None => self.piece()?,
            };
            if span.length == 0 || span.position >= self.end {
                continue;
            }
            let (length, how) = self.cut(&span);
            let first = span.first(length);
            span.advance(length);
            if span.length > 0 {
                self.spans.push(span);
            }
            match how {
                Some(how) => return Some(Lane { span: first, how }),
                None => self.edges.push(first),
            }
        }
    }

    /// The next piece, whole.
    fn piece(&mut self) -> Option<Span> {
        if self.pass == Pass::Edges {
            return None;
        }
        let piece = self.pieces.next()?;
        let position = self.position;
        self.position += piece.length;
        Some(Span {
            position,
            file: piece.file_offset,
            buffer: piece.offset,
            length: piece.length,
            copy: false,
        })
    }

    /// How much of a span goes how; `None` for later.
    fn cut(&self, span: &Span) -> (u64, Option<How>) {
        let unit = self.unit;
        let in_chunk = || span.length.min(self.chunk - span.file % self.chunk);
        if unit == 1 || self.pass == Pass::Edges {
            return (in_chunk(), Some(How::Staged { unit: 1 }));
        }
        // Bytes before the first whole block.
        let lead = match span.file % unit {
            0 => 0,
            behind => span.length.min(unit - behind),
        };
        let blocks = (span.length - lead) / unit * unit;
        if blocks > 0 && self.goes_directly(span, lead) {
            return match lead {
                0 => (
                    blocks.min(REQUEST.next_multiple_of(unit)),
                    Some(How::Direct),
                ),
                lead => (lead, self.edge()),
            };
        }
        match (self.order.direction, lead, blocks) {
            (Direction::DiskToBuffer, ..) => (in_chunk(), Some(How::Staged { unit })),
            (_, 0, 0) => (span.length, self.edge()),
            (_, 0, blocks) => (blocks.min(in_chunk()), Some(How::Staged { unit })),
            (_, lead, _) => (lead, self.edge()),
        }
    }

    fn edge(&self) -> Option<How> {
        match self.order.direction {
            Direction::DiskToBuffer => Some(How::Staged { unit: self.unit }),
            Direction::BufferToDisk => None,
        }
    }

    /// Whether the span's whole blocks, after `lead` bytes, can go straight to or from the buffer.
    fn goes_directly(&self, span: &Span, lead: u64) -> bool {
        let (Some(direct), Some(map)) = (self.order.direct, self.reach.map) else {
            return false;
        };
        let align = direct.memory_align as usize;
        !span.copy
            && self.carried.broken.is_none()
            && map.misalignment((span.buffer + lead) as usize, align) == 0
    }

    /// The request for what is left of a lane's part.
    fn request(&mut self, token: u32) -> Option<Request<'w>> {
        let Lane { span, how } = self.lanes[token as usize];
        let file = match (how, self.order.file.direct()) {
            (How::Staged { unit: 1 }, _) | (_, Err(_)) => self.order.file.staged(),
            (_, Ok(direct)) => direct.fd(),
        };
        let request = |window, offset| Request {
            token,
            file,
            window,
            offset,
            direction: self.order.direction,
        };
        let unit = match (how, self.reach.map) {
            (How::Direct, Some(map)) => {
                let window = map.window(span.buffer as usize, span.length as usize);
                return Some(request(window, span.file));
            }
            // There is no direct part without a mapping.
            (How::Direct, None) => self.unit,
            (How::Staged { unit }, _) => unit,
        };
        let lead = span.file % unit;
        let window = match self.lane_memory(token) {
            Ok(memory) => memory.first((lead + span.length).next_multiple_of(unit) as usize),
            Err(error) => {
                self.fail(Failure::NoMemory(error));
                self.give_back(token, span);
                return None;
            }
        };
        if self.order.direction == Direction::BufferToDisk
            && let Err(error) = self.copy_out(&span, &window)
        {
            self.fail(Failure::Copy(error));
            self.give_back(token, span);
            return None;
        }
        Some(request(window, span.file - lead))
    }

    /// Copies a span's bytes to the beginning of `memory`.
    fn copy_out(&mut self, span: &Span, memory: &Window<'_>) -> Result<(), BufferError> {
        match (self.reach.stage, self.reach.map) {
            (Some(range), _) => {
                self.bounce.resize(span.length as usize, 0);
                range
                    .slice(span.buffer, span.length)?
                    .read_bytes(self.bounce)?;
                memory.copy_in(self.bounce);
            }
            (None, Some(map)) => {
                let bytes = map.window(span.buffer as usize, span.length as usize);
                bytes.copy_to(memory);
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Copies `memory` to where a span's bytes begin.
    fn copy_in(&mut self, span: &Span, memory: &Window<'_>) -> Result<(), BufferError> {
        match (self.reach.stage, self.reach.map) {
            (Some(range), _) => {
                self.bounce.resize(span.length as usize, 0);
                memory.copy_out(self.bounce);
                range
                    .slice(span.buffer, span.length)?
                    .write_bytes(self.bounce)?;
            }
            (None, Some(map)) => {
                memory.copy_to(&map.window(span.buffer as usize, span.length as usize));
                self.copied_in = self.copied_in.max(span.buffer + span.length);
            }
            (None, None) => {}
        }
        Ok(())
    }

    fn lane_memory(&self, token: u32) -> Result<Window<'w>, SystemError> {
        let staging = match self.staging.get() {
            Some(staging) => staging,
            None => {
                let length = self.lanes.len() * self.chunk as usize;
                let made =
                    Map::anonymous(length).map_err(|errno| no_memory(length as u64, errno))?;
                self.staging.get_or_init(|| made)
            }
        };
        let chunk = self.chunk as usize;
        Ok(staging.window(token as usize * chunk, chunk))
    }

    /// Direct I/O has moved bytes.
    fn moved(&mut self, token: u32, mut span: Span, moved: u64) {
        let moved = moved.min(span.length);
        self.carried.direct += moved;
        self.arrived(moved);
        self.recent.push(span.first(moved));
        self.unseen += moved;
        if self.unseen >= LOOK && !self.moved {
            self.look();
        }
        span.advance(moved);
        if span.length > 0 && moved > 0 && moved.is_multiple_of(self.unit) {
            return self.goes_on(token, span);
        }
        // At the end of the file, or within a block, from where no further request would be aligned: ordinary
        // I/O tells which.
        span.copy = true;
        self.give_back(token, span);
    }

    /// The lane's memory has bytes of the file.
    fn was_read(&mut self, token: u32, mut span: Span, unit: u64, moved: u64) {
        let lead = span.file % unit;
        let useful = moved.saturating_sub(lead).min(span.length);
        if useful == 0 {
            // Not an empty span: it is the end of the file.
            self.carried.ended = true;
            self.end = self.end.min(span.position);
            return self.free.push(token);
        }
        let copied = match self.lane_memory(token) {
            Ok(memory) => {
                let bytes = memory.after(lead as usize).first(useful as usize);
                self.copy_in(&span.first(useful), &bytes)
            }
            Err(error) => Err(error.into()),
        };
        if let Err(error) = copied {
            self.fail(Failure::Copy(error));
            return self.give_back(token, span);
        }
        self.carried.copied += useful;
        self.arrived(useful);
        span.advance(useful);
        self.goes_on(token, span);
    }

    /// The file has bytes of the lane's memory.
    fn was_written(&mut self, token: u32, mut span: Span, moved: u64) {
        let moved = moved.min(span.length);
        self.carried.copied += moved;
        self.arrived(moved);
        span.advance(moved);
        if moved == 0 {
            self.fail(Failure::Short { at: span });
        } else if span.length > 0 && self.pass == Pass::Blocks {
            // Cut short, as by a disk that is full: ordinary writes carry on, or get the error.
            self.edges.push(span);
            span.length = 0;
        }
        self.give_back(token, span);
    }

    /// Sees whether what direct requests have carried until now can be believed.
    fn look(&mut self) {
        self.moved = (self.order.moved)();
        if !self.moved {
            self.recent.clear();
            self.unseen = 0;
        }
    }

    /// Nothing is in flight any more: what lanes have not done is taken back from them, and what was carried while
    /// the buffer moved is to be carried again.
    fn settle(&mut self) {
        for token in self.again.drain(..) {
            self.free.push(token);
            self.spans.push(self.lanes[token as usize].span);
        }
        if !self.recent.is_empty() && !self.moved {
            self.look();
        }
        for span in self.recent.drain(..) {
            self.carried.direct -= span.length;
            if let Some(watch) = self.order.watch {
                watch.withdrawn(span.length);
            }
            self.spans.push(span);
        }
        self.unseen = 0;
    }

    fn goes_on(&mut self, token: u32, span: Span) {
        if span.length == 0 {
            return self.free.push(token);
        }
        self.lanes[token as usize].span = span;
        self.again.push(token);
    }

    /// What is left of a part needs another request, of another kind.
    fn give_back(&mut self, token: u32, span: Span) {
        self.free.push(token);
        if span.length > 0 {
            self.spans.push(span);
        }
    }

    fn arrived(&self, bytes: u64) {
        if let Some(watch) = self.order.watch {
            watch.arrived(bytes);
        }
    }

    /// Of several failures the one at the lowest place is told.
    fn fail(&mut self, failure: Failure) {
        let position = |failure: &Failure| match failure {
            Failure::Call { at, .. } | Failure::Short { at } => at.position,
            _ => 0,
        };
        let earlier = |known: &Failure| position(known) <= position(&failure);
        if !self.failed.as_ref().is_some_and(earlier) {
            self.failed = Some(failure);
        }
    }

    fn finish(self) -> (Carried, Result<(), TransferError>) {
        let mut carried = self.carried;
        let missing = self.spans.iter().chain(&*self.edges);
        let missing = missing.filter(|span| span.length > 0);
        let next = match self.pieces.0 {
            [] => self.end,
            _ => self.position,
        };
        let positions = missing.map(|span| span.position);
        carried.prefix = positions.min().unwrap_or(self.end).min(next).min(self.end);
        let failure = match self.failed {
            None => return (carried, Ok(())),
            // Nothing was left to be cancelled.
            Some(Failure::Cancelled) if carried.prefix == self.end => return (carried, Ok(())),
            Some(failure) => failure,
        };
        let (object, wanted) = (self.order.file.name.clone(), self.order.total());
        let (arrived, prefix) = (carried.direct + carried.copied, carried.prefix);
        let error = match failure {
            Failure::Call { at, errno } => {
                let call = match self.order.direction {
                    Direction::DiskToBuffer => "pread",
                    Direction::BufferToDisk => "pwrite",
                };
                TransferError::Stopped {
                    cause: SystemError::new(call, object, errno),
                    offset: at.file,
                    length: at.length,
                    arrived,
                    wanted,
                    prefix,
                }
            }
            Failure::Short { at } => TransferError::ShortWrite {
                object,
                offset: at.file,
                written: arrived,
                wanted,
            },
            Failure::Cancelled => TransferError::Cancelled {
                object,
                arrived,
                wanted,
                prefix,
            },
            Failure::NoMemory(error) => error.into(),
            Failure::Copy(error) => error.into(),
            Failure::Broken => {
                let errno = carried.broken.unwrap_or(Errno::IO);
                SystemError::new("direct I/O", object, errno).into()
            }
        };
        (carried, Err(error))
    }
}

/// Memory that direct I/O can use: it starts on a page, which is the largest alignment that the
/// kernel asks for.
pub(crate) fn host_memory(length: u64) -> Result<HostMemory, TransferError> {
    Ok(HostMemory::new(length as usize).map_err(|errno| no_memory(length, errno))?)
}

fn no_memory(length: u64, errno: Errno) -> SystemError {
    SystemError::new("mmap", format!("{length} bytes of memory"), errno)
}
