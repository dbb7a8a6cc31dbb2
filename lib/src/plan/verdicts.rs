//! The results of proofs, and how long they are valid.
//!
//! A verdict is valid for the memory of one exporter, one disk, one direction and one path. A
//! wider or unlimited use makes wrong plans: a BAR that is too small for struct pages says
//! nothing about the same device's large BAR, and a path that worked before the card was
//! replugged may fail afterwards. A verdict is therefore dropped
//!
//! - when a transfer on the path fails,
//! - when one of the devices was removed, came back, or changed its driver,
//! - ten minutes after the proof,
//! - by [`forget_proofs`],
//! - when the cache is full and the verdict is the oldest one.
//!
//! A failure for a passing reason, such as memory (`ENOMEM`), is not kept.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::buffer::{Buffer, Identity, Kind};
use crate::path::{Direction, Path, ReasonCode};
use crate::topology::{BlockDevice, PciAddress, Stamp, Sysfs};
use crate::transfer::file::Endpoint;
use peerbuf_core::unpoisoned;

/// Lifetime of a verdict.
const BELIEVED: Duration = Duration::from_secs(600);

/// Maximum number of verdicts. Each received buffer has its own, and their number is unlimited.
const KEPT: usize = 1024;

/// The result of a proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The proof saw the bytes arrive.
    Proved,
    /// The bytes did not arrive, with the reason.
    Rejected { code: ReasonCode, evidence: String },
}

impl Verdict {
    pub(crate) fn rejected(code: ReasonCode, evidence: impl Into<String>) -> Verdict {
        Verdict::Rejected {
            code,
            evidence: evidence.into(),
        }
    }
}

/// The memory that a verdict is valid for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Memory {
    /// All exports of one BAR by one exporter, or all loans of a driver (without a BAR).
    /// Exporters differ: those of vfio-pci have no struct pages.
    Device(PciAddress, Kind, Option<u8>),
    /// One buffer, if its device does not tell the location of the bytes (graphics drivers), or
    /// if only another process named the device. A claim of another process must not affect
    /// verdicts about the device.
    Buffer(Identity),
}

impl Memory {
    fn of(buffer: &Buffer) -> Option<Memory> {
        let provenance = buffer.provenance();
        match provenance.device {
            Some(device) if buffer.is_vouched() && provenance.kind.is_device_memory() => {
                Some(Memory::Device(device, provenance.kind, provenance.bar))
            }
            _ => Some(Memory::Buffer(buffer.dmabuf()?.identity())),
        }
    }
}

/// The cache key of a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    memory: Memory,
    /// The number of the block device or filesystem. Which disk that is, is the stamp's part.
    disk: (u32, u32),
    direction: Direction,
    /// The path is part of the key because memory in a BAR may move to system memory and back.
    path: Path,
}

impl Key {
    /// `None` for memory that cannot be identified. Its verdicts are not kept.
    pub(crate) fn of(
        buffer: &Buffer,
        file: &Endpoint,
        direction: Direction,
        path: Path,
    ) -> Option<Key> {
        Some(Key {
            memory: Memory::of(buffer)?,
            disk: file.number,
            direction,
            path,
        })
    }

    /// The present incarnation of each device, which a replug or another driver changes. `disk` is the file's, as it
    /// was when the plan began.
    pub(crate) fn stamp(&self, sysfs: &Sysfs, disk: Option<&BlockDevice>) -> Vec<Stamp> {
        let peer = match self.memory {
            Memory::Device(device, ..) => Some(device),
            Memory::Buffer(_) => None,
        };
        let disk = disk.into_iter().flat_map(|disk| &disk.functions).copied();
        let functions = peer.into_iter().chain(disk);
        let mut stamps: Vec<Stamp> = functions.map(|one| sysfs.stamp(one)).collect();
        let (major, minor) = self.disk;
        stamps.push(sysfs.block_stamp(major, minor));
        stamps
    }
}

struct Entry {
    verdict: Verdict,
    stamp: Vec<Stamp>,
    at: Duration,
}

#[derive(Default)]
struct Verdicts {
    entries: HashMap<Key, Entry>,
}

impl Verdicts {
    fn get(&mut self, key: &Key, stamp: &[Stamp], now: Duration) -> Option<Verdict> {
        let entry = self.entries.get(key)?;
        if entry.stamp == stamp && now < entry.at + BELIEVED {
            return Some(entry.verdict.clone());
        }
        self.entries.remove(key);
        None
    }

    fn put(&mut self, key: Key, verdict: Verdict, stamp: Vec<Stamp>, now: Duration) {
        let is_new = |entry: &Entry| now < entry.at + BELIEVED;
        self.entries.retain(|_, entry| is_new(entry));
        if self.entries.len() >= KEPT {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.at);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.entries.remove(&oldest);
            }
        }
        let entry = Entry {
            verdict,
            stamp,
            at: now,
        };
        self.entries.insert(key, entry);
    }

    /// When the first of the valid verdicts ends, or what is kept now without one.
    fn first_end(&self, now: Duration) -> Duration {
        let ends = self.entries.values().map(|entry| entry.at + BELIEVED);
        let first = ends.filter(|&end| end > now).min();
        first.map_or(now + BELIEVED, |end| end.min(now + BELIEVED))
    }
}

