//! The lab's products, kept outside the checkout.
//!
//! The cache is a directory of entries named `KIND-KEY`, where KEY is a hash of all ingredients of the entry.
//! An entry is complete or absent: it is built under another name with an exclusive lock held, and then
//! renamed. A second call that needs it waits for the first. A killed build leaves rubbish, which the next
//! call removes. A user of an entry holds a shared lock on it, so nothing in use is removed.
//!
//! Files of a complete entry can vanish or be truncated: a person deletes some, or the power fails. Beside
//! each entry is a list of its files ([`crate::seal`]). An entry that does not match its list is made again.
//!
//! `locks/` has two files for each entry NAME: the lock NAME, whose text describes the entry, and the list
//! `files-NAME`.

use std::{
    collections::HashSet,
    fs::{self, File, TryLockError},
    io::{ErrorKind, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest, Sha256};
use walkdir::WalkDir;

use crate::{
    contents,
    progress::{Step, note},
    seal,
    trouble::{self, Room, size},
};

/// The cache's maximum size in bytes, also while an entry is being made: the space that its making takes
/// ([`contents`]) is reserved before it begins.
pub const LIMIT: u64 = 5_800_000_000;

/// The cache directory.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
    /// [`LIMIT`], except in tests.
    limit: u64,
    /// The entries whose files this process has compared with their lists.
    compared: Arc<Mutex<HashSet<String>>>,
}

/// A complete entry in use. It cannot be removed while this value lives.
#[derive(Debug)]
pub struct Entry {
    path: PathBuf,
    _lock: File,
}

impl Entry {
    /// The entry's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The entry's directory, in use until this process ends.
    pub fn leak(self) -> PathBuf {
        let path = self.path.clone();
        std::mem::forget(self);
        path
    }
}

/// The identity of an entry: a readable kind, and a hash of its ingredients.
pub struct Recipe {
    kind: String,
    hash: Sha256,
    detail: Option<String>,
}

impl Recipe {
    /// A recipe for this kind of entry; `kind` becomes part of a file name.
    pub fn new(kind: impl Into<String>) -> Self {
        Self {
            kind: kind.into(),
            hash: Sha256::new(),
            detail: None,
        }
    }

    /// Adds a detail that the name lacks, such as the entry's packages. Not an ingredient.
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds an ingredient. The order of ingredients matters, and so do the boundaries between them.
    pub fn with(mut self, ingredient: impl AsRef<[u8]>) -> Self {
        let bytes = ingredient.as_ref();
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
        self
    }

    /// The entry's file name.
    pub fn name(self) -> String {
        let hex: String = self
            .hash
            .finalize()
            .iter()
            .take(6)
            .map(|b| format!("{b:02x}"))
            .collect();
        format!("{}-{hex}", self.kind)
    }
}

/// An entry as `cargo lab cache` shows it.
#[derive(Debug)]
pub struct Shown {
    /// The file name in the cache.
    pub name: String,
    /// A description.
    pub what: String,
    /// The commands that need it.
    pub why: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// The time since a command last used it.
    pub unused: Duration,
    /// Whether a command is using it.
    pub in_use: bool,
    /// The damage to its files, if any.
    pub damage: Option<String>,
}

/// The cache's contents.
#[derive(Debug)]
pub struct Listing {
    /// The complete entries, largest first.
    pub entries: Vec<Shown>,
    /// Entries being made: name, and bytes on disk so far.
    pub making: Vec<(String, u64)>,
    /// Bytes on disk of running guests, locks and notes.
    pub others: u64,
}

impl Listing {
    /// Bytes on disk in total.
    pub fn total(&self) -> u64 {
        let entries: u64 = self.entries.iter().map(|e| e.bytes).sum();
        let making: u64 = self.making.iter().map(|m| m.1).sum();
        entries + making + self.others
    }
}

/// The state of an entry.
enum State {
    Whole,
    Absent,
    Damaged(String),
}

