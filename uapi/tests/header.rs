//! The C headers match `abi.rs` and `probe.rs`: the test asks a C compiler for every number, size and offset
//! in the headers.
//!
//! The patterns that list a struct's fields have no `..`, so the test does not compile after a field was
//! added in Rust alone. A field added to the header alone changes the struct's size or leaves a gap.

use std::mem::{offset_of, size_of};
use std::process::Command;

use peerbuf_uapi::{
    self as abi, Attachment, Bar, BufferQuery, Export, Move, Piece, ProviderOpen, Query, Range,
    Restore, Revoke, Watch, probe,
};

/// C expressions with the values that Rust has for them.
struct Asked {
    /// The header, and the prefix of its names.
    header: &'static str,
    prefix: &'static str,
    asked: Vec<(String, u64)>,
}

impl Asked {
    fn of(header: &'static str, prefix: &'static str) -> Self {
        let asked = Vec::new();
        Self {
            header,
            prefix,
            asked,
        }
    }

    fn constant(&mut self, name: &str, value: impl Into<u64>) {
        let name = format!("{}{name}", self.prefix);
        self.asked.push((name, value.into()));
    }

    /// Compares the values with a C compiler's.
    fn of_a_compiler(self) {
        let dir = std::env::temp_dir().join(format!("{}-{}", self.header, std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (source, program) = (dir.join("header.c"), dir.join("header"));
        let prints: String = self
            .asked
            .iter()
            .map(|(c, _)| format!("printf(\"%llu\\n\", (unsigned long long)({c}));\n"))
            .collect();
        let text = format!(
            "#include <{}>\n#include <stddef.h>\n#include <stdio.h>\nint main(void)\n{{\n{prints}}}\n",
            self.header
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
        assert_eq!(answers.len(), self.asked.len());
        for ((c, rust), answer) in self.asked.iter().zip(answers) {
            assert_eq!(answer, *rust, "{c}: the header's value, then Rust's");
        }
    }
}

/// Adds a struct's size and its fields' offsets and sizes; checks that there are no gaps.
macro_rules! structs {
    ($asked:ident, $($rust:ident $c:literal { $($field:ident),* })*) => {$(
        let $rust { $($field),* } = $rust::default();
        let mut end = 0;
        let c = format!("struct {}{}", $asked.prefix.to_lowercase(), $c);
        $(
            let size = size_of_val(&$field);
            let offset = offset_of!($rust, $field);
            assert_eq!(offset, end, "{}: a gap before {}", $c, stringify!($field));
            end = offset + size;
            let member = format!("{c}, {}", stringify!($field));
            $asked.asked.push((format!("offsetof({member})"), offset as u64));
            let member = format!("(({c} *)0)->{}", stringify!($field));
            $asked.asked.push((format!("sizeof({member})"), size as u64));
        )*
        assert_eq!(size_of::<$rust>(), end, "{}: padding at the end", $c);
        $asked.asked.push((format!("sizeof({c})"), end as u64));
    )*};
}

/// The minimum of each struct's size.
const MIN_SIZES: [(&str, usize); 11] = [
    ("QUERY_MIN_SIZE", abi::QUERY_MIN_SIZE),
    ("RANGE_MIN_SIZE", abi::RANGE_MIN_SIZE),
    ("EXPORT_MIN_SIZE", abi::EXPORT_MIN_SIZE),
    ("MOVE_MIN_SIZE", abi::MOVE_MIN_SIZE),
    ("REVOKE_MIN_SIZE", abi::REVOKE_MIN_SIZE),
    ("RESTORE_MIN_SIZE", abi::RESTORE_MIN_SIZE),
    ("WATCH_MIN_SIZE", abi::WATCH_MIN_SIZE),
    ("ATTACHMENT_MIN_SIZE", abi::ATTACHMENT_MIN_SIZE),
    ("PIECE_MIN_SIZE", abi::PIECE_MIN_SIZE),
    ("BUFFER_QUERY_MIN_SIZE", abi::BUFFER_QUERY_MIN_SIZE),
    ("PROVIDER_OPEN_MIN_SIZE", abi::PROVIDER_OPEN_MIN_SIZE),
];

const PROBE_MIN_SIZES: [(&str, usize); 5] = [
    ("ATTACH_MIN_SIZE", probe::ATTACH_MIN_SIZE),
    ("MAP_MIN_SIZE", probe::MAP_MIN_SIZE),
    ("STEP_MIN_SIZE", probe::STEP_MIN_SIZE),
    ("FENCE_MIN_SIZE", probe::FENCE_MIN_SIZE),
    ("QUERY_MIN_SIZE", probe::QUERY_MIN_SIZE),
];

#[test]
fn a_struct_s_minimum_ends_where_a_field_begins_and_never_changes() {
    let sizes = MIN_SIZES.map(|(_, size)| size);
    assert_eq!(sizes, [32, 24, 40, 56, 48, 24, 24, 96, 24, 40, 24]);
    assert_eq!(offset_of!(Query, bars), abi::QUERY_MIN_SIZE);
    assert_eq!(offset_of!(Move, holders), abi::MOVE_MIN_SIZE);
    assert_eq!(
        offset_of!(BufferQuery, attachments),
        abi::BUFFER_QUERY_MIN_SIZE
    );
    let sizes = PROBE_MIN_SIZES.map(|(_, size)| size);
    assert_eq!(sizes, [48, 24, 16, 16, 16]);
    assert_eq!(offset_of!(probe::Query, segments), probe::QUERY_MIN_SIZE);
}

#[test]
fn header_and_rust_agree() {
    let mut asked = Asked::of("peerbuf.h", "PEERBUF_");
    asked.constant("DEVICE_NAME_LEN", abi::DEVICE_NAME_LEN as u64);
    asked.constant("FEATURE_EXPORT", abi::FEATURE_EXPORT);
    asked.constant("FEATURE_MOVE", abi::FEATURE_MOVE);
    asked.constant("FEATURE_REVOKE", abi::FEATURE_REVOKE);
    asked.constant("FEATURE_WATCH", abi::FEATURE_WATCH);
    asked.constant("FEATURE_PROVIDER", abi::FEATURE_PROVIDER);
    asked.constant("FEATURE_SEVERAL_BARS", abi::FEATURE_SEVERAL_BARS);
    asked.constant("PCI_ADDRESS(0, 0, 0, 7)", abi::pci_address(0, 0, 0, 7));
    asked.constant(
        "PCI_ADDRESS(0x10000, 0xff, 0x1f, 1)",
        abi::pci_address(0x10000, 0xff, 0x1f, 1),
    );
    asked.constant("IOC_MAGIC", abi::IOC_MAGIC);
    asked.constant("IOC_QUERY", abi::IOC_QUERY);
    asked.constant("IOC_EXPORT", abi::IOC_EXPORT);
    asked.constant("NUM_BARS", abi::NUM_BARS as u64);
    asked.constant("BAR_MEMORY", abi::BAR_MEMORY);
    asked.constant("BAR_PREFETCHABLE", abi::BAR_PREFETCHABLE);
    asked.constant("BAR_64BIT", abi::BAR_64BIT);
    asked.constant("BAR_EXPORT", abi::BAR_EXPORT);
    asked.constant("BAR_PAGES", abi::BAR_PAGES);
    asked.constant("IOC_PROVIDER_OPEN", abi::IOC_PROVIDER_OPEN);
    asked.constant("IOC_MOVE", abi::IOC_MOVE);
    asked.constant("IOC_REVOKE", abi::IOC_REVOKE);
    asked.constant("IOC_RESTORE", abi::IOC_RESTORE);
    asked.constant("IOC_WATCH", abi::IOC_WATCH);
    asked.constant("IOC_UNWATCH", abi::IOC_UNWATCH);
    asked.constant("IOC_BUFFER", abi::IOC_BUFFER);
    asked.constant("EXPORT_MAY_MOVE", abi::EXPORT_MAY_MOVE);
    asked.constant("EXPORT_DEVICES_READ", abi::EXPORT_DEVICES_READ);
    asked.constant("EXPORT_UNCACHED", abi::EXPORT_UNCACHED);
    asked.constant("EXPORT_CACHE_MASK", abi::EXPORT_CACHE_MASK);
    asked.constant("REASON_OWNER", abi::REASON_OWNER);
    asked.constant("REASON_RESET", abi::REASON_RESET);
    asked.constant("REASON_GONE", abi::REASON_GONE);
    asked.constant("REASON_ERROR", abi::REASON_ERROR);
    asked.constant("REASON_POWER", abi::REASON_POWER);
    asked.constant("REVOKE_PERMANENT", abi::REVOKE_PERMANENT);
    asked.constant("EVENT_MOVED", abi::EVENT_MOVED);
    asked.constant("EVENT_REVOKED", abi::EVENT_REVOKED);
    asked.constant("EVENT_RESTORED", abi::EVENT_RESTORED);
    asked.constant("EVENT_MOVABLE_TO_DEVICE", abi::EVENT_MOVABLE_TO_DEVICE);
    asked.constant("EVENT_MOVABLE_TO_SYSTEM", abi::EVENT_MOVABLE_TO_SYSTEM);
    for (name, size) in MIN_SIZES {
        asked.constant(name, size as u64);
    }
    asked.constant("BAR_WRITE_COMBINING", abi::BAR_WRITE_COMBINING);
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
        Bar "bar" { size, free, largest_free, exports, flags, reserved }
        Query "query" { size, flags, features, address, vendor, device, page_size, bars }
        Range "range" { offset, length, bar, flags }
        Export "export" { size, flags, fd_flags, fd, ranges, nr_ranges, range_size, length }
        ProviderOpen "provider_open" { size, flags, fd_flags, fd, address }
        Move "move" {
            size, flags, fd, placement, offset, length, timeout_ms, reserved, generation, copied,
            holders, fences, pages, pins
        }
        Revoke "revoke" { size, flags, fd, timeout_ms, generation, holders, fences, pages }
        Restore "restore" { size, flags, fd, reserved, generation }
        Watch "watch" { size, flags, fd, eventfd, events }
        Attachment "attachment" { device, flags, reserved, mapped, pinned, generation }
        Piece "piece" { length, offset, bar, placement }
        BufferQuery "buffer_query" {
            size, flags, fd, state, generation, length, placement, reasons, attachments, pieces,
            nr_attachments, attachment_size, nr_pieces, piece_size, pins, vmaps, busy_pages,
            moves, invalidations, maps, copied, longest_wait_ns, refusals, refused_device,
            refused_reason, refused_errno
        }
    );
    asked.of_a_compiler();
}

#[test]
fn the_probe_s_header_and_rust_agree() {
    let mut asked = Asked::of("peerbuf_probe.h", "PEERBUF_PROBE_");
    asked.constant("IOC_MAGIC", probe::IOC_MAGIC);
    asked.constant("IOC_ATTACH", probe::IOC_ATTACH);
    asked.constant("IOC_MAP", probe::IOC_MAP);
    asked.constant("IOC_UNMAP", probe::IOC_UNMAP);
    asked.constant("IOC_PIN", probe::IOC_PIN);
    asked.constant("IOC_UNPIN", probe::IOC_UNPIN);
    asked.constant("IOC_FENCE", probe::IOC_FENCE);
    asked.constant("IOC_SIGNAL", probe::IOC_SIGNAL);
    asked.constant("IOC_VMAP", probe::IOC_VMAP);
    asked.constant("IOC_VUNMAP", probe::IOC_VUNMAP);
    asked.constant("IOC_DETACH", probe::IOC_DETACH);
    asked.constant("IOC_QUERY", probe::IOC_QUERY);
    asked.constant("DYNAMIC", probe::DYNAMIC);
    asked.constant("PEER", probe::PEER);
    asked.constant("ON_INVALIDATE_UNMAP", probe::ON_INVALIDATE_UNMAP);
    asked.constant("ON_INVALIDATE_REMAP", probe::ON_INVALIDATE_REMAP);
    asked.constant("ON_INVALIDATE_HOLD", probe::ON_INVALIDATE_HOLD);
    asked.constant("BIDIRECTIONAL", probe::BIDIRECTIONAL);
    asked.constant("TO_DEVICE", probe::TO_DEVICE);
    asked.constant("FROM_DEVICE", probe::FROM_DEVICE);
    asked.constant("FENCE_KERNEL", probe::FENCE_KERNEL);
    asked.constant("FENCE_WRITE", probe::FENCE_WRITE);
    asked.constant("FENCE_READ", probe::FENCE_READ);
    asked.constant("FENCE_BOOKKEEP", probe::FENCE_BOOKKEEP);
    asked.constant("MAX_MS", probe::MAX_MS);
    asked.constant("MAPPED", probe::MAPPED);
    asked.constant("STALE", probe::STALE);
    asked.constant("PINNED", probe::PINNED);
    asked.constant("VMAPPED", probe::VMAPPED);
    asked.constant("VMAP_IOMEM", probe::VMAP_IOMEM);
    asked.constant("FENCED", probe::FENCED);
    asked.constant("DETACHED", probe::DETACHED);
    asked.constant("DEVICE_GONE", probe::DEVICE_GONE);
    asked.constant("PROVIDER_NONE", probe::PROVIDER_NONE);
    for (name, size) in PROBE_MIN_SIZES {
        asked.constant(name, size as u64);
    }
    {
        use probe::{Attach, Fence, Map, Query, Step};
        structs!(asked,
        Attach "attach" {
            size, flags, dmabuf, fd_flags, on_invalidate, hold_ms, detach_ms, fd, address, ns
        }
        Map "map" { size, flags, direction, reserved, ns }
        Step "step" { size, flags, ns }
        Fence "fence" { size, flags, usage, timeout_ms }
        Query "query" {
            size, flags, state, remap_error, segments, bytes, system_bytes, bus_bytes,
            bridge_bytes, other_bytes, provider, invalidations, maps, remaps, map_ns
        }
        );
    }
    asked.of_a_compiler();
}

#[test]
fn every_constant_is_in_its_header() {
    let interfaces = [
        (
            include_str!("../src/abi.rs"),
            include_str!("../include/peerbuf.h"),
            "PEERBUF_",
        ),
        (
            include_str!("../src/probe.rs"),
            include_str!("../include/peerbuf_probe.h"),
            "PEERBUF_PROBE_",
        ),
    ];
    for (rust, header, prefix) in interfaces {
        for line in rust
            .lines()
            .filter(|line| line.starts_with("pub const ") && !line.contains(" fn "))
        {
            let name = line["pub const ".len()..].split(':').next().unwrap();
            // The sums of flags exist only in Rust.
            let sum = name.ends_with("FLAGS") || name == "FEATURES";
            assert!(
                sum || header.contains(&format!("#define {prefix}{name} ")),
                "{name}"
            );
        }
    }
}

#[test]
fn numbers_never_change() {
    assert_eq!(abi::IOC_QUERY, 0xBB00);
    assert_eq!(abi::IOC_EXPORT, 0xBB01);
    assert_eq!(abi::IOC_MOVE, 0xBB03);
    assert_eq!(abi::IOC_REVOKE, 0xBB04);
    assert_eq!(abi::IOC_RESTORE, 0xBB05);
    assert_eq!(abi::IOC_WATCH, 0xBB06);
    assert_eq!(abi::IOC_UNWATCH, 0xBB07);
    assert_eq!(abi::IOC_BUFFER, 0xBB08);
    assert_eq!(abi::IOC_PROVIDER_OPEN, 0xBB20);
    assert_eq!(size_of::<Range>(), 24);
    assert_eq!(size_of::<Export>(), 40);
    assert_eq!(size_of::<Move>(), 88);
    assert_eq!(size_of::<Revoke>(), 48);
    assert_eq!(size_of::<Restore>(), 24);
    assert_eq!(size_of::<Watch>(), 24);
    assert_eq!(size_of::<Attachment>(), 96);
    assert_eq!(size_of::<Piece>(), 24);
    assert_eq!(size_of::<BufferQuery>(), 216);
    assert_eq!(size_of::<Query>(), 272);
    assert_eq!(size_of::<Bar>(), 40);
    assert_eq!(size_of::<ProviderOpen>(), 24);
    assert_eq!(abi::BAR_FLAGS, 0x3f);
    assert_eq!(abi::EXPORT_FLAGS, 0x13);
    assert_eq!(abi::RANGE_FLAGS, 3);
    assert_eq!(abi::REASON_FLAGS, 0x1f);
    assert_eq!(abi::REVOKE_FLAGS, 1);
    assert_eq!(abi::EVENT_FLAGS, 0x1f);
    assert_eq!(abi::FEATURES, 0x1f);
    assert_eq!(abi::pci_address(0x10000, 0xfe, 0x1f, 7), 0x1_0000_feff);
}

#[test]
fn the_probe_s_numbers_never_change() {
    let numbers = [
        probe::IOC_ATTACH,
        probe::IOC_MAP,
        probe::IOC_UNMAP,
        probe::IOC_PIN,
        probe::IOC_UNPIN,
        probe::IOC_FENCE,
        probe::IOC_SIGNAL,
        probe::IOC_VMAP,
        probe::IOC_VUNMAP,
        probe::IOC_DETACH,
        probe::IOC_QUERY,
    ];
    assert!(numbers.into_iter().eq(0xBC00..=0xBC0A));
    assert_eq!(size_of::<probe::Attach>(), 48);
    assert_eq!(size_of::<probe::Map>(), 24);
    assert_eq!(size_of::<probe::Step>(), 16);
    assert_eq!(size_of::<probe::Fence>(), 16);
    assert_eq!(size_of::<probe::Query>(), 104);
    assert_eq!(probe::FLAGS, 3);
    assert_eq!(probe::ON_INVALIDATE_HOLD, 2);
    assert_eq!(probe::FROM_DEVICE, 2);
    assert_eq!(probe::FENCE_BOOKKEEP, 3);
    assert_eq!(probe::DEVICE_GONE, 0x80);
}
