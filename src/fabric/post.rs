//! Posting operations on an endpoint.

use std::ffi::c_void;

use super::endpoint::Endpoint;
use super::error::{FabricError, code_of};
use super::memory::{MemoryRegion, RegisteredBuffer};
use super::peers::FiAddr;
use super::slots::InFlight;
use crate::sys::libfabric as sys;

/// Outcome of a post.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Posted {
    /// In flight; a completion follows.
    Yes,
    /// The queue is full, or a connection is being made: poll, then post again.
    Again,
}

/// Flags of a write or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RmaFlags {
    /// Another post to this endpoint follows at once: the provider may wait with telling the NIC.
    pub more: bool,
    /// Completes only when the data is in the peer's memory.
    pub delivery_complete: bool,
}

/// A write to, or a read from, a peer's memory.
#[derive(Debug, Clone, Copy)]
pub struct Rma<'a> {
    /// Registration of the local memory.
    pub local: &'a MemoryRegion,
    /// First local byte.
    pub local_addr: u64,
    /// Bytes.
    pub len: usize,
    /// First remote byte, as [`MemoryRegion::remote_base`] of the peer names it.
    pub remote_addr: u64,
    /// Key of the remote registration.
    pub remote_key: u64,
    /// The peer.
    pub dest: FiAddr,
    /// Immediate data that the peer's completion queue gets. Writes only.
    pub imm: Option<u32>,
    /// Context, not in flight.
    pub context: u32,
    /// Flags.
    pub flags: RmaFlags,
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
    /// Context, not in flight.
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
    /// Context, not in flight.
    pub context: u32,
}

type Result<T> = std::result::Result<T, FabricError>;

impl Endpoint {
    /// Posts a write of local memory to a peer's.
    pub fn write(&mut self, rma: &Rma<'_>) -> Result<Posted> {
        const CALL: &str = "fi_writemsg";
        let mut flags = sys::FI_COMPLETION;
        if rma.flags.more {
            flags |= sys::FI_MORE;
        }
        if rma.flags.delivery_complete {
            flags |= sys::FI_DELIVERY_COMPLETE;
        }
        if rma.imm.is_some() {
            flags |= sys::FI_REMOTE_CQ_DATA;
        }
        self.post_rma(CALL, rma, sys::FI_WRITE | sys::FI_RMA, |ep, msg| {
            // SAFETY: the endpoint is open; `post_rma` answers for the message.
            unsafe {
                match (*ep).rma.as_ref().and_then(|ops| ops.writemsg) {
                    Some(write) => write(ep, msg, flags),
                    None => -(libc::ENOSYS as isize),
                }
            }
        })
    }

    /// Posts a read of a peer's memory into local memory.
    pub fn read(&mut self, rma: &Rma<'_>) -> Result<Posted> {
        const CALL: &str = "fi_readmsg";
        if rma.imm.is_some() || rma.flags.more {
            return Err(FabricError::refused(CALL, "a read carries no immediate data and is not batched"));
        }
        self.post_rma(CALL, rma, sys::FI_READ | sys::FI_RMA, |ep, msg| {
            // SAFETY: as in `write`.
            unsafe {
                match (*ep).rma.as_ref().and_then(|ops| ops.readmsg) {
                    Some(read) => read(ep, msg, sys::FI_COMPLETION),
                    None => -(libc::ENOSYS as isize),
                }
            }
        })
    }

    /// Posts a message.
    pub fn send(&mut self, send: &Send<'_>) -> Result<Posted> {
        const CALL: &str = "fi_sendmsg";
        let flags = sys::FI_COMPLETION | if send.imm.is_some() { sys::FI_REMOTE_CQ_DATA } else { 0 };
        let local =
            Local { region: send.buffer.region(), addr: send.buffer.addr_of(send.offset), len: send.len };
        let to = Some(send.dest);
        self.post(CALL, &local, to, send.context, sys::FI_SEND | sys::FI_MSG, |ep, parts| {
            let msg = parts.message(send.imm);
            // SAFETY: the endpoint is open; `post` answers for the parts of the message.
            unsafe {
                match (*ep).msg.as_ref().and_then(|ops| ops.sendmsg) {
                    Some(send) => send(ep, &raw const msg, flags),
                    None => -(libc::ENOSYS as isize),
                }
            }
        })
    }

