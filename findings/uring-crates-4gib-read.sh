#!/usr/bin/env bash
# Software:  tokio-uring 0.5.0 and monoio 0.2.4, compio 0.19.2 beside them; Linux with io_uring.
# Behaviour: read_at() with a buffer of exactly 4 GiB reads nothing and returns Ok(0), which looks like the end of
#            the file; with 4 GiB + 4 KiB it reads 4 KiB. The length is cut to 32 bits on its way into the ring.
#            compio gives what the kernel gives, 2 GiB - 4 KiB. The file is sparse and 5 GiB long.
# Seen:
#   tokio-uring 4 GiB: Ok(0)
#   monoio 4 GiB: Ok(0)
#   compio 4 GiB: Ok(2147479552)
#   tokio-uring 4 GiB + 4 KiB: Ok(4096)
#   monoio 4 GiB + 4 KiB: Ok(4096)
#   compio 4 GiB + 4 KiB: Ok(2147479552)
# Needs: cargo, io_uring allowed, 4 GiB of free memory, a filesystem with sparse files. No root.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
mkdir "$dir/src"
cat >"$dir/Cargo.toml" <<'TOML'
[package]
name = "four-gib"
version = "0.0.0"
edition = "2021"
[dependencies]
tokio-uring = "=0.5.0"
monoio = "=0.2.4"
compio = { version = "=0.19.2", features = ["runtime", "fs", "io-uring"] }
[profile.dev]
debug = 0
[workspace]
TOML
cat >"$dir/src/main.rs" <<'RS'
use compio::io::AsyncReadAt;
fn buffer(extra: usize) -> Vec<u8> { Vec::with_capacity((4 << 30) + extra) }
fn main() {
    let path = std::env::args().nth(1).expect("a file");
    for (name, extra) in [("4 GiB", 0), ("4 GiB + 4 KiB", 4096)] {
        let p = path.clone();
        let got = tokio_uring::start(async move {
            tokio_uring::fs::File::open(&p).await?.read_at(buffer(extra), 0).await.0
        });
        println!("tokio-uring {name}: {got:?}");
        let p = path.clone();
        let mut ring = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().build().expect("io_uring");
        let got = ring.block_on(async move { monoio::fs::File::open(&p).await?.read_at(buffer(extra), 0).await.0 });
        println!("monoio {name}: {got:?}");
        let p = path.clone();
        let got = compio::runtime::Runtime::new().expect("io_uring").block_on(async move {
            compio::fs::File::open(&p).await?.read_at(buffer(extra), 0).await.0
        });
        println!("compio {name}: {got:?}");
    }
}
RS
truncate -s 5G "$dir/sparse"
cargo run -q --manifest-path "$dir/Cargo.toml" --target-dir "$dir/target" -- "$dir/sparse" >"$dir/seen"
diff -u <(sed -n '/^# Seen:/,/^# Needs/{s/^#   //p}' "$0") "$dir/seen"
echo "still so: a read of 4 GiB reads nothing"
