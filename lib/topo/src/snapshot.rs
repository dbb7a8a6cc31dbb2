//! Snapshots: a machine in a file, in this crate's format or another tool's.
//!
//! This crate's format is JSON. It has no serial numbers, host names, network addresses or memory addresses:
//! a [`Machine`] holds none. Names of network interfaces may contain one, so they are checked.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::ReadError;
use crate::foreign;
use crate::machine::Machine;
use crate::sysfs;

/// The version of the format.
const VERSION: u64 = 1;
/// A limit well above the few megabytes of a large machine.
const LARGEST: u64 = 256 << 20;

#[derive(Serialize, Deserialize)]
struct File<M> {
    /// The format's version.
    peerbuf_topology: u64,
    machine: M,
}

/// Serialises a machine as a snapshot.
pub fn save(machine: &Machine) -> String {
    let mut machine = machine.clone();
    for function in &mut machine.functions {
        function.names.retain(|name| !tells_somebody(name));
    }
    let file = File {
        peerbuf_topology: VERSION,
        machine: &machine,
    };
    // Cannot fail: all maps have text keys.
    serde_json::to_string_pretty(&file).unwrap_or_default()
}

/// Whether a name contains an address, as `enx0123456789ab` does, or was chosen by a person.
fn tells_somebody(name: &str) -> bool {
    let kernels = [
        "nvme", "mlx", "rxe", "siw", "card", "renderD", "controlD", "video", "accel", "eth", "en",
        "ib", "wl", "bnxt", "irdma", "hfi", "efa", "rdma", "rocep", "ibp", "sd", "vd", "erdma",
        "mana", "hns", "cxgb",
    ];
    let has_address = name.starts_with("enx") || name.starts_with("wlx");
    let is_kernels = kernels.iter().any(|begin| {
        let rest = name.strip_prefix(begin);
        rest.is_some_and(|rest| rest.bytes().any(|byte| byte.is_ascii_digit()))
    });
    has_address || !is_kernels
}

/// Reads a snapshot in any known format, or a folder with a copy of sysfs.
///
/// # Errors [`ReadError`] with the file and the problem.
pub fn open(path: &Path) -> Result<Machine, ReadError> {
    let failed = |source| ReadError::File {
        path: path.to_owned(),
        source,
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if metadata.is_dir() {
        let inner = path.join("sys");
        return sysfs::tree(if inner.is_dir() { &inner } else { path });
    }
    if metadata.len() > LARGEST {
        return Err(ReadError::Malformed {
            path: path.to_owned(),
            format: "a snapshot",
            problem: format!(
                "it has {} bytes, and none has more than {LARGEST}",
                metadata.len()
            ),
        });
    }
    let bytes = fs::read(path).map_err(failed)?;
    read(&String::from_utf8_lossy(&bytes), path)
}

/// Reads a snapshot from text; `path` is only for errors.
///
/// # Errors As for [`open`].
pub fn read(text: &str, path: &Path) -> Result<Machine, ReadError> {
    let malformed = |format: &'static str| {
        move |problem: String| ReadError::Malformed {
            path: path.to_owned(),
            format,
            problem,
        }
    };
    let start = text.trim_start();
    if start.starts_with('<') {
        return foreign::xml(start)
            .map_err(malformed("XML"))
            .and_then(|machine| {
                machine.ok_or_else(|| ReadError::Unrecognised {
                    path: path.to_owned(),
                })
            });
    }
    if start.starts_with('[') {
        return foreign::rdma_topo(start).map_err(malformed("rdma_topo's dump"));
    }
    if start.starts_with('{') {
        let value: serde_json::Value =
            serde_json::from_str(start).map_err(|error| malformed("JSON")(error.to_string()))?;
        let Some(found) = value
            .get("peerbuf_topology")
            .and_then(serde_json::Value::as_u64)
        else {
            return Err(ReadError::Unrecognised {
                path: path.to_owned(),
            });
        };
        if found != VERSION {
            return Err(ReadError::Version {
                path: path.to_owned(),
                found,
                known: VERSION,
            });
        }
        let ours = malformed("peerbuf's snapshot");
        let file: File<Machine> =
            serde_json::from_value(value).map_err(|error| ours(error.to_string()))?;
        return match file.machine.is_sound() {
            true => Ok(file.machine),
            false => Err(ours(
                "a bridge's place does not fit the function below it".into(),
            )),
        };
    }
    let machine = foreign::lspci(text);
    match machine.functions.is_empty() {
        true => Err(ReadError::Unrecognised {
            path: path.to_owned(),
        }),
        false => Ok(machine),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Format, Function};

    #[test]
    fn a_snapshot_comes_back_as_it_was_without_names_that_tell_somebody() {
        let mut machine = Machine::empty(Format::Sysfs);
        machine.host("pci0000:00", true, true);
        let mut card = Function::at("0000:00:01.0".parse().unwrap());
        card.names = [
            "enx0123456789ab",
            "enp1s0",
            "acme-payroll",
            "nvme0n1",
            "mlx5_0",
            "eth0",
        ]
        .map(str::to_owned)
        .to_vec();
        machine.arrange(vec![(card, None)]);
        let text = save(&machine);
        let back = read(&text, Path::new("x")).unwrap();
        machine.functions[0].names = ["enp1s0", "nvme0n1", "mlx5_0", "eth0"]
            .map(str::to_owned)
            .to_vec();
        assert_eq!(back, machine);
        for wrong in [
            "",
            "hello",
            "{}",
            "[1]",
            "<a/>",
            "<a",
            "{\"peerbuf_topology\": 1}",
            &text.replace(": 1,", ": 2,"),
            &text.replace("\"host\": 0", "\"host\": 9"),
        ] {
            let error = read(wrong, Path::new("x")).unwrap_err().to_string();
            assert!(error.starts_with("x: "), "{error}");
        }
    }
}
