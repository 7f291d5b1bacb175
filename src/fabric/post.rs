//! Posting operations on an endpoint.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

use super::endpoint::Endpoint;
use super::error::{FabricError, code_of};
use super::list::RmaList;
use super::memory::RegisteredBuffer;
use super::peers::FiAddr;
use super::slots::BufferInFlight;
use crate::sys::libfabric as sys;
use crate::types::Op;

/// Most writes that one doorbell tells the NIC of.
pub const BATCH_WRITES_MAX: u32 = 16;

/// Outcome of a post.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Posted {
    /// In flight; a completion follows.
    Yes,
    /// The queue is full, or a connection is being made: poll, then post again.
    Again,
}

/// What became of slices that were to be posted.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct PostedSlices {
    /// So many, from the first on, are in flight.
    pub count: u32,
    /// Bytes of those.
    pub bytes: u64,
    /// Why not all: [`Posted::Again`], or an error of the next one.
    pub stopped: Option<Result<Posted>>,
}

/// A message to a peer.
#[derive(Debug, Clone, Copy)]
pub struct Send<'a> {
    /// Buffer that holds the message.
    pub buffer: &'a RegisteredBuffer,
    /// Where it begins in the buffer.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
    /// Immediate data.
    pub imm: Option<u32>,
    /// The peer.
    pub dest: FiAddr,
    /// Number of the buffer, not in flight.
    pub context: u32,
}

/// Room for a message of any peer.
#[derive(Debug, Clone, Copy)]
pub struct Recv<'a> {
    /// Buffer that the message is put into.
    pub buffer: &'a RegisteredBuffer,
    /// Where it is put.
    pub offset: usize,
    /// Bytes that it may have.
    pub len: usize,
    /// Number of the buffer, not in flight.
    pub context: u32,
}

type Result<T> = std::result::Result<T, FabricError>;

/// fi_writemsg or fi_readmsg.
type Submit = unsafe extern "C" fn(*mut sys::fid_ep, *const sys::fi_msg_rma, u64) -> isize;

impl Endpoint {
    /// Begins a share: operations of `list` will be posted over its lane `lane` to a peer. Completions name the share
    /// by `share`, a number that is not in use. With `imm` each write tells the peer's completion queue, as the C++ plugin's
    /// do: test beds that stand for it do so, the plugin never does.
    pub fn begin(
        &mut self,
        share: u32,
        list: Arc<RmaList>,
        lane: u16,
        dest: FiAddr,
        imm: Option<u32>,
    ) -> Result<()> {
        const CALL: &str = "begin";
        let Some([way, ..]) = list.lane(lane) else {
            return Err(FabricError::refused(CALL, format!("{list:?} has no lane {lane}")));
        };
        if !Arc::ptr_eq(way.region.domain(), self.domain()) {
            return Err(FabricError::refused(CALL, "the memory is registered on another NIC"));
        }
        if self.peers.raw(dest).is_none() {
            return Err(FabricError::refused(CALL, "the peer's address is not known on this endpoint"));
        }
        self.shares.begin(share, list, lane, dest, imm)
    }

    /// Ends a share: nothing more of it is posted. What is in flight completes under its number.
    pub fn end(&mut self, share: u32) {
        self.shares.end(share);
    }

