//! Files and block devices: reading from a disk into a buffer, and writing from a buffer to a
//! disk.
//!
//! A disk's DMA engine moves the bytes if the buffer's memory and the file allow `O_DIRECT`
//! between them. For device memory this is peer-to-peer DMA, which needs a proof first; see
//! [`crate::plan`].

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::{Attached, Importer};
use crate::buffer::{Access, BufferRange, LazyMapping, Mapping};
use crate::errno::Errno;
use crate::error::{BufferError, ImportError, SystemError, TransferError};
use crate::path::ProofPolicy;
use crate::plan::proof::{self, Question, Scratch as ScratchSpace};
use crate::plan::whereabouts::{Seen, Whereabouts};
use crate::plan::{self, Direction, Key, Path, Plan, Reason, ReasonCode, Verdict};
use crate::sys::direct::{DirectIo, Kernel};
use crate::topology::{BlockDevice, PciAddress};
use crate::transfer::engine::{self, Done, Lanes, Order, Progress};
use crate::transfer::file::{Direct, Endpoint};
use crate::transfer::{Merged, Piece, Receipt, Watch};

pub use crate::transfer::file::unnamed_file;

/// After this many moves of the buffer, a transfer goes by the CPU, which comes to an end however often the buffer moves.
const MOST_MOVES: u32 = 8;

/// An open file or block device as an importer. Clones refer to the same open file.
#[derive(Clone)]
#[doc(alias = "O_DIRECT")]
pub struct FileImporter {
    endpoint: Arc<Endpoint>,
    scratch: ScratchSpace,
    policy: ProofPolicy,
    depth: u32,
    staging: u64,
    io: Arc<dyn DirectIo>,
}

