//! Tests that need a card with dma-buf support: a revoke in mid-transfer, with the card's own error, and a
//! registration longer than 4 GiB (as a staged one it would need as much pinned system memory). Runs in the
//! guest with `--rdma dmabuf` and a BAR of 8 GiB. The kernel maps discontiguous pages (vmap) only if there
//! are fewer than it has memory, so the guest has more memory, too.

use std::sync::atomic::{AtomicBool, Ordering};

use peerbuf::export::{memfd, udmabuf};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::node::{Node, assert_all_free};
use peerbuf_lab_suite::rdma::{ALL, bar, card, connected, device, good, limit, random};
use peerbuf_rdma::{Card, RdmaError, Remote, Rung, Status};

const GIB: u64 = 1 << 30;
const BOUND: u64 = 4 * GIB;
const SIZE: u64 = 8 * GIB;

#[test]
fn a_revoke_in_mid_transfer_ends_it_with_an_error_and_nothing_else_changes() {
    const CHUNK: u64 = 64 << 10;
    const CHUNKS: u64 = 64;
    let (card, device) = (card(), device());
    let [before, buffer, after] = [64 << 10, CHUNK * CHUNKS, 64 << 10].map(bar);
    for neighbour in [&before, &after] {
        put(&neighbour.whole(), &random(64 << 10, 9));
    }
    let old = random(CHUNK * CHUNKS, 1);
    put(&buffer.whole(), &old);
    let new = random(CHUNK * CHUNKS, 2);
    let source = udmabuf::export("source", CHUNK * CHUNKS).unwrap();
    put(&source.whole(), &new);
    let source = card.register(&source.whole(), None).unwrap();
    let target = card.register(&buffer.whole(), ALL).unwrap();
    let remote = target.remote().unwrap();
    let (mut here, mut there) = connected(&card, 16);

    let dmabuf = buffer.dmabuf().unwrap();
    let begun = AtomicBool::new(false);
    let (failed_at, revoked) = std::thread::scope(|scope| {
        let revoking = scope.spawn(|| {
            while !begun.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            device.revoke(dmabuf, limit()).unwrap()
        });
        let mut failed_at = None;
        for n in 0..CHUNKS {
            let piece = source.slice(n * CHUNK, CHUNK).unwrap();
            here.write(&piece, &remote.slice(n * CHUNK, CHUNK).unwrap(), None)
                .unwrap();
            if n == 3 {
                begun.store(true, Ordering::Release);
            }
            match here.wait(limit()).unwrap().result {
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.status, Status::REMOTE_ACCESS, "{error}");
                    failed_at = Some(n);
                    break;
                }
            }
        }
        (failed_at, revoking.join().unwrap())
    });
    let failed_at = failed_at.expect("4 MiB take longer than a revoke");
    assert!(failed_at >= 3);
    assert!(revoked.is_complete(), "{revoked:?}");

    // Local work on the registration fails, too.
    let (mut fresh, _its_peer) = connected(&card, 4);
    let refused = fresh.write(
        &target.slice(0, 64).unwrap(),
        &remote.slice(0, 64).unwrap(),
        None,
    );
    assert!(matches!(refused, Err(RdmaError::Stale { .. })));
    there.drain(limit()).unwrap();

    // The key is not reused while the registration exists.
    let slot = |remote: &Remote| remote.to_bytes()[16..19].to_vec();
    let page = source.range().unwrap().buffer().range(0, 4096).unwrap();
    for _ in 0..500 {
        let other = card.register(&page, ALL).unwrap();
        assert_ne!(slot(&other.remote().unwrap()), slot(&remote));
    }

    // Recovery: bytes reported as done are there; bytes not begun are unchanged.
    device.restore(dmabuf).unwrap();
    let now = get(&buffer.whole());
    let at = |n: u64| (n * CHUNK) as usize;
    assert!(now[..at(failed_at)] == new[..at(failed_at)]);
    assert!(now[at(failed_at + 1)..] == old[at(failed_at + 1)..]);
    for neighbour in [&before, &after] {
        assert!(get(&neighbour.whole()) == random(64 << 10, 9));
    }
    let again = card.register(&buffer.whole(), ALL).unwrap();
    assert_eq!(again.rung(), Rung::DmaBufByKernel);
    let (mut here, _there) = connected(&card, 4);
    let all = source.slice(0, CHUNK * CHUNKS).unwrap();
    here.write(&all, &again.remote().unwrap(), None).unwrap();
    good(here.wait(limit()).unwrap());
    assert!(get(&buffer.whole()) == new);
}

/// The result on one connection of a write as long as `to`.
fn write(card: &Card, to: &Remote) -> Result<u64, Status> {
    let source = memfd::export("source", to.len()).unwrap().whole();
    put(&source, &vec![0xee; to.len() as usize]);
    let source = card.register(&source, None).unwrap();
    let (mut here, _peer) = connected(card, 4);
    let piece = source.slice(0, to.len()).unwrap();
    here.write(&piece, to, None).unwrap();
    let done = here.wait(limit()).unwrap();
    done.result.map_err(|error| error.status)
}

