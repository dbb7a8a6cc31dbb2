//! Writes the corpus of messages anew: `cargo run -p peerbuf-fuzz --example make_corpus`. Needed only
//! when the layout of messages has a new version.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/message");
    std::fs::create_dir_all(&directory)?;
    for (name, bytes) in peerbuf::fuzz::messages() {
        std::fs::write(directory.join(name), bytes)?;
    }
    Ok(())
}
