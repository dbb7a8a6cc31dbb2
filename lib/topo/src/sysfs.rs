//! Reads sysfs: the running kernel's, or a copy from another machine.
//!
//! A function's bridges are taken from the target of its link
//! (`../../../devices/pci0000:00/0000:00:01.0/...`), so a copy needs only the links in `bus/pci/devices`.
//! Without those, `devices` is searched.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use peerbuf_core::PciAddress;

use crate::config::Config;
use crate::error::ReadError;
use crate::machine::{Bar, Driver, Format, Function, Iommu, Kernel, Link, Machine, Processor};

/// The kernel options that affect peer-to-peer DMA. Others are not kept.
const OPTIONS: [&str; 9] = [
    "iommu",
    "iommu.passthrough",
    "iommu.strict",
    "intel_iommu",
    "amd_iommu",
    "arm-smmu.disable_bypass",
    "swiotlb",
    "pci",
    "pcie_acs_override",
];

/// Reads the running machine.
///
/// # Errors [`ReadError::NoDevices`] without sysfs or PCI.
pub fn running() -> Result<Machine, ReadError> {
    let mut machine = tree(Path::new("/sys"))?;
    let in_kubernetes = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    machine.in_container = Some(in_kubernetes || is_container(Path::new("/")));
    Ok(machine)
}

/// Reads a copy of sysfs: `root` contains `bus/pci/devices` or `devices`. `proc`, in `root` or beside it, may
/// have the kernel's version, command line and processor.
///
/// # Errors [`ReadError::NoDevices`] if it contains no PCI function.
pub fn tree(root: &Path) -> Result<Machine, ReadError> {
    let mut machine = Machine::empty(Format::Sysfs);
    let places = places(root);
    if places.is_empty() {
        return Err(ReadError::NoDevices {
            from: root.to_owned(),
        });
    }
    let mut found = read_functions(&places);
    for (place, function) in places.iter().zip(&mut found) {
        function.host = machine.host(&place.host, true, true);
    }
    let at = |address: PciAddress| {
        let known = places.binary_search_by_key(&address, |place| place.address);
        known.ok()
    };
    let parents: Vec<Option<usize>> = places
        .iter()
        .map(|place| place.parent.and_then(at))
        .collect();
    machine.arrange(found.into_iter().zip(parents).collect());

    let beside = [
        root.join("proc"),
        root.parent().unwrap_or(root).join("proc"),
    ];
    let proc_file = |name: &str| beside.iter().find_map(|proc| text(&proc.join(name)));
    machine.kernel = proc_file("sys/kernel/osrelease")
        .or_else(|| {
            proc_file("version")?
                .strip_prefix("Linux version ")
                .map(str::to_owned)
        })
        .and_then(|release| Kernel::parse(&release));
    let processors = proc_file("cpuinfo");
    machine.processor = processors.as_deref().and_then(processor);
    machine.is_virtual = is_virtual(root, processors.as_deref(), &machine);
    // An empty command line is known, too.
    machine.options = beside
        .iter()
        .find_map(|proc| fs::read_to_string(proc.join("cmdline")).ok())
        .map(|line| options(&line));
    let nodes = fs::read_dir(root.join("devices/system/node"));
    let nodes = nodes.into_iter().flatten().flatten().filter(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.strip_prefix("node")
            .is_some_and(|number| number.parse::<u32>().is_ok())
    });
    machine.nodes = Some(nodes.count() as u32).filter(|count| *count > 0);
    Ok(machine)
}

/// A function's directory in the tree.
struct Place {
    address: PciAddress,
    parent: Option<PciAddress>,
    /// The name of its host bridge's directory.
    host: String,
    directory: PathBuf,
}

