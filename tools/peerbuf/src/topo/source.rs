//! The source of the topology (this machine or a snapshot) and the selection of its devices.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use peerbuf::plan::topology::{BlockDevice, Sysfs};
use peerbuf_topo::machine::{Index, Kernel};
use peerbuf_topo::reasons::{self, Reason};
use peerbuf_topo::{Machine, PciAddress};

use crate::held::{self, Known, Place};
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
        // A disk's name may be that of several paths to it.
        let node = Path::new("/dev").join(path);
        let is_disk = || fs::metadata(&node).is_ok_and(|node| node.file_type().is_block_device());
        if is_name
            && self.is_live()
            && is_disk()
            && let Some(target) = node.to_str().and_then(|node| by_path(machine, node))
        {
            return Ok(target);
        }
        if is_name && let Some(index) = named(machine, name) {
            return Ok(Target::of(vec![index]));
        }
        if self.is_live()
            && let Some(exporter) = held::exporter(path)
        {
            return by_buffer(machine, path, &exporter);
        }
        if self.is_live()
            && is_name
            && let Some(target) = by_class(machine, Path::new("/sys"), name)
        {
            return Ok(target);
        }
        if self.is_live()
            && let Some(target) = by_path(machine, text)
        {
            return Ok(target);
        }
        let known = match self.is_live() {
            true => {
                "by address (0000:41:00.0), name (nvme0n1, mlx5_0, eth0), node (/dev/dri/renderD128), a file on a disk, or \
                 a dma-buf's descriptor (/proc/PID/fd/N)"
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
    /// A file's mount, and the layers below it.
    pub mount: Option<String>,
}

impl Target {
    fn of(functions: Vec<Index>) -> Target {
        Target {
            functions,
            reasons: Vec::new(),
            mount: None,
        }
    }
}

/// `0000:41:00.0`, or `41:00.0` in the first domain.
fn address(text: &str) -> Option<PciAddress> {
    let short = || format!("0000:{text}").parse().ok();
    text.parse().ok().or_else(short)
}

/// A device's name, or the name of a disk's partition.
fn named(machine: &Machine, name: &str) -> Option<Index> {
    let disk = || {
        let (disk, number) = name.rsplit_once('p')?;
        let is_partition = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        machine.named(disk).filter(|_| is_partition)
    };
    machine.named(name).or_else(disk)
}

/// A dma-buf that a process holds, by its descriptor in /proc.
fn by_buffer(machine: &Machine, path: &Path, exporter: &str) -> Result<Target, NotFound> {
    let text = format!("{} (a dma-buf of {exporter})", path.display());
    match held::known(path, exporter) {
        Known {
            device: Some(device),
            ..
        } => match machine.find(device) {
            Some(index) => Ok(Target::of(vec![index])),
            None => Err(NotFound(format!("{text}: {device}: no such PCI function"))),
        },
        Known {
            place: Some(Place::System),
            ..
        } => Ok(Target {
            functions: Vec::new(),
            reasons: vec![reasons::not_pci(&format!("{text}, in system memory,"))],
            mount: None,
        }),
        _ => Err(NotFound(format!(
            "{text}: the device that has it is not known. Name the device, or run this as the process's user or root"
        ))),
    }
}

/// An RDMA device or a network interface (`/sys/class`). Those in software are on no PCI device.
fn by_class(machine: &Machine, sys: &Path, name: &str) -> Option<Target> {
    let of = |class: &str| sys.join("class").join(class).join(name).canonicalize().ok();
    let rdma = of("infiniband");
    let line = |file: &str| {
        let text = std::fs::read_to_string(rdma.as_ref()?.join(file)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let directory = rdma.clone().or_else(|| of("net"))?;
    let function = directory
        .iter()
        .rev()
        .find_map(|part| part.to_str()?.parse().ok())
        .and_then(|address| machine.find(address));
    let mut target = Target::of(function.into_iter().collect());
    if target.functions.is_empty() {
        let interface = line("parent").or_else(|| line("ports/1/gid_attrs/ndevs/0"));
        let what = match (rdma, interface) {
            (Some(_), Some(interface)) => format!("{name}, software RDMA on {interface},"),
            (Some(_), None) => format!("{name}, software RDMA,"),
            (None, _) => format!("{name}, a network interface in software,"),
        };
        target.reasons.push(reasons::not_pci(&what));
    }
    Some(target)
}

/// What is between a disk's name and its PCI function.
pub fn of_disk(disk: &BlockDevice) -> Vec<Reason> {
    let layer = disk.layer.map(|layer| reasons::of_layer(&disk.name, layer));
    let several = reasons::of_several(&disk.name, disk.disks);
    layer.into_iter().chain(several).collect()
}

fn by_path(machine: &Machine, text: &str) -> Option<Target> {
    let path = fs::canonicalize(text).ok()?;
    let metadata = fs::metadata(&path).ok()?;
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
            target.reasons = reasons::of_stack(&sysfs.stack(major, minor));
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
            target.reasons.extend(of_disk(&disk));
        }
    }
    if target.functions.is_empty() {
        target.reasons.push(reasons::not_pci(text));
    }
    Some(target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerbuf_topo::Code;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_class_leads_to_its_function_or_to_what_is_in_software() {
        let root = std::env::temp_dir().join(format!("peerbuf-classes-{}", std::process::id()));
        let function = "devices/pci0000:00/0000:00:03.0";
        for (class, name, place) in [
            ("net", "eth0", format!("{function}/virtio1/net/eth0")),
            ("net", "br0", "devices/virtual/net/br0".into()),
            (
                "infiniband",
                "rxe0",
                "devices/virtual/infiniband/rxe0".into(),
            ),
            (
                "infiniband",
                "mlx5_0",
                format!("{function}/infiniband/mlx5_0"),
            ),
        ] {
            fs::create_dir_all(root.join(&place)).unwrap();
            let classes = root.join("class").join(class);
            fs::create_dir_all(&classes).unwrap();
            symlink(root.join(place), classes.join(name)).unwrap();
        }
        fs::write(
            root.join("devices/virtual/infiniband/rxe0/parent"),
            "eth0\n",
        )
        .unwrap();
        fs::create_dir_all(root.join("bus/pci/devices")).unwrap();
        let link = root.join("bus/pci/devices/0000:00:03.0");
        symlink(format!("../../../{function}"), link).unwrap();
        let machine = peerbuf_topo::tree(&root).unwrap();
        let find = |name| by_class(&machine, &root, name);
        let evidence = |name| {
            let reason = find(name)?.reasons[0].clone();
            assert_eq!(reason.code, Code::NotPci);
            Some(reason.evidence)
        };
        let found = ["eth0", "mlx5_0"].map(|name| find(name).unwrap().functions);
        let texts = ["rxe0", "br0", "eth9"].map(evidence);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, [vec![Index(0)], vec![Index(0)]]);
        assert!(texts[0].as_ref().unwrap().contains("software RDMA on eth0"));
        assert!(texts[1].as_ref().unwrap().contains("in software"));
        assert_eq!(texts[2], None);
        // A virtual machine's card has the name of its interface in a snapshot, too.
        assert_eq!(machine.named("eth0"), Some(Index(0)));
    }
}
