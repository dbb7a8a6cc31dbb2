//! Proof that a peer-to-peer path carries bytes.
//!
//! The kernel's answer is not enough: behind some bridges and with some IOMMU settings every
//! call reports success and no byte arrives. A proof therefore sends a pattern over the path,
//! in the direction of the transfer, and checks the other side by ordinary means:
//!
//! - *disk to buffer*: the proof fills the buffer with the complement of bytes that are already
//!   on the disk, reads those bytes into the buffer, and compares them with an ordinary direct
//!   read. A file's bytes that are all zero do not count: they may be a hole, which the CPU
//!   fills.
//! - *buffer to disk*: the proof writes the buffer's own bytes over their complement, and reads
//!   them back into system memory. The target is an unnamed file on the same filesystem, or a
//!   range of the disk that the caller gave up. The proof uses random bytes if the buffer's own
//!   bytes are ambiguous: a buffer full of ones looks like a bus that answers with ones.
//!
//! The proof tries the start, the end and a random place of the range. Afterwards it restores the
//! old bytes, so it destroys nothing. Nobody else may use the range meanwhile.
//!
//! A process that is killed restores nothing. A proof therefore changes as little as possible.
//! Before a read, it changes only bytes that the read overwrites. Before a write, it changes no
//! byte if the buffer's own bytes can serve as the pattern. The documentation of
//! [`Attachment::plan`](crate::import::file::Attachment::plan) states the remaining risk, and
//! [`ProofPolicy::Never`] excludes it.

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;

use super::verdicts::{self, Key, Verdict};
use crate::buffer::{BufferRange, LazyMapping};
use crate::errno::Errno;
use crate::error::{BufferError, SystemError, TransferError};
use crate::path::{Direction, ProofPolicy, ReasonCode};
use crate::sys::direct::DirectIo;
use crate::sys::memory::HostMemory;
use crate::topology::BlockDevice;
use crate::transfer::engine::host_memory;
use crate::transfer::file::{Direct, Endpoint, unnamed_file};

/// Maximum length of a trial in bytes: several pages, and several blocks of any disk.
const WINDOW: u64 = 64 << 10;

/// Number of places in a file that the proof searches for non-zero bytes.
const SEARCHED: u64 = 16;

/// The place where a proof may write.
#[derive(Debug, Clone, Default)]
pub(crate) enum Scratch {
    /// An unnamed file in the directory of the file. No place, for a raw device.
    #[default]
    Beside,
    /// An unnamed file in this directory, which is on the same filesystem.
    Directory(PathBuf),
    /// These bytes of the file or device.
    Range(Range<u64>),
}

/// The path that a proof tests, and the permissions of the proof.
pub(crate) struct Question<'a> {
    pub(crate) file: &'a Endpoint,
    /// Where the file's bytes are, as far as the kernel tells.
    pub(crate) disk: Option<&'a BlockDevice>,
    pub(crate) direct: &'a Direct,
    pub(crate) direction: Direction,
    pub(crate) scratch: &'a Scratch,
    pub(crate) policy: ProofPolicy,
    /// The start and the length of the mapping's bytes that the transfer carries directly, in
    /// memory that direct I/O accepts. A proof touches no other bytes.
    pub(crate) start: u64,
    pub(crate) length: u64,
    /// Whether the buffer has moved since the path to be proved was chosen.
    pub(crate) moved: &'a dyn Fn() -> bool,
}

/// Returns the verdict for the buffer's exporter and the file's disk, from the cache or by a
/// trial. `key` is the cache key.
pub(crate) fn verdict(
    io: &dyn DirectIo,
    question: &Question<'_>,
    buffer: &mut LazyMapping,
    key: Option<&Key>,
) -> Result<Verdict, TransferError> {
    let key = key.map(|key| (key, key.stamp(&question.file.sysfs, question.disk)));
    let known = key
        .as_ref()
        .filter(|_| question.policy != ProofPolicy::Every)
        .and_then(|(key, stamp)| verdicts::known(key, stamp));
    if let Some(verdict) = known {
        return Ok(verdict);
    }
    if question.policy == ProofPolicy::Never {
        let code = match question.direction {
            Direction::DiskToBuffer => ReasonCode::ReadUnproved,
            Direction::BufferToDisk => ReasonCode::WriteUnproved,
        };
        let evidence =
            "no proof of this path is known, and none is to be made (ProofPolicy::Never)";
        return Ok(Verdict::rejected(code, evidence));
    }
    let verdict = prove(io, question, buffer)?;
    if (question.moved)() {
        // The trial was of two places.
        let evidence =
            "the buffer moved, or access to it was taken away, while the path was proved";
        return Ok(Verdict::rejected(ReasonCode::PlacementUnknown, evidence));
    }
    if let Some((key, stamp)) = key {
        verdicts::keep(*key, stamp, &verdict);
    }
    Ok(verdict)
}

