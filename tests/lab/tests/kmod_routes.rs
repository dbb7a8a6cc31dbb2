//! What each topology makes of an export: the addresses that an importer gets, and what direct I/O
//! on a mapping does. Runs in the guest, once for each topology.

use std::io;
use std::os::fd::AsFd;
use std::process::Command;

use peerbuf_lab_suite::disk::{self, SCRATCH};
use peerbuf_lab_suite::importer::{DYNAMIC, Importer, Mapping, PEER};
use peerbuf_lab_suite::node::{Map, Node, errno, nvme_bdf};
use peerbuf_uapi as abi;

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
    // Under a switch the kernel takes the short way, IOMMU or not.
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
            let line = log
                .lines()
                .find(|line| line.contains(reason))
                .expect(reason);
            assert!(
                line.contains(&nvme_bdf()) && line.contains(&node.bdf),
                "{line}"
            );
        }
        "lying" => {
            // The model of a platform that must not be believed: full counts, no bytes.
            assert_eq!((count(wrote), count(read)), (Ok(LEN), Ok(LEN)));
            assert!(
                !is_pattern(),
                "if this ever works the topology models nothing"
            );
        }
        other => panic!("topology {other}?"),
    }
}
