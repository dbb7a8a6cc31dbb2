//! The machine: each topology's devices, and the QEMU command line for them.
//!
//! This module does not touch the host. A [`Machine`] is a description, and its arguments use paths as QEMU
//! sees them in the sandbox (the constants below).

use std::path::Path;

use clap::ValueEnum;

/// The shared root of the guests, as QEMU sees it.
pub const GUEST_ROOT: &str = "/run/guest";
/// The run's own directory.
pub const RUN: &str = "/run/vm";
/// The kernel's directory in the cache.
pub const KERNEL: &str = "/run/kernel";
/// The directory of the kernel's initramfs in the cache.
pub const INITRAMFS: &str = "/run/initramfs";
/// The disk image's directory in the cache.
pub const DISK: &str = "/run/disk";
/// The directory of `--share`.
pub const SHARE: &str = "/run/share";
/// The directory with the socket that connects a pair.
pub const WIRE: &str = "/run/wire";

/// Default size of the BAR that stands for device memory.
pub const BAR_MIB: u32 = 64;
/// Size of the second device's BAR.
pub const SECOND_BAR_MIB: u32 = 16;
/// Size of the third device's BAR: too small to get struct pages.
pub const SMALL_BAR_MIB: u32 = 1;
/// Size of the NVMe disk's controller memory buffer.
pub const CMB_MIB: u32 = 16;
/// Size of the NVMe disk's second, empty namespace.
pub const SCRATCH_MIB: u32 = 128;
/// QEMU's name of that namespace.
pub const SCRATCH: &str = "scratch-disk";

/// QEMU's name of the disk that tests can have in the slot of the second device.
pub const SECOND_DISK: &str = "nvme1";
/// That disk's size.
const SECOND_DISK_MIB: u32 = 64;

/// The arrangement of the devices, which determines the kernel's verdict on traffic between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Topology {
    /// NVMe and BARs under one PCIe switch, no IOMMU: peer-to-peer works
    Switch,
    /// Each under its own root port, on a host bridge the kernel trusts: works through it
    HostBridge,
    /// Each under its own root port, on a host bridge the kernel does not trust: it refuses
    Refused,
    /// Switch and a translating IOMMU: the kernel says yes and the data is lost
    Lying,
}

impl Topology {
    /// All topologies, in the order of the demo.
    pub const ALL: [Topology; 4] = [Self::Switch, Self::HostBridge, Self::Refused, Self::Lying];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Switch => "switch",
            Self::HostBridge => "host-bridge",
            Self::Refused => "refused",
            Self::Lying => "lying",
        }
    }

    fn under_one_switch(self) -> bool {
        matches!(self, Self::Switch | Self::Lying)
    }

    /// The emulated CPU model, which determines whether the kernel trusts the host bridge. With a switch it
    /// is an untrusted one, so that only the switch can make the path.
    pub fn cpu(self) -> &'static str {
        match self {
            Self::HostBridge => "EPYC",
            Self::Switch | Self::Refused | Self::Lying => "Skylake-Server",
        }
    }
}

/// A translating IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Iommu {
    /// Intel's
    Intel,
    /// Intel's, in caching mode: what a hypervisor shows a guest to which it assigns devices
    Caching,
    /// virtio-iommu
    Virtio,
}

impl Iommu {
    /// QEMU's device. None remaps interrupts.
    fn device(self) -> &'static str {
        match self {
            Self::Intel => "intel-iommu,intremap=off",
            Self::Caching => "intel-iommu,intremap=off,caching-mode=on",
            Self::Virtio => "virtio-iommu-pci,bus=pcie.0,addr=0x15",
        }
    }
}

/// How QEMU executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Emulation.
    Emulation,
    /// Emulation of one CPU, with a clock that counts instructions.
    CountingEmulation,
    /// KVM, if a trial guest booted with it.
    Kvm,
}

/// One of two guests joined by a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest that listens.
    First,
    /// The guest that connects.
    Second,
}

impl End {
    /// Both guests.
    pub const BOTH: [Self; 2] = [Self::First, Self::Second];

    /// The other guest.
    pub fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }

    /// The value of `$PEERBUF_LAB_END` in the guest.
    pub fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Second => "second",
        }
    }
}

