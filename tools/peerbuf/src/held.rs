//! A dma-buf that some process holds: its exporter, its device and its place.
//!
//! `fdinfo` names the exporter to everybody who may look at the process. The device and the place take a descriptor of
//! the buffer (`pidfd_getfd`, for whoever may trace the process), and for a buffer of peerbuf.ko its device's node.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use peerbuf::Buffer;
use peerbuf::export::peerbuf::{self as module, Device, Placement};
use peerbuf::plan::topology::PciAddress;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::Serialize;

/// Exporters whose buffers are in system memory, whatever device uses them.
const IN_SYSTEM_MEMORY: [&str; 4] = ["udmabuf", "system", "videobuf2_dma_sg", "videobuf2_vmalloc"];

/// Where a buffer's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// In the device's memory.
    Device,
    /// In system memory.
    System,
    /// Some here, some there.
    Mixed,
}

impl Place {
    pub fn name(self) -> &'static str {
        match self {
            Place::Device => "device",
            Place::System => "system",
            Place::Mixed => "mixed",
        }
    }
}

/// What is known about a buffer, apart from its exporter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Known {
    /// The device that has it, or lends it.
    pub device: Option<PciAddress>,
    pub place: Option<Place>,
}

/// The exporter of the dma-buf behind `/proc/PID/fd/N`, from `fdinfo`; `None` for any other path or file.
pub fn exporter(path: &Path) -> Option<String> {
    if !is_dmabuf(&fs::read_link(path).ok()?) {
        return None;
    }
    let number = path.file_name()?;
    let process = path.parent()?.parent()?;
    let info = fs::read_to_string(process.join("fdinfo").join(number)).unwrap_or_default();
    let exporter = info.lines().find_map(|line| line.strip_prefix("exp_name:"));
    Some(plain(exporter.unwrap_or("an unknown exporter")))
}

/// Device and place of the dma-buf behind `/proc/PID/fd/N`, as far as the caller may know.
pub fn known(path: &Path, exporter: &str) -> Known {
    if IN_SYSTEM_MEMORY.contains(&exporter) {
        return Known {
            device: None,
            place: Some(Place::System),
        };
    }
    let buffer = descriptor(path).and_then(|fd| Buffer::import(fd).ok());
    let Some(buffer) = buffer else {
        return Known::default();
    };
    if exporter == "peerbuf" {
        return of_module(&buffer).unwrap_or_default();
    }
    Known {
        device: buffer.provenance().device,
        place: None,
    }
}

/// Asks each node of peerbuf.ko, which knows its own buffers only.
fn of_module(buffer: &Buffer) -> Option<Known> {
    let dmabuf = buffer.dmabuf()?;
    module::probe().ok()?.into_iter().find_map(|node| {
        let device = node.file_name()?.to_str()?.parse().ok();
        let status = Device::open_node(node).ok()?.status(dmabuf).ok()?;
        let place = match status.placement {
            Placement::Device => Place::Device,
            Placement::System => Place::System,
            _ => Place::Mixed,
        };
        Some(Known {
            device,
            place: Some(place),
        })
    })
}

fn descriptor(path: &Path) -> Option<OwnedFd> {
    let number: i32 = path.file_name()?.to_str()?.parse().ok()?;
    let process = path.parent()?.parent()?.canonicalize().ok()?;
    let process: i32 = process.file_name()?.to_str()?.parse().ok()?;
    let process = pidfd_open(Pid::from_raw(process)?, PidfdFlags::empty()).ok()?;
    pidfd_getfd(process, number, PidfdGetfdFlags::empty()).ok()
}

/// True for `/dmabuf:` and a buffer's name, in the kernel's own filesystem.
pub fn is_dmabuf(target: &Path) -> bool {
    target
        .to_str()
        .is_some_and(|target| target.starts_with("/dmabuf:"))
}

/// Replaces control characters: any process can set a name, and a terminal would obey it.
pub fn plain(text: &str) -> String {
    text.trim()
        .chars()
        .map(|letter| if letter.is_control() { '?' } else { letter })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_descriptor_in_proc_names_its_exporter_and_a_file_does_not() {
        let root = std::env::temp_dir().join(format!("peerbuf-held-{}", std::process::id()));
        for part in ["fd", "fdinfo"] {
            fs::create_dir_all(root.join(part)).unwrap();
        }
        symlink("/dmabuf:weights", root.join("fd/3")).unwrap();
        symlink("/etc/passwd", root.join("fd/4")).unwrap();
        let info = "size:\t4096\nexp_name:\tudmabuf\nname:\texp_name:\n";
        fs::write(root.join("fdinfo/3"), info).unwrap();
        let found = exporter(&root.join("fd/3"));
        let other = exporter(&root.join("fd/4"));
        // A made-up process has no descriptor to get.
        let unknown = known(&root.join("fd/3"), "amdgpu");
        fs::remove_dir_all(&root).unwrap();
        assert_eq!((found.as_deref(), other), (Some("udmabuf"), None));
        assert_eq!(unknown, Known::default());
        let known = known(Path::new("/proc/1/fd/3"), "udmabuf");
        assert_eq!((known.device, known.place), (None, Some(Place::System)));
    }
}
