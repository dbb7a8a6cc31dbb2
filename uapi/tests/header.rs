//! The C header says the same as `abi.rs`: a C compiler is asked for each number, size and offset
//! of the header, and the answers are compared.
//!
//! A struct's fields are listed by a pattern without `..`, so a field added to `abi.rs` alone does
//! not compile here; one added to the header alone changes the struct's size or leaves a gap.

use std::mem::{offset_of, size_of};
use std::process::Command;

use peerbuf_uapi::{self as abi, Bar, Export, Query};

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
    structs!(asked,
        Bar "bar" { size, free, largest_free, exports, flags }
        Query "query" {
            size, flags, abi_version, page_size, vendor, device, reserved, bdf, bars
        }
        Export "export" { size, flags, bar, fd_flags, offset, length, fd, reserved }
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
        let sum = name == "BAR_FLAGS" || name == "EXPORT_FLAGS";
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
    assert_eq!(size_of::<Query>(), 232);
    assert_eq!(size_of::<Bar>(), 32);
    assert_eq!(size_of::<Export>(), 40);
    assert_eq!(abi::BAR_FLAGS, 0x1f);
    assert_eq!(abi::EXPORT_FLAGS, 1);
}
