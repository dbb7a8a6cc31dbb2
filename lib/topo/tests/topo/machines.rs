//! What is predicted on machines as people have them.

use crate::common::{BRIDGE, Spec, Tree, ask, at, gpu, host_bridge, nic, nvme, port};
use peerbuf_topo::machine::Kernel;
use peerbuf_topo::reasons::Verdict;
use peerbuf_topo::rules::{Map, Near, Rule};
use peerbuf_topo::{Code, Machine, Rules};

const XEON: Option<(&str, u16)> = Some(("GenuineIntel", 6));
const EPYC: Option<(&str, u16)> = Some(("AuthenticAMD", 25));

/// A disk and a card, each below a root port of its own, or below one switch.
fn pair(
    tree: &Tree,
    host: Spec,
    in_switch: bool,
    ports: &Spec,
    disk: &Spec,
    card: &Spec,
) -> Machine {
    tree.add("pci0000:00/0000:00:00.0", &host);
    if in_switch {
        tree.add("pci0000:00/0000:00:01.0", &BRIDGE)
            .add("pci0000:00/0000:00:01.0/0000:01:00.0", &port(5))
            .add("pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:00.0", ports)
            .add("pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:01.0", ports)
            .add(
                "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:00.0/0000:03:00.0",
                disk,
            )
            .add(
                "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:01.0/0000:04:00.0",
                card,
            );
    } else {
        tree.add("pci0000:00/0000:00:01.0", ports)
            .add("pci0000:00/0000:00:02.0", ports)
            .add("pci0000:00/0000:00:01.0/0000:03:00.0", disk)
            .add("pci0000:00/0000:00:02.0/0000:04:00.0", card);
    }
    tree.read()
}

fn said(machine: &Machine) -> (Verdict, Option<Map>, Option<Near>, Option<u32>) {
    let argument = ask(machine, "0000:03:00.0", "0000:04:00.0");
    let route = argument.route;
    (
        argument.verdict,
        route.possible.known(),
        route.near,
        route.distance,
    )
}

#[test]
fn a_workstation_depends_on_its_processor_and_its_switch() {
    let consumer = || host_bridge(0x8086, 0x4660);
    let core = || Tree::new(Some("7.3.4"), XEON, false, "");
    let machine = pair(&core(), consumer(), false, &BRIDGE, &nvme(), &gpu());
    let refused = (
        Verdict::No,
        Some(Map::NotSupported),
        Some(Near::Phb),
        Some(4),
    );
    assert_eq!(said(&machine), refused);

    let machine = pair(&core(), consumer(), true, &port(6), &nvme(), &gpu());
    let below = (
        Verdict::Yes,
        Some(Map::BusAddress),
        Some(Near::Pix),
        Some(4),
    );
    assert_eq!(said(&machine), below);

    let ryzen = Tree::new(Some("7.3.4"), EPYC, false, "");
    let machine = pair(
        &ryzen,
        host_bridge(0x1022, 0x14d8),
        false,
        &BRIDGE,
        &nvme(),
        &gpu(),
    );
    let through = (
        Verdict::Yes,
        Some(Map::HostBridge),
        Some(Near::Phb),
        Some(4),
    );
    assert_eq!(said(&machine), through);
    let old = Tree::new(Some("7.3.4"), Some(("AuthenticAMD", 0x15)), false, "");
    let machine = pair(
        &old,
        host_bridge(0x1022, 0x1410),
        false,
        &BRIDGE,
        &nvme(),
        &gpu(),
    );
    assert_eq!(said(&machine), refused);
}

