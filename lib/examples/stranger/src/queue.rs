//! A reliable connection with sideway: nothing in it knows of peerbuf.

use std::error::Error;
use std::io::{Read, Write};
use std::sync::Arc;

use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::address::{AddressHandleAttribute, Gid};
use sideway::ibverbs::completion::{
    BasicCompletionQueue, GenericCompletionQueue, WorkCompletionStatus,
};
use sideway::ibverbs::device::{DeviceInfo, DeviceList};
use sideway::ibverbs::device_context::Mtu;
use sideway::ibverbs::protection_domain::ProtectionDomain;
use sideway::ibverbs::queue_pair::{
    BasicQueuePair, PostSendGuard, QueuePair, QueuePairAttribute, QueuePairState,
    SetScatterGatherEntry, WorkRequestFlags,
};

const PORT: u8 = 1;
/// `IBV_MTU_1024`
const MTU: u8 = 3;
const FIRST_PACKET: u32 = 0x1234;

/// A connection to whoever is at the other end of the stream.
pub struct Queue {
    pair: BasicQueuePair,
    completions: Arc<BasicCompletionQueue>,
}

/// Opens a card and connects over the stream: each end tells its GID, the number of its queue pair and of its first
/// packet, and the code of its MTU, in 32 bytes.
pub fn open(
    card: &str,
    peer: &mut (impl Read + Write),
) -> Result<(Arc<ProtectionDomain>, Queue), Box<dyn Error>> {
    let devices = DeviceList::new()?;
    let device = devices.iter().find(|device| device.name() == card);
    let context = device.ok_or("there is no such card")?.open()?;
    let domain = context.alloc_pd()?;
    let completions = context.create_cq_builder().setup_cqe(4).build()?;
    let handle = GenericCompletionQueue::from(Arc::clone(&completions));
    let mut pair = domain
        .create_qp_builder()
        .setup_send_cq(handle.clone())
        .setup_recv_cq(handle)
        .setup_max_send_wr(1)
        .setup_max_recv_wr(1)
        .build()?;
    let mut init = QueuePairAttribute::new();
    init.setup_state(QueuePairState::Init)
        .setup_pkey_index(0)
        .setup_port(PORT)
        .setup_access_flags(AccessFlags::LocalWrite);
    pair.modify(&init)?;

    // The address that routes, of IPv4.
    let gids = context.query_gid_table()?;
    let is_ipv4 = |gid: &Gid| gid.raw[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    let own = gids.iter().rfind(|entry| is_ipv4(&entry.gid()));
    let own = own.ok_or("the card has no address")?;
    let mut ours = [0; 32];
    ours[..16].copy_from_slice(&own.gid().raw);
    ours[16..20].copy_from_slice(&pair.qp_number().to_be_bytes());
    ours[20..24].copy_from_slice(&FIRST_PACKET.to_be_bytes());
    ours[24] = MTU;
    peer.write_all(&ours)?;
    let mut theirs = [0; 32];
    peer.read_exact(&mut theirs)?;
    let word = |at: usize| {
        u32::from_be_bytes([theirs[at], theirs[at + 1], theirs[at + 2], theirs[at + 3]])
    };
    let mut gid = Gid::default();
    gid.raw.copy_from_slice(&theirs[..16]);

    let mut route = AddressHandleAttribute::new();
    route
        .setup_dest_lid(0)
        .setup_port(PORT)
        .setup_service_level(0)
        .setup_grh_src_gid_index(own.gid_index().try_into()?)
        .setup_grh_dest_gid(&gid)
        .setup_grh_hop_limit(64);
    let mut receive = QueuePairAttribute::new();
    receive
        .setup_state(QueuePairState::ReadyToReceive)
        .setup_path_mtu(Mtu::Mtu1024)
        .setup_dest_qp_num(word(16))
        .setup_rq_psn(word(20))
        .setup_max_dest_read_atomic(0)
        .setup_min_rnr_timer(12)
        .setup_address_vector(&route);
    pair.modify(&receive)?;
    let mut send = QueuePairAttribute::new();
    send.setup_state(QueuePairState::ReadyToSend)
        .setup_sq_psn(FIRST_PACKET)
        .setup_timeout(18)
        .setup_retry_cnt(6)
        .setup_rnr_retry(7)
        .setup_max_read_atomic(0);
    pair.modify(&send)?;
    Ok((domain, Queue { pair, completions }))
}

impl Queue {
    /// Sends memory of a region of the domain, and waits until the other end has it.
    pub fn send(&mut self, address: u64, length: u32, lkey: u32) -> Result<(), Box<dyn Error>> {
        let mut guard = self.pair.start_post_send();
        let request = guard
            .construct_wr(1, WorkRequestFlags::Signaled)
            .setup_send();
        // SAFETY: the caller's region has these bytes until this returns.
        unsafe { request.setup_sge(lkey, address, length) };
        guard.post()?;
        loop {
            let Ok(mut poller) = self.completions.start_poll() else {
                std::thread::yield_now();
                continue;
            };
            if let Some(done) = poller.next() {
                return match done.status() {
                    status if status == WorkCompletionStatus::Success as u32 => Ok(()),
                    status => Err(format!("the card says {status}").into()),
                };
            }
        }
    }
}