impl std::fmt::Debug for FileImporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileImporter")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl FileImporter {
    /// Opens an existing regular file or block device for reading, as [`std::fs::File::open`] does.
    ///
    /// # Errors
    /// The call that failed, or [`TransferError::NotAFile`].
    pub fn open(path: impl AsRef<FilePath>) -> Result<FileImporter, TransferError> {
        FileImporter::open_for(path, Access::Read)
    }

    /// Opens an existing regular file or block device for this access only.
    ///
    /// Opening a file for writing has side effects: an overlay filesystem (the root of a
    /// container) copies the whole file, and udev rescans a disk when the descriptor is closed.
    /// The kernel refuses the file of a running program (`ETXTBSY`).
    ///
    /// # Errors
    /// Those of [`FileImporter::open`].
    pub fn open_for(
        path: impl AsRef<FilePath>,
        access: Access,
    ) -> Result<FileImporter, TransferError> {
        Ok(FileImporter::new(Endpoint::open(path.as_ref(), access)?))
    }

    /// Takes an open file, which may be unnamed. `name` is for messages.
    ///
    /// The importer uses the descriptor as it is. The descriptor's access mode limits the
    /// operations. The importer changes neither the position nor the flags, because other
    /// descriptors may share them. For direct I/O the importer opens the file a second time
    /// through `/proc`. A process without the permission for that passes a descriptor that is
    /// open with `O_DIRECT`, which serves whole blocks.
    ///
    /// # Errors
    /// Those of [`FileImporter::open`].
    pub fn from_fd(fd: OwnedFd, name: impl Into<String>) -> Result<FileImporter, TransferError> {
        Ok(FileImporter::new(Endpoint::from_fd(fd, name.into())?))
    }

    fn new(endpoint: Endpoint) -> FileImporter {
        FileImporter {
            endpoint: Arc::new(endpoint),
            scratch: ScratchSpace::default(),
            policy: ProofPolicy::default(),
            depth: engine::DEPTH,
            staging: engine::STAGING,
            io: Arc::new(Kernel::default()),
        }
    }

    #[cfg(test)]
    pub(crate) fn with_io(mut self, io: impl DirectIo + 'static) -> FileImporter {
        self.io = Arc::new(io);
        self
    }

    /// Lets proofs make an unnamed file in `directory`, which must be on the same filesystem.
    /// The default is the file's own directory.
    #[must_use]
    pub fn with_scratch_directory(mut self, directory: impl Into<PathBuf>) -> FileImporter {
        self.scratch = ScratchSpace::Directory(directory.into());
        self
    }

    /// Gives these bytes of the file or device to proofs, which overwrite them. On a raw
    /// device, peer-to-peer writes need this: no other proof is possible there.
    #[must_use]
    pub fn with_scratch_range(mut self, bytes: Range<u64>) -> FileImporter {
        self.scratch = ScratchSpace::Range(bytes);
        self
    }

    /// Sets when proofs run. A proof modifies bytes of the range ([`Attachment::plan`]).
    ///
    /// A program that knows when nobody uses a buffer can prove the path then, with
    /// [`Attachment::plan`], and transfer with [`ProofPolicy::Never`].
    #[must_use]
    pub fn with_proofs(mut self, policy: ProofPolicy) -> FileImporter {
        self.policy = policy;
        self
    }

    /// Sets the maximum number of requests in flight in each transfer. The default is 32.
    ///
    /// A request carries one piece of a transfer, or about 100 KiB of a larger piece.
    #[must_use]
    pub fn with_depth(mut self, requests: u32) -> FileImporter {
        self.depth = requests.clamp(1, engine::DEEPEST);
        self
    }

    /// Sets the maximum size of the bounce buffers of each attachment in bytes. The default is
    /// 32 MiB. Each request in flight needs 256 KiB.
    #[must_use]
    pub fn with_staging_memory(mut self, bytes: u64) -> FileImporter {
        self.staging = bytes;
        self
    }

    /// The current size in bytes.
    ///
    /// # Errors
    /// The call that failed.
    pub fn size(&self) -> Result<u64, TransferError> {
        self.endpoint.size()
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        &self.endpoint.name
    }

    /// The PCI functions of the disk that holds the file at this moment; empty if there is no such disk, or the
    /// kernel does not tell.
    pub fn disk_functions(&self) -> Vec<PciAddress> {
        let disk = self.endpoint.disk();
        disk.map_or_else(Vec::new, |disk| disk.functions)
    }

    /// The requirements of direct I/O on the file: the alignment of memory and of offsets, in
    /// bytes. `None` if the file has no direct I/O.
    pub fn alignment(&self) -> Option<(u32, u32)> {
        self.endpoint
            .direct()
            .ok()
            .map(|direct| (direct.memory_align, direct.block))
    }

    /// Makes the written bytes durable (`fdatasync`).
    ///
    /// # Errors
    /// The call's error, by which a disk reports a lost write.
    pub fn sync(&self) -> Result<(), TransferError> {
        let failed = |errno| SystemError::new("fdatasync", &self.endpoint.name, errno);
        Ok(rustix::fs::fdatasync(self.endpoint.staged()).map_err(failed)?)
    }

    /// Attaches the range to the file, without a mapping, a proof or a transfer.
    ///
    /// The attachment keeps the file open. The importer may be dropped first.
    ///
    /// # Errors
    /// [`BufferError::Inherited`] for a buffer that was lent to a parent process.
    pub fn attach(&self, range: &BufferRange) -> Result<Attachment, TransferError> {
        Ok(Attachment {
            importer: self.clone(),
            buffer: LazyMapping::new(range)?,
            require: Path::StagedCopy,
            watch: None,
            lanes: Lanes::default(),
            whereabouts: Whereabouts::default(),
        })
    }
}

/// A range attached to a file.
///
/// The range is mapped when a path first needs the mapping: direct I/O, and copies of a buffer
/// without a [`Stage`](crate::buffer::Stage). A buffer that cannot be mapped and has a stage
/// uses staged copies.
#[derive(Debug)]
pub struct Attachment {
    importer: FileImporter,
    buffer: LazyMapping,
    require: Path,
    watch: Option<Watch>,
    lanes: Lanes,
    whereabouts: Whereabouts,
}