/// All functions, sorted by address.
fn places(root: &Path) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
    let links = fs::read_dir(root.join("bus/pci/devices"));
    for entry in links.into_iter().flatten().flatten() {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        // Only the part from `devices` on, inside the tree: links in a copy must not lead out of it.
        let names: Vec<&str> = target.iter().filter_map(|name| name.to_str()).collect();
        let start = names.iter().position(|name| *name == "devices");
        if let Some(start) = start
            && !names[start..].contains(&"..")
        {
            places.extend(place(root, &names[start..]));
        }
    }
    if places.is_empty() {
        search(root, &mut vec!["devices".to_owned()], &mut places);
    }
    places.sort_by_key(|place| place.address);
    places.dedup_by_key(|place| place.address);
    places
}

fn place(root: &Path, names: &[&str]) -> Option<Place> {
    let address = names.last()?.parse().ok()?;
    let host = names.iter().rposition(|name| is_host(name))?;
    let parent = names.len().checked_sub(2).filter(|at| *at > host);
    Some(Place {
        address,
        parent: parent.and_then(|at| names[at].parse().ok()),
        host: names[host].to_owned(),
        directory: names.iter().fold(root.to_owned(), |at, name| at.join(name)),
    })
}

/// `pci0000:00`
pub(crate) fn is_host(name: &str) -> bool {
    let numbers = name
        .strip_prefix("pci")
        .and_then(|numbers| numbers.split_once(':'));
    numbers.is_some_and(|(domain, bus)| {
        let hex = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        hex(domain) && hex(bus)
    })
}

fn search(root: &Path, names: &mut Vec<String>, into: &mut Vec<Place>) {
    // Limits the depth: bridges nest no deeper than there are buses, but directories in a foreign tree may.
    if names.len() > 64 {
        return;
    }
    let directory = names.iter().fold(root.to_owned(), |at, name| at.join(name));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        // Skips links: they lead upwards, or to directories that are found anyway.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let is_function = name.parse::<PciAddress>().is_ok();
        let above = names.len() == 1;
        if above || is_function || is_host(&name) {
            names.push(name);
            if is_function {
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                into.extend(place(root, &names));
            }
            search(root, names, into);
            names.pop();
        }
    }
}

