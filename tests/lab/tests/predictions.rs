//! What `peerbuf-topo` and the command predict is what the kernel answers, for every pair of devices. Runs in the
//! guest, once for each topology, IOMMU and option that could make a difference.

use std::path::Path;
use std::process::Command;

use peerbuf::error::ProbeError;
use peerbuf::export::{peerbuf as module, provider};
use peerbuf::import::probe::{Direction, Options, Probe, Route};
use peerbuf::{Access, Errno};
use peerbuf_lab_suite::demo::topology;
use peerbuf_lab_suite::node::Node;
use peerbuf_topo::machine::{Acs, Port};
use peerbuf_topo::reasons::{Argument, Effect, Reason};
use peerbuf_topo::rules::Map;
use peerbuf_topo::{Code, Machine, PciAddress, Rules, argue};
use serde_json::Value;

/// The route that the kernel is expected to choose. It has none through a host bridge for DMA that it bounces.
fn predicted(argument: &Argument) -> Map {
    let bounced =
        |reason: &Reason| reason.effect == Effect::Blocks && reason.code == Code::SwiotlbForced;
    match argument.route.possible.known() {
        Some(Map::HostBridge) if argument.reasons.iter().any(bounced) => Map::NotSupported,
        Some(map) => map,
        None => panic!("all facts are known: {argument:#?}"),
    }
}

/// Every device with exportable memory, with every device whose driver does DMA.
fn answers(machine: &Machine, mut each: impl FnMut(PciAddress, PciAddress, Map)) {
    let nodes = module::probe().unwrap();
    let lenders = provider::probe().unwrap_or_default();
    let opened = nodes
        .iter()
        .map(|node| module::Device::open_node(node).unwrap());
    let lent = lenders
        .iter()
        .map(|lender| provider::open(*lender).unwrap());
    let devices: Vec<module::Device> = opened.chain(lent).collect();
    let asker = Probe::open().unwrap();
    for device in &devices {
        let info = device.query().unwrap();
        let request = module::Request {
            bar: info.exportable().unwrap().index,
            offset: None,
            length: 64 << 10,
            access: Access::ReadWrite,
        };
        let buffer = device.export(request).unwrap();
        for (_, client) in machine.each() {
            let attached =
                asker.attach(buffer.dmabuf().unwrap(), client.address, Options::default());
            let pair = format!("{} with memory of {}", client.address, info.address);
            let answer = match attached.and_then(|held| held.map(Direction::Bidirectional)) {
                Ok(mapping) => match mapping.route() {
                    Route::BusAddress => Map::BusAddress,
                    Route::HostBridge => Map::HostBridge,
                    other => panic!("{pair}: {other:?}"),
                },
                Err(ProbeError::System { cause, .. }) => match cause.errno {
                    // Without a driver, or with one that does no DMA.
                    Errno::UNATCH => continue,
                    Errno::REMOTEIO => Map::NotSupported,
                    _ => panic!("{pair}: {cause}"),
                },
                Err(error) => panic!("{pair}: {error}"),
            };
            each(client.address, info.address, answer);
        }
    }
}

/// Each pair of which the kernel was asked, with its answer, which is the predicted one.
fn compared(machine: &Machine) -> Vec<(PciAddress, PciAddress, Map)> {
    compared_with(machine, |_| true)
}

/// As [`compared`], for some devices' memory.
fn compared_with(
    machine: &Machine,
    is_asked: impl Fn(PciAddress) -> bool,
) -> Vec<(PciAddress, PciAddress, Map)> {
    let rules = Rules::new(machine, None);
    let mut compared = Vec::new();
    answers(machine, |client, lender, answer| {
        let [one, other] = [client, lender].map(|address| machine.find(address).unwrap());
        let argument = argue(&rules, one, other);
        let has = |code| argument.reasons.iter().any(|reason| reason.code == code);
        // A device needs no route to itself, but must be able to send the address.
        if one == other || has(Code::DmaMask) || !is_asked(lender) {
            return;
        }
        let pair = format!("{client} with memory of {lender}");
        assert_eq!(predicted(&argument), answer, "{pair}: {argument:#?}");
        compared.push((client, lender, answer));
    });
    compared
}

