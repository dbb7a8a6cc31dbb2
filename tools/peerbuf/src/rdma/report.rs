//! What a transfer is told as: a table of its hops for people, an object for programs.

use std::time::Instant;

use comfy_table::{ColumnConstraint, Width};
use peerbuf::transfer::Receipt as FileReceipt;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::wire::{self, Account, FileAccount, Receipt};
use crate::{size, table};

/// What was done, with the fields of `--json`.
#[derive(Serialize)]
pub struct Summary {
    bytes: u64,
    /// Of all bytes, as they were in this end's buffer.
    sha256: String,
    /// Each bufferful had the same checksum in both buffers.
    pub verified: bool,
    seconds: f64,
    here: Receipt,
    there: Receipt,
    /// Bytes that the processor copied between the buffer and memory of the card's own.
    copied_here: u64,
    copied_there: u64,
    /// How often each buffer moved meanwhile.
    moves_here: u64,
    moves_there: u64,
    /// How often work was cut off by that, and done again over a new connection.
    retries: u32,
    file_here: FileAccount,
    /// Of what the other end wrote to its file.
    file_there: Option<FileAccount>,
}

/// What is counted while bytes move.
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

    /// Takes all bytes, in their order.
    pub fn sum(&mut self) -> &mut Sha256 {
        &mut self.sum
    }

    /// Adds one bufferful: its checksum on this end, and what the other end says of it.
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

    /// Adds what went between the file and the buffer on this end.
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

impl Summary {
    /// Each hop with its path, and below it what better ways failed with. `file` is this end's.
    pub fn table(&self, file: &str) -> String {
        let mut hops = table::new(&[
            "end",
            "between",
            "path used",
            "why not a better one",
            "bytes",
            "through system memory",
        ]);
        // Paths have hyphens, at which they must not be broken.
        for (column, width) in [(2, 24), (3, 26)] {
            if let Some(column) = hops.column_mut(column) {
                column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width)));
            }
        }
        let mut notes: Vec<&str> = Vec::new();
        let mut row = |end: &str, between: String, path: &str, why: String, host_bytes: u64| {
            let path = path.replace(", ", "\n");
            let (all, host) = (size::show(self.bytes), size::show(host_bytes));
            hops.add_row([end.to_owned(), between, path, why, all, host]);
        };
        let FileAccount { path, host_bytes } = &self.file_here;
        let between = format!("{file} and {}", self.here.buffer);
        row("here", between, path, String::new(), *host_bytes);
        for (end, receipt, copied) in [
            ("here", &self.here, self.copied_here),
            ("there", &self.there, self.copied_there),
        ] {
            let mut why = Vec::new();
            for attempt in &receipt.attempts {
                let known = notes.iter().position(|note| note == attempt);
                let number = known.unwrap_or_else(|| {
                    notes.push(attempt);
                    notes.len() - 1
                });
                let rung = attempt.split(':').next().unwrap_or_default();
                why.push(format!("{rung} [{}]", number + 1));
            }
            let between = format!("{} and {}", receipt.buffer, receipt.card);
            let path = format!("{}, {}", receipt.registration, receipt.path);
            row(end, between, &path, why.join("\n"), copied);
        }
        if let Some(FileAccount { path, host_bytes }) = &self.file_there {
            let between = format!("{} and its file", self.there.buffer);
            row("there", between, path, String::new(), *host_bytes);
        }
        let mut text = hops.to_string();
        for (number, note) in notes.iter().enumerate() {
            text += &format!("\n[{}] not {note}", number + 1);
        }
        let sums = if self.verified { "agree" } else { "DIFFER" };
        text += &format!(
            "\n{} bytes in {:.2} s, checksums {sums}",
            self.bytes, self.seconds
        );
        if self.moves_here > 0 || self.moves_there > 0 {
            text += &format!(
                "; moves meanwhile: {} here, {} there",
                self.moves_here, self.moves_there
            );
        }
        if self.retries > 0 {
            text += &format!("; {} further connections", self.retries);
        }
        text
    }
}
