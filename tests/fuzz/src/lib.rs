//! Fuzz targets for what decodes bytes from outside: messages of other processes, and the kernel's
//! texts.
//!
//! They run in plain `cargo test`, each for a second or so, by `proptest`: `cargo fuzz` would be the
//! usual tool, but needs a nightly compiler, which a machine that builds peerbuf need not have. Each
//! case begins with a file of the corpus and mutates it. A case that fails is shrunk, and kept by
//! `proptest` in a file beside the test that is run first from then on. More cases:
//! `PROPTEST_CASES=1000000 cargo test -p peerbuf-fuzz --release`.

use std::path::Path;

/// The files of one target's corpus, in order of name.
///
/// # Panics
/// When they cannot be read, or there is none.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let entries = std::fs::read_dir(&directory).expect("the corpus");
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("the corpus").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", directory.display());
    let read = |file| std::fs::read(file).expect("a file of the corpus");
    files.iter().map(read).collect()
}

/// One change to some bytes.
#[derive(Debug, Clone)]
pub enum Mutation {
    /// Puts a byte somewhere.
    Set(usize, u8),
    /// Flips a bit.
    Flip(usize, u8),
    /// Puts a word somewhere that is likely to be at an edge.
    Edge(usize, u64),
    /// Cuts the end off.
    Cut(usize),
    /// Adds bytes at the end.
    Add(Vec<u8>),
    /// Copies some bytes to another place.
    Splice(usize, usize, usize),
}

/// Applies changes. Places beyond the end wrap around.
pub fn mutate(bytes: &mut Vec<u8>, mutations: &[Mutation]) {
    for mutation in mutations {
        let length = bytes.len();
        if length == 0 && !matches!(mutation, Mutation::Add(_)) {
            continue;
        }
        match mutation {
            Mutation::Set(at, value) => bytes[at % length] = *value,
            Mutation::Flip(at, bit) => bytes[at % length] ^= 1 << (bit % 8),
            Mutation::Edge(at, word) => {
                // Fields are aligned, so that most hits are whole fields.
                let at = at % length / 4 * 4;
                let end = length.min(at + 8);
                bytes[at..end].copy_from_slice(&word.to_ne_bytes()[..end - at]);
            }
            Mutation::Cut(at) => bytes.truncate(at % length),
            Mutation::Add(more) => bytes.extend_from_slice(more),
            Mutation::Splice(from, to, count) => {
                let (from, to) = (from % length, to % length);
                let count = (count % length).min(length - from).min(length - to);
                bytes.copy_within(from..from + count, to);
            }
        }
    }
}
