//! The demo's report: a table for people, objects for programs.

use serde::Serialize;

use super::protocol::{Account, Reason};
use crate::size;
use crate::table::{Notes, Table, first_that_fits, paragraph};

/// One transfer, with the fields of `--json`.
#[derive(Debug, Serialize)]
pub struct Transfer {
    buffer: String,
    source: String,
    sink: String,
    path: String,
    reasons: Vec<Reason>,
    bytes: u64,
    host_bytes: u64,
    /// True if every byte was compared and correct.
    pub verified: bool,
}

impl Transfer {
    pub fn new(
        buffer: &str,
        source: &str,
        sink: &str,
        account: Account,
        verified: bool,
    ) -> Transfer {
        Transfer {
            buffer: buffer.into(),
            source: source.into(),
            sink: sink.into(),
            path: account.path,
            reasons: account.reasons,
            bytes: account.bytes,
            host_bytes: account.host_bytes,
            verified,
        }
    }
}

/// The last line: the number of verified bytes. `cargo lab demo` adds these lines up.
pub fn summary(transfers: &[Transfer]) -> String {
    let bytes: u64 = transfers.iter().map(|transfer| transfer.bytes).sum();
    format!(
        "{} transfers, {bytes} bytes: every byte arrived",
        transfers.len()
    )
}

/// The table, with the evidence below it. `place` is the directory of the files.
pub fn table(transfers: &[Transfer], place: &str, width: usize) -> String {
    let mut notes = Notes::default();
    let forms = [true, false].map(|codes| rows(transfers, place, codes, &mut notes));
    let mut text = paragraph(&format!("files in {place}, of random bytes"), width);
    text += &first_that_fits(forms, width);
    text + "\n" + &notes.show(width)
}

