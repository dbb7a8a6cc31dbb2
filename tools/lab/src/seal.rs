//! The list of a cache entry's files, which detects files that vanished or were truncated.
//!
//! Checking all 45,000 files of a tree takes a quarter of a second with a warm cache, and many seconds from
//! disk. So each use checks only the first files in the list: large ones, and those near the top, such as
//! programs and libraries. `cargo lab cache` checks all, and so does the first use after a boot, since a
//! power failure truncates many files.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::{Component, Path},
};

use walkdir::WalkDir;

/// The first line is this text, followed by the ID of the boot in which all files were last checked.
const FORMAT: &str = "peerbuf-lab files 1 ";
/// The last line; a list without it was itself truncated.
const END: &str = "end";

/// Files of at least this size are checked at each use.
const LARGE: u64 = 1 << 20;
/// Files with at most this many path components below the entry are checked at each use: root/usr/bin/make,
/// root/usr/lib/x86_64-linux-gnu/libc.so.6.
const NEAR: usize = 5;

/// Paths that programs in the tree may change.
const CHANGES: &[&str] = &["root/var/cache", "root/var/log", "root/tmp", "root/run"];

fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Writes the list `list` of the files in `dir`.
///
/// # Errors Those of the file system.
pub fn write(dir: &Path, list: &Path) -> io::Result<()> {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    let all = WalkDir::new(dir)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(|e| {
            let below = e.path().strip_prefix(dir).unwrap_or(e.path());
            !CHANGES.iter().any(|changes| below == Path::new(changes))
        });
    for entry in all {
        let entry = entry?;
        if !entry.file_type().is_file() && !entry.file_type().is_symlink() {
            continue;
        }
        let below = entry.path().strip_prefix(dir).unwrap_or(entry.path());
        let Some(name) = below.to_str().filter(|name| !name.contains('\n')) else {
            continue;
        };
        let bytes = entry.metadata()?.len();
        let line = format!("{bytes} {name}");
        if bytes >= LARGE || entry.depth() <= NEAR {
            first.push(line);
        } else {
            rest.push(line);
        }
    }
    let mut text = format!("{FORMAT}{}\n", boot());
    for line in first.iter().chain([&String::new()]).chain(&rest) {
        text += line;
        text.push('\n');
    }
    text += END;
    text.push('\n');
    replace(list, text.as_bytes())
}

/// Replaces a file atomically: a reader finds the old or the new version.
fn replace(file: &Path, text: &[u8]) -> io::Result<()> {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = Path::new(&name);
    let written = File::create(new).and_then(|to| {
        let mut to = BufWriter::new(to);
        to.write_all(text)?;
        to.flush()?;
        fs::rename(new, file)
    });
    if written.is_err() {
        let _ = fs::remove_file(new);
    }
    written
}

/// The damage to the entry in `dir`, if any is found. An entry without a list gets one.
pub fn compare(dir: &Path, list: &Path) -> Option<String> {
    let Ok(file) = File::open(list) else {
        let _ = write(dir, list);
        return is_empty(dir);
    };
    let mut lines = BufReader::new(file).lines().map_while(Result::ok);
    let head = lines.next().unwrap_or_default();
    let Some(booted) = head.strip_prefix(FORMAT) else {
        let _ = write(dir, list);
        return is_empty(dir);
    };
    if booted == boot() {
        return lines
            .take_while(|line| !line.is_empty())
            .find_map(|line| wrong(dir, &line));
    }
    let whole = fs::read_to_string(list).is_ok_and(|text| text.ends_with(&format!("\n{END}\n")));
    let damage = match whole {
        true => compare_all(dir, list),
        false => is_empty(dir),
    };
    if damage.is_none() {
        let _ = write(dir, list);
    }
    damage
}

/// The damage to any file of the entry in `dir`.
pub fn compare_all(dir: &Path, list: &Path) -> Option<String> {
    let Ok(text) = fs::read_to_string(list) else {
        return is_empty(dir);
    };
    let mut damages = text
        .lines()
        .skip(1)
        .filter(|line| !line.is_empty() && *line != END)
        .filter_map(|line| wrong(dir, line));
    let first = damages.next()?;
    match damages.count() {
        0 => Some(first),
        more => Some(format!("{first}; {more} files more")),
    }
}

