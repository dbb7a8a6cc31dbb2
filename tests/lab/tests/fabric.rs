//! Buffers registered in a libfabric domain of an engine, over each provider that works in the guest, on the
//! kernel's soft-RoCE and the lab's; compares docs/libfabric.md. Runs in the guest, with Debian's libfabric.

use std::collections::BTreeMap;

use peerbuf::error::BufferError;
use peerbuf::export::{memfd, udmabuf};
use peerbuf::{Access, Errno};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::fabric::{
    self, Engine, KEY, OTHER_KEY, PROVIDERS, VERSION, buffers, exercise_each_rung, exercise_edges,
};
use peerbuf_lab_suite::rdma::{ALL, bar, device, limit, random};
use peerbuf_rdma::RdmaError;
use peerbuf_rdma::libfabric::{self, Domain, Layer, Rung};

const PAGE: &str = include_str!("../../../docs/libfabric.md");

/// The rungs that work for a kind of buffer, best first.
fn expected(kind: &str) -> Vec<Rung> {
    match kind {
        "memfd" | "udmabuf" => vec![Rung::SharedMemory, Rung::Staged],
        _ => vec![Rung::Staged],
    }
}

#[test]
fn the_structures_are_those_of_the_header() {
    let header: BTreeMap<&str, u64> = fabric::layout()
        .lines()
        .map(|line| {
            let (name, number) = line.rsplit_once(' ').unwrap();
            (name, number.parse().unwrap())
        })
        .collect();
    let ours: BTreeMap<&str, u64> = libfabric::layout().into_iter().collect();
    assert_eq!(ours, header);
}

#[test]
fn each_rung_carries_every_byte_of_every_kind_of_buffer_over_every_provider() {
    for provider in PROVIDERS {
        exercise_each_rung(provider, expected);
    }
}

#[test]
fn offsets_and_lengths_are_the_ranges_at_every_edge_of_a_page() {
    for provider in PROVIDERS {
        exercise_edges(provider, expected);
    }
}

#[test]
fn the_page_says_which_rung_each_provider_takes_and_how_the_others_are_refused() {
    let measured: String = PROVIDERS.map(fabric::table).concat();
    let [major, minor] = [fabric::library().0, fabric::library().1];
    println!("libfabric {major}.{minor}\n{measured}");
    assert!(PAGE.contains(&measured), "docs/libfabric.md says otherwise");
    assert!(PAGE.contains(&format!("libfabric {major}.{minor}")));
}

#[test]
fn what_no_provider_looks_at_is_not_called_a_dma_buf() {
    let engine = Engine::open("tcp", VERSION, 0).unwrap();
    let domain = engine.domain();
    for (kind, buffer) in buffers(64 << 10) {
        let whole = buffer.whole();
        let refused = domain.register_by(&whole, ALL, KEY, &[Rung::DmaBufByLibrary]);
        let RdmaError::NotRegistered { attempts, .. } = refused.unwrap_err() else {
            panic!("another error");
        };
        let [attempt] = &attempts[..] else {
            panic!("{attempts:?}");
        };
        match kind {
            "memfd" => assert_eq!(attempt.layer, Layer::Buffer),
            _ => assert!(
                attempt.layer == Layer::Provider
                    && attempt.evidence.contains("accepted an invalid descriptor"),
                "{attempt}"
            ),
        }
    }
    drop(domain);
    assert_eq!(engine.close(), None);
}

#[test]
fn who_asks_for_an_older_interface_gets_no_dma_bufs_and_hears_why() {
    let engine = Engine::open("tcp", 1 << 16 | 19, 0).unwrap();
    let domain = engine.domain();
    let buffer = udmabuf::export("udmabuf", 4096).unwrap();
    let registration = domain.register(&buffer.whole(), ALL, KEY).unwrap();
    let attempt = &registration.attempts()[0];
    assert_eq!(attempt.layer, Layer::Domain);
    assert!(attempt.evidence.contains("version 1.19"), "{attempt}");
    assert_eq!(registration.rung(), Rung::SharedMemory);
    drop(registration);
    drop(domain);
    assert_eq!(engine.close(), None);
}

