//! Queue pairs and posting.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use libc::{c_int, c_void, size_t};

use super::cq::Queue;
use super::device::{Context, RECEIVE_MAX, SEND_MAX};
use super::fail;
use super::memory::AddressHandle;
use crate::abi::efadv::{
    EFADV_QP_DRIVER_TYPE_SRD, EFADV_QP_FLAGS_UNSOLICITED_WRITE_RECV, efadv_qp, efadv_qp_init_attr,
};
use crate::abi::verbs as v;
use crate::engine::Engine;
use crate::queue::qp::{Attributes, Batch, QueuePair};
use crate::queue::work::{INLINE_BYTES_MAX, RECEIVE_SGE_MAX, Receive, SEND_SGE_MAX, WorkRequest};
use crate::status::Op;
use crate::trace::{Event, Record};

/// A queue pair as callers see it.
#[repr(C)]
pub struct Pair {
    verbs: v::ibv_qp_ex,
    efa: efadv_qp,
    qp: Arc<QueuePair>,
}

/// The queue pair behind a caller's pointer.
///
/// # Safety
/// `pair` is the caller's object.
unsafe fn inner<'a, T>(pair: *mut T) -> &'a Arc<QueuePair> {
    // SAFETY: the foreign struct is the first field of a `Pair`; `qp` does not change while the pair lives.
    unsafe { &(*pair.cast::<Pair>()).qp }
}