/// The description of a guest.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The arrangement of the devices.
    pub topology: Topology,
    /// Adds a translating IOMMU (`lying` always has Intel's).
    pub iommu: Option<Iommu>,
    /// How instructions are executed.
    pub accelerator: Accelerator,
    /// Main memory in MiB.
    pub memory_mib: u32,
    /// Number of CPUs; one if the clock counts instructions.
    pub processors: u32,
    /// Whether a host directory is shared.
    pub share: bool,
    /// A terminal instead of separate streams.
    pub shell: bool,
    /// Size in MiB of the BAR that stands for device memory. The host allocates only touched pages.
    pub bar_mib: u32,
    /// Whether the guest may request hardware events, such as an unplug.
    pub events: bool,
    /// Further words for the kernel's command line.
    pub boot: Vec<String>,
    /// Its end of a network to another guest; `None` connects it to the host.
    pub end: Option<End>,
    /// The frequency of the host's time stamp counter, if known.
    pub tsc_khz: Option<u64>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            topology: Topology::Switch,
            iommu: None,
            accelerator: Accelerator::Emulation,
            memory_mib: 2048,
            processors: 2,
            share: false,
            shell: false,
            bar_mib: BAR_MIB,
            events: false,
            boot: Vec::new(),
            end: None,
            tsc_khz: None,
        }
    }
}

impl Machine {
    /// The slots of the disk and of the two larger BARs, by port name.
    pub fn slots(&self) -> [&'static str; 3] {
        if self.topology.under_one_switch() {
            ["down0", "down1", "down2"]
        } else {
            ["port0", "port1", "port2"]
        }
    }

    /// The slot and the size in MiB of a pluggable device; `None` for others.
    pub fn pluggable(&self, id: &str) -> Option<(&'static str, u32)> {
        match id {
            "bar0" => Some((self.slots()[1], self.bar_mib)),
            "bar1" => Some((self.slots()[2], SECOND_BAR_MIB)),
            _ => None,
        }
    }

    fn iommu(&self) -> Option<Iommu> {
        let lying = (self.topology == Topology::Lying).then_some(Iommu::Intel);
        self.iommu.or(lying)
    }

    /// The kernel's command line.
    pub fn kernel_command_line(&self) -> String {
        let mut words = vec![
            // Only errors go to the serial line, which is slow; the complete log is read at the end.
            "console=ttyS0 loglevel=4 log_buf_len=8M printk.devkmsg=on",
            // A guest in trouble ends, and reports that on the console.
            "panic=-1 oops=panic sysctl.vm.panic_on_oom=1 softlockup_panic=1",
            "sysctl.kernel.hung_task_panic=1 sysctl.kernel.hung_task_timeout_secs=60",
            // The guest runs no hostile code, and mitigations take a third of its boot time.
            "mitigations=off",
            // On a busy host the watchdog considers the emulated TSC unstable, and the kernel patches its
            // clock code. An emulated CPU that executes that code at that moment may crash (an oops in
            // sched_clock_cpu, in about one of a hundred guests).
            "tsc=reliable",
            // The self-tests of the kernel's cryptography, unused here, are slow under emulation; on a busy
            // host the watchdog once ended a guest during them.
            "cryptomgr.notests=1",
            // At boot the kernel checks for timer interrupts during a hundredth of a second of TSC time, and
            // panics if none arrives. On a busy host the emulated CPU may not have run for that long.
            "no_timer_check",
        ];
        // The kernel measures the TSC frequency itself, on a busy host sometimes wrongly: one guest's clock
        // ran twenty times too fast. A clock that counts instructions counts one nanosecond for each, and
        // with another frequency the kernel would not use the TSC as its clock.
        let tsc_khz = match self.accelerator {
            Accelerator::CountingEmulation => Some(1_000_000),
            _ => self.tsc_khz,
        };
        let tsc_khz = tsc_khz.map(|khz| format!("tsc_early_khz={khz}"));
        words.extend(tsc_khz.as_deref());
        if let Some(iommu) = self.iommu() {
            if matches!(iommu, Iommu::Intel | Iommu::Caching) {
                words.push("intel_iommu=on");
            }
            // QEMU's IOMMU does not remap interrupts here, which VFIO and iommufd consider unsafe.
            words.push("vfio_iommu_type1.allow_unsafe_interrupts=1");
            words.push("iommufd.allow_unsafe_interrupts=1");
        }
        words.extend(self.boot.iter().map(String::as_str));
        words.join(" ")
    }