/// A row for each transfer. Without `codes`, a row has only the numbers of the notes with the
/// reasons.
fn rows(transfers: &[Transfer], place: &str, codes: bool, notes: &mut Notes) -> Table {
    const PATH: usize = 2;
    let path = match codes {
        true => "path used, and why not a better one",
        false => "path used",
    };
    let mut table = Table::new([
        "from",
        "to",
        path,
        "bytes",
        "through system memory",
        "checked",
    ]);
    if codes {
        table = table.whole(PATH);
    }
    // Every row would repeat the place of the files.
    let suffix = format!(" in {place}");
    let end = |name: &str| match name.strip_suffix(&suffix) {
        Some(file) => file.to_owned(),
        None => name.replacen(" BAR ", "\nBAR ", 1),
    };
    for transfer in transfers {
        let mut path = transfer.path.clone();
        for Reason {
            path: better,
            code,
            evidence,
        } in &transfer.reasons
        {
            let number = notes.number(format!("not {better} ({code}): {evidence}"));
            path += &match codes {
                true => format!("\n  {code} {number}"),
                false => format!(" {number}"),
            };
        }
        table.row([
            end(&transfer.source),
            end(&transfer.sink),
            path,
            size::show(transfer.bytes),
            size::show(transfer.host_bytes),
            match transfer.verified {
                true => "every byte".into(),
                false => "WRONG BYTES".to_string(),
            },
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::check;

    const PLACE: &str = "/mnt/nvme (ext4 on nvme0n1, 0000:03:00.0)";

    fn reason(path: &str, code: &str, evidence: &str) -> Reason {
        Reason {
            path: path.into(),
            code: code.into(),
            evidence: evidence.into(),
        }
    }

    /// The two transfers of the demo: a file into the buffer, and the buffer into another file.
    fn round_trip(
        buffer: &str,
        path: &str,
        bytes: u64,
        reasons: [Vec<Reason>; 2],
    ) -> Vec<Transfer> {
        let [first, second] = ["first", "second"].map(|file| format!("{file} file in {PLACE}"));
        let ends = [(first.as_str(), buffer), (buffer, second.as_str())];
        let transfers = ends.into_iter().zip(reasons);
        let transfers = transfers.map(|((source, sink), reasons)| {
            let account = Account {
                path: path.into(),
                reasons,
                bytes,
                host_bytes: if path == "peer-to-peer" { 0 } else { bytes },
            };
            Transfer::new(buffer, source, sink, account, true)
        });
        transfers.collect()
    }

    fn udmabuf(bytes: u64) -> Vec<Transfer> {
        let evidence = "the buffer is a udmabuf: its bytes are in system memory";
        let reasons = vec![reason("peer-to-peer", "not-device-memory", evidence)];
        let reasons = [reasons.clone(), reasons];
        round_trip("udmabuf", "shared-host-memory", bytes, reasons)
    }

    /// The same round trip, with a shader between its two transfers.
    fn with_shader(bar: &str, mut transfers: Vec<Transfer>) -> Vec<Transfer> {
        let peer = "the device is software: the processor loads and stores over the bus";
        let host = "the bytes are in device memory";
        let bytes = transfers[0].bytes;
        let account = Account {
            path: "staged-copy".into(),
            reasons: vec![
                reason("peer-to-peer", "not-a-device", peer),
                reason("shared-host-memory", "not-host-memory", host),
            ],
            bytes,
            host_bytes: bytes,
        };
        let shader = Transfer::new(bar, bar, "Vulkan llvmpipe, a shader", account, true);
        transfers.insert(1, shader);
        transfers
    }

    /// The lab's topology `switch`.
    fn switch() -> Vec<Transfer> {
        let bar = "0000:04:00.0 BAR 2 at 0x0";
        let mut all = round_trip(bar, "peer-to-peer", 8 << 20, [vec![], vec![]]);
        all.extend(udmabuf(8 << 20));
        let again = round_trip(bar, "peer-to-peer", 8 << 20, [vec![], vec![]]);
        all.extend(with_shader(bar, again));
        all
    }

    /// The lab's topology `lying`, with the BAR's buffer there.
    fn lying(offset: u64, bytes: u64) -> Vec<Transfer> {
        let reasons = ["disk to buffer", "buffer to disk"].map(|direction| {
            let proof = format!(
                "{direction}: the call reported success, and byte 0 of the buffer did not arrive \
                 (65536 bytes compared at offset 0); 0000:03:00.0 (nvme0n1) and 0000:04:00.0 \
                 (BAR 2), below the bridge 0000:01:00.0"
            );
            let host = "the bytes are in device memory, and no memory of the host is behind it";
            vec![
                reason("peer-to-peer", "proof-failed", &proof),
                reason("shared-host-memory", "not-host-memory", host),
            ]
        });
        let bar = format!("0000:04:00.0 BAR 2 at {offset:#x}");
        let mut all = round_trip(&bar, "staged-copy", bytes, reasons.clone());
        all.extend(udmabuf(bytes));
        let again = round_trip(&bar, "staged-copy", bytes, reasons);
        all.extend(with_shader(&bar, again));
        all
    }

    /// A machine without either exporter.
    fn stand_ins() -> Vec<Transfer> {
        let evidence = "the buffer is a memfd: its bytes are in system memory";
        let p2p = reason("peer-to-peer", "not-device-memory", evidence);
        let shared = reason(
            "shared-host-memory",
            "below-block-size",
            "3 bytes, less than 512",
        );
        let mut all = Vec::new();
        for name in [
            "memfd (stand-in for a BAR)",
            "memfd (stand-in for a udmabuf)",
        ] {
            let reasons = vec![p2p.clone(), shared.clone()];
            all.extend(round_trip(
                name,
                "staged-copy",
                3,
                [reasons.clone(), reasons],
            ));
        }
        all
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_and_nothing_is_lost() {
        let cases = [
            switch(),
            lying(0, 8 << 20),
            lying(0x3f_ffff_f000, 1_000_003),
            lying(0x3f_ffff_f000, u64::MAX),
            stand_ins(),
        ];
        for transfers in &cases {
            for width in [100, 92, 80, 64, 40, 24] {
                let text = table(transfers, PLACE, width);
                check::fits(&text, width);
                check::tells(&text, &format!("files in {PLACE}, of random bytes"));
                for transfer in transfers {
                    for words in [&transfer.buffer, &transfer.path] {
                        check::names(&text, words);
                    }
                    check::names(&text, &size::show(transfer.bytes));
                    for Reason {
                        path,
                        code,
                        evidence,
                    } in &transfer.reasons
                    {
                        check::tells(&text, &format!("not {path} ({code}): {evidence}"));
                    }
                }
            }
        }
    }

    #[test]
    fn there_is_a_table_down_to_80_columns_with_the_codes_in_it_at_100() {
        let long = || lying(0x4000_0000, 1_000_003);
        for transfers in [switch(), lying(0, 8 << 20), long(), stand_ins()] {
            for width in [100, 80] {
                let text = table(&transfers, PLACE, width);
                assert!(text.contains("═╪═"), "{text}");
                for reason in transfers.iter().flat_map(|transfer| &transfer.reasons) {
                    let within = text.contains(&format!("  {} [", reason.code));
                    assert!(within || width == 80, "{text}");
                }
            }
        }
        assert!(!table(&long(), PLACE, 80).contains("  proof-failed ["));
    }

    #[test]
    fn wrong_bytes_are_shouted() {
        let mut transfers = switch();
        transfers[1].verified = false;
        for width in [100, 80, 40] {
            check::tells(&table(&transfers, PLACE, width), "WRONG");
        }
    }

    #[test]
    fn the_documentation_shows_the_tables_as_they_are() {
        let page = include_str!("../../../../docs/lab.md");
        for transfers in [switch(), lying(0, 8 << 20)] {
            let text = table(&transfers, PLACE, 100);
            assert!(page.contains(&text), "docs/lab.md does not have\n{text}");
        }
    }
}
