//! A request of a connection as its owner sees it: its number, its operation and its result.

use std::fmt;

use peerbuf::error::BufferError;

/// Identifies a request of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[doc(alias = "wr_id")]
pub struct WorkId(pub(crate) u64);

impl WorkId {
    /// Later requests of a connection have higher numbers.
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// The operation of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// An RDMA write.
    Write,
    /// An RDMA read.
    Read,
    /// A send.
    Send,
    /// A receive: room for the peer's send, or for the immediate value of a write.
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

/// The status of a completion (`enum ibv_wc_status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(alias = "ibv_wc_status")]
pub struct Status(pub(crate) i32);

impl Status {
    /// The card completed the request.
    pub const SUCCESS: Status = Status(0);
    /// The local memory was not accessible: the registration is gone or was revoked.
    pub const LOCAL_PROTECTION: Status = Status(4);
    /// The request was flushed, because an earlier one failed or the connection was stopped. Soft-RoCE
    /// reports it for all requests if its own network interface sends no packets.
    pub const FLUSHED: Status = Status(5);
    /// The remote memory was not accessible: wrong key, range or access, or a registration that is gone or
    /// was revoked.
    pub const REMOTE_ACCESS: Status = Status(10);
    /// The peer does not answer.
    pub const UNANSWERED: Status = Status(12);

    /// The name in `infiniband/verbs.h`, without `IBV_WC_`; `None` for an unknown number.
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
                "the local memory is not registered for this access, or its registration ended"
            }
            Status::FLUSHED => {
                "an earlier request failed, the connection was stopped, or the card's network is down"
            }
            Status::REMOTE_ACCESS => {
                "the peer's memory is not registered for this access, or its registration ended"
            }
            Status::UNANSWERED => "the peer does not answer",
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

/// A failed request. Unless only a [copy](WorkError::copy) failed, the connection is unusable, and all later
/// requests fail, too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation}: {}", what(.status, *.cut_off, .copy.as_ref()))]
#[non_exhaustive]
pub struct WorkError {
    /// The operation.
    pub operation: Operation,
    /// The card's status.
    pub status: Status,
    /// The vendor's own error code.
    pub vendor: u32,
    /// The request was in flight when its registration was ended
    /// ([`Registration::end`](crate::Registration::end)), because the buffer had to be given back. The
    /// request itself was valid.
    pub cut_off: bool,
    /// The card did its part ([`Status::SUCCESS`]), but the CPU could not copy the bytes from the staging
    /// memory to the buffer. The bytes are lost. The connection stays usable.
    pub copy: Option<BufferError>,
}

fn what(status: &Status, cut_off: bool, copy: Option<&BufferError>) -> String {
    match copy {
        Some(error) => {
            format!("the bytes arrived, but the copy into the buffer failed: {error}")
        }
        None if cut_off => format!("{status}; the connection was stopped to return the buffer"),
        None => status.to_string(),
    }
}

/// A completed request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[doc(alias = "ibv_wc")]
pub struct Completion {
    /// The request.
    pub id: WorkId,
    /// The operation.
    pub operation: Operation,
    /// The number of bytes. A failed request may have transferred some of its bytes.
    pub result: Result<u64, WorkError>,
    /// The immediate value that came with it.
    pub immediate: Option<u32>,
    /// The number of bytes that the local CPU copied for it.
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
