//! Queue pairs of the type RC (reliable connection): connecting, posting, polling, stopping.

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

/// Part of a region, for local work. If it is empty, the card ignores the key.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Local {
    pub(crate) iova: u64,
    pub(crate) length: u32,
    pub(crate) key: u32,
}

/// A request to the local card.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    /// RDMA write to an address of the peer, with or without an immediate value.
    Write {
        to: u64,
        key: u32,
        immediate: Option<u32>,
    },
    /// RDMA read.
    Read { from: u64, key: u32 },
    /// Send, with or without an immediate value.
    Send { immediate: Option<u32> },
}

/// A completion.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) id: u64,
    /// `enum ibv_wc_status`
    pub(crate) status: i32,
    pub(crate) vendor: u32,
    /// Bytes that arrived, for a receive or a read.
    pub(crate) bytes: u32,
    pub(crate) immediate: Option<u32>,
}

/// The peer of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) gid: [u8; 16],
    /// The port's LID in its InfiniBand subnet; 0 on Ethernet.
    pub(crate) lid: u16,
    pub(crate) queue: u32,
    pub(crate) sequence: u32,
    /// `enum ibv_mtu`
    pub(crate) mtu: i32,
}

/// The route to the peer (`struct ibv_ah_attr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    /// The local port.
    pub(crate) port: u8,
    /// The index of the local GID in the port's table.
    pub(crate) source: u8,
    /// The LID of the next hop; 0 on Ethernet.
    pub(crate) lid: u16,
    /// Packets have a global route header with the peer's GID.
    pub(crate) is_global: bool,
}

/// A queue pair of type RC, with its own completion queue and channel.
///
/// # Invariants All three are live. Only the one [`QueuePair`] posts and polls, with `&mut self`, so from one
/// thread at a time. Any thread may change the state.
pub(crate) struct Pair {
    domain: Arc<Domain>,
    channel: NonNull<CompChannel>,
    cq: NonNull<Cq>,
    qp: NonNull<Qp>,
}

// SAFETY: nothing in it is tied to a thread.
unsafe impl Send for Pair {}
// SAFETY: methods with `&self` call `ibv_modify_qp`, which any thread may call (libibverbs and its providers
// do the locking), and read constant fields.
unsafe impl Sync for Pair {}

/// The exclusive right to post to a [`Pair`] and to poll it.
pub(crate) struct QueuePair {
    pair: Arc<Pair>,
}

impl QueuePair {
    /// Makes a queue pair at a port, with this many requests in each direction.
    pub(crate) fn new(domain: &Arc<Domain>, port: u8, depth: u32) -> Result<QueuePair, Errno> {
        let library = domain.library;
        let entries = c_int::try_from(depth.saturating_mul(2)).map_err(|_| Errno::INVAL)?;
        // SAFETY: the context is live, by `Domain`'s invariant.
        let channel = unsafe { (library.create_comp_channel)(domain.context.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(last)?;
        // SAFETY: the context is live, and the channel was just made.
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
            // SAFETY: this function made it, and nothing uses it.
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
            // SAFETY: this function made both, and nothing uses them.
            unsafe {
                (library.destroy_cq)(cq.as_ptr());
                (library.destroy_comp_channel)(channel.as_ptr());
            }
            return Err(errno);
        };
        // INVARIANT: all three were just made, and this is the only `QueuePair` for them.
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

    /// The shared part, by which other threads may stop it.
    pub(crate) fn pair(&self) -> &Arc<Pair> {
        &self.pair
    }

    /// The queue pair number, 24 bits.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the queue pair is live; the field does not change.
        unsafe { (*self.pair.qp.as_ptr()).qp_num }
    }

    /// Connects it: `RTR`, then `RTS`. `sequence` is its first packet sequence number.
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
                timeout: 18, // ACK timeout 1.07 s; gives up after about 7.5 s
                // Not 7: soft-RoCE then retries forever, and a dead peer goes unnoticed.
                retry_cnt: 6,
                rnr_retry: 7, // forever: the peer may not have posted a receive yet
                max_rd_atomic: 16,
                ..QpAttr::default()
            },
            // IBV_QP_STATE, TIMEOUT, RETRY_CNT, RNR_RETRY, MAX_QP_RD_ATOMIC, SQ_PSN
            1 << 0 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16,
        )
    }

    /// Posts a request. Its completion has this id.
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
        // SAFETY: the queue pair is live, and the functions in its context are the provider's. The call
        // copies the request.
        check(unsafe {
            let post = (*self.pair.domain.context.as_ptr()).ops.post_send;
            post(self.pair.qp.as_ptr(), &mut request, &mut bad)
        })
    }

    /// Posts a receive.
    pub(crate) fn post_receive(&mut self, id: u64, local: Local) -> Result<(), Errno> {
        let mut piece = sge(local);
        let mut request = RecvWr {
            wr_id: id,
            next: ptr::null_mut(),
            sg_list: &mut piece,
            num_sge: c_int::from(local.length != 0),
        };
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is live, and the functions in its context are the provider's. The call
        // copies the request.
        check(unsafe {
            let post = (*self.pair.domain.context.as_ptr()).ops.post_recv;
            post(self.pair.qp.as_ptr(), &mut request, &mut bad)
        })
    }

    /// The next completion, if there is one.
    pub(crate) fn poll(&mut self) -> Result<Option<Done>, Errno> {
        let mut done = Wc::default();
        // SAFETY: the completion queue is live, and there is room for the one requested completion.
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

    /// Requests an event at the next completion. A completion before this call causes none.
    pub(crate) fn arm(&mut self) -> Result<(), Errno> {
        // SAFETY: the completion queue is live.
        check(unsafe {
            let notify = (*self.pair.domain.context.as_ptr()).ops.req_notify_cq;
            notify(self.pair.cq.as_ptr(), 0)
        })
    }

    /// A descriptor that is readable when there is an event.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is live and keeps its descriptor open.
        unsafe { BorrowedFd::borrow_raw((*self.pair.channel.as_ptr()).fd) }
    }

    /// Takes one event, after [`QueuePair::events`] became readable.
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
        // SAFETY: the event belongs to this queue, and is acknowledged once.
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
        // SAFETY: the queue pair is live, and the struct is complete.
        check(unsafe { (self.domain.library.modify_qp)(self.qp.as_ptr(), &mut attributes, mask) })
    }

    /// Ends all work: posted requests complete as flushed.
    pub(crate) fn stop(&self) -> Result<(), Errno> {
        let attributes = QpAttr {
            qp_state: 6, // ERR
            ..QpAttr::default()
        };
        self.modify(attributes, 1 << 0)
    }

    /// Ends and forgets all work, local and remote. On return the card accesses no region of it, and nothing
    /// completes any more.
    pub(crate) fn forget(&self) -> Result<(), Errno> {
        // First, because requests that it flushes can still be polled.
        self.stop()?;
        // IBV_QPS_RESET. Soft-RoCE keeps the region of a partly received message until the reset;
        // deregistering it would wait for the rest of the message.
        self.modify(QpAttr::default(), 1 << 0)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if self.domain.is_inherited() {
            return;
        }
        let library = self.domain.library;
        // Destroying the queue pair stops the card.
        // SAFETY: this object owns all three, they are live, and the order keeps each until its users are
        // destroyed. All events are acknowledged, or destroying the completion queue would wait for them.
        unsafe {
            (library.destroy_qp)(self.qp.as_ptr());
            (library.destroy_cq)(self.cq.as_ptr());
            (library.destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}
