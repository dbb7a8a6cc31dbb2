//! Copies to and from shared memory and device memory.
//!
//! Others change such bytes at any time, so the compiler must not know of the accesses: it may read through a
//! slice twice or not at all, and it may read the source of a `copy_nonoverlapping` again instead of the copy. A
//! loop of volatile accesses is correct, but about sixty times slower than `memcpy` in a build without
//! optimisation. So the copies here are assembly or calls that the compiler cannot look into, equally fast in
//! every build profile:
//!
//! - Copies below [`BULK`] bytes, and all copies with [`Memory::Device`], use aligned accesses of 8 bytes
//!   and, at the edges, 4, 2 and 1. Each byte is read once and written once.
//! - Larger copies between cached memory are the C library's `memcpy`. It may access a byte twice, and use any
//!   width, which device memory may not support. Each byte of the copy is one that the source had meanwhile.
//! - Larger copies with [`Memory::Combining`] use the widest registers of the CPU, and read by streaming loads
//!   (`movntdqa`), which fetch a whole line of write-combined memory where ordinary loads fetch 8 bytes.
//!
//! On other architectures the volatile loop stands in for the assembly; under Miri for all of it.

/// The memory type of a mapping, as far as copies depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Cached system memory: supports every access; the widest is the fastest.
    Cached,
    /// Device memory, mapped uncached, possibly emulated by a hypervisor that does not support wide
    /// registers.
    Device,
    /// Possibly device memory mapped write-combined, as graphics drivers do.
    Combining,
}

/// Copies of at least this many bytes use wide registers.
pub const BULK: usize = 256;

/// One side of a copy.
#[derive(Clone, Copy)]
pub(crate) struct Side {
    pub(crate) address: *mut u8,
    pub(crate) memory: Memory,
}

type Memcpy = unsafe extern "C" fn(*mut u8, *const u8, usize) -> *mut u8;

unsafe extern "C" {
    /// The C library's.
    fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8;
}

/// Copies `length` bytes.
///
/// # Safety Both ranges are mapped during the call, the one at `to` is writable, and the copy invalidates no
/// reference to them that is used meanwhile.
pub(crate) unsafe fn copy(from: Side, to: Side, length: usize) {
    let (mut source, mut target) = (from.address.cast_const(), to.address);
    if (from.memory, to.memory) == (Memory::Cached, Memory::Cached) && length >= BULK && !cfg!(miri)
    {
        // The compiler knows what `memcpy` does, and nothing of a function at an address that may be any.
        let memcpy = std::hint::black_box(memcpy as Memcpy);
        // SAFETY: both ranges are mapped and the second one is writable, by the caller's promise.
        unsafe { memcpy(target, source, length) };
        return;
    }
    let mut left = length;
    while left > 0 {
        // The side whose accesses must be aligned: cached memory accepts any.
        let address = match (from.memory, to.memory) {
            (Memory::Cached, _) => target as usize,
            (_, Memory::Cached) => source as usize,
            _ => source as usize | target as usize,
        };
        let width = 1 << address.trailing_zeros().min(left.ilog2()).min(3);
        let count = if width == 8 { left / 8 } else { 1 };
        // SAFETY: `count * width` is at most `left`, so the bytes are inside, by the caller's promise.
        unsafe {
            match width {
                8 => wide(from.memory, to.memory, source, target, count),
                4 => one::<u32>(source, target),
                2 => one::<u16>(source, target),
                _ => one::<u8>(source, target),
            }
            source = source.add(count * width);
            target = target.add(count * width);
        }
        left -= count * width;
    }
}

/// # Safety As [`copy`], for one `T`.
unsafe fn one<T>(source: *const u8, target: *mut u8) {
    let (source, target) = (source.cast::<T>(), target.cast::<T>());
    // SAFETY: both addresses are mapped, by the caller's promise. Volatile accesses must be aligned, and
    // device memory's are.
    unsafe {
        match (source.is_aligned(), target.is_aligned()) {
            (true, true) => target.write_volatile(source.read_volatile()),
            (true, false) => target.write_unaligned(source.read_volatile()),
            (false, true) => target.write_volatile(source.read_unaligned()),
            (false, false) => target.write_unaligned(source.read_unaligned()),
        }
    }
}

