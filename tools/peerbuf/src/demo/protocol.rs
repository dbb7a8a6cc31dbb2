//! The messages between the two processes: JSON, one message each, with descriptors beside it.

use peerbuf::transfer::Receipt;
use serde::{Deserialize, Serialize};

/// The longest message. Evidence is a few hundred bytes.
pub const MAX_MESSAGE: usize = 64 << 10;

/// A message from the first process to the second.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// A buffer follows in a separate message.
    TakeBuffer,
    /// Read the file, whose descriptor is in this message, into the buffer.
    Read {
        /// The file's name, for messages.
        name: String,
    },
    /// Write the buffer to the file, whose descriptor is in this message.
    Write {
        /// The file's name, for messages.
        name: String,
    },
    /// All work is done. A socket that closes without this message means that the first process
    /// died.
    Finish,
}

/// A message from the second process to the first.
#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    /// The transfer is complete.
    Done(Account),
    /// The transfer failed.
    Failed(String),
}

/// A receipt in a serializable form.
#[derive(Debug, Serialize, Deserialize)]
pub struct Account {
    pub path: String,
    pub reasons: Vec<Reason>,
    pub bytes: u64,
    pub host_bytes: u64,
}

/// A reason against a better path.
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