    /// Posts the slices of a share in `range`, in order, until one is put off or refused.
    ///
    /// Each write completes when its data is in the peer's memory; where the provider keeps writes in order, only the
    /// one before `confirmed_at` does, which then tells of all before it. With `batch`, several share a doorbell.
    pub fn post_slices(
        &mut self,
        share: u32,
        op: Op,
        range: Range<u32>,
        confirmed_at: u32,
        batch: bool,
    ) -> PostedSlices {
        let call = if op == Op::Write { "fi_writemsg" } else { "fi_readmsg" };
        // A share ends no earlier than the last operation that refers to it, so what it names stays for as long.
        let Some((entry, peer)) =
            self.shares.get(share).and_then(|entry| Some((entry, self.peers.raw(entry.peer)?)))
        else {
            let error = FabricError::refused(call, format!("share {share} was not begun"));
            return PostedSlices { count: 0, bytes: 0, stopped: Some(Err(error)) };
        };
        let (list, dest) = (&entry.list, entry.peer);
        let Some(ways) = list.lane(entry.lane) else {
            unreachable!("`begin` looked it up");
        };
        let Some(submit) = self.submit(op) else {
            return PostedSlices {
                count: 0,
                bytes: 0,
                stopped: Some(Err(FabricError::new(call, libc::ENOSYS))),
            };
        };
        let ep = self.ep.as_ptr();
        let batch = batch && op == Op::Write && self.open_batch.is_none();
        // As far as there are cells: a batch must not end for want of one.
        let end = range.end.min(list.len()).min(range.start.saturating_add(self.slots.room()));
        let data = entry.imm.unwrap_or(0);
        let common = sys::FI_COMPLETION | if entry.imm.is_some() { sys::FI_REMOTE_CQ_DATA } else { 0 };
        let confirm_each = op == Op::Write && !self.orders_writes;
        let (mut count, mut bytes, mut stopped, mut open) = (0, 0, None, false);
        for index in range.start..end {
            let slice = &list.slices()[index as usize];
            let way = &ways[slice.pair as usize];
            let Some((operation, context)) = self.slots.claim(share, slice.len) else {
                stopped = Some(Ok(Posted::Again));
                break;
            };
            let len = slice.len as usize;
            let iov = libc::iovec { iov_base: slice.local_addr as *mut c_void, iov_len: len };
            let mut descriptor = way.region.descriptor();
            let remote = sys::fi_rma_iov { addr: slice.remote_addr, len, key: way.key };
            let msg = sys::fi_msg_rma {
                msg_iov: &raw const iov,
                desc: &raw mut descriptor,
                iov_count: 1,
                addr: peer,
                rma_iov: &raw const remote,
                rma_iov_count: 1,
                context,
                data: data.into(),
            };
            let mut flags = common;
            if confirm_each || (op == Op::Write && index + 1 == confirmed_at) {
                flags |= sys::FI_DELIVERY_COMPLETE;
            }
            let more = batch && index + 1 < end && (count + 1) % BATCH_WRITES_MAX != 0;
            if more {
                flags |= sys::FI_MORE;
            }
            // SAFETY: the endpoint is open, and ours: `&mut self`. The local bytes lie in a registered region of this
            // domain (`RmaList::new`, `begin`), which the share keeps until the operation completes; the context is a
            // cell that nothing else is in flight on; the peer is known. The message and what it points to live
            // through the call, and the provider copies them.
            let status = unsafe { submit(ep, &raw const msg, flags) };
            if status < 0 {
                self.slots.release(operation);
                stopped = Some(match code_of(status) {
                    libc::EAGAIN => Ok(Posted::Again),
                    code => Err(FabricError::new(call, code)),
                });
                break;
            }
            count += 1;
            bytes += u64::from(slice.len);
            open = more;
        }
        if count > 0 {
            self.open_batch = open.then_some(share);
            self.shares.started(share, count);
            self.peers.started(dest, count);
        }
        if stopped.is_none() && end < range.end {
            stopped = Some(Ok(Posted::Again));
        }
        PostedSlices { count, bytes, stopped }
    }

    /// The share of which a batch is open: writes that the NIC was not told of, because the one that was to ring for all
    /// was put off or refused. Until another slice of it is posted, nothing else may be done here: provider versions
    /// hold the send queue's lock all the while, and a poll would wait for it for ever.
    pub fn open_batch(&self) -> Option<u32> {
        self.open_batch
    }

    fn submit(&self, op: Op) -> Option<Submit> {
        // SAFETY: the endpoint is open; its table of RMA operations is null or complete.
        let ops = unsafe { (*self.ep.as_ptr()).rma.as_ref() }?;
        match op {
            Op::Write => ops.writemsg,
            Op::Read => ops.readmsg,
        }
    }

