//! The machine does what the guest's tests request. Runs in the guest.

use std::fs;
use std::os::fd::AsFd;
use std::thread::sleep;
use std::time::Duration;

use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::machine::{Machine, device, give_to_peerbuf};
use peerbuf_lab_suite::node::{Map, Node};

#[test]
fn a_bar_is_unplugged_under_peerbuf_and_comes_back_empty() {
    let mut machine = Machine::new();
    let bdf = Node::largest().bdf;
    for round in 0..3 {
        let node = Node::open(&bdf).unwrap();
        let (fd, _) = node.export(Some(4096), 4096).unwrap();
        let map = Map::new(fd.as_fd(), 4096, true).unwrap();
        // In the first round it contains bytes of another program.
        assert!(round == 0 || map.read(0) == 0, "round {round}");
        map.write(0, 0x5a5a_0001);
        assert_eq!(map.read(0), 0x5a5a_0001, "round {round}");
        drop((map, fd, node));

        machine.unplug("bar0");
        assert!(!device(&bdf).exists(), "{bdf} in round {round}");
        assert!(Node::open(&bdf).is_err(), "{bdf} in round {round}");
        machine.plug("bar0", &bdf).unwrap();
        give_to_peerbuf(&bdf);
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let mut machine = Machine::new();
    let refused = [
        (machine.ask_unplug("bar9"), "bar0, bar1, nvme0"),
        (machine.ask_unplug("bar2"), "bar0, bar1, nvme0"),
        (machine.ask_unplug(""), "unknown request"),
        (machine.plug("nvme0", "0000:00:00.0"), "plugged in again"),
        (machine.plug("bar0", "0000:00:00.0"), "still plugged in"),
        (machine.plug("nvme1", "0000:00:00.0"), "slot of bar1"),
        (machine.link("net1", true), "net0"),
    ];
    for (answer, why) in refused {
        let said = answer.unwrap_err();
        assert!(said.contains(why), "{said}");
    }
    assert!(!machine.is_gone("bar0"));
}

#[test]
fn a_link_goes_down_and_up() {
    let card = fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|d| d.join("device").exists())
        .unwrap();
    let carrier = || fs::read_to_string(card.join("carrier")).unwrap();
    let wait_for = |state: &str| {
        let start = Stopwatch::start();
        while carrier().trim() != state {
            assert!(start.elapsed() < Duration::from_secs(20), "{}", carrier());
            sleep(Duration::from_millis(10));
        }
    };
    let mut machine = Machine::new();
    wait_for("1");
    machine.link("net0", false).unwrap();
    wait_for("0");
    machine.link("net0", true).unwrap();
    wait_for("1");
}