/// A line of `cargo lab clean`.
#[derive(Debug, PartialEq, Eq)]
pub struct Held {
    /// The file name in the cache.
    pub name: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// Whether it was removed; if not, it is in use.
    pub removed: bool,
}

impl Cache {
    /// The user's cache: `$PEERBUF_LAB_CACHE`, or `peerbuf-lab` in `$XDG_CACHE_HOME` or `~/.cache`. Removes
    /// the remains of killed builds and runs.
    ///
    /// # Errors If the directory cannot be determined or made.
    pub fn open() -> Result<Self> {
        Self::at(Self::place()?)
    }

    /// The path of the user's cache, which need not exist.
    ///
    /// # Errors If the environment determines no path.
    pub fn place() -> Result<PathBuf> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        set("PEERBUF_LAB_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("peerbuf-lab")))
            .or_else(|| set("HOME").map(|d| d.join(".cache/peerbuf-lab")))
            .ok_or_else(|| {
                anyhow!(
                    "no place for the lab's cache: set PEERBUF_LAB_CACHE or HOME to a directory"
                )
            })
    }

    /// Whether the user's cache has a distribution tree.
    pub fn has_a_tree() -> bool {
        let entries = Self::place().ok().and_then(|dir| fs::read_dir(dir).ok());
        entries.is_some_and(|entries| {
            let mut names = entries.flatten().map(|e| e.file_name());
            names.any(|name| name.to_string_lossy().starts_with("tree-"))
        })
    }