/// Tries the path. `Err` is for failures that do not depend on the path, such as no memory, or
/// a file that cannot be read at all.
fn prove(
    io: &dyn DirectIo,
    question: &Question<'_>,
    buffer: &mut LazyMapping,
) -> Result<Verdict, TransferError> {
    let Question {
        file,
        disk,
        direct,
        direction,
        scratch,
        start,
        length,
        ..
    } = *question;
    let trial = Trial {
        io,
        disk: file.describe(disk),
        pair: describe_pair(file, disk, buffer.range()),
        layer: disk.and_then(|disk| {
            let is_over = !disk.functions.is_empty();
            disk.layer.map(|layer| (disk.name.as_str(), layer, is_over))
        }),
    };
    let unit = u64::from(direct.block.max(direct.memory_align));
    let mut windows = windows(length, unit, rand::random());
    windows.iter_mut().for_each(|(at, _)| *at += start);
    match direction {
        Direction::DiskToBuffer => trial.reads(file, direct, buffer, &windows, scratch),
        Direction::BufferToDisk => trial.writes(file, direct, buffer, &windows, scratch),
    }
}

/// The parts of a buffer of `length` bytes to try: the first, the last and one between them. Offsets and lengths are
/// multiples of `unit`.
fn windows(length: u64, unit: u64, random: u64) -> Vec<(u64, u64)> {
    let size = length.min(WINDOW.next_multiple_of(unit)) / unit * unit;
    if size == 0 {
        return Vec::new();
    }
    let last = (length - size) / unit * unit;
    let mut windows = vec![(0, size)];
    // The places of the one between, from the end of the first to the start of the last.
    if let Some(room) = last.checked_sub(2 * size) {
        windows.push((size + random % (room / unit + 1) * unit, size));
    }
    if last >= size {
        windows.push((last, size));
    }
    windows
}

fn describe_pair(file: &Endpoint, disk: Option<&BlockDevice>, range: &BufferRange) -> String {
    let described = file.describe(disk);
    let buffer = range.buffer();
    let Some(peer) = buffer.provenance().device else {
        return format!("{described} and {}", buffer.name());
    };
    let bar = buffer
        .provenance()
        .bar
        .map(|bar| format!(" (BAR {bar})"))
        .unwrap_or_default();
    let mut text = format!("{described} and {peer}{bar}");
    let sysfs = &file.sysfs;
    let disk = disk.filter(|disk| disk.layer.is_none());
    if let Some([disk]) = disk.map(|disk| disk.functions.as_slice()) {
        match sysfs.common_bridge(*disk, peer) {
            Some(bridge) => text += &format!(", below the bridge {bridge}"),
            None => {
                let ports: Vec<String> = [*disk, peer]
                    .iter()
                    .filter_map(|&function| sysfs.pci_path(function).first().map(|p| p.to_string()))
                    .collect();
                if ports.len() == 2 {
                    text += &format!(", which only the host bridge joins ({})", ports.join(", "));
                }
            }
        }
    }
    text
}

struct Trial<'a> {
    io: &'a dyn DirectIo,
    /// The disk's name for messages.
    disk: String,
    /// The names of the disk and of the buffer's device for messages.
    pair: String,
    /// For a block device that is not a disk: its name, its kind, and whether a disk is below
    /// it.
    layer: Option<(&'a str, &'static str, bool)>,
}

/// Bytes on a disk, with a copy in system memory for comparison.
struct Known<'a> {
    file: Source<'a>,
    offset: u64,
    bytes: HostMemory,
    length: u64,
}

enum Source<'a> {
    Given(&'a Direct),
    Made(Box<Endpoint>),
}

