//! The C header says the same as `abi.rs`: a C compiler is asked for each number, size and offset
//! of the header, and the answers are compared.
//!
//! A struct's fields are listed by a pattern without `..`, so a field added to `abi.rs` alone does
//! not compile here; one added to the header alone changes the struct's size or leaves a gap.

use std::mem::{offset_of, size_of};
use std::process::Command;

use peerbuf_uapi::{
    self as abi, Attachment, Bar, BufferQuery, Export, ExportRanges, ImportAttach, ImportFence,
    ImportMap, ImportQuery, ImportStep, Move, Piece, ProviderOpen, Query, Range, Restore, Revoke,
    Watch,
};

/// C expression and the value that Rust has for it.
struct Asked(Vec<(String, u64)>);

impl Asked {
    fn constant(&mut self, name: &str, value: impl Into<u64>) {
        self.0.push((format!("PEERBUF_{name}"), value.into()));
    }
}

/// Asks for a struct's size, its fields' offsets and sizes, and that they leave no gaps.
macro_rules! structs {
    ($asked:ident, $($rust:ident $c:literal { $($field:ident),* })*) => {$(
        let $rust { $($field),* } = $rust::default();
        let mut end = 0;
        $(
            let size = size_of_val(&$field);
            let offset = offset_of!($rust, $field);
            assert_eq!(offset, end, "{}: a gap before {}", $c, stringify!($field));
            end = offset + size;
            let member = format!("struct peerbuf_{}, {}", $c, stringify!($field));
            $asked.0.push((format!("offsetof({member})"), offset as u64));
            let member = format!("((struct peerbuf_{} *)0)->{}", $c, stringify!($field));
            $asked.0.push((format!("sizeof({member})"), size as u64));
        )*
        assert_eq!(size_of::<$rust>(), end, "{}: padding at the end", $c);
        $asked.0.push((format!("sizeof(struct peerbuf_{})", $c), end as u64));
    )*};
}

