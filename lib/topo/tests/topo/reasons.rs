//! Every reason is given by some machine, and all of them at once.

use std::collections::BTreeSet;
use std::path::Path;

use crate::common::{BRIDGE, Spec, Tree, ask, gpu, host_bridge, nvme, port};
use peerbuf_topo::machine::Kernel;
use peerbuf_topo::reasons::{Effect, not_pci, of_layer, of_several};
use peerbuf_topo::{Argument, Code, Machine, Rules, argue};

const DISK: &str = "0000:03:00.0";
const CARD: &str = "0000:04:00.0";

/// A disk and a card below one switch, or each below a port of its own.
struct Sample {
    kernel: Option<&'static str>,
    processor: Option<(&'static str, u16)>,
    is_virtual: bool,
    options: &'static str,
    host: Spec,
    ports: Spec,
    disk: Spec,
    card: Spec,
    in_switch: bool,
}

impl Sample {
    fn new() -> Sample {
        Sample {
            kernel: Some("7.3.4"),
            processor: Some(("GenuineIntel", 6)),
            is_virtual: false,
            options: "",
            host: host_bridge(0x8086, 0x1237),
            ports: port(6),
            disk: nvme(),
            card: gpu(),
            in_switch: false,
        }
    }

    fn machine(self) -> Machine {
        let tree = Tree::new(self.kernel, self.processor, self.is_virtual, self.options);
        tree.add("pci0000:00/0000:00:00.0", &self.host)
            .add("pci0000:00/0000:00:01.0", &BRIDGE);
        let up = "pci0000:00/0000:00:01.0/0000:01:00.0";
        let (one, other) = match self.in_switch {
            true => (format!("{up}/0000:02:00.0"), format!("{up}/0000:02:01.0")),
            false => (
                "pci0000:00/0000:00:02.0".into(),
                "pci0000:00/0000:00:03.0".into(),
            ),
        };
        if self.in_switch {
            tree.add(up, &port(5));
        }
        tree.add(&one, &self.ports)
            .add(&other, &self.ports)
            .add(&format!("{one}/{DISK}"), &self.disk)
            .add(&format!("{other}/{CARD}"), &self.card);
        tree.read()
    }