impl Attachment {
    /// Makes transfers fail on a path worse than this one, instead of a fallback. A transfer whose path becomes worse
    /// while it runs, because the buffer moves or a device fails, ends there with the same error: an unknown part of
    /// its target has then been overwritten.
    #[must_use]
    pub fn require(mut self, path: Path) -> Self {
        self.require = path;
        self
    }

    /// Lets `watch` show the progress of the transfers and cancel them.
    #[must_use]
    pub fn watched_by(mut self, watch: &Watch) -> Self {
        self.watch = Some(watch.clone());
        self
    }

    /// The attached range.
    pub fn range(&self) -> &BufferRange {
        self.buffer.range()
    }

    /// The mapping, for the CPU's accesses between transfers. The first call makes it.
    ///
    /// # Errors
    /// [`BufferError::NotMappable`], or the call that failed.
    pub fn mapping(&mut self) -> Result<&mut Mapping, BufferError> {
        self.buffer.mapping()
    }

    /// Chooses the path for a transfer of the whole range to or from `file_offset`.
    ///
    /// The first call for a pair of devices and a direction (see [`ProofPolicy`]) proves the
    /// peer-to-peer path. [`Attachment::read`] and [`Attachment::write`] do the same. Nobody
    /// else may use the range during a proof:
    ///
    /// - from disk to buffer, the proof overwrites up to 192 KiB of the range with bytes of the
    ///   file, and then restores them;
    /// - from buffer to disk, the proof writes the range's own bytes to scratch space. If those
    ///   bytes are ambiguous, the proof puts random bytes into the range instead, and then
    ///   restores the old ones.
    ///
    /// A process that is killed during a proof restores nothing: up to 64 KiB in one place then
    /// have other contents. During a [`read`](Attachment::read) these are bytes that the read
    /// would overwrite.
    ///
    /// # Errors
    /// [`TransferError`] for failures that do not depend on the path, such as a file that
    /// cannot be read at all, or a range that may not be written.
    pub fn plan(&mut self, direction: Direction, file_offset: u64) -> Result<Plan, TransferError> {
        let piece = self.all(file_offset, self.buffer.len());
        let seen = self.whereabouts.look(self.buffer.range().buffer());
        let (plan, _) = self.choose(direction, &[piece], &seen)?;
        if plan.path < self.require {
            return Err(TransferError::PathTooPoor { plan });
        }
        Ok(plan)
    }

    /// Fills the range with the file's bytes from `file_offset` on, as far as the file goes.
    /// [`Receipt::bytes`] is the number of bytes read. The rest of the range is unchanged.
    ///
    /// # Errors
    /// The call that failed. An unknown part of the range is overwritten in that case.
    pub fn read(&mut self, file_offset: u64) -> Result<Receipt, TransferError> {
        let size = self.may_read()?;
        let left = size.saturating_sub(file_offset);
        let piece = self.all(file_offset, left.min(self.buffer.len()));
        self.carry(Direction::DiskToBuffer, &[piece])
    }

    /// Fills parts of the range with parts of the file, as one transfer: one choice of the
    /// path, one proof, one queue. The parts of the range must not overlap.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`], with nothing done; [`TransferError::ShortRead`] if the file
    /// shrank during the transfer; otherwise as [`Attachment::read`].
    pub fn read_many(&mut self, pieces: &[Piece]) -> Result<Receipt, TransferError> {
        let size = self.may_read()?;
        self.check(pieces)?;
        for piece in pieces {
            inside(
                &self.importer.endpoint.name,
                piece.file_offset,
                piece.length,
                size,
            )?;
        }
        let receipt = self.carry(Direction::DiskToBuffer, pieces)?;
        let wanted = pieces.iter().map(|piece| piece.length).sum();
        if receipt.bytes < wanted {
            return Err(TransferError::ShortRead {
                object: self.importer.endpoint.name.clone(),
                read: receipt.bytes,
                wanted,
            });
        }
        Ok(receipt)
    }