impl Trial<'_> {
    fn reads(
        &self,
        file: &Endpoint,
        direct: &Direct,
        buffer: &mut LazyMapping,
        windows: &[(u64, u64)],
        scratch: &Scratch,
    ) -> Result<Verdict, TransferError> {
        let known = match self.known_bytes(file, direct, scratch)? {
            Ok(known) => known,
            Err(verdict) => return Ok(verdict),
        };
        let source = match &known.file {
            Source::Given(direct) => direct,
            Source::Made(endpoint) => match endpoint.direct() {
                Ok(direct) => direct,
                Err(why) => return Ok(Verdict::rejected(ReasonCode::ReadUnproved, why)),
            },
        };
        for &(start, size) in windows {
            let size = size.min(known.length);
            let expected = &known.bytes.bytes()[..size as usize];
            let complement: Vec<u8> = expected.iter().map(|byte| !byte).collect();
            let saved = exchange(buffer, start, &complement)?;
            let window = buffer
                .mapping()?
                .map()
                .window(start as usize, size as usize);
            let result = self.io.read(source.fd(), window, known.offset);
            let found = exchange(buffer, start, &saved)?;
            match result {
                Err(errno) => {
                    return Ok(self.refused("pread", size, Direction::DiskToBuffer, errno));
                }
                Ok(moved) if moved as u64 != size => {
                    let evidence = format!(
                        "a direct read of {size} bytes from {} gave {moved}",
                        self.disk
                    );
                    return Ok(Verdict::rejected(ReasonCode::ReadUnproved, evidence));
                }
                Ok(_) => {}
            }
            if let Some(at) = first_difference(&found, expected) {
                return Ok(self.lost(Direction::DiskToBuffer, start, at, size));
            }
        }
        Ok(Verdict::Proved)
    }

    fn writes(
        &self,
        file: &Endpoint,
        direct: &Direct,
        buffer: &mut LazyMapping,
        windows: &[(u64, u64)],
        scratch: &Scratch,
    ) -> Result<Verdict, TransferError> {
        let unproved =
            |evidence: String| Ok(Verdict::rejected(ReasonCode::WriteUnproved, evidence));
        let block = u64::from(direct.block.max(direct.memory_align));
        let mut own = own_patterns(buffer, windows, block)?;
        if own.is_empty() && !buffer.range().buffer().is_writable() {
            return unproved(
                "the buffer is read-only, so no pattern can be put in it, and its own bytes are too much alike"
                    .into(),
            );
        }
        let patterns = if own.is_empty() {
            let random = windows.iter().map(|&(start, size)| {
                let mut pattern = vec![0; size as usize];
                rand::fill(&mut pattern[..]);
                Pattern {
                    start,
                    bytes: pattern,
                    is_own: false,
                }
            });
            random.collect()
        } else {
            std::mem::take(&mut own)
        };
        let size = windows.iter().map(|(_, size)| *size).max().unwrap_or(0);
        let made;
        let (target, offset, room) = match scratch {
            Scratch::Range(range) => {
                let block = u64::from(direct.block);
                let start = range.start.next_multiple_of(block);
                (
                    direct,
                    start,
                    range.end.saturating_sub(start) / block * block,
                )
            }
            Scratch::Beside if file.is_block_device => {
                return unproved(format!(
                    "{} is a raw device: a proof would overwrite it, unless a scratch range is named",
                    file.name
                ));
            }
            Scratch::Beside | Scratch::Directory(_) => {
                made = match scratch_file(file, scratch) {
                    Ok(made) => made,
                    Err(why) => return unproved(why),
                };
                match made.direct() {
                    Ok(direct) => (direct, 0, size),
                    Err(why) => return unproved(format!("{}: {why}", made.name)),
                }
            }
        };
        let size = size.min(room);
        if size == 0 {
            return unproved("the scratch range has no whole block of the disk".into());
        }
        let mut memory = host_memory(size)?;
        for Pattern {
            start,
            bytes,
            is_own,
        } in patterns
        {
            let size = (bytes.len() as u64).min(room);
            let pattern = &bytes[..size as usize];
            // First write the complement from system memory. That shows that the file accepts
            // such writes, and a lost write cannot turn the complement into the pattern.
            for (byte, of) in memory.bytes_mut().iter_mut().zip(pattern) {
                *byte = !of;
            }
            let control = self
                .io
                .write(target.fd(), memory.window(size as usize), offset);
            if control != Ok(size as usize) {
                return unproved(format!(
                    "pwrite with O_DIRECT of {size} bytes of system memory to {}: {}",
                    self.disk,
                    outcome(control)
                ));
            }
            let saved = match is_own {
                true => None,
                false => Some(exchange(buffer, start, pattern)?),
            };
            let window = buffer
                .mapping()?
                .map()
                .window(start as usize, size as usize);
            let result = self.io.write(target.fd(), window, offset);
            if let Some(saved) = saved {
                exchange(buffer, start, &saved)?;
            }
            match result {
                Err(errno) => {
                    return Ok(self.refused("pwrite", size, Direction::BufferToDisk, errno));
                }
                Ok(moved) if moved as u64 != size => {
                    return unproved(format!(
                        "a direct write of {size} bytes to {} took {moved}",
                        self.disk
                    ));
                }
                Ok(_) => {}
            }
            rustix::fs::fdatasync(target.fd())
                .map_err(|errno| SystemError::new("fdatasync", &file.name, errno))?;
            memory.bytes_mut().fill(0);
            let back = self
                .io
                .read(target.fd(), memory.window(size as usize), offset);
            if back != Ok(size as usize) {
                return unproved(format!(
                    "pread with O_DIRECT of {size} bytes from {}: {}",
                    self.disk,
                    outcome(back)
                ));
            }
            if let Some(at) = first_difference(&memory.bytes()[..size as usize], pattern) {
                return Ok(self.lost(Direction::BufferToDisk, start, at, size));
            }
        }
        Ok(Verdict::Proved)
    }

    /// Finds bytes on the disk that cannot be mistaken for a hole, or writes some.
    fn known_bytes<'f>(
        &self,
        file: &'f Endpoint,
        direct: &'f Direct,
        scratch: &Scratch,
    ) -> Result<Result<Known<'f>, Verdict>, TransferError> {
        let block = u64::from(direct.block);
        let whole = file.size()? / block * block;
        let length = whole.min(WINDOW.next_multiple_of(block));
        if length > 0 {
            let mut bytes = host_memory(length)?;
            let last = (whole - length) / block * block;
            for step in 0..SEARCHED {
                let offset =
                    (u128::from(last) * u128::from(step) / u128::from(SEARCHED - 1)) as u64 / block
                        * block;
                let moved = self
                    .io
                    .read(direct.fd(), bytes.window(length as usize), offset);
                if moved != Ok(length as usize) {
                    let evidence = format!(
                        "pread with O_DIRECT of {length} bytes of {} into system memory: {}",
                        file.name,
                        outcome(moved)
                    );
                    return Ok(Err(Verdict::rejected(ReasonCode::ReadUnproved, evidence)));
                }
                // A raw device has no holes: its zeros come from the disk like other bytes.
                let written = if file.is_block_device {
                    length
                } else {
                    let blocks = bytes.bytes()[..length as usize].chunks_exact(block as usize);
                    blocks
                        .take_while(|block| block.iter().any(|&byte| byte != 0))
                        .count() as u64
                        * block
                };
                if written > 0 {
                    let file = Source::Given(direct);
                    return Ok(Ok(Known {
                        file,
                        offset,
                        bytes,
                        length: written,
                    }));
                }
                if last == 0 {
                    break;
                }
            }
        }
        let unproved = |why: String| {
            let evidence = format!(
                "{} has no bytes to tell from a hole, and none could be put beside it: {why}",
                file.name
            );
            Ok(Err(Verdict::rejected(ReasonCode::ReadUnproved, evidence)))
        };
        let made = match scratch_file(file, scratch) {
            Ok(made) => made,
            Err(why) => return unproved(why),
        };
        let length = WINDOW.next_multiple_of(block);
        let mut bytes = host_memory(length)?;
        rand::fill(bytes.bytes_mut());
        let direct = match made.direct() {
            Ok(direct) => direct,
            Err(why) => return unproved(why.to_owned()),
        };
        let wrote = self.io.write(direct.fd(), bytes.window(length as usize), 0);
        if wrote != Ok(length as usize) {
            return unproved(outcome(wrote));
        }
        Ok(Ok(Known {
            file: Source::Made(Box::new(made)),
            offset: 0,
            bytes,
            length,
        }))
    }

    fn refused(&self, call: &str, size: u64, direction: Direction, errno: Errno) -> Verdict {
        let (code, note) = match errno {
            Errno::INVAL | Errno::REMOTEIO | Errno::OPNOTSUPP | Errno::NOTSUPP => {
                let (code, who) = match self.layer {
                    None => (
                        ReasonCode::KernelRefused,
                        "so the kernel refuses the pair".into(),
                    ),
                    Some((name, layer, false)) => (
                        ReasonCode::BlockLayer,
                        format!("so it is {name} ({layer}) that takes no memory of a device"),
                    ),
                    Some((name, layer, true)) => (
                        ReasonCode::BlockLayer,
                        format!(
                            "so {name} ({layer}) does not pass memory of a device on, or a disk below it \
                             refuses: a transfer with that disk itself tells which"
                        ),
                    ),
                };
                let note = format!("; the same call with system memory succeeds, {who}");
                (code, note)
            }
            Errno::FAULT => (
                ReasonCode::NoStructPages,
                "; the buffer's mapping has no pages for file I/O".into(),
            ),
            _ => (ReasonCode::DeviceError, String::new()),
        };
        let pair = &self.pair;
        let evidence =
            format!("{call} with O_DIRECT of {size} bytes, {direction}: {errno} for {pair}{note}");
        Verdict::rejected(code, evidence)
    }

    fn lost(&self, direction: Direction, start: u64, at: usize, size: u64) -> Verdict {
        let evidence = format!(
            "{direction}: the call reported success, and byte {} of the buffer did not arrive \
             ({size} bytes compared at offset {start}); {}",
            start + at as u64,
            self.pair
        );
        Verdict::rejected(ReasonCode::ProofFailed, evidence)
    }
}