/// Copies words of 8 bytes.
///
/// # Safety
/// As [`copy`].
unsafe fn wide(from: Memory, to: Memory, mut source: *const u8, mut target: *mut u8, words: usize) {
    let mut words = words;
    let is_bulk = words * 8 >= BULK && from != Memory::Device && to != Memory::Device;
    if is_bulk && let Some(wide) = machine::widest() {
        // Advances to where the accesses that matter are aligned: streaming loads, otherwise stores.
        let at = match from {
            Memory::Combining => source as usize,
            _ => target as usize,
        };
        let lead = match at % 8 {
            0 => (at.wrapping_neg() % 64) / 8,
            _ => 0,
        };
        let stream = match from {
            Memory::Combining => Stream::Loads,
            _ => Stream::Nothing,
        };
        // SAFETY: `lead` is less than a block, and there is at least one block, by the caller's promise.
        // After it, streaming accesses are aligned.
        unsafe {
            machine::words(source, target, lead);
            (source, target) = (source.add(8 * lead), target.add(8 * lead));
            let blocks = (words - lead) * 8 / BLOCK;
            machine::blocks(wide, stream, source, target, blocks);
            (source, target) = (source.add(BLOCK * blocks), target.add(BLOCK * blocks));
            words -= lead + BLOCK / 8 * blocks;
        }
    }
    // SAFETY: the rest of the range of the caller's promise.
    unsafe { machine::words(source, target, words) }
}

/// Bytes per step of the wide loops.
const BLOCK: usize = 128;

