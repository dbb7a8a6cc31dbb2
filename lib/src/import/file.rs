//! Files and block devices: reading from a disk into a buffer, and writing from a buffer to it.
//!
//! A disk's own DMA engine moves the bytes wherever the buffer's memory and the file allow
//! `O_DIRECT` between them. For device memory that is peer-to-peer DMA, and it is used only once
//! it was seen to work; see [`crate::plan`].

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use super::{Attached, Importer};
use crate::buffer::{Access, BufferRange, LazyMapping, Mapping};
use crate::error::{BufferError, ImportError, SystemError, TransferError};
use crate::path::ProofPolicy;
use crate::plan::proof::{self, Question, Scratch as ScratchSpace};
use crate::plan::{self, Direction, Key, Path, Plan, Reason, ReasonCode, Verdict};
use crate::sys::direct::{DirectIo, Kernel};
use crate::topology::PciAddress;
use crate::transfer::Receipt;
use crate::transfer::engine;
use crate::transfer::file::{Direct, Endpoint};

pub use crate::transfer::file::unnamed_file;

/// An open file or block device that buffers can be attached to. Clones are the same open file.
#[derive(Clone)]
#[doc(alias = "O_DIRECT")]
pub struct FileImporter {
    endpoint: Arc<Endpoint>,
    scratch: ScratchSpace,
    policy: ProofPolicy,
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

    /// Opens an existing regular file or block device for what will be done with it, and nothing more.
    ///
    /// Opening for writing has consequences by itself: an overlay (the root of a container) copies the whole
    /// file, a program that runs refuses (`ETXTBSY`), and udev looks at a disk again when it is closed.
    ///
    /// # Errors
    /// As [`FileImporter::open`].
    pub fn open_for(
        path: impl AsRef<FilePath>,
        access: Access,
    ) -> Result<FileImporter, TransferError> {
        Ok(FileImporter::new(Endpoint::open(path.as_ref(), access)?))
    }

    /// Takes an open file, which need not have a name in any directory. `name` is for people.
    ///
    /// The descriptor is used as it is: its access mode decides what can be done, and neither its position nor
    /// its flags are changed, which others may share. For direct I/O it is opened a second time, by way of
    /// `/proc`. A process that has no right to do so gives a descriptor that is open with `O_DIRECT`, by which
    /// whole blocks are moved without another one.
    ///
    /// # Errors
    /// As [`FileImporter::open`].
    pub fn from_fd(fd: OwnedFd, name: impl Into<String>) -> Result<FileImporter, TransferError> {
        Ok(FileImporter::new(Endpoint::from_fd(fd, name.into())?))
    }

    fn new(endpoint: Endpoint) -> FileImporter {
        FileImporter {
            endpoint: Arc::new(endpoint),
            scratch: ScratchSpace::default(),
            policy: ProofPolicy::default(),
            io: Arc::new(Kernel),
        }
    }

    /// Lets proofs make a file without a name in `directory`, which must be on the same
    /// filesystem. Without this they use the file's own directory.
    #[must_use]
    pub fn with_scratch_directory(mut self, directory: impl Into<PathBuf>) -> FileImporter {
        self.scratch = ScratchSpace::Directory(directory.into());
        self
    }

    /// Gives up these bytes of the file or device: proofs overwrite them. On a raw device it is
    /// the only way to prove, and so to use, peer-to-peer writes.
    #[must_use]
    pub fn with_scratch_range(mut self, bytes: Range<u64>) -> FileImporter {
        self.scratch = ScratchSpace::Range(bytes);
        self
    }

    /// Says when proofs may be made, which touch bytes of the range ([`Attachment::plan`]).
    ///
    /// A program that knows when nobody uses a buffer proves then, with [`Attachment::plan`], and transfers with
    /// [`ProofPolicy::Never`].
    #[must_use]
    pub fn with_proofs(mut self, policy: ProofPolicy) -> FileImporter {
        self.policy = policy;
        self
    }

