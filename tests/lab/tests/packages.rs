//! The Debian packages in the lab's guest (`tools/packages/guest-test`): installed, used by an ordinary user of the
//! group, removed without a trace. Runs on the host, builds the packages and calls the lab.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn checkout() -> PathBuf {
    let suite = Path::new(env!("CARGO_MANIFEST_DIR"));
    suite.ancestors().nth(2).unwrap().to_owned()
}

/// Where cargo puts programs and libraries, with the command and the C library in it.
fn built() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let output = Command::new(cargo)
        .current_dir(checkout())
        .args([
            "build",
            "--quiet",
            "--package=peerbuf-cli",
            "--package=peerbuf-c",
        ])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "it does not compile");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut messages = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let program = messages.find_map(|message| message["executable"].as_str().map(PathBuf::from));
    let program = program.expect("cargo names the command");
    program.parent().unwrap().to_owned()
}

#[test]
fn the_packages_install_serve_the_group_and_leave_no_trace() {
    let share = tempfile::tempdir().unwrap();
    let packages = checkout().join("tools/packages");
    let output = Command::new(packages.join("build"))
        .arg(share.path())
        .env("PEERBUF_BUILT", built())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    for (file, name) in [
        (packages.join("guest-test"), "guest-test"),
        (checkout().join("lib/c/examples/demo.c"), "demo.c"),
    ] {
        std::fs::copy(file, share.path().join(name)).unwrap();
    }
    let lab = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    let output = Command::new(lab)
        .args([
            "run",
            "--topology",
            "switch",
            "--processors",
            "1",
            "--with",
            "udev",
        ])
        .arg("--share")
        .arg(share.path())
        .args(["--", "sh", "/mnt/share/guest-test", "/mnt/share"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (out, said) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{out}{said}");
    assert!(out.ends_with("no trace\n"), "{out}{said}");
}