/// The accesses that bypass the caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Nothing,
    Loads,
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod machine {
    use std::arch::{asm, is_x86_feature_detected};

    use super::Stream;

    /// Registers of the CPU.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) enum Wide {
        /// 16 bytes.
        Sse41,
        /// 32 bytes.
        Avx2,
    }

    pub(super) fn widest() -> Option<Wide> {
        if is_x86_feature_detected!("avx2") {
            Some(Wide::Avx2)
        } else {
            is_x86_feature_detected!("sse4.1").then_some(Wide::Sse41)
        }
    }

    /// # Safety
    /// `8 * count` bytes at `source` may be read, and as many at `target` written.
    pub(super) unsafe fn words(source: *const u8, target: *mut u8, count: usize) {
        // SAFETY: both ranges are accessible, by the caller's promise; the assembly accesses nothing else.
        unsafe {
            asm!(
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "mov {word}, [{from}]",
                "mov [{to}], {word}",
                "add {from}, 8",
                "add {to}, 8",
                "dec {n}",
                "jnz 2b",
                "3:",
                n = inout(reg) count => _,
                from = inout(reg) source => _,
                to = inout(reg) target => _,
                word = out(reg) _,
                options(nostack),
            );
        }
    }

    /// `count` blocks of 128 bytes, by four or eight loads and as many stores.
    macro_rules! blocks {
        ($source:ident, $target:ident, $count:ident, $load:literal, $store:literal, $register:literal, $width:literal,
         $end:literal) => {
            asm!(
                "test {n}, {n}",
                "jz 3f",
                "2:",
                concat!($load, " ", $register, "0, [{from}]"),
                concat!($load, " ", $register, "1, [{from} + ", $width, "]"),
                concat!($load, " ", $register, "2, [{from} + 2 * ", $width, "]"),
                concat!($load, " ", $register, "3, [{from} + 3 * ", $width, "]"),
                concat!($store, " [{to}], ", $register, "0"),
                concat!($store, " [{to} + ", $width, "], ", $register, "1"),
                concat!($store, " [{to} + 2 * ", $width, "], ", $register, "2"),
                concat!($store, " [{to} + 3 * ", $width, "], ", $register, "3"),
                concat!("add {from}, 4 * ", $width),
                concat!("add {to}, 4 * ", $width),
                "dec {n}",
                "jnz 2b",
                $end,
                "3:",
                n = inout(reg) $count => _,
                from = inout(reg) $source => _,
                to = inout(reg) $target => _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                options(nostack),
            )
        };
    }

    /// # Safety The CPU has `wide` registers. `128 * count` bytes at `source` are readable and as many at
    /// `target` writable. The address of a streaming access is a multiple of 64.
    pub(super) unsafe fn blocks(
        wide: Wide,
        stream: Stream,
        source: *const u8,
        target: *mut u8,
        count: usize,
    ) {
        let halves = 2 * count;
        // SAFETY: both ranges are accessible, by the caller's promise; the assembly accesses nothing else.
        unsafe {
            match (wide, stream) {
                (Wide::Avx2, Stream::Nothing) => blocks!(
                    source,
                    target,
                    count,
                    "vmovdqu",
                    "vmovdqu",
                    "ymm",
                    "32",
                    "vzeroupper"
                ),
                (Wide::Avx2, Stream::Loads) => blocks!(
                    source,
                    target,
                    count,
                    "vmovntdqa",
                    "vmovdqu",
                    "ymm",
                    "32",
                    "vzeroupper"
                ),
                (Wide::Sse41, Stream::Nothing) => {
                    blocks!(source, target, halves, "movdqu", "movdqu", "xmm", "16", "");
                }
                (Wide::Sse41, Stream::Loads) => {
                    blocks!(
                        source, target, halves, "movntdqa", "movdqu", "xmm", "16", ""
                    );
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn all() -> Vec<Wide> {
        let has = [
            (Wide::Sse41, is_x86_feature_detected!("sse4.1")),
            (Wide::Avx2, is_x86_feature_detected!("avx2")),
        ];
        let has = has.into_iter().filter(|(_, has)| *has);
        has.map(|(wide, _)| wide).collect()
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod machine {
    use super::Stream;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) enum Wide {}

    pub(super) fn widest() -> Option<Wide> {
        None
    }

    /// # Safety
    /// `8 * count` bytes at `source` may be read, and as many at `target` written.
    pub(super) unsafe fn words(source: *const u8, target: *mut u8, count: usize) {
        for index in 0..count {
            // SAFETY: both ranges are accessible, by the caller's promise.
            unsafe { super::one::<u64>(source.add(8 * index), target.add(8 * index)) }
        }
    }

    /// # Safety
    /// None: there are no such registers.
    pub(super) unsafe fn blocks(wide: Wide, _: Stream, _: *const u8, _: *mut u8, _: usize) {
        match wide {}
    }

    #[cfg(test)]
    pub(super) fn all() -> Vec<Wide> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Memory; 3] = [Memory::Cached, Memory::Device, Memory::Combining];

    /// Bytes in which neighbouring bytes differ, and neighbouring lines.
    fn pattern(length: usize) -> Vec<u8> {
        (0..length)
            .map(|at| (at * 7 + at / 64 * 13 + 1) as u8)
            .collect()
    }

    fn check(kinds: (Memory, Memory), from: usize, to: usize, length: usize, bytes: &[u8]) {
        let mut source = bytes.to_vec();
        let mut target = vec![0xee; to + length + 64];
        let side = |address, memory| Side { address, memory };
        // SAFETY: both ranges are inside, as the slices below show.
        unsafe {
            copy(
                side(source[from..from + length].as_mut_ptr(), kinds.0),
                side(target[to..to + length].as_mut_ptr(), kinds.1),
                length,
            );
        }
        let what = format!("{length} bytes from {from} to {to}, {kinds:?}");
        assert!(
            target[to..to + length] == bytes[from..from + length],
            "{what}"
        );
        let around = target[..to].iter().chain(&target[to + length..]);
        assert!(
            around.into_iter().all(|&byte| byte == 0xee),
            "{what}: beside"
        );
    }

    #[test]
    fn every_length_and_alignment_up_to_a_page_is_copied_whole_and_nothing_beside_it() {
        let longest = if cfg!(miri) { 40 } else { 4096 };
        let bytes = pattern(longest + 64);
        let mut kinds = KINDS
            .iter()
            .flat_map(|from| KINDS.map(|to| (*from, to)))
            .cycle();
        for length in 0..=longest {
            // Short lengths are tested with all alignments within a line; longer ones with one source and all
            // targets, and the reverse.
            for offset in 0..64 {
                for (from, to) in [
                    (offset, 0),
                    (0, offset),
                    (offset, offset),
                    (offset, 63 - offset),
                ] {
                    if length > 600 && (length + offset) % 13 != 0 {
                        continue;
                    }
                    if let Some(kinds) = kinds.next() {
                        check(kinds, from, to, length, &bytes);
                    }
                }
            }
        }
    }

    #[test]
    fn each_register_width_copies_blocks() {
        let bytes = pattern(64 + 9 * BLOCK);
        for wide in machine::all() {
            for stream in [Stream::Nothing, Stream::Loads] {
                for (count, from, to) in [(0, 0, 0), (1, 0, 1), (9, 0, 0), (8, 64, 40)] {
                    // Streaming loads are at a multiple of 64.
                    let mut source = vec![0_u8; 64 + bytes.len()];
                    let shift = source.as_ptr().align_offset(64);
                    source[shift..shift + bytes.len()].copy_from_slice(&bytes);
                    let mut target = vec![0xee; 128 + count * BLOCK + 64];
                    // SAFETY: the CPU has the registers, and both ranges are inside, as the slices show.
                    unsafe {
                        let source = source[shift + from..][..count * BLOCK].as_ptr();
                        let target = target[to..][..count * BLOCK].as_mut_ptr();
                        machine::blocks(wide, stream, source, target, count);
                    }
                    let moved = &target[to..][..count * BLOCK];
                    assert!(
                        *moved == bytes[from..][..count * BLOCK],
                        "{wide:?} {stream:?} {count}"
                    );
                    assert!(
                        target[to + count * BLOCK..]
                            .iter()
                            .all(|&byte| byte == 0xee)
                    );
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri minutes")]
    fn copies_beyond_the_caches_are_whole() {
        let large = 96 << 20;
        let bytes = pattern(large + 200);
        for (from, to, length) in [(0, 0, large), (1, 3, large + 77), (8, 16, large + 100)] {
            check((Memory::Cached, Memory::Cached), from, to, length, &bytes);
        }
    }
}