    /// Writes the whole range to the file, from `file_offset` on. The bytes are durable after
    /// [`FileImporter::sync`].
    ///
    /// # Errors
    /// [`TransferError::ReadOnly`], [`TransferError::Appending`] or
    /// [`TransferError::WholeBlocksOnly`], with nothing written; [`TransferError::ShortWrite`],
    /// or the call that failed, after which an unknown part of the file's range is overwritten.
    pub fn write(&mut self, file_offset: u64) -> Result<Receipt, TransferError> {
        let piece = self.all(file_offset, self.buffer.len());
        self.write_many(&[piece])
    }

    /// Writes parts of the range to parts of the file, as one transfer. The parts of the file
    /// must not overlap.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`], with nothing done; otherwise as [`Attachment::write`].
    pub fn write_many(&mut self, pieces: &[Piece]) -> Result<Receipt, TransferError> {
        self.importer.endpoint.may_write(pieces)?;
        self.check(pieces)?;
        self.carry(Direction::BufferToDisk, pieces)
    }

    fn all(&self, file_offset: u64, length: u64) -> Piece {
        Piece {
            file_offset,
            offset: 0,
            length,
        }
    }

    /// The file's size, after a check that the buffer and the file allow a read.
    fn may_read(&self) -> Result<u64, TransferError> {
        self.importer.endpoint.may_read()?;
        if !self.buffer.range().buffer().is_writable() {
            let object = self.buffer.range().buffer().name().to_owned();
            return Err(BufferError::Access {
                object,
                wanted: "write",
            }
            .into());
        }
        self.importer.size()
    }

    fn check(&self, pieces: &[Piece]) -> Result<(), TransferError> {
        let mut total = 0_u64;
        for piece in pieces {
            let name = self.buffer.range().buffer().name();
            inside(name, piece.offset, piece.length, self.buffer.len())?;
            inside(
                &self.importer.endpoint.name,
                piece.file_offset,
                piece.length,
                i64::MAX as u64,
            )?;
            inside("the transfer", total, piece.length, i64::MAX as u64)?;
            total += piece.length;
        }
        Ok(())
    }

    fn carry(&mut self, direction: Direction, pieces: &[Piece]) -> Result<Receipt, TransferError> {
        let begun = Instant::now();
        let mut progress = Progress::new(pieces);
        let (mut moves, mut in_host, mut worst) = (0, 0, None::<Plan>);
        loop {
            let (before, copied_before) = (progress.carried.direct, progress.carried.copied);
            let seen = self.whereabouts.look(self.buffer.range().buffer());
            if let Some(why) = seen.out_of_reach {
                return Err(self.out_of_reach(why, pieces, &progress));
            }
            let (mut plan, key) = self.choose(direction, pieces, &seen)?;
            if moves >= MOST_MOVES && plan.path > Path::StagedCopy {
                let why = format!("the buffer has moved {moves} times during the transfer");
                let reason = Reason::new(plan.path, ReasonCode::PlacementUnknown, why);
                (plan.path, plan.reasons) = (Path::StagedCopy, vec![reason]);
            }
            if plan.path < self.require {
                return Err(TransferError::PathTooPoor { plan });
            }
            let file = &self.importer.endpoint;
            let (whereabouts, range) = (&self.whereabouts, self.buffer.range().clone());
            let moved = || whereabouts.look(range.buffer()) != seen;
            let order = Order {
                io: &*self.importer.io,
                file,
                pieces,
                direction,
                direct: match plan.path {
                    Path::StagedCopy => None,
                    Path::PeerToPeer | Path::SharedHostMemory => file.direct().ok(),
                },
                may_copy: self.require == Path::StagedCopy,
                depth: self.importer.depth,
                staging: self.importer.staging,
                watch: self.watch.as_ref(),
                moved: &moved,
            };
            let result = engine::carry(&order, &mut progress, &mut self.lanes, &mut self.buffer)?;
            if plan.path == Path::SharedHostMemory {
                in_host += progress.carried.direct - before;
            }
            let broken = progress.carried.broken.take();
            let carried = &progress.carried;
            if let Some(errno) = broken {
                // The path worked when it was proved and has stopped working. The rest went the
                // way that always works; if the disk is what failed, that has said so.
                if let Some(key) = &key {
                    plan::void(key);
                }
                let total: u64 = pieces.iter().map(|piece| piece.length).sum();
                let call = format!(
                    "{direction}, after {} of {total} bytes: {errno} for {} and {}",
                    carried.direct,
                    file.describe(file.disk().as_ref()),
                    range.buffer()
                );
                let reason = Reason::new(plan.path, ReasonCode::DeviceError, call);
                plan = Plan {
                    path: Path::StagedCopy,
                    reasons: vec![reason],
                };
                if self.require > Path::StagedCopy {
                    return Err(TransferError::PathTooPoor { plan });
                }
            }
            let idle = (carried.direct, carried.copied) == (before, copied_before);
            let counts = worst.is_some() || !idle;
            let plan = match worst.take() {
                Some(before) if idle || before.path < plan.path => before,
                _ => plan,
            };
            if result? == Done::Moved {
                moves += 1;
                // A path whose bytes were all carried again has carried none.
                worst = counts.then_some(plan);
                continue;
            }
            let carried = progress.carried;
            return Ok(Receipt {
                plan,
                bytes: carried.prefix,
                host_bytes: (in_host + carried.copied).min(carried.prefix),
                copied: carried.copied.min(carried.prefix),
                requests: carried.requests,
                queue: carried.queue,
                moves,
                time: begun.elapsed(),
            });
        }
    }