/// Reads all, in order, on as many threads as there are processors.
fn read_functions(places: &[Place]) -> Vec<Function> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = places.len().div_ceil(threads).max(64);
    let read = |places: &[Place]| -> Vec<Function> {
        let read = |place: &Place| read_function(&place.directory, place.address);
        places.iter().map(read).collect()
    };
    std::thread::scope(|scope| {
        let (mine, others) = places.split_at(share.min(places.len()));
        let others: Vec<_> = others
            .chunks(share)
            .map(|places| scope.spawn(move || read(places)))
            .collect();
        let mut all = read(mine);
        for other in others {
            match other.join() {
                Ok(functions) => all.extend(functions),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

fn read_function(directory: &Path, address: PciAddress) -> Function {
    let mut function = Function::at(address);
    // Lists the directory once, so that no missing file is opened.
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    let has = |name: &str| names.iter().any(|known| known == name);
    let line = |name: &str| {
        let first = name.split('/').next().unwrap_or(name);
        has(first).then(|| text(&directory.join(name))).flatten()
    };

    let mut bytes = [0; 4096];
    let read = fs::File::open(directory.join("config")).and_then(|mut file| {
        let whole = file.metadata()?.len() as usize;
        let mut read = 0;
        // sysfs returns only as much as the caller may see; at the end, read returns 0.
        loop {
            match file.read(&mut bytes[read..])? {
                0 => break,
                count => read += count,
            }
        }
        Ok((read, whole))
    });
    let (read, whole) = read.unwrap_or((0, 0));
    // In a copy, the file's length is what its reader saw; only the kernel's own reports the true size.
    let is_sysfs = directory.starts_with("/sys");
    let config = Config::new(
        &bytes[..read],
        is_sysfs.then_some(whole).or((whole > 256).then_some(whole)),
    );

    if let Some(event) = line("uevent") {
        for field in event.lines().filter_map(|line| line.split_once('=')) {
            match field {
                ("DRIVER", name) => function.driver = Some(Driver::Bound(name.to_owned())),
                ("PCI_CLASS", class) => function.class = u32::from_str_radix(class, 16).ok(),
                ("PCI_ID", id) => {
                    function.id = id.split_once(':').and_then(|(vendor, device)| {
                        let hex = |text| u16::from_str_radix(text, 16).ok();
                        Some((hex(vendor)?, hex(device)?))
                    });
                }
                _ => {}
            }
        }
        function.driver.get_or_insert(Driver::None);
    }
    let hex = |name: &str| -> Option<u64> {
        u64::from_str_radix(line(name)?.strip_prefix("0x")?, 16).ok()
    };
    // A copy may lack `uevent`. A virtual function's configuration space has no ID.
    function.id = function
        .id
        .or_else(|| config.id())
        .or_else(|| Some((hex("vendor")? as u16, hex("device")? as u16)));
    function.class = function
        .class
        .or_else(|| config.class())
        .or_else(|| hex("class").map(|class| class as u32));
    function.port = config.port();
    function.acs = config.acs();
    function.link = config.link().or_else(|| link(&line));
    if function.port.is_none() && function.class.is_some_and(|class| class >> 8 == 0x0604) {
        // Without root, infer PCI Express from the presence of a link.
        let on_root_bus = directory
            .parent()
            .and_then(Path::file_name)
            .and_then(|name| name.to_str());
        let on_root_bus = on_root_bus.is_some_and(is_host);
        function.port =
            (on_root_bus && has("max_link_speed")).then_some(crate::machine::Port::RootPort);
    }
    function.bars = line("resource").map(|resource| bars(&resource, config.resizable()));
    function.is_virtual = has("physfn");
    function.node = line("numa_node").and_then(|node| node.parse().ok());
    function.dma_bits = line("dma_mask_bits").and_then(|bits| bits.parse().ok());
    function.lends = has("p2pmem")
        .then(|| line("p2pmem/size")?.parse().ok())
        .flatten();
    let group = has("iommu_group").then(|| fs::read_link(directory.join("iommu_group")));
    function.iommu = match group {
        Some(Ok(group)) => group
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok())
            .map(|number| Iommu::Group {
                number,
                domain: line("iommu_group/type"),
            }),
        // Not conclusive in a copy: it may lack the link.
        Some(Err(_)) => None,
        None => is_sysfs.then_some(Iommu::None),
    };
    if has("nvme") {
        // The driver shows the buffer's registers only of a controller that has one.
        let size = nvme_names(&directory.join("nvme"), &mut function.names);
        function.cmb = size.or(is_sysfs.then_some(0));
    }
    for class in ["net", "infiniband", "drm", "block", "video4linux", "accel"] {
        if has(class) {
            class_names(&directory.join(class), &mut function.names);
        }
    }
    // A virtual machine's card: the driver's device is below that of virtio.
    for below in names.iter().filter(|name| is_virtio(name)) {
        for class in ["net", "block", "drm"] {
            class_names(&directory.join(below).join(class), &mut function.names);
        }
    }
    function.names.sort();
    function.names.dedup();
    function
}

/// `virtio3`
fn is_virtio(name: &str) -> bool {
    let number = name.strip_prefix("virtio");
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Adds the names in a directory such as `net`. Names that could identify a person or a machine are left to
/// [`save`](crate::save).
fn class_names(directory: &Path, into: &mut Vec<String>) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    into.extend(entries.filter_map(|entry| entry.file_name().into_string().ok()));
}

/// Adds the names of NVMe controllers and their disks: `nvme0`, `nvme0n1`, or `nvme0c0n1` with several paths. Returns
/// the size of the controller memory buffer (CMB), if one is shown.
fn nvme_names(directory: &Path, into: &mut Vec<String>) -> Option<u64> {
    let mut size = None;
    let mut controllers = Vec::new();
    class_names(directory, &mut controllers);
    for name in controllers {
        let mut below = Vec::new();
        class_names(&directory.join(&name), &mut below);
        if below.iter().any(|file| file == "cmb") {
            size = text(&directory.join(&name).join("cmb")).and_then(|text| cmb_size(&text));
        }
        let is_disk = |disk: &String| {
            let rest = disk.strip_prefix(name.as_str());
            let number = rest.and_then(|rest| rest.strip_prefix('n'));
            number.is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()))
        };
        into.extend(below.into_iter().filter(is_disk));
        into.push(name);
    }
    size
}

/// The size in bytes in an NVMe driver's `cmb`: lines with the registers CMBLOC and CMBSZ (NVMe base specification,
/// 3.1.4.14).
fn cmb_size(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with("cmbsz"))?;
    let register = line.split_once("0x")?.1.trim();
    let register = u64::from_str_radix(register, 16).ok()?;
    // Size in units of 4 KiB shifted left by four bits for each step.
    (register >> 12).checked_shl(12 + 4 * (register >> 8 & 0xf) as u32)
}

