//! The guest has the devices of its topology. Runs in the guest, in each topology.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn topology() -> String {
    std::env::var("PEERBUF_LAB_TOPOLOGY").unwrap()
}

/// The addresses of all devices with this vendor and device.
fn devices(id: (&str, &str)) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir("/sys/bus/pci/devices")
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|d| read(d.join("vendor")) == id.0 && read(d.join("device")) == id.1)
        .collect();
    found.sort();
    found
}

const IVSHMEM: (&str, &str) = ("0x1af4", "0x1110");

fn bar_2_bytes(device: &Path) -> u64 {
    fs::metadata(device.join("resource2")).map_or(0, |m| m.len())
}

fn nvme() -> PathBuf {
    fs::canonicalize("/sys/class/nvme/nvme0/device").unwrap()
}

#[test]
fn two_bars_stand_for_device_memory_and_one_is_too_small_for_pages() {
    let mut sizes: Vec<_> = devices(IVSHMEM).iter().map(|d| bar_2_bytes(d)).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1 << 20, 16 << 20, 64 << 20]);
}

#[test]
fn the_disk_has_a_buffer_a_file_system_and_a_scratch_namespace() {
    assert_eq!(read(nvme().join("p2pmem/size")), (16u32 << 20).to_string());
    for (name, nsid, mib) in [("nvme0n1", "1", 512), ("nvme0n2", "2", 128)] {
        assert_eq!(read(format!("/sys/block/{name}/nsid")), nsid);
        assert_eq!(
            read(format!("/sys/block/{name}/size")),
            (mib * 2048).to_string()
        );
        assert!(
            fs::metadata(format!("/dev/{name}"))
                .unwrap()
                .file_type()
                .is_block_device()
        );
    }
    let mounts = read("/proc/mounts");
    assert!(
        mounts.contains("/dev/nvme0n1 /mnt/nvme ext4 rw"),
        "{mounts}"
    );
    fs::write("/mnt/nvme/x", "x").unwrap();
}

#[test]
fn the_devices_hang_together_as_the_topology_says() {
    let parents = |device: &Path| {
        let real = fs::canonicalize(device).unwrap();
        real.ancestors()
            .skip(1)
            .map(Path::to_owned)
            .collect::<Vec<_>>()
    };
    let is_switch =
        |d: &PathBuf| read(d.join("vendor")) == "0x104c" && read(d.join("device")) == "0x8232";
    let switch_of = |device: &Path| parents(device).into_iter().find(is_switch);
    let under_one = matches!(topology().as_str(), "switch" | "lying");
    // The device with the smallest BAR has the same place in each topology.
    let large = |d: &PathBuf| bar_2_bytes(d) > 1 << 20;
    for device in devices(IVSHMEM).into_iter().filter(large) {
        assert_eq!(
            switch_of(&device).is_some(),
            under_one,
            "{}",
            device.display()
        );
        assert_eq!(switch_of(&device), switch_of(&nvme()));
    }
    let iommu = fs::read_dir("/sys/class/iommu").is_ok_and(|mut d| d.next().is_some());
    assert_eq!(iommu, topology() == "lying");
    let model = read("/proc/cpuinfo");
    assert_eq!(model.contains("AMD"), topology() == "host-bridge");
}

#[test]
fn a_network_card_carries_soft_roce() {
    let nic = fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .find(|n| n != "lo")
        .unwrap();
    assert_eq!(read("/sys/class/infiniband/rxe0/parent"), nic);
    let output = Command::new("ibv_devices").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("rxe0"));
    let pingpong = |more: &[&str]| {
        let mut command = Command::new("ibv_rc_pingpong");
        command
            .args(["-d", "rxe0", "-g", "1", "-n", "10"])
            .args(more)
            .stdout(Stdio::null());
        command
    };
    let mut server = pingpong(&[]).spawn().unwrap();
    // On a busy host the server may take seconds until it listens; until then the client fails.
    let end = Instant::now() + Duration::from_secs(60);
    while !pingpong(&["127.0.0.1"]).status().unwrap().success() {
        assert!(
            server.try_wait().unwrap().is_none() && Instant::now() < end,
            "the two did not meet"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(server.wait().unwrap().success());
}

#[test]
fn peerbuf_is_loaded_and_has_a_node_for_each_bar_and_for_root_alone() {
    assert!(Path::new("/sys/module/peerbuf").is_dir());
    assert!(Path::new("/sys/module/peerbuf_probe").is_dir());
    for device in devices(IVSHMEM) {
        let node = Path::new("/dev/peerbuf").join(device.file_name().unwrap());
        let metadata = fs::metadata(&node).unwrap();
        assert!(metadata.file_type().is_char_device());
        assert_eq!(
            metadata.permissions().mode() & 0o777,
            0o600,
            "{}",
            node.display()
        );
    }
}

#[test]
fn the_distributions_programs_run() {
    for command in [
        &["python3", "-c", "import json"][..],
        &["fio", "--version"],
        &["nvme", "list"],
        &["rdma", "link"],
        &["lspci"],
        &["peerbuf", "--help"],
    ] {
        let output = Command::new(command[0])
            .args(&command[1..])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
