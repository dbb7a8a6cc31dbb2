//! Registrations and connections of a card within one guest.

use std::time::Duration;

use peerbuf::export::memfd;
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::{Access, Buffer, BufferRange};
use peerbuf_rdma::{Address, Card, Completion, Connection, Operation, Registration, Remote, Rung};

use crate::bytes::{get, put};
use crate::machine::seconds;
use crate::node::Node;

/// Time limit for a request.
pub fn limit() -> Duration {
    seconds(30)
}

/// Read and write access for the peer.
pub const ALL: Option<Access> = Some(Access::ReadWrite);

/// Whether the guest's soft-RoCE supports dma-bufs.
///
/// # Panics
///
/// If the guest does not tell which soft-RoCE it has.
pub fn takes_dma_bufs() -> bool {
    match std::env::var("PEERBUF_LAB_RDMA").as_deref() {
        Ok("dmabuf") => true,
        Ok("stock") => false,
        other => panic!("PEERBUF_LAB_RDMA is {other:?}"),
    }
}

/// The guest's card.
///
/// # Panics
///
/// If there is none, as in the rest of this module.
pub fn card() -> Card {
    Card::open("rxe0").unwrap()
}

/// The device with the largest BAR.
pub fn device() -> Device {
    Device::open(Node::largest().bdf.parse().unwrap()).unwrap()
}

/// A buffer of `length` bytes in this device's BAR, anywhere.
pub fn bar(length: u64) -> Buffer {
    let request = Request {
        bar: 2,
        offset: None,
        length,
        access: Access::ReadWrite,
    };
    device().export(request).unwrap()
}

/// Both ends of a connection, on one card.
pub fn connected(card: &Card, depth: u32) -> (Connection, Connection) {
    let ends = [card.endpoint(depth).unwrap(), card.endpoint(depth).unwrap()];
    // Encoded and decoded, as over a network.
    let [a, b] = [0, 1].map(|n| Address::from_bytes(&ends[n].address().to_bytes()).unwrap());
    let [first, second] = ends;
    (first.connect(&b).unwrap(), second.connect(&a).unwrap())
}

/// Random bytes that depend only on `seed`.
pub fn random(length: u64, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length as usize + 8);
    while bytes.len() < length as usize {
        // xorshift64
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(length as usize);
    bytes
}

/// The number of bytes of a successful request.
pub fn good(completion: Completion) -> u64 {
    completion.result.unwrap()
}

/// A registered range, with its surroundings in the buffer.
pub struct Under {
    /// The registration of the range.
    pub registration: Registration,
    /// The registered range.
    pub range: BufferRange,
    /// The range with the bytes around it.
    pub around: BufferRange,
}

/// Writes to, reads from, sends to and sends from a registration, and checks each byte, also those around the
/// range.
pub fn exercise(card: &Card, under: &Under) {
    let Under {
        registration,
        range,
        around,
    } = under;
    let (length, lead) = (range.len(), range.offset() - around.offset());
    let bytes = |seed| random(length, seed);
    let remote = registration.remote().unwrap();
    let remote = Remote::from_bytes(&remote.to_bytes()).unwrap();
    let other = memfd::export("other end", length).unwrap().whole();
    let mine = card.register(&other, ALL).unwrap();
    assert_eq!(mine.rung(), Rung::SharedMemory);
    let piece = mine.slice(0, length).unwrap();
    let whole = registration.slice(0, length).unwrap();
    let (mut here, mut there) = connected(card, 16);
    let canary = random(around.len(), 77);
    let check = |seed: u64, what: &str| {
        let mut expected = canary.clone();
        expected[lead as usize..][..length as usize].copy_from_slice(&bytes(seed));
        let got = get(around);
        let at = got.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(
            at, None,
            "{what}: first wrong byte, of {} at {lead}",
            length
        );
    };
    put(around, &canary);

    // An RDMA write, then one with an immediate value.
    put(&other, &bytes(1));
    here.write(&piece, &remote, None).unwrap();
    assert_eq!(good(here.wait(limit()).unwrap()), length);
    registration.deliver(0, length).unwrap();
    check(1, "write");
    put(&other, &bytes(2));
    there.receive(None).unwrap();
    here.write(&piece, &remote, Some(0xfeed_beef)).unwrap();
    let told = there.wait(limit()).unwrap();
    assert_eq!(
        (told.operation, told.immediate),
        (Operation::Receive, Some(0xfeed_beef))
    );
    assert_eq!(good(told), length);
    good(here.wait(limit()).unwrap());
    registration.deliver(0, length).unwrap();
    check(2, "write with a number");

    // An RDMA read.
    put(range, &bytes(3));
    registration.refresh(0, length).unwrap();
    here.read(&piece, &remote).unwrap();
    assert_eq!(good(here.wait(limit()).unwrap()), length);
    assert!(get(&other) == bytes(3), "read");

    // A send to the registration, awaited by polling.
    put(&other, &bytes(4));
    there.receive(Some(&whole)).unwrap();
    here.send(&piece, None).unwrap();
    let mut arrived = None;
    while arrived.is_none() {
        arrived = there.poll().unwrap();
    }
    let arrived = arrived.unwrap();
    assert_eq!(arrived.immediate, None);
    assert_eq!(
        arrived.host_bytes,
        if registration.rung() == Rung::Staged {
            length
        } else {
            0
        }
    );
    assert_eq!(good(arrived), length);
    good(here.wait(limit()).unwrap());
    check(4, "send to it");

    // A send from the registration with an immediate value, and a write from it.
    put(range, &bytes(5));
    here.receive(Some(&piece)).unwrap();
    there.send(&whole, Some(5)).unwrap();
    assert_eq!(here.wait(limit()).unwrap().immediate, Some(5));
    good(there.wait(limit()).unwrap());
    assert!(get(&other) == bytes(5), "send from it");
    put(range, &bytes(6));
    there.write(&whole, &mine.remote().unwrap(), None).unwrap();
    good(there.wait(limit()).unwrap());
    assert!(get(&other) == bytes(6), "write from it");
    // A read into the registration.
    put(&other, &bytes(7));
    there.read(&whole, &mine.remote().unwrap()).unwrap();
    good(there.wait(limit()).unwrap());
    check(7, "read into it");
}

/// The rungs that must work for a kind of buffer.
pub fn expected(kind: &str) -> Vec<Rung> {
    let mut rungs = Vec::new();
    if takes_dma_bufs() && kind != "memfd" {
        // librxe lacks the library function, whatever the kernel supports.
        rungs.push(Rung::DmaBufByKernel);
    }
    if matches!(kind, "memfd" | "udmabuf") {
        rungs.push(Rung::SharedMemory);
    }
    rungs.push(Rung::Staged);
    rungs
}
