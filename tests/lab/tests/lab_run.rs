//! The guarantees of `cargo lab run`. Runs on the host and calls the lab.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use peerbuf_lab_suite::clock::Stopwatch;

fn lab(args: &[&str]) -> Command {
    let program = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command
}

/// Most tests need neither module nor tools, nor a second CPU.
const BARE: [&str; 4] = ["run", "--bare", "--processors", "1"];

/// `cargo lab run --bare OPTIONS -- COMMAND`.
fn bare(options: &[&str], command: &[&str]) -> Output {
    lab(&[&BARE, options, &["--"], command].concat())
        .output()
        .unwrap()
}

/// A running lab.
fn started(args: &[&str]) -> Child {
    lab(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn fixture(name: &str) -> String {
    format!("/opt/peerbuf/fixtures/{name}")
}

#[test]
fn output_error_and_status_are_the_commands_own_byte_for_byte() {
    let script = "import os, sys\n\
                  os.write(1, bytes(range(256)) * 2048)\n\
                  os.write(2, b'\\x00err\\xff\\r\\n')\n\
                  sys.exit(42)";
    let output = bare(&[], &["python3", "-c", script]);
    let expected: Vec<u8> = (0..=255).cycle().take(256 * 2048).collect();
    assert_eq!(output.status.code(), Some(42), "{}", text(&output.stderr));
    assert!(
        output.stdout == expected,
        "{} bytes came",
        output.stdout.len()
    );
    assert_eq!(output.stderr, b"\x00err\xff\r\n");
}

#[test]
fn standard_input_reaches_the_command_and_ends() {
    let mut child = lab(&["run", "--bare", "--processors", "1", "--", "sha256sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"abc").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        text(&output.stdout).starts_with("ba7816bf8f01cfea414140de5dae2223"),
        "{}",
        text(&output.stdout)
    );
}

#[test]
fn a_command_that_hangs_ends_with_124_and_a_line_that_says_so() {
    let output = bare(&["--timeout", "2"], &["sleep", "1000"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(
        text(&output.stderr).contains("within 2 s (--timeout)"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_panic_ends_with_125_and_the_end_of_the_console() {
    let output = bare(
        &["--timeout", "60"],
        &["sh", "-c", "echo c >/proc/sysrq-trigger"],
    );
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{error}");
    assert!(
        error.contains("Kernel panic - not syncing: sysrq triggered crash"),
        "{error}"
    );
    assert!(error.lines().count() <= 52, "{error}");
}

#[test]
fn a_guest_out_of_memory_ends_with_125_and_the_end_of_the_console() {
    // Allocates a little at a time: one big allocation would be refused at once, and prove
    // nothing. A guest with almost no memory would reread its programs' pages for minutes;
    // `min_ttl_ms` prevents that.
    let script = "echo 1000 > /sys/kernel/mm/lru_gen/min_ttl_ms\n\
                  exec python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 22))'";
    let output = bare(
        &["--memory", "512", "--timeout", "120"],
        &["sh", "-c", script],
    );
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{error}");
    assert!(error.contains("Out of memory"), "{error}");
}

#[test]
fn a_guest_that_counts_instructions_tells_the_time_by_them() {
    // Not the early clock, which the kernel keeps if the announced frequency differs from the
    // measured one.
    let script = "until grep -x tsc /sys/devices/system/clocksource/*0/current_clocksource; do sleep 1; done";
    let output = bare(&["--icount", "--timeout", "60"], &["sh", "-c", script]);
    assert_eq!(text(&output.stdout), "tsc\n", "{}", text(&output.stderr));
}

#[test]
fn a_warning_that_nobody_announced_fails_the_run_and_an_announced_one_does_not() {
    let load = format!("insmod {}", fixture("warn.ko"));
    let output = lab(&["run", "--", "sh", "-c", &load]).output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{error}");
    assert!(
        error.contains("WARNING:") && error.contains("(the command itself ended with 0)"),
        "{error}"
    );

    let announced = format!("echo 'peerbuf-lab: expect: warn_init' >/dev/kmsg; {load}");
    let output = lab(&["run", "--", "sh", "-c", &announced])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn a_shared_directory_runs_static_and_dynamic_programs_loads_a_module_and_is_writable() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "cp {} {} {} /mnt/share",
        fixture("hello"),
        fixture("hello-static"),
        fixture("hello.ko")
    );
    let share = dir.path().to_str().unwrap();
    let output = lab(&["run", "--share", share, "--", "sh", "-c", &script])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let script = "/mnt/share/hello a; echo $?; /mnt/share/hello-static b c; echo $?; \
                  insmod /mnt/share/hello.ko && rmmod hello && echo written >/mnt/share/out";
    let output = bare(&["--share", share], &["sh", "-c", script]);
    assert_eq!(
        text(&output.stdout),
        "a\n1\nb\nc\n2\n",
        "{}",
        text(&output.stderr)
    );
    assert_eq!(fs::read(dir.path().join("out")).unwrap(), b"written\n");
}

#[test]
fn a_file_without_a_name_on_9p_is_copied_and_the_receipt_says_why_not_directly() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("gone"), vec![7; 100_000]).unwrap();
    let script = "exec 3<>/mnt/share/gone && rm /mnt/share/gone && \
                  peerbuf copy --json fd:3 /mnt/share/copy";
    let share = dir.path().to_str().unwrap();
    let output = lab(&["run", "--share", share, "--", "sh", "-c", script])
        .output()
        .unwrap();
    let said = text(&output.stdout);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{said}{}",
        text(&output.stderr)
    );
    let receipt: serde_json::Value = serde_json::from_str(&said).unwrap();
    // After the one against peer to peer, for which the memory is no device's.
    let reason = &receipt["legs"][0]["reasons"][1];
    assert_eq!(reason["code"], "no-direct-io", "{said}");
    let why = "whose filesystem cannot open a file without a name again: ENOENT";
    assert!(reason["evidence"].as_str().unwrap().contains(why), "{said}");
    assert!(fs::read(dir.path().join("copy")).unwrap() == vec![7; 100_000]);
}

#[test]
fn kbuild_builds_a_module_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/modules/hello");
    for file in ["hello.c", "Kbuild"] {
        fs::copy(source.join(file), dir.path().join(file)).unwrap();
    }
    let output = lab(&["kbuild", dir.path().to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(dir.path().join("hello.ko").is_file());

    fs::write(dir.path().join("hello.c"), "#error no\n").unwrap();
    let output = lab(&["kbuild", dir.path().to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("#error no"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn two_guests_at_once_do_not_see_each_others_writes() {
    let script = "test ! -e /usr/mark && echo 1 >/usr/mark && echo 1 >/mnt/nvme/mark && sleep 3 && cat /usr/mark";
    let start = || {
        started(&[
            "run",
            "--bare",
            "--processors",
            "1",
            "--",
            "sh",
            "-c",
            script,
        ])
    };
    let both = [start(), start()];
    for child in both {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(output.stdout, b"1\n");
    }
}

#[test]
fn ending_the_lab_ends_the_guest() {
    for signal in ["-KILL", "-INT"] {
        let child = lab(&["run", "--bare", "--processors", "1", "--", "sleep", "1000"]).spawn();
        let mut child = child.unwrap();
        let id = child.id();
        let guest = guests_of(id, 1)[0];
        kill(signal, id);
        child.wait().unwrap();
        let began = Stopwatch::start();
        while command_of(guest).contains("qemu") {
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "the guest outlived the lab"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_guest_whose_qemu_crashes_before_the_command_is_started_again() {
    let child = started(&["run", "--bare", "--processors", "1", "--", "echo", "hello"]);
    kill("-ABRT", guests_of(child.id(), 1)[0]);
    let output = child.wait_with_output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    assert_eq!(text(&output.stdout), "hello\n");
    let told = ["QEMU itself crashed (signal 6)", "starting the guest again"];
    assert!(told.iter().all(|what| error.contains(what)), "{error}");
}

#[test]
fn a_qemu_that_crashes_under_the_command_is_told_from_a_guest_that_dies() {
    let script = "echo here; sleep 1000";
    let mut child = started(&[
        "run",
        "--bare",
        "--processors",
        "1",
        "--",
        "sh",
        "-c",
        script,
    ]);
    await_lines(&mut child, 1);
    kill("-ABRT", guests_of(child.id(), 1)[0]);
    let output = child.wait_with_output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{error}");
    assert!(error.contains("QEMU itself crashed (signal 6)"), "{error}");
}

#[test]
fn a_pair_ends_when_one_of_its_guests_does() {
    let script = "echo here; sleep 1000";
    let mut child = started(&[
        "pair",
        "--bare",
        "--processors",
        "1",
        "--",
        "sh",
        "-c",
        script,
    ]);
    await_lines(&mut child, 2);
    kill("-ABRT", guests_of(child.id(), 2)[0]);
    let began = Stopwatch::start();
    let output = child.wait_with_output().unwrap();
    let error = text(&output.stderr);
    assert!(began.elapsed() < Duration::from_secs(30), "{error}");
    assert_eq!(output.status.code(), Some(125), "{error}");
    for told in ["QEMU itself crashed", "is gone, so this one was ended"] {
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn a_layer_whose_making_was_killed_is_made_again_and_its_package_is_in_the_guest() {
    let cache = cache_dir();
    // Other layers may be made at the same time.
    let layer = |directory: &Path| {
        let entries = fs::read_dir(directory).unwrap().flatten();
        entries.map(|e| e.path()).find(|p| {
            fs::read_to_string(p.join("packages")).is_ok_and(|packages| packages == "hello\n")
        })
    };
    let made = || layer(&cache);
    if let Some(old) = made() {
        fs::remove_dir_all(old).unwrap();
    }
    let args = [
        "run",
        "--bare",
        "--processors",
        "1",
        "--with",
        "hello",
        "--",
        "hello",
        "--greeting=from a package",
    ];
    let mut child = lab(&args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Stopwatch::start();
    let making = || layer(&cache.join("tmp"));
    while making().is_none_or(|tmp| !tmp.join("upper/var").exists()) {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "the layer was never begun"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(made(), None);

    let output = lab(&args).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "from a package\n");
    assert!(made().is_some());
    assert_eq!(making(), None);
}

/// A separate cache with the entries of the real cache that a plain guest needs, as hard links.
/// Files in a cache are removed or replaced, never written to.
fn own_cache() -> tempfile::TempDir {
    let real = cache_dir();
    // A directory on the same filesystem that is not an entry.
    let own = tempfile::tempdir_in(real.join("locks")).unwrap();
    fs::create_dir(own.path().join("locks")).unwrap();
    // Makes missing entries, and the lists of files.
    assert_eq!(bare(&[], &["true"]).status.code(), Some(0));
    for entry in fs::read_dir(&real).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let kinds = ["tree-", "versions-", "kernel-", "initramfs-", "disk-"];
        if kinds.iter().any(|kind| name.starts_with(kind)) {
            link(&entry.path(), &own.path().join(&name));
            // An entry that is no longer in use may have no list.
            let list = format!("locks/files-{name}");
            let _ = fs::copy(real.join(&list), own.path().join(&list));
        }
    }
    own
}

/// Makes `to` a copy of the directory `from` by hard links.
fn link(from: &Path, to: &Path) {
    let made = Command::new("cp").arg("-al").args([from, to]).status();
    assert!(made.unwrap().success());
}

/// `cargo lab run --bare -- echo here` with that cache, started by the shell script `script`,
/// in which "$@" is the command.
fn echo_here_by(unshare: &str, script: &str, cache: &Path) -> Output {
    let run = lab(&["run", "--bare", "--processors", "1", "--", "echo", "here"]);
    Command::new("unshare")
        .args([unshare, "sh", "-c", script, "sh"])
        .arg(run.get_program())
        .args(run.get_args())
        .env("PEERBUF_LAB_CACHE", cache)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Asserts that the lab itself failed, with each of these parts in its message.
fn said(output: &Output, parts: &[&str]) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{error}");
    for part in parts {
        assert!(error.contains(part), "{part} in:\n{error}");
    }
    assert!(error.lines().count() < 12, "too long:\n{error}");
}

#[test]
fn a_warm_cache_needs_no_network_and_what_lost_files_is_made_again() {
    let cache = own_cache();
    // Entries of several kernels, perhaps, and of earlier versions of the lab.
    let all = |kind: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(cache.path()).unwrap().flatten();
        let mut paths: Vec<_> = entries.map(|e| e.path()).collect();
        paths.retain(|p| p.file_name().unwrap().to_string_lossy().starts_with(kind));
        assert!(!paths.is_empty(), "{kind}");
        paths
    };
    // The lab makes both initramfs and disk in the tree, without a network.
    for initramfs in all("initramfs-") {
        fs::remove_file(initramfs.join("initramfs")).unwrap();
    }
    for disk in all("disk-") {
        fs::remove_file(disk.join("nvme.ext4")).unwrap();
        fs::write(disk.join("nvme.ext4"), "short").unwrap();
    }
    let output = echo_here_by("--net", "exec \"$@\"", cache.path());
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    assert_eq!(text(&output.stdout), "here\n");
    for told in [
        "initramfs is missing): it is made again",
        "nvme.ext4 has 5 bytes",
    ] {
        assert!(error.contains(told), "{told} in:\n{error}");
    }

    // An unknown kernel does not remove the known ones.
    let script = "exec \"$1\" run --bare --kernel 1.2.3 -- true";
    let output = echo_here_by("--net", script, cache.path());
    said(&output, &["1.2.3", "could not be reached"]);
    let output = echo_here_by("--net", "exec \"$@\"", cache.path());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let own = |args: &[&str]| {
        let mut command = lab(args);
        command.env("PEERBUF_LAB_CACHE", cache.path());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    for tree in all("tree-") {
        fs::remove_file(tree.join("root/usr/bin/make")).unwrap();
    }
    let listed = own(&["cache"]);
    for told in [
        "the distribution tree",
        "for: every command",
        "DAMAGED: root/usr/bin/make is missing",
        "cargo lab clean tree-",
        "in all, of at most 5.8 GB",
    ] {
        assert!(listed.contains(told), "{told} in:\n{listed}");
    }
    own(&["clean", "tree-"]);
    let left = own(&["cache"]);
    assert!(!left.contains("tree-") && left.contains("disk-"), "{left}");
}

#[test]
fn without_a_network_or_room_the_first_call_ends_with_a_sentence_that_helps() {
    let cache = tempfile::tempdir().unwrap();
    let output = echo_here_by("--net", "exec \"$@\"", cache.path());
    said(
        &output,
        &["distribution tree", "could not be reached", "call again"],
    );
    assert_eq!(fs::read_dir(cache.path().join("tmp")).unwrap().count(), 0);

    let script = "mount -t tmpfs -o size=50m full \"$PEERBUF_LAB_CACHE\" && exec \"$@\"";
    let output = echo_here_by("--mount", script, cache.path());
    let place = cache.path().to_str().unwrap();
    said(
        &output,
        &[
            "distribution tree",
            place,
            "free",
            "PEERBUF_LAB_CACHE",
            "cargo lab clean",
        ],
    );
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let output = bare(&["--iommu"], &["true"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("lying"),
        "{}",
        text(&output.stderr)
    );

    let output = bare(&["--kernel", "1.2.3"], &["true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("the suites offer"),
        "{}",
        text(&output.stderr)
    );

    let output = bare(&["--share", "/nowhere/at/all"], &["true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("/nowhere/at/all"),
        "{}",
        text(&output.stderr)
    );

    let output = bare(&[], &["no-such-command"]);
    assert_eq!(output.status.code(), Some(127));
}

fn cache_dir() -> PathBuf {
    let set = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    set("PEERBUF_LAB_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("peerbuf-lab")))
        .or_else(|| set("HOME").map(|d| d.join(".cache/peerbuf-lab")))
        .unwrap()
}

fn kill(signal: &str, pid: u32) {
    let killed = Command::new("kill")
        .args([signal, &pid.to_string()])
        .status();
    assert!(killed.unwrap().success());
}

/// Waits until the command, or both commands together, have written this many lines.
fn await_lines(child: &mut Child, count: usize) {
    let out = child.stdout.as_mut().unwrap();
    let mut newlines = 0;
    let mut byte = [0];
    while newlines < count {
        assert_eq!(out.read(&mut byte).unwrap(), 1, "it has ended");
        newlines += usize::from(byte == *b"\n");
    }
}

/// The lab's guests, once there are this many.
fn guests_of(lab: u32, count: usize) -> Vec<u32> {
    let began = Stopwatch::start();
    loop {
        let mut guests = children_of(lab);
        guests.retain(|pid| command_of(*pid).contains("qemu"));
        if guests.len() == count {
            return guests;
        }
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "no guest was started"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn children_of(pid: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.extend(
            list.split_whitespace()
                .filter_map(|p| p.parse::<u32>().ok()),
        );
    }
    children
}

fn command_of(pid: u32) -> String {
    text(&fs::read(format!("/proc/{pid}/comm")).unwrap_or_default())
}
