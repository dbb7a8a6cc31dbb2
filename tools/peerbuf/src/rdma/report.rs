//! Reports of a transfer: a table of its hops for people, a JSON object for programs.

use std::time::Instant;

use peerbuf::transfer::Receipt as FileReceipt;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::wire::{self, Account, FileAccount, Receipt};
use crate::size;
use crate::table::{Notes, Table, first_that_fits, paragraph};

/// The report of a transfer, with the fields of `--json`.
#[derive(Serialize)]
pub struct Summary {
    bytes: u64,
    /// SHA-256 of all bytes, as they were in this end's buffer.
    sha256: String,
    /// True if each bufferful had the same checksum in both buffers.
    pub verified: bool,
    seconds: f64,
    here: Receipt,
    there: Receipt,
    /// Number of bytes that the CPU copied between the buffer and a bounce buffer of the card.
    copied_here: u64,
    copied_there: u64,
    /// Number of moves of each buffer during the transfer.
    moves_here: u64,
    moves_there: u64,
    /// Number of times that a move cut off work, which was repeated over a new connection.
    retries: u32,
    file_here: FileAccount,
    /// The peer's account of its file.
    file_there: Option<FileAccount>,
}

/// Counters of a transfer.
pub struct Tally {
    bytes: u64,
    verified: bool,
    copied_here: u64,
    copied_there: u64,
    moves_there: u64,
    file_here: FileAccount,
    file_there: Option<FileAccount>,
    sum: Sha256,
    began: Instant,
}

impl Tally {
    pub fn new() -> Tally {
        Tally {
            bytes: 0,
            verified: true,
            copied_here: 0,
            copied_there: 0,
            moves_there: 0,
            file_here: FileAccount::default(),
            file_there: None,
            sum: Sha256::new(),
            began: Instant::now(),
        }
    }

    /// The digest that takes all bytes, in their order.
    pub fn sum(&mut self) -> &mut Sha256 {
        &mut self.sum
    }

    /// Adds one bufferful: its checksum on this end, and the peer's account.
    pub fn add(&mut self, length: u64, ours: [u8; 32], theirs: Account, copied: u64) {
        self.bytes += length;
        self.verified &= ours == theirs.checksum;
        self.copied_here += copied;
        self.copied_there = self.copied_there.saturating_add(theirs.copied);
        self.moves_there = theirs.moves;
        if let Some(file) = theirs.file {
            let all = self.file_there.get_or_insert_default();
            wire::add(&mut all.path, &file.path);
            all.host_bytes = all.host_bytes.saturating_add(file.host_bytes);
        }
    }

    /// Adds a transfer between the file and the buffer on this end.
    pub fn file(&mut self, receipt: &FileReceipt) {
        wire::add(&mut self.file_here.path, receipt.plan.path.as_str());
        self.file_here.host_bytes += receipt.host_bytes;
    }

    pub fn end(self, here: Receipt, there: Receipt, moves_here: u64, retries: u32) -> Summary {
        let sum: [u8; 32] = self.sum.finalize().into();
        Summary {
            bytes: self.bytes,
            sha256: sum.iter().map(|byte| format!("{byte:02x}")).collect(),
            verified: self.verified,
            seconds: self.began.elapsed().as_secs_f64(),
            here,
            there,
            copied_here: self.copied_here,
            copied_there: self.copied_there,
            moves_here,
            moves_there: self.moves_there,
            retries,
            file_here: self.file_here,
            file_there: self.file_there,
        }
    }
}

/// Columns of the table.
const BETWEEN: usize = 1;
const PATH: usize = 2;

impl Summary {
    /// Each hop with its path, and below it the errors of better ways. `file` is this end's.
    pub fn table(&self, file: &str, width: usize) -> String {
        let mut notes = Notes::default();
        // A name should not wrap if the failed ways can go below the table instead.
        let forms = [(true, true), (false, true), (true, false), (false, false)];
        let forms = forms.map(|(ways, names)| {
            let hops = self.hops(file, ways, &mut notes);
            if names { hops.whole(BETWEEN) } else { hops }
        });
        let mut text = first_that_fits(forms, width) + "\n" + &notes.show(width);
        let sums = if self.verified { "agree" } else { "DIFFER" };
        let mut last = format!(
            "{} bytes in {:.2} s, checksums {sums}",
            self.bytes, self.seconds
        );
        if self.moves_here > 0 || self.moves_there > 0 {
            last += &format!(
                "; moves meanwhile: {} here, {} there",
                self.moves_here, self.moves_there
            );
        }
        if self.retries > 0 {
            last += &format!("; {} further connections", self.retries);
        }
        text += &paragraph(&last, width);
        text
    }

