//! Posting of operations and receives, and their completions.

use std::ffi::c_void;
use std::ptr;

use nixl_libfabric::sys::libfabric as sys;

use super::{EAGAIN, Object, object};
use crate::network::{Flight, What, scribble};
use crate::world::{Breakage, Recv, State};

pub(super) unsafe extern "C" fn cq_read(cq: *mut sys::fid_cq, buffer: *mut c_void, count: usize) -> isize {
    // SAFETY: an object of ours.
    let cq = unsafe { object(cq, "fi_cq_read") };
    let _inside = cq.enter("fi_cq_read");
    let mut state = cq.world().state();
    let Some(ep) = state.eps.iter().rposition(|ep| ep.cq == Some(cq.index)) else { return EAGAIN as isize };
    state.not_in_batch(ep, "fi_cq_read");
    if state.host_is_dead(state.eps[ep].host) {
        return EAGAIN as isize;
    }
    state.on_call();
    let again = state.faults.poll_again;
    if state.rng.chance(again) {
        return EAGAIN as isize;
    }
    state.on_poll(ep);
    state.match_arrivals(ep);
    if state.eps[ep].broken == Some(Breakage::IsMute) {
        return -(libc::EIO as isize);
    }
    if state.cqs[cq.index].entries.is_empty() {
        return EAGAIN as isize;
    }
    let batch = state.poll_batch as u64;
    // A provider that takes in some at each poll hands out as many.
    let most =
        if state.profile.pools_messages { count } else { count.min(state.rng.within(1, batch) as usize) };
    let entries = &mut state.cqs[cq.index].entries;
    let good = entries.iter().take(most).take_while(|entry| entry.error.is_none()).count();
    if good == 0 {
        return -(sys::FI_EAVAIL as isize);
    }
    for (place, entry) in entries.drain(..good).enumerate() {
        let entry = sys::fi_cq_data_entry {
            op_context: entry.context as *mut c_void,
            flags: entry.flags,
            len: entry.len,
            buf: ptr::null_mut(),
            data: entry.data,
        };
        // SAFETY: the caller's array has room for `count` entries.
        unsafe { buffer.cast::<sys::fi_cq_data_entry>().add(place).write(entry) };
    }
    state.match_arrivals(ep);
    good as isize
}

pub(super) unsafe extern "C" fn cq_readerr(
    cq: *mut sys::fid_cq,
    out: *mut sys::fi_cq_err_entry,
    _: u64,
) -> isize {
    // SAFETY: an object of ours.
    let cq = unsafe { object(cq, "fi_cq_readerr") };
    let _inside = cq.enter("fi_cq_readerr");
    let mut state = cq.world().state();
    state.on_call();
    let again = state.faults.readerr_again;
    if state.rng.chance(again) {
        return EAGAIN as isize;
    }
    let entries = &mut state.cqs[cq.index].entries;
    let Some((error, provider)) = entries.front().and_then(|entry| entry.error) else {
        return EAGAIN as isize;
    };
    let entry = entries.pop_front().expect("it was just looked at");
    // SAFETY: the caller's entry.
    unsafe {
        (*out).op_context = entry.context as *mut c_void;
        (*out).flags = entry.flags;
        (*out).len = entry.len;
        (*out).data = entry.data;
        (*out).err = error;
        (*out).prov_errno = provider;
    }
    1
}

pub(super) unsafe extern "C" fn eq_read(
    eq: *mut sys::fid_eq,
    _: *mut u32,
    _: *mut c_void,
    _: usize,
    _: u64,
) -> isize {
    // SAFETY: an object of ours.
    unsafe { object(eq, "fi_eq_read") };
    EAGAIN as isize
}

/// What a post names.
struct Order {
    call: &'static str,
    what: What,
    address: u64,
    local: (usize, usize),
    descriptor: usize,
    remote: (u64, u64),
    context: usize,
    data: Option<u32>,
    flags: u64,
}

pub(super) unsafe extern "C" fn writemsg(
    ep: *mut sys::fid_ep,
    msg: *const sys::fi_msg_rma,
    flags: u64,
) -> isize {
    // SAFETY: what the caller passes is as fi_writemsg wants it.
    unsafe { rma(ep, msg, flags, What::Write, "fi_writemsg") }
}

pub(super) unsafe extern "C" fn readmsg(
    ep: *mut sys::fid_ep,
    msg: *const sys::fi_msg_rma,
    flags: u64,
) -> isize {
    // SAFETY: as above.
    unsafe { rma(ep, msg, flags, What::Read, "fi_readmsg") }
}