/// The time since the machine started, by the clock that is read fastest: some milliseconds old.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    // Since the start of the machine both are positive.
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}

/// Until when a plan is valid that is made now from the proofs of this process. It stands on some of them, so the one
/// that ends first decides for all.
pub(crate) fn valid_until() -> Duration {
    verdicts().first_end(now())
}

/// Number of dropped proofs. Plans that are cached elsewhere depend on these proofs.
static GIVEN_UP: AtomicU64 = AtomicU64::new(0);

/// A number that changes whenever a proof is dropped.
pub(crate) fn given_up() -> u64 {
    GIVEN_UP.load(Ordering::Acquire)
}

static VERDICTS: LazyLock<Mutex<Verdicts>> = LazyLock::new(Mutex::default);

fn verdicts() -> MutexGuard<'static, Verdicts> {
    unpoisoned(VERDICTS.lock())
}

/// The valid verdict for a key.
pub(crate) fn known(key: &Key, stamp: &[Stamp]) -> Option<Verdict> {
    verdicts().get(key, stamp, now())
}

/// Keeps a verdict, unless its reason passes. `stamp` is from before the proof, so the verdict does not apply to devices
/// that came later.
pub(crate) fn keep(key: Key, stamp: Vec<Stamp>, verdict: &Verdict) {
    let lasting = match verdict {
        Verdict::Proved => true,
        Verdict::Rejected { code, .. } => matches!(
            code,
            ReasonCode::KernelRefused
                | ReasonCode::BlockLayer
                | ReasonCode::ProofFailed
                | ReasonCode::NoStructPages
        ),
    };
    if lasting {
        verdicts().put(key, verdict.clone(), stamp, now());
    }
}

/// Drops a verdict after a transfer on the path failed.
pub(crate) fn void(key: &Key) {
    verdicts().entries.remove(key);
    GIVEN_UP.fetch_add(1, Ordering::Release);
}

/// Drops every proof of this process, so that later transfers prove their path again. Call this
/// after a change that the kernel does not report as another device or driver, such as new
/// settings of a bridge or the IOMMU.
pub fn forget_proofs() {
    verdicts().entries.clear();
    GIVEN_UP.fetch_add(1, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(bar: Option<u8>) -> Key {
        let device = "ffff:00:00.0".parse().unwrap();
        Key {
            memory: Memory::Device(device, Kind::Bar, bar),
            disk: (259, 0),
            direction: Direction::DiskToBuffer,
            path: Path::PeerToPeer,
        }
    }

    #[test]
    fn a_verdict_is_believed_of_the_same_devices_for_a_while() {
        let (mut verdicts, now) = (Verdicts::default(), now());
        let stamp = |number| vec![Stamp::of_inodes(Some(number), None)];
        verdicts.put(key(Some(2)), Verdict::Proved, stamp(7), now);
        let mut get = |bar, number, later| verdicts.get(&key(bar), &stamp(number), now + later);
        let soon = Duration::from_secs(1);
        assert_eq!(get(Some(2), 7, soon), Some(Verdict::Proved));
        assert_eq!(get(Some(0), 7, soon), None, "of another BAR");
        assert_eq!(get(Some(2), 8, soon), None, "of a device that was replaced");
        assert_eq!(get(Some(2), 7, soon), None, "and of the old one");
        verdicts.put(key(Some(2)), Verdict::Proved, stamp(7), now);
        assert_eq!(verdicts.get(&key(Some(2)), &stamp(7), now + BELIEVED), None);
        assert!(verdicts.entries.is_empty());
    }

    #[test]
    fn a_plan_ends_with_the_first_proof_that_it_may_stand_on() {
        let (mut verdicts, now) = (Verdicts::default(), now());
        let minute = Duration::from_secs(60);
        assert_eq!(verdicts.first_end(now), now + BELIEVED, "without a proof");
        verdicts.put(key(Some(0)), Verdict::Proved, Vec::new(), now);
        verdicts.put(key(Some(2)), Verdict::Proved, Vec::new(), now + minute);
        assert_eq!(verdicts.first_end(now + minute), now + BELIEVED);
        assert_eq!(verdicts.first_end(now + BELIEVED), now + minute + BELIEVED);
    }

    #[test]
    fn verdicts_of_any_number_of_buffers_take_bounded_room() {
        let (mut verdicts, now) = (Verdicts::default(), now());
        let disk = |number| Key {
            disk: (259, number),
            ..key(None)
        };
        let count = KEPT as u32 + 10;
        for number in 0..count {
            let at = now + Duration::from_millis(number.into());
            verdicts.put(disk(number), Verdict::Proved, Vec::new(), at);
        }
        assert_eq!(verdicts.entries.len(), KEPT);
        assert!(verdicts.get(&disk(9), &[], now).is_none());
        assert!(verdicts.get(&disk(10), &[], now).is_some());
        verdicts.put(disk(count), Verdict::Proved, Vec::new(), now + 2 * BELIEVED);
        assert_eq!(verdicts.entries.len(), 1, "those that are too old go");
    }
}