/// The link, without access to configuration space: `8.0 GT/s PCIe`, and lanes.
fn link(line: &dyn Fn(&str) -> Option<String>) -> Option<Link> {
    let speed = |name| {
        let text: String = line(name)?;
        tenths(text.split_whitespace().next()?)
    };
    let width = |name| line(name)?.parse().ok();
    let width_now: u8 = width("current_link_width")?;
    (width_now != 0).then_some(())?;
    Some(Link {
        speed: speed("current_link_speed")?,
        width: width_now,
        most: speed("max_link_speed").zip(width("max_link_width")),
    })
}

/// Parses a decimal number in tenths: `2.5` gives 25.
pub(crate) fn tenths(number: &str) -> Option<u16> {
    let number: f32 = number.parse().ok()?;
    (0.0..1000.0)
        .contains(&number)
        .then(|| (number * 10.0).round() as u16)
}

/// Parses `resource`: one line per BAR with start, end and flags (`include/linux/ioport.h`).
fn bars(resource: &str, resizable: [Option<u64>; 6]) -> Vec<Bar> {
    const MEMORY: u64 = 0x200;
    const PREFETCH: u64 = 0x2000;
    const MEM_64: u64 = 0x0010_0000;
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let bar = |(index, line): (usize, &str)| {
        let mut fields = line.split_whitespace();
        let (begin, end, flags) = (
            number(fields.next()?)?,
            number(fields.next()?)?,
            number(fields.next()?)?,
        );
        let size = end.checked_sub(begin)?.checked_add(1)?;
        (flags & MEMORY != 0 && size > 1).then_some(Bar {
            index: index as u8,
            size,
            address_bits: (u64::BITS - end.leading_zeros()) as u8,
            is_64bit: flags & MEM_64 != 0,
            prefetchable: flags & PREFETCH != 0,
            resizable_to: resizable[index],
        })
    };
    resource
        .lines()
        .take(6)
        .enumerate()
        .filter_map(bar)
        .collect()
}