#[test]
fn acs_sends_a_switchs_traffic_to_the_host_bridge_which_decides() {
    let redirecting = Spec {
        acs: Some(0x1d),
        ..port(6)
    };
    for (processor, verdict, map) in [
        (EPYC, Verdict::Yes, Map::HostBridge),
        (XEON, Verdict::No, Map::NotSupported),
    ] {
        let tree = Tree::new(Some("7.3.4"), processor, false, "");
        let machine = pair(
            &tree,
            host_bridge(0x8086, 0x4660),
            true,
            &redirecting,
            &nvme(),
            &gpu(),
        );
        assert_eq!(
            said(&machine),
            (verdict, Some(map), Some(Near::Pix), Some(4))
        );
        let argument = ask(&machine, "0000:03:00.0", "0000:04:00.0");
        let commands: Vec<&String> = argument
            .remedies
            .iter()
            .flat_map(|remedy| &remedy.commands)
            .collect();
        for wanted in [
            "setpci -s 0000:02:00.0 ECAP_ACS+6.w=0:2c  # 001d = 0011",
            "setpci -s 0000:02:00.0 ECAP_ACS+6.w  # reads 0011 if it took",
            "pci=config_acs=x0x00xx@0000:02:00.0;0000:02:01.0",
        ] {
            assert!(
                commands.iter().any(|command| *command == wanted),
                "{wanted} in {commands:#?}"
            );
        }
    }
    // Bits that have nothing to do with peers do not redirect.
    let tree = Tree::new(Some("7.3.4"), XEON, false, "");
    let harmless = Spec {
        acs: Some(0x13),
        ..port(6)
    };
    let machine = pair(
        &tree,
        host_bridge(0x8086, 0x4660),
        true,
        &harmless,
        &nvme(),
        &gpu(),
    );
    assert_eq!(said(&machine).1, Some(Map::BusAddress));
}

#[test]
fn a_user_without_root_gets_unknown_where_acs_decides_and_yes_where_it_does_not() {
    let hidden = |spec: Spec| Spec {
        for_users: true,
        ..spec
    };
    for (processor, verdict) in [(XEON, Verdict::Unknown), (EPYC, Verdict::Yes)] {
        let tree = Tree::new(Some("7.3.4"), processor, false, "");
        let host = hidden(host_bridge(0x8086, 0x4660));
        let machine = pair(
            &tree,
            host,
            true,
            &hidden(port(6)),
            &hidden(nvme()),
            &hidden(gpu()),
        );
        let argument = ask(&machine, "0000:03:00.0", "0000:04:00.0");
        assert_eq!(
            (argument.verdict, argument.route.possible.known()),
            (verdict, None)
        );
        assert!(
            argument
                .reasons
                .iter()
                .any(|reason| reason.code == Code::AcsUnknown)
        );
    }
}

#[test]
fn two_sockets_depend_on_what_the_list_says_of_their_host_bridges() {
    let far = |device: u16| {
        let tree = Tree::new(Some("7.3.4"), XEON, false, "");
        let near = |spec: Spec, node| Spec {
            node: Some(node),
            ..spec
        };
        tree.add("pci0000:00/0000:00:00.0", &host_bridge(0x8086, device))
            .add("pci0000:00/0000:00:01.0", &BRIDGE)
            .add("pci0000:00/0000:00:01.0/0000:03:00.0", &near(nvme(), 0))
            .add("pci0000:80/0000:80:00.0", &host_bridge(0x8086, device))
            .add("pci0000:80/0000:80:01.0", &BRIDGE)
            .add("pci0000:80/0000:80:01.0/0000:81:00.0", &near(gpu(), 1));
        tree.read()
    };
    for (device, verdict, rule) in [
        (0x09a2, Verdict::Yes, Rule::Listed),
        (0x3c00, Verdict::No, Rule::ListedForItselfOnly),
        (0x1237, Verdict::No, Rule::NotListed),
    ] {
        let argument = ask(&far(device), "0000:03:00.0", "0000:81:00.0");
        assert_eq!(
            (argument.verdict, argument.route.rule),
            (verdict, rule),
            "{device:04x}"
        );
        assert_eq!(argument.route.near, Some(Near::Sys));
    }
    // The same under other kernels: the list grew.
    let machine = far(0x09a2);
    for (release, possible) in [
        ("5.17", Some(false)),
        ("5.18", Some(true)),
        ("5.4", None),
        ("8.0", Some(true)),
    ] {
        let rules = Rules::new(&machine, Kernel::parse(release));
        let route = rules.route(at(&machine, "0000:03:00.0"), at(&machine, "0000:81:00.0"));
        assert_eq!(route.possible.allowed(), possible, "{release}");
    }
    let machine = far(0x4940);
    for (release, possible) in [("7.0", Some(false)), ("7.1", None), ("7.2", Some(true))] {
        let rules = Rules::new(&machine, Kernel::parse(release));
        let route = rules.route(at(&machine, "0000:03:00.0"), at(&machine, "0000:81:00.0"));
        assert_eq!(route.possible.allowed(), possible, "{release}");
    }
}