    /// Access to the buffer was taken away. The processor's copies would end the process (`SIGBUS`).
    fn out_of_reach(&self, why: &str, pieces: &[Piece], progress: &Progress<'_>) -> TransferError {
        let carried = &progress.carried;
        let mut before = carried.prefix;
        let place = Merged(pieces).find_map(|piece| {
            let skipped = before.min(piece.length);
            before -= skipped;
            (skipped < piece.length)
                .then_some((piece.file_offset + skipped, piece.length - skipped))
        });
        let (offset, length) = place.unwrap_or_default();
        let object = format!("{}, {why}", self.buffer.range().buffer());
        TransferError::Stopped {
            cause: SystemError::new("ioctl(PEERBUF_IOC_BUFFER)", object, Errno::NODEV),
            offset,
            length,
            arrived: carried.direct + carried.copied,
            wanted: pieces.iter().map(|piece| piece.length).sum(),
            prefix: carried.prefix,
        }
    }

    fn choose(
        &mut self,
        direction: Direction,
        pieces: &[Piece],
        seen: &Seen,
    ) -> Result<(Plan, Option<Key>), TransferError> {
        let buffer = self.buffer.range().buffer().clone();
        // The best path that the buffer's memory allows, and the reasons against better ones. A
        // memfd has pages that the kernel can pin. A trial shows whether a dma-buf's own
        // mapping has such pages, and whether the disk reaches device memory.
        let Plan { mut reasons, .. } = Plan::seen(&buffer, seen);
        reasons.retain(|reason| reason.code == ReasonCode::NotDeviceMemory);
        let best = if reasons.is_empty() {
            Path::PeerToPeer
        } else {
            Path::SharedHostMemory
        };
        let pinnable = best == Path::SharedHostMemory && buffer.host_memory().is_some();
        let file = Arc::clone(&self.importer.endpoint);
        let key = Key::of(&buffer, &file, direction, best);
        // Read once, so that what is proved is what is kept. Where nothing is to be proved, no matter which.
        let disk = if pinnable { None } else { file.disk() };
        let how = (best, direction);
        let fitting = direct_io(&file, disk.as_ref(), &mut self.buffer, how, pieces)?;
        let rejected = match fitting {
            Err((code, evidence)) => Some((code, evidence)),
            // The transfer would copy the pieces that do not fit, and the caller excluded copies.
            Ok(Fitting {
                misfit: Some(evidence),
                ..
            }) if self.require > Path::StagedCopy => Some((ReasonCode::Misaligned, evidence)),
            Ok(Fitting { misfit, .. }) if pinnable => {
                reasons.extend(
                    misfit.map(|evidence| Reason::new(best, ReasonCode::Misaligned, evidence)),
                );
                None
            }
            Ok(Fitting {
                direct,
                start,
                length,
                misfit,
            }) => {
                reasons.extend(
                    misfit.map(|evidence| Reason::new(best, ReasonCode::Misaligned, evidence)),
                );
                let question = Question {
                    file: &file,
                    disk: disk.as_ref(),
                    direct,
                    direction,
                    scratch: &self.importer.scratch,
                    policy: self.importer.policy,
                    start,
                    length,
                    moved: &|| self.whereabouts.look(&buffer) != *seen,
                };
                let io = &*self.importer.io;
                match proof::verdict(io, &question, &mut self.buffer, key.as_ref())? {
                    Verdict::Proved => None,
                    Verdict::Rejected { code, evidence } => Some((code, evidence)),
                }
            }
        };
        let Some((code, evidence)) = rejected else {
            let plan = Plan {
                path: best,
                reasons,
            };
            return Ok((plan, key));
        };
        reasons.push(Reason::new(best, code, evidence));
        if best == Path::PeerToPeer {
            let (code, evidence) = if buffer.provenance().kind.is_device_memory() {
                (
                    ReasonCode::NotHostMemory,
                    "the bytes are in device memory, and no memory of the host is behind it",
                )
            } else {
                (
                    ReasonCode::PlacementUnknown,
                    "it is not known where the buffer's bytes are, and no memory of the host came with it",
                )
            };
            reasons.push(Reason::new(Path::SharedHostMemory, code, evidence));
        }
        if pieces.iter().any(|piece| piece.length > 0) {
            // A plan is valid only if some way to the bytes exists.
            self.buffer.reach()?;
        }
        let plan = Plan {
            path: Path::StagedCopy,
            reasons,
        };
        Ok((plan, key))
    }
}