/// Makes an unnamed file on the file's filesystem, or returns the reason why it cannot.
fn scratch_file(file: &Endpoint, scratch: &Scratch) -> Result<Endpoint, String> {
    if file.is_block_device {
        return Err("a raw device has no directory".into());
    }
    let directory = match scratch {
        Scratch::Directory(directory) => directory.clone(),
        _ => file.directory().ok_or("its directory is not known")?,
    };
    let made = unnamed_file(&directory).map_err(|error| error.to_string())?;
    let name = format!("a scratch file in {}", directory.display());
    let mut made = Endpoint::from_fd(made.into(), name).map_err(|error| error.to_string())?;
    made.sysfs.clone_from(&file.sysfs);
    if made.number != file.number {
        return Err(format!("{} is on another filesystem", directory.display()));
    }
    // Of an XFS with a realtime device, some directories' new files are on that.
    if made.disk() != file.disk() {
        return Err(format!(
            "a new file in {} may be on another disk than {}",
            directory.display(),
            file.name
        ));
    }
    Ok(made)
}

/// The bytes that a proof expects on the disk after its write.
struct Pattern {
    /// Offset in the range.
    start: u64,
    bytes: Vec<u8>,
    /// True if the buffer already holds the pattern.
    is_own: bool,
}

/// Patterns made of the buffer's own bytes: for each window, the first unambiguous place
/// between the window and the next one.
fn own_patterns(
    buffer: &mut LazyMapping,
    windows: &[(u64, u64)],
    unit: u64,
) -> Result<Vec<Pattern>, BufferError> {
    let mut patterns = Vec::new();
    for (index, &(first, size)) in windows.iter().enumerate() {
        let next = windows.get(index + 1).map(|next| next.0);
        let room = next.map_or(0, |next| next.saturating_sub(first + size));
        for step in 0..TRIED {
            let start = first + room / TRIED * step / unit * unit;
            let mut bytes = vec![0; size as usize];
            buffer.read_at(start, &mut bytes)?;
            if can_be_told(&bytes) {
                patterns.push(Pattern {
                    start,
                    bytes,
                    is_own: true,
                });
                break;
            }
            if room == 0 {
                break;
            }
        }
    }
    Ok(patterns)
}