#[test]
fn a_root_bus_that_begins_with_a_root_port_is_named_by_it_since_5_19() {
    let tree = Tree::new(Some("7.3.4"), XEON, false, "");
    tree.add(
        "pci0000:16/0000:16:02.0",
        &Spec {
            id: (0x8086, 0x2032),
            ..BRIDGE
        },
    )
    .add(
        "pci0000:16/0000:16:03.0",
        &Spec {
            id: (0x8086, 0x2033),
            ..BRIDGE
        },
    )
    .add("pci0000:16/0000:16:02.0/0000:17:00.0", &nvme())
    .add("pci0000:16/0000:16:03.0/0000:18:00.0", &gpu());
    let machine = tree.read();
    for (release, possible) in [("7.3", Some(true)), ("5.18", None), ("5.10", Some(false))] {
        let rules = Rules::new(&machine, Kernel::parse(release));
        let route = rules.route(at(&machine, "0000:17:00.0"), at(&machine, "0000:18:00.0"));
        assert_eq!(route.possible.allowed(), possible, "{release}");
    }
}

#[test]
fn a_server_of_eight_gpus_has_near_and_far_pairs() {
    let tree = Tree::new(Some("7.3.4"), XEON, false, "");
    for (host, node) in [(0x10_u8, 0), (0x50, 0), (0x90, 1), (0xd0, 1)] {
        let root = format!("pci0000:{host:02x}");
        tree.add(
            &format!("{root}/0000:{host:02x}:00.0"),
            &host_bridge(0x8086, 0x09a2),
        );
        let up = format!("{root}/0000:{host:02x}:01.0");
        tree.add(&up, &BRIDGE);
        let switch = format!("{up}/0000:{:02x}:00.0", host + 1);
        tree.add(&switch, &port(5));
        for (slot, spec) in [(0, gpu()), (1, gpu()), (2, nic())] {
            let down = format!("{switch}/0000:{:02x}:{slot:02x}.0", host + 2);
            tree.add(&down, &port(6));
            let device = format!("{down}/0000:{:02x}:00.0", host + 3 + slot);
            tree.add(
                &device,
                &Spec {
                    node: Some(node),
                    ..spec
                },
            );
        }
    }
    let machine = tree.read();
    assert_eq!(machine.devices_that_matter().len(), 12);
    for (one, other, map, near) in [
        ("0000:13:00.0", "0000:14:00.0", Map::BusAddress, Near::Pix),
        ("0000:15:00.0", "0000:14:00.0", Map::BusAddress, Near::Pix),
        ("0000:13:00.0", "0000:53:00.0", Map::HostBridge, Near::Node),
        ("0000:13:00.0", "0000:d4:00.0", Map::HostBridge, Near::Sys),
    ] {
        let route = ask(&machine, one, other).route;
        assert_eq!(
            (route.possible.known(), route.near),
            (Some(map), Some(near)),
            "{one} {other}"
        );
        // The kernel's answer is the same the other way round.
        assert_eq!(ask(&machine, other, one).route.possible, route.possible);
    }
}