#[test]
fn keys_and_ranges_are_refused_and_a_key_is_free_again() {
    let engine = Engine::open("tcp", VERSION, 0).unwrap();
    let domain = engine.domain();
    let buffer = memfd::export("target", 8192).unwrap();
    put(&buffer.whole(), &random(8192, 1));
    let other = memfd::export("other", 8192).unwrap();
    let mine = domain.register(&other.whole(), None, OTHER_KEY).unwrap();
    assert!(matches!(
        mine.remote(0, 1),
        Err(RdmaError::NotShared { .. })
    ));
    let read_only = Some(Access::Read);
    let part = buffer.range(4000, 100).unwrap();
    let target = domain.register(&part, read_only, KEY).unwrap();
    if domain.opened().mr_mode & 1 << 6 == 0 {
        // Without FI_MR_PROV_KEY: the requested key, which no other registration can have.
        assert_eq!(target.remote(0, 1).unwrap().key, KEY);
        let taken = domain.register(&buffer.whole(), ALL, KEY).unwrap_err();
        let RdmaError::NotRegistered { attempts, .. } = &taken else {
            panic!("{taken}");
        };
        assert!(
            attempts[1..]
                .iter()
                .all(|attempt| attempt.errno == Some(Errno(266))
                    && attempt.evidence.contains("FI_ENOKEY")),
            "{taken}"
        );
    }
    for (offset, length) in [(0, 101), (100, 1), (u64::MAX, 2)] {
        assert!(matches!(
            target.local(offset, length),
            Err(RdmaError::Buffer(BufferError::OutOfRange { .. }))
        ));
        assert!(matches!(
            target.remote(offset, length),
            Err(RdmaError::Buffer(BufferError::OutOfRange { .. }))
        ));
    }
    let empty = buffer.range(7, 0).unwrap();
    assert!(matches!(
        domain.register(&empty, None, 5),
        Err(RdmaError::Empty { .. })
    ));
    let shown = target.remote(0, 100).unwrap();
    let piece = mine.local(0, 100).unwrap();
    engine.read(0, piece, shown).unwrap();
    assert!(get(&other.range(0, 100).unwrap()) == random(8192, 1)[4000..4100]);
    drop(target);
    drop(domain.register(&buffer.whole(), ALL, KEY).unwrap());
    drop(mine);
    drop(domain);
    assert_eq!(engine.close(), None);
}

#[test]
fn a_registration_of_a_revoked_buffer_is_refused_before_the_provider_sees_it() {
    let device = device();
    for provider in PROVIDERS {
        let engine = Engine::open(provider, VERSION, 0).expect(provider);
        let domain = engine.domain();
        let buffer = bar(64 << 10);
        let dmabuf = buffer.dmabuf().unwrap();
        let registration = domain.register(&buffer.whole(), ALL, KEY).unwrap();
        let generation = registration.generation().unwrap();
        registration.remote(0, 4096).unwrap();
        assert!(device.revoke(dmabuf, limit()).unwrap().is_complete());
        for _ in 0..2 {
            let [local, remote] = [
                registration.local(0, 4096).map(drop),
                registration.remote(0, 4096).map(drop),
            ];
            for refused in [local, remote] {
                assert!(
                    matches!(refused, Err(RdmaError::Stale { .. })),
                    "{provider}"
                );
            }
            // Restoring access does not revalidate an old registration.
            let _ = device.restore(dmabuf);
        }
        drop(registration);
        let again = domain.register(&buffer.whole(), ALL, KEY).unwrap();
        assert!(again.generation().unwrap() > generation);
        again.remote(0, 4096).unwrap();
        drop(again);
        drop(domain);
        assert_eq!(engine.close(), None, "{provider}");
    }
}

#[test]
fn what_is_no_domain_is_refused() {
    let engine = Engine::open("tcp", VERSION, 0).unwrap();
    for wrong in [engine.endpoint(), std::ptr::null_mut()] {
        // SAFETY: a live libfabric object, which contains its class.
        let refused = unsafe { Domain::from_raw(wrong, engine.opened()) };
        assert!(matches!(refused, Err(RdmaError::Mismatch { .. })));
    }
    assert_eq!(engine.close(), None);
}

#[test]
fn memory_at_an_address_that_was_registered_before_is_not_taken_for_what_was_there() {
    for provider in PROVIDERS {
        let engine = Engine::open(provider, VERSION, 0).expect(provider);
        let domain = engine.domain();
        let other = udmabuf::export("other end", 64 << 10).unwrap().whole();
        let mine = domain.register(&other, None, OTHER_KEY).unwrap();
        let piece = mine.local(0, 64 << 10).unwrap();
        let mut seen = Vec::new();
        let mut buffers = Vec::new();
        for seed in 0..16 {
            let buffer = udmabuf::export("target", 64 << 10).unwrap();
            let target = domain.register(&buffer.whole(), ALL, KEY).unwrap();
            seen.push(target.local(0, 1).unwrap().pointer);
            put(&other, &random(64 << 10, seed));
            let shown = target.remote(0, 64 << 10).unwrap();
            engine.write(0, piece, shown).unwrap();
            buffers.push(buffer);
        }
        for (seed, buffer) in buffers.iter().enumerate() {
            let right = get(&buffer.whole()) == random(64 << 10, seed as u64);
            assert!(right, "{provider}: buffer {seed}");
        }
        seen.sort();
        let addresses = seen.len();
        seen.dedup();
        assert!(seen.len() < addresses, "no address was used twice");
        drop(mine);
        drop(domain);
        assert_eq!(engine.close(), None, "{provider}");
    }
}
