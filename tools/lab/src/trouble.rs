//! Explains the usual causes of a failed step: a full file system, and an unreachable package archive.
//!
//! The programs that make the lab's parts (apt, mmdebstrap, tar, make) report the cause somewhere in forty
//! lines of output. This module recognises it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Error, anyhow};
use nix::sys::statvfs::{FsFlags, statvfs};

/// The cause of a failed step.
#[derive(Debug, PartialEq, Eq)]
enum Cause<'a> {
    /// A file system is full; the line that reports it.
    Full(&'a str),
    /// The package archive did not answer; the line that reports it.
    Unreachable(&'a str),
}

const FULL: &[&str] = &[
    "No space left on device",
    "Disk quota exceeded",
    "have enough free space in",
    "StorageFull",
];
const UNREACHABLE: &[&str] = &[
    "Temporary failure resolving",
    "Temporary failure in name resolution",
    "Could not resolve",
    "Could not connect to",
    "Cannot initiate the connection to",
    "Unable to connect to",
    "Network is unreachable",
    "No route to host",
    "Connection timed out",
    "Connection refused",
];

fn cause(text: &str) -> Option<Cause<'_>> {
    let line = |signs: &[&str]| {
        let mut lines = text.lines();
        lines.find(|line| signs.iter().any(|sign| line.contains(sign)))
    };
    // Checked first: a full file system makes downloads fail, too.
    line(FULL).map(|line| Cause::Full(line.trim())).or_else(|| {
        // The line that names the requested file is the most informative.
        let fetch = text.lines().find(|line| {
            line.contains("Failed to fetch") && UNREACHABLE.iter().any(|s| line.contains(s))
        });
        let line = fetch.or_else(|| line(UNREACHABLE))?;
        Some(Cause::Unreachable(line.trim()))
    })
}

/// The free space of a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The mount point.
    pub mount: PathBuf,
    /// Bytes available to this user.
    pub free: u64,
    /// Whether new files can be created.
    pub inodes: bool,
    /// Whether it is mounted noexec.
    pub noexec: bool,
}

/// A file system with less free space counts as full.
const NOTHING: u64 = 16_000_000;

impl Room {
    /// The free space at `path`, which need not exist. `None` if the kernel does not report it.
    pub fn at(path: &Path) -> Option<Self> {
        let there = path.ancestors().find(|p| p.exists())?;
        let there = fs::canonicalize(there).ok()?;
        let stat = statvfs(&there).ok()?;
        Some(Self {
            mount: mount_of(&fs::read_to_string("/proc/self/mountinfo").ok()?, &there),
            free: stat.blocks_available() as u64 * stat.fragment_size() as u64,
            // Some file systems do not count inodes, and report 0 of 0.
            inodes: stat.files() == 0 || stat.files_available() > 100,
            noexec: stat.flags().contains(FsFlags::ST_NOEXEC),
        })
    }

    fn is_full(&self) -> bool {
        self.free < NOTHING || !self.inodes
    }
}

/// The mount point of `path`, which is absolute and without symbolic links.
fn mount_of(mountinfo: &str, path: &Path) -> PathBuf {
    let points = mountinfo.lines().filter_map(|line| {
        let point = line.split(' ').nth(4)?;
        Some(PathBuf::from(
            point
                .replace("\\040", " ")
                .replace("\\011", "\t")
                .replace("\\134", "\\"),
        ))
    });
    points
        .filter(|point| path.starts_with(point))
        .max_by_key(|point| point.components().count())
        .unwrap_or_else(|| "/".into())
}

/// A number of bytes as text.
pub fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        ..999.5e3 => format!("{:.0} kB", bytes / 1e3),
        ..999.5e6 => format!("{:.0} MB", bytes / 1e6),
        _ => format!("{:.1} GB", bytes / 1e9),
    }
}