/// # Safety
/// As fi_writemsg.
unsafe fn rma(
    ep: *mut sys::fid_ep,
    msg: *const sys::fi_msg_rma,
    flags: u64,
    what: What,
    call: &'static str,
) -> isize {
    // SAFETY: the caller's promise: one local and one remote range.
    unsafe {
        let (msg, iov, remote) = (&*msg, &*(*msg).msg_iov, &*(*msg).rma_iov);
        let order = Order {
            call,
            what,
            address: msg.addr,
            local: (iov.iov_base as usize, iov.iov_len),
            descriptor: *msg.desc as usize,
            remote: (remote.addr, remote.key),
            context: msg.context as usize,
            data: (flags & sys::FI_REMOTE_CQ_DATA != 0).then_some(msg.data as u32),
            flags,
        };
        post(object(ep, call), &order)
    }
}

pub(super) unsafe extern "C" fn sendmsg(ep: *mut sys::fid_ep, msg: *const sys::fi_msg, flags: u64) -> isize {
    const CALL: &str = "fi_sendmsg";
    // SAFETY: what the caller passes is as fi_sendmsg wants it: one range.
    unsafe {
        let (msg, iov) = (&*msg, &*(*msg).msg_iov);
        let order = Order {
            call: CALL,
            what: What::Send,
            address: msg.addr,
            local: (iov.iov_base as usize, iov.iov_len),
            descriptor: *msg.desc as usize,
            remote: (0, 0),
            context: msg.context as usize,
            data: (flags & sys::FI_REMOTE_CQ_DATA != 0).then_some(msg.data as u32),
            flags,
        };
        post(object(ep, CALL), &order)
    }
}

fn post(ep: &Object<sys::fid_ep>, order: &Order) -> isize {
    let _inside = ep.enter(order.call);
    let mut state = ep.world().state();
    let index = ep.index;
    let more = order.flags & sys::FI_MORE != 0;
    if state.eps[index].batch.is_some_and(|to| order.what != What::Write || to != order.address) {
        state.not_in_batch(index, order.call);
    }
    state.on_call();
    let in_batch = state.eps[index].batch.is_some();
    if let Some(status) = state.post_refused(index, order, in_batch) {
        return status;
    }
    let mr = state.check_post(index, order);
    let Some(mr) = mr else { return -(libc::EINVAL as isize) };
    let this = &state.eps[index];
    let (av, host) = (this.av.expect("enabled"), this.host);
    let target = state.address(this, order.address).and_then(|entry| entry.target);
    if state.host_is_dead(host) {
        // Nobody will ever hear of it; but the post itself works.
        return EAGAIN as isize;
    }
    let payload = (order.what == What::Send).then(|| {
        // SAFETY: the range lies in an open registration, checked above, and is the caller's to lend.
        unsafe { std::slice::from_raw_parts(order.local.0 as *const u8, order.local.1) }.to_vec()
    });
    let id = state.schedule.next_flight();
    // As efa does it: the endpoint's flags hold for operations with flags of their own, too.
    let flags = order.flags | state.eps[index].op_flags;
    let confirmed = flags & sys::FI_DELIVERY_COMPLETE != 0;
    if confirmed && order.what == What::Send {
        state.breach(
            "a message waits for a receipt, which a peer that died after its NIC took it never sends",
        );
    }
    state.flights.insert(
        id,
        Flight {
            what: order.what,
            source: index,
            address: order.address,
            target,
            context: order.context,
            local: order.local,
            mr,
            remote: order.remote,
            data: order.data,
            delivery_complete: confirmed,
            payload,
            pieces_left: 0,
            completed: false,
            landed: false,
            swallowed: false,
            late: false,
            lingers: false,
            fails: None,
        },
    );
    state.mrs[mr].in_flight += 1;
    state.avs[av].1[order.address as usize].as_mut().expect("checked").in_flight += 1;
    let this = &mut state.eps[index];
    this.contexts.insert(order.context);
    this.outstanding += 1;
    scribble(order.context, index);
    this.held.push(id);
    this.batch = more.then_some(order.address);
    if !more {
        state.eps[index].doorbells += 1;
        for flight in std::mem::take(&mut state.eps[index].held) {
            state.launch(flight);
        }
    }
    0
}