#[test]
fn a_cloud_machine_with_a_translating_iommu_is_warned_of() {
    let grouped = |spec: Spec| Spec {
        group: Some((7, "DMA-FQ")),
        ..spec
    };
    let tree = Tree::new(Some("7.3.4"), XEON, true, "intel_iommu=on root=/dev/sda1");
    let machine = pair(
        &tree,
        host_bridge(0x8086, 0x29c0),
        true,
        &port(6),
        &grouped(nvme()),
        &grouped(gpu()),
    );
    assert_eq!(
        machine.options.as_deref(),
        Some(&["intel_iommu=on".to_owned()][..])
    );
    let argument = ask(&machine, "0000:03:00.0", "0000:04:00.0");
    // The kernel will allow it; bytes may be lost all the same.
    assert_eq!(argument.route.possible.known(), Some(Map::BusAddress));
    assert!(
        argument
            .reasons
            .iter()
            .any(|reason| reason.code == Code::IommuInGuest)
    );
}

#[test]
fn a_laptops_card_behind_thunderbolt_is_as_far_as_its_bridges() {
    let tree = Tree::new(Some("6.12.1"), XEON, false, "");
    tree.add("pci0000:00/0000:00:00.0", &host_bridge(0x8086, 0x9a14))
        .add("pci0000:00/0000:00:06.0", &BRIDGE)
        .add("pci0000:00/0000:00:06.0/0000:01:00.0", &nvme())
        .add("pci0000:00/0000:00:07.0", &BRIDGE);
    // A dock's bridges, one below the other.
    let mut place = "pci0000:00/0000:00:07.0".to_owned();
    for (bus, kind) in [(2, 5), (3, 6), (4, 5), (5, 6)] {
        place += &format!("/0000:{bus:02x}:00.0");
        tree.add(&place, &port(kind));
    }
    tree.add(&format!("{place}/0000:06:00.0"), &gpu());
    let machine = tree.read();
    let route = ask(&machine, "0000:01:00.0", "0000:06:00.0").route;
    assert_eq!(
        (route.possible.known(), route.distance),
        (Some(Map::NotSupported), Some(8))
    );
    assert_eq!(route.near, Some(Near::Phb));
}

#[test]
fn a_disk_behind_vmd_is_of_a_host_bridge_of_its_own() {
    let tree = Tree::new(Some("7.3.4"), XEON, false, "");
    tree.add("pci0000:00/0000:00:00.0", &host_bridge(0x8086, 0x09a2))
        .add(
            "pci0000:00/0000:00:0e.0",
            &Spec {
                class: 0x0001_0400,
                names: &[],
                ..nvme()
            },
        )
        .add("pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:06.0", &BRIDGE)
        .add(
            "pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0",
            &nvme(),
        )
        .add("pci0000:00/0000:00:01.0", &BRIDGE)
        .add("pci0000:00/0000:00:01.0/0000:04:00.0", &gpu());
    let machine = tree.read();
    let argument = ask(&machine, "10000:e1:00.0", "0000:04:00.0");
    assert_eq!(argument.route.common, None);
    let disk = machine.function(argument.client);
    assert_eq!(machine.hosts[disk.host as usize].name, "pci10000:e0");
    assert_eq!(machine.named("nvme0n1"), Some(argument.client));
}

#[test]
fn a_copy_without_links_is_searched_and_says_the_same() {
    let tree = Tree::new(Some("7.3.4"), EPYC, false, "");
    let machine = pair(
        &tree,
        host_bridge(0x1022, 0x14d8),
        true,
        &port(6),
        &nvme(),
        &gpu(),
    );
    std::fs::remove_dir_all(tree.path("sys/bus")).unwrap();
    assert_eq!(tree.read(), machine);
    // A link that leads out of the copy is not followed.
    std::fs::create_dir_all(tree.path("sys/bus/pci/devices")).unwrap();
    let out = tree.path("sys/bus/pci/devices/0000:09:00.0");
    std::os::unix::fs::symlink("../../../devices/../../outside/0000:09:00.0", out).unwrap();
    assert_eq!(tree.read(), machine);
}
