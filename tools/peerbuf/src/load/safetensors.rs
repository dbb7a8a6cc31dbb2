//! The header of a safetensors file: the tensors and their places.
//!
//! The file consists of the header's length in eight bytes, the header (a JSON object), and the
//! bytes of the tensors, without gaps and overlaps
//! (<https://github.com/huggingface/safetensors#format>). This parser refuses a header that
//! breaks a rule, because the header decides where this process reads and writes.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Deserialize;

use super::Tensor;

/// Maximum length of a header, the limit of the format's own reader.
const LONGEST: u64 = 100_000_000;

/// Bits of an element, by type.
const BITS: [(&str, u64); 22] = [
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("I64", 64),
    ("U64", 64),
    ("F64", 64),
    ("C64", 64),
];

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The tensors of a file in the order of their bytes, with their offsets in the file.
pub fn tensors(file: &File) -> Result<Vec<Tensor>, String> {
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)
        .map_err(|_| "it has not even the length of a header".to_owned())?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST || length > size.saturating_sub(8) {
        return Err(format!(
            "its first eight bytes say that the header has {length} bytes, and the file has {size}: it is no \
             safetensors file, or cut"
        ));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, 8)
        .map_err(|error| format!("its header: {error}"))?;
    parse(&header, size - 8 - length).map(|mut tensors| {
        tensors
            .iter_mut()
            .for_each(|tensor| tensor.offset += 8 + length);
        tensors
    })
}

/// The tensors of a header, which is followed by `room` bytes.
fn parse(header: &[u8], room: u64) -> Result<Vec<Tensor>, String> {
    let said = |error: serde_json::Error| format!("its header: {error}");
    let mut entries: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(said)?;
    entries.remove("__metadata__");
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let entry: Entry = serde_json::from_value(entry)
            .map_err(|error| format!("its tensor {name:?}: {error}"))?;
        let (begin, end) = entry.data_offsets;
        let length = end.checked_sub(begin);
        let length = length.ok_or_else(|| format!("its tensor {name:?} ends before it begins"))?;
        if Some(length) != bytes_of(&entry) {
            return Err(format!(
                "its tensor {name:?} has {length} bytes, which is not what {} of shape {:?} has",
                entry.dtype, entry.shape
            ));
        }
        tensors.push(Tensor {
            name,
            dtype: entry.dtype,
            shape: entry.shape,
            offset: begin,
            length,
        });
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.length));
    let mut next = 0;
    for tensor in &tensors {
        if tensor.offset != next {
            return Err(format!(
                "its tensor {:?} begins at {} and not at {next}, where the one before it ends",
                tensor.name, tensor.offset
            ));
        }
        // Each length in bits fits into 64 bits, so one length beyond the room does not
        // overflow the sum.
        next += tensor.length;
        if next > room {
            break;
        }
    }
    if next != room {
        return Err(format!(
            "its tensors have {next} bytes, and the file has {room} for them"
        ));
    }
    Ok(tensors)
}

fn bytes_of(entry: &Entry) -> Option<u64> {
    let bits = BITS.iter().find(|(name, _)| *name == entry.dtype)?.1;
    let elements = entry
        .shape
        .iter()
        .try_fold(1_u64, |all, one| all.checked_mul(*one));
    let bits = elements?.checked_mul(bits)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_in_the_order_of_the_bytes() {
        let header = br#"{"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
            "__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
            "none":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}"#;
        let tensors = parse(header, 16).unwrap();
        let found: Vec<_> = tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor.offset, tensor.length))
            .collect();
        assert_eq!(found, [("a", 0, 4), ("none", 4, 0), ("b", 4, 12)]);
        assert_eq!(parse(b"{}  ", 0).unwrap(), []);
    }

    #[test]
    fn a_header_that_breaks_a_rule_is_refused() {
        let entry = |name: &str, dtype: &str, shape: &str, begin: u64, end: u64| {
            format!(
                r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#
            )
        };
        let all = |entries: &[String]| format!("{{{}}}", entries.join(","));
        let good = entry("a", "U8", "[8]", 0, 8);
        for (header, room, said) in [
            ("not JSON".to_owned(), 8, "header"),
            ("[]".into(), 8, "header"),
            (all(std::slice::from_ref(&good)), 9, "9 for them"),
            (all(std::slice::from_ref(&good)), 7, "7 for them"),
            (
                all(&[good.clone(), entry("b", "U8", "[8]", 4, 12)]),
                12,
                "\"b\" begins at 4",
            ),
            (
                all(&[good.clone(), entry("b", "U8", "[8]", 9, 17)]),
                17,
                "begins at 9",
            ),
            // Of two tensors with one name the later one counts, and the other one's bytes
            // belong to none.
            (
                all(&[good.clone(), entry("a", "U8", "[8]", 8, 16)]),
                16,
                "begins at 8",
            ),
            (all(&[entry("a", "U8", "[8]", 8, 0)]), 8, "ends before"),
            (all(&[entry("a", "F32", "[8]", 0, 8)]), 8, "F32 of shape"),
            (all(&[entry("a", "X9", "[8]", 0, 8)]), 8, "X9"),
            (all(&[entry("a", "F4", "[3]", 0, 2)]), 2, "F4"),
            (
                all(&[entry("a", "U8", "[4294967296,4294967296,4294967296]", 0, 8)]),
                8,
                "not what",
            ),
            (all(&[entry("a", "U8", "[-1]", 0, 8)]), 8, "invalid value"),
            (
                all(&(0..9_u64)
                    .map(|index| {
                        let length = (1_u64 << 61) - 1;
                        let end = (index + 1).saturating_mul(length);
                        entry(
                            &index.to_string(),
                            "U8",
                            &format!("[{length}]"),
                            end - length,
                            end,
                        )
                    })
                    .collect::<Vec<_>>()),
                8,
                "8 for them",
            ),
            (
                all(&[entry("a", "U8", "[18446744073709551615]", 0, u64::MAX)]),
                8,
                "not what",
            ),
        ] {
            let refused = parse(header.as_bytes(), room).unwrap_err();
            assert!(refused.contains(said), "{header}: {refused}");
        }
    }
}
