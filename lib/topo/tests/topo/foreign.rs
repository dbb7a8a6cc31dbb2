//! Other tools' snapshots: the same answers as from sysfs, and unknown where they lack a fact.

use std::path::Path;

use crate::common::{BRIDGE, Spec, Tree, ask, at, gpu, host_bridge, nic, nvme, port};
use peerbuf_topo::machine::{Acs, Driver, Format, Iommu, Kernel, Kind, Port};
use peerbuf_topo::rules::{Map, Near, Rule};
use peerbuf_topo::{Argument, Code, Machine, Rules};

fn read(text: &str) -> Machine {
    peerbuf_topo::read(text, Path::new("sample")).unwrap()
}

/// As pciutils 3.13 writes it, of the machine that [`sysfs`] makes.
const LSPCI: &str = "\
00:00.0 Host bridge [0600]: Intel Corporation Device [8086:4660]
\tControl: I/O- Mem+ BusMaster+ SpecCycle- MemWINV- VGASnoop- ParErr- Stepping- SERR- FastB2B- DisINTx-
\tCapabilities: [40] Express (v2) Root Complex Integrated Endpoint, IntMsgNum 0

00:01.0 PCI bridge [0604]: Intel Corporation Sky Lake-E PCI Express Root Port A [8086:2030] (prog-if 00 [Normal decode])
\tControl: I/O+ Mem+ BusMaster+
\tBus: primary=00, secondary=01, subordinate=04, sec-latency=0
\tCapabilities: [40] Express (v2) Root Port (Slot+), IntMsgNum 0
\t\tACSCtl:\tSrcValid- TransBlk- ReqRedir- CmpltRedir- UpstreamFwd- EgressCtrl- DirectTrans-
\tKernel driver in use: pcieport

01:00.0 PCI bridge [0604]: PLX Technology, Inc. PEX 8747 [10b5:8747] (prog-if 00 [Normal decode])
\tControl: I/O+ Mem+ BusMaster+
\tBus: primary=01, secondary=02, subordinate=04, sec-latency=0
\tCapabilities: [40] Express (v2) Upstream Port, IntMsgNum 0
\t\tACSCtl:\tSrcValid- TransBlk- ReqRedir- CmpltRedir- UpstreamFwd- EgressCtrl- DirectTrans-

02:00.0 PCI bridge [0604]: PLX Technology, Inc. PEX 8747 [10b5:8747] (prog-if 00 [Normal decode])
\tControl: I/O+ Mem+ BusMaster+
\tBus: primary=02, secondary=03, subordinate=03, sec-latency=0
\tCapabilities: [40] Express (v2) Downstream Port (Slot+), IntMsgNum 0
\t\tACSCtl:\tSrcValid+ TransBlk- ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans-

02:01.0 PCI bridge [0604]: PLX Technology, Inc. PEX 8747 [10b5:8747] (prog-if 00 [Normal decode])
\tControl: I/O+ Mem+ BusMaster+
\tBus: primary=02, secondary=04, subordinate=04, sec-latency=0
\tCapabilities: [40] Express (v2) Downstream Port (Slot+), IntMsgNum 0
\t\tACSCtl:\tSrcValid+ TransBlk- ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans-

03:00.0 Non-Volatile memory controller [0108]: Samsung Electronics Co Ltd NVMe [144d:a808] (prog-if 02 [NVM Express])
\tControl: I/O- Mem+ BusMaster+
\tNUMA node: 1
\tIOMMU group: 12
\tRegion 0: Memory at fe000000 (64-bit, non-prefetchable) [size=16K]
\tCapabilities: [40] Express (v2) Endpoint, IntMsgNum 0
\t\tLnkCap:\tPort #0, Speed 16GT/s, Width x4, ASPM L1, Exit Latency L1 <64us
\t\tLnkSta:\tSpeed 8GT/s (downgraded), Width x4
\tKernel driver in use: nvme

04:00.0 3D controller [0302]: NVIDIA Corporation GA100 [10de:20b0] (rev a1)
\tControl: I/O- Mem+ BusMaster+
\tRegion 0: Memory at 3800000000 (64-bit, prefetchable) [size=64G]
\tCapabilities: [40] Express (v2) Endpoint, IntMsgNum 0
";