/// Temporary files of a directory as an [`Importer`]. Bytes go into a range and out of it
/// through an unnamed file, by the path of a disk transfer.
#[derive(Debug, Clone)]
pub struct Scratch {
    directory: PathBuf,
}

impl Scratch {
    /// Uses this directory for temporary files, which are removed afterwards.
    pub fn new(directory: impl Into<PathBuf>) -> Scratch {
        let directory = directory.into();
        Scratch { directory }
    }
}

impl Importer for Scratch {
    fn name(&self) -> String {
        format!("a file in {}", self.directory.display())
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        let file = unnamed_file(&self.directory)?;
        let again = file.try_clone().map_err(|error| {
            SystemError::new("fcntl(F_DUPFD_CLOEXEC)", Importer::name(self), &error)
        })?;
        let importer = FileImporter::from_fd(again.into(), Importer::name(self))?;
        let importer = importer.with_scratch_directory(&self.directory);
        Ok(Box::new(Through {
            file,
            importer,
            range: range.clone(),
            plan: Plan::in_place(range.buffer()),
        }))
    }
}

/// A range, and the file that its bytes go through.
struct Through {
    file: File,
    importer: FileImporter,
    range: BufferRange,
    plan: Plan,
}

impl Attached for Through {
    fn plan(&self) -> Plan {
        self.plan.clone()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Option<Plan>, ImportError> {
        let part = self.range.slice(0, bytes.len() as u64)?;
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.write_all_at(bytes, 0))
            .and_then(|()| self.file.sync_data());
        written.map_err(|error| SystemError::new("pwrite", self.importer.name(), &error))?;
        let receipt = self.importer.attach(&part)?.read(0)?;
        if receipt.bytes != part.len() {
            return Err(TransferError::ShortRead {
                object: self.importer.name().to_owned(),
                read: receipt.bytes,
                wanted: part.len(),
            }
            .into());
        }
        self.plan = receipt.plan;
        Ok(Some(self.plan.clone()))
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        let part = self.range.slice(0, into.len() as u64)?;
        let receipt = self.importer.attach(&part)?.write(0)?;
        self.importer.sync()?;
        let read = self.file.read_exact_at(into, 0);
        read.map_err(|error| SystemError::new("pread", self.importer.name(), &error))?;
        self.plan = receipt.plan;
        Ok(Some(self.plan.clone()))
    }
}