    /// QEMU's command line arguments.
    pub fn arguments(&self) -> Vec<String> {
        let mut args = Arguments::default();
        args.flag("-nodefaults");
        args.flag("-no-user-config");
        args.flag("-no-reboot");
        args.add("-display", "none");
        args.add("-M", "q35");
        args.add("-m", format!("{}M", self.memory_mib));
        match self.accelerator {
            Accelerator::Emulation => {
                args.add("-accel", "tcg,thread=multi");
                args.add("-smp", self.processors.to_string());
            }
            Accelerator::CountingEmulation => {
                args.add("-accel", "tcg,thread=single");
                args.add("-icount", "shift=0,sleep=off");
                args.add("-smp", "1");
            }
            Accelerator::Kvm => {
                args.add("-accel", "kvm");
                args.add("-smp", self.processors.to_string());
            }
        }
        args.add("-cpu", self.topology.cpu());
        args.add("-kernel", format!("{KERNEL}/vmlinuz"));
        args.add("-initrd", format!("{INITRAMFS}/initramfs"));
        args.add("-append", self.kernel_command_line());
        args.add("-serial", format!("file:{RUN}/console"));
        if let Some(iommu) = self.iommu() {
            args.device(iommu.device());
        }
        self.file_systems(&mut args);
        self.test_devices(&mut args);
        self.ports(&mut args);
        args.0
    }

    fn file_systems(&self, args: &mut Arguments) {
        args.add(
            "-fsdev",
            format!(
                "local,id=root,path={GUEST_ROOT},security_model=none,readonly=on,multidevs=remap"
            ),
        );
        args.device("virtio-9p-pci,fsdev=root,mount_tag=root");
        if self.share {
            args.add(
                "-fsdev",
                format!("local,id=share,path={SHARE},security_model=none,multidevs=remap"),
            );
            args.device("virtio-9p-pci,fsdev=share,mount_tag=share");
        }
    }

    /// The devices under test. Their addresses do not depend on other options.
    fn test_devices(&self, args: &mut Arguments) {
        args.device("pcie-root-port,id=port0,bus=pcie.0,addr=0x10,chassis=1,slot=1");
        let slots = self.slots();
        if self.topology.under_one_switch() {
            args.device("x3130-upstream,id=switch,bus=port0");
            for (n, slot) in (2..).zip(slots) {
                args.device(format!(
                    "xio3130-downstream,id={slot},bus=switch,chassis={n},slot={n}"
                ));
            }
        } else {
            args.device("pcie-root-port,id=port1,bus=pcie.0,addr=0x11,chassis=2,slot=2");
            args.device("pcie-root-port,id=port2,bus=pcie.0,addr=0x12,chassis=3,slot=3");
        }
        // 'snapshot' redirects writes to a temporary file, so the image does not change.
        args.add(
            "-drive",
            format!("if=none,id=disk,format=raw,cache=unsafe,snapshot=on,file={DISK}/nvme.ext4"),
        );
        args.add(
            "-drive",
            format!("if=none,id=scratch,format=raw,cache=unsafe,file={RUN}/scratch"),
        );
        args.add(
            "-blockdev",
            format!("driver=raw,node-name=second,file.driver=file,file.filename={RUN}/second"),
        );
        // The kernel numbers namespaces in the order in which their scans end. So the guest's init attaches
        // the second after the first has appeared.
        args.device("nvme-subsys,id=subsys,nqn=peerbuf-lab");
        args.device(format!(
            "nvme,id=nvme0,subsys=subsys,serial=peerbuf-lab,bus={},cmb_size_mb={CMB_MIB}",
            slots[0]
        ));
        args.device("nvme-ns,drive=disk,bus=nvme0,nsid=1,shared=off");
        args.device(format!(
            "nvme-ns,id={SCRATCH},drive=scratch,bus=nvme0,nsid=2,shared=off,detached=on"
        ));
        for (id, mib, place) in [
            ("bar0", self.bar_mib, format!("bus={}", slots[1])),
            ("bar1", SECOND_BAR_MIB, format!("bus={}", slots[2])),
            ("bar2", SMALL_BAR_MIB, "bus=pcie.0,addr=0x13".into()),
        ] {
            args.add(
                "-object",
                format!("memory-backend-ram,id={id},size={mib}M,reserve=off"),
            );
            args.device(format!("ivshmem-plain,memdev={id},id={id},{place}"));
        }
        // A device with a DMA engine, for VFIO or a test's driver. Its DMA mask covers all addresses; the
        // default is 256 MiB.
        args.device(format!("edu,bus=pcie.0,addr=0x14,dma_mask={}", u64::MAX));
        let socket = format!("stream,id=net,addr.type=unix,addr.path={WIRE}/lan");
        let (net, mac) = match self.end {
            None => ("user,id=net".into(), ""),
            Some(End::First) => (socket + ",server=on", ",mac=52:54:00:00:00:01"),
            // QEMU retries the connection: the first guest may not be there yet.
            Some(End::Second) => (
                socket + ",server=off,reconnect-ms=100",
                ",mac=52:54:00:00:00:02",
            ),
        };
        args.add("-netdev", net);
        args.device(format!("virtio-net-pci,netdev=net,id=net0,romfile={mac}"));
    }