/// The damage to the file in a line of the list.
fn wrong(dir: &Path, line: &str) -> Option<String> {
    let (bytes, name) = line.split_once(' ')?;
    let bytes: u64 = bytes.parse().ok()?;
    // The list itself may be damaged.
    let below = Path::new(name);
    if !below
        .components()
        .all(|c| matches!(c, Component::Normal(_)))
    {
        return None;
    }
    match fs::symlink_metadata(dir.join(below)) {
        Ok(found) if found.len() == bytes => None,
        Ok(found) => Some(format!("{name} has {} bytes and had {bytes}", found.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(format!("{name} is missing")),
        Err(error) => Some(format!("{name} cannot be looked at: {error}")),
    }
}

/// An empty entry is damaged.
fn is_empty(dir: &Path) -> Option<String> {
    let empty = fs::read_dir(dir).is_ok_and(|mut files| files.next().is_none());
    empty.then(|| "it is empty".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry with a program, and a small and a large file in deep directories.
    fn entry() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (made, list) = (dir.path().join("made"), dir.path().join("files-made"));
        fs::create_dir_all(made.join("a/b/c/d/e")).unwrap();
        fs::create_dir_all(made.join("root/var/log")).unwrap();
        fs::write(made.join("program"), "12345").unwrap();
        fs::write(made.join("a/b/c/d/e/small"), "123").unwrap();
        fs::write(made.join("a/b/c/d/e/large"), vec![1; LARGE as usize]).unwrap();
        fs::write(made.join("root/var/log/x"), "1").unwrap();
        std::os::unix::fs::symlink("program", made.join("link")).unwrap();
        write(&made, &list).unwrap();
        (dir, made, list)
    }

    #[test]
    fn a_whole_entry_matches_its_list_whatever_is_added_or_logged() {
        let (_dir, made, list) = entry();
        fs::write(made.join("mount-point"), "").unwrap();
        fs::write(made.join("root/var/log/x"), "22").unwrap();
        assert_eq!(compare(&made, &list), None);
        assert_eq!(compare_all(&made, &list), None);
    }

    #[test]
    fn each_use_notices_what_is_near_or_large_and_a_listing_everything() {
        let (_dir, made, list) = entry();
        fs::write(made.join("a/b/c/d/e/small"), "").unwrap();
        assert_eq!(compare(&made, &list), None);
        assert_eq!(
            compare_all(&made, &list).unwrap(),
            "a/b/c/d/e/small has 0 bytes and had 3"
        );
        fs::write(made.join("a/b/c/d/e/large"), "").unwrap();
        assert!(compare(&made, &list).unwrap().contains("e/large has 0"));
        fs::remove_file(made.join("link")).unwrap();
        assert!(compare_all(&made, &list).unwrap().ends_with("2 files more"));
    }

    #[test]
    fn after_a_start_of_the_machine_every_file_is_looked_at_once() {
        let (_dir, made, list) = entry();
        let text = fs::read_to_string(&list).unwrap();
        let before = text.replacen(&boot(), "another", 1);
        fs::write(&list, &before).unwrap();
        assert_eq!(compare(&made, &list), None);
        assert_eq!(fs::read_to_string(&list).unwrap(), text);

        fs::write(&list, &before).unwrap();
        fs::remove_file(made.join("a/b/c/d/e/small")).unwrap();
        assert_eq!(compare(&made, &list).unwrap(), "a/b/c/d/e/small is missing");
    }

    #[test]
    fn an_entry_without_a_list_or_with_half_of_one_gets_one_unless_it_is_empty() {
        let (dir, made, list) = entry();
        let text = fs::read_to_string(&list).unwrap();
        let half = format!("{FORMAT}another\n5 prog");
        for rubbish in ["", "what?\n", &half] {
            fs::write(&list, rubbish).unwrap();
            assert_eq!(compare(&made, &list), None);
            assert_eq!(fs::read_to_string(&list).unwrap(), text);
        }
        fs::remove_file(&list).unwrap();
        assert_eq!(compare(&made, &list), None);
        assert_eq!(fs::read_to_string(&list).unwrap(), text);

        let empty = dir.path().join("empty");
        fs::create_dir(&empty).unwrap();
        let none = dir.path().join("files-empty");
        assert_eq!(compare(&empty, &none).unwrap(), "it is empty");
    }
}