impl State {
    /// Why a post does not go through now, by chance or for lack of room.
    fn post_refused(&mut self, ep: usize, order: &Order, in_batch: bool) -> Option<isize> {
        let this = &self.eps[ep];
        if this.broken == Some(Breakage::Refuses) {
            return Some(-(libc::EIO as isize));
        }
        let full = this.outstanding >= this.tx_size && !self.profile.queues_in_memory;
        let target = self.address(this, order.address).and_then(|entry| entry.target);
        let waits = self.profile.connects && !self.connected(ep, target);
        let chance = if in_batch { self.faults.again_in_batch } else { self.faults.again };
        let by_chance = self.rng.chance(chance);
        if full || waits || by_chance {
            return Some(EAGAIN as isize);
        }
        let refused = !in_batch && self.rng.chance(self.faults.post_error);
        if refused {
            let this = &self.eps[ep];
            let target_host = target.map(|t| self.eps[t].host);
            let message = order.what == What::Send;
            let injury =
                crate::world::Injury { source_host: this.host, target_host, local: order.local, message };
            self.injuries.push(injury);
            return Some(-(libc::ENOMEM as isize));
        }
        None
    }

    /// Checks a post against the rules; gives the registration that it names.
    fn check_post(&mut self, ep: usize, order: &Order) -> Option<usize> {
        let this = &self.eps[ep];
        let mut wrong = Vec::new();
        if !this.enabled {
            wrong.push("on an endpoint that is not enabled");
        }
        if this.contexts.contains(&order.context) {
            wrong.push("with a context that is in flight");
        }
        if order.flags & sys::FI_COMPLETION == 0 {
            wrong.push("without asking for a completion");
        }
        if self.address(this, order.address).is_none() {
            wrong.push("to an address that is not in the address vector");
        } else if order.flags & sys::FI_MORE != 0
            && !self.address(this, order.address).is_some_and(|to| to.reached)
        {
            // Before efa's handshake is over such a batch is queued, and never sent.
            wrong.push("in a batch, to a peer that has completed nothing");
        }
        let mr = self.open_mr(ep, order.descriptor, order.local);
        if mr.is_none() {
            wrong.push("of memory that is not registered");
        }
        for what in &wrong {
            self.breach(format!("{} {what}", order.call));
        }
        mr.filter(|_| wrong.is_empty())
    }

    /// The registration that a descriptor stands for, if it is open, of this domain, and holds the range.
    fn open_mr(&self, ep: usize, descriptor: usize, (addr, len): (usize, usize)) -> Option<usize> {
        let index = descriptor.checked_sub(1)?;
        let mr = self.mrs.get(index)?;
        let open = self.keys.get(&(mr.domain, mr.key)) == Some(&index);
        let here = mr.domain == self.eps[ep].domain
            && (!self.profile.mr_endpoint || mr.bound == Some(ep) && mr.enabled);
        (open && here && addr >= mr.addr && addr + len <= mr.addr + mr.len).then_some(index)
    }
}

pub(super) unsafe extern "C" fn recvmsg(ep: *mut sys::fid_ep, msg: *const sys::fi_msg, _: u64) -> isize {
    const CALL: &str = "fi_recvmsg";
    // SAFETY: as in `sendmsg`.
    let (ep, msg, iov) = unsafe { (object(ep, CALL), &*msg, &*(*msg).msg_iov) };
    let _inside = ep.enter(CALL);
    let mut state = ep.world().state();
    state.not_in_batch(ep.index, CALL);
    if state.setup_fails() {
        return -(libc::ENOMEM as isize);
    }
    state.on_call();
    let again = state.faults.again;
    let this = &state.eps[ep.index];
    if state.host_is_dead(this.host) || this.recvs.len() >= this.rx_size.max(4096) || state.rng.chance(again)
    {
        return EAGAIN as isize;
    }
    // SAFETY: one descriptor, as in `sendmsg`.
    let (descriptor, context) = unsafe { (*msg.desc as usize, msg.context as usize) };
    let range = (iov.iov_base as usize, iov.iov_len);
    let Some(mr) = state.open_mr(ep.index, descriptor, range) else {
        state.breach("fi_recvmsg of memory that is not registered");
        return -(libc::EINVAL as isize);
    };
    if !state.eps[ep.index].contexts.insert(context) {
        state.breach("fi_recvmsg with a context that is in flight");
        return -(libc::EINVAL as isize);
    }
    state.mrs[mr].in_flight += 1;
    scribble(context, ep.index);
    state.eps[ep.index].recvs.push_back(Recv { context, addr: range.0, len: range.1, mr });
    state.match_arrivals(ep.index);
    0
}
