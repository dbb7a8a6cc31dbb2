//! Files and descriptors of other owners: a transfer does what the descriptor allows, and
//! changes nothing else of the owner's.
//!
//! Some tests need a feature that a machine may lack: a mount namespace, an overlay, direct
//! I/O. They report their name on standard error, which the test harness does not capture.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::not_run;
use peerbuf::error::TransferError;
use peerbuf::export::memfd;
use peerbuf::import::Importer;
use peerbuf::import::cpu::Processor;
use peerbuf::import::file::{FileImporter, Scratch};
use peerbuf::plan::{self, ReasonCode};
use peerbuf::{Access, Buffer};
use rustix::fs::OFlags;

mod common;

/// The variable that marks a test's second process.
const INSIDE: &str = "PEERBUF_TEST_INSIDE";

fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::fill(&mut bytes[..]);
    bytes
}

fn memory(bytes: &[u8]) -> Buffer {
    let buffer = memfd::export("memory", bytes.len() as u64).unwrap();
    buffer.whole().write_bytes(bytes).unwrap();
    buffer
}

/// A directory beside the test program, where direct I/O most likely works.
fn directory() -> tempfile::TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

fn file_in(directory: &Path, bytes: &[u8]) -> PathBuf {
    let path = directory.join("file");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn has_direct_io(path: &Path) -> bool {
    FileImporter::open(path).unwrap().alignment().is_some()
}

/// Runs the test `name` again in a separate process with a mount namespace. Returns true in
/// that process.
fn in_a_mount_namespace(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    // A user without root privileges may mount in a user namespace.
    let root = rustix::process::geteuid().is_root();
    let options = if root { "-m" } else { "-Urm" };
    match Command::new("unshare").args([options, "true"]).output() {
        Ok(tried) if tried.status.success() => {}
        tried => {
            not_run(name, format!("`unshare {options}` fails: {tried:?}"));
            return false;
        }
    }
    let program = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args([options, "--propagation", "private", "--"])
        .arg(program)
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    false
}

fn mount(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("mount").args(arguments).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        other => Err(format!("mount {arguments:?}: {other:?}")),
    }
}

#[test]
fn a_write_through_a_descriptor_for_appending_is_refused_and_nothing_is_written() {
    writes_through_a_descriptor_for_appending_are_refused(&directory());
}

/// A tmpfs opens files with O_DIRECT and has no direct I/O, so the library opens the file again without the flag.
#[test]
fn a_write_through_a_descriptor_for_appending_is_refused_where_there_is_no_direct_io() {
    writes_through_a_descriptor_for_appending_are_refused(
        &tempfile::tempdir_in("/dev/shm").unwrap(),
    );
}

fn writes_through_a_descriptor_for_appending_are_refused(directory: &tempfile::TempDir) {
    let before = random(20_000);
    let path = file_in(directory.path(), &before);
    let appending = OpenOptions::new()
        .read(true)
        .append(true)
        .open(&path)
        .unwrap();
    for (fd, length) in [
        (appending.try_clone().unwrap(), 10_000),
        (appending, 8192),
        (
            OpenOptions::new()
                .read(true)
                .append(true)
                .custom_flags(OFlags::DIRECT.bits() as i32)
                .open(&path)
                .unwrap_or_else(|_| OpenOptions::new().append(true).open(&path).unwrap()),
            8192,
        ),
    ] {
        let buffer = memory(&random(length));
        let file = FileImporter::from_fd(fd.into(), "the log").unwrap();
        let mut attachment = file.attach(&buffer.whole()).unwrap();
        let error = attachment.write(0).unwrap_err();
        assert!(matches!(error, TransferError::Appending { .. }), "{error}");
        assert!(error.to_string().contains("O_APPEND"), "{error}");
        assert!(std::fs::read(&path).unwrap() == before, "{length} bytes");
    }
}

#[test]
fn appending_that_others_ask_for_later_is_noticed() {
    let directory = directory();
    let before = random(20_000);
    let path = file_in(directory.path(), &before);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let importer = FileImporter::from_fd(file.try_clone().unwrap().into(), "the file").unwrap();
    let bytes = random(10_000);
    let buffer = memory(&bytes);
    let mut attachment = importer.attach(&buffer.whole()).unwrap();
    attachment.write(4096).unwrap();
    let flags = rustix::fs::fcntl_getfl(&file).unwrap();
    rustix::fs::fcntl_setfl(&file, flags | OFlags::APPEND).unwrap();
    let refused = attachment.write(0);
    assert!(matches!(refused, Err(TransferError::Appending { .. })));
    let mut expected = before;
    expected[4096..14_096].copy_from_slice(&bytes);
    assert!(std::fs::read(&path).unwrap() == expected);
}

