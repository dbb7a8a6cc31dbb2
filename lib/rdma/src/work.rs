//! One request of a connection, as its owner is told of it: its number, what it was, and what became
//! of it.

use std::fmt;

use peerbuf::error::BufferError;

/// Names one request of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[doc(alias = "wr_id")]
pub struct WorkId(pub(crate) u64);

impl WorkId {
    /// Later requests of a connection have higher ones.
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// What a request was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// An RDMA write.
    Write,
    /// An RDMA read.
    Read,
    /// A send.
    Send,
    /// Room for what the other end sends, or for the number that comes with a write.
    Receive,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Operation::Write => "RDMA write",
            Operation::Read => "RDMA read",
            Operation::Send => "send",
            Operation::Receive => "receive",
        })
    }
}

/// What a card says of a request that failed (`enum ibv_wc_status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(alias = "ibv_wc_status")]
pub struct Status(pub(crate) i32);

impl Status {
    /// The card did it.
    pub const SUCCESS: Status = Status(0);
    /// This end's own memory was not there: the registration is gone or was revoked.
    pub const LOCAL_PROTECTION: Status = Status(4);
    /// It was given up, because an earlier one failed or the connection was stopped. Soft-RoCE also
    /// says so, of all, when its own network interface takes no packets.
    pub const FLUSHED: Status = Status(5);
    /// The other end's memory was not there, or not for this: a wrong key or range, or a
    /// registration that is gone or was revoked.
    pub const REMOTE_ACCESS: Status = Status(10);
    /// The other end does not answer.
    pub const UNANSWERED: Status = Status(12);

    /// Its name in `infiniband/verbs.h`, without `IBV_WC_`; `None` for a number without one.
    pub fn name(self) -> Option<&'static str> {
        const NAMES: [&str; 24] = [
            "SUCCESS",
            "LOC_LEN_ERR",
            "LOC_QP_OP_ERR",
            "LOC_EEC_OP_ERR",
            "LOC_PROT_ERR",
            "WR_FLUSH_ERR",
            "MW_BIND_ERR",
            "BAD_RESP_ERR",
            "LOC_ACCESS_ERR",
            "REM_INV_REQ_ERR",
            "REM_ACCESS_ERR",
            "REM_OP_ERR",
            "RETRY_EXC_ERR",
            "RNR_RETRY_EXC_ERR",
            "LOC_RDD_VIOL_ERR",
            "REM_INV_RD_REQ_ERR",
            "REM_ABORT_ERR",
            "INV_EECN_ERR",
            "INV_EEC_STATE_ERR",
            "FATAL_ERR",
            "RESP_TIMEOUT_ERR",
            "GENERAL_ERR",
            "TM_ERR",
            "TM_RNDV_INCOMPLETE",
        ];
        NAMES.get(usize::try_from(self.0).ok()?).copied()
    }

    fn meaning(self) -> &'static str {
        match self {
            Status::LOCAL_PROTECTION => {
                "this end's memory is not registered for it, or was taken away"
            }
            Status::FLUSHED => {
                "an earlier request failed, the connection was stopped, or the card's network is down"
            }
            Status::REMOTE_ACCESS => {
                "the other end's memory is not registered for it, or was taken away"
            }
            Status::UNANSWERED => "the other end does not answer",
            _ => "see ibv_poll_cq(3)",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "IBV_WC_{name} ({})", self.meaning()),
            None => write!(f, "status {}", self.0),
        }
    }
}

/// A request that failed. Unless only a [copy](WorkError::copy) did, the connection is of no use any more, and
/// whatever was posted after it fails too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation}: {}", what(.status, *.cut_off, .copy.as_ref()))]
#[non_exhaustive]
pub struct WorkError {
    /// What it was.
    pub operation: Operation,
    /// What the card says.
    pub status: Status,
    /// The card's own code for it, for its maker.
    pub vendor: u32,
    /// It was in flight when the registration was ended
    /// ([`Registration::end`](crate::Registration::end)): this end's buffer had to be
    /// given back. Nothing is wrong with the request itself.
    pub cut_off: bool,
    /// The card did its part ([`Status::SUCCESS`]), and the processor could not copy the bytes from the staging
    /// memory into the buffer. They are lost. Only this request failed: the connection works on.
    pub copy: Option<BufferError>,
}

fn what(status: &Status, cut_off: bool, copy: Option<&BufferError>) -> String {
    match copy {
        Some(error) => {
            format!("the bytes arrived, and could not be copied into the buffer: {error}")
        }
        None if cut_off => format!("{status}; the buffer had to be given back meanwhile"),
        None => status.to_string(),
    }
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[doc(alias = "ibv_wc")]
pub struct Completion {
    /// Which.
    pub id: WorkId,
    /// What it was.
    pub operation: Operation,
    /// The bytes of it. Of a failed one an unknown part has arrived.
    pub result: Result<u64, WorkError>,
    /// The number that came with it.
    pub immediate: Option<u32>,
    /// Bytes that the processor copied for it on this end.
    pub host_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_has_the_name_that_people_search_for() {
        assert_eq!(Status::REMOTE_ACCESS.name(), Some("REM_ACCESS_ERR"));
        assert_eq!(Status::LOCAL_PROTECTION.name(), Some("LOC_PROT_ERR"));
        assert_eq!(Status::FLUSHED.name(), Some("WR_FLUSH_ERR"));
        assert_eq!(Status::UNANSWERED.name(), Some("RETRY_EXC_ERR"));
        assert_eq!(Status(24).name(), None);
        assert_eq!(Status(-1).name(), None);
    }
}
