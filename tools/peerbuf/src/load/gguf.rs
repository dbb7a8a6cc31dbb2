//! The header of a GGUF file: the tensors and their places.
//!
//! The file consists of `GGUF`, a version, the numbers of tensors and of metadata pairs, the
//! metadata, the description of each tensor, and the bytes of the tensors. Each tensor begins
//! at the first multiple of the alignment after the previous one
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>). Numbers are little-endian.
//! This parser skips the metadata, except `general.alignment`. It refuses a header that breaks
//! a rule and names the field, because the header decides where this process reads and writes.

use std::collections::HashSet;
use std::fmt::Display;
use std::io::{BufReader, Read, Seek};

use super::Tensor;

/// The first bytes of a GGUF file.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// Types of elements: the number, the name, the elements of a block, and the bytes of a block.
/// The missing numbers were withdrawn.
const TYPES: [(u32, &str, u64, u64); 34] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

/// Number of bytes of a metadata value, by the number of its type.
fn value_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

const UINT32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

const LONGEST_KEY: u64 = 65535;
const LONGEST_NAME: u64 = 64;
const MOST_DIMENSIONS: u32 = 4;

/// The tensors of a file of `size` bytes, in the order of their bytes, with their offsets in
/// the file.
pub fn tensors(file: impl Read + Seek, size: u64) -> Result<Vec<Tensor>, String> {
    let mut header = Header {
        file: BufReader::new(file),
        at: 0,
        size,
    };
    let magic: [u8; 4] = header.array(&"magic number")?;
    if magic != *MAGIC {
        return Err("it does not begin with GGUF".into());
    }
    let version = header.u32(&"version")?;
    match version {
        2 | 3 => {}
        _ if version.swap_bytes() < 0x10000 => {
            return Err(
                "its version is big-endian, as all of it must be: it is for other machines".into(),
            );
        }
        _ => return Err(format!("its version is {version}: there are 2 and 3")),
    }
    let tensors = header.u64(&"number of tensors")?;
    let pairs = header.u64(&"number of metadata")?;
    let alignment = header.metadata(pairs)?;
    let mut all = Vec::new();
    let mut names = HashSet::new();
    for index in 0..tensors {
        let tensor = header.tensor(index)?;
        if !names.insert(tensor.name.clone()) {
            return Err(format!("it has two tensors {:?}", tensor.name));
        }
        all.push(tensor);
    }
    let begin = header.at.checked_next_multiple_of(alignment);
    place(all, begin.unwrap_or(u64::MAX), alignment, size)
}

/// Converts offsets into file offsets, and checks the format's rules for them.
fn place(
    mut tensors: Vec<Tensor>,
    begin: u64,
    alignment: u64,
    size: u64,
) -> Result<Vec<Tensor>, String> {
    let mut next = Some(0_u64);
    for tensor in &mut tensors {
        let name = &tensor.name;
        let beyond = || {
            format!(
                "its tensor {name:?} ends beyond the file, which has {size} bytes: it is cut, or no such file"
            )
        };
        let offset = next.ok_or_else(beyond)?;
        if tensor.offset != offset {
            return Err(format!(
                "its tensor {name:?} has the offset {} and not {offset}, which follows from those before it and \
                 the alignment of {alignment}",
                tensor.offset
            ));
        }
        let end = offset.checked_add(tensor.length).ok_or_else(beyond)?;
        if begin.checked_add(end).is_none_or(|end| end > size) {
            return Err(beyond());
        }
        next = end.checked_next_multiple_of(alignment);
        tensor.offset += begin;
    }
    Ok(tensors)
}

/// A file that is read from the start.
struct Header<R> {
    file: BufReader<R>,
    at: u64,
    size: u64,
}

impl<R: Read + Seek> Header<R> {
    /// Checks that the file has this many bytes left.
    fn room(&self, bytes: u64, what: &dyn Display) -> Result<(), String> {
        let left = self.size.saturating_sub(self.at);
        if bytes <= left {
            return Ok(());
        }
        Err(format!(
            "its {what}, at byte {}, has {bytes} bytes, and the file has {left} more: it is cut, or no such file",
            self.at
        ))
    }