    /// Posts a message.
    pub fn send(&mut self, send: &Send<'_>) -> Result<Posted> {
        const CALL: &str = "fi_sendmsg";
        let flags = sys::FI_COMPLETION | if send.imm.is_some() { sys::FI_REMOTE_CQ_DATA } else { 0 };
        let local = Local { buffer: send.buffer, offset: send.offset, len: send.len };
        let to = Some(send.dest);
        self.post(CALL, &local, to, send.context, send.imm, sys::FI_SEND | sys::FI_MSG, |ep, msg| {
            // SAFETY: the endpoint is open; `post` answers for the message.
            unsafe {
                match (*ep).msg.as_ref().and_then(|ops| ops.sendmsg) {
                    Some(send) => send(ep, msg, flags),
                    None => -(libc::ENOSYS as isize),
                }
            }
        })
    }

    /// Posts room for a message of any peer.
    pub fn recv(&mut self, recv: &Recv<'_>) -> Result<Posted> {
        const CALL: &str = "fi_recvmsg";
        let local = Local { buffer: recv.buffer, offset: recv.offset, len: recv.len };
        self.post(CALL, &local, None, recv.context, None, sys::FI_RECV | sys::FI_MSG, |ep, msg| {
            // SAFETY: as in `send`.
            unsafe {
                match (*ep).msg.as_ref().and_then(|ops| ops.recvmsg) {
                    Some(recv) => recv(ep, msg, sys::FI_COMPLETION),
                    None => -(libc::ENOSYS as isize),
                }
            }
        })
    }

    /// Checks what an operation on a buffer names, takes its context, and posts it.
    ///
    /// After this, what `submit` passes on is good until the operation completes: the local bytes lie in a region of
    /// this domain that the context holds; the context is a cell in flight once; the peer is known.
    #[allow(clippy::too_many_arguments)]
    fn post(
        &mut self,
        call: &'static str,
        local: &Local<'_>,
        to: Option<FiAddr>,
        context: u32,
        imm: Option<u32>,
        kind: u64,
        submit: impl FnOnce(*mut sys::fid_ep, *const sys::fi_msg) -> isize,
    ) -> Result<Posted> {
        let (region, addr) = (local.buffer.region(), local.buffer.addr_of(local.offset));
        if !region.contains(addr, local.len) {
            return Err(FabricError::refused(
                call,
                format!("{} bytes at {addr:#x} are not inside {region:?}", local.len),
            ));
        }
        if local.len > self.domain().device().max_msg_size() {
            // Providers only assert it.
            return Err(FabricError::refused(
                call,
                format!("{} bytes are more than one operation takes", local.len),
            ));
        }
        if !Arc::ptr_eq(region.domain(), self.domain()) {
            return Err(FabricError::refused(call, "the memory is registered on another NIC"));
        }
        let peer = match to {
            Some(address) => self.peers.raw(address).ok_or_else(|| {
                FabricError::refused(call, "the peer's address is not known on this endpoint")
            })?,
            None => sys::FI_ADDR_UNSPEC,
        };
        let operation = BufferInFlight { flags: kind, peer: to, _region: region.hold() };
        let address = self.slots.claim_buffer(call, context, operation)?;
        let iov = libc::iovec { iov_base: addr as *mut c_void, iov_len: local.len };
        let mut descriptor = region.descriptor();
        let msg = sys::fi_msg {
            msg_iov: &raw const iov,
            desc: &raw mut descriptor,
            iov_count: 1,
            addr: peer,
            context: address,
            data: u64::from(imm.unwrap_or(0)),
        };
        let status = submit(self.ep.as_ptr(), &raw const msg);
        if status < 0 {
            self.slots.release_buffer(context);
            return match code_of(status) {
                libc::EAGAIN => Ok(Posted::Again),
                code => Err(FabricError::new(call, code)),
            };
        }
        if let Some(address) = to {
            self.peers.sent(address);
        }
        Ok(Posted::Yes)
    }
}

/// Local side of an operation on a buffer.
struct Local<'a> {
    buffer: &'a RegisteredBuffer,
    offset: usize,
    len: usize,
}