#[test]
fn what_is_predicted_is_what_the_kernel_answers_for_every_pair() {
    let machine = peerbuf_topo::running().unwrap();
    let compared = compared(&machine);
    // The disk and other devices, with each of the BARs and with the disk's own memory.
    assert!(compared.len() >= 8, "{compared:?}");
    let bounced = machine
        .options
        .iter()
        .flatten()
        .any(|option| option == "swiotlb=force");
    let usual = match topology().as_str() {
        "host-bridge" if bounced => Map::NotSupported,
        "host-bridge" => Map::HostBridge,
        "refused" => Map::NotSupported,
        _ => Map::BusAddress,
    };
    let found = compared.iter().filter(|(.., answer)| *answer == usual);
    assert!(found.count() >= 2, "no two {usual:?}: {compared:?}");
}

/// The kernel tests redirection only of bridges below the bridge that two devices share. QEMU has ACS in root ports and
/// not in a switch's ports, so its bits change no answer here.
#[test]
fn redirection_above_the_shared_bridge_is_predicted_to_change_nothing() {
    let nodes: Vec<String> = Node::all().into_iter().map(|node| node.bdf).collect();
    let compared = || {
        // The kernel reads the bits again when the driver of the memory's device is bound anew.
        for bdf in &nodes {
            Node::unbind(bdf);
            Node::bind(bdf);
        }
        let machine = peerbuf_topo::running().unwrap();
        compared_with(&machine, |lender| nodes.contains(&lender.to_string()))
    };
    let before = compared();
    let machine = peerbuf_topo::running().unwrap();
    let bridges = machine
        .each()
        .filter_map(|(_, function)| match function.acs {
            Some(Acs::Control(control))
                if function.port.is_some_and(|port| port != Port::Endpoint) =>
            {
                Some((function.address, control))
            }
            _ => None,
        });
    let bridges: Vec<(PciAddress, u16)> = bridges.collect();
    assert!(!bridges.is_empty());
    let set = |bridge: PciAddress, control: u16| {
        let word = format!("ECAP_ACS+6.w={control:x}");
        let done = Command::new("setpci")
            .args(["-s", &bridge.to_string(), &word])
            .status();
        assert!(done.unwrap().success());
        let machine = peerbuf_topo::running().unwrap();
        let found = machine.function(machine.find(bridge).unwrap()).acs;
        assert_eq!(found, Some(Acs::Control(control)), "{bridge}");
    };
    for &(bridge, control) in &bridges {
        set(bridge, control | 0xc);
    }
    let redirected = compared();
    for &(bridge, control) in &bridges {
        set(bridge, control);
    }
    assert_eq!(redirected, before);
}

/// The command has the kernel's answer beside its prediction, for programs.
#[test]
fn the_command_predicts_what_it_is_answered() {
    let cache = tempfile::tempdir().unwrap();
    let output = Command::new("peerbuf")
        .args(["doctor", "--json"])
        .env("XDG_CACHE_HOME", cache.path())
        .output()
        .unwrap();
    let doctor: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut asked = 0;
    for pair in doctor["pairs"].as_array().unwrap() {
        let kernel = pair["kernel"].as_str().unwrap();
        let expected = match kernel.split([',', ':']).next() {
            Some("yes") => "yes",
            Some("no") => "no",
            _ => continue,
        };
        assert_eq!(pair["predicted"], expected, "{pair}");
        assert!(
            !pair["codes"].to_string().contains("verdict-cached"),
            "{pair}"
        );
        asked += 1;
    }
    assert!(asked >= 4, "{doctor}");
}

/// pciutils's text of this machine lacks the processor, and otherwise says the same as sysfs.
#[test]
fn lspci_s_text_gives_the_same_predictions_as_sysfs() {
    let ours = peerbuf_topo::running().unwrap();
    let output = Command::new("lspci")
        .args(["-D", "-nn", "-vvv"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let theirs = peerbuf_topo::read(&text, Path::new("lspci")).unwrap();
    assert_eq!(ours.functions.len(), theirs.functions.len(), "{text}");
    let (here, there) = (Rules::new(&ours, None), Rules::new(&theirs, ours.kernel));
    for (one, a) in ours.each() {
        for (other, b) in ours.each() {
            let route = here.route(one, other);
            let [one, other] = [a, b].map(|function| theirs.find(function.address).unwrap());
            let read = there.route(one, other);
            let pair = format!("{} and {}", a.address, b.address);
            assert_eq!(
                (read.distance, read.redirected),
                (route.distance, route.redirected),
                "{pair}"
            );
            let answer = route.possible.known().unwrap();
            assert!(read.possible.has(answer), "{pair}: {read:?}, not {route:?}");
            assert!(
                read.possible.known().is_none_or(|known| known == answer),
                "{pair}"
            );
        }
    }
}
