//! The targets. Each promises that nothing panics, and what it says itself.

use peerbuf::fuzz;
use peerbuf_fuzz::{Mutation, corpus, mutate};
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

fn text(target: &'static str) -> impl Strategy<Value = String> {
    seeded(target).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
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

/// How many cases each target tries: a second's worth, or as many as proptest is told.
fn cases() -> u32 {
    let told = std::env::var("PROPTEST_CASES").ok();
    told.and_then(|cases| cases.parse().ok()).unwrap_or(20_000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn messages_are_accepted_or_refused_with_a_word(bytes in seeded("message")) {
        if let Err(error) = fuzz::message(&bytes) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn fdinfo_gives_lines_of_the_text_and_nothing_else(text in text("fdinfo")) {
        let (exporter, name, _) = fuzz::fdinfo(&text);
        prop_assert!(text.contains(&exporter) && text.contains(&name));
        prop_assert!(!exporter.contains('\n') && !name.contains('\n'));
    }

    #[test]
    fn an_address_that_is_read_is_the_same_when_written_and_read_again(text in text("address")) {
        if let Some(address) = fuzz::address(&text) {
            let written = address.to_string();
            prop_assert_eq!(fuzz::address(&written), Some(address));
        }
    }
}
