//! C programs, compiled against the library and run.

#[path = "../../tests/common/mod.rs"]
mod common;

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use peerbuf::export::memfd;
use peerbuf::share::{Channel, Copied, Event, Publisher};

use common::not_run;

const LONG: Duration = Duration::from_secs(20);

fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo puts the library that belongs to this program.
fn built() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    program.parent().unwrap().to_owned()
}

fn runs(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(
        output.status.success(),
        "{command:?}: {}\n{out}{err}",
        output.status
    );
    out
}

/// False, with a word about it, where a program is missing.
fn has(program: &str, test: &str) -> bool {
    let found = Command::new(program).arg("--version").output();
    if let Err(error) = &found {
        not_run(test, format!("no {program}: {error}"));
    }
    found.is_ok()
}

/// Compiles a program against the static library.
fn compile(source: &str, directory: &Path) -> PathBuf {
    let program = directory.join("program");
    runs(
        Command::new("cc")
            .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program)
            .arg(package().join(source))
            .arg("-I")
            .arg(package().join("include"))
            .arg(built().join("libpeerbuf_c.a"))
            .args(["-lgcc_s", "-lpthread", "-lm", "-ldl"]),
    );
    program
}

fn demo(program: impl AsRef<OsStr>, directory: &Path) -> Command {
    let from = directory.join("from");
    let bytes: Vec<u8> = (0..100_001u32).map(|number| (number % 251) as u8).collect();
    std::fs::write(&from, bytes).unwrap();
    let mut command = Command::new(program);
    command.arg(from).arg(directory.join("to"));
    command
}

fn check(directory: &Path, said: &str) {
    assert!(said.ends_with("every byte arrived\n"), "{said}");
    assert!(said.contains("receiver: 100001 bytes, "), "{said}");
    assert!(said.contains(r#""code":"not-device-memory""#), "{said}");
    let [from, to] = ["from", "to"].map(|name| std::fs::read(directory.join(name)).unwrap());
    assert!(from == to);
}

#[test]
fn the_demo_in_c_carries_a_file_through_two_processes() {
    if !has("cc", "the_demo_in_c_carries_a_file_through_two_processes") {
        return;
    }
    let directory = tempfile::tempdir_in(built()).unwrap();
    let program = compile("examples/demo.c", directory.path());
    let said = runs(&mut demo(program, directory.path()));
    check(directory.path(), &said);
}

#[test]
fn what_is_installed_compiles_by_pkg_config_and_runs_with_the_shared_library() {
    let name = "what_is_installed_compiles_by_pkg_config_and_runs_with_the_shared_library";
    if !has("cc", name) || !has("pkg-config", name) {
        return;
    }
    let directory = tempfile::tempdir_in(built()).unwrap();
    let prefix = directory.path().join("usr");
    runs(
        Command::new(package().join("install"))
            .arg(&prefix)
            .env("PEERBUF_BUILT", built()),
    );
    let found = runs(
        Command::new("pkg-config")
            .args(["--cflags", "--libs", "peerbuf"])
            .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")),
    );
    let program = directory.path().join("program");
    runs(
        Command::new("cc")
            .arg(package().join("examples/demo.c"))
            .arg("-o")
            .arg(&program)
            .args(found.split_whitespace()),
    );
    // By the name that the loader looks for.
    std::fs::remove_file(prefix.join("lib/libpeerbuf.so")).unwrap();
    let said = runs(demo(program, directory.path()).env("LD_LIBRARY_PATH", prefix.join("lib")));
    check(directory.path(), &said);
}

#[test]
fn a_program_registers_a_buffer_in_its_own_protection_domain() {
    let name = "a_program_registers_a_buffer_in_its_own_protection_domain";
    if !has("cc", name) {
        return;
    }
    let directory = tempfile::tempdir_in(built()).unwrap();
    let program = compile("examples/register.c", directory.path());
    let output = Command::new(program).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    match output.status.code() {
        Some(77) => not_run(name, errors.trim_end()),
        Some(0) => assert!(said.contains("1044480 bytes at 0x1000, lkey 0x"), "{said}"),
        _ => panic!("{}: {said}{errors}", output.status),
    }
}

#[test]
fn each_function_of_the_header_is_called_in_c() {
    let read = |path: &str| std::fs::read_to_string(package().join(path)).unwrap();
    let header = read("include/peerbuf.h");
    let programs = read("tests/verbs.c") + &read("examples/demo.c");
    let called = |line: &str| {
        let (before, _) = line.split_once('(')?;
        let name = before.rsplit([' ', '*']).next()?;
        name.starts_with("peerbuf_").then(|| name.to_owned())
    };
    let functions: Vec<String> = header.lines().filter_map(called).collect();
    assert!(functions.len() > 30, "{functions:?}");
    for name in functions {
        assert!(programs.contains(&format!("{name}(")), "{name} is not");
    }
}

#[test]
fn misuse_in_c_gives_a_code_and_what_moves_is_given_back() {
    if !has(
        "cc",
        "misuse_in_c_gives_a_code_and_what_moves_is_given_back",
    ) {
        return;
    }
    let directory = tempfile::tempdir_in(built()).unwrap();
    let program = compile("tests/verbs.c", directory.path());
    let (ours, theirs) = Channel::pair().unwrap();
    let mut publisher = Publisher::new().unwrap();
    publisher.add(ours).unwrap();
    let backing = Copied::new(|_| memfd::export("weights", 8192)).unwrap();
    let weights = publisher.publish("weights", backing).unwrap();
    publisher
        .buffer(weights)
        .unwrap()
        .whole()
        .write_bytes(&[1])
        .unwrap();
    let mut child = Command::new(program)
        .current_dir(directory.path())
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    // It adds 1, and waits until the buffer is wanted back.
    let first = |publisher: &Publisher| {
        let range = publisher.buffer(weights).unwrap().range(0, 1).unwrap();
        range.to_vec().unwrap()[0]
    };
    while first(&publisher) < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        publisher.serve_for(Duration::from_millis(2)).unwrap();
    }
    let moved = publisher.migrate(weights, LONG).unwrap();
    assert_eq!((moved.generation, moved.released), (2, 1));
    loop {
        match publisher.next_event(Some(LONG)).unwrap() {
            Some(Event::Left { held, .. }) => break assert_eq!(held, []),
            Some(Event::Joined { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(first(&publisher), 3);
    assert!(child.wait().unwrap().success());
}
