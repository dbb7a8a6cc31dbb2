//! The cost of an exporter's operations in instructions: peerbuf.ko compared with vfio-pci, for the same BAR,
//! with peerbuf_probe.ko as the importer of both.
//!
//! Runs in a guest whose clock counts instructions. The importer's calls are timed in the kernel, around a
//! single function; export, revoke, restore and move are timed here, around a single system call.

use std::arch::x86_64::_rdtsc;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

use peerbuf::device::vfio::VfioDevice;
use peerbuf_uapi::{self as abi, probe};

use crate::importer::{DYNAMIC, Importer, PEER};
use crate::modules;
use crate::node::{Node, nvme_bdf};

/// The number of measurements per median.
const ROUNDS: usize = 101;

const SIZES: [(&str, u64); 3] = [("4 KiB", 1 << 12), ("1 MiB", 1 << 20), ("64 MiB", 1 << 26)];

const IMPORTERS: [usize; 5] = [0, 1, 4, 16, 64];

/// The number of instructions executed so far, which the guest's time stamp counter counts.
fn instructions() -> u64 {
    // SAFETY: Reads a counter that every x86-64 CPU has.
    unsafe { _rdtsc() }
}

/// The instructions of a call, and its result.
pub fn counted<T>(call: impl FnOnce() -> T) -> (u64, T) {
    let start = instructions();
    let result = call();
    (instructions() - start, result)
}

/// The median of several measurements, after a few that are discarded.
pub fn median(mut measure: impl FnMut() -> u64) -> u64 {
    for _ in 0..5 {
        measure();
    }
    let mut all: Vec<u64> = (0..ROUNDS).map(|_| measure()).collect();
    all.sort_unstable();
    all[ROUNDS / 2]
}

/// An exporter of a BAR with revoke and restore.
trait Exporter {
    /// Exports the start of BAR 2; returns the instructions of the system call, and the dma-buf.
    fn export(&self, size: u64) -> (u64, OwnedFd);
    /// The instructions of a revoke.
    fn revoke(&self, fd: &OwnedFd) -> u64;
    /// The instructions of a restore.
    fn restore(&self, fd: &OwnedFd) -> u64;
}

struct Peerbuf(Node);

impl Exporter for Peerbuf {
    fn export(&self, size: u64) -> (u64, OwnedFd) {
        let mut request = Node::request(Some(0), size);
        let (cost, answer) = counted(|| self.0.call_export(&mut request));
        answer.unwrap();
        // SAFETY: The ioctl has just made this descriptor.
        (cost, unsafe { OwnedFd::from_raw_fd(request.export.fd) })
    }

    fn revoke(&self, fd: &OwnedFd) -> u64 {
        let (cost, answer) = counted(|| self.0.revoke(fd, 1000));
        assert_eq!(answer.unwrap().holders, 0);
        cost
    }

    fn restore(&self, fd: &OwnedFd) -> u64 {
        let (cost, answer) = counted(|| self.0.restore(fd));
        answer.unwrap();
        cost
    }
}

/// vfio-pci revokes all exports of a device when the device's memory is disabled, and restores them when it
/// is enabled.
struct VfioPci(VfioDevice);

impl VfioPci {
    const DEVICE_FEATURE: libc::c_ulong = 0x3b75;
    /// The offset of the command register in the device's file, where configuration space begins at 7 << 40.
    const COMMAND: i64 = (7 << 40) + 4;

    fn set_memory(&self, on: bool) -> u64 {
        let command: u16 = if on { 2 } else { 0 };
        let fd = self.0.as_fd().as_raw_fd();
        // SAFETY: The call reads two bytes, which the variable has.
        let (cost, written) =
            counted(|| unsafe { libc::pwrite(fd, (&raw const command).cast(), 2, Self::COMMAND) });
        assert_eq!(written, 2, "{}", io::Error::last_os_error());
        cost
    }
}