    /// The size in bytes at this moment.
    ///
    /// # Errors
    /// The call that failed.
    pub fn size(&self) -> Result<u64, TransferError> {
        self.endpoint.size()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.endpoint.name
    }

    /// The PCI functions of the disk that holds it; empty where there is no such disk.
    pub fn disk_functions(&self) -> &[PciAddress] {
        self.endpoint
            .disk
            .as_ref()
            .map_or(&[], |disk| &disk.functions)
    }

    /// What direct I/O on it needs: the alignment of memory and of offsets, in bytes. `None`
    /// where there is no direct I/O.
    pub fn alignment(&self) -> Option<(u32, u32)> {
        self.endpoint
            .direct()
            .ok()
            .map(|direct| (direct.memory_align, direct.block))
    }

    /// Makes what was written durable (`fdatasync`).
    ///
    /// # Errors
    /// The call's error, which is how a disk reports a write that it lost.
    pub fn sync(&self) -> Result<(), TransferError> {
        let failed = |errno| SystemError::new("fdatasync", &self.endpoint.name, errno);
        Ok(rustix::fs::fdatasync(self.endpoint.staged()).map_err(failed)?)
    }

    /// Brings the range and the file together. Nothing is mapped or tried, and no byte moves yet.
    ///
    /// The attachment keeps the file open, and the importer may be dropped before it.
    ///
    /// # Errors
    /// [`BufferError::Inherited`] for a buffer that was lent to a process from which this one was forked.
    pub fn attach(&self, range: &BufferRange) -> Result<Attachment, TransferError> {
        Ok(Attachment {
            importer: self.clone(),
            buffer: LazyMapping::new(range)?,
            require: Path::StagedCopy,
        })
    }
}

/// A file and a buffer's range, brought together.
///
/// The range is mapped when a path first needs it: for direct I/O, and for copies of a buffer without a
/// [`Stage`](crate::buffer::Stage). A buffer that cannot be mapped and has a stage goes by staged copies.
#[derive(Debug)]
pub struct Attachment {
    importer: FileImporter,
    buffer: LazyMapping,
    require: Path,
}

impl Attachment {
    /// Refuses transfers on a path worse than this one, instead of falling back.
    #[must_use]
    pub fn require(mut self, path: Path) -> Self {
        self.require = path;
        self
    }

    /// What was attached.
    pub fn range(&self) -> &BufferRange {
        self.buffer.range()
    }

    /// The mapping, made now if there is none yet, for the CPU to look at between transfers.
    ///
    /// # Errors
    /// [`BufferError::NotMappable`], or the call that failed.
    pub fn mapping(&mut self) -> Result<&mut Mapping, BufferError> {
        self.buffer.mapping()
    }

    /// Chooses the path that a transfer of the whole range to or from `file_offset` would take.
    ///
    /// The first time for a pair of devices and a direction (see [`ProofPolicy`]) this proves the peer-to-peer
    /// path, as [`Attachment::read`] and [`Attachment::write`] do. Nobody else may use the range meanwhile:
    ///
    /// - from disk to buffer, up to 192 KiB of the range are overwritten with bytes of the file, and put back;
    /// - from buffer to disk, the range's own bytes are written to scratch space. Only if they are too much
    ///   alike to be told from a failure, random bytes take their place, likewise.
    ///
    /// A process that is killed in the middle puts nothing back: up to 64 KiB, in one place, are then not what
    /// they were. In a [`read`](Attachment::read) they are bytes that it was to overwrite.
    ///
    /// # Errors
    /// [`TransferError`] for what has nothing to do with the path, such as a file that cannot be
    /// read at all, or a range that may not be written.
    pub fn plan(&mut self, direction: Direction, file_offset: u64) -> Result<Plan, TransferError> {
        let (plan, _) = self.choose(direction, file_offset, self.buffer.len())?;
        if plan.path < self.require {
            return Err(TransferError::PathTooPoor { plan });
        }
        Ok(plan)
    }

