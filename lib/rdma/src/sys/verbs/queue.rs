//! Queue pairs of the reliable-connected kind: connecting one, posting requests to it, polling it,
//! and stopping it.

use std::ffi::c_int;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::abi::{
    AhAttr, CompChannel, Cq, QPT_RC, Qp, QpAttr, QpCap, QpInitAttr, REMOTE_READ, REMOTE_WRITE,
    RecvWr, SEND_SIGNALED, SendWr, Sge, WC_WITH_IMM, Wc,
};
use super::domain::Domain;
use super::library::{check, last};
use peerbuf::Errno;

/// Part of a region, for work of this end. Without bytes, no key is looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Local {
    pub(crate) iova: u64,
    pub(crate) length: u32,
    pub(crate) key: u32,
}

/// What this end asks its card to do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    /// RDMA write to an address of the other end's, with a number for it to see or without.
    Write {
        to: u64,
        key: u32,
        immediate: Option<u32>,
    },
    /// RDMA read.
    Read { from: u64, key: u32 },
    /// Send, with a number or without.
    Send { immediate: Option<u32> },
}

/// What became of one request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) id: u64,
    /// `enum ibv_wc_status`
    pub(crate) status: i32,
    pub(crate) vendor: u32,
    /// Bytes that arrived, of a receive or a read.
    pub(crate) bytes: u32,
    pub(crate) immediate: Option<u32>,
}

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) gid: [u8; 16],
    /// Its port's address in an InfiniBand subnet; 0 on Ethernet.
    pub(crate) lid: u16,
    pub(crate) queue: u32,
    pub(crate) sequence: u32,
    /// `enum ibv_mtu`
    pub(crate) mtu: i32,
}

/// How this end's packets get to the other (`struct ibv_ah_attr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    /// This end's port.
    pub(crate) port: u8,
    /// The place of this end's address in the port's table.
    pub(crate) source: u8,
    /// The LID of the next port on the way; 0 on Ethernet.
    pub(crate) lid: u16,
    /// Packets have a global header, with the other end's address in it.
    pub(crate) is_global: bool,
}

/// A queue pair of the reliable-connected kind, with a completion queue and channel of its own.
///
/// # Invariants
/// All three are live. Posting and polling are called by the one [`QueuePair`] only, with
/// `&mut self`, so from one thread at a time; changing the state from any.
pub(crate) struct Pair {
    domain: Arc<Domain>,
    channel: NonNull<CompChannel>,
    cq: NonNull<Cq>,
    qp: NonNull<Qp>,
}

// SAFETY: nothing in them is tied to a thread.
unsafe impl Send for Pair {}
// SAFETY: what is called with `&self` is `ibv_modify_qp`, which may be called from any thread
// (libibverbs and its providers lock what needs it), and reading fields that do not change.
unsafe impl Sync for Pair {}

/// The right to post to a [`Pair`] and to poll it.
pub(crate) struct QueuePair {
    pair: Arc<Pair>,
}