    /// The cache in `dir`.
    ///
    /// # Errors If the directory cannot be made.
    pub fn at(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = std::path::absolute(dir.into())?;
        for sub in ["locks", "tmp", "runs"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).with_context(|| {
                format!(
                    "making the lab's cache at {} (PEERBUF_LAB_CACHE is the place for another one)",
                    path.display()
                )
            })?;
        }
        let cache = Self {
            dir,
            limit: LIMIT,
            compared: Arc::default(),
        };
        cache.sweep();
        Ok(cache)
    }

    /// The cache's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The entry for `recipe`; if it does not exist, `build` makes it in an empty directory.
    ///
    /// # Errors Those of `build`, and of the file system.
    pub fn entry(
        &self,
        recipe: Recipe,
        what: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Entry> {
        let detail = recipe.detail.clone();
        let name = recipe.name();
        let path = self.dir.join(&name);
        let lock = self.lock_file(&name)?;
        loop {
            // A shared lock first: usually the entry exists.
            lock.lock_shared()?;
            let state = self.state(&name);
            if matches!(state, State::Whole) {
                // The time of last use determines which entries are removed from a full cache.
                let _ = File::open(&path).and_then(|d| d.set_modified(SystemTime::now()));
                return Ok(Entry { path, _lock: lock });
            }
            lock.unlock()?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    if let State::Damaged(damage) = state
                        && lock.try_lock_shared().is_ok()
                    {
                        bail!(
                            "{name} in the lab's cache, {}, is damaged ({damage}), and another call uses it; \
                             call again when that has ended",
                            self.dir.display()
                        );
                    }
                    let _step = Step::start(format!("waiting for another call that is {what}"));
                    lock.lock()?;
                }
                Err(TryLockError::Error(e)) => return Err(e.into()),
            }
            match self.state(&name) {
                State::Whole => {}
                State::Absent => break,
                State::Damaged(damage) => {
                    note(format_args!(
                        "{name} in the lab's cache is damaged ({damage}): it is made again"
                    ));
                    remove_tree(&path)?;
                    break;
                }
            }
            lock.unlock()?;
        }
        self.make(&name, what, build)?;
        let (text, why) = self.about(&name, detail.as_deref());
        let _ = lock
            .set_len(0)
            .and_then(|()| (&lock).write_all(format!("{text}\nfor: {why}\n").as_bytes()));
        lock.lock_shared()?;
        self.shrink(self.limit);
        Ok(Entry { path, _lock: lock })
    }

    /// Makes the entry `name`, whose lock is held, in `tmp/` and then renames it.
    fn make(&self, name: &str, what: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let takes = takes_of(name);
        let tmp = self.dir.join("tmp").join(name);
        remove_tree(&tmp)?;
        fs::create_dir(&tmp).with_context(|| format!("making {}", tmp.display()))?;
        let began = self.room_for(name, what, takes);
        let made = began.and_then(|began| {
            let step = Step::start(what);
            build(&tmp).map_err(|error| {
                let failed = Room::at(&self.dir);
                trouble::of_making(
                    error,
                    what,
                    &self.dir,
                    takes,
                    began.as_ref(),
                    failed.as_ref(),
                )
            })?;
            // An entry without a list gets one at its first use.
            let _ = seal::write(&tmp, &self.list_file(name));
            let path = self.dir.join(name);
            remove_tree(&path)?;
            fs::rename(&tmp, &path)
                .with_context(|| format!("moving what was made to {}", path.display()))?;
            step.done();
            Ok(())
        });
        if made.is_err() {
            // Frees the space at once: the file system may be full.
            let _ = remove_tree(&tmp);
        }
        made
    }

    /// Frees space for `takes` bytes, if necessary; returns the file system's room.
    fn room_for(&self, name: &str, what: &str, takes: u64) -> Result<Option<Room>> {
        // The build of the debug kernel first makes another entry, and then makes room itself (`make_room`).
        if !name.starts_with("debug-") {
            self.make_room(takes);
        }
        // Other entries being made will still grow.
        let others = self.begun();
        let others: u64 = others
            .iter()
            .map(|(other, bytes)| takes_of(other).saturating_sub(*bytes))
            .sum();
        let wanted = takes + others;
        let Some(room) = Room::at(&self.dir) else {
            return Ok(None);
        };
        let room = if room.free < wanted {
            let held = self.held();
            self.shrink(held.saturating_sub(wanted - room.free));
            Room::at(&self.dir).unwrap_or(room)
        } else {
            room
        };
        match trouble::before(what, &self.dir, wanted, &room) {
            Some(error) => Err(error),
            None => Ok(Some(room)),
        }
    }

    /// Makes the entry for `recipe` again, even if it exists, once it is unused. On an error the old entry
    /// stays.
    ///
    /// # Errors Those of `build`, and of the file system.
    pub fn renew(
        &self,
        recipe: Recipe,
        what: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let name = recipe.name();
        let lock = self.lock_file(&name)?;
        lock.lock()?;
        self.make(&name, what, build)
    }

    /// Whether an entry exists and matches the list of its files. Its lock is held.
    fn state(&self, name: &str) -> State {
        let path = self.dir.join(name);
        if !path.exists() {
            return State::Absent;
        }
        let compared = || self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        if compared().contains(name) {
            return State::Whole;
        }
        match seal::compare(&path, &self.list_file(name)) {
            Some(damage) => State::Damaged(damage),
            None => {
                compared().insert(name.to_owned());
                State::Whole
            }
        }
    }

    fn list_file(&self, name: &str) -> PathBuf {
        self.dir.join("locks").join(format!("files-{name}"))
    }

    /// A description of an entry, and the commands that need it.
    fn about(&self, name: &str, detail: Option<&str>) -> (String, String) {
        if let Some((kind, of_name)) = contents::kind(name) {
            return kind.about(detail.unwrap_or(of_name));
        }
        let written = fs::read_to_string(self.dir.join("locks").join(name)).unwrap_or_default();
        match written.split_once("\nfor: ") {
            Some((what, why)) => (what.to_owned(), why.trim_end().to_owned()),
            None => (
                "nothing that this version of the lab makes".to_owned(),
                "another version, if any".to_owned(),
            ),
        }
    }

    /// The cache's contents. Compares every entry with its complete list.
    ///
    /// # Errors If the cache cannot be read.
    pub fn list(&self) -> Result<Listing> {
        let mut entries = Vec::new();
        for name in self.names()? {
            let path = self.dir.join(&name);
            let Ok(used) = fs::metadata(&path).and_then(|m| m.modified()) else {
                continue;
            };
            // The packages of `--with` are not in the entry's name.
            let packages = fs::read_to_string(path.join("packages")).ok();
            let packages = packages.map(|text| text.trim().replace('\n', ", "));
            let (what, why) = self.about(&name, packages.as_deref());
            let in_use = self.lock_file(&name)?.try_lock().is_err();
            entries.push(Shown {
                what,
                why,
                bytes: disk_usage(&path),
                unused: used.elapsed().unwrap_or_default(),
                in_use,
                damage: seal::compare_all(&path, &self.list_file(&name)),
                name,
            });
        }
        entries.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.name.cmp(&b.name)));
        Ok(Listing {
            entries,
            making: self.making(),
            others: ["locks", "runs"]
                .iter()
                .map(|sub| disk_usage(&self.dir.join(sub)))
                .sum(),
        })
    }

    /// Entries being made, with the bytes on disk so far.
    fn making(&self) -> Vec<(String, u64)> {
        let entries = fs::read_dir(self.dir.join("tmp"))
            .into_iter()
            .flatten()
            .flatten();
        entries
            .map(|e| {
                (
                    e.file_name().to_string_lossy().into_owned(),
                    disk_usage(&e.path()),
                )
            })
            .collect()
    }

    /// Entries being made that have written something. A caller that makes room before it begins does not
    /// count itself.
    fn begun(&self) -> Vec<(String, u64)> {
        let mut making = self.making();
        making.retain(|(_, bytes)| *bytes > 1 << 20);
        making
    }

    /// Bytes on disk of the complete entries.
    fn held(&self) -> u64 {
        let names = self.names().unwrap_or_default();
        names.iter().map(|n| disk_usage(&self.dir.join(n))).sum()
    }

    /// A directory for one run, removed when the result is dropped (or, if the lab was killed, by the next
    /// call).
    ///
    /// # Errors If it cannot be made.
    pub fn run_dir(&self) -> Result<RunDir> {
        for n in 0.. {
            let name = format!("{}-{n}", std::process::id());
            let lock = self.lock_file(&format!("run-{name}"))?;
            if lock.try_lock().is_err() {
                continue;
            }
            let path = self.dir.join("runs").join(&name);
            remove_tree(&path)?;
            fs::create_dir(&path)?;
            let lock_path = self.dir.join("locks").join(format!("run-{name}"));
            if let Ok(mut alive) = ALIVE.lock() {
                alive.push((path.clone(), lock_path.clone()));
            }
            return Ok(RunDir {
                path,
                lock_path,
                _lock: lock,
            });
        }
        unreachable!("the numbers do not end")
    }

    /// Removes all unused entries whose name begins with one of `wanted`, or all unused entries if it is
    /// empty. Returns the matching entries.
    ///
    /// # Errors If the cache cannot be read, or no entry matches.
    pub fn clean(&self, wanted: &[String]) -> Result<Vec<Held>> {
        let mut held = Vec::new();
        let names = self.names()?;
        for start in wanted {
            if start.is_empty() || !names.iter().any(|name| name.starts_with(start)) {
                bail!(
                    "the lab's cache, {}, holds nothing whose name begins with {start:?}; `cargo lab cache` \
                     says what it holds",
                    self.dir.display()
                );
            }
        }
        for name in names {
            if !wanted.is_empty() && !wanted.iter().any(|start| name.starts_with(start)) {
                continue;
            }
            let path = self.dir.join(&name);
            let bytes = disk_usage(&path);
            let lock = self.lock_file(&name)?;
            let removed = lock.try_lock().is_ok() && remove_tree(&path).is_ok();
            if removed {
                let _ = fs::remove_file(self.list_file(&name));
            }
            held.push(Held {
                name,
                bytes,
                removed,
            });
        }
        Ok(held)
    }

    fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)
            .with_context(|| format!("reading the lab's cache at {}", self.dir.display()))?
        {
            let name = entry?.file_name().to_string_lossy().into_owned();
            // The cache may be the root of an ext4 file system, which contains this directory.
            if !["locks", "tmp", "runs", "lost+found"].contains(&name.as_str()) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn lock_file(&self, name: &str) -> Result<File> {
        let path = self.dir.join("locks").join(name);
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening the lock {}", path.display()))
    }

    /// Removes the remains of killed builds and runs, ignoring errors. Locked files belong to live processes.
    fn sweep(&self) {
        for (sub, prefix) in [("tmp", ""), ("runs", "run-")] {
            let Ok(left) = fs::read_dir(self.dir.join(sub)) else {
                continue;
            };
            for entry in left.flatten() {
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                let Ok(lock) = self.lock_file(&name) else {
                    continue;
                };
                if lock.try_lock().is_ok() {
                    let _ = remove_tree(&entry.path());
                    if sub == "runs" {
                        let _ = fs::remove_file(self.dir.join("locks").join(&name));
                    }
                }
            }
        }
    }

    /// Removes the longest unused entries to free this many bytes for a new entry. Its ingredients are in
    /// use, so they stay.
    pub fn make_room(&self, bytes: u64) {
        let others = self.begun();
        let others: u64 = others
            .iter()
            .map(|(other, bytes)| takes_of(other).max(*bytes))
            .sum();
        self.shrink(self.limit.saturating_sub(bytes + others));
    }

    /// Removes the longest unused entries until the cache has at most `limit` bytes.
    fn shrink(&self, limit: u64) {
        let Ok(names) = self.names() else { return };
        let mut entries: Vec<_> = names
            .into_iter()
            .filter_map(|name| {
                let path = self.dir.join(&name);
                let used = fs::metadata(&path).and_then(|m| m.modified()).ok()?;
                Some((used, disk_usage(&path), name))
            })
            .collect();
        entries.sort();
        let mut total: u64 = entries.iter().map(|e| e.1).sum();
        for (used, bytes, name) in entries {
            if total <= limit {
                break;
            }
            let Ok(lock) = self.lock_file(&name) else {
                continue;
            };
            if lock.try_lock().is_ok() && remove_tree(&self.dir.join(&name)).is_ok() {
                let _ = fs::remove_file(self.list_file(&name));
                total -= bytes;
                if bytes > 10_000_000 {
                    note(format_args!(
                        "removed {name} from the lab's cache to make room: {}, last used {} ago",
                        size(bytes),
                        age(used.elapsed().unwrap_or_default())
                    ));
                }
            }
        }
    }
}