    /// Fills the range with the file's bytes from `file_offset` on, or with as many as there
    /// are: [`Receipt::bytes`] says, and what comes after them is untouched.
    ///
    /// # Errors
    /// The call that failed. An unknown part of the range has then been overwritten.
    pub fn read(&mut self, file_offset: u64) -> Result<Receipt, TransferError> {
        let direction = Direction::DiskToBuffer;
        self.importer.endpoint.may_read()?;
        let buffer = self.buffer.range().buffer();
        if !buffer.is_writable() {
            let object = buffer.name().to_owned();
            return Err(BufferError::Access {
                object,
                wanted: "write",
            }
            .into());
        }
        let left = self.importer.size()?.saturating_sub(file_offset);
        self.carry(direction, file_offset, left.min(self.buffer.len()))
    }

    /// Writes all of the range to the file, from `file_offset` on. The bytes are durable after
    /// [`FileImporter::sync`].
    ///
    /// # Errors
    /// [`TransferError::ReadOnly`], [`TransferError::Appending`] or [`TransferError::WholeBlocksOnly`], with
    /// nothing written; [`TransferError::ShortWrite`], or the call that failed: an unknown part of the file's
    /// range has then been overwritten.
    pub fn write(&mut self, file_offset: u64) -> Result<Receipt, TransferError> {
        let length = self.buffer.len();
        self.importer.endpoint.may_write(file_offset, length)?;
        self.carry(Direction::BufferToDisk, file_offset, length)
    }