/// Makes an SRD queue pair.
unsafe fn create(
    context: *mut v::ibv_context,
    attr: &v::ibv_qp_init_attr_ex,
    pd: *mut v::ibv_pd,
    unsolicited: bool,
) -> *mut v::ibv_qp {
    let Some(engine) = Engine::get() else { return fail(libc::ENODEV) };
    if attr.cap.max_send_wr > SEND_MAX || attr.cap.max_recv_wr > RECEIVE_MAX {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller's objects.
    let (index, pd_number) = unsafe { (Context::of(context).index, (*pd).handle) };
    // SAFETY: the caller's objects are the first fields of `Queue`s.
    let queue = |queue: *mut v::ibv_cq| unsafe { Arc::clone(&(*queue.cast::<Queue>()).queue) };
    let mut state = engine.lock();
    let number = state.device(index).and_then(|device| device.table.allocate(engine.me));
    let Some(number) = number else { return fail(libc::ENOMEM) };
    let qp = Arc::new(QueuePair::new(Attributes {
        number,
        device: index,
        pd: pd_number,
        unsolicited,
        send_max: attr.cap.max_send_wr.max(1),
        receive_max: attr.cap.max_recv_wr.max(1),
        send_cq: queue(attr.send_cq),
        receive_cq: queue(attr.recv_cq),
    }));
    state.add_queue_pair(&qp);
    drop(state);
    qp.note(Event::Create, Record::default());
    let base = v::ibv_qp {
        context,
        qp_context: attr.qp_context,
        pd,
        send_cq: attr.send_cq,
        recv_cq: attr.recv_cq,
        srq: std::ptr::null_mut(),
        handle: number,
        qp_num: number,
        state: v::IBV_QPS_RESET,
        qp_type: attr.qp_type,
        mutex: libc::PTHREAD_MUTEX_INITIALIZER,
        cond: libc::PTHREAD_COND_INITIALIZER,
        events_completed: 0,
    };
    let verbs = v::ibv_qp_ex {
        qp_base: base,
        comp_mask: 0,
        wr_id: 0,
        wr_flags: 0,
        unused_atomics_and_windows: [None; 4],
        wr_rdma_read,
        wr_rdma_write,
        wr_rdma_write_imm,
        wr_send,
        wr_send_imm,
        unused_inv_and_tso: [None; 2],
        wr_set_ud_addr,
        unused_xrc: None,
        wr_set_inline_data,
        wr_set_inline_data_list,
        wr_set_sge,
        wr_set_sge_list,
        wr_start,
        wr_complete,
        wr_abort,
        unused_atomic_write_and_flush: [None; 2],
    };
    let efa = efadv_qp { comp_mask: 0, wr_set_processing_hints };
    Box::into_raw(Box::new(Pair { verbs, efa, qp })).cast()
}

unsafe extern "C" fn wr_set_processing_hints(_qp: *mut efadv_qp, _hints: u32) {}

/// Only SRD is offered: datagrams (UD) carry a 40-byte header that nothing here writes.
pub(super) unsafe extern "C" fn create_qp_ex(
    _context: *mut v::ibv_context,
    _attr: *mut v::ibv_qp_init_attr_ex,
) -> *mut v::ibv_qp {
    fail(libc::EOPNOTSUPP)
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_create_qp(_pd: *mut v::ibv_pd, _attr: *mut c_void) -> *mut v::ibv_qp {
    fail(libc::EOPNOTSUPP)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_efadv_create_qp_ex(
    context: *mut v::ibv_context,
    attr: *mut v::ibv_qp_init_attr_ex,
    efa: *mut efadv_qp_init_attr,
    length: u32,
) -> *mut v::ibv_qp {
    // SAFETY: the caller's struct.
    let attr = unsafe { &*attr };
    let has_flags = length as usize >= std::mem::offset_of!(efadv_qp_init_attr, wr_flags);
    // SAFETY: the caller's struct has `length` bytes, of which the driver type is part in all versions.
    let (kind, flags) = unsafe { ((*efa).driver_qp_type, if has_flags { (*efa).flags } else { 0 }) };
    if attr.qp_type != v::IBV_QPT_DRIVER || kind != EFADV_QP_DRIVER_TYPE_SRD {
        return fail(libc::EOPNOTSUPP);
    }
    // SAFETY: the contract is the same.
    unsafe { create(context, attr, attr.pd, flags & EFADV_QP_FLAGS_UNSOLICITED_WRITE_RECV != 0) }
}

/// The old way, which has no flags.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_efadv_create_driver_qp(
    pd: *mut v::ibv_pd,
    attr: *mut v::ibv_qp_init_attr_ex,
    kind: u32,
) -> *mut v::ibv_qp {
    if kind != EFADV_QP_DRIVER_TYPE_SRD {
        return fail(libc::EOPNOTSUPP);
    }
    // SAFETY: `ibv_qp_init_attr` is the first part of the extended struct, and nothing beyond it is read.
    unsafe { create((*pd).context, &*attr, pd, false) }
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_qp_to_qp_ex(qp: *mut v::ibv_qp) -> *mut v::ibv_qp_ex {
    qp.cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_efadv_qp_from_ibv_qp_ex(qp: *mut v::ibv_qp_ex) -> *mut efadv_qp {
    // SAFETY: the caller's object is the first field of a `Pair`; only an address is taken.
    unsafe { &raw mut (*qp.cast::<Pair>()).efa }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_modify_qp(
    pair: *mut v::ibv_qp,
    attr: *mut v::ibv_qp_attr,
    mask: c_int,
) -> c_int {
    // SAFETY: the caller's objects; modifying is not done by two threads at once.
    let (qp, attr) = unsafe { (inner(pair), &*attr) };
    if mask & v::IBV_QP_QKEY != 0 {
        qp.qkey.store(attr.qkey, Ordering::Release);
    }
    if mask & v::IBV_QP_RNR_RETRY != 0 {
        qp.rnr_retry.store(u32::from(attr.rnr_retry), Ordering::Release);
    }
    if mask & v::IBV_QP_STATE != 0 {
        qp.state.store(attr.qp_state, Ordering::Release);
        // SAFETY: as above.
        unsafe { (*pair).state = attr.qp_state };
    }
    0
}

/// Data of a message may land in any order.
#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_query_qp_data_in_order(_qp: *mut v::ibv_qp, _op: u32, _flags: u32) -> c_int {
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_destroy_qp(pair: *mut v::ibv_qp) -> c_int {
    // SAFETY: the caller's object, made by `create` and not used after this.
    let pair = unsafe { Box::from_raw(pair.cast::<Pair>()) };
    pair.qp.note(Event::Destroy, Record::default());
    if let Some(engine) = Engine::get() {
        engine.lock().remove_queue_pair(&pair.qp);
    }
    0
}

/// The plain way of posting, which no EFA program uses.
pub(super) unsafe extern "C" fn post_send(
    _qp: *mut v::ibv_qp,
    wr: *mut c_void,
    bad: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { bad.write(wr) };
    libc::EOPNOTSUPP
}

pub(super) unsafe extern "C" fn post_recv(
    pair: *mut v::ibv_qp,
    first: *mut v::ibv_recv_wr,
    bad: *mut *mut v::ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller's object.
    let qp = unsafe { inner(pair) };
    let mut next = first;
    while !next.is_null() {
        // SAFETY: the caller's list.
        let wr = unsafe { &*next };
        let count = wr.num_sge.max(0) as usize;
        let result = if count > RECEIVE_SGE_MAX || qp.state.load(Ordering::Acquire) == v::IBV_QPS_RESET {
            libc::EINVAL
        } else {
            let mut receive = Receive { id: wr.wr_id, sge_count: count, ..Receive::default() };
            for (index, sge) in receive.sges[..count].iter_mut().enumerate() {
                // SAFETY: the caller's array has `num_sge` elements.
                *sge = unsafe { *wr.sg_list.add(index) };
            }
            qp.note(
                Event::PostRecv,
                Record { id: receive.id, length: receive.length(), ..Record::default() },
            );
            if qp.post_receive(receive) { 0 } else { libc::ENOMEM }
        };
        if result != 0 {
            // SAFETY: the caller's pointer.
            unsafe { bad.write(next) };
            return result;
        }
        next = wr.next;
    }
    0
}

unsafe extern "C" fn wr_start(pair: *mut v::ibv_qp_ex) {
    // SAFETY: the caller's object.
    let qp = unsafe { inner(pair) };
    qp.start_batch();
    qp.note(Event::Start, Record::default());
}

unsafe extern "C" fn wr_abort(pair: *mut v::ibv_qp_ex) {
    // SAFETY: the caller's object, after `wr_start`.
    let qp = unsafe { inner(pair) };
    qp.with_batch(|batch| *batch = Batch { error: libc::ECANCELED, ..Batch::default() });
    let _ = qp.finish_batch();
    qp.note(Event::Abort, Record::default());
}

unsafe extern "C" fn wr_complete(pair: *mut v::ibv_qp_ex) -> c_int {
    // SAFETY: the caller's object, after `wr_start`.
    let qp = unsafe { inner(pair) };
    match qp.finish_batch() {
        Ok(requests) => {
            qp.note(Event::Ring, Record { extra: requests.len() as u32, ..Record::default() });
            if let Some(engine) = Engine::get() {
                engine.post(qp, requests);
            }
            0
        }
        Err(error) => {
            qp.note(Event::Full, Record { extra: error as u32, ..Record::default() });
            error
        }
    }
}

/// Adds a request to the open batch.
unsafe fn add(pair: *mut v::ibv_qp_ex, op: Op, fill: impl FnOnce(&mut WorkRequest)) {
    // SAFETY: the caller's object, after `wr_start`.
    let (qp, id) = unsafe { (inner(pair), (*pair).wr_id) };
    qp.with_batch(|batch| {
        if batch.error == 0 && !qp.ready_to_send() {
            batch.error = libc::EINVAL;
        }
        if batch.error == 0 && !qp.has_send_room(batch) {
            batch.error = libc::ENOMEM;
        }
        let mut request = WorkRequest::new(op, id);
        fill(&mut request);
        let extra = request.immediate.unwrap_or_default();
        qp.note(Event::Post, Record { op: op as u8, id, extra, ..Record::default() });
        if batch.error == 0 {
            batch.requests.push(request);
        }
    });
}

/// Works on the request that was added last.
unsafe fn last(pair: *mut v::ibv_qp_ex, fill: impl FnOnce(&mut WorkRequest) -> Result<(), c_int>) {
    // SAFETY: the caller's object, after `wr_start`.
    let qp = unsafe { inner(pair) };
    qp.with_batch(|batch| {
        if batch.error != 0 {
            return;
        }
        let result = batch.requests.last_mut().map_or(Err(libc::EINVAL), fill);
        if let Err(error) = result {
            batch.error = error;
        }
    });
}

unsafe extern "C" fn wr_send(pair: *mut v::ibv_qp_ex) {
    // SAFETY: the contract of the posting functions.
    unsafe { add(pair, Op::Send, |_| ()) };
}

unsafe extern "C" fn wr_send_imm(pair: *mut v::ibv_qp_ex, immediate: u32) {
    // SAFETY: the contract of the posting functions.
    unsafe { add(pair, Op::Send, |request| request.immediate = Some(immediate)) };
}

unsafe extern "C" fn wr_rdma_write(pair: *mut v::ibv_qp_ex, rkey: u32, address: u64) {
    // SAFETY: the contract of the posting functions.
    unsafe { add(pair, Op::Write, |request| (request.rkey, request.remote_address) = (rkey, address)) };
}

unsafe extern "C" fn wr_rdma_write_imm(pair: *mut v::ibv_qp_ex, rkey: u32, address: u64, immediate: u32) {
    let fill = |request: &mut WorkRequest| {
        (request.rkey, request.remote_address, request.immediate) = (rkey, address, Some(immediate));
    };
    // SAFETY: the contract of the posting functions.
    unsafe { add(pair, Op::Write, fill) };
}

unsafe extern "C" fn wr_rdma_read(pair: *mut v::ibv_qp_ex, rkey: u32, address: u64) {
    // SAFETY: the contract of the posting functions.
    unsafe { add(pair, Op::Read, |request| (request.rkey, request.remote_address) = (rkey, address)) };
}

unsafe extern "C" fn wr_set_ud_addr(pair: *mut v::ibv_qp_ex, ah: *mut v::ibv_ah, qpn: u32, qkey: u32) {
    // SAFETY: the caller's object is the first field of an `AddressHandle`.
    let gid = unsafe { (*ah.cast::<AddressHandle>()).gid };
    let fill = |request: &mut WorkRequest| {
        (request.destination, request.qpn, request.qkey) = (Some(gid), qpn, qkey);
        Ok(())
    };
    // SAFETY: the contract of the posting functions.
    unsafe { last(pair, fill) };
}

unsafe extern "C" fn wr_set_sge(pair: *mut v::ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    let sge = v::ibv_sge { addr, length, lkey };
    // SAFETY: the contract is the same; the list is on this stack.
    unsafe { wr_set_sge_list(pair, 1, &raw const sge) };
}

unsafe extern "C" fn wr_set_sge_list(pair: *mut v::ibv_qp_ex, count: size_t, list: *const v::ibv_sge) {
    let fill = |request: &mut WorkRequest| {
        // EFA: two pieces in a send, one in RDMA.
        let limit = if request.op == Op::Send { SEND_SGE_MAX } else { 1 };
        if count > limit {
            return Err(libc::EINVAL);
        }
        for (index, sge) in request.sges[..count].iter_mut().enumerate() {
            // SAFETY: the caller's array has `count` elements.
            *sge = unsafe { *list.add(index) };
        }
        request.sge_count = count;
        Ok(())
    };
    // SAFETY: the contract of the posting functions.
    unsafe { last(pair, fill) };
}

unsafe extern "C" fn wr_set_inline_data(pair: *mut v::ibv_qp_ex, address: *mut c_void, length: size_t) {
    let buffer = v::ibv_data_buf { addr: address.cast(), length };
    // SAFETY: the contract is the same; the list is on this stack.
    unsafe { wr_set_inline_data_list(pair, 1, &raw const buffer) };
}

unsafe extern "C" fn wr_set_inline_data_list(
    pair: *mut v::ibv_qp_ex,
    count: size_t,
    list: *const v::ibv_data_buf,
) {
    let fill = |request: &mut WorkRequest| {
        let (mut bytes, mut filled) = ([0_u8; INLINE_BYTES_MAX], 0);
        for index in 0..count {
            // SAFETY: the caller's array has `count` elements.
            let buffer = unsafe { &*list.add(index) };
            if request.op != Op::Send || filled + buffer.length > INLINE_BYTES_MAX {
                return Err(libc::EINVAL);
            }
            // SAFETY: the caller's buffer has `length` bytes, and so many are left in `bytes`.
            unsafe { buffer.addr.copy_to_nonoverlapping(bytes[filled..].as_mut_ptr(), buffer.length) };
            filled += buffer.length;
        }
        request.inline = Some((bytes, filled));
        Ok(())
    };
    // SAFETY: the contract of the posting functions.
    unsafe { last(pair, fill) };
}
