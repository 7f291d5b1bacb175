//! Work requests: what callers post.

use crate::abi::verbs::{ibv_gid, ibv_sge};
use crate::status::Op;

/// Pieces of memory in a send work request.
pub const SEND_SGE_MAX: usize = 2;
/// Pieces of memory in a receive work request.
pub const RECEIVE_SGE_MAX: usize = 3;
/// Bytes that a work request may carry in itself.
pub const INLINE_BYTES_MAX: usize = 32;

/// A work request on a send queue.
#[derive(Clone, Debug)]
pub struct WorkRequest {
    /// What to do.
    pub op: Op,
    /// The caller's word, given back in the completion.
    pub id: u64,
    /// Immediate data, in network order.
    pub immediate: Option<u32>,
    /// Remote key, for RDMA.
    pub rkey: u32,
    /// Remote address, for RDMA.
    pub remote_address: u64,
    /// Device to send to; `None` until `wr_set_ud_addr`.
    pub destination: Option<ibv_gid>,
    /// Queue pair to send to.
    pub qpn: u32,
    /// Key of that queue pair.
    pub qkey: u32,
    /// Local memory; only the first `sge_count` count.
    pub sges: [ibv_sge; SEND_SGE_MAX],
    /// See `sges`.
    pub sge_count: usize,
    /// Bytes carried in the request, in place of local memory.
    pub inline: Option<([u8; INLINE_BYTES_MAX], usize)>,
}

impl WorkRequest {
    /// A request without address and data.
    pub fn new(op: Op, id: u64) -> Self {
        Self {
            op,
            id,
            immediate: None,
            rkey: 0,
            remote_address: 0,
            destination: None,
            qpn: 0,
            qkey: 0,
            sges: [ibv_sge::default(); SEND_SGE_MAX],
            sge_count: 0,
            inline: None,
        }
    }

    /// Bytes to move.
    pub fn length(&self) -> u64 {
        match self.inline {
            Some((_, length)) => length as u64,
            None => self.sges[..self.sge_count].iter().map(|sge| u64::from(sge.length)).sum(),
        }
    }
}

/// A posted receive.
#[derive(Clone, Copy, Debug, Default)]
pub struct Receive {
    /// The caller's word.
    pub id: u64,
    /// Memory; only the first `sge_count` count.
    pub sges: [ibv_sge; RECEIVE_SGE_MAX],
    /// See `sges`.
    pub sge_count: usize,
}

impl Receive {
    /// Bytes that fit.
    pub fn length(&self) -> u64 {
        self.sges[..self.sge_count].iter().map(|sge| u64::from(sge.length)).sum()
    }
}