/// Explains that a step cannot begin, because the cache's file system has no room or is mounted noexec.
/// `None` if it can.
pub fn before(what: &str, cache: &Path, takes: u64, room: &Room) -> Option<Error> {
    let what = without_time(what);
    let mount = room.mount.display();
    let cache_dir = cache.display();
    if room.noexec {
        return Some(anyhow!(
            "{what}: the lab's cache, {cache_dir}, is on {mount}, which is mounted noexec, and the lab runs \
             programs from there. {ELSEWHERE}"
        ));
    }
    if !room.inodes {
        return Some(anyhow!(
            "{what}: the file system {mount} can hold no more files (`df -i {mount}`); the lab's cache, \
             {cache_dir}, is there. {HELP}"
        ));
    }
    (room.free < takes).then(|| {
        anyhow!(
            "{what} takes {} in the lab's cache, {cache_dir}, and its file system {mount} has {} free. {HELP}",
            size(takes),
            size(room.free)
        )
    })
}

/// A step's name without its duration: 'making a thing (two minutes)'.
fn without_time(what: &str) -> &str {
    what.split(" (").next().unwrap_or(what)
}

const ELSEWHERE: &str = "Set PEERBUF_LAB_CACHE to a directory on another one and call again";
const HELP: &str = "Make room there, or set PEERBUF_LAB_CACHE to a directory on a larger one, and call again; \
                    `cargo lab cache` says what the cache holds, `cargo lab clean` empties it";

/// Explains why making a cache entry failed. `before` and `after` are the free space of the cache's file
/// system at the start and after the failure. Any other error is returned with `what` in front.
pub fn of_making(
    error: Error,
    what: &str,
    cache: &Path,
    takes: u64,
    before: Option<&Room>,
    after: Option<&Room>,
) -> Error {
    let text = format!("{error:#}");
    let short = without_time(what);
    match cause(&text) {
        Some(Cause::Full(line)) => {
            let mount = after.map_or_else(|| cache.into(), |room| room.mount.clone());
            let free = |room: Option<&Room>| room.map_or("?".into(), |room| size(room.free));
            let enough = |room: &Room| room.inodes && room.free > takes + takes / 4;
            let files = if after.is_some_and(|room| !room.inodes) {
                " and no room for a further file (`df -i`)"
            } else {
                ""
            };
            let memory = if before.is_some_and(enough) && after.is_some_and(enough) {
                ". That is enough, so the /tmp of this step is full, which is in memory: end what else takes \
                 memory"
            } else {
                ""
            };
            anyhow!(
                "{short}: a file system is full: {line:?}\n  the lab's cache, {}, is on {}, which had {} free \
                 when this began and {} when it failed{files}; this takes {}{memory}.\n  {HELP}",
                cache.display(),
                mount.display(),
                free(before),
                free(after),
                size(takes)
            )
        }
        Some(Cause::Unreachable(line)) => anyhow!(
            "{short}: the package archive could not be reached: {line:?}\n  Making this needs the network, once: \
             later calls use the cache and no network. Check the connection, http_proxy if there is a proxy, and \
             the mirror in the host's apt sources (the lab takes the host's if it is a Debian), and call again"
        ),
        None => error.context(what.to_owned()),
    }
}

