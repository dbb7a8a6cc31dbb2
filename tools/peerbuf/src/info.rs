//! `peerbuf info`: what this machine has, and what it lacks.

use std::path::Path;
use std::process::ExitCode;

use peerbuf::error::{ExportError, Unavailable};
use peerbuf::export::{gpu, peerbuf as module, provider, udmabuf};
use peerbuf::plan::topology::{PciAddress, Sysfs};
use serde::Serialize;

use crate::table::{self, Table};
use crate::{Failure, places, say, size};

/// Arguments of `peerbuf info`.
#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// The exporters and devices of this machine, and the missing ones; a part of the report of `peerbuf doctor`.
#[derive(Serialize)]
pub struct Info {
    kernel: String,
    /// The version of the loaded peerbuf.ko.
    module: Option<String>,
    devices: Vec<Device>,
    providers: Vec<Provider>,
    udmabuf: bool,
    disks: Vec<Disk>,
    gpu_runtimes: Vec<GpuRuntime>,
    missing: Vec<Missing>,
}

#[derive(Serialize)]
struct Device {
    address: String,
    /// Vendor and device id, as `lspci -n` writes them.
    id: String,
    node: String,
    bars: Vec<Bar>,
}

#[derive(Serialize)]
struct Bar {
    index: u8,
    size: u64,
    free: u64,
    largest_free: u64,
    exports: u64,
    prefetchable: bool,
    is_64bit: bool,
    exportable: bool,
    pages: bool,
    write_combining: bool,
}

/// A device whose own driver lends memory to peers.
#[derive(Serialize)]
struct Provider {
    address: String,
    size: u64,
    available: u64,
}

/// A GPU runtime: its library, and the number of its devices or the reason why it cannot be
/// used.
#[derive(Serialize)]
struct GpuRuntime {
    name: String,
    library: &'static str,
    devices: Option<u32>,
    why: Option<String>,
}

#[derive(Serialize)]
struct Disk {
    name: String,
    functions: Vec<String>,
    logical_block: u32,
    nvme: bool,
    mounts: Vec<String>,
    /// For each device, the bridge closest to both, if there is one below the host bridge.
    common_bridges: Vec<CommonBridge>,
}

#[derive(Serialize)]
struct CommonBridge {
    device: String,
    bridge: Option<String>,
}

#[derive(Serialize)]
struct Missing {
    what: String,
    remedy: String,
}