/// Refuses a range that exceeds `size` bytes.
fn inside(object: &str, offset: u64, length: u64, size: u64) -> Result<(), BufferError> {
    if offset.checked_add(length).is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(BufferError::OutOfRange {
        object: object.to_owned(),
        offset,
        length,
        size,
    })
}

/// The part of a transfer that direct I/O can carry, given the alignment and the file.
struct Fitting<'f> {
    direct: &'f Direct,
    /// The start and the length of the longest part of the mapping that fits.
    start: u64,
    length: u64,
    /// The evidence of misaligned pieces of a block or more, if there are any.
    misfit: Option<String>,
}

/// `Err` for a buffer whose bytes no one can reach.
fn direct_io<'f>(
    file: &'f Endpoint,
    disk: Option<&BlockDevice>,
    buffer: &mut LazyMapping,
    (path, direction): (Path, Direction),
    pieces: &[Piece],
) -> Result<Result<Fitting<'f>, (ReasonCode, String)>, BufferError> {
    let direct = match file.direct() {
        Ok(direct) => direct,
        Err(why) => {
            let evidence = format!("{}: {why}", file.name);
            return Ok(Err((ReasonCode::NoDirectIo, evidence)));
        }
    };
    let (block, align) = (u64::from(direct.block), direct.memory_align);
    // For a piece: the offset of its first whole block in the range, and the bytes of its whole
    // blocks.
    let blocks = |piece: &Piece| {
        let lead = (block - piece.file_offset % block) % block;
        let length = piece.length.saturating_sub(lead) / block * block;
        (piece.offset + lead, length)
    };
    if !Merged(pieces).any(|piece| blocks(&piece).1 > 0) {
        let what = if path == Path::PeerToPeer {
            "a disk's DMA"
        } else {
            "direct I/O"
        };
        let longest = Merged(pieces).map(|piece| piece.length).max().unwrap_or(0);
        let evidence = format!("{longest} bytes are less than {what} moves, {block}");
        return Ok(Err((ReasonCode::BelowBlockSize, evidence)));
    }
    if let Some(why) = file.through_the_page_cache(direction, pieces) {
        return Ok(Err((ReasonCode::NoDirectIo, why)));
    }
    if path == Path::PeerToPeer
        && let Some(why) = file.several_disks(disk)
    {
        return Ok(Err((ReasonCode::SeveralDisks, why)));
    }
    let range = buffer.range().clone();
    let mapping = match buffer.mapping() {
        Ok(mapping) => mapping,
        Err(error) if range.buffer().has_stage() => {
            return Ok(Err((ReasonCode::NotMappable, error.to_string())));
        }
        Err(error) => return Err(error),
    };
    let (mut start, mut length, mut misfits, mut first) = (0, 0, 0_u64, None);
    for piece in Merged(pieces) {
        match blocks(&piece) {
            (_, 0) => {}
            (at, fits) if mapping.map().misalignment(at as usize, align as usize) == 0 => {
                if fits > length {
                    (start, length) = (at, fits);
                }
            }
            _ => {
                misfits += 1;
                first.get_or_insert(piece);
            }
        }
    }
    let misfit = first.map(|piece| {
        let at = range.offset() + piece.offset;
        let what = if piece.file_offset.is_multiple_of(block) {
            format!(
                "offset {at} of {} is not a multiple of {align} bytes",
                range.buffer()
            )
        } else {
            format!(
                "offset {} of {} is not a multiple of {block} bytes, nor does the block after it come \
                 to memory at a multiple of {align} bytes (offset {at} of {})",
                piece.file_offset,
                file.name,
                range.buffer()
            )
        };
        match pieces.len() {
            1 => what,
            all => format!("{misfits} of {all} pieces, of which the first: {what}"),
        }
    });
    Ok(match (length, misfit) {
        (0, Some(misfit)) => Err((ReasonCode::Misaligned, misfit)),
        (length, misfit) => Ok(Fitting {
            direct,
            start,
            length,
            misfit,
        }),
    })
}

#[cfg(feature = "tokio")]
pub mod tokio;

#[cfg(test)]
mod tests;