/// Number of places between two windows that are searched for unambiguous bytes.
const TRIED: u64 = 4;

/// True if these bytes are unambiguous: a bus that lost the request does not answer with them,
/// and no two pieces of them are equal.
fn can_be_told(bytes: &[u8]) -> bool {
    const PIECE: usize = 512;
    const DISTINCT: usize = 16;
    let varies = |piece: &[u8]| {
        let mut seen = [false; 256];
        piece
            .iter()
            .for_each(|&byte| seen[usize::from(byte)] = true);
        seen.iter().filter(|&&seen| seen).count() >= DISTINCT.min(piece.len())
    };
    let mut pieces = HashSet::new();
    bytes
        .chunks(PIECE)
        .all(|piece| varies(piece) && pieces.insert(piece))
}

/// Writes `new` at `offset` and returns the previous bytes.
fn exchange(buffer: &mut LazyMapping, offset: u64, new: &[u8]) -> Result<Vec<u8>, BufferError> {
    let mut old = vec![0; new.len()];
    buffer.read_at(offset, &mut old)?;
    buffer.write_at(offset, new)?;
    Ok(old)
}

fn first_difference(one: &[u8], other: &[u8]) -> Option<usize> {
    one.iter().zip(other).position(|(a, b)| a != b)
}

fn outcome(result: Result<usize, Errno>) -> String {
    match result {
        Ok(moved) => format!("{moved} bytes moved"),
        Err(errno) => errno.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::direct::Kernel;

    #[test]
    fn a_refusal_names_the_layer_that_refuses() {
        for (layer, expected, said) in [
            (
                None,
                ReasonCode::KernelRefused,
                "the kernel refuses the pair",
            ),
            (
                Some(("loop0", "a loop device", false)),
                ReasonCode::BlockLayer,
                "loop0 (a loop device) that takes no memory of a device",
            ),
            (
                Some(("dm-0", "device mapper", true)),
                ReasonCode::BlockLayer,
                "dm-0 (device mapper) does not pass memory of a device on, or a disk below",
            ),
        ] {
            let trial = Trial {
                io: &Kernel::default(),
                disk: "the disk".into(),
                pair: "the pair".into(),
                layer,
            };
            let verdict = trial.refused("pread", 512, Direction::DiskToBuffer, Errno::REMOTEIO);
            let Verdict::Rejected { code, evidence } = verdict else {
                panic!("proved");
            };
            assert_eq!(code, expected);
            assert!(evidence.contains(said), "{evidence}");
        }
    }

    #[test]
    fn the_windows_are_the_first_the_last_and_one_between() {
        let last = (1 << 20) - 65_536;
        let between = last - 2 * 65_536;
        for (random, expected) in [(0, 65_536), (3, 65_536 + 3 * 512), (u64::MAX, 0)] {
            let found = windows(1 << 20, 512, random);
            assert_eq!((found[0], found[2]), ((0, 65_536), (last, 65_536)));
            let (at, size) = found[1];
            assert!(found.len() == 3 && size == 65_536 && at.is_multiple_of(512));
            assert!((65_536..=65_536 + between).contains(&at), "{at}");
            assert!(expected == 0 || at == expected, "{at}");
        }
        assert_eq!(
            windows(3 * 65_536, 512, 7),
            [(0, 65_536), (65_536, 65_536), (2 * 65_536, 65_536)]
        );
        assert_eq!(windows(2 * 65_536, 512, 7), [(0, 65_536), (65_536, 65_536)]);
        assert_eq!(windows(65_536, 512, 7), [(0, 65_536)]);
        assert_eq!(windows(70_000, 512, 7), [(0, 65_536)]);
        assert_eq!(windows(700, 512, 7), [(0, 512)]);
        assert_eq!(windows(511, 512, 7), []);
    }

    #[test]
    fn bytes_that_can_be_mistaken_are_no_pattern() {
        let mut random = vec![0; 65_536];
        rand::fill(&mut random[..]);
        assert!(can_be_told(&random));
        assert!(can_be_told(&random[..700]));
        for byte in [0, 0x5a, 0xff] {
            assert!(!can_be_told(&[byte; 512]), "all {byte}");
        }
        let (page, twice) = (&random[..4096], [&random[..4096], &random[..4096]].concat());
        assert!(
            can_be_told(page) && !can_be_told(&twice),
            "of another place"
        );
        let mut hole = random.clone();
        hole[8192..8704].fill(0);
        assert!(!can_be_told(&hole), "a block of zeros");
    }
}