    /// A row for each hop. With `ways`, the path's cell names the better ways that failed;
    /// otherwise only the numbers of the notes do.
    fn hops(&self, file: &str, ways: bool, notes: &mut Notes) -> Table {
        let path = match ways {
            true => "path used, and why not a better one",
            false => "path used",
        };
        let headings = ["end", "between", path, "bytes", "through system memory"];
        let mut hops = Table::new(headings);
        if ways {
            hops = hops.whole(PATH);
        }
        let mut row = |end: &str, between: String, path: String, host_bytes: u64| {
            let (all, host) = (size::show(self.bytes), size::show(host_bytes));
            hops.row([end.to_owned(), between, path, all, host]);
        };
        // A buffer that moved has several paths.
        let lines = |paths: &str| paths.replace(", ", "\n");
        let FileAccount { path, host_bytes } = &self.file_here;
        let between = format!("{file} and\n{}", self.here.buffer);
        row("here", between, lines(path), *host_bytes);
        for (end, receipt, copied) in [
            ("here", &self.here, self.copied_here),
            ("there", &self.there, self.copied_there),
        ] {
            let between = format!("{}\nand {}", receipt.buffer, receipt.card);
            let mut path = format!("{}\n{}", lines(&receipt.registration), lines(&receipt.path));
            let mut numbers = Vec::new();
            for attempt in &receipt.attempts {
                let number = notes.number(format!("not {attempt}"));
                let way = attempt.split(':').next().unwrap_or_default();
                match ways {
                    true => path += &format!("\n  not {way} {number}"),
                    false => numbers.push(number),
                }
            }
            if !numbers.is_empty() {
                path += &format!("\n{}", numbers.join(" "));
            }
            row(end, between, path, copied);
        }
        if let Some(FileAccount { path, host_bytes }) = &self.file_there {
            let between = format!("{}\nand its file", self.there.buffer);
            row("there", between, lines(path), *host_bytes);
        }
        hops
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::check;

    const FILE: &str = "/mnt/nvme/two-machines";
    const BAR: &str = "0000:04:00.0 BAR 2 at 0x0";

    fn receipt(buffer: &str, registration: &str, path: &str, attempts: &[&str]) -> Receipt {
        Receipt {
            card: "rxe0".into(),
            buffer: buffer.into(),
            registration: registration.into(),
            attempts: attempts
                .iter()
                .map(|attempt| (*attempt).to_owned())
                .collect(),
            path: path.into(),
        }
    }

    fn summary(receipt: Receipt, seconds: f64) -> Summary {
        let file = FileAccount {
            path: "peer-to-peer".into(),
            host_bytes: 0,
        };
        let copied = if receipt.registration == "staged" {
            8 << 20
        } else {
            0
        };
        Summary {
            bytes: 8 << 20,
            sha256: String::new(),
            verified: true,
            seconds,
            here: receipt.clone(),
            there: receipt,
            copied_here: copied,
            copied_there: copied,
            moves_here: 0,
            moves_there: 0,
            retries: 0,
            file_here: file.clone(),
            file_there: Some(file),
        }
    }

    const NO_LIBRARY: &str = "dma-buf-by-library: ibv_reg_dmabuf_mr on 0000:04:00.0 BAR 2 at 0x0: \
                              EOPNOTSUPP (Operation not supported) (the card's part of libibverbs)";

    /// The lab's soft-RoCE with dma-buf support.
    fn by_kernel() -> Summary {
        let receipt = receipt(
            BAR,
            "dma-buf-by-kernel",
            "processor-in-place",
            &[NO_LIBRARY],
        );
        summary(receipt, 10.48)
    }

    /// The kernel's own soft-RoCE.
    fn staged() -> Summary {
        let attempts = [
            "dma-buf-by-library: ibv_reg_dmabuf_mr on 0000:04:00.0 BAR 2 at 0x0: EOPNOTSUPP \
             (Operation not supported) (the card's driver)",
            "dma-buf-by-kernel: ioctl(UVERBS_METHOD_REG_DMABUF_MR) on 0000:04:00.0 BAR 2 at 0x0: \
             EOPNOTSUPP (Operation not supported) (the card's driver)",
            "shared-memory: the buffer is not backed by host memory (the buffer)",
        ];
        summary(receipt(BAR, "staged", "staged-copy", &attempts), 2.95)
    }

    /// Buffers that moved all the time.
    fn moving() -> Summary {
        let paths = "processor-in-place, shared-host-memory";
        let receipt = receipt(BAR, "dma-buf-by-kernel", paths, &[NO_LIBRARY]);
        let mut summary = summary(receipt, 6.33);
        let file = |path: &str| FileAccount {
            path: path.into(),
            host_bytes: 4 << 20,
        };
        summary.file_here = file("shared-host-memory, peer-to-peer");
        summary.file_there = Some(file("peer-to-peer, shared-host-memory"));
        summary.moves_here = 54;
        summary.moves_there = 41;
        summary
    }

    /// The example of the page by hand.
    fn by_hand() -> Summary {
        let attempts = [
            "dma-buf-by-library: ibv_reg_dmabuf_mr on udmabuf: EOPNOTSUPP (Operation not supported) \
             (the card's driver)",
            "dma-buf-by-kernel: ioctl(UVERBS_METHOD_REG_DMABUF_MR) on udmabuf: EOPNOTSUPP (Operation \
             not supported) (the card's driver)",
        ];
        let receipt = receipt("udmabuf", "shared-memory", "shared-host-memory", &attempts);
        let mut summary = summary(receipt, 1.03);
        summary.bytes = 1_000_000;
        summary.file_here = FileAccount {
            path: "staged-copy".into(),
            host_bytes: 1_000_000,
        };
        summary.file_there = None;
        summary
    }

    /// Names of a real machine, and odd numbers.
    fn long() -> Summary {
        let mut summary = staged();
        for receipt in [&mut summary.here, &mut summary.there] {
            receipt.card = "rocep129s0f0np0v127".into();
            receipt.buffer = "0000:c1:00.0 BAR 2 at 0x3ffffff000".into();
        }
        summary.bytes = 1_000_000_007;
        summary.copied_here = 1_000_000_007;
        summary.retries = 12;
        summary
    }

    const LONG_FILE: &str = "/srv/models/llama-3.1-405b-instruct/model-00001-of-00191.safetensors";

    #[test]
    fn no_line_is_wider_than_the_terminal_and_nothing_is_lost() {
        for summary in [by_kernel(), staged(), moving(), long()] {
            for (width, file) in [100, 92, 80, 64, 40, 24]
                .into_iter()
                .zip([FILE, LONG_FILE].into_iter().cycle())
            {
                let text = summary.table(file, width);
                check::fits(&text, width);
                for receipt in [&summary.here, &summary.there] {
                    let paths = receipt.path.split(", ");
                    for words in paths.chain([receipt.registration.as_str()]) {
                        check::tells(&text, words);
                    }
                    for attempt in &receipt.attempts {
                        check::tells(&text, &format!("not {attempt}"));
                    }
                }
                check::tells(&text, "checksums agree");
            }
        }
    }

    #[test]
    fn there_is_a_table_down_to_80_columns_with_the_failed_ways_in_it_at_92() {
        for summary in [by_kernel(), staged(), moving(), long()] {
            for (file, width) in [(FILE, 100), (FILE, 80), (LONG_FILE, 100), (LONG_FILE, 80)] {
                let text = summary.table(file, width);
                assert!(text.contains("═╪═"), "{text}");
                let within = text.contains("  not dma-buf-by-library [1]");
                assert_eq!(within, width == 100, "{text}");
            }
        }
        for summary in [by_kernel(), staged(), moving()] {
            let text = summary.table(FILE, 92);
            assert!(text.contains("  not dma-buf-by-library [1]"), "{text}");
        }
    }

    #[test]
    fn the_docs_show_the_tables_as_they_are() {
        let page = include_str!("../../../../docs/rdma.md");
        for (summary, file) in [
            (by_kernel(), FILE),
            (staged(), FILE),
            (moving(), FILE),
            (by_hand(), "/tmp/some"),
        ] {
            // The lab's pair leaves room for the name of the end.
            let text = summary.table(file, 92);
            let lines = text.lines().map(|line| format!("first: {line}\n"));
            let text: String = lines.collect();
            assert!(page.contains(&text), "docs/rdma.md does not have\n{text}");
        }
    }
}