fn sysfs() -> Machine {
    let tree = Tree::new(None, None, false, "");
    let down = Spec {
        acs: Some(0x1d),
        ..port(6)
    };
    let switch = "pci0000:00/0000:00:01.0/0000:01:00.0";
    tree.add("pci0000:00/0000:00:00.0", &host_bridge(0x8086, 0x4660))
        .add("pci0000:00/0000:00:01.0", &BRIDGE)
        .add(switch, &port(5))
        .add(&format!("{switch}/0000:02:00.0"), &down)
        .add(&format!("{switch}/0000:02:01.0"), &down)
        .add(&format!("{switch}/0000:02:00.0/0000:03:00.0"), &nvme())
        .add(&format!("{switch}/0000:02:01.0/0000:04:00.0"), &gpu());
    tree.read()
}

#[test]
fn lspci_says_what_sysfs_says_of_the_same_machine() {
    let (ours, theirs) = (sysfs(), read(LSPCI));
    assert_eq!(theirs.format, Format::Lspci);
    let addresses = |machine: &Machine| -> Vec<String> {
        machine
            .functions
            .iter()
            .map(|f| f.address.to_string())
            .collect()
    };
    assert_eq!(addresses(&ours), addresses(&theirs));
    for release in [None, Kernel::parse("7.3")] {
        let (ours, theirs) = (Rules::new(&ours, release), Rules::new(&theirs, release));
        for (one, _) in ours.machine().each() {
            for (other, _) in ours.machine().each() {
                assert_eq!(ours.route(one, other), theirs.route(one, other));
            }
        }
    }
    let disk = theirs.function(at(&theirs, "0000:03:00.0"));
    assert_eq!(
        (disk.kind(), disk.port, disk.acs),
        (Kind::Nvme, Some(Port::Endpoint), Some(Acs::Absent))
    );
    let link = disk.link.unwrap();
    assert_eq!((link.speed, link.width, link.most), (80, 4, Some((160, 4))));
    assert_eq!(disk.driver, Some(Driver::Bound("nvme".into())));
    assert_eq!(
        (disk.node, &disk.iommu),
        (
            Some(1),
            &Some(Iommu::Group {
                number: 12,
                domain: None
            })
        )
    );
    let card = theirs.function(at(&theirs, "0000:04:00.0"));
    let bar = card.largest_bar().unwrap();
    assert_eq!(
        (bar.size, bar.address_bits, bar.prefetchable, bar.is_64bit),
        (64 << 30, 39, true, true)
    );
}

#[test]
fn lspci_of_a_user_leaves_acs_unknown() {
    let denied: String = LSPCI
        .lines()
        .filter(|line| !line.starts_with("\t\t"))
        .map(|line| match line.split_once("Capabilities:") {
            Some((before, _)) => format!("{before}Capabilities: <access denied>\n"),
            None => format!("{line}\n"),
        })
        .collect();
    let machine = read(&denied);
    let (disk, card) = (at(&machine, "0000:03:00.0"), at(&machine, "0000:04:00.0"));
    assert_eq!(machine.function(disk).acs, None);
    assert_eq!(
        Rules::new(&machine, None)
            .route(disk, card)
            .possible
            .allowed(),
        None
    );
}