/// The same memory as `of`, with another address and length.
fn forged(of: &Remote, address: u64, length: u64) -> Remote {
    let mut bytes = of.to_bytes();
    bytes[..8].copy_from_slice(&address.to_be_bytes());
    bytes[8..16].copy_from_slice(&length.to_be_bytes());
    Remote::from_bytes(&bytes).unwrap()
}

#[test]
fn a_registration_longer_than_4_gib_is_used_to_its_last_byte_and_no_further() {
    const PIECE: u64 = 32 << 10;
    let node = Node::largest();
    assert_eq!(node.bar2().size, SIZE, "run with --bar-size 8G");
    let card = card();
    let buffer = bar(SIZE);
    let size = buffer.size();
    let all = card.register(&buffer.whole(), ALL).unwrap();
    assert_eq!((all.rung(), all.len()), (Rung::DmaBufByKernel, size));
    let remote = all.remote().unwrap();
    assert_eq!(remote.len(), size);
    let places = [0, PIECE, BOUND - PIECE, BOUND, size - PIECE];
    let at = |n: usize| buffer.range(places[n], PIECE).unwrap();
    let other = memfd::export("other end", PIECE).unwrap().whole();
    let mine = card.register(&other, ALL).unwrap();
    let piece = mine.slice(0, PIECE).unwrap();
    let (mut here, mut there) = connected(&card, 16);

    // The peer writes different bytes to each place. All are checked after the last.
    for (seed, place) in (1..).zip(places) {
        put(&other, &random(PIECE, seed));
        let to = remote.slice(place, PIECE).unwrap();
        here.write(&piece, &to, None).unwrap();
        assert_eq!(good(here.wait(limit()).unwrap()), PIECE);
    }
    let holds = |seeds: [u64; 5], what: &str| {
        for (n, seed) in seeds.into_iter().enumerate() {
            assert!(get(&at(n)) == random(PIECE, seed), "{what}: place {n}");
        }
    };
    holds([1, 2, 3, 4, 5], "written");
    for (seed, place) in (1..).zip(places) {
        let from = remote.slice(place, PIECE).unwrap();
        here.read(&piece, &from).unwrap();
        good(here.wait(limit()).unwrap());
        assert!(get(&other) == random(PIECE, seed), "read at {place:#x}");
    }
    // Local work: from the last pages to the first, and across the boundary to the last.
    for (from, to, length) in [
        (size - PIECE, 0, PIECE),
        (BOUND - PIECE / 2, size - PIECE, PIECE),
    ] {
        let from = all.slice(from, length).unwrap();
        there
            .write(&from, &remote.slice(to, length).unwrap(), None)
            .unwrap();
        assert_eq!(good(there.wait(limit()).unwrap()), length);
    }
    let half = PIECE as usize / 2;
    let across = [&random(PIECE, 3)[half..], &random(PIECE, 4)[..half]].concat();
    assert!(get(&at(4)) == across);
    put(&at(4), &random(PIECE, 6));
    let last = remote.slice(size - PIECE, PIECE).unwrap();
    there
        .read(&all.slice(BOUND - PIECE, PIECE).unwrap(), &last)
        .unwrap();
    good(there.wait(limit()).unwrap());
    holds([5, 2, 6, 4, 6], "by this end");

    // Ranges that would be inside if a number were truncated to 32 bits.
    for (what, address, length) in [
        ("over the end", size - 8, 16),
        ("behind the end", size, 16),
        ("far behind it", size + BOUND, 16),
        ("at the last address", u64::MAX - 16, 16),
    ] {
        let refused = write(&card, &forged(&remote, address, length));
        assert_eq!(refused, Err(Status::REMOTE_ACCESS), "{what}");
    }
    let long = all.slice(0, BOUND + 16).unwrap();
    let refused = here.write(&long, &remote.slice(0, BOUND + 16).unwrap(), None);
    assert!(
        matches!(refused, Err(RdmaError::Mismatch { .. })),
        "{refused:?}"
    );
    holds([5, 2, 6, 4, 6], "refused");

    // A registration of the middle.
    let middle = buffer.range(2 * GIB, 5 * GIB).unwrap();
    let part = card.register(&middle, ALL).unwrap();
    let remote = part.remote().unwrap();
    for (what, address) in [("before it", 2 * GIB - 16), ("behind it", 7 * GIB)] {
        let refused = write(&card, &forged(&remote, address, 16));
        assert_eq!(refused, Err(Status::REMOTE_ACCESS), "{what}");
    }
    let seen = buffer.range(7 * GIB - 17, 18).unwrap();
    put(&seen, &[0; 18]);
    let end = remote.slice(5 * GIB - 16, 16).unwrap();
    assert_eq!(write(&card, &end), Ok(16));
    let mut expected = [0xee; 18];
    (expected[0], expected[17]) = (0, 0);
    assert_eq!(get(&seen), expected);
    holds([5, 2, 6, 4, 6], "by a part");
    drop((all, part, middle, seen, long, piece, mine));
    drop((here, there, card, buffer));
    assert_all_free(&node);
}
