//! Fuzz targets for what decodes bytes from outside: messages of other processes and machines, and
//! the kernel's texts.
//!
//! A target is a function in [`targets`], which panics when a promise is broken. Two programs call it:
//!
//! - libFuzzer, which sees what each case reaches in the code and goes on from there.
//!   `tests/fuzz/run SECONDS` gives each target that long, as CI does, and installs `cargo fuzz` first
//!   where it is missing. With a `cargo fuzz` of your own, from the repository's root:
//!   `cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none message`. Without a sanitizer the stable
//!   compiler will do, and the decoders have no `unsafe` for one to look at.
//! - `proptest` in plain `cargo test`, each for a second or so, on any machine: libFuzzer needs a C++
//!   compiler. Each case begins with a file of the corpus and mutates it. A case that fails is shrunk,
//!   and kept in a file beside the test that is run first from then on. More cases:
//!   `PROPTEST_CASES=1000000 cargo test -p peerbuf-fuzz --release`.
//!
//! Both begin with the same corpus.

pub mod targets;

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

/// The `main` of a program in `fuzz_targets`: libFuzzer's, or a word on how to get that.
#[macro_export]
macro_rules! program {
    ($target:ident) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::targets::$target(bytes));

        #[cfg(not(fuzzing))]
        fn main() {
            eprintln!(
                "built without libFuzzer, so there is nothing to run: see tests/fuzz/src/lib.rs"
            );
            std::process::exit(2);
        }
    };
}
