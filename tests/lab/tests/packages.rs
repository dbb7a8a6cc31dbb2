//! The Debian packages that `cargo lab package` makes (`tests/python.rs` has the wheel). In the distribution tree (`tools/packages/tree-test`): lintian finds no
//! error, and dkms builds the modules. In a guest (`tools/packages/guest-test`): installed, upgraded, used with those
//! modules by an ordinary user of the group, removed. Runs on the host and calls the lab.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn checkout() -> PathBuf {
    let suite = Path::new(env!("CARGO_MANIFEST_DIR"));
    suite.ancestors().nth(2).unwrap().to_owned()
}

/// The standard output of a command that must succeed.
fn answer(command: &mut Command) -> String {
    // Compressing as usual takes longer than the programs' development build.
    let output = command
        .env("DPKG_DEB_COMPRESSOR_TYPE", "gzip")
        .env("DPKG_DEB_COMPRESSOR_LEVEL", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{out}{said}",
        output.status
    );
    out
}

fn lab(args: &[&str]) -> Command {
    let lab = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    let mut command = Command::new(lab);
    command.args(args);
    command
}

#[test]
fn the_packages_install_upgrade_serve_the_group_and_leave_no_trace() {
    let share = tempfile::tempdir().unwrap();
    let scripts = checkout().join("tools/packages");
    for (directory, revision) in [(".", "1"), ("next", "2")] {
        let mut build = Command::new(scripts.join("build"));
        build
            .arg(share.path().join(directory))
            .env("PEERBUF_PROFILE", "dev")
            .env("PEERBUF_REVISION", revision);
        answer(&mut build);
    }
    for file in ["guest-test", "tree-test"] {
        std::fs::copy(scripts.join(file), share.path().join(file)).unwrap();
    }
    std::fs::copy(
        checkout().join("lib/c/examples/demo.c"),
        share.path().join("demo.c"),
    )
    .unwrap();

    let runs: [&[&str]; 2] = [
        &["tree", "--kernel", "stock", "--with", "dkms,lintian"],
        &[
            "run",
            "--bare",
            "--topology",
            "switch",
            "--processors",
            "1",
            "--with",
            "udev",
        ],
    ];
    for (options, script) in runs.into_iter().zip(["tree-test", "guest-test"]) {
        let mut command = lab(options);
        command.arg("--share").arg(share.path());
        command.args(["--", "sh", &format!("/mnt/share/{script}"), "/mnt/share"]);
        let out = answer(&mut command);
        assert!(out.ends_with("no trace\n"), "{script}: {out}");
    }
}