    /// The ports between the lab and the guest; each is a socket in the run's directory.
    fn ports(&self, args: &mut Arguments) {
        args.device("virtio-serial-pci");
        let socket = |args: &mut Arguments, name: &str, device: &str| {
            args.add("-chardev", format!("socket,id={name},path={RUN}/{name}"));
            args.device(format!("{device},chardev={name},name=peerbuf.{name}"));
        };
        for name in self.port_names() {
            match name {
                MONITOR => {
                    args.add("-chardev", format!("socket,id={name},path={RUN}/{name}"));
                    args.add("-mon", format!("chardev={name},mode=control"));
                }
                "terminal" => socket(args, name, "virtconsole"),
                _ => socket(args, name, "virtserialport"),
            }
        }
    }

    /// The names of the guest's ports and of QEMU's monitor.
    pub fn port_names(&self) -> Vec<&'static str> {
        let mut names = if self.shell {
            vec!["terminal", "control"]
        } else {
            vec!["stdin", "stdout", "stderr", "control"]
        };
        if self.events {
            names.extend([EVENTS, MONITOR]);
        }
        names
    }
}

/// The port on which a guest's tests request events.
pub const EVENTS: &str = "events";
/// QEMU's monitor, for the lab.
pub const MONITOR: &str = "monitor";

/// The conflict between these options, if there is one.
pub fn conflict(topology: Topology, iommu: Option<Iommu>) -> Option<String> {
    let why = match (topology, iommu?) {
        (Topology::Lying, _) => "it has a translating IOMMU as it is",
        (Topology::Switch, Iommu::Intel | Iommu::Caching) => {
            "a switch with a translating IOMMU is the topology `lying`, where data is lost"
        }
        _ => return None,
    };
    Some(format!(
        "--iommu does not go with --topology {}: {why}; it goes with host-bridge and refused",
        topology.name()
    ))
}