    fn fill(&mut self, bytes: &mut [u8], what: &dyn Display) -> Result<(), String> {
        self.room(bytes.len() as u64, what)?;
        let read = self.file.read_exact(bytes);
        read.map_err(|error| format!("its {what}, at byte {}: {error}", self.at))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &dyn Display) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &dyn Display) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &dyn Display) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, longest: u64, what: &dyn Display) -> Result<String, String> {
        let length = self.u64(&format_args!("length of its {what}"))?;
        if length > longest {
            return Err(format!(
                "its {what} has {length} bytes: at most {longest} are allowed"
            ));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| format!("its {what} is not UTF-8"))
    }

    /// Skips bytes.
    fn skip(&mut self, bytes: Option<u64>, what: &dyn Display) -> Result<(), String> {
        let bytes = bytes.unwrap_or(u64::MAX);
        self.room(bytes, what)?;
        // No file is larger than `i64::MAX`.
        let skipped = self.file.seek_relative(bytes as i64);
        skipped.map_err(|error| format!("its {what}, at byte {}: {error}", self.at))?;
        self.at += bytes;
        Ok(())
    }

    /// Skips the metadata. Returns the alignment of tensors.
    fn metadata(&mut self, pairs: u64) -> Result<u64, String> {
        let mut alignment = 32;
        let mut keys = HashSet::new();
        for index in 0..pairs {
            let key = self.string(LONGEST_KEY, &format_args!("key {index} of metadata"))?;
            if key.is_empty() {
                return Err(format!("its key {index} of metadata is empty"));
            }
            let what = format!("metadata {key:?}");
            let kind = self.u32(&format_args!("type of its {what}"))?;
            if key == "general.alignment" {
                if kind != UINT32 {
                    return Err(format!(
                        "its {what} has the type {kind}, and must be a UINT32 ({UINT32})"
                    ));
                }
                alignment = self.u32(&what)?;
                if !alignment.is_power_of_two() {
                    return Err(format!(
                        "its {what} is {alignment}, which is no power of two"
                    ));
                }
            } else {
                self.pass_over(kind, &what)?;
            }
            if !keys.insert(key) {
                return Err(format!("its {what} is there twice"));
            }
        }
        Ok(alignment.into())
    }

    fn pass_over(&mut self, kind: u32, what: &String) -> Result<(), String> {
        let (kind, count) = match kind {
            ARRAY => (
                self.u32(&format_args!("type of the elements of its {what}"))?,
                self.u64(&format_args!("number of elements of its {what}"))?,
            ),
            kind => (kind, 1),
        };
        if kind == STRING {
            for _ in 0..count {
                let length = self.u64(&format_args!("length of a string of its {what}"))?;
                self.skip(Some(length), what)?;
            }
            return Ok(());
        }
        let bytes = value_bytes(kind);
        let bytes =
            bytes.ok_or_else(|| format!("its {what} has the type {kind}, which is unknown"))?;
        self.skip(count.checked_mul(bytes), what)
    }

    /// Reads the description of one tensor, with the offset as the file has it.
    fn tensor(&mut self, index: u64) -> Result<Tensor, String> {
        let name = self.string(LONGEST_NAME, &format_args!("name of tensor {index}"))?;
        let of = |what: &str| format!("{what} of tensor {name:?}");
        let dimensions = self.u32(&of("number of dimensions"))?;
        if dimensions > MOST_DIMENSIONS {
            return Err(format!(
                "its tensor {name:?} has {dimensions} dimensions: at most {MOST_DIMENSIONS} are allowed"
            ));
        }
        // The file has the innermost dimension first.
        let mut shape = vec![0; dimensions as usize];
        for length in shape.iter_mut().rev() {
            *length = self.u64(&of("shape"))?;
        }
        let number = self.u32(&of("type"))?;
        let kind = TYPES.iter().find(|(known, ..)| *known == number);
        let (_, dtype, block, bytes) = kind.ok_or_else(|| {
            format!("its tensor {name:?} has the type {number}, which is unknown")
        })?;
        if !shape.last().unwrap_or(&1).is_multiple_of(*block) {
            return Err(format!(
                "its tensor {name:?} has the shape {shape:?}, whose rows are not whole blocks of {block} \
                 elements, which {dtype} has"
            ));
        }
        let elements = shape
            .iter()
            .try_fold(1_u64, |all, one| all.checked_mul(*one));
        let length = elements.and_then(|elements| (elements / block).checked_mul(*bytes));
        let length = length.ok_or_else(|| {
            format!("its tensor {name:?} has the shape {shape:?}, which is more than there can be")
        })?;
        let offset = self.u64(&of("offset"))?;
        Ok(Tensor {
            dtype: (*dtype).into(),
            shape,
            offset,
            length,
            name,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// A file under construction.
    #[derive(Default)]
    struct Bytes(Vec<u8>);

    impl Bytes {
        fn u32(mut self, value: u32) -> Bytes {
            self.0.extend(value.to_le_bytes());
            self
        }

        fn u64(mut self, value: u64) -> Bytes {
            self.0.extend(value.to_le_bytes());
            self
        }

        fn text(self, text: &str) -> Bytes {
            let mut all = self.u64(text.len() as u64);
            all.0.extend(text.as_bytes());
            all
        }

        fn head(tensors: u64, pairs: u64) -> Bytes {
            Bytes(MAGIC.to_vec()).u32(3).u64(tensors).u64(pairs)
        }

        /// `shape` has the innermost dimension first.
        fn tensor(self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Bytes {
            let named = self.text(name).u32(shape.len() as u32);
            let shaped = shape.iter().fold(named, |all, one| all.u64(*one));
            shaped.u32(kind).u64(offset)
        }

        fn pad(mut self, to: usize) -> Bytes {
            self.0.resize(self.0.len().next_multiple_of(to), 0);
            self
        }

        fn more(mut self, bytes: usize) -> Bytes {
            self.0.resize(self.0.len() + bytes, 7);
            self
        }
    }

    fn read(bytes: &[u8]) -> Result<Vec<Tensor>, String> {
        tensors(Cursor::new(bytes), bytes.len() as u64)
    }

    /// One value of each kind of metadata, and three tensors. Returns the offset of their
    /// bytes, too.
    fn good() -> (Vec<u8>, u64) {
        let mut head = Bytes::head(3, 5)
            .text("general.name")
            .u32(STRING)
            .text("a model")
            .text("general.alignment")
            .u32(UINT32)
            .u32(64)
            .text("tokens")
            .u32(ARRAY)
            .u32(STRING)
            .u64(2)
            .text("one")
            .text("")
            .text("scores")
            .u32(ARRAY)
            .u32(6)
            .u64(2)
            .u32(0)
            .u32(0)
            .text("flag")
            .u32(7);
        head.0.push(1);
        let head = head
            .tensor("a", &[3, 5], 0, 0)
            .tensor("b", &[32, 2], 2, 64)
            .tensor("none", &[], 24, 128)
            .pad(64);
        let begin = head.0.len() as u64;
        (head.more(129).0, begin)
    }

    #[test]
    fn a_header_says_where_each_tensor_is() {
        let (file, begin) = good();
        let found = read(&file).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|t| {
                (
                    t.name.as_str(),
                    t.dtype.as_str(),
                    &t.shape[..],
                    t.offset - begin,
                    t.length,
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                ("a", "F32", &[5, 3][..], 0, 60),
                ("b", "Q4_0", &[2, 32], 64, 36),
                ("none", "I8", &[], 128, 1)
            ]
        );
        assert_eq!(read(&Bytes::head(0, 0).0).unwrap(), []);
    }

    #[test]
    fn a_header_that_breaks_a_rule_is_refused_with_the_name_of_the_field() {
        let head = Bytes::head;
        let tensor = |kind, shape: &[u64], offset| {
            head(1, 0).tensor("a", shape, kind, offset).pad(32).more(64)
        };
        let pair = |key: &str, kind| head(0, 1).text(key).u32(kind);
        for (file, said) in [
            (Bytes(b"GGML".to_vec()).u32(3), "does not begin with GGUF"),
            (Bytes(MAGIC.to_vec()).u32(1), "version is 1"),
            (Bytes(MAGIC.to_vec()).u32(3 << 24), "big-endian"),
            (Bytes(MAGIC.to_vec()).u32(3).u32(0), "number of tensors"),
            (Bytes(MAGIC.to_vec()).u32(3).u64(0), "number of metadata"),
            (head(1 << 60, 0), "length of its name of tensor 0"),
            (head(0, 1 << 60), "length of its key 0 of metadata"),
            (
                head(0, 1).u64(u64::MAX),
                "key 0 of metadata has 18446744073709551615",
            ),
            (
                head(0, 1).u64(5).u32(0),
                "key 0 of metadata, at byte 32, has 5 bytes",
            ),
            (head(0, 1).text("").u32(7), "key 0 of metadata is empty"),
            (pair("k", 13), "metadata \"k\" has the type 13"),
            (
                pair("k", ARRAY).u32(ARRAY).u64(1),
                "metadata \"k\" has the type 9",
            ),
            (pair("k", ARRAY).u32(12).u64(u64::MAX), "metadata \"k\""),
            (
                pair("k", ARRAY).u32(STRING).u64(9),
                "length of a string of its metadata \"k\"",
            ),
            (pair("k", STRING).u64(1 << 63), "metadata \"k\""),
            (
                pair("general.alignment", STRING).text("32"),
                "\"general.alignment\" has the type 8",
            ),
            (
                pair("general.alignment", UINT32).u32(48),
                "\"general.alignment\" is 48",
            ),
            (
                pair("general.alignment", UINT32).u32(0),
                "\"general.alignment\" is 0",
            ),
            (
                head(0, 2).text("k").u32(4).u32(0).text("k").u32(4).u32(0),
                "metadata \"k\" is there twice",
            ),
            (
                head(1, 0).text(&"n".repeat(65)),
                "name of tensor 0 has 65 bytes",
            ),
            (
                Bytes({
                    let mut all = head(1, 0).u64(1).0;
                    all.push(0xff);
                    all
                }),
                "name of tensor 0 is not UTF-8",
            ),
            (head(1, 0).text("a").u32(5), "\"a\" has 5 dimensions"),
            (head(1, 0).text("a").u32(2).u64(1), "shape of tensor \"a\""),
            (tensor(4, &[1], 0), "\"a\" has the type 4"),
            (tensor(2, &[33], 0), "\"a\" has the shape [33]"),
            (tensor(24, &[1 << 32, 1 << 32], 0), "\"a\" has the shape"),
            (tensor(28, &[1 << 62], 0), "\"a\" has the shape"),
            (tensor(24, &[u64::MAX], 0), "\"a\" ends beyond the file"),
            (tensor(24, &[65], 0), "\"a\" ends beyond the file"),
            (tensor(24, &[1], 32), "\"a\" has the offset 32 and not 0"),
            (
                head(2, 0)
                    .tensor("a", &[1], 24, 0)
                    .tensor("a", &[1], 24, 32)
                    .pad(32)
                    .more(64),
                "two tensors \"a\"",
            ),
            (
                head(2, 0)
                    .tensor("a", &[1], 24, 0)
                    .tensor("b", &[1], 24, 1)
                    .pad(32)
                    .more(64),
                "\"b\" has the offset 1 and not 32",
            ),
        ] {
            let refused = read(&file.0).unwrap_err();
            assert!(refused.contains(said), "{said}: {refused}");
        }
    }

    #[test]
    fn what_is_cut_or_changed_is_refused_or_stays_within_the_file() {
        let (file, _) = good();
        for length in 0..file.len() {
            assert!(read(&file[..length]).is_err(), "{length} bytes");
        }
        let mut random = StdRng::seed_from_u64(7);
        for round in 0..20_000 {
            let mut changed = file.clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..changed.len());
                match random.random_range(0..3) {
                    0 => changed[at] = random.random(),
                    1 => changed[at] ^= 1 << random.random_range(0..8),
                    _ => changed.truncate(at.max(1)),
                }
            }
            for tensor in read(&changed).unwrap_or_default() {
                let end = tensor.offset.checked_add(tensor.length);
                assert!(
                    end.is_some_and(|end| end <= changed.len() as u64),
                    "round {round}: {tensor:?}"
                );
            }
        }
    }
}
