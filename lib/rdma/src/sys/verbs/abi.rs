//! The structures and constants of `infiniband/verbs.h`, with C layout, and the offsets of their fields. This
//! module calls no function of the library.

use std::ffi::{c_int, c_uint, c_void};

/// `IBV_ACCESS_LOCAL_WRITE`
pub(crate) const LOCAL_WRITE: u32 = 1;
/// `IBV_ACCESS_REMOTE_WRITE`
pub(crate) const REMOTE_WRITE: u32 = 1 << 1;
/// `IBV_ACCESS_REMOTE_READ`
pub(crate) const REMOTE_READ: u32 = 1 << 2;

/// `IBV_SEND_SIGNALED`
pub(super) const SEND_SIGNALED: c_uint = 1 << 1;
/// `IBV_QPT_RC`
pub(super) const QPT_RC: c_int = 2;
/// `IBV_GID_TYPE_ROCE_V2`
pub(crate) const GID_ROCE_V2: u32 = 2;
/// `IBV_WC_WITH_IMM`
pub(super) const WC_WITH_IMM: c_uint = 1 << 1;
/// `IBV_LINK_LAYER_INFINIBAND`
const LINK_LAYER_INFINIBAND: u8 = 1;

/// `struct ibv_context_ops`: function pointers, most of them obsolete.
#[repr(C)]
pub(super) struct ContextOps {
    unused_0: [*const c_void; 11],
    pub(super) poll_cq: unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int,
    pub(super) req_notify_cq: unsafe extern "C" fn(*mut Cq, c_int) -> c_int,
    unused_1: [*const c_void; 12],
    pub(super) post_send: unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int,
    pub(super) post_recv: unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int,
    unused_2: [*const c_void; 5],
}

/// The first fields of `struct ibv_context`, which only the library makes.
#[repr(C)]
pub(super) struct Context {
    pub(super) device: *mut c_void,
    pub(super) ops: ContextOps,
    pub(super) cmd_fd: c_int,
    async_fd: c_int,
}

/// `struct ibv_pd`
#[repr(C)]
pub(super) struct Pd {
    pub(super) context: *mut Context,
    pub(super) handle: u32,
}

/// `struct ibv_mr`
#[repr(C)]
pub(super) struct Mr {
    context: *mut Context,
    pd: *mut Pd,
    addr: *mut c_void,
    length: usize,
    handle: u32,
    pub(super) lkey: u32,
    pub(super) rkey: u32,
}

/// The first fields of `struct ibv_comp_channel`.
#[repr(C)]
pub(super) struct CompChannel {
    context: *mut Context,
    pub(super) fd: c_int,
}

/// The first fields of `struct ibv_cq`.
#[repr(C)]
pub(super) struct Cq {
    context: *mut Context,
}

/// The first fields of `struct ibv_qp`.
#[repr(C)]
pub(super) struct Qp {
    context: *mut Context,
    qp_context: *mut c_void,
    pd: *mut Pd,
    send_cq: *mut Cq,
    recv_cq: *mut Cq,
    srq: *mut c_void,
    handle: u32,
    pub(super) qp_num: u32,
}

/// `struct ibv_sge`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sge {
    pub(super) addr: u64,
    pub(super) length: u32,
    pub(super) lkey: u32,
}

/// `struct ibv_send_wr`, with the union members of a reliable connection.
#[repr(C)]
pub(super) struct SendWr {
    pub(super) wr_id: u64,
    pub(super) next: *mut SendWr,
    pub(super) sg_list: *mut Sge,
    pub(super) num_sge: c_int,
    pub(super) opcode: c_int,
    pub(super) send_flags: c_uint,
    pub(super) imm_data: u32,
    pub(super) remote_addr: u64,
    pub(super) rkey: u32,
    pub(super) unused: [u64; 9],
}

/// `struct ibv_recv_wr`
#[repr(C)]
pub(super) struct RecvWr {
    pub(super) wr_id: u64,
    pub(super) next: *mut RecvWr,
    pub(super) sg_list: *mut Sge,
    pub(super) num_sge: c_int,
}

/// `struct ibv_wc`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wc {
    pub(super) wr_id: u64,
    pub(super) status: c_int,
    opcode: c_int,
    pub(super) vendor_err: u32,
    pub(super) byte_len: u32,
    pub(super) imm_data: u32,
    qp_num: u32,
    src_qp: u32,
    pub(super) wc_flags: c_uint,
    pkey_index: u16,
    slid: u16,
    sl: u8,
    dlid_path_bits: u8,
}