fn processor(cpuinfo: &str) -> Option<Processor> {
    let field = |name: &str| {
        let line = cpuinfo
            .lines()
            .find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    Some(match (field("vendor_id"), field("cpu family")) {
        (Some(vendor), Some(family)) => Processor {
            vendor,
            family: family.parse().ok()?,
        },
        // Other architectures use other field names.
        _ if !cpuinfo.trim().is_empty() => Processor {
            vendor: String::new(),
            family: 0,
        },
        _ => return None,
    })
}

fn is_virtual(root: &Path, cpuinfo: Option<&str>, machine: &Machine) -> Option<bool> {
    // An x86 processor has a flag for it; QEMU's own devices exist only in virtual machines.
    let flags = cpuinfo.and_then(|text| text.lines().find(|line| line.starts_with("flags")));
    let says = flags.map(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"));
    let vendor = text(&root.join("class/dmi/id/sys_vendor"));
    let known = [
        "QEMU",
        "Amazon EC2",
        "Google",
        "Microsoft Corporation",
        "VMware",
        "Xen",
    ];
    // Some of the vendors rent bare metal, too, so the name is conclusive only for QEMU.
    let is_qemu = vendor.as_deref() == Some(known[0])
        || machine
            .functions
            .iter()
            .any(|f| f.id.is_some_and(|(vendor, _)| vendor == 0x1b36));
    says.or(is_qemu.then_some(true))
}

/// Whether `root` is a container's: by the marker files of Docker, Podman and systemd, by the cgroup of its first
/// process, or by its root filesystem. With a cgroup namespace of its own, as containerd gives by default, only the
/// last tells.
fn is_container(root: &Path) -> bool {
    const RUNTIMES: [&str; 7] = [
        "docker",
        "containerd",
        "kubepods",
        "libpod",
        "crio",
        "lxc",
        "containers/storage",
    ];
    let names_a_runtime = |text: &str| RUNTIMES.iter().any(|name| text.contains(name));
    let proc_file = |name: &str| text(&root.join("proc/1").join(name)).unwrap_or_default();
    // The root filesystem's mount only: hosts have mounts of containers, too.
    let mounts = proc_file("mountinfo");
    let on_root = |line: &&str| line.split(' ').nth(4) == Some("/");
    [".dockerenv", "run/.containerenv", "run/systemd/container"]
        .iter()
        .any(|path| root.join(path).exists())
        || names_a_runtime(&proc_file("cgroup"))
        || mounts.lines().filter(on_root).any(names_a_runtime)
}

fn options(line: &str) -> Vec<String> {
    let words = line.split_whitespace();
    let kept = words.filter(|word| OPTIONS.contains(&word.split('=').next().unwrap_or(word)));
    kept.map(str::to_owned).collect()
}

/// A file's text, trimmed.
fn text(path: &Path) -> Option<String> {
    // sysfs's attributes fit into a page. `take` saves the calls for a length, which sysfs does not tell.
    let file = fs::File::open(path).ok()?;
    let mut bytes = Vec::with_capacity(4096);
    file.take(u64::MAX).read_to_end(&mut bytes).ok()?;
    let text = std::str::from_utf8(&bytes).ok()?.trim();
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_memory_buffer_has_the_size_in_its_register() {
        for (text, size) in [
            // 64 MiB in units of 4 KiB, 2 units of 16 MiB, none.
            ("cmbloc : 0x00000002\ncmbsz  : 0x0400001f\n", Some(64 << 20)),
            ("cmbloc : 0x00000002\ncmbsz  : 0x0000231f\n", Some(32 << 20)),
            ("cmbloc : 0x00000000\ncmbsz  : 0x00000000\n", Some(0)),
            ("", None),
            ("cmbsz  : new", None),
        ] {
            assert_eq!(cmb_size(text), size, "{text}");
        }
    }

    #[test]
    fn a_container_is_known_by_its_marks_and_a_host_of_containers_is_none() {
        let is = |files: &[(&str, &str)]| {
            let root = tempfile::tempdir().unwrap();
            for (file, text) in files {
                let path = root.path().join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            is_container(root.path())
        };
        for marks in [
            (".dockerenv", ""),
            ("run/.containerenv", ""),
            ("run/systemd/container", "lxc"),
            (
                "proc/1/cgroup",
                "0::/kubepods.slice/kubepods-besteffort.slice/cri-containerd-1f.scope\n",
            ),
            ("proc/1/cgroup", "12:cpu:/docker/0123abcd\n"),
            // containerd with a cgroup namespace.
            (
                "proc/1/mountinfo",
                "20 1 0:50 / / rw - overlay overlay rw,upperdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/1\n",
            ),
        ] {
            assert!(is(&[marks]), "{marks:?}");
        }
        let host = [
            ("proc/1/cgroup", "0::/init.scope\n"),
            (
                "proc/1/mountinfo",
                "20 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\n\
                 21 20 0:50 / /run/containerd/x/rootfs rw - overlay overlay rw,upperdir=/var/lib/containerd/1\n",
            ),
        ];
        assert!(!is(&host));
        assert!(!is(&[]));
    }
}