#[test]
fn a_descriptor_that_is_shared_keeps_its_position_and_its_flags() {
    let directory = directory();
    let bytes = random(20_000);
    let path = file_in(directory.path(), &bytes);
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let mut direct = options.clone();
    direct.custom_flags(OFlags::DIRECT.bits() as i32);
    for options in [options, direct] {
        let Ok(mut file) = options.open(&path) else {
            not_run(
                "a_descriptor_that_is_shared_keeps_its_position_and_its_flags",
                "no O_DIRECT",
            );
            continue;
        };
        file.seek(SeekFrom::Start(512)).unwrap();
        let flags = rustix::fs::fcntl_getfl(&file).unwrap();
        let importer = FileImporter::from_fd(file.try_clone().unwrap().into(), "a file").unwrap();
        assert_eq!(importer.size().unwrap(), 20_000);
        let buffer = memory(&[0; 10_000]);
        let mut attachment = importer.attach(&buffer.whole()).unwrap();
        attachment.read(0).unwrap();
        attachment.write(0).unwrap();
        assert_eq!(importer.size().unwrap(), 20_000);
        assert_eq!(file.stream_position().unwrap(), 512);
        assert_eq!(rustix::fs::fcntl_getfl(&file).unwrap(), flags);
    }
}

#[test]
fn reading_copies_no_file_into_an_overlay() {
    if !in_a_mount_namespace("reading_copies_no_file_into_an_overlay") {
        return;
    }
    let scratch = directory();
    let at = scratch.path().display().to_string();
    // The filesystem has less room than the file has bytes.
    mount(&["-t", "tmpfs", "-o", "size=256k", "none", &at]).unwrap();
    for name in ["upper", "work", "merged"] {
        std::fs::create_dir(scratch.path().join(name)).unwrap();
    }
    let lower = directory();
    let bytes = random(1 << 20);
    let held = file_in(lower.path(), &bytes);
    let options = format!(
        "lowerdir={},upperdir={at}/upper,workdir={at}/work",
        lower.path().display()
    );
    let merged = format!("{at}/merged");
    if let Err(why) = mount(&["-t", "overlay", "-o", &options, "none", &merged]) {
        not_run("reading_copies_no_file_into_an_overlay", why);
        return;
    }
    let seen = Path::new(&merged).join("file");
    let file = FileImporter::open(&seen).unwrap();
    let buffer = memory(&[0; 65_536]);
    let receipt = file.attach(&buffer.whole()).unwrap().read(8192).unwrap();
    assert_eq!(receipt.bytes, 65_536);
    assert!(buffer.whole().to_vec().unwrap() == bytes[8192..73_728]);
    let copied = std::fs::read_dir(scratch.path().join("upper"))
        .unwrap()
        .count();
    assert_eq!(copied, 0, "{} was copied", held.display());
    // Opening the file for writing copies it, for which there is no room. The error says so.
    let refused = FileImporter::open_for(&seen, Access::ReadWrite).unwrap_err();
    assert!(refused.to_string().contains("ENOSPC"), "{refused}");
}

#[test]
fn a_program_that_runs_can_be_read() {
    let directory = directory();
    let program = directory.path().join("sleep");
    let sleep = ["/bin/sleep", "/usr/bin/sleep"]
        .iter()
        .find(|path| Path::new(path).exists());
    let Some(sleep) = sleep else {
        not_run("a_program_that_runs_can_be_read", "no program `sleep`");
        return;
    };
    // Another process makes the copy. A descriptor for writing in this process could be
    // inherited by a child that another test forks at this moment, and then starting the
    // program would fail.
    let copied = Command::new("cp").arg(sleep).arg(&program).status();
    assert!(copied.unwrap().success());
    let mut running = Command::new(&program).arg("60").spawn().unwrap();
    let file = FileImporter::open(&program);
    let for_writing = FileImporter::open_for(&program, Access::ReadWrite);
    running.kill().unwrap();
    running.wait().unwrap();
    let file = file.unwrap();
    let bytes = std::fs::read(&program).unwrap();
    let buffer = memory(&vec![0; bytes.len()]);
    file.attach(&buffer.whole()).unwrap().read(0).unwrap();
    assert!(buffer.whole().to_vec().unwrap() == bytes);
    let refused = for_writing.unwrap_err().to_string();
    assert!(refused.contains("ETXTBSY"), "{refused}");
}