/// `struct ibv_qp_cap`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct QpCap {
    pub(super) max_send_wr: u32,
    pub(super) max_recv_wr: u32,
    pub(super) max_send_sge: u32,
    pub(super) max_recv_sge: u32,
    pub(super) max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`
#[repr(C)]
pub(super) struct QpInitAttr {
    pub(super) qp_context: *mut c_void,
    pub(super) send_cq: *mut Cq,
    pub(super) recv_cq: *mut Cq,
    pub(super) srq: *mut c_void,
    pub(super) cap: QpCap,
    pub(super) qp_type: c_int,
    pub(super) sq_sig_all: c_int,
}

/// `struct ibv_ah_attr`, preceded by `struct ibv_global_route`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct AhAttr {
    /// `union ibv_gid`, with the alignment of its integers.
    pub(super) dgid: [u64; 2],
    pub(super) flow_label: u32,
    pub(super) sgid_index: u8,
    pub(super) hop_limit: u8,
    pub(super) traffic_class: u8,
    pub(super) dlid: u16,
    pub(super) sl: u8,
    pub(super) src_path_bits: u8,
    pub(super) static_rate: u8,
    pub(super) is_global: u8,
    pub(super) port_num: u8,
}

/// `struct ibv_qp_attr`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct QpAttr {
    pub(super) qp_state: c_int,
    pub(super) cur_qp_state: c_int,
    pub(super) path_mtu: c_int,
    pub(super) path_mig_state: c_int,
    pub(super) qkey: u32,
    pub(super) rq_psn: u32,
    pub(super) sq_psn: u32,
    pub(super) dest_qp_num: u32,
    pub(super) qp_access_flags: c_uint,
    pub(super) cap: QpCap,
    pub(super) ah_attr: AhAttr,
    pub(super) alt_ah_attr: AhAttr,
    pub(super) pkey_index: u16,
    pub(super) alt_pkey_index: u16,
    pub(super) en_sqd_async_notify: u8,
    pub(super) sq_draining: u8,
    pub(super) max_rd_atomic: u8,
    pub(super) max_dest_rd_atomic: u8,
    pub(super) min_rnr_timer: u8,
    pub(super) port_num: u8,
    pub(super) timeout: u8,
    pub(super) retry_cnt: u8,
    pub(super) rnr_retry: u8,
    pub(super) alt_port_num: u8,
    pub(super) alt_timeout: u8,
    pub(super) rate_limit: u32,
}

/// `struct ibv_gid_entry`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct GidEntry {
    gid: [u64; 2],
    index: u32,
    port: u32,
    kind: u32,
    interface: u32,
}

impl GidEntry {
    /// The GID in network byte order.
    pub(crate) fn gid(&self) -> [u8; 16] {
        bytemuck::cast(self.gid)
    }

    /// The index in the port's table.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// `enum ibv_gid_type`
    pub(crate) fn kind(&self) -> u32 {
        self.kind
    }

    pub(crate) fn is_of(&self, port: u8) -> bool {
        self.port == u32::from(port)
    }

    /// An entry for tests.
    #[cfg(test)]
    pub(crate) fn made_up(gid: [u8; 16], index: u32, port: u32, kind: u32) -> GidEntry {
        GidEntry {
            gid: bytemuck::cast(gid),
            index,
            port,
            kind,
            interface: 0,
        }
    }
}

/// The first fields of `struct ibv_port_attr`; `ibv_query_port` fills in only those.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PortAttr {
    state: c_int,
    max_mtu: c_int,
    active_mtu: c_int,
    gid_tbl_len: c_int,
    port_cap_flags: u32,
    max_msg_sz: u32,
    bad_pkey_cntr: u32,
    qkey_viol_cntr: u32,
    pkey_tbl_len: u16,
    lid: u16,
    sm_lid: u16,
    lmc: u8,
    max_vl_num: u8,
    sm_sl: u8,
    subnet_timeout: u8,
    init_type_reply: u8,
    active_width: u8,
    active_speed: u8,
    phys_state: u8,
    link_layer: u8,
    flags: u8,
    rest: [u32; 4],
}

impl PortAttr {
    /// `IBV_PORT_ACTIVE`: the port carries packets.
    pub(crate) fn is_active(&self) -> bool {
        self.state == 4
    }

    /// `enum ibv_mtu`
    pub(crate) fn mtu(&self) -> i32 {
        self.active_mtu
    }

    /// The port's LID in its InfiniBand subnet; 0 on Ethernet, and before a subnet manager has assigned one.
    pub(crate) fn lid(&self) -> u16 {
        self.lid
    }

    pub(crate) fn is_infiniband(&self) -> bool {
        self.link_layer == LINK_LAYER_INFINIBAND
    }

    /// Attributes for tests.
    #[cfg(test)]
    pub(crate) fn made_up(is_active: bool, is_infiniband: bool, lid: u16) -> PortAttr {
        PortAttr {
            state: if is_active { 4 } else { 1 },
            active_mtu: 3,
            lid,
            link_layer: if is_infiniband { 1 } else { 2 },
            ..PortAttr::default()
        }
    }
}

/// Name and offset of each public field, for the test that compares them with the header.
pub(crate) fn layout() -> Vec<(&'static str, usize)> {
    macro_rules! offsets {
        ($($rust:ident $c:literal { $($field:ident),* })*) => {
            vec![$(
                $((concat!($c, ".", stringify!($field)), std::mem::offset_of!($rust, $field)),)*
            )*]
        };
    }
    let mut all = offsets! {
        ContextOps "ibv_context_ops" { poll_cq, req_notify_cq, post_send, post_recv }
        Context "ibv_context" { device, ops, cmd_fd, async_fd }
        Pd "ibv_pd" { context, handle }
        Mr "ibv_mr" { addr, length, handle, lkey, rkey }
        CompChannel "ibv_comp_channel" { fd }
        Qp "ibv_qp" { handle, qp_num }
        Sge "ibv_sge" { addr, length, lkey }
        SendWr "ibv_send_wr" { wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data }
        RecvWr "ibv_recv_wr" { wr_id, next, sg_list, num_sge }
        Wc "ibv_wc" { wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp,
                      wc_flags, pkey_index, slid, sl, dlid_path_bits }
        QpCap "ibv_qp_cap" { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge,
                             max_inline_data }
        QpInitAttr "ibv_qp_init_attr" { qp_context, send_cq, recv_cq, srq, cap, qp_type,
                                        sq_sig_all }
        AhAttr "ibv_ah_attr" { dlid, sl, src_path_bits, static_rate, is_global, port_num }
        QpAttr "ibv_qp_attr" { qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn,
                               sq_psn, dest_qp_num, qp_access_flags, cap, ah_attr, alt_ah_attr,
                               pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining,
                               max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num,
                               timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout,
                               rate_limit }
        GidEntry "ibv_gid_entry" { gid }
        PortAttr "ibv_port_attr" { state, max_mtu, active_mtu, gid_tbl_len, lid, sm_lid, lmc, sm_sl, phys_state,
                                   link_layer, flags }
    };
    // Fields that have another name here, or are in a nested structure.
    all.extend([
        (
            "ibv_send_wr.wr.rdma.remote_addr",
            std::mem::offset_of!(SendWr, remote_addr),
        ),
        (
            "ibv_send_wr.wr.rdma.rkey",
            std::mem::offset_of!(SendWr, rkey),
        ),
        ("ibv_ah_attr.grh.dgid", std::mem::offset_of!(AhAttr, dgid)),
        (
            "ibv_ah_attr.grh.flow_label",
            std::mem::offset_of!(AhAttr, flow_label),
        ),
        (
            "ibv_ah_attr.grh.sgid_index",
            std::mem::offset_of!(AhAttr, sgid_index),
        ),
        (
            "ibv_ah_attr.grh.hop_limit",
            std::mem::offset_of!(AhAttr, hop_limit),
        ),
        (
            "ibv_ah_attr.grh.traffic_class",
            std::mem::offset_of!(AhAttr, traffic_class),
        ),
        (
            "ibv_gid_entry.gid_index",
            std::mem::offset_of!(GidEntry, index),
        ),
        (
            "ibv_gid_entry.port_num",
            std::mem::offset_of!(GidEntry, port),
        ),
        (
            "ibv_gid_entry.gid_type",
            std::mem::offset_of!(GidEntry, kind),
        ),
        (
            "ibv_gid_entry.ndev_ifindex",
            std::mem::offset_of!(GidEntry, interface),
        ),
        ("sizeof ibv_sge", size_of::<Sge>()),
        ("sizeof ibv_send_wr", size_of::<SendWr>()),
        ("sizeof ibv_recv_wr", size_of::<RecvWr>()),
        ("sizeof ibv_wc", size_of::<Wc>()),
        ("sizeof ibv_qp_init_attr", size_of::<QpInitAttr>()),
        ("sizeof ibv_ah_attr", size_of::<AhAttr>()),
        ("sizeof ibv_qp_attr", size_of::<QpAttr>()),
        ("sizeof ibv_gid_entry", size_of::<GidEntry>()),
    ]);
    all
}
