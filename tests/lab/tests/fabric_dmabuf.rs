//! The rung `FI_MR_DMABUF` through libfabric's verbs provider, on a soft-RoCE that supports dma-bufs (`--rdma
//! dmabuf`). librxe lacks the function for it, which other cards' libraries have; the engine adds one
//! (`fixtures/preload/reg_dmabuf_mr.c`). Runs in the guest, with Debian's libfabric.

use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::fabric::{
    self, Engine, KEY, OTHER_KEY, VERSION, as_if_librxe_took_dma_bufs, exercise_each_rung,
    exercise_edges,
};
use peerbuf_lab_suite::rdma::{ALL, bar, device, limit, random, takes_dma_bufs};
use peerbuf_rdma::RdmaError;
use peerbuf_rdma::libfabric::Rung;

const PAGE: &str = include_str!("../../../docs/libfabric.md");
const PROVIDERS: [&str; 2] = ["verbs;ofi_rxm", "verbs"];

fn expected(kind: &str) -> Vec<Rung> {
    match kind {
        "memfd" => vec![Rung::SharedMemory, Rung::Staged],
        "udmabuf" => vec![Rung::DmaBufByLibrary, Rung::SharedMemory, Rung::Staged],
        _ => vec![Rung::DmaBufByLibrary, Rung::Staged],
    }
}

#[test]
fn the_dma_buf_itself_carries_every_byte_of_every_kind_of_buffer() {
    as_if_librxe_took_dma_bufs();
    assert!(takes_dma_bufs());
    for provider in PROVIDERS {
        exercise_each_rung(provider, expected);
    }
}

#[test]
fn offsets_and_lengths_are_the_ranges_at_every_edge_of_a_page() {
    as_if_librxe_took_dma_bufs();
    for provider in PROVIDERS {
        exercise_edges(provider, expected);
    }
}

#[test]
fn the_page_says_what_was_measured() {
    as_if_librxe_took_dma_bufs();
    let measured: String = PROVIDERS.map(fabric::table).concat();
    println!("{measured}");
    assert!(PAGE.contains(&measured), "docs/libfabric.md says otherwise");
}

#[test]
fn a_revoked_dma_buf_is_refused_before_the_provider_sees_it_and_by_the_card() {
    as_if_librxe_took_dma_bufs();
    let device = device();
    for provider in PROVIDERS {
        let engine = Engine::open(provider, VERSION, 0).expect(provider);
        let domain = engine.domain();
        let buffer = bar(64 << 10);
        put(&buffer.whole(), &random(64 << 10, 1));
        let target = domain.register(&buffer.whole(), ALL, KEY).unwrap();
        assert_eq!(target.rung(), Rung::DmaBufByLibrary);
        let other = peerbuf::export::memfd::export("other", 4096).unwrap();
        let mine = domain.register(&other.whole(), None, OTHER_KEY).unwrap();
        let (piece, shown) = (
            mine.local(0, 4096).unwrap(),
            target.remote(0, 4096).unwrap(),
        );
        let dmabuf = buffer.dmabuf().unwrap();
        assert!(device.revoke(dmabuf, limit()).unwrap().is_complete());
        assert!(matches!(target.check(), Err(RdmaError::Stale { .. })));
        // The key that the peer had received before.
        let failed = engine.write(0, piece, shown).unwrap_err();
        assert_eq!(failed.call, "completion", "{provider}: {failed:?}");
        device.restore(dmabuf).unwrap();
        assert!(get(&buffer.whole()) == random(64 << 10, 1), "{provider}");
        drop((target, mine, domain));
        assert_eq!(engine.close(), None, "{provider}");
    }
}
