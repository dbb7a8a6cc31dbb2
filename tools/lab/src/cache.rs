//! What the lab has made, kept outside the checkout.
//!
//! The cache is a directory of entries named `KIND-KEY`, where the key is a hash of everything
//! that made the entry. An entry is complete or absent: it is built under another name while an
//! exclusive lock is held, and renamed. A second call that needs it waits for the first. A build
//! that was killed leaves rubbish, which the next call removes. Whoever uses an entry holds a
//! shared lock on it, so that nothing in use is removed.

use std::{
    fs::{self, File, TryLockError},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Mutex,
    time::SystemTime,
};

use anyhow::{Context, Result, anyhow};
use sha2::{Digest, Sha256};
use walkdir::WalkDir;

use crate::progress::Step;

/// The whole cache is kept below this, in bytes: whenever an entry is added. Who makes a
/// large one makes room first.
const LIMIT: u64 = 5_800_000_000;

/// The cache directory.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

/// A complete entry in use. Nothing removes it while this lives.
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
}

/// What an entry is called: a readable kind and what made it.
pub struct Recipe {
    kind: String,
    hash: Sha256,
}

impl Recipe {
    /// A recipe for a kind of thing; `kind` becomes part of a file name.
    pub fn new(kind: impl Into<String>) -> Self {
        Self {
            kind: kind.into(),
            hash: Sha256::new(),
        }
    }

    /// Adds an ingredient. The order and the borders between ingredients count.
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

/// A line of `cargo lab clean`.
#[derive(Debug, PartialEq, Eq)]
pub struct Held {
    /// The file name in the cache.
    pub name: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// Whether it was removed; if not, someone uses it.
    pub removed: bool,
}

impl Cache {
    /// The cache of this user: `$PEERBUF_LAB_CACHE`, or `peerbuf-lab` below `$XDG_CACHE_HOME` or
    /// `~/.cache`. Removes what killed builds and runs left.
    ///
    /// # Errors
    /// When the directory cannot be found out or made.
    pub fn open() -> Result<Self> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let dir = set("PEERBUF_LAB_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("peerbuf-lab")))
            .or_else(|| set("HOME").map(|d| d.join(".cache/peerbuf-lab")))
            .ok_or_else(|| {
                anyhow!(
                    "no place for the lab's cache: set PEERBUF_LAB_CACHE or HOME to a directory"
                )
            })?;
        Self::at(dir)
    }

    /// The cache in `dir`.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn at(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = std::path::absolute(dir.into())?;
        for sub in ["locks", "tmp", "runs"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path)
                .with_context(|| format!("making the lab's cache at {}", path.display()))?;
        }
        let cache = Self { dir };
        cache.sweep();
        Ok(cache)
    }

    /// Where the cache is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The entry for `recipe`, built with `build` into an empty directory if it is not there.
    ///
    /// # Errors
    /// Those of `build`, and of the file system.
    pub fn entry(
        &self,
        recipe: Recipe,
        what: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Entry> {
        let name = recipe.name();
        let path = self.dir.join(&name);
        let lock = self.lock_file(&name)?;
        loop {
            // Shared first: the common case is that the entry is there.
            lock.lock_shared()?;
            if path.exists() {
                // The time of last use decides what goes when the cache is full.
                let _ = File::open(&path).and_then(|d| d.set_modified(SystemTime::now()));
                return Ok(Entry { path, _lock: lock });
            }
            lock.unlock()?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let _step = Step::start(format!("waiting for another call that is {what}"));
                    lock.lock()?;
                }
                Err(TryLockError::Error(e)) => return Err(e.into()),
            }
            if !path.exists() {
                break;
            }
            lock.unlock()?;
        }
        let tmp = self.dir.join("tmp").join(&name);
        remove_tree(&tmp)?;
        fs::create_dir(&tmp)?;
        let step = Step::start(what);
        build(&tmp).with_context(|| what.to_owned())?;
        fs::rename(&tmp, &path)?;
        step.done();
        lock.lock_shared()?;
        self.shrink(LIMIT);
        Ok(Entry { path, _lock: lock })
    }

    /// Removes the entry for `recipe` if nobody uses it, so that it is built anew.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn forget(&self, recipe: Recipe) -> Result<()> {
        let name = recipe.name();
        match self.lock_file(&name)?.try_lock() {
            Ok(()) => remove_tree(&self.dir.join(&name)),
            Err(_) => Ok(()),
        }
    }

    /// A directory for one run, gone when the returned value is dropped (or, if the lab was
    /// killed, at the next call).
    ///
    /// # Errors
    /// When it cannot be made.
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

    /// Removes every entry that nobody uses and says what there was.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn clean(&self) -> Result<Vec<Held>> {
        let mut held = Vec::new();
        for name in self.names()? {
            let path = self.dir.join(&name);
            let bytes = disk_usage(&path);
            let lock = self.lock_file(&name)?;
            let removed = lock.try_lock().is_ok() && remove_tree(&path).is_ok();
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
            if !["locks", "tmp", "runs"].contains(&name.as_str()) {
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

    /// Removes what killed builds and runs left behind. Best effort: what is locked is alive.
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

    /// Removes the longest unused entries, so that an entry whose making takes this many bytes can
    /// be made; called with its ingredients in hand.
    pub fn make_room(&self, bytes: u64) {
        self.shrink(LIMIT.saturating_sub(bytes));
    }

    /// Removes the longest unused entries until the cache holds at most `limit` bytes.
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
        for (_, bytes, name) in entries {
            if total <= limit {
                break;
            }
            let Ok(lock) = self.lock_file(&name) else {
                continue;
            };
            if lock.try_lock().is_ok() && remove_tree(&self.dir.join(&name)).is_ok() {
                total -= bytes;
            }
        }
    }
}

/// The directory of one run.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The directories of this process's runs, for [`abandon_runs`].
static ALIVE: Mutex<Vec<(PathBuf, PathBuf)>> = Mutex::new(Vec::new());

/// Removes the directories of this process's runs; for a process that is about to end.
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

/// Removes a directory tree or file; not being there is fine.
///
/// # Errors
/// Whatever the file system says, with the path.
pub fn remove_tree(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(m) if m.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
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
        let held = cache.clean().unwrap();
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
