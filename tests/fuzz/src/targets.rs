//! The targets. Each takes any bytes, and panics when what decodes them breaks its word.

use peerbuf::fuzz;
use peerbuf_rdma::{Address, Remote};

/// A message between a publisher and a subscriber is refused with a word, or says only what can be
/// acted upon.
pub fn message(bytes: &[u8]) {
    let said = match fuzz::message(bytes) {
        Ok(said) => said,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    for [offset, length, size] in &said.ranges {
        let end = u128::from(*offset) + u128::from(*length);
        assert!(end <= u128::from(*size), "{end} is not within {size}");
    }
    assert!(said.descriptors.iter().all(|count| (1..=2).contains(count)));
    assert!(said.bars.iter().all(|bar| *bar <= 5), "{:?}", said.bars);
    let terminal = |text: &String| text.chars().any(char::is_control);
    assert!(!said.texts.iter().any(terminal), "{:?}", said.texts);
    // Each record brings a descriptor, and the kernel takes no more than this in one message.
    assert!(said.ranges.len().max(said.notes) <= 253);
}

/// What procfs says of a dma-buf gives parts of its lines, and nothing else.
pub fn fdinfo(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (exporter, name, _) = fuzz::fdinfo(&text);
    assert!(text.contains(&exporter) && text.contains(&name));
    assert!(!exporter.contains('\n') && !name.contains('\n'));
}

/// An address that is read is the same when it is written and read again.
pub fn address(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Some(address) = fuzz::address(&text) {
        assert_eq!(fuzz::address(&address.to_string()), Some(address));
    }
}

/// How to reach another machine's card, and what of its memory may be used: taken only as this end
/// would have written it, and nothing past the last address.
pub fn remote(bytes: &[u8]) {
    if let Some(bytes) = bytes.first_chunk::<32>()
        && let Ok(address) = Address::from_bytes(bytes)
    {
        assert_eq!(&address.to_bytes(), bytes);
    }
    if let Some(bytes) = bytes.get(32..).and_then(<[u8]>::first_chunk::<24>)
        && let Ok(remote) = Remote::from_bytes(bytes)
    {
        assert_eq!(&remote.to_bytes(), bytes);
        let [begin, length] = [0, 8].map(|at| {
            let field = bytes[at..].first_chunk().expect("24 bytes");
            u128::from(u64::from_be_bytes(*field))
        });
        assert!(begin + length <= u128::from(u64::MAX));
        assert_eq!(u128::from(remote.len()), length);
    }
}
