//! The targets under proptest, and that the corpus is good to begin with.

use peerbuf::fuzz;
use peerbuf_fuzz::{Mutation, corpus, mutate, targets};
use peerbuf_rdma::{Address, Remote};
use proptest::collection::vec;
use proptest::prelude::*;

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let edges = prop_oneof![
        Just(0),
        Just(1),
        Just(u64::from(u32::MAX)),
        Just(u64::MAX),
        Just(u64::MAX - 4095),
        Just(i64::MAX as u64),
        any::<u64>(),
    ];
    let one = prop_oneof![
        4 => (any::<usize>(), any::<u8>()).prop_map(|(at, value)| Mutation::Set(at, value)),
        4 => (any::<usize>(), any::<u8>()).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        4 => (any::<usize>(), edges).prop_map(|(at, word)| Mutation::Edge(at, word)),
        1 => any::<usize>().prop_map(Mutation::Cut),
        1 => vec(any::<u8>(), 1..200).prop_map(Mutation::Add),
        1 => any::<(usize, usize, usize)>().prop_map(|(a, b, c)| Mutation::Splice(a, b, c)),
    ];
    vec(one, 0..6)
}

/// A file of the corpus, changed a little; now and then, bytes without any sense.
fn seeded(target: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let files = corpus(target);
    let changed = (any::<prop::sample::Index>(), mutations()).prop_map(move |(file, changes)| {
        let mut bytes = files[file.index(files.len())].clone();
        mutate(&mut bytes, &changes);
        bytes
    });
    prop_oneof![9 => changed, 1 => vec(any::<u8>(), 0..400)]
}

#[test]
fn every_message_of_the_corpus_is_what_the_library_writes_and_is_accepted() {
    let files = corpus("message");
    let samples = fuzz::messages();
    assert_eq!(files.len(), samples.len());
    for (name, sample) in &samples {
        fuzz::message(sample).unwrap_or_else(|error| panic!("{name}: {error}"));
        // The layout of messages does not change under those who speak it already.
        assert!(
            files.contains(sample),
            "{name} is not as it was: see examples/make_corpus.rs"
        );
    }
}

#[test]
fn every_card_and_memory_of_the_corpus_is_accepted() {
    for file in corpus("remote") {
        let card = file.first_chunk().expect("a card");
        Address::from_bytes(card).unwrap();
        if let Some(memory) = file.get(32..).and_then(<[u8]>::first_chunk) {
            Remote::from_bytes(memory).unwrap();
        }
    }
}

/// How many cases each target tries: a second's worth, or as many as proptest is told.
fn cases() -> u32 {
    let told = std::env::var("PROPTEST_CASES").ok();
    told.and_then(|cases| cases.parse().ok()).unwrap_or(20_000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn messages_are_refused_with_a_word_or_can_be_acted_upon(bytes in seeded("message")) {
        targets::message(&bytes);
    }

    #[test]
    fn fdinfo_gives_lines_of_the_text_and_nothing_else(bytes in seeded("fdinfo")) {
        targets::fdinfo(&bytes);
    }

    #[test]
    fn an_address_that_is_read_is_the_same_when_written_and_read_again(bytes in seeded("address")) {
        targets::address(&bytes);
    }

    #[test]
    fn what_another_machine_says_of_itself_is_taken_only_as_we_write_it(bytes in seeded("remote")) {
        targets::remote(&bytes);
    }
}
