//! What `peerbuf-topo` and the command predict is what the kernel answers, for every pair of devices. Runs in the
//! guest, once for each topology, IOMMU and option that could make a difference.

use std::path::Path;
use std::process::Command;

use peerbuf::error::ProbeError;
use peerbuf::export::{peerbuf as module, provider};
use peerbuf::import::probe::{Direction, Options, Probe, Route};
use peerbuf::{Access, Errno};
use peerbuf_lab_suite::demo::topology;
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

#[test]
fn what_is_predicted_is_what_the_kernel_answers_for_every_pair() {
    let machine = peerbuf_topo::running().unwrap();
    let rules = Rules::new(&machine, None);
    let mut compared = Vec::new();
    answers(&machine, |client, lender, answer| {
        let [one, other] = [client, lender].map(|address| machine.find(address).unwrap());
        let argument = argue(&rules, one, other);
        // A device needs no route to itself, but must be able to send the address.
        let cannot_send = argument
            .reasons
            .iter()
            .any(|reason| reason.code == Code::DmaMask);
        if one == other || cannot_send {
            return;
        }
        let pair = format!("{client} with memory of {lender}");
        assert_eq!(predicted(&argument), answer, "{pair}: {argument:#?}");
        compared.push((pair, answer));
    });
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
    let found = compared.iter().filter(|(_, answer)| *answer == usual);
    assert!(found.count() >= 2, "no two {usual:?}: {compared:?}");
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