impl QueuePair {
    /// Makes one at a port, for so many requests in each direction.
    pub(crate) fn new(domain: &Arc<Domain>, port: u8, depth: u32) -> Result<QueuePair, Errno> {
        let library = domain.library;
        let entries = c_int::try_from(depth.saturating_mul(2)).map_err(|_| Errno::INVAL)?;
        // SAFETY: the context is live, by `Domain`'s invariant.
        let channel = unsafe { (library.create_comp_channel)(domain.context.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(last)?;
        // SAFETY: as above, and the channel was just made.
        let cq = unsafe {
            (library.create_cq)(
                domain.context.as_ptr(),
                entries,
                ptr::null_mut(),
                channel.as_ptr(),
                0,
            )
        };
        let Some(cq) = NonNull::new(cq) else {
            let errno = last();
            // SAFETY: ours, and nothing uses it.
            unsafe { (library.destroy_comp_channel)(channel.as_ptr()) };
            return Err(errno);
        };
        let mut wanted = QpInitAttr {
            qp_context: ptr::null_mut(),
            send_cq: cq.as_ptr(),
            recv_cq: cq.as_ptr(),
            srq: ptr::null_mut(),
            cap: QpCap {
                max_send_wr: depth,
                max_recv_wr: depth,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: the domain and the completion queue are live.
        let qp = unsafe { (library.create_qp)(domain.pd.as_ptr(), &mut wanted) };
        let Some(qp) = NonNull::new(qp) else {
            let errno = last();
            // SAFETY: ours, and nothing uses them.
            unsafe {
                (library.destroy_cq)(cq.as_ptr());
                (library.destroy_comp_channel)(channel.as_ptr());
            }
            return Err(errno);
        };
        // INVARIANT: just made, and there is one `QueuePair` for it.
        let pair = Pair {
            domain: Arc::clone(domain),
            channel,
            cq,
            qp,
        };
        let pair = QueuePair {
            pair: Arc::new(pair),
        };
        pair.pair.modify(
            QpAttr {
                qp_state: 1, // INIT
                port_num: port,
                qp_access_flags: REMOTE_WRITE | REMOTE_READ,
                ..QpAttr::default()
            },
            // IBV_QP_STATE, ACCESS_FLAGS, PKEY_INDEX, PORT
            1 << 0 | 1 << 3 | 1 << 4 | 1 << 5,
        )?;
        Ok(pair)
    }

    /// What other threads may stop it by.
    pub(crate) fn pair(&self) -> &Arc<Pair> {
        &self.pair
    }

    /// Its number, 24 bits.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: live; the field does not change.
        unsafe { (*self.pair.qp.as_ptr()).qp_num }
    }

    /// Connects it: `RTR`, then `RTS`. `sequence` is the number of its first packet.
    pub(crate) fn connect(&self, peer: &Peer, route: Route, sequence: u32) -> Result<(), Errno> {
        let route = AhAttr {
            dgid: bytemuck::cast(peer.gid),
            sgid_index: route.source,
            hop_limit: 64,
            dlid: route.lid,
            is_global: route.is_global.into(),
            port_num: route.port,
            ..AhAttr::default()
        };
        self.pair.modify(
            QpAttr {
                qp_state: 2, // RTR
                path_mtu: peer.mtu,
                dest_qp_num: peer.queue,
                rq_psn: peer.sequence,
                max_dest_rd_atomic: 16,
                min_rnr_timer: 12, // 0.64 ms
                ah_attr: route,
                ..QpAttr::default()
            },
            // IBV_QP_STATE, AV, PATH_MTU, RQ_PSN, MIN_RNR_TIMER, MAX_DEST_RD_ATOMIC, DEST_QPN
            1 << 0 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20,
        )?;
        self.pair.modify(
            QpAttr {
                qp_state: 3, // RTS
                sq_psn: sequence,
                timeout: 18, // 1.07 s, of which there are seven
                // Not 7, which is for ever with soft-RoCE: nobody would hear of a peer that is gone.
                retry_cnt: 6,
                rnr_retry: 7, // for ever: the other end has not posted a receive yet
                max_rd_atomic: 16,
                ..QpAttr::default()
            },
            // IBV_QP_STATE, TIMEOUT, RETRY_CNT, RNR_RETRY, MAX_QP_RD_ATOMIC, SQ_PSN
            1 << 0 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16,
        )
    }

    /// Posts a request of this end. Its completion has the id.
    pub(crate) fn post(&mut self, id: u64, local: Local, verb: Verb) -> Result<(), Errno> {
        let mut piece = sge(local);
        // enum ibv_wr_opcode
        let (opcode, remote_addr, rkey, immediate) = match verb {
            Verb::Write {
                to,
                key,
                immediate: None,
            } => (0, to, key, None),
            Verb::Write { to, key, immediate } => (1, to, key, immediate),
            Verb::Send { immediate: None } => (2, 0, 0, None),
            Verb::Send { immediate } => (3, 0, 0, immediate),
            Verb::Read { from, key } => (4, from, key, None),
        };
        let mut request = SendWr {
            wr_id: id,
            next: ptr::null_mut(),
            sg_list: &mut piece,
            num_sge: c_int::from(local.length != 0),
            opcode,
            send_flags: SEND_SIGNALED,
            imm_data: immediate.unwrap_or(0).to_be(),
            remote_addr,
            rkey,
            unused: [0; 9],
        };
        let mut bad = ptr::null_mut();
        // SAFETY: the pair is live, and its context's functions are the provider's. The request is
        // copied during the call.
        check(unsafe {
            let post = (*self.pair.domain.context.as_ptr()).ops.post_send;
            post(self.pair.qp.as_ptr(), &mut request, &mut bad)
        })
    }

    /// Posts room for what the other end sends.
    pub(crate) fn post_receive(&mut self, id: u64, local: Local) -> Result<(), Errno> {
        let mut piece = sge(local);
        let mut request = RecvWr {
            wr_id: id,
            next: ptr::null_mut(),
            sg_list: &mut piece,
            num_sge: c_int::from(local.length != 0),
        };
        let mut bad = ptr::null_mut();
        // SAFETY: as in `post`.
        check(unsafe {
            let post = (*self.pair.domain.context.as_ptr()).ops.post_recv;
            post(self.pair.qp.as_ptr(), &mut request, &mut bad)
        })
    }

    /// What has been done and was not told yet, one request.
    pub(crate) fn poll(&mut self) -> Result<Option<Done>, Errno> {
        let mut done = Wc::default();
        // SAFETY: the queue is live, and there is room for the one completion that is asked for.
        let count = unsafe {
            let poll = (*self.pair.domain.context.as_ptr()).ops.poll_cq;
            poll(self.pair.cq.as_ptr(), 1, &mut done)
        };
        match count {
            0 => Ok(None),
            1 => Ok(Some(Done {
                id: done.wr_id,
                status: done.status,
                vendor: done.vendor_err,
                bytes: done.byte_len,
                immediate: (done.wc_flags & WC_WITH_IMM != 0).then(|| u32::from_be(done.imm_data)),
            })),
            error => Err(Errno(error.abs())),
        }
    }

    /// Asks for an event at the next completion. One that comes before this call makes none.
    pub(crate) fn arm(&mut self) -> Result<(), Errno> {
        // SAFETY: the queue is live.
        check(unsafe {
            let notify = (*self.pair.domain.context.as_ptr()).ops.req_notify_cq;
            notify(self.pair.cq.as_ptr(), 0)
        })
    }

    /// Readable when there is an event.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is live and keeps its descriptor open.
        unsafe { BorrowedFd::borrow_raw((*self.pair.channel.as_ptr()).fd) }
    }

    /// Takes one event, once [`QueuePair::events`] is readable.
    pub(crate) fn take_event(&mut self) -> Result<(), Errno> {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is live.
        check(unsafe {
            (self.pair.domain.library.get_cq_event)(
                self.pair.channel.as_ptr(),
                &mut cq,
                &mut context,
            )
        })?;
        // SAFETY: it is the queue's event, which is acknowledged once.
        unsafe { (self.pair.domain.library.ack_cq_events)(cq, 1) };
        Ok(())
    }
}

fn sge(local: Local) -> Sge {
    Sge {
        addr: local.iova,
        length: local.length,
        lkey: local.key,
    }
}

impl Pair {
    fn modify(&self, mut attributes: QpAttr, mask: c_int) -> Result<(), Errno> {
        // SAFETY: the pair is live, and the struct is whole.
        check(unsafe { (self.domain.library.modify_qp)(self.qp.as_ptr(), &mut attributes, mask) })
    }

    /// Ends all work: what is posted completes as flushed.
    pub(crate) fn stop(&self) -> Result<(), Errno> {
        let attributes = QpAttr {
            qp_state: 6, // ERR
            ..QpAttr::default()
        };
        self.modify(attributes, 1 << 0)
    }

    /// Ends all work, of both ends, and forgets it: when this returns the card is done with every
    /// region, and nothing more completes.
    pub(crate) fn forget(&self) -> Result<(), Errno> {
        // First, since what is flushed by it can still be polled.
        self.stop()?;
        // IBV_QPS_RESET. Soft-RoCE keeps the region of a message of which only a part has come until
        // then, and deregistering it would wait for the rest.
        self.modify(QpAttr::default(), 1 << 0)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let library = self.domain.library;
        // The card has stopped when the pair is destroyed.
        // SAFETY: ours, live, and in this order nothing uses what is destroyed; events are all
        // acknowledged, for which destroying a queue would wait.
        unsafe {
            (library.destroy_qp)(self.qp.as_ptr());
            (library.destroy_cq)(self.cq.as_ptr());
            (library.destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}