#[test]
fn a_descriptor_does_what_it_was_opened_for_and_says_what_it_was_not() {
    let directory = directory();
    let path = file_in(directory.path(), &random(20_000));
    let bytes = random(10_000);
    let buffer = memory(&bytes);
    let file = FileImporter::open_for(&path, Access::Write).unwrap();
    let mut attachment = file.attach(&buffer.whole()).unwrap();
    attachment.write(0).unwrap();
    assert!(std::fs::read(&path).unwrap()[..10_000] == bytes);
    let refused = attachment.read(0);
    assert!(
        matches!(refused, Err(TransferError::WriteOnly { .. })),
        "{refused:?}"
    );
    let file = FileImporter::open(&path).unwrap();
    let refused = file.attach(&buffer.whole()).unwrap().write(0);
    assert!(
        matches!(refused, Err(TransferError::ReadOnly { .. })),
        "{refused:?}"
    );
}

/// Runs the test `name` again as a user who may not open `file`, which becomes standard input.
/// Returns true in that process.
fn without_rights(name: &str, file: OwnedFd) -> bool {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .current_dir("/")
        .stdin(file);
    if rustix::process::geteuid().is_root() {
        command.uid(65_534).gid(65_534);
    }
    let output = command.stderr(Stdio::inherit()).output();
    match output {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{text}");
            true
        }
        Err(error) => {
            not_run(name, format!("as another user: {error}"));
            false
        }
    }
}

fn bytes_of(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 7 + at / 512) as u8).collect()
}

#[test]
fn a_descriptor_without_the_right_to_open_the_file_again_reads_and_writes() {
    let name = "a_descriptor_without_the_right_to_open_the_file_again_reads_and_writes";
    let given = || std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    if std::env::var_os(INSIDE).is_none() {
        let directory = directory();
        for flags in [OFlags::empty(), OFlags::DIRECT] {
            let path = file_in(directory.path(), &bytes_of(20_000));
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            let file = options.custom_flags(flags.bits() as i32).open(&path);
            let Ok(file) = file else {
                not_run(name, "no O_DIRECT");
                continue;
            };
            std::fs::set_permissions(&path, Permissions::from_mode(0o000)).unwrap();
            if !without_rights(name, file.into()) {
                return;
            }
            std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            let mut expected = bytes_of(20_000);
            let (head, _) = expected.split_at_mut(8192);
            head.copy_from_slice(&bytes_of(16_384)[8192..]);
            assert!(std::fs::read(&path).unwrap() == expected);
        }
        return;
    }
    let direct = rustix::fs::fcntl_getfl(given())
        .unwrap()
        .contains(OFlags::DIRECT);
    let file = FileImporter::from_fd(given(), "the file").unwrap();
    assert_eq!(file.size().unwrap(), 20_000);
    let bytes = bytes_of(20_000);
    // Whole blocks, edges of blocks, and the end of the file.
    for (offset, length) in [(8192, 8192), (5, 3), (4095, 9000), (16_384, 9000)] {
        let buffer = memory(&vec![0xaa; length]);
        let receipt = file.attach(&buffer.whole()).unwrap().read(offset).unwrap();
        let left = length.min(20_000 - offset as usize);
        let what = format!("{length} bytes at {offset}: {}", receipt.plan);
        assert_eq!(receipt.bytes, left as u64, "{what}");
        let got = buffer.whole().to_vec().unwrap();
        assert!(got[..left] == bytes[offset as usize..][..left], "{what}");
        assert!(got[left..].iter().all(|&byte| byte == 0xaa), "{what}");
        if !direct {
            let reason = receipt.plan.reasons.last().unwrap();
            assert_eq!(reason.code, ReasonCode::NoDirectIo, "{what}");
            assert!(reason.evidence.contains("EACCES"), "{what}");
        }
    }
    let buffer = memory(&bytes[8192..16_384]);
    let receipt = file.attach(&buffer.whole()).unwrap().write(0).unwrap();
    if direct && file.alignment().is_some() {
        assert_eq!(receipt.plan.path, plan::Path::SharedHostMemory);
        // The file cannot be written in parts of a block, and no byte changes.
        let buffer = memory(&random(5000));
        let refused = file.attach(&buffer.whole()).unwrap().write(0).unwrap_err();
        assert!(
            matches!(refused, TransferError::WholeBlocksOnly { .. }),
            "{refused}"
        );
        assert!(refused.to_string().contains("EACCES"), "{refused}");
    }
}

