//! Completion queues and channels.

use std::sync::Arc;

use libc::{c_int, c_void};

use super::{fail, set_errno};
use crate::abi::efadv::{efadv_cq, efadv_cq_init_attr};
use crate::abi::verbs as v;
use crate::engine::Engine;
use crate::memory::NO_ADDRESS_HANDLE;
use crate::queue::cq::{Completion, CompletionQueue, ENTRIES_MAX, EventPipe};
use crate::status::{Op, Status};
use crate::trace::{self, Event, Record};

/// A completion channel as callers see it.
#[repr(C)]
pub struct Channel {
    verbs: v::ibv_comp_channel,
    pipe: Arc<EventPipe>,
}

/// A completion queue as callers see it.
#[repr(C)]
pub struct Queue {
    verbs: v::ibv_cq_ex,
    efa: efadv_cq,
    /// The queue.
    pub queue: Arc<CompletionQueue>,
    /// The entry under the reader; only its holder of `polling` touches it.
    current: Option<Completion>,
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_create_comp_channel(context: *mut v::ibv_context) -> *mut v::ibv_comp_channel {
    match EventPipe::new() {
        Ok(pipe) => {
            let verbs = v::ibv_comp_channel { context, fd: pipe.fd(), refcnt: 0 };
            Box::into_raw(Box::new(Channel { verbs, pipe: Arc::new(pipe) })).cast()
        }
        Err(error) => fail(error.raw_os_error().unwrap_or(libc::EMFILE)),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_destroy_comp_channel(channel: *mut v::ibv_comp_channel) -> c_int {
    // SAFETY: the caller's object, made by `softefa_ibv_create_comp_channel` and not used after this.
    unsafe { drop(Box::from_raw(channel.cast::<Channel>())) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_get_cq_event(
    channel: *mut v::ibv_comp_channel,
    queue: *mut *mut v::ibv_cq,
    context: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller's object.
    let pipe = unsafe { Arc::clone(&(*channel.cast::<Channel>()).pipe) };
    match pipe.take() {
        Ok(cookie) => {
            let found = cookie as *mut v::ibv_cq;
            // SAFETY: the cookie is the queue's address, and callers destroy a queue only after taking its events.
            unsafe {
                queue.write(found);
                context.write((*found).cq_context);
            }
            0
        }
        Err(error) => {
            set_errno(error.raw_os_error().unwrap_or(libc::EIO));
            -1
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_ack_cq_events(_queue: *mut v::ibv_cq, _events: u32) {}

/// A queue for `entries`; more than the device has is EINVAL.
fn create(
    context: *mut v::ibv_context,
    entries: u32,
    cq_context: *mut c_void,
    channel: *mut v::ibv_comp_channel,
) -> *mut Queue {
    if entries > ENTRIES_MAX {
        return fail(libc::EINVAL);
    }
    let pipe = if channel.is_null() {
        None
    } else {
        // SAFETY: the caller's object.
        Some(unsafe { Arc::clone(&(*channel.cast::<Channel>()).pipe) })
    };
    let base = v::ibv_cq {
        context,
        channel,
        cq_context,
        handle: 0,
        cqe: entries as c_int,
        mutex: libc::PTHREAD_MUTEX_INITIALIZER,
        cond: libc::PTHREAD_COND_INITIALIZER,
        comp_events_completed: 0,
        async_events_completed: 0,
    };
    let verbs = v::ibv_cq_ex {
        base,
        comp_mask: 0,
        status: 0,
        wr_id: 0,
        start_poll,
        next_poll,
        end_poll,
        read_opcode,
        read_vendor_err,
        read_byte_len,
        read_imm_data,
        read_qp_num,
        read_src_qp,
        read_wc_flags,
        read_slid,
        read_sl: read_zero,
        read_dlid_path_bits: read_zero,
        unused_timestamps_and_tags: [None; 5],
    };
    let efa = efadv_cq { comp_mask: 0, wc_read_sgid, wc_is_unsolicited };
    let queue = Arc::new(CompletionQueue::new(entries, pipe));
    let handle = Box::into_raw(Box::new(Queue { verbs, efa, queue, current: None }));
    // SAFETY: just made, and nobody else has it yet.
    unsafe { (*handle).queue.set_cookie(handle as u64) };
    handle
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_create_cq(
    context: *mut v::ibv_context,
    entries: c_int,
    cq_context: *mut c_void,
    channel: *mut v::ibv_comp_channel,
    _vector: c_int,
) -> *mut v::ibv_cq {
    create(context, entries.max(1) as u32, cq_context, channel).cast()
}

pub(super) unsafe extern "C" fn create_cq_ex(
    context: *mut v::ibv_context,
    attr: *mut v::ibv_cq_init_attr_ex,
) -> *mut v::ibv_cq_ex {
    // SAFETY: the caller's struct.
    let attr = unsafe { &*attr };
    create(context, attr.cqe, attr.cq_context, attr.channel).cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_efadv_create_cq(
    context: *mut v::ibv_context,
    attr: *mut v::ibv_cq_init_attr_ex,
    efa: *mut efadv_cq_init_attr,
    length: u32,
) -> *mut v::ibv_cq_ex {
    let has_flags = length as usize >= std::mem::offset_of!(efadv_cq_init_attr, ext_mem_buffer);
    // SAFETY: the caller's struct has `length` bytes; the first two fields are in all versions of it.
    let (mask, flags) = unsafe { ((*efa).comp_mask, if has_flags { (*efa).flags } else { 0 }) };
    if mask != 0 {
        return fail(libc::EINVAL);
    }
    if flags != 0 {
        // A queue in the caller's own memory.
        return fail(libc::EOPNOTSUPP);
    }
    // SAFETY: the contract is the same.
    unsafe { create_cq_ex(context, attr) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_efadv_cq_from_ibv_cq_ex(queue: *mut v::ibv_cq_ex) -> *mut efadv_cq {
    // SAFETY: the caller's object is the first field of a `Queue`; only an address is taken.
    unsafe { &raw mut (*queue.cast::<Queue>()).efa }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_destroy_cq(queue: *mut v::ibv_cq) -> c_int {
    // SAFETY: the caller's object, made by `create` and not used after this.
    unsafe { drop(Box::from_raw(queue.cast::<Queue>())) };
    0
}

pub(super) unsafe extern "C" fn req_notify_cq(queue: *mut v::ibv_cq, _solicited_only: c_int) -> c_int {
    // SAFETY: the caller's object; many threads may be here, so only a shared reference to the inner queue is made.
    let queue = unsafe { Arc::clone(&(*queue.cast::<Queue>()).queue) };
    queue.arm();
    if let Some(engine) = Engine::get() {
        engine.expect_sleep();
    }
    0
}

/// The plain way of polling, which no EFA program uses.
pub(super) unsafe extern "C" fn poll_cq(_queue: *mut v::ibv_cq, _entries: c_int, _wc: *mut c_void) -> c_int {
    -libc::EOPNOTSUPP
}

/// Takes the next entry to be the current one.
///
/// # Safety
/// `queue` is the caller's object and the caller holds `polling`.
unsafe fn advance(queue: *mut v::ibv_cq_ex) -> c_int {
    // SAFETY: the holder of `polling` is alone with `current`, `status` and `wr_id`.
    let handle = unsafe { &mut *queue.cast::<Queue>() };
    let Some(completion) = handle.queue.pop() else { return libc::ENOENT };
    if completion.receive {
        if !completion.unsolicited {
            completion.qp.release_receive();
        }
    } else {
        completion.qp.release_send();
    }
    completion.note(Event::Poll);
    handle.verbs.status = completion.status.verbs();
    handle.verbs.wr_id = completion.id;
    handle.current = Some(completion);
    0
}

unsafe extern "C" fn start_poll(queue: *mut v::ibv_cq_ex, attr: *mut v::ibv_poll_cq_attr) -> c_int {
    // SAFETY: the caller's objects. Until `polling` is held, only the shared inner queue is touched.
    let (inner, mask) = unsafe { (Arc::clone(&(*queue.cast::<Queue>()).queue), (*attr).comp_mask) };
    if mask != 0 {
        return libc::EINVAL;
    }
    if !inner.polling.try_lock() {
        trace::note(Event::TwoPollers, Record::default());
        inner.polling.lock();
    }
    // SAFETY: `polling` is held.
    let mut result = unsafe { advance(queue) };
    if result == libc::ENOENT {
        if let Some(engine) = Engine::get() {
            engine.poll();
        }
        // SAFETY: as above.
        result = unsafe { advance(queue) };
    }
    if result != 0 {
        inner.polling.unlock();
    }
    result
}

unsafe extern "C" fn next_poll(queue: *mut v::ibv_cq_ex) -> c_int {
    // SAFETY: callers are between `start_poll` and `end_poll`.
    unsafe { advance(queue) }
}

unsafe extern "C" fn end_poll(queue: *mut v::ibv_cq_ex) {
    // SAFETY: the caller's object; callers are between `start_poll` and this.
    let handle = unsafe { &mut *queue.cast::<Queue>() };
    handle.current = None;
    handle.queue.polling.unlock();
}

/// Looks at the current entry.
///
/// # Safety
/// `queue` is the caller's object, between `start_poll` and `end_poll`.
unsafe fn current<R: Default>(queue: *mut v::ibv_cq_ex, look: impl FnOnce(&Completion) -> R) -> R {
    // SAFETY: the caller holds `polling`, so nobody changes the entry.
    unsafe { (*queue.cast::<Queue>()).current.as_ref() }.map_or_else(R::default, look)
}

unsafe extern "C" fn read_opcode(queue: *mut v::ibv_cq_ex) -> u32 {
    let opcode = |completion: &Completion| match (completion.receive, completion.op) {
        (true, Op::Write) => v::IBV_WC_RECV_RDMA_WITH_IMM,
        (true, _) => v::IBV_WC_RECV,
        (false, Op::Write) => v::IBV_WC_RDMA_WRITE,
        // rdma-core's efa reports a read so, too.
        (false, Op::Send | Op::Read) => v::IBV_WC_SEND,
    };
    // SAFETY: the contract of the reading functions.
    unsafe { current(queue, opcode) }
}

unsafe extern "C" fn read_vendor_err(queue: *mut v::ibv_cq_ex) -> u32 {
    // SAFETY: the contract of the reading functions.
    unsafe { current(queue, |completion| u32::from(completion.status.0)) }
}

unsafe extern "C" fn read_byte_len(queue: *mut v::ibv_cq_ex) -> u32 {
    // SAFETY: the contract of the reading functions.
    unsafe { current(queue, |completion| completion.length) }
}

unsafe extern "C" fn read_imm_data(queue: *mut v::ibv_cq_ex) -> u32 {
    // SAFETY: the contract of the reading functions.
    unsafe { current(queue, |completion| completion.immediate.unwrap_or_default()) }
}

unsafe extern "C" fn read_qp_num(queue: *mut v::ibv_cq_ex) -> u32 {
    // SAFETY: the contract of the reading functions.
    unsafe { current(queue, |completion| completion.qp.attributes.number) }
}

unsafe extern "C" fn read_src_qp(queue: *mut v::ibv_cq_ex) -> u32 {
    // SAFETY: the contract of the reading functions.
    unsafe { current(queue, |completion| completion.source_qpn) }
}

unsafe extern "C" fn read_wc_flags(queue: *mut v::ibv_cq_ex) -> u32 {
    let flags = |completion: &Completion| if completion.immediate.is_some() { v::IBV_WC_WITH_IMM } else { 0 };
    // SAFETY: the contract of the reading functions.
    unsafe { current(queue, flags) }
}

unsafe extern "C" fn read_slid(queue: *mut v::ibv_cq_ex) -> u32 {
    // SAFETY: the contract of the reading functions.
    unsafe { current(queue, |completion| u32::from(completion.address_handle)) }
}

unsafe extern "C" fn read_zero(_queue: *mut v::ibv_cq_ex) -> u8 {
    0
}

/// The queue around its efadv part.
unsafe fn around(efa: *mut efadv_cq) -> *mut v::ibv_cq_ex {
    // SAFETY: the caller's object is the `efa` field of a `Queue`.
    unsafe { efa.byte_sub(std::mem::offset_of!(Queue, efa)).cast() }
}

unsafe extern "C" fn wc_read_sgid(efa: *mut efadv_cq, gid: *mut v::ibv_gid) -> c_int {
    let unknown = |completion: &Completion| {
        let wanted = completion.address_handle == NO_ADDRESS_HANDLE && completion.status == Status::OK;
        wanted.then_some(completion.source)
    };
    // SAFETY: the contract of the reading functions.
    let Some(source) = (unsafe { current(around(efa), unknown) }) else { return -libc::ENOENT };
    // SAFETY: the caller's union, which may be less aligned than `ibv_gid` says.
    unsafe { gid.cast::<[u8; 16]>().write(source.raw) };
    0
}

unsafe extern "C" fn wc_is_unsolicited(efa: *mut efadv_cq) -> bool {
    // SAFETY: the contract of the reading functions.
    unsafe { current(around(efa), |completion| completion.receive && completion.unsolicited) }
}