    fn carry(
        &mut self,
        direction: Direction,
        file_offset: u64,
        length: u64,
    ) -> Result<Receipt, TransferError> {
        let (mut plan, key) = self.choose(direction, file_offset, length)?;
        if plan.path < self.require {
            return Err(TransferError::PathTooPoor { plan });
        }
        let file = &self.importer.endpoint;
        let io = &*self.importer.io;
        let (mut bytes, mut host_bytes) = (0, 0);
        if let (Path::PeerToPeer | Path::SharedHostMemory, Ok(direct)) = (plan.path, file.direct())
        {
            let whole = length / u64::from(direct.block) * u64::from(direct.block);
            // The disk's engine knows nothing of the buffer's fences: whoever else writes it, or reads what
            // is overwritten, has to be done first, as before a copy by the processor.
            let access = match direction {
                Direction::DiskToBuffer => Access::Write,
                Direction::BufferToDisk => Access::Read,
            };
            let bracket = self.buffer.mapping()?.begin_cpu_access(access)?;
            let mapping = bracket.mapping();
            let (carried, result) =
                engine::direct(io, direct, mapping, 0, file_offset, whole, direction);
            bracket.end()?;
            bytes = carried.bytes;
            if plan.path == Path::SharedHostMemory {
                host_bytes = bytes;
            }
            if let Err(errno) = result {
                // The path worked when it was proved and has stopped working. The rest goes the
                // way that always works; if the disk is what failed, that will say so.
                if let Some(key) = &key {
                    plan::void(key);
                }
                let call = format!(
                    "{direction}, after {bytes} of {length} bytes: {errno} for {} and {}",
                    file.describe_disk(),
                    self.buffer.range().buffer()
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
            if carried.ended {
                return Ok(Receipt {
                    plan,
                    bytes,
                    host_bytes,
                });
            }
        }
        if bytes < length {
            let (at, from) = (bytes, file_offset + bytes);
            let rest = length - bytes;
            let carried = engine::staged(io, file, &mut self.buffer, at, from, rest, direction)?;
            bytes += carried.bytes;
            host_bytes += carried.bytes;
        }
        Ok(Receipt {
            plan,
            bytes,
            host_bytes,
        })
    }

    fn choose(
        &mut self,
        direction: Direction,
        file_offset: u64,
        length: u64,
    ) -> Result<(Plan, Option<Key>), TransferError> {
        let buffer = self.buffer.range().buffer().clone();
        // The best path that the buffer's memory can have, and why not a better one. A memfd has
        // pages that the kernel can pin; whether a dma-buf's own mapping has them is seen by trial,
        // as is whether device memory can be reached.
        let Plan { mut reasons, .. } = Plan::in_place(&buffer);
        reasons.retain(|reason| reason.code == ReasonCode::NotDeviceMemory);
        let best = if reasons.is_empty() {
            Path::PeerToPeer
        } else {
            Path::SharedHostMemory
        };
        let pinnable = best == Path::SharedHostMemory && buffer.host_memory().is_some();
        let file = Arc::clone(&self.importer.endpoint);
        let key = Key::of(&buffer, &file, direction, best);
        let how = (best, direction);
        let rejected = match direct_io(&file, &mut self.buffer, how, file_offset, length)? {
            Err((code, evidence)) => Some((code, evidence)),
            Ok(_) if pinnable => None,
            Ok(direct) => {
                let question = Question {
                    file: &file,
                    direct,
                    direction,
                    scratch: &self.importer.scratch,
                    policy: self.importer.policy,
                    length,
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
        if length > 0 {
            // A plan that nothing could carry out is none.
            self.buffer.reach()?;
        }
        let plan = Plan {
            path: Path::StagedCopy,
            reasons,
        };
        Ok((plan, key))
    }
}

/// Files of a directory, as an [`Importer`] like others: bytes go into a range, and out of it, by way of a file
/// without a name, as a disk moves them.
#[derive(Debug, Clone)]
pub struct Scratch {
    directory: PathBuf,
}

impl Scratch {
    /// Files are made in this directory. Nothing is left there.
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

/// Whether direct I/O can carry this transfer, as far as alignment and the file decide, and whether there is a mapping. `Err`
/// for a buffer whose bytes cannot be reached at all.
fn direct_io<'f>(
    file: &'f Endpoint,
    buffer: &mut LazyMapping,
    how: (Path, Direction),
    file_offset: u64,
    length: u64,
) -> Result<Result<&'f Direct, (ReasonCode, String)>, BufferError> {
    let direct = match blocks_fit(file, how, file_offset, length) {
        Ok(direct) => direct,
        Err(reason) => return Ok(Err(reason)),
    };
    let range = buffer.range().clone();
    let mapping = match buffer.mapping() {
        Ok(mapping) => mapping,
        Err(error) if range.buffer().has_stage() => {
            return Ok(Err((ReasonCode::NotMappable, error.to_string())));
        }
        Err(error) => return Err(error),
    };
    let align = direct.memory_align;
    if mapping.map().misalignment(0, align as usize) != 0 {
        let evidence = format!(
            "offset {} of {} is not a multiple of {align} bytes",
            range.offset(),
            range.buffer()
        );
        return Ok(Err((ReasonCode::Misaligned, evidence)));
    }
    Ok(Ok(direct))
}

fn blocks_fit(
    file: &Endpoint,
    (path, direction): (Path, Direction),
    file_offset: u64,
    length: u64,
) -> Result<&Direct, (ReasonCode, String)> {
    let direct = file
        .direct()
        .map_err(|why| (ReasonCode::NoDirectIo, format!("{}: {why}", file.name)))?;
    let block = direct.block;
    if !file_offset.is_multiple_of(u64::from(block)) {
        let evidence = format!(
            "offset {file_offset} of {} is not a multiple of {block} bytes",
            file.name
        );
        return Err((ReasonCode::Misaligned, evidence));
    }
    if length < u64::from(block) {
        let what = if path == Path::PeerToPeer {
            "a disk's DMA"
        } else {
            "direct I/O"
        };
        let evidence = format!("{length} bytes are less than {what} moves, {block}");
        return Err((ReasonCode::BelowBlockSize, evidence));
    }
    if let Some(why) = file.through_the_page_cache(direction, file_offset, length) {
        return Err((ReasonCode::NoDirectIo, why));
    }
    if path == Path::PeerToPeer
        && let Some(why) = file.several_disks()
    {
        return Err((ReasonCode::SeveralDisks, why));
    }
    Ok(direct)
}

#[cfg(feature = "tokio")]
pub mod tokio;

#[cfg(test)]
mod tests;