#[test]
fn without_proc_files_are_read_and_direct_io_goes_by_the_path() {
    let name = "without_proc_files_are_read_and_direct_io_goes_by_the_path";
    if !in_a_mount_namespace(name) {
        return;
    }
    let directory = directory();
    let bytes = random(20_000);
    let path = file_in(directory.path(), &bytes);
    let had = has_direct_io(&path);
    mount(&["-t", "tmpfs", "none", "/proc"]).unwrap();
    assert_eq!(has_direct_io(&path), had);
    let file = FileImporter::from_fd(File::open(&path).unwrap().into(), "a file").unwrap();
    assert!(file.alignment().is_none());
    let buffer = memory(&[0; 20_000]);
    let receipt = file.attach(&buffer.whole()).unwrap().read(0).unwrap();
    assert!(buffer.whole().to_vec().unwrap() == bytes);
    let evidence = &receipt.plan.reasons.last().unwrap().evidence;
    assert!(evidence.contains("procfs"), "{evidence}");
}

#[test]
fn the_size_of_a_file_without_blocks_is_told() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(5 << 30).unwrap();
    file.write_all_at(&[1], 4096).unwrap();
    let file = FileImporter::from_fd(file.into(), "a file").unwrap();
    assert_eq!(file.size().unwrap(), 5 << 30);
}

#[test]
fn a_full_filesystem_is_told_with_what_was_written() {
    let name = "a_full_filesystem_is_told_with_what_was_written";
    if !in_a_mount_namespace(name) {
        return;
    }
    let scratch = directory();
    let at = scratch.path().display().to_string();
    mount(&["-t", "tmpfs", "-o", "size=600k", "none", &at]).unwrap();
    let path = file_in(scratch.path(), b"");
    let bytes = random(1 << 20);
    let buffer = memory(&bytes);
    let file = FileImporter::open_for(&path, Access::Write).unwrap();
    let error = file.attach(&buffer.whole()).unwrap().write(0).unwrap_err();
    let (arrived, prefix) = match error {
        TransferError::Stopped {
            cause,
            arrived,
            prefix,
            wanted,
            ..
        } => {
            assert_eq!((cause.errno.name(), wanted), (Some("ENOSPC"), 1 << 20));
            (arrived, prefix)
        }
        other => panic!("{other}"),
    };
    assert!(
        prefix <= arrived && arrived <= 600 << 10,
        "{prefix} {arrived}"
    );
    // The bytes that the error reports as written are there.
    let written = std::fs::read(&path).unwrap();
    assert!(written[..prefix as usize] == bytes[..prefix as usize]);
    // A second write completes the rest once there is room.
    mount(&["-o", "remount,size=2m", &at]).unwrap();
    let rest = buffer.range(prefix, (1 << 20) - prefix).unwrap();
    file.attach(&rest).unwrap().write(prefix).unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes);
}

#[test]
fn importers_of_any_kind_are_used_by_one_trait() {
    let directory = std::env::current_exe().unwrap();
    let scratch = Scratch::new(directory.parent().unwrap());
    let buffer = memfd::export("memory", 3 << 12).unwrap();
    let range = buffer.range(4096, 5000).unwrap();
    let importers: [Box<dyn Importer>; 2] = [Box::new(Processor), Box::new(scratch)];
    for importer in importers {
        let name = importer.name();
        let mut attached = importer.attach(&range).unwrap();
        drop(importer);
        let bytes: Vec<u8> = (0..4500).map(|at| (at % 251) as u8).collect();
        let plan = attached.write(&bytes).unwrap().unwrap();
        assert_eq!(
            range.slice(0, 4500).unwrap().to_vec().unwrap(),
            bytes,
            "{name}"
        );
        let mut back = vec![0; 5000];
        let read = attached.read(&mut back).unwrap().unwrap();
        assert!(back[..4500] == bytes && back[4500..] == [0; 500], "{name}");
        assert_eq!(plan.path, read.path, "{name}");
        assert_eq!(attached.plan().path, read.path, "{name}");
        // A transfer that does not fit into the range is refused, and no byte outside it changes.
        let mut long = vec![1; 5001];
        assert!(attached.write(&long).is_err(), "{name}");
        assert!(attached.read(&mut long).is_err(), "{name}");
        assert!(
            buffer.range(9096, 1).unwrap().to_vec().unwrap() == [0],
            "{name}"
        );
        range.write_bytes(&[0; 5000]).unwrap();
    }
}