/// Explains an error that ends the lab: names the full file system, if one that the lab writes to is full.
pub fn at_the_end(error: Error, cache: Option<&Path>) -> Error {
    let text = format!("{error:#}");
    let Some(Cause::Full(_)) = cause(&text) else {
        return error;
    };
    // target/PROFILE/peerbuf-lab
    let target = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.parent()?.to_owned()));
    let places = [
        (
            cache.map(Path::to_owned),
            "the lab's cache",
            "PEERBUF_LAB_CACHE",
        ),
        (target, "what cargo builds", "CARGO_TARGET_DIR"),
        (Some(std::env::temp_dir()), "temporary files", "TMPDIR"),
    ];
    let full = places.into_iter().filter_map(|(path, what, variable)| {
        let path = path?;
        let room = Room::at(&path)?;
        room.is_full().then(|| {
            format!(
                "{}, which holds {what} ({}), has {} free: make room there, or set {variable} to a directory on \
                 another file system",
                room.mount.display(),
                path.display(),
                size(room.free)
            )
        })
    });
    let full: Vec<_> = full.collect();
    if full.is_empty() {
        return error;
    }
    anyhow!("{}\n  {}", text.trim_end(), full.join("\n  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(free: u64) -> Room {
        Room {
            mount: "/big".into(),
            free,
            inodes: true,
            noexec: false,
        }
    }

    fn making(said: &str, before: u64, after: u64) -> String {
        let (before, after) = (room(before), room(after));
        let error = anyhow!("apt ended with 100; the end of its output:\n{said}");
        let cache = Path::new("/big/cache");
        let error = of_making(
            error,
            "making a thing (two minutes)",
            cache,
            2_000_000_000,
            Some(&before),
            Some(&after),
        );
        format!("{error:#}")
    }

    #[test]
    fn a_full_file_system_is_named_with_what_is_needed_and_what_to_do() {
        for said in [
            "    tar: linux/x.c: Cannot write: No space left on device\n    tar: Exiting",
            "    E: You don't have enough free space in /var/cache/apt/archives/.",
            "    dpkg: error: failed to write (Disk quota exceeded)",
        ] {
            let text = making(said, 900_000_000, 0);
            for part in [
                "making a thing: a file system is full",
                "/big/cache, is on /big",
                "900 MB",
                "2.0 GB",
                "PEERBUF_LAB_CACHE",
                "cargo lab clean",
            ] {
                assert!(text.contains(part), "{part} in {text}");
            }
            assert!(!text.contains("in memory"), "{text}");
        }
        let text = making("write: No space left on device", 1 << 40, 1 << 40);
        assert!(text.contains("in memory"), "{text}");
    }

    #[test]
    fn an_archive_that_does_not_answer_is_told_by_its_own_words() {
        let line = "W: Failed to fetch http://a/b  Temporary failure resolving 'a'";
        let text = making(
            &format!("    Ign:1\n    {line}\n    E: no"),
            1 << 40,
            1 << 40,
        );
        assert!(
            text.contains("could not be reached") && text.contains(line),
            "{text}"
        );
        assert!(text.contains("no network"), "{text}");
        assert!(!text.contains("Err:1"), "{text}");
    }

    #[test]
    fn any_other_failure_keeps_its_own_words_and_its_type() {
        let error = of_making(
            Error::new(std::fmt::Error),
            "making a thing",
            Path::new("/"),
            0,
            None,
            None,
        );
        assert!(error.is::<std::fmt::Error>());
        assert!(format!("{error:#}").starts_with("making a thing: "));
    }

    #[test]
    fn a_step_without_room_does_not_begin() {
        let said = |room: &Room| {
            before(
                "making a thing",
                Path::new("/big/cache"),
                2_000_000_000,
                room,
            )
            .map(|error| error.to_string())
        };
        assert_eq!(said(&room(2_000_000_000)), None);
        let text = said(&room(1_999_000_000)).unwrap();
        assert!(
            text.contains("takes 2.0 GB") && text.contains("/big has 2.0 GB free"),
            "{text}"
        );
        let few = Room {
            inodes: false,
            ..room(1 << 40)
        };
        assert!(said(&few).unwrap().contains("no more files"));
        let noexec = Room {
            noexec: true,
            ..room(1 << 40)
        };
        assert!(said(&noexec).unwrap().contains("noexec"));
    }

    #[test]
    fn a_path_is_on_the_deepest_mount_above_it() {
        let info = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:3 / /mnt/a\\040b rw - tmpfs t rw\n\
                    3 1 0:4 / /mnt rw - tmpfs t rw\n";
        let of = |path| mount_of(info, Path::new(path));
        assert_eq!(of("/mnt/a b/c"), Path::new("/mnt/a b"));
        assert_eq!(of("/mnt/a"), Path::new("/mnt"));
        assert_eq!(of("/home"), Path::new("/"));
    }

    #[test]
    fn the_room_of_a_path_that_is_not_there_is_that_of_its_parents() {
        let dir = tempfile::tempdir().unwrap();
        let there = Room::at(dir.path()).unwrap();
        let room = Room::at(&dir.path().join("a/b")).unwrap();
        assert_eq!(room.mount, there.mount);
        assert!(room.free > 0);
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(size(0), "0 kB");
        assert_eq!(size(24_600_000), "25 MB");
        assert_eq!(size(2_130_000_000), "2.1 GB");
    }
}