/// hwloc 2 and 3 write the same devices; kinds come from the PCI class, whose meaning did not change.
#[test]
fn hwloc_has_the_tree_and_not_what_decides() {
    for (version, disk, card) in [("2.0", 0, 1), ("3.0", 1, 4)] {
        let text = format!(
            r#"<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE topology SYSTEM "hwloc2.dtd">
<topology version="{version}"><object type="Machine" nodeset="0x3">
 <info name="CPUVendor" value="AuthenticAMD"/><info name="CPUFamilyNumber" value="25"/>
 <object type="Package" nodeset="0x1"><object type="NUMANode" os_index="0" nodeset="0x1"/>
  <object type="Bridge" bridge_type="0-1" bridge_pci="0000:[00-02]">
   <object type="Bridge" bridge_type="1-1" pci_busid="0000:00:01.0" pci_type="0604 [1022:1483] [0000:0000] 00" pci_link_speed="7.8">
    <object type="PCIDev" pci_busid="0000:01:00.0" pci_type="0108 [144d:a808] [0000:0000] 00" pci_link_speed="7.8">
     <object type="OSDev" name="nvme0n1" osdev_type="{disk}"/></object></object></object></object>
 <object type="Package" nodeset="0x2"><object type="NUMANode" os_index="1" nodeset="0x2"/>
  <object type="Bridge" bridge_type="0-1" bridge_pci="0000:[80-81]">
   <object type="PCIDev" pci_busid="0000:81:00.0" pci_type="0302 [10de:20b0] [0000:0000] a1">
    <object type="OSDev" name="card0" osdev_type="{card}"/></object></object></object>
</object></topology>"#
        );
        let machine = read(&text);
        let (disk, card) = (
            machine.named("nvme0n1").unwrap(),
            machine.named("card0").unwrap(),
        );
        assert_eq!(
            (machine.function(disk).kind(), machine.function(card).kind()),
            (Kind::Nvme, Kind::Gpu)
        );
        assert_eq!(machine.function(disk).acs, None);
        let route = Rules::new(&machine, Kernel::parse("7.3")).route(disk, card);
        assert_eq!(
            (route.possible.known(), route.near),
            (Some(Map::HostBridge), Some(Near::Sys))
        );
        // The same with a processor that is not trusted: the host bridge's own function is left out.
        let other = read(&text.replace("AuthenticAMD", "GenuineIntel"));
        let route = Rules::new(&other, Kernel::parse("7.3")).route(disk, card);
        assert_eq!(route.possible.allowed(), None);
    }
}

#[test]
fn nccl_tells_which_devices_are_near_and_no_host_bridge() {
    // The first family is the sum, the second as NCCL itself writes 17h.
    for (family, allowed) in [("23", Some(true)), ("143", Some(true)), ("6", None)] {
        let text = format!(
            r#"<system version="1"><cpu numaid="0" vendor="AuthenticAMD" familyid="{family}">
 <pci busid="0000:0f:01.0" class="0x060400"><pci busid="0001:00:00.0" class="0x030200"/>
  <pci busid="0101:00:00.0" class="0x020700"><nic><net name="mlx5_0"/></nic></pci></pci></cpu>
 <cpu numaid="1"><pci busid="0002:00:00.0" class="0x030200"/></cpu></system>"#
        );
        let machine = read(&text);
        let rules = Rules::new(&machine, Kernel::parse("7.3"));
        let (gpu, far) = (at(&machine, "0001:00:00.0"), at(&machine, "0002:00:00.0"));
        let nic = machine.named("mlx5_0").unwrap();
        let near = rules.route(gpu, nic);
        assert_eq!((near.near, near.distance), (Some(Near::Pix), None));
        // A bridge at ffff:ff is no bridge. On AWS's p4d a GPU and its NIC below one share no switch.
        let grouped = read(&text.replace("0000:0f:01.0", "ffff:ff:01.0"));
        let rules = Rules::new(&grouped, Kernel::parse("7.3"));
        let route = rules.route(gpu, nic);
        assert_eq!(
            (route.near, route.common, route.rule),
            (None, None, Rule::TreeUnknown)
        );
        assert_eq!(route.possible.allowed(), allowed, "{family}");
        let route = rules.route(gpu, far);
        assert_eq!(
            (route.near, route.possible.allowed()),
            (Some(Near::Sys), allowed),
            "{family}"
        );
        assert_eq!(route.possible.known(), None);
    }
}

/// What Azure's file for its ND v4 has: AMD's processor, and nothing else that could be in the way.
#[test]
fn a_fact_that_a_format_lacks_is_named_where_it_could_rule_a_pair_out() {
    let nccl = r#"<system version="1"><cpu numaid="0" vendor="AuthenticAMD" familyid="23">
 <pci busid="ffff:ff:01.0" class="0x060400"><pci busid="0001:00:00.0" class="0x030200"/>
  <pci busid="0101:00:00.0" class="0x020700"/></pci></cpu></system>"#;
    let machine = read(nccl);
    let argument = ask(&machine, "0101:00:00.0", "0001:00:00.0");
    let unknown = |argument: &Argument| {
        let mut reasons = argument.reasons.iter();
        let found = reasons.find(|reason| reason.code == Code::FactsUnknown);
        found.map(|reason| reason.evidence.clone())
    };
    let evidence = unknown(&argument).unwrap();
    for fact in [
        "the driver of 0101:00:00.0",
        "the DMA mask of 0101:00:00.0",
        "the IOMMU domain of 0101:00:00.0",
        "the BARs of 0001:00:00.0",
        "swiotlb",
    ] {
        assert!(evidence.contains(fact), "no {fact:?} in {evidence}");
    }
    // lspci shows BARs and drivers; a mask of 64 bits reaches every BAR; sysfs shows all.
    let evidence = unknown(&ask(&read(LSPCI), "0000:03:00.0", "0000:04:00.0")).unwrap();
    assert!(!evidence.contains("BARs"), "{evidence}");
    let ours = ask(&sysfs(), "0000:03:00.0", "0000:04:00.0");
    assert_eq!(unknown(&ours), None);
}

