//! Queries of the EFA device, and what this device does not offer.

use libc::{c_int, c_void};

use super::device::{RECEIVE_MAX, SEND_MAX};
use super::fail;
use crate::abi::efadv as e;
use crate::abi::verbs as v;
use crate::config::Config;
use crate::engine::source::RDMA_BYTES_MAX;
use crate::queue::work::{INLINE_BYTES_MAX, RECEIVE_SGE_MAX, SEND_SGE_MAX};

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_efadv_query_device(
    _context: *mut v::ibv_context,
    attr: *mut e::efadv_device_attr,
    length: u32,
) -> c_int {
    let Some(config) = Config::get() else { return libc::ENODEV };
    let mut caps = e::EFADV_DEVICE_ATTR_CAPS_RDMA_READ
        | e::EFADV_DEVICE_ATTR_CAPS_RNR_RETRY
        | e::EFADV_DEVICE_ATTR_CAPS_CQ_WITH_SGID;
    if config.topology.rdma_write {
        caps |= e::EFADV_DEVICE_ATTR_CAPS_RDMA_WRITE | e::EFADV_DEVICE_ATTR_CAPS_UNSOLICITED_WRITE_RECV;
    }
    let answer = e::efadv_device_attr {
        comp_mask: 0,
        max_sq_wr: SEND_MAX,
        max_rq_wr: RECEIVE_MAX,
        max_sq_sge: SEND_SGE_MAX as u16,
        max_rq_sge: RECEIVE_SGE_MAX as u16,
        inline_buf_size: INLINE_BYTES_MAX as u16,
        inline_buf_size_ex: INLINE_BYTES_MAX as u16,
        device_caps: caps,
        max_rdma_size: RDMA_BYTES_MAX as u32,
    };
    // SAFETY: the caller's struct has `length` bytes.
    unsafe { super::copy_prefix(&answer, attr, length as usize) };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_efadv_get_max_sq_depth(
    _context: *mut v::ibv_context,
    _attr: *mut c_void,
    _len: u32,
) -> c_int {
    SEND_MAX as c_int
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_efadv_get_max_rq_depth(
    _context: *mut v::ibv_context,
    _attr: *mut c_void,
    _len: u32,
) -> c_int {
    (RECEIVE_MAX / RECEIVE_SGE_MAX as u32) as c_int
}

/// Functions that answer that they are not offered.
macro_rules! not_offered {
    ($($name:ident),* $(,)?) => {
        $(#[unsafe(no_mangle)]
        pub extern "C" fn $name() -> c_int {
            libc::EOPNOTSUPP
        })*
    };
}

// The queues' memory: without it libfabric uses the functions of verbs, which is what softefa implements.
not_offered!(softefa_efadv_query_cq, softefa_efadv_query_qp_wqs, softefa_efadv_query_mr);
// Completion counters.
not_offered!(
    softefa__ibv_query_comp_cntr_caps,
    softefa_ibv_destroy_comp_cntr,
    softefa_ibv_inc_comp_cntr,
    softefa_ibv_inc_err_comp_cntr,
    softefa_ibv_qp_attach_comp_cntr,
    softefa_ibv_read_comp_cntr,
    softefa_ibv_read_err_comp_cntr,
    softefa_ibv_set_comp_cntr,
    softefa_ibv_set_err_comp_cntr,
);

#[unsafe(no_mangle)]
pub extern "C" fn softefa_efadv_create_comp_cntr() -> *mut c_void {
    fail(libc::EOPNOTSUPP)
}
