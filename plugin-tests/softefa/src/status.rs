//! EFA completion statuses and what verbs calls them.

use crate::abi::verbs as v;

/// `efa_io_comp_status` of the EFA device interface; libfabric shows the number as `prov_errno`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u8);

impl Status {
    /// Done.
    pub const OK: Self = Self(0);
    /// Ended by the end of its queue pair or device.
    pub const FLUSHED: Self = Self(1);
    /// The operation is not one the device offers.
    pub const UNSUPPORTED_OP: Self = Self(3);
    /// The local registration is missing, too small or lacks the right.
    pub const INVALID_LKEY: Self = Self(5);
    /// Longer than the device allows.
    pub const BAD_LENGTH: Self = Self(6);
    /// The remote registration is missing, too small or lacks the right.
    pub const REMOTE_BAD_ADDRESS: Self = Self(7);
    /// The remote queue pair does not exist, is not ready or has another key.
    pub const REMOTE_BAD_QPN: Self = Self(9);
    /// The receiver has no receive posted.
    pub const REMOTE_RNR: Self = Self(10);
    /// The posted receive is too short.
    pub const REMOTE_BAD_LENGTH: Self = Self(11);
    /// A remote that once answered does not any more.
    pub const UNRESPONSIVE_REMOTE: Self = Self(13);
    /// The remote has no address handle for the sender; needed for RDMA.
    pub const REMOTE_UNKNOWN_PEER: Self = Self(14);
    /// A remote that never answered.
    pub const UNREACHABLE_REMOTE: Self = Self(15);

    /// The `ibv_wc_status` under which rdma-core's efa reports it.
    pub fn verbs(self) -> u32 {
        match self.0 {
            0 => v::IBV_WC_SUCCESS,
            1 => v::IBV_WC_WR_FLUSH_ERR,
            2..=4 => v::IBV_WC_LOC_QP_OP_ERR,
            5 => v::IBV_WC_LOC_PROT_ERR,
            6 => v::IBV_WC_LOC_LEN_ERR,
            7 => v::IBV_WC_REM_ACCESS_ERR,
            8 => v::IBV_WC_REM_ABORT_ERR,
            9 => v::IBV_WC_REM_INV_RD_REQ_ERR,
            10 => v::IBV_WC_RNR_RETRY_EXC_ERR,
            11 => v::IBV_WC_REM_INV_REQ_ERR,
            12 => v::IBV_WC_BAD_RESP_ERR,
            13 | 15 => v::IBV_WC_RESP_TIMEOUT_ERR,
            14 => v::IBV_WC_REM_OP_ERR,
            _ => v::IBV_WC_GENERAL_ERR,
        }
    }
}

/// What a work request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// A message into a posted receive.
    Send = 0,
    /// An RDMA write, perhaps with immediate data.
    Write = 1,
    /// An RDMA read.
    Read = 2,
}

impl Op {
    /// The operation of this number, from a message or a trace.
    pub fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            0 => Some(Self::Send),
            1 => Some(Self::Write),
            2 => Some(Self::Read),
            _ => None,
        }
    }
}
