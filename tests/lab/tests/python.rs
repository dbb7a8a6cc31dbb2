//! The Python package with real exporters, used by the guest's own Python
//! (`lib/python/tests/guest.py`). Runs on the host, builds the extension and calls the lab.
//! Packing the wheel needs the package index; the guest does not.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn checkout() -> PathBuf {
    let suite = Path::new(env!("CARGO_MANIFEST_DIR"));
    suite.ancestors().nth(2).unwrap().to_owned()
}

/// The extension, as in the wheel.
fn extension() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let output = Command::new(cargo)
        // The configuration in this directory links no Python interpreter.
        .current_dir(checkout())
        .args(["build", "--quiet", "--package=peerbuf-python"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "the extension does not compile");
    let text = String::from_utf8(output.stdout).unwrap();
    let messages = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut made = messages.filter(|message| message["target"]["name"] == "peerbuf_python");
    let file = made.find_map(|message| message["filenames"][0].as_str().map(PathBuf::from));
    file.expect("cargo names the extension")
}

#[test]
fn every_exporter_serves_the_guests_python() {
    let share = tempfile::tempdir().unwrap();
    std::fs::copy(extension(), share.path().join("peerbuf.abi3.so")).unwrap();
    let tests = checkout().join("lib/python/tests/guest.py");
    std::fs::copy(tests, share.path().join("guest.py")).unwrap();
    let lab = std::env::var_os("PEERBUF_LAB").expect("run this through `cargo lab test`");
    let output = Command::new(lab)
        .args(["run", "--topology", "switch", "--processors", "1"])
        .arg("--share")
        .arg(share.path())
        // Python looks for modules in the program's folder first.
        .args(["--", "python3", "/mnt/share/guest.py"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("Ran 4 tests") && !said.contains("skipped"),
        "{said}"
    );
}