impl Exporter for VfioPci {
    fn export(&self, size: u64) -> (u64, OwnedFd) {
        /// `struct vfio_device_feature`, with a `struct vfio_device_feature_dma_buf` of one range.
        #[repr(C)]
        struct Feature {
            argsz: u32,
            flags: u32,
            region_index: u32,
            open_flags: u32,
            dma_buf_flags: u32,
            nr_ranges: u32,
            offset: u64,
            length: u64,
        }
        let feature = Feature {
            argsz: size_of::<Feature>() as u32,
            // VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_DMA_BUF
            flags: 1 << 16 | 11,
            region_index: 2,
            open_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
            dma_buf_flags: 0,
            nr_ranges: 1,
            offset: 0,
            length: size,
        };
        let device = self.0.as_fd().as_raw_fd();
        // SAFETY: The argument is the struct of this feature.
        let (cost, fd) =
            counted(|| unsafe { libc::ioctl(device, Self::DEVICE_FEATURE, &raw const feature) });
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: The ioctl has just made this descriptor.
        (cost, unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn revoke(&self, _fd: &OwnedFd) -> u64 {
        self.set_memory(false)
    }

    fn restore(&self, _fd: &OwnedFd) -> u64 {
        self.set_memory(true)
    }
}

/// The costs of one exporter's operations.
struct Costs {
    /// By size: export, attach, map, unmap, detach.
    steps: Vec<[u64; 5]>,
    /// By number of importers with a mapping: revoke, restore.
    access: Vec<[u64; 2]>,
}

impl Costs {
    fn of(exporter: &impl Exporter) -> Self {
        let disk = nvme_bdf();
        let attach = |fd: &OwnedFd| Importer::attach(fd.as_fd(), &disk, DYNAMIC | PEER, 0).unwrap();
        let steps = SIZES.map(|(_, size)| {
            let mut all: [Vec<u64>; 5] = Default::default();
            for round in 0..ROUNDS + 5 {
                let (export, fd) = exporter.export(size);
                let importer = attach(&fd);
                let map = importer.map_for(probe::BIDIRECTIONAL).unwrap();
                let unmap = importer.step(probe::IOC_UNMAP).unwrap();
                let detach = importer.step(probe::IOC_DETACH).unwrap();
                let costs = [export, importer.attach_ns, map, unmap, detach];
                // Discards the first rounds.
                if round >= 5 {
                    for (all, cost) in all.iter_mut().zip(costs) {
                        all.push(cost);
                    }
                }
            }
            all.map(|mut all| {
                all.sort_unstable();
                all[ROUNDS / 2]
            })
        });
        let access = IMPORTERS.map(|count| {
            let (_, fd) = exporter.export(1 << 20);
            let importers: Vec<Importer> = (0..count).map(|_| attach(&fd)).collect();
            let mut restores = Vec::new();
            let revoke = median(|| {
                for importer in &importers {
                    importer.map_for(probe::BIDIRECTIONAL).unwrap();
                }
                let revoke = exporter.revoke(&fd);
                for importer in &importers {
                    assert_eq!(importer.state().mapped, 0);
                }
                restores.push(exporter.restore(&fd));
                revoke
            });
            restores.sort_unstable();
            [revoke, restores[restores.len() / 2]]
        });
        Self {
            steps: steps.into(),
            access: access.into(),
        }
    }

    /// The cost of each additional importer, from the second on.
    fn slope(&self) -> f64 {
        let last = IMPORTERS.len() - 1;
        let more = self.access[last][0] - self.access[1][0];
        more as f64 / (IMPORTERS[last] - IMPORTERS[1]) as f64
    }
}

/// The number of bytes to move.
const MOVED: u64 = 4 << 20;

/// The costs of a move to system memory, and of one to the BAR.
fn moves(node: &Node) -> [u64; 2] {
    let fd = node.export_movable(MOVED).unwrap();
    let mut back = Vec::new();
    let out = median(|| {
        let (out, moved) = counted(|| node.move_to(&fd, abi::PLACEMENT_SYSTEM));
        assert_eq!(moved.unwrap().1, MOVED);
        let (home, moved) = counted(|| node.move_to(&fd, abi::PLACEMENT_DEVICE));
        assert_eq!(moved.unwrap().1, MOVED);
        back.push(home);
        out
    });
    back.sort_unstable();
    [out, back[back.len() / 2]]
}

/// The costs of a plain copy of as many bytes, from the BAR and to it. The fixture `iocopy` measures them on
/// the BAR of a device without a driver.
fn copies(bdf: &str) -> [u64; 2] {
    let hex = |text: &str| u32::from_str_radix(text, 16).unwrap();
    let (bus, devfn) = (hex(&bdf[5..7]), hex(&bdf[8..10]) << 3 | hex(&bdf[11..]));
    let loaded = Command::new("insmod")
        .args([
            "/opt/peerbuf/fixtures/iocopy.ko".into(),
            format!("bytes={MOVED}"),
        ])
        .args([format!("bus={bus}"), format!("devfn={devfn}")])
        .status();
    assert!(loaded.unwrap().success(), "insmod iocopy.ko");
    ["from_ns", "to_ns"].map(|name| {
        let path = format!("/sys/module/iocopy/parameters/{name}");
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    })
}

fn verdict(as_wanted: bool) -> &'static str {
    if as_wanted { "yes" } else { "**no**" }
}

/// Prints a line of the first table.
fn line(what: &str, ours: u64, theirs: u64) {
    let ratio = ours as f64 / theirs as f64;
    println!(
        "| {what} | {ours} | {theirs} | {ratio:.2} | {} |",
        verdict(ratio <= 1.0)
    );
}

/// Measures with the device bound to vfio-pci.
fn as_vfio<T>(bdf: &str, measure: impl FnOnce(&VfioPci) -> T) -> T {
    modules::rebind(bdf, "vfio-pci");
    let vfio = VfioPci(VfioDevice::open(bdf.parse().unwrap()).unwrap());
    // The first access claims the BAR.
    vfio.0.registers(2).unwrap();
    vfio.set_memory(true);
    measure(&vfio)
}

fn as_peerbuf<T>(bdf: &str, measure: impl FnOnce(Peerbuf) -> T) -> T {
    modules::rebind(bdf, "peerbuf");
    measure(Peerbuf(Node::open(bdf).unwrap()))
}

/// The costs of vfio-pci's disabling and enabling of the device's memory without any export.
fn switch(vfio: &VfioPci) -> [u64; 2] {
    let mut on = Vec::new();
    let off = median(|| {
        let off = vfio.set_memory(false);
        on.push(vfio.set_memory(true));
        off
    });
    on.sort_unstable();
    [off, on[on.len() / 2]]
}

/// Measures everything and prints it, as Markdown.
pub fn table() {
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let clock = fs::read_to_string(clock).unwrap();
    assert_eq!(clock.trim(), "tsc", "the kernel's figures would be rounded");
    modules::load("vfio-pci");
    let bdf = Node::largest().bdf;
    // Fills the IOMMU's caches of addresses and tables, whose cost the first measurement would include.
    as_vfio(&bdf, |vfio| drop(Costs::of(vfio)));
    let (ours, moved) = as_peerbuf(&bdf, |peerbuf| {
        drop(Costs::of(&peerbuf));
        (Costs::of(&peerbuf), moves(&peerbuf.0))
    });
    let (theirs, [off, on]) = as_vfio(&bdf, |vfio| (Costs::of(vfio), switch(vfio)));
    modules::unbind(&bdf);
    let copies = copies(&bdf);

    let topology = std::env::var("PEERBUF_LAB_TOPOLOGY").unwrap_or_default();
    println!("## Topology `{topology}`, with an IOMMU\n");
    println!("| step | peerbuf | vfio-pci | ratio | at most 1.00 |\n|---|---|---|---|---|");
    let names = ["export to fd", "attach", "map", "unmap", "detach"];
    for ((size, _), (ours, theirs)) in SIZES.iter().zip(ours.steps.iter().zip(&theirs.steps)) {
        for (name, (&ours, &theirs)) in names.iter().zip(ours.iter().zip(theirs)) {
            line(&format!("{name}, {size}"), ours, theirs);
        }
    }
    for (step, name) in ["revoke", "restore"].iter().enumerate() {
        for (i, count) in IMPORTERS.iter().enumerate() {
            let what = format!("{name}, {count} importers");
            line(&what, ours.access[i][step], theirs.access[i][step]);
        }
    }
    println!(
        "\nvfio-pci revokes when the device's memory is switched off in its command register, and \
         restores when it is switched on. Without an export these writes cost {off} and {on}.\n"
    );
    println!("| | peerbuf | vfio-pci |\n|---|---|---|");
    println!(
        "| revoke, each importer more | {:.0} | {:.0} |",
        ours.slope(),
        theirs.slope()
    );

    println!("\n| map of 64 MiB over map of 4 KiB | ratio | at most 1.05 |\n|---|---|---|");
    for (name, costs) in [("peerbuf", &ours), ("vfio-pci", &theirs)] {
        let ratio = costs.steps[2][2] as f64 / costs.steps[0][2] as f64;
        println!("| {name} | {ratio:.2} | {} |", verdict(ratio <= 1.05));
    }
    println!(
        "\n| {} MiB | move | one copy | share | at least 0.90 |\n|---|---|---|---|---|",
        MOVED >> 20
    );
    let names = [
        "to system memory, `memcpy_fromio`",
        "to the BAR, `memcpy_toio`",
    ];
    for (name, (moved, copy)) in names.iter().zip(moved.iter().zip(copies)) {
        let share = copy as f64 / *moved as f64;
        println!(
            "| {name} | {moved} | {copy} | {share:.2} | {} |",
            verdict(share >= 0.9)
        );
    }
    println!();
}