#[test]
fn header_and_rust_agree() {
    let mut asked = Asked(Vec::new());
    asked.constant("ABI_VERSION", abi::ABI_VERSION);
    asked.constant("IOC_MAGIC", abi::IOC_MAGIC);
    asked.constant("IOC_QUERY", abi::IOC_QUERY);
    asked.constant("IOC_EXPORT", abi::IOC_EXPORT);
    asked.constant("NUM_BARS", abi::NUM_BARS as u64);
    asked.constant("BAR_MEMORY", abi::BAR_MEMORY);
    asked.constant("BAR_PREFETCHABLE", abi::BAR_PREFETCHABLE);
    asked.constant("BAR_64BIT", abi::BAR_64BIT);
    asked.constant("BAR_EXPORT", abi::BAR_EXPORT);
    asked.constant("BAR_PAGES", abi::BAR_PAGES);
    asked.constant("EXPORT_ANY_OFFSET", abi::EXPORT_ANY_OFFSET);
    asked.constant("IOC_PROVIDER_OPEN", abi::IOC_PROVIDER_OPEN);
    asked.constant("IOC_IMPORT_ATTACH", abi::IOC_IMPORT_ATTACH);
    asked.constant("IOC_IMPORT_MAP", abi::IOC_IMPORT_MAP);
    asked.constant("IOC_IMPORT_UNMAP", abi::IOC_IMPORT_UNMAP);
    asked.constant("IOC_IMPORT_PIN", abi::IOC_IMPORT_PIN);
    asked.constant("IOC_IMPORT_UNPIN", abi::IOC_IMPORT_UNPIN);
    asked.constant("IOC_IMPORT_FENCE", abi::IOC_IMPORT_FENCE);
    asked.constant("IOC_IMPORT_SIGNAL", abi::IOC_IMPORT_SIGNAL);
    asked.constant("IOC_IMPORT_VMAP", abi::IOC_IMPORT_VMAP);
    asked.constant("IOC_IMPORT_VUNMAP", abi::IOC_IMPORT_VUNMAP);
    asked.constant("IOC_IMPORT_DETACH", abi::IOC_IMPORT_DETACH);
    asked.constant("IOC_IMPORT_QUERY", abi::IOC_IMPORT_QUERY);
    asked.constant("IMPORT_DYNAMIC", abi::IMPORT_DYNAMIC);
    asked.constant("IMPORT_PEER", abi::IMPORT_PEER);
    asked.constant(
        "IMPORT_ON_INVALIDATE_UNMAP",
        abi::IMPORT_ON_INVALIDATE_UNMAP,
    );
    asked.constant(
        "IMPORT_ON_INVALIDATE_REMAP",
        abi::IMPORT_ON_INVALIDATE_REMAP,
    );
    asked.constant("IMPORT_ON_INVALIDATE_HOLD", abi::IMPORT_ON_INVALIDATE_HOLD);
    asked.constant("IMPORT_BIDIRECTIONAL", abi::IMPORT_BIDIRECTIONAL);
    asked.constant("IMPORT_TO_DEVICE", abi::IMPORT_TO_DEVICE);
    asked.constant("IMPORT_FROM_DEVICE", abi::IMPORT_FROM_DEVICE);
    asked.constant("IMPORT_FENCE_KERNEL", abi::IMPORT_FENCE_KERNEL);
    asked.constant("IMPORT_FENCE_WRITE", abi::IMPORT_FENCE_WRITE);
    asked.constant("IMPORT_FENCE_READ", abi::IMPORT_FENCE_READ);
    asked.constant("IMPORT_FENCE_BOOKKEEP", abi::IMPORT_FENCE_BOOKKEEP);
    asked.constant("IMPORT_MAX_MS", abi::IMPORT_MAX_MS);
    asked.constant("IMPORT_MAPPED", abi::IMPORT_MAPPED);
    asked.constant("IMPORT_STALE", abi::IMPORT_STALE);
    asked.constant("IMPORT_PINNED", abi::IMPORT_PINNED);
    asked.constant("IMPORT_VMAPPED", abi::IMPORT_VMAPPED);
    asked.constant("IMPORT_VMAP_IOMEM", abi::IMPORT_VMAP_IOMEM);
    asked.constant("IMPORT_FENCED", abi::IMPORT_FENCED);
    asked.constant("IMPORT_DETACHED", abi::IMPORT_DETACHED);
    asked.constant("IMPORT_DEVICE_GONE", abi::IMPORT_DEVICE_GONE);
    asked.constant("IOC_EXPORT_RANGES", abi::IOC_EXPORT_RANGES);
    asked.constant("IOC_MOVE", abi::IOC_MOVE);
    asked.constant("IOC_REVOKE", abi::IOC_REVOKE);
    asked.constant("IOC_RESTORE", abi::IOC_RESTORE);
    asked.constant("IOC_WATCH", abi::IOC_WATCH);
    asked.constant("IOC_UNWATCH", abi::IOC_UNWATCH);
    asked.constant("IOC_BUFFER", abi::IOC_BUFFER);
    asked.constant("EXPORT_MAY_MOVE", abi::EXPORT_MAY_MOVE);
    asked.constant("RANGE_ANY_OFFSET", abi::RANGE_ANY_OFFSET);
    asked.constant("RANGE_SYSTEM", abi::RANGE_SYSTEM);
    asked.constant("PLACEMENT_DEVICE", abi::PLACEMENT_DEVICE);
    asked.constant("PLACEMENT_SYSTEM", abi::PLACEMENT_SYSTEM);
    asked.constant("PLACEMENT_MIXED", abi::PLACEMENT_MIXED);
    asked.constant("STATE_LIVE", abi::STATE_LIVE);
    asked.constant("STATE_REVOKED", abi::STATE_REVOKED);
    asked.constant("STATE_GONE", abi::STATE_GONE);
    asked.constant("ATTACHMENT_REVOCABLE", abi::ATTACHMENT_REVOCABLE);
    asked.constant("ATTACHMENT_DYNAMIC", abi::ATTACHMENT_DYNAMIC);
    asked.constant("ATTACHMENT_PEER", abi::ATTACHMENT_PEER);
    asked.constant("ATTACHMENT_NEEDS_SYSTEM", abi::ATTACHMENT_NEEDS_SYSTEM);
    asked.constant("ATTACHMENT_STALE", abi::ATTACHMENT_STALE);
    asked.constant("REFUSED_NOBODY", abi::REFUSED_NOBODY);
    asked.constant("REFUSED_NOT_PEER", abi::REFUSED_NOT_PEER);
    asked.constant("REFUSED_NOT_REVOCABLE", abi::REFUSED_NOT_REVOCABLE);
    asked.constant("REFUSED_NO_ROUTE", abi::REFUSED_NO_ROUTE);
    asked.constant("REFUSED_MOVE_FAILED", abi::REFUSED_MOVE_FAILED);
    asked.constant("MAX_RANGES", abi::MAX_RANGES as u64);
    structs!(asked,
        Bar "bar" { size, free, largest_free, exports, flags }
        Query "query" {
            size, flags, abi_version, page_size, vendor, device, reserved, bdf, bars
        }
        Export "export" { size, flags, bar, fd_flags, offset, length, fd, reserved }
        ProviderOpen "provider_open" { size, flags, fd_flags, fd, bdf }
        ImportAttach "import_attach" {
            size, flags, dmabuf, fd_flags, on_invalidate, hold_ms, detach_ms, fd, bdf, ns
        }
        ImportMap "import_map" { size, flags, direction, reserved, ns }
        ImportStep "import_step" { size, flags, ns }
        ImportFence "import_fence" { size, flags, usage, timeout_ms }
        ImportQuery "import_query" {
            size, flags, state, segments, bytes, system_bytes, bus_bytes, bridge_bytes,
            other_bytes, provider, invalidations, maps, remaps, map_ns, remap_error, reserved
        }
        Range "range" { offset, length, flags, reserved }
        ExportRanges "export_ranges" {
            size, flags, bar, fd_flags, ranges, nr_ranges, fd, length
        }
        Move "move" {
            size, flags, fd, placement, offset, length, timeout_ms, reserved, generation, copied
        }
        Revoke "revoke" { size, flags, fd, timeout_ms, generation, holders, fences, pages }
        Restore "restore" { size, flags, fd, reserved, generation }
        Watch "watch" { size, flags, fd, eventfd }
        Attachment "attachment" { device, flags, mapped, pinned, reserved, generation }
        Piece "piece" { length, offset, placement, reserved }
        BufferQuery "buffer_query" {
            size, flags, fd, state, placement, bar, length, generation, attachments, pieces,
            nr_attachments, nr_pieces, pins, vmaps, busy_pages, moves, invalidations, maps,
            copied, longest_wait_ns, refusals, refused_device, refused_reason, refused_errno
        }
    );

    let dir = std::env::temp_dir().join(format!("peerbuf-header-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (source, program) = (dir.join("header.c"), dir.join("header"));
    let prints: String = asked
        .0
        .iter()
        .map(|(c, _)| format!("printf(\"%llu\\n\", (unsigned long long)({c}));\n"))
        .collect();
    let text = format!(
        "#include <peerbuf.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void)\n{{\n{prints}}}\n"
    );
    std::fs::write(&source, text).unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let compiled = Command::new(&cc)
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/include"))
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap_or_else(|e| panic!("{cc}: {e}; Rust links with a C compiler, so there is one"));
    assert!(
        compiled.status.success(),
        "{cc}: {}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let output = Command::new(&program).output().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<u64> = output.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(answers.len(), asked.0.len());
    for ((c, rust), answer) in asked.0.iter().zip(answers) {
        assert_eq!(answer, *rust, "{c}: the header's value, then Rust's");
    }
}

#[test]
fn every_constant_is_in_the_header() {
    let rust = include_str!("../src/abi.rs");
    let header = include_str!("../include/peerbuf.h");
    for line in rust.lines().filter(|line| line.starts_with("pub const ")) {
        let name = line["pub const ".len()..].split(':').next().unwrap();
        // Sums of the flags are for checks in Rust.
        let sum = name.ends_with("_FLAGS");
        assert!(
            sum || header.contains(&format!("#define PEERBUF_{name} ")),
            "{name}"
        );
    }
}

#[test]
fn numbers_never_change() {
    assert_eq!(abi::IOC_QUERY, 0xBB00);
    assert_eq!(abi::IOC_EXPORT, 0xBB01);
    assert_eq!(abi::IOC_EXPORT_RANGES, 0xBB02);
    assert_eq!(abi::IOC_MOVE, 0xBB03);
    assert_eq!(abi::IOC_REVOKE, 0xBB04);
    assert_eq!(abi::IOC_RESTORE, 0xBB05);
    assert_eq!(abi::IOC_WATCH, 0xBB06);
    assert_eq!(abi::IOC_UNWATCH, 0xBB07);
    assert_eq!(abi::IOC_BUFFER, 0xBB08);
    assert_eq!(size_of::<Range>(), 24);
    assert_eq!(size_of::<ExportRanges>(), 40);
    assert_eq!(size_of::<Move>(), 56);
    assert_eq!(size_of::<Revoke>(), 40);
    assert_eq!(size_of::<Restore>(), 24);
    assert_eq!(size_of::<Watch>(), 16);
    assert_eq!(size_of::<Attachment>(), 56);
    assert_eq!(size_of::<Piece>(), 24);
    assert_eq!(size_of::<BufferQuery>(), 168);
    assert_eq!(size_of::<Query>(), 232);
    assert_eq!(size_of::<Bar>(), 32);
    assert_eq!(size_of::<Export>(), 40);
    assert_eq!(abi::BAR_FLAGS, 0x1f);
    assert_eq!(abi::EXPORT_FLAGS, 3);
    assert_eq!(abi::RANGE_FLAGS, 3);
    let numbers = [
        abi::IOC_IMPORT_ATTACH,
        abi::IOC_IMPORT_MAP,
        abi::IOC_IMPORT_UNMAP,
        abi::IOC_IMPORT_PIN,
        abi::IOC_IMPORT_UNPIN,
        abi::IOC_IMPORT_FENCE,
        abi::IOC_IMPORT_SIGNAL,
        abi::IOC_IMPORT_VMAP,
        abi::IOC_IMPORT_VUNMAP,
        abi::IOC_IMPORT_DETACH,
        abi::IOC_IMPORT_QUERY,
    ];
    assert!(numbers.into_iter().eq(0xBB40..=0xBB4A));
    assert_eq!(
        (abi::IOC_PROVIDER_OPEN, size_of::<ProviderOpen>()),
        (0xBB20, 32)
    );
    assert_eq!(size_of::<ImportAttach>(), 56);
    assert_eq!(size_of::<ImportMap>(), 24);
    assert_eq!(size_of::<ImportStep>(), 16);
    assert_eq!(size_of::<ImportFence>(), 16);
    assert_eq!(size_of::<ImportQuery>(), 112);
    assert_eq!(abi::IMPORT_FLAGS, 3);
    assert_eq!(abi::IMPORT_ON_INVALIDATE_HOLD, 2);
    assert_eq!(abi::IMPORT_FROM_DEVICE, 2);
    assert_eq!(abi::IMPORT_FENCE_BOOKKEEP, 3);
    assert_eq!(abi::IMPORT_DEVICE_GONE, 0x80);
}
