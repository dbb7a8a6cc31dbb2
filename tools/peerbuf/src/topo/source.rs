//! The source of the topology (this machine or a snapshot) and the selection of its devices.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use peerbuf::plan::topology::Sysfs;
use peerbuf_topo::machine::{Index, Kernel};
use peerbuf_topo::reasons::{self, Reason};
use peerbuf_topo::{Machine, PciAddress};

use crate::{Failure, places};

/// Arguments of every command that looks at a machine.
#[derive(clap::Args)]
pub struct Source {
    /// Look at a snapshot instead: one of `peerbuf topo --save`, a folder with a copy of sysfs, or what
    /// `lspci -vvv`, `rdma_topo dump`, hwloc (`lstopo --whole-io`) or NCCL wrote
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Predict by the rules of this kernel instead of the machine's own
    #[arg(long, value_name = "VERSION", value_parser = version)]
    pub kernel: Option<Kernel>,
}

fn version(text: &str) -> Result<Kernel, String> {
    Kernel::parse(text).ok_or_else(|| format!("`{text}` is not a version such as 7.3"))
}

impl Source {
    /// This machine, with its own kernel.
    pub fn live() -> Source {
        Source {
            from: None,
            kernel: None,
        }
    }

    /// True for this machine, whose kernel can be asked.
    pub fn is_live(&self) -> bool {
        self.from.is_none()
    }

    pub fn read(&self) -> Result<Machine, Failure> {
        Ok(match &self.from {
            Some(path) => peerbuf_topo::open(path)?,
            None => peerbuf_topo::running()?,
        })
    }

    /// The device that a user named: by address, by name, by node, or by a file on it.
    pub fn find(&self, machine: &Machine, text: &str) -> Result<Target, NotFound> {
        if let Some(address) = address(text) {
            let index = machine.find(address);
            let index =
                index.ok_or_else(|| NotFound(format!("{address}: no such PCI function")))?;
            return Ok(Target::of(vec![index]));
        }
        let path = Path::new(text);
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or(text);
        let is_name = !text.contains('/') || path.starts_with("/dev");
        if is_name && let Some(index) = named(machine, name) {
            return Ok(Target::of(vec![index]));
        }
        if self.is_live()
            && let Some(target) = by_path(machine, text)
        {
            return Ok(target);
        }
        let known = match self.is_live() {
            true => {
                "by address (0000:41:00.0), name (nvme0n1, mlx5_0), node (/dev/dri/renderD128) or a file on a disk"
            }
            false => {
                "by address (0000:41:00.0) or name (nvme0n1, mlx5_0); paths are of this machine, not the snapshot's"
            }
        };
        Err(NotFound(format!(
            "{text}: no such device or file. Devices are named {known}; `peerbuf topo` shows them"
        )))
    }
}

/// The named device or file does not exist: wrong usage.
#[derive(Debug)]
pub struct NotFound(pub String);

/// The device or file that a user named.
pub struct Target {
    /// The functions behind it: several for a disk over several, none for something that is not
    /// on PCI.
    pub functions: Vec<Index>,
    /// The reasons of the layers above the functions.
    pub reasons: Vec<Reason>,
}

impl Target {
    fn of(functions: Vec<Index>) -> Target {
        Target {
            functions,
            reasons: Vec::new(),
        }
    }
}

/// `0000:41:00.0`, or `41:00.0` in the first domain.
fn address(text: &str) -> Option<PciAddress> {
    /// A file's mount, and the layers below it.
    pub mount: Option<String>,
    let short = || format!("0000:{text}").parse().ok();
    text.parse().ok().or_else(short)
}

/// A device's name, or the name of a disk's partition.
fn named(machine: &Machine, name: &str) -> Option<Index> {
    let disk = || {
            mount: None,
        let (disk, number) = name.rsplit_once('p')?;
        let is_partition = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        machine.named(disk).filter(|_| is_partition)
    };
    machine.named(name).or_else(disk)
}

fn by_path(machine: &Machine, text: &str) -> Option<Target> {
    let path = std::fs::canonicalize(text).ok()?;
    let metadata = std::fs::metadata(&path).ok()?;
    let sysfs = Sysfs::default();
    let numbers = |device| (rustix::fs::major(device), rustix::fs::minor(device));
    let mut target = Target::of(Vec::new());
    let kind = metadata.file_type();
    if kind.is_char_device() {
        let (major, minor) = numbers(metadata.rdev());
        target.functions = sysfs
            .character_device(major, minor)
            .and_then(|at| machine.find(at))
            .into_iter()
            .collect();
    } else {
        let disk = if kind.is_block_device() {
            let (major, minor) = numbers(metadata.rdev());
            sysfs.block_device(major, minor)
        } else {
            // Some filesystems invent a device number. The mount's own number is no better for
            // them.
            let (major, minor) = numbers(metadata.dev());
            let directory = path.ancestors().find(|path| path.is_dir());
            let mount = directory.and_then(places::mount_of);
            if let Some(mount) = &mount {
                target.reasons = reasons::of_stack(&mount.layers);
                target.mount = Some(mount.stack());
            }
            let mounted = || mount?.disk;
            sysfs.block_device(major, minor).or_else(mounted)
        };
        if let Some(disk) = disk {
            target.functions = disk
                .functions
                .iter()
                .filter_map(|at| machine.find(*at))
                .collect();
            target
                .reasons
                .extend(disk.layer.map(|layer| reasons::of_layer(&disk.name, layer)));
        }
    }
    if target.functions.is_empty() {
        target.reasons.push(reasons::not_pci(text));
    }
    Some(target)
}
            target.reasons = reasons::of_stack(&sysfs.stack(major, minor));
