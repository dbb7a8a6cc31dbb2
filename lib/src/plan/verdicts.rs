//! What proofs have found, and for how long it is believed.
//!
//! A verdict is about the memory of one exporter, one disk, one direction and one path. Believing it of anything
//! else, or for ever, makes a plan that lies: a BAR too small for struct pages says nothing of the device's
//! large one, a path that worked before the card was plugged in again says nothing of it now. So a verdict goes
//!
//! - when a transfer on the path fails,
//! - when one of the devices was removed, came back, or changed its driver,
//! - ten minutes after the proof,
//! - with [`forget_proofs`],
//! - when more are kept than a machine has pairs: the oldest goes.
//!
//! What failed for a want that passes, such as memory (`ENOMEM`), is not kept at all.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::buffer::{Buffer, Identity, Kind};
use crate::path::{Direction, Path, ReasonCode};
use crate::topology::{PciAddress, Stamp, Sysfs};
use crate::transfer::file::Endpoint;
use crate::transfer::place::Place;
use peerbuf_core::unpoisoned;

/// How long a verdict is believed.
const BELIEVED: Duration = Duration::from_secs(600);

/// How many verdicts are kept. Received buffers have one each, and there may be any number of those.
const KEPT: usize = 1024;

/// What a proof found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Bytes were seen to arrive.
    Proved,
    /// They were not, and why.
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

/// Whose memory a verdict is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Memory {
    /// Exports of one BAR, or of what the driver lends (without a BAR), are alike, as far as one exporter made
    /// them: vfio-pci's have no struct pages.
    Device(PciAddress, Kind, Option<u8>),
    /// One buffer, where its device says nothing of where the bytes are (a graphics driver's), or where the
    /// device is only what another process said: a verdict about the device must not be believed of that.
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

/// What a verdict is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    memory: Memory,
    disk: Place,
    direction: Direction,
    /// Memory in a BAR may be moved to system memory and back.
    path: Path,
}

impl Key {
    /// `None` for memory that cannot be told from other memory, of which nothing is kept.
    pub(crate) fn of(
        buffer: &Buffer,
        file: &Endpoint,
        direction: Direction,
        path: Path,
    ) -> Option<Key> {
        Some(Key {
            memory: Memory::of(buffer)?,
            disk: file.place,
            direction,
            path,
        })
    }

    /// Which devices these are at this moment.
    fn stamp(&self, file: &Endpoint) -> Vec<Stamp> {
        let sysfs = Sysfs::default();
        let peer = match self.memory {
            Memory::Device(device, ..) => Some(device),
            Memory::Buffer(_) => None,
        };
        let disk = file.disk.iter().flat_map(|disk| &disk.functions).copied();
        let functions = peer.into_iter().chain(disk);
        let mut stamps: Vec<Stamp> = functions.map(|one| sysfs.stamp(one)).collect();
        let (major, minor) = self.disk.number();
        stamps.push(sysfs.block_stamp(major, minor));
        stamps
    }
}

struct Entry {
    verdict: Verdict,
    stamp: Vec<Stamp>,
    at: Instant,
}

#[derive(Default)]
struct Verdicts {
    entries: HashMap<Key, Entry>,
}

impl Verdicts {
    fn get(&mut self, key: &Key, stamp: &[Stamp], now: Instant) -> Option<Verdict> {
        let entry = self.entries.get(key)?;
        if entry.stamp == stamp && now.saturating_duration_since(entry.at) < BELIEVED {
            return Some(entry.verdict.clone());
        }
        self.entries.remove(key);
        None
    }

    fn put(&mut self, key: Key, verdict: Verdict, stamp: Vec<Stamp>, now: Instant) {
        let is_new = |entry: &Entry| now.saturating_duration_since(entry.at) < BELIEVED;
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
}

/// Counts the proofs that were given up: plans that are kept elsewhere stand on them.
static GIVEN_UP: AtomicU64 = AtomicU64::new(0);

/// A number that is another one after any proof was given up.
pub(crate) fn given_up() -> u64 {
    GIVEN_UP.load(Ordering::Acquire)
}

static VERDICTS: LazyLock<Mutex<Verdicts>> = LazyLock::new(Mutex::default);

fn verdicts() -> MutexGuard<'static, Verdicts> {
    unpoisoned(VERDICTS.lock())
}

/// The verdict that is believed of a key.
pub(crate) fn known(key: &Key, file: &Endpoint) -> Option<Verdict> {
    let stamp = key.stamp(file);
    verdicts().get(key, &stamp, Instant::now())
}

/// Keeps a verdict, if it says something of the devices.
pub(crate) fn keep(key: Key, file: &Endpoint, verdict: &Verdict) {
    let lasting = match verdict {
        Verdict::Proved => true,
        Verdict::Rejected { code, .. } => matches!(
            code,
            ReasonCode::KernelRefused | ReasonCode::ProofFailed | ReasonCode::NoStructPages
        ),
    };
    if lasting {
        let stamp = key.stamp(file);
        verdicts().put(key, verdict.clone(), stamp, Instant::now());
    }
}

/// A transfer on the path failed: what was proved is not so any more.
pub(crate) fn void(key: &Key) {
    verdicts().entries.remove(key);
    GIVEN_UP.fetch_add(1, Ordering::Release);
}

/// Forgets every proof of this process; transfers after that prove their path again. Changes that the kernel
/// does not show as another device or driver, such as a bridge's or the IOMMU's settings, need it.
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
            disk: Place::Device(259, 0),
            direction: Direction::DiskToBuffer,
            path: Path::PeerToPeer,
        }
    }

    #[test]
    fn a_verdict_is_believed_of_the_same_devices_for_a_while() {
        let (mut verdicts, now) = (Verdicts::default(), Instant::now());
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
    fn verdicts_of_any_number_of_buffers_take_bounded_room() {
        let (mut verdicts, now) = (Verdicts::default(), Instant::now());
        let disk = |number| Key {
            disk: Place::Device(259, number),
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