    /// Posts room for a message of any peer.
    pub fn recv(&mut self, recv: &Recv<'_>) -> Result<Posted> {
        const CALL: &str = "fi_recvmsg";
        let local =
            Local { region: recv.buffer.region(), addr: recv.buffer.addr_of(recv.offset), len: recv.len };
        self.post(CALL, &local, None, recv.context, sys::FI_RECV | sys::FI_MSG, |ep, parts| {
            let msg = parts.message(None);
            // SAFETY: as in `send`.
            unsafe {
                match (*ep).msg.as_ref().and_then(|ops| ops.recvmsg) {
                    Some(recv) => recv(ep, &raw const msg, sys::FI_COMPLETION),
                    None => -(libc::ENOSYS as isize),
                }
            }
        })
    }

    fn post_rma(
        &mut self,
        call: &'static str,
        rma: &Rma<'_>,
        kind: u64,
        submit: impl FnOnce(*mut sys::fid_ep, *const sys::fi_msg_rma) -> isize,
    ) -> Result<Posted> {
        let local = Local { region: rma.local, addr: rma.local_addr, len: rma.len };
        self.post(call, &local, Some(rma.dest), rma.context, kind, |ep, parts| {
            let remote = sys::fi_rma_iov { addr: rma.remote_addr, len: rma.len, key: rma.remote_key };
            let msg = sys::fi_msg_rma {
                msg_iov: &raw const parts.iov,
                desc: &raw mut parts.descriptor,
                iov_count: 1,
                addr: parts.peer,
                rma_iov: &raw const remote,
                rma_iov_count: 1,
                context: parts.context,
                data: u64::from(rma.imm.unwrap_or(0)),
            };
            submit(ep, &raw const msg)
        })
    }

    /// Checks what an operation names, takes its context, and posts it.
    ///
    /// After this, what `submit` passes on is good until the operation completes: the local bytes lie in a region of
    /// this domain that the context holds; the context is a cell in flight once; the peer is known.
    fn post(
        &mut self,
        call: &'static str,
        local: &Local<'_>,
        to: Option<FiAddr>,
        context: u32,
        kind: u64,
        submit: impl FnOnce(*mut sys::fid_ep, &mut Parts) -> isize,
    ) -> Result<Posted> {
        if !local.region.contains(local.addr, local.len) {
            return Err(FabricError::refused(
                call,
                format!("{} bytes at {:#x} are not inside {:?}", local.len, local.addr, local.region),
            ));
        }
        if local.len > self.domain().device().max_msg_size() {
            // Providers only assert it.
            return Err(FabricError::refused(
                call,
                format!("{} bytes are more than one operation takes", local.len),
            ));
        }
        if !std::sync::Arc::ptr_eq(local.region.domain(), self.domain()) {
            return Err(FabricError::refused(call, "the memory is registered on another NIC"));
        }
        let peer = match to {
            Some(address) => self.peers.raw(address).ok_or_else(|| {
                FabricError::refused(call, "the peer's address is not known on this endpoint")
            })?,
            None => sys::FI_ADDR_UNSPEC,
        };
        let operation = InFlight { flags: kind, peer: to, _region: local.region.hold() };
        let context_cell = self.slots.claim(call, context, operation)?;
        let mut parts = Parts {
            iov: libc::iovec { iov_base: local.addr as *mut c_void, iov_len: local.len },
            descriptor: local.region.descriptor(),
            context: context_cell,
            peer,
        };
        let status = submit(self.ep.as_ptr(), &mut parts);
        if status < 0 {
            self.slots.release(context);
            return match code_of(status) {
                libc::EAGAIN => Ok(Posted::Again),
                code => Err(FabricError::new(call, code)),
            };
        }
        if let Some(address) = to {
            self.peers.started(address);
        }
        Ok(Posted::Yes)
    }
}

/// Local side of an operation.
struct Local<'a> {
    region: &'a MemoryRegion,
    addr: u64,
    len: usize,
}

/// What every operation passes to libfabric.
struct Parts {
    iov: libc::iovec,
    descriptor: *mut c_void,
    context: *mut c_void,
    peer: u64,
}

impl Parts {
    fn message(&mut self, imm: Option<u32>) -> sys::fi_msg {
        sys::fi_msg {
            msg_iov: &raw const self.iov,
            desc: &raw mut self.descriptor,
            iov_count: 1,
            addr: self.peer,
            context: self.context,
            data: u64::from(imm.unwrap_or(0)),
        }
    }
}
