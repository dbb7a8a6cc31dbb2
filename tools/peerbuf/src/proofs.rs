//! The verdicts of `peerbuf prove`, kept in files.
//!
//! `why` and `doctor` show a kept verdict with its age. No transfer relies on it, because each
//! process proves its own paths. A proof is valid while its preconditions are unchanged
//! ([`Ground`]): the devices, the BAR, the bridges between them, and the versions of the
//! drivers and the kernel. An invalid proof is not shown, and the next proof of the pair
//! removes it.
//!
//! Each pair has a file in `$XDG_CACHE_HOME/peerbuf/proofs/MACHINE` (default `~/.cache`).
//! MACHINE separates machines that share a home directory. An administrator can create
//! [`SHARED`], in which all users with write permission share their proofs. That folder must
//! belong to root and must not be writable for everybody.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use peerbuf_topo::machine::{Acs, Driver, Function, Index, Iommu, Machine};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The folder that an administrator can create for all users.
pub const SHARED: &str = "/var/cache/peerbuf/proofs";

/// Maximum size of a proof in bytes.
const LARGEST: u64 = 64 << 10;

/// The direction of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The device wrote to the memory.
    In,
    /// The device read from the memory.
    Out,
}

/// The observed results of one device's use of another device's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    ground: Ground,
    /// The device writes to the memory.
    into: Option<Seen>,
    /// The device reads from the memory.
    out_of: Option<Seen>,
}

/// The observed result in one direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Seconds since 1970.
    at: u64,
    /// True if the bytes arrived.
    pub arrived: bool,
    /// The reason code, if the bytes did not arrive.
    pub code: Option<String>,
    /// The evidence, for people.
    pub evidence: String,
}