/// Makes the images of the empty second namespace and of the second disk.
///
/// # Errors Those of the file system.
pub fn make_scratch(run: &Path) -> std::io::Result<()> {
    for (name, mib) in [("scratch", SCRATCH_MIB), ("second", SECOND_DISK_MIB)] {
        std::fs::File::create(run.join(name))?.set_len(u64::from(mib) << 20)?;
    }
    Ok(())
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0.extend([name.into(), value.into()]);
    }

    fn device(&mut self, value: impl Into<String>) {
        self.add("-device", value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(topology: Topology) -> Machine {
        Machine {
            topology,
            ..Machine::default()
        }
    }

    fn line(machine: &Machine) -> String {
        machine.arguments().join(" ")
    }

    #[test]
    fn every_topology_has_the_disk_with_a_buffer_two_bars_and_a_network_card() {
        for topology in Topology::ALL {
            let line = line(&machine(topology));
            for device in [
                "nvme,id=nvme0,subsys=subsys,serial=peerbuf-lab,bus=",
                "cmb_size_mb=16",
                "nvme-ns,drive=disk,bus=nvme0,nsid=1",
                "id=bar0,size=64M",
                "ivshmem-plain,memdev=bar0",
                "id=bar1,size=16M",
                "ivshmem-plain,memdev=bar1",
                "id=bar2,size=1M",
                "edu,bus=pcie.0",
                "virtio-net-pci",
            ] {
                assert!(line.contains(device), "{device} in {line}");
            }
        }
    }

    #[test]
    fn switch_and_lying_put_all_three_devices_under_one_switch() {
        for topology in [Topology::Switch, Topology::Lying] {
            let line = line(&machine(topology));
            assert_eq!(line.matches("xio3130-downstream").count(), 3);
            assert_eq!(line.matches("pcie-root-port").count(), 1);
            assert!(line.contains("bus=down0,cmb_size_mb") && line.contains("id=bar0,bus=down1"));
        }
    }

    #[test]
    fn host_bridge_and_refused_differ_in_the_processor_only() {
        let (a, b) = (machine(Topology::HostBridge), machine(Topology::Refused));
        assert_eq!(line(&a).replace("EPYC", "Skylake-Server"), line(&b));
        assert_eq!(line(&a).matches("pcie-root-port").count(), 3);
        assert!(!line(&a).contains("iommu"));
    }

    #[test]
    fn an_iommu_is_there_when_asked_for_and_in_lying() {
        let with = Machine {
            iommu: Some(Iommu::Intel),
            ..machine(Topology::HostBridge)
        };
        for machine in [with, machine(Topology::Lying)] {
            assert!(line(&machine).contains("intel-iommu,intremap=off"));
            assert!(machine.kernel_command_line().contains("intel_iommu=on"));
        }
        assert!(!line(&machine(Topology::Switch)).contains("intel"));
    }

    #[test]
    fn further_words_end_the_kernels_command_line() {
        let with = Machine {
            boot: vec!["swiotlb=force".into(), "quiet".into()],
            ..machine(Topology::Switch)
        };
        assert!(with.kernel_command_line().ends_with(" swiotlb=force quiet"));
    }

    #[test]
    fn each_iommu_is_a_device_and_words_go_to_the_kernel() {
        for (iommu, device, intel) in [
            (Iommu::Caching, "intremap=off,caching-mode=on", true),
            (Iommu::Virtio, "-device virtio-iommu-pci", false),
        ] {
            let machine = Machine {
                iommu: Some(iommu),
                boot: vec!["iommu=pt".into()],
                ..machine(Topology::HostBridge)
            };
            assert!(line(&machine).contains(device), "{}", line(&machine));
            let words = machine.kernel_command_line();
            assert!(words.ends_with(" iommu=pt"), "{words}");
            assert_eq!(words.contains("intel_iommu=on"), intel, "{words}");
        }
    }

    #[test]
    fn an_iommu_beside_a_switch_is_refused_with_the_reason() {
        assert!(
            conflict(Topology::Switch, Some(Iommu::Intel))
                .unwrap()
                .contains("`lying`")
        );
        assert!(
            conflict(Topology::Lying, Some(Iommu::Virtio))
                .unwrap()
                .contains("as it is")
        );
        assert_eq!(conflict(Topology::HostBridge, Some(Iommu::Intel)), None);
        assert_eq!(conflict(Topology::Switch, Some(Iommu::Virtio)), None);
        assert_eq!(conflict(Topology::Switch, None), None);
    }

    #[test]
    fn what_is_plugged_in_again_is_what_was_there() {
        for topology in Topology::ALL {
            let machine = machine(topology);
            let line = line(&machine);
            for id in ["bar0", "bar1"] {
                let (slot, mib) = machine.pluggable(id).unwrap();
                let device = format!("ivshmem-plain,memdev={id},id={id},bus={slot} ");
                assert!(line.contains(&device), "{device} in {line}");
                assert!(line.contains(&format!("id={id},size={mib}M,reserve=off ")));
            }
            assert_eq!(machine.pluggable("nvme0"), None);
        }
    }

    #[test]
    fn a_pair_is_joined_and_each_end_has_an_address_of_its_own() {
        let [first, second] = End::BOTH.map(|end| {
            line(&Machine {
                end: Some(end),
                ..machine(Topology::Switch)
            })
        });
        for (line, how, mac) in [
            (&first, "server=on", "romfile=,mac=52:54:00:00:00:01"),
            (&second, "server=off", "romfile=,mac=52:54:00:00:00:02"),
        ] {
            assert!(
                line.contains("addr.path=/run/wire/lan") && line.contains(how),
                "{line}"
            );
            assert!(
                line.contains(mac) && !line.contains("user,id=net"),
                "{line}"
            );
        }
    }

    #[test]
    fn counting_runs_one_processor_on_one_thread() {
        let line = line(&Machine {
            accelerator: Accelerator::CountingEmulation,
            ..machine(Topology::Switch)
        });
        assert!(line.contains("tcg,thread=single -icount shift=0,sleep=off -smp 1"));
    }
}