    fn argue(self) -> Argument {
        ask(&self.machine(), DISK, CARD)
    }
}

#[test]
fn each_code_is_given_by_some_machine() {
    let amd = Some(("AuthenticAMD", 0x19));
    let redirecting = Spec {
        acs: Some(0x1d),
        ..port(6)
    };
    let translated = Spec {
        group: Some((1, "DMA")),
        ..nvme()
    };
    let unnamed = Tree::new(Some("7.3.4"), Some(("GenuineIntel", 6)), false, "");
    unnamed
        .add("pci0000:00/0000:00:02.0", &nvme())
        .add("pci0000:00/0000:00:03.0", &gpu());
    let sockets = Tree::new(Some("7.3.4"), Some(("GenuineIntel", 6)), false, "");
    sockets
        .add("pci0000:00/0000:00:00.0", &host_bridge(0x8086, 0x2f00))
        .add("pci0000:00/0000:00:02.0", &nvme())
        .add("pci0000:80/0000:80:00.0", &host_bridge(0x8086, 0x2f00))
        .add("pci0000:80/0000:80:02.0", &gpu());
    let plain = Sample::new().machine();
    let old = Rules::new(&plain, Kernel::parse("4.19"));
    let hwloc = r#"<topology version="2.0"><object type="Machine"><object type="Bridge" bridge_type="0-1"
        bridge_pci="0000:[00-01]"><object type="PCIDev" pci_busid="0000:00:03.0" pci_type="0108 [144d:a808] [0000:0000] 00"/>
        <object type="PCIDev" pci_busid="0000:00:04.0" pci_type="0302 [10de:20b0] [0000:0000] 00"/></object>
        <info name="CPUVendor" value="GenuineIntel"/></object></topology>"#;
    let nccl = r#"<system version="1"><cpu numaid="0"><pci busid="0000:03:00.0" class="0x010802"/>
        <pci busid="0000:04:00.0" class="0x030200"/></cpu></system>"#;
    let read = |text| peerbuf_topo::read(text, Path::new("sample")).unwrap();
    let found = |machine: &Machine, address: &str| machine.find(address.parse().unwrap()).unwrap();

    let arguments = [
        Sample {
            in_switch: true,
            ports: redirecting,
            ..Sample::new()
        }
        .argue(),
        Sample {
            processor: amd,
            options: "swiotlb=force",
            ..Sample::new()
        }
        .argue(),
        Sample {
            disk: Spec {
                dma_bits: Some(32),
                ..nvme()
            },
            ..Sample::new()
        }
        .argue(),
        Sample {
            disk: Spec {
                for_users: true,
                ..nvme()
            },
            in_switch: true,
            ..Sample::new()
        }
        .argue(),
        Sample {
            disk: translated,
            is_virtual: true,
            in_switch: true,
            ..Sample::new()
        }
        .argue(),
        Sample {
            disk: Spec {
                driver: None,
                ..nvme()
            },
            is_virtual: true,
            ..Sample::new()
        }
        .argue(),
        Sample {
            card: Spec {
                lanes: 4,
                resizable_to: Some(256 << 30),
                ..gpu()
            },
            ..Sample::new()
        }
        .argue(),
        Sample {
            processor: None,
            ..Sample::new()
        }
        .argue(),
        Sample {
            kernel: None,
            host: host_bridge(0x8086, 0x09a2),
            ..Sample::new()
        }
        .argue(),
        ask(&plain, CARD, DISK),
        ask(&plain, CARD, CARD),
        argue(&old, found(&plain, DISK), found(&plain, CARD)),
        ask(&unnamed.read(), "0000:00:02.0", "0000:00:03.0"),
        ask(&sockets.read(), "0000:00:02.0", "0000:80:02.0"),
        ask(&read(hwloc), "0000:00:03.0", "0000:00:04.0"),
        ask(&read(nccl), DISK, CARD),
    ];
    let mut given: BTreeSet<Code> = BTreeSet::new();
    for reason in arguments.iter().flat_map(|argument| &argument.reasons) {
        assert!(!reason.evidence.is_empty());
        given.insert(reason.code);
    }
    let of_disks = [not_pci("tmpfs"), of_layer("md0", "md")].into_iter();
    given.extend(
        of_disks
            .chain(of_several("md0", 2))
            .map(|reason| reason.code),
    );
    assert_eq!(of_several("dm-0", 1), None);
    let missing: Vec<&Code> = Code::ALL
        .iter()
        .filter(|code| !given.contains(code))
        .collect();
    assert!(missing.is_empty(), "no machine gives {missing:?}");
}

#[test]
fn both_ways_of_a_pair_tell_the_same_fact_in_the_same_words() {
    let hidden = Spec {
        for_users: true,
        ..port(6)
    };
    let machine = Sample {
        in_switch: true,
        kernel: None,
        host: host_bridge(0x8086, 0x09a2),
        ports: hidden,
        ..Sample::new()
    }
    .machine();
    let [forth, back] = [(DISK, CARD), (CARD, DISK)].map(|(a, b)| ask(&machine, a, b));
    let evidence = |argument: &Argument| {
        let mut reasons = argument.reasons.iter();
        let found = reasons.find(|reason| reason.code == Code::AcsUnknown);
        found.unwrap().evidence.clone()
    };
    assert_eq!(evidence(&forth), evidence(&back));
    let nccl = r#"<system version="1"><cpu numaid="0"><pci busid="0000:03:00.0" class="0x010802"/>
        <pci busid="0000:04:00.0" class="0x030200"/></cpu></system>"#;
    let grouped = peerbuf_topo::read(nccl, Path::new("sample")).unwrap();
    let ways = [(DISK, CARD), (CARD, DISK)].map(|(a, b)| ask(&grouped, a, b));
    let [one, other] = ways.map(|argument| {
        let mut reasons = argument.reasons.into_iter();
        reasons.find(|reason| reason.code == Code::TreeUnknown)
    });
    assert!(one.is_some() && one == other);
    let command = format!("peerbuf why {DISK} {CARD} --kernel 7.3");
    for argument in [forth, back] {
        let mut commands = argument.remedies.iter().flat_map(|remedy| &remedy.commands);
        assert!(commands.any(|known| *known == command), "{argument:?}");
    }
}

#[test]
fn all_reasons_are_given_at_once_the_gravest_first() {
    let argument = Sample {
        disk: Spec {
            dma_bits: Some(32),
            ..nvme()
        },
        options: "swiotlb=force",
        ..Sample::new()
    }
    .argue();
    let blocking: Vec<Code> = argument
        .reasons
        .iter()
        .take_while(|reason| reason.effect == Effect::Blocks)
        .map(|reason| reason.code)
        .collect();
    assert_eq!(
        blocking,
        [
            Code::HostBridgeNotListed,
            Code::DmaMask,
            Code::SwiotlbForced
        ]
    );
}
