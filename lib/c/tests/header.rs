//! `include/peerbuf.h` is what cbindgen makes of the sources.

use std::path::Path;

#[test]
fn the_header_is_what_cbindgen_makes_of_the_sources() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(package.join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    for source in ["failure", "buffer", "file", "share", "rdma"] {
        builder = builder.with_src(package.join(format!("src/{source}.rs")));
    }
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let header = package.join("include/peerbuf.h");
    if std::env::var_os("PEERBUF_WRITE_HEADER").is_some() {
        std::fs::write(&header, &made).unwrap();
    }
    let checked_in = std::fs::read_to_string(&header).unwrap_or_default();
    let advice = "PEERBUF_WRITE_HEADER=1 cargo test -p peerbuf-c --test header writes it";
    assert!(checked_in.as_bytes() == made, "the header is old: {advice}");
}