fn takes_of(name: &str) -> u64 {
    contents::kind(name).map_or(0, |(kind, _)| kind.takes)
}

/// A duration as text, in its largest unit.
pub fn age(time: Duration) -> String {
    let seconds = time.as_secs();
    let (number, unit) = match seconds {
        0..120 => (seconds, "s"),
        120..7_200 => (seconds / 60, "min"),
        7_200..172_800 => (seconds / 3_600, "h"),
        _ => (seconds / 86_400, "days"),
    };
    format!("{number} {unit}")
}

/// The directory of one run.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The directories of this process's runs, for [`abandon_runs`].
static ALIVE: Mutex<Vec<(PathBuf, PathBuf)>> = Mutex::new(Vec::new());

/// Removes the directories of this process's runs before the process ends.
pub fn abandon_runs() {
    if let Ok(alive) = ALIVE.lock() {
        for (path, lock) in &*alive {
            let _ = remove_tree(path);
            let _ = fs::remove_file(lock);
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Ok(mut alive) = ALIVE.lock() {
            alive.retain(|(path, _)| *path != self.path);
        }
        let _ = remove_tree(&self.path);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Removes a directory tree or a file; it need not exist.
///
/// # Errors Those of the file system, with the path.
pub fn remove_tree(path: &Path) -> Result<()> {
    // Tries again: programs of a killed lab end a moment after it, and may still write.
    let all = || {
        let mut tries = 0;
        loop {
            match fs::remove_dir_all(path) {
                Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty && tries < 20 => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(50));
                }
                result => return result,
            }
        }
    };
    let result = match fs::symlink_metadata(path) {
        Ok(m) if m.is_dir() => all(),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    };
    result.with_context(|| format!("removing {}", path.display()))
}

/// Bytes on disk below `path`, hard links counted once.
pub fn disk_usage(path: &Path) -> u64 {
    let mut seen = std::collections::HashSet::new();
    WalkDir::new(path)
        .into_iter()
        .flatten()
        .filter_map(|e| e.metadata().ok())
        .filter(|m| m.nlink() < 2 || m.is_dir() || seen.insert((m.dev(), m.ino())))
        .map(|m| m.blocks() * 512)
        .sum()
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    fn scratch() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        (dir, cache)
    }

    fn recipe() -> Recipe {
        Recipe::new("thing").with("made of this")
    }

    #[test]
    fn every_ingredient_and_the_borders_between_them_change_the_name() {
        let name = |parts: &[&str]| parts.iter().fold(Recipe::new("k"), |r, p| r.with(p)).name();
        assert_eq!(name(&["ab", "c"]), name(&["ab", "c"]));
        assert_ne!(name(&["ab", "c"]), name(&["a", "bc"]));
        assert_ne!(name(&["a", "b"]), name(&["b", "a"]));
        assert_ne!(name(&["a"]), name(&["a", ""]));
        assert!(name(&["a"]).starts_with("k-"));
    }

    #[test]
    fn an_entry_is_built_once_and_found_again() {
        let (_dir, cache) = scratch();
        let built = cache
            .entry(recipe(), "making a thing", |d| {
                Ok(fs::write(d.join("x"), "1")?)
            })
            .unwrap();
        let again = cache
            .entry(recipe(), "making a thing", |_| panic!("built twice"))
            .unwrap();
        assert_eq!(built.path(), again.path());
        assert_eq!(fs::read(again.path().join("x")).unwrap(), b"1");
    }

    #[test]
    fn a_failed_build_leaves_no_entry_and_the_next_call_starts_from_nothing() {
        let (_dir, cache) = scratch();
        let failed = cache.entry(recipe(), "making a thing", |d| {
            fs::write(d.join("rubbish"), "1")?;
            anyhow::bail!("no")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("making a thing: no"));
        let entry = cache
            .entry(recipe(), "making a thing", |d| {
                assert_eq!(fs::read_dir(d)?.count(), 0);
                Ok(())
            })
            .unwrap();
        assert!(entry.path().exists());
    }

    #[test]
    fn a_failed_build_leaves_no_bytes() {
        let (dir, cache) = scratch();
        let fill = |d: &Path| {
            fs::write(d.join("rubbish"), "1")?;
            anyhow::bail!("no")
        };
        cache.entry(recipe(), "making a thing", fill).unwrap_err();
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn an_entry_that_lost_a_file_is_made_again() {
        let (dir, cache) = scratch();
        let make = |cache: &Cache| {
            let fill = |d: &Path| Ok(fs::write(d.join("x"), "whole")?);
            cache.entry(recipe(), "making a thing", fill).unwrap()
        };
        let path = make(&cache).path().to_owned();
        for harm in [
            (|path: &Path| fs::write(path, "")) as fn(&Path) -> std::io::Result<()>,
            |path| fs::remove_file(path),
        ] {
            harm(&path.join("x")).unwrap();
            make(&Cache::at(dir.path()).unwrap());
            assert_eq!(fs::read(path.join("x")).unwrap(), b"whole");
        }
    }

    #[test]
    fn a_damaged_entry_that_another_call_uses_is_named_and_left_alone() {
        let (dir, cache) = scratch();
        let fill = |d: &Path| Ok(fs::write(d.join("x"), "whole")?);
        let used = cache.entry(recipe(), "making a thing", fill).unwrap();
        fs::remove_file(used.path().join("x")).unwrap();
        let again = Cache::at(dir.path())
            .unwrap()
            .entry(recipe(), "making a thing", fill);
        let text = format!("{:#}", again.unwrap_err());
        for part in ["x is missing", "another call uses it", "call again"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(used.path().exists());
    }

    #[test]
    fn renewing_keeps_the_old_entry_if_it_fails() {
        let (_dir, cache) = scratch();
        let text = |cache: &Cache| {
            let entry = cache.entry(recipe(), "making a thing", |_| panic!("it is there"));
            fs::read_to_string(entry.unwrap().path().join("x")).unwrap()
        };
        let renew = |new: &'static str| {
            cache.renew(recipe(), "making a thing", |d| {
                fs::write(d.join("x"), new)?;
                anyhow::ensure!(new != "bad", "no network");
                Ok(())
            })
        };
        renew("one").unwrap();
        assert_eq!(text(&cache), "one");
        renew("bad").unwrap_err();
        assert_eq!(text(&cache), "one");
        renew("two").unwrap();
        assert_eq!(text(&cache), "two");
    }

    #[test]
    fn the_listing_says_what_is_held_and_why_and_what_is_wrong() {
        let (dir, cache) = scratch();
        let fill = |d: &Path| Ok(fs::write(d.join("vmlinuz"), vec![1; 1 << 20])?);
        let kernel = Recipe::new("kernel-7.2.1+deb13-amd64");
        let held = cache.entry(kernel, "fetching", fill).unwrap();
        let layer = Recipe::new("with").detail("hello, fio");
        let fill = |d: &Path| Ok(fs::write(d.join("packages"), "hello\nfio\n")?);
        let layer = cache
            .entry(layer, "adding", fill)
            .unwrap()
            .path()
            .to_owned();
        fs::write(layer.join("packages"), "hello\nfio").unwrap();
        fs::create_dir(dir.path().join("foreign")).unwrap();

        let list = cache.list().unwrap();
        let [kernel, with, foreign] = &list.entries[..] else {
            panic!("{list:?}");
        };
        assert!(
            kernel.what.starts_with("kernel 7.2.1+deb13-amd64"),
            "{kernel:?}"
        );
        assert!(
            kernel.why.contains("--kernel 7.2.1+deb13-amd64"),
            "{kernel:?}"
        );
        assert!(
            kernel.in_use && kernel.bytes >= 1 << 20 && kernel.damage.is_none(),
            "{kernel:?}"
        );
        assert!(kernel.unused < Duration::from_secs(60), "{kernel:?}");
        assert!(with.what.contains("hello, fio") && !with.in_use, "{with:?}");
        assert!(
            with.damage
                .as_ref()
                .is_some_and(|d| d.contains("packages has 9 bytes")),
            "{with:?}"
        );
        assert!(
            foreign.what.contains("nothing that this version"),
            "{foreign:?}"
        );
        assert!(list.total() >= 1 << 20);

        let lock = dir
            .path()
            .join("locks")
            .join(held.path().file_name().unwrap());
        assert!(
            fs::read_to_string(lock)
                .unwrap()
                .starts_with("kernel 7.2.1+deb13-amd64:")
        );
    }

    #[test]
    fn what_another_version_made_is_described_by_its_own_words() {
        let (dir, cache) = scratch();
        fs::create_dir(dir.path().join("novelty-30270296fa72")).unwrap();
        let lock = dir.path().join("locks/novelty-30270296fa72");
        fs::write(lock, "a novelty\nfor: whoever wants it\n").unwrap();
        let list = cache.list().unwrap();
        assert_eq!(list.entries[0].what, "a novelty");
        assert_eq!(list.entries[0].why, "whoever wants it");
    }

    #[test]
    fn cleaning_by_name_takes_that_alone_and_refuses_a_name_that_is_not_there() {
        let (_dir, cache) = scratch();
        for n in ["1", "2"] {
            let recipe = Recipe::new(format!("thing{n}"));
            cache.entry(recipe, "making", |_| Ok(())).unwrap();
        }
        for wrong in ["other", ""] {
            let error = cache.clean(&[wrong.into()]).unwrap_err().to_string();
            assert!(error.contains("cargo lab cache"), "{error}");
        }
        let held = cache.clean(&["thing1".into()]).unwrap();
        assert_eq!(held.len(), 1);
        assert_eq!(cache.list().unwrap().entries.len(), 1);
    }

    #[test]
    fn the_limit_holds_while_an_entry_is_made() {
        let (_dir, mut cache) = scratch();
        cache.limit = 3_500_000;
        let make = |n: &str| {
            let fill = |d: &Path| Ok(fs::write(d.join("x"), vec![1; 1 << 20])?);
            let made = cache.entry(recipe().with(n), "making a thing", fill);
            made.unwrap().path().to_owned()
        };
        let [old, used] = ["old", "used"].map(make);
        for (path, seconds) in [(&old, 1), (&used, 2)] {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            File::open(path).unwrap().set_modified(time).unwrap();
        }
        // Making this kind of entry takes 2 MB.
        let large = Recipe::new("selftests-7.2.1").with("1");
        let see = |_: &Path| {
            assert!(!old.exists() && used.exists());
            Ok(())
        };
        cache.entry(large, "making a large thing", see).unwrap();
    }

    #[test]
    fn what_others_are_making_counts_as_what_it_will_be() {
        let (dir, mut cache) = scratch();
        cache.limit = 5_000_000;
        let fill = |d: &Path| Ok(fs::write(d.join("x"), vec![1; 1 << 20])?);
        let made = cache.entry(recipe(), "making a thing", fill);
        let made = made.unwrap().path().to_owned();
        let other = dir.path().join("tmp/selftests-7.2.1-30270296fa72");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("x"), vec![1; (1 << 20) + 1]).unwrap();
        cache.make_room(1_500_000);
        assert!(made.exists());
        cache.make_room(2_500_000);
        assert!(!made.exists());
    }

    #[test]
    fn lengths_of_time_are_for_people() {
        let of = |seconds| age(Duration::from_secs(seconds));
        assert_eq!([of(9), of(600), of(7_300)], ["9 s", "10 min", "2 h"]);
        assert_eq!(of(40 * 86_400), "40 days");
    }

    #[test]
    fn two_calls_at_once_build_once() {
        let (_dir, cache) = scratch();
        let count = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (cache, count) = (cache.clone(), count.clone());
                std::thread::spawn(move || {
                    let build = |_: &Path| {
                        count.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(100));
                        Ok(())
                    };
                    cache.entry(recipe(), "making a thing", build).unwrap();
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn opening_removes_what_a_killed_call_left_and_nothing_that_lives() {
        let (dir, cache) = scratch();
        let alive = cache.run_dir().unwrap();
        fs::create_dir(dir.path().join("tmp/dead-1")).unwrap();
        fs::create_dir(dir.path().join("runs/1-0")).unwrap();
        Cache::at(dir.path()).unwrap();
        assert!(!dir.path().join("tmp/dead-1").exists());
        assert!(!dir.path().join("runs/1-0").exists());
        assert!(alive.path().exists());
    }

    #[test]
    fn clean_removes_what_is_free_and_names_what_is_in_use() {
        let (_dir, cache) = scratch();
        let kept = cache.entry(recipe(), "making a thing", |_| Ok(())).unwrap();
        drop(
            cache
                .entry(recipe().with("2"), "making a thing", |_| Ok(()))
                .unwrap(),
        );
        let held = cache.clean(&[]).unwrap();
        assert_eq!(held.len(), 2);
        assert_eq!(held.iter().filter(|h| h.removed).count(), 1);
        assert!(kept.path().exists());
    }

    #[test]
    fn shrinking_takes_the_longest_unused_first() {
        let (_dir, cache) = scratch();
        let make = |n: &str| {
            let fill = |d: &Path| Ok(fs::write(d.join("x"), vec![1; 1 << 20])?);
            cache
                .entry(recipe().with(n), "making a thing", fill)
                .unwrap()
        };
        let old = make("old").path().to_owned();
        File::open(&old)
            .unwrap()
            .set_modified(SystemTime::UNIX_EPOCH)
            .unwrap();
        let new = make("new").path().to_owned();
        cache.shrink(1 << 20 | 1 << 16);
        assert!(!old.exists());
        assert!(new.exists());
    }
}
