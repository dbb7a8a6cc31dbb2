//! A buffer in a BAR, passed to another process. Runs in the guest.

use std::process::Command;

use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::udmabuf;
use peerbuf::share::Channel;
use peerbuf::{Access, DmaBuf};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::demo::alone;
use peerbuf_lab_suite::node::Node;

#[test]
fn a_range_of_a_bar_arrives_with_its_offset_and_keeps_the_memory_alive() {
    let _alone = alone();
    let node = Node::largest();
    let device = Device::open(node.bdf.parse().unwrap()).unwrap();
    let request = Request {
        bar: 2,
        offset: Some(1 << 20),
        length: 65536,
        access: Access::ReadWrite,
    };
    let buffer = device.export(request).unwrap();
    let range = buffer.range(4096 + 17, 1000).unwrap();
    put(&range, &[9; 1000]);

    let (ours, theirs) = Channel::pair().unwrap();
    ours.send_buffer(&range).unwrap();
    let identity = buffer.dmabuf().unwrap().identity();
    drop((range, buffer, device));
    let received = theirs.receive_buffer().unwrap();
    assert_eq!((received.offset(), received.len()), (4096 + 17, 1000));
    assert_eq!(
        received.buffer().provenance().device.unwrap().to_string(),
        node.bdf
    );
    assert_eq!(received.buffer().provenance().bar, Some(2));
    assert_eq!(received.buffer().dmabuf().unwrap().identity(), identity);
    assert_eq!(get(&received), [9; 1000]);
    assert_eq!(node.bar2().exports, 1);
    drop(received);
    assert_eq!(
        (node.bar2().exports, node.bar2().free),
        (0, node.bar2().size)
    );
}

#[test]
fn two_descriptors_of_one_buffer_are_recognised() {
    let _alone = alone();
    let one = udmabuf::export("one", 4096).unwrap();
    let other = udmabuf::export("other", 4096).unwrap();
    let (one, other) = (one.dmabuf().unwrap(), other.dmabuf().unwrap());
    assert_eq!(one.identity(), one.try_clone().unwrap().identity());
    assert_ne!(one.identity(), other.identity());
    assert!(DmaBuf::from_fd(one.try_clone().unwrap().into()).is_ok());
}

#[test]
fn a_udmabuf_arrives_as_the_dma_buf_and_the_memory_behind_it() {
    let _alone = alone();
    let buffer = udmabuf::export("memory", 65536).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    ours.send_buffer(&buffer.whole()).unwrap();
    let received = theirs.receive_buffer().unwrap();
    put(&received, &[3; 65536]);
    assert_eq!(get(&buffer.whole()), [3; 65536]);
    let received = received.buffer();
    assert!(received.host_memory().is_some());
    let identity = |buffer: &peerbuf::Buffer| buffer.dmabuf().unwrap().identity();
    assert_eq!(identity(received), identity(&buffer));
}

#[test]
fn the_command_hands_its_export_to_a_program_and_frees_it_afterwards() {
    let _alone = alone();
    let node = Node::largest();
    let script = "test \"$PEERBUF_LENGTH\" = 1048576 && \
                  readlink /proc/self/fd/$PEERBUF_FD && exit 7";
    let output = Command::new("peerbuf")
        .args([
            "export", &node.bdf, "--bar", "2", "--length", "1M", "--", "sh", "-c", script,
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("dmabuf"),
        "{output:?}"
    );
    assert_eq!(node.bar2().exports, 0);
}

#[test]
fn the_command_serves_its_export_on_a_socket_until_it_is_stopped() {
    let _alone = alone();
    let node = Node::largest();
    let path = std::env::temp_dir().join("peerbuf-export");
    let mut server = Command::new("peerbuf")
        .args([
            "export", &node.bdf, "--bar", "2", "--length", "1M", "--socket",
        ])
        .arg(&path)
        .spawn()
        .unwrap();
    let client = loop {
        match Channel::connect(&path) {
            Ok(client) => break client,
            Err(_) if server.try_wait().unwrap().is_none() => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Err(error) => panic!("{error}"),
        }
    };
    let received = client.receive_buffer().unwrap();
    assert_eq!(received.len(), 1 << 20);
    assert_eq!(client.peer().unwrap().pid, Some(server.id() as i32));
    let pid = rustix::process::Pid::from_child(&server);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    assert!(!path.exists(), "the socket was left behind");
    // The buffer outlives the command that exported it.
    put(&received, &vec![5; 1 << 20]);
    assert_eq!(node.bar2().exports, 1);
    drop(received);
    assert_eq!(node.bar2().exports, 0);
}