/// As rdma-core's source writes it (`SysfsDevice.to_dict`). Its own program refuses machines without its vendor's
/// cards, so no real dump is here.
#[test]
fn rdma_topo_s_dump_has_configuration_spaces() {
    // zlib without compression, then base64.
    let pack = |bytes: &[u8]| {
        let (len, mut sums) = (bytes.len() as u16, (1_u32, 0_u32));
        for byte in bytes {
            sums.0 = (sums.0 + u32::from(*byte)) % 65521;
            sums.1 = (sums.1 + sums.0) % 65521;
        }
        let mut packed = vec![0x78, 0x01, 0x01];
        packed.extend(len.to_le_bytes());
        packed.extend((!len).to_le_bytes());
        packed.extend(bytes);
        packed.extend((sums.1 << 16 | sums.0).to_be_bytes());
        let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let encode = |chunk: &[u8]| -> String {
            let word = chunk
                .iter()
                .fold(0_u32, |word, byte| word << 8 | u32::from(*byte))
                << (8 * (3 - chunk.len()));
            let letter = |at: usize| char::from(letters[(word >> (18 - 6 * at) & 0x3f) as usize]);
            (0..4)
                .map(|at| if at <= chunk.len() { letter(at) } else { '=' })
                .collect()
        };
        packed.chunks(3).map(encode).collect::<String>()
    };
    let tree = Tree::new(None, None, false, "");
    let switch = "pci0000:16/0000:16:01.0/0000:17:00.0";
    let down = Spec {
        acs: Some(0x1d),
        ..port(6)
    };
    let places = [
        ("pci0000:16/0000:16:01.0".to_owned(), BRIDGE),
        (switch.to_owned(), port(5)),
        (format!("{switch}/0000:18:00.0"), down.clone()),
        (format!("{switch}/0000:18:01.0"), down),
        (format!("{switch}/0000:18:00.0/0000:19:00.0"), nic()),
        (format!("{switch}/0000:18:01.0/0000:1a:00.0"), gpu()),
    ];
    let mut items = Vec::new();
    for (place, spec) in &places {
        tree.add(place, spec);
        let config = std::fs::read(tree.path("sys/devices").join(place).join("config")).unwrap();
        items.push(format!(
            r#"{{"realpath": "/sys/devices/{place}", "config": "{}", "iommu_group": 3, "modalias": "pci:v000015B3d0000101Bsv",
                "numa_node": 0, "subsystems": {{"infiniband": ["mlx5_{}"]}}}}"#,
            pack(&config),
            items.len()
        ));
    }
    let (ours, theirs) = (tree.read(), read(&format!("[{}]", items.join(","))));
    assert_eq!(theirs.format, Format::RdmaTopo);
    let (nic, card) = (at(&theirs, "0000:19:00.0"), at(&theirs, "0000:1a:00.0"));
    assert_eq!(theirs.named("mlx5_4"), Some(nic));
    let route = Rules::new(&theirs, None).route(nic, card);
    assert!(route.redirected && route.near == Some(Near::Pix));
    assert_eq!(ours.functions[2].acs, theirs.functions[2].acs);
    let broken = items[0].replace("\"config\": \"", "\"config\": \"!");
    assert!(peerbuf_topo::read(&format!("[{broken}]"), Path::new("x")).is_err());
}

#[test]
fn a_saved_machine_says_the_same() {
    let machine = sysfs();
    assert_eq!(read(&peerbuf_topo::save(&machine)), machine);
}