/// Shows the report. A machine that lacks everything is not an error.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let info = collect();
    if arguments.json {
        say::answer(serde_json::to_string(&info)?)?;
    } else {
        let width = table::width();
        let mut text = show(&info, width);
        for missing in &info.missing {
            text += &table::missing(&missing.what, &missing.remedy, width);
        }
        say::answer(text.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Info {
    /// A missing requirement and its remedy.
    pub fn missing(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = self.missing.iter();
        all.map(|missing| (missing.what.as_str(), missing.remedy.as_str()))
    }
}

pub fn collect() -> Info {
    let mut missing = Vec::new();
    let mut devices = Vec::new();
    let mut addresses = Vec::new();
    match module::probe() {
        Ok(nodes) => {
            for node in nodes {
                let opened = module::Device::open_node(&node);
                match opened.and_then(|device| Ok((device.query()?, device))) {
                    Ok((info, device)) => {
                        addresses.push(info.address);
                        devices.push(describe_device(&info, device.path()));
                    }
                    Err(ExportError::Unavailable(error)) => missing.push(lack(&error)),
                    Err(other) => missing.push(Missing {
                        what: other.to_string(),
                        remedy: String::new(),
                    }),
                }
            }
        }
        Err(error) => missing.push(lack(&error)),
    }
    let mut providers = Vec::new();
    match provider::probe() {
        Ok(found) => {
            for address in found {
                let Some(pool) = Sysfs::default().pool(address) else {
                    continue;
                };
                providers.push(Provider {
                    address: address.to_string(),
                    size: pool.size,
                    available: pool.available,
                });
            }
        }
        Err(error) => missing.push(lack(&error)),
    }
    let udmabuf = match udmabuf::probe() {
        Ok(()) => true,
        Err(error) => {
            missing.push(lack(&error));
            false
        }
    };
    let disks = describe_disks(&addresses);
    if !disks.iter().any(|disk| disk.nvme) {
        missing.push(Missing {
            what: "no NVMe disk".into(),
            remedy: "only an NVMe disk does peer-to-peer DMA; others get staged copies".into(),
        });
    }
    let line = |path| {
        std::fs::read_to_string(path)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let module = module_version(
        Path::new("/sys/module/peerbuf").exists(),
        line("/sys/module/peerbuf/version"),
        !devices.is_empty(),
    );
    Info {
        kernel: line("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into()),
        module,
        devices,
        providers,
        udmabuf,
        disks,
        gpu_runtimes: gpu_runtimes(),
        missing,
    }
}

fn gpu_runtimes() -> Vec<GpuRuntime> {
    let describe = |(runtime, found): (gpu::Runtime, Result<u32, String>)| GpuRuntime {
        name: runtime.to_string(),
        library: runtime.library(),
        devices: found.as_ref().ok().copied(),
        why: found.err(),
    };
    gpu::probe().into_iter().map(describe).collect()
}

/// The version of a loaded module, as far as it is known. Without sysfs, the module's nodes
/// prove that it is loaded.
fn module_version(in_sysfs: bool, version: Option<String>, answers: bool) -> Option<String> {
    match (version, in_sysfs || answers) {
        (Some(version), _) => Some(version),
        (None, true) if in_sysfs => Some("loaded".into()),
        (None, true) => Some("loaded (its version is in /sys, which is not here)".into()),
        (None, false) => None,
    }
}

fn lack(error: &Unavailable) -> Missing {
    Missing {
        what: format!("{}: {}", error.what, error.cause),
        remedy: error.remedy.clone(),
    }
}

fn describe_device(info: &module::DeviceInfo, node: &Path) -> Device {
    let bars = info.bars.iter().map(|bar| Bar {
        index: bar.index,
        size: bar.size,
        free: bar.free,
        largest_free: bar.largest_free,
        exports: bar.exports,
        prefetchable: bar.prefetchable,
        is_64bit: bar.is_64bit,
        exportable: bar.exportable,
        pages: bar.pages,
        write_combining: bar.write_combining,
    });
    Device {
        address: info.address.to_string(),
        id: format!("{:04x}:{:04x}", info.vendor, info.device),
        node: node.display().to_string(),
        bars: bars.collect(),
    }
}

fn describe_disks(devices: &[PciAddress]) -> Vec<Disk> {
    let sysfs = Sysfs::default();
    let mounts = places::mounts();
    let disks = sysfs.block_devices();
    let describe = |disk: &peerbuf::plan::topology::BlockDevice| {
        // A partition's name begins with the name of its disk.
        let is_on = |mount: &&places::Mount| {
            mount
                .disk
                .as_ref()
                .is_some_and(|on| on.name.starts_with(&disk.name))
        };
        let bridge = |function: PciAddress, device: &PciAddress| CommonBridge {
            device: device.to_string(),
            bridge: sysfs
                .common_bridge(function, *device)
                .map(|bridge| bridge.to_string()),
        };
        let function = disk.functions.first();
        Disk {
            name: disk.name.clone(),
            functions: disk.functions.iter().map(ToString::to_string).collect(),
            logical_block: disk.logical_block,
            nvme: disk.name.starts_with("nvme"),
            mounts: mounts
                .iter()
                .filter(is_on)
                .map(|m| m.at.display().to_string())
                .collect(),
            common_bridges: function
                .into_iter()
                .flat_map(|function| devices.iter().map(move |device| bridge(*function, device)))
                .collect(),
        }
    };
    disks.iter().map(describe).collect()
}

/// The tables, without the missing requirements.
pub fn show(info: &Info, width: usize) -> String {
    let module = match &info.module {
        Some(version) => format!("peerbuf.ko {version}"),
        None => "peerbuf.ko not loaded".into(),
    };
    let mut text = table::paragraph(&format!("kernel {}, {module}", info.kernel), width);
    if !info.devices.is_empty() {
        let mut table = Table::new([
            "device",
            "id",
            "BAR",
            "size",
            "free",
            "largest export",
            "exports",
            "can be exported",
            "files can reach it",
        ]);
        for device in &info.devices {
            for bar in &device.bars {
                table.row([
                    device.address.clone(),
                    device.id.clone(),
                    bar.index.to_string(),
                    size::show(bar.size),
                    size::show(bar.free),
                    size::show(bar.largest_free),
                    bar.exports.to_string(),
                    yes_no(bar.exportable).into(),
                    yes_no(bar.pages).into(),
                ]);
            }
        }
        text += &format!("\n{}\n", table.show(width));
    }
    if !info.providers.is_empty() {
        let mut table = Table::new(["lends memory to peers", "size", "free"]);
        for provider in &info.providers {
            table.row([
                provider.address.clone(),
                size::show(provider.size),
                size::show(provider.available),
            ]);
        }
        text += &format!("\n{}\n", table.show(width));
    }
    if !info.disks.is_empty() {
        let mut table = Table::new([
            "disk",
            "PCI function",
            "block",
            "mounted at",
            "bridge shared with",
        ]);
        for disk in &info.disks {
            let bridges: Vec<String> = disk
                .common_bridges
                .iter()
                .map(|common| match &common.bridge {
                    Some(bridge) => format!("{}: {bridge}", common.device),
                    None => format!("{}: none, only a host bridge", common.device),
                })
                .collect();
            table.row([
                disk.name.clone(),
                disk.functions.join("\n"),
                disk.logical_block.to_string(),
                disk.mounts.join("\n"),
                bridges.join("\n"),
            ]);
        }
        text += &format!("\n{}\n", table.show(width));
    }
    text += &format!("\nudmabuf: {}\n", yes_no(info.udmabuf));
    for runtime in &info.gpu_runtimes {
        let found = match (&runtime.devices, &runtime.why) {
            (Some(devices), _) => format!("{} ({devices} devices)", runtime.library),
            (None, why) => why.clone().unwrap_or_default(),
        };
        text += &table::labelled(&format!("{}:", runtime.name), &found, width);
    }
    text
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_answers_is_loaded_also_without_sysfs() {
        assert_eq!(module_version(false, None, false), None);
        assert_eq!(
            module_version(true, Some("0.1.0".into()), true).as_deref(),
            Some("0.1.0")
        );
        let without = module_version(false, None, true).unwrap();
        assert!(without.starts_with("loaded"), "{without}");
    }
}
