//! What the two processes say to each other: JSON, one message each, with descriptors beside it.

use peerbuf::transfer::Receipt;
use serde::{Deserialize, Serialize};

/// The longest message. Evidence is a few hundred bytes.
pub const MAX_MESSAGE: usize = 64 << 10;

/// First process to second.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// A buffer comes next, in a message of its own.
    TakeBuffer,
    /// Read the file, whose descriptor comes with this, into the buffer.
    Read {
        /// The file's name, for people.
        name: String,
    },
    /// Write the buffer to the file, whose descriptor comes with this.
    Write {
        /// The file's name, for people.
        name: String,
    },
    /// All is done. A socket that closes without it means that the first process died.
    Finish,
}

/// Second process to first.
#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    /// The transfer is over.
    Done(Account),
    /// It failed.
    Failed(String),
}

/// A receipt, in a form that travels.
#[derive(Debug, Serialize, Deserialize)]
pub struct Account {
    pub path: String,
    pub reasons: Vec<Reason>,
    pub bytes: u64,
    pub host_bytes: u64,
}

/// Why not a better path.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Reason {
    pub path: String,
    pub code: String,
    pub evidence: String,
}

impl From<Receipt> for Account {
    fn from(receipt: Receipt) -> Account {
        let reasons = receipt.plan.reasons.iter().map(|reason| Reason {
            path: reason.path.to_string(),
            code: reason.code.to_string(),
            evidence: reason.evidence.clone(),
        });
        Account {
            path: receipt.plan.path.to_string(),
            reasons: reasons.collect(),
            bytes: receipt.bytes,
            host_bytes: receipt.host_bytes,
        }
    }
}
