//! The loop of copies through a temporary buffer.

use crate::error::BufferError;

/// Splits `length` bytes into chunks and calls `step` for each, with the chunk's offset and a temporary
/// buffer of its length.
///
/// # Errors The first error of `step`.
#[doc(hidden)]
pub fn in_chunks(
    length: u64,
    mut step: impl FnMut(u64, &mut [u8]) -> Result<(), BufferError>,
) -> Result<(), BufferError> {
    const CHUNK: u64 = 256 << 10;
    let mut bytes = vec![0; length.min(CHUNK) as usize];
    let mut done = 0;
    while done < length {
        let chunk = &mut bytes[..(length - done).min(CHUNK) as usize];
        step(done, chunk)?;
        done += chunk.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_without_gaps_and_end_where_they_should() {
        for length in [0, 1, (256 << 10) - 1, 256 << 10, (600 << 10) + 5] {
            let mut seen = 0;
            in_chunks(length, |at, chunk| {
                assert_eq!(at, seen);
                assert!(!chunk.is_empty());
                seen += chunk.len() as u64;
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, length);
        }
    }
}
