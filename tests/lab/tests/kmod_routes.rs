//! The mappings of an export in each topology: the addresses that an importer gets, and the behaviour of
//! direct I/O on a mapping. Runs in the guest, once for each topology.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use peerbuf_lab_suite::buffers::{heap, udmabuf};
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::disk::{self, SCRATCH};
use peerbuf_lab_suite::importer::{self, DYNAMIC, Importer, Mapping, PEER};
use peerbuf_lab_suite::node::{Map, Node, errno, nvme_bdf};
use peerbuf_lab_suite::pci::{spare_device, wait_until};
use peerbuf_uapi::{self as abi, probe};

const MIB: u64 = 1 << 20;
const OFFSET: u64 = 5 << 12;

fn topology() -> String {
    std::env::var("PEERBUF_LAB_TOPOLOGY").expect("runs in the lab")
}

#[test]
fn importers_get_the_route_of_the_topology() {
    let node = Node::largest();
    let (fd, _) = node.export(Some(OFFSET), 3 * MIB).unwrap();
    let attached = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC | PEER, 0);
    if topology() == "refused" {
        assert_eq!(errno(attached), libc::EREMOTEIO);
        let query = node.buffer(&fd).unwrap();
        assert_eq!(query.refusals, 1);
        assert_eq!(query.refused_reason, abi::REFUSED_NO_ROUTE);
        assert_eq!(query.refused_errno, libc::EREMOTEIO as u32);
        assert!(query.refused_device.starts_with(nvme_bdf().as_bytes()));
        return;
    }
    let importer = attached.unwrap();
    let answer = importer.map();
    // Under a switch the kernel uses the short route, with or without an IOMMU.
    let bridged = topology() == "host-bridge";
    let expected = Mapping {
        segments: 1,
        bytes: 3 * MIB,
        bus: if bridged { 0 } else { 3 * MIB },
        bridge: if bridged { 3 * MIB } else { 0 },
        provider: node.bdf.clone(),
        ..Mapping::default()
    };
    let check = |mapping: Mapping| assert_eq!(mapping, expected);
    check(answer.unwrap());
    importer.unmap();
    check(importer.map().unwrap());
}

#[test]
fn direct_io_does_what_the_topology_is_known_for() {
    const LEN: usize = MIB as usize;
    let node = Node::largest();
    let disk = disk::open_direct(SCRATCH).unwrap();
    let (fd, _) = node.export(Some(OFFSET), MIB).unwrap();
    let map = Map::new(fd.as_fd(), LEN, true).unwrap();
    let pattern = |i: usize| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let fill = |word: &dyn Fn(usize) -> u64| {
        for i in (0..LEN).step_by(8) {
            map.write(i, word(i));
        }
        map.read(0);
    };
    let is_pattern = || (0..LEN).step_by(8).all(|i| map.read(i) == pattern(i));

    fill(&pattern);
    let wrote = disk::write_from(&disk, &map, 0, LEN, 0);
    fill(&|_| 0);
    let read = disk::read_into(&disk, &map, 0, LEN, 0);
    let count = |result: io::Result<usize>| result.map_err(|e| e.raw_os_error().unwrap());
    match topology().as_str() {
        "switch" | "host-bridge" => {
            assert_eq!((count(wrote), count(read)), (Ok(LEN), Ok(LEN)));
            assert!(is_pattern(), "the bytes came back");
        }
        "refused" => {
            assert_eq!(count(wrote), Err(libc::EINVAL));
            assert_eq!(count(read), Err(libc::EINVAL));
            let log = Command::new("dmesg").output().unwrap().stdout;
            let log = String::from_utf8_lossy(&log).into_owned();
            let reason = "do not share an upstream bridge or whitelisted host bridge";
            let named = |line: &str| line.contains(&nvme_bdf()) && line.contains(&node.bdf);
            let said = |line: &str| line.contains(reason) && named(line);
            assert!(log.lines().any(said), "{reason}");
        }
        "lying" => {
            // A platform that must not be trusted: full counts, but no bytes.
            assert_eq!((count(wrote), count(read)), (Ok(LEN), Ok(LEN)));
            assert!(
                !is_pattern(),
                "if this ever works the topology models nothing"
            );
        }
        other => panic!("topology {other}?"),
    }
}

#[test]
fn an_attachment_ends_with_the_driver_of_its_device() {
    let bdf = spare_device();
    let sysfs = |what: &str, value: &str| fs::write(what, value).unwrap();
    let device = format!("/sys/bus/pci/devices/{bdf}");
    let removals: [(&str, &dyn Fn()); 2] = [
        ("unbound", &|| {
            sysfs("/sys/bus/pci/drivers/ahci/unbind", &bdf)
        }),
        ("unplugged", &|| sysfs(&format!("{device}/remove"), "1")),
    ];
    for (how, remove) in removals {
        let node = Node::largest();
        let (bar, _) = node.export(None, MIB).unwrap();
        let (fd, heap) = (&udmabuf(MIB), heap(MIB));
        let mut held = Vec::new();
        for fd in [fd, &heap, &bar] {
            let mut request = importer::request(fd.as_fd(), &bdf, DYNAMIC | PEER);
            request.on_invalidate = probe::ON_INVALIDATE_HOLD;
            let importer = match Importer::attach_as(request) {
                Ok(importer) => importer,
                // In its slot the device reaches a BAR only through trusted host bridges.
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::EREMOTEIO), "{how}");
                    assert_ne!(topology(), "host-bridge", "{how}");
                    continue;
                }
            };
            assert_eq!(importer.map().unwrap().bytes, MIB);
            importer.step(probe::IOC_PIN).unwrap();
            importer.fence(probe::FENCE_BOOKKEEP, 20_000).unwrap();
            held.push(importer);
        }
        let other = Importer::attach(fd.as_fd(), &nvme_bdf(), DYNAMIC, 0).unwrap();
        other.map().unwrap();
        // An attachment that outlives its file ends with the driver, too.
        let mut request = importer::request(heap.as_fd(), &bdf, DYNAMIC | PEER);
        request.detach_ms = 1500;
        let lingering = Importer::attach_as(request).unwrap();
        lingering.map().unwrap();
        drop(lingering);
        let start = Stopwatch::start();
        remove();
        let waited = start.elapsed();
        assert!(waited < Duration::from_secs(10), "{how}: {waited:?}");
        let gone = probe::DETACHED | probe::DEVICE_GONE;
        for importer in &held {
            assert_eq!(importer.query().state, gone, "{how}");
            assert_eq!(errno(importer.map()), libc::ENOTCONN, "{how}");
        }
        assert_eq!(other.query().state, probe::MAPPED, "not its device");
        let refused = Importer::attach(fd.as_fd(), &bdf, DYNAMIC, 0);
        let expected = if how == "unbound" {
            libc::EUNATCH
        } else {
            libc::ENXIO
        };
        assert_eq!(errno(refused), expected, "{how}");
        drop((held, bar));
        assert_eq!(node.bar2().exports, 0, "{how}");
        if how == "unbound" {
            sysfs("/sys/bus/pci/drivers/ahci/bind", &bdf);
        } else {
            sysfs("/sys/bus/pci/rescan", "1");
        }
        wait_until("bound again", || {
            fs::exists(format!("{device}/driver")).unwrap()
        });
        Importer::attach(fd.as_fd(), &bdf, DYNAMIC, 0).unwrap();
    }
}