/// The preconditions of a proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ground {
    client: Device,
    provider: Device,
    /// Number and size of the provider's BARs.
    bars: Option<Vec<(u8, u64)>>,
    /// The bridges from the client up to the root, and those from the provider.
    bridges: [Vec<Bridge>; 2],
    /// The kernel: `uname -r` and `uname -v`.
    kernel: [String; 2],
    /// The options of the kernel's command line that affect DMA.
    options: Option<Vec<String>>,
    /// The version of peerbuf.ko, which exports the memory.
    module: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Device {
    address: String,
    id: Option<(u16, u16)>,
    driver: Option<Driver>,
    /// The version of the driver's module, or a checksum of the module's source.
    version: Option<String>,
    /// The type of the device's IOMMU domain.
    iommu: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Bridge {
    address: String,
    id: Option<(u16, u16)>,
    /// `None` if the reader had no root privileges.
    acs: Option<Acs>,
}

impl Proof {
    /// A proof without a verdict, on the present preconditions.
    pub fn now(machine: &Machine, client: Index, provider: Index) -> Proof {
        Proof {
            ground: Ground::now(machine, client, provider),
            into: None,
            out_of: None,
        }
    }

    /// The result in one direction.
    pub fn seen(&self, way: Way) -> Option<&Seen> {
        match way {
            Way::In => self.into.as_ref(),
            Way::Out => self.out_of.as_ref(),
        }
    }

    /// Adds the result in one direction.
    pub fn add(&mut self, way: Way, seen: Seen) {
        match way {
            Way::In => self.into = Some(seen),
            Way::Out => self.out_of = Some(seen),
        }
    }

    /// A direction in which bytes did not arrive, if there is one.
    pub fn failed(&self) -> Option<&Seen> {
        let both = [&self.into, &self.out_of].into_iter().flatten();
        both.clone().find(|seen| !seen.arrived)
    }

    /// True if bytes arrived in both directions.
    pub fn is_whole(&self) -> bool {
        let arrived = |seen: &Option<Seen>| seen.as_ref().is_some_and(|seen| seen.arrived);
        arrived(&self.into) && arrived(&self.out_of)
    }

    fn is_empty(&self) -> bool {
        self.into.is_none() && self.out_of.is_none()
    }

    /// Merges the other proof: the later result of each direction wins.
    fn merge(&mut self, other: Proof) {
        for (mine, theirs) in [
            (&mut self.into, other.into),
            (&mut self.out_of, other.out_of),
        ] {
            if mine.as_ref().map(|seen| seen.at) < theirs.as_ref().map(|seen| seen.at) {
                *mine = theirs;
            }
        }
    }

    /// False if a text has control characters, which a terminal would obey. A file may contain
    /// anything.
    fn is_plain(&self) -> bool {
        let seen = [&self.into, &self.out_of].into_iter().flatten();
        let mut texts = seen.flat_map(|seen| [Some(&seen.evidence), seen.code.as_ref()]);
        texts.all(|text| text.is_none_or(|text| !text.chars().any(char::is_control)))
    }
}

impl Seen {
    /// The result for bytes that have just arrived.
    pub fn arrived(evidence: String) -> Seen {
        Seen {
            at: seconds(SystemTime::now()),
            arrived: true,
            code: None,
            evidence,
        }
    }

    /// The result for bytes that have just not arrived.
    pub fn failed(code: &str, evidence: String) -> Seen {
        Seen {
            at: seconds(SystemTime::now()),
            arrived: false,
            code: Some(code.to_owned()),
            evidence,
        }
    }

    /// The age, for people.
    pub fn age(&self) -> String {
        let now = seconds(SystemTime::now());
        match now.checked_sub(self.at) {
            Some(age) => ago(Duration::from_secs(age)),
            None => "at a time to come, by this machine's clock".into(),
        }
    }

    /// The age in seconds; `None` for a time in the future.
    pub fn age_seconds(&self) -> Option<u64> {
        seconds(SystemTime::now()).checked_sub(self.at)
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    let (count, unit) = match seconds {
        0..60 => return "just now".into(),
        60..3600 => (seconds / 60, "minute"),
        3600..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {unit}{plural} ago")
}

impl Ground {
    fn now(machine: &Machine, client: Index, provider: Index) -> Ground {
        let bridges = |of: Index| {
            let above = machine.upwards(of).filter(|index| *index != of);
            above
                .map(|index| {
                    let function = machine.function(index);
                    Bridge {
                        address: function.address.to_string(),
                        id: function.id,
                        acs: function.acs,
                    }
                })
                .collect()
        };
        let bars = machine.function(provider).bars.as_ref();
        let kernel = |name: &str| {
            let text = fs::read_to_string(Path::new("/proc/sys/kernel").join(name));
            text.unwrap_or_default().trim().to_owned()
        };
        Ground {
            client: Device::now(machine.function(client)),
            provider: Device::now(machine.function(provider)),
            bars: bars.map(|bars| bars.iter().map(|bar| (bar.index, bar.size)).collect()),
            bridges: [bridges(client), bridges(provider)],
            kernel: ["osrelease", "version"].map(kernel),
            options: machine.options.clone(),
            module: version_of("peerbuf"),
        }
    }

    /// True if nothing has changed. ACS bits that one of the two could not read do not count as
    /// a change.
    fn holds(&self, now: &Ground) -> bool {
        let mut then = self.clone();
        for (old, new) in then
            .bridges
            .iter_mut()
            .flatten()
            .zip(now.bridges.iter().flatten())
        {
            if old.acs.is_none() || new.acs.is_none() {
                old.acs = new.acs;
            }
        }
        then == *now
    }
}

impl Device {
    fn now(function: &Function) -> Device {
        let version = match &function.driver {
            Some(Driver::Bound(driver)) => version_of(driver),
            _ => None,
        };
        let iommu = match &function.iommu {
            Some(Iommu::None) => Some("none".to_owned()),
            Some(Iommu::Group { domain, .. }) => domain.clone(),
            None => None,
        };
        Device {
            address: function.address.to_string(),
            id: function.id,
            driver: function.driver.clone(),
            version,
            iommu,
        }
    }
}

/// The version of a driver's module. The kernel's version covers a driver that is built into
/// the kernel.
fn version_of(driver: &str) -> Option<String> {
    let module = Path::new("/sys/module").join(driver.replace('-', "_"));
    ["version", "srcversion"]
        .iter()
        .find_map(|name| fs::read_to_string(module.join(name)).ok())
        .map(|text| text.trim().to_owned())
}

/// The folders, the user's own first.
pub struct Folders(Vec<PathBuf>);

/// This user's folder, and the administrator's folder if it can be trusted.
pub static FOLDERS: LazyLock<Folders> = LazyLock::new(Folders::of_this_user);

impl Folders {
    fn of_this_user() -> Folders {
        let absolute = |name: &str| {
            let value = std::env::var_os(name).map(PathBuf::from);
            value.filter(|path| path.is_absolute())
        };
        let cache =
            absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        let own = cache.map(|cache| cache.join("peerbuf/proofs"));
        let shared = Some(PathBuf::from(SHARED)).filter(|path| is_trusted(path));
        let machine = machine();
        Folders(
            own.into_iter()
                .chain(shared)
                .map(|path| path.join(&machine))
                .collect(),
        )
    }

    /// The proof of a pair that is valid for the present preconditions.
    pub fn find(&self, machine: &Machine, client: Index, provider: Index) -> Option<Proof> {
        let name = file_name([client, provider].map(|index| machine.function(index)));
        let kept: Vec<Proof> = self
            .0
            .iter()
            .filter_map(|folder| read(&folder.join(&name)))
            .collect();
        if kept.is_empty() {
            return None;
        }
        let mut known = Proof::now(machine, client, provider);
        for proof in kept {
            if proof.ground.holds(&known.ground) {
                known.merge(proof);
            }
        }
        (!known.is_empty()).then_some(known)
    }

    /// Keeps a proof in each folder that permits it. Returns the files, and the errors of the
    /// other folders.
    pub fn keep(
        &self,
        machine: &Machine,
        client: Index,
        provider: Index,
        proof: &Proof,
    ) -> (Vec<PathBuf>, Option<String>) {
        let name = file_name([client, provider].map(|index| machine.function(index)));
        let (mut kept, mut why_not) = (Vec::new(), None);
        for folder in &self.0 {
            let file = folder.join(&name);
            let mut all = proof.clone();
            if let Some(before) = read(&file).filter(|old| old.ground.holds(&proof.ground)) {
                all.merge(before);
            }
            match write(folder, &file, &all) {
                Ok(()) => kept.push(file),
                Err(error) => {
                    why_not.get_or_insert(format!("{}: {error}", file.display()));
                }
            }
        }
        if self.0.is_empty() {
            why_not = Some("neither XDG_CACHE_HOME nor HOME names a folder".into());
        }
        (kept, why_not)
    }
}

/// One name for each pair, so that the pair's next proof replaces an outdated one.
fn file_name([client, provider]: [&Function; 2]) -> String {
    format!("{}-uses-{}.json", client.address, provider.address)
}

/// A name for this machine, which separates machines that share a home directory without
/// revealing the machine's id.
fn machine() -> String {
    let known = ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"]
        .iter()
        .find_map(|path| {
            fs::read_to_string(path)
                .ok()
                .filter(|text| !text.trim().is_empty())
        });
    let digest = Sha256::digest(format!(
        "peerbuf proofs {}",
        known.unwrap_or_default().trim()
    ));
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// True if an administrator made the folder and limits the writers.
fn is_trusted(folder: &Path) -> bool {
    let metadata = fs::symlink_metadata(folder);
    metadata.is_ok_and(|folder| folder.is_dir() && is_administrators(folder.uid(), folder.mode()))
}

fn is_administrators(owner: u32, mode: u32) -> bool {
    owner == 0 && mode & 0o002 == 0
}

/// The proof in a file; `None` for any other file.
fn read(path: &Path) -> Option<Proof> {
    // Not a pipe that another user put there.
    if !fs::symlink_metadata(path).ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    let file = fs::File::open(path).ok()?;
    file.take(LARGEST).read_to_string(&mut text).ok()?;
    let proof: Proof = serde_json::from_str(&text).ok()?;
    proof.is_plain().then_some(proof)
}

/// Replaces the file atomically: readers see the old file or the new one.
fn write(folder: &Path, file: &Path, proof: &Proof) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let new = folder.join(format!(".{:016x}", rand::random::<u64>()));
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&new)?;
    let written = out
        .write_all(&serde_json::to_vec(proof)?)
        .and_then(|()| fs::rename(&new, file));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerbuf_topo::machine::{Bar, Format};
    use serde_json::json;

    fn bar(size: u64) -> Bar {
        let bar = json!({
            "index": 2, "size": size, "address_bits": 32, "is_64bit": true, "prefetchable": true,
        });
        serde_json::from_value(bar).unwrap()
    }

    /// A disk and a card below one bridge.
    fn machine() -> Machine {
        let function = |text: &str| Function::at(text.parse().unwrap());
        let mut machine = Machine::empty(Format::Sysfs);
        let host = json!({ "name": "pci0000:00", "complete": true, "certain": true });
        machine.hosts = vec![serde_json::from_value(host).unwrap()];
        let mut card = function("0000:03:00.0");
        card.bars = Some(vec![bar(64 << 20)]);
        card.driver = Some(Driver::Bound("peerbuf".into()));
        let mut bridge = function("0000:01:00.0");
        bridge.acs = Some(Acs::Control(0));
        machine.functions = vec![bridge, function("0000:02:00.0"), card];
        for below in &mut machine.functions[1..] {
            (below.parent, below.depth) = (Some(Index(0)), 1);
        }
        machine
    }

    const DISK: Index = Index(1);
    const CARD: Index = Index(2);

    fn folder(name: &str) -> Folders {
        let path = std::env::temp_dir().join(format!("peerbuf-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Folders(vec![path])
    }

    fn proved(machine: &Machine) -> Proof {
        let mut proof = Proof::now(machine, DISK, CARD);
        proof.add(Way::In, Seen::arrived("a page".into()));
        proof.add(Way::Out, Seen::failed("proof-failed", "byte 7".into()));
        proof
    }

    #[test]
    fn a_proof_is_kept_until_something_changes_that_it_stands_on() {
        let (folders, machine) = (folder("ground"), machine());
        let proof = proved(&machine);
        let (kept, why_not) = folders.keep(&machine, DISK, CARD, &proof);
        assert_eq!((kept.len(), why_not), (1, None));
        assert_eq!(folders.find(&machine, DISK, CARD), Some(proof));
        assert_eq!(folders.find(&machine, CARD, DISK), None, "the other way");
        type Change = fn(&mut Machine);
        let changes: [(&str, Change); 7] = [
            ("the disk", |now| now.functions[1].id = Some((1, 2))),
            ("the card's driver", |now| {
                now.functions[2].driver = Some(Driver::None)
            }),
            ("the BAR", |now| now.functions[2].bars = Some(vec![bar(1)])),
            ("a bridge", |now| now.functions[0].id = Some((1, 2))),
            ("ACS", |now| now.functions[0].acs = Some(Acs::Control(4))),
            ("the path", |now| now.functions[2].parent = None),
            ("the IOMMU", |now| {
                now.functions[1].iommu = Some(Iommu::None)
            }),
        ];
        for (what, change) in changes {
            let mut now = machine.clone();
            change(&mut now);
            assert_eq!(folders.find(&now, DISK, CARD), None, "{what}");
        }
        let mut other = proved(&machine);
        other.ground.kernel[0] += "-other";
        folders.keep(&machine, DISK, CARD, &other);
        assert_eq!(folders.find(&machine, DISK, CARD), None, "the kernel");
        // A user who may not read ACS bits still sees root's proof.
        folders.keep(&machine, DISK, CARD, &proved(&machine));
        let mut mine = machine.clone();
        mine.functions[0].acs = None;
        assert!(folders.find(&mine, DISK, CARD).is_some());
        fs::remove_dir_all(&folders.0[0]).unwrap();
    }

    #[test]
    fn a_direction_that_was_not_tried_again_keeps_its_verdict_and_a_later_one_wins() {
        let (folders, machine) = (folder("merge"), machine());
        let mut old = proved(&machine);
        old.into.as_mut().unwrap().at -= 100;
        old.out_of.as_mut().unwrap().at -= 100;
        folders.keep(&machine, DISK, CARD, &old);
        let mut new = Proof::now(&machine, DISK, CARD);
        new.add(Way::Out, Seen::arrived("now".into()));
        folders.keep(&machine, DISK, CARD, &new);
        let found = folders.find(&machine, DISK, CARD).unwrap();
        assert!(found.is_whole() && found.failed().is_none(), "{found:?}");
        assert!(found.into.unwrap().age().contains("minute"));
        fs::remove_dir_all(&folders.0[0]).unwrap();
    }

    #[test]
    fn what_is_no_proof_is_not_shown() {
        let (folders, machine) = (folder("foreign"), machine());
        let (kept, _) = folders.keep(&machine, DISK, CARD, &proved(&machine));
        let text = fs::read_to_string(&kept[0]).unwrap();
        for bad in [
            String::new(),
            text[..text.len() / 2].to_owned(),
            text.replace("byte 7", "\\u001b[2J"),
            format!("{}{text}", " ".repeat(LARGEST as usize)),
        ] {
            fs::write(&kept[0], bad).unwrap();
            assert_eq!(folders.find(&machine, DISK, CARD), None);
        }
        fs::remove_file(&kept[0]).unwrap();
        fs::create_dir(&kept[0]).unwrap();
        assert_eq!(folders.find(&machine, DISK, CARD), None);
        let (kept, why_not) = folders.keep(&machine, DISK, CARD, &proved(&machine));
        assert!(kept.is_empty() && why_not.is_some());
        let left = fs::read_dir(&folders.0[0]).unwrap().count();
        assert_eq!(left, 1, "no temporary file stays");
        fs::remove_dir_all(&folders.0[0]).unwrap();
    }

    #[test]
    fn a_folder_that_anybody_may_write_is_no_administrator_s() {
        assert!(is_administrators(0, 0o40_2775));
        assert!(!is_administrators(0, 0o40_1777), "anybody may write there");
        assert!(!is_administrators(1000, 0o40_755), "a user's");
        assert!(!is_trusted(&std::env::temp_dir()));
    }

    #[test]
    fn ages_are_words() {
        for (seconds, said) in [
            (0, "just now"),
            (60, "1 minute ago"),
            (7_199, "1 hour ago"),
            (172_800, "2 days ago"),
        ] {
            assert_eq!(ago(Duration::from_secs(seconds)), said);
        }
    }
}
