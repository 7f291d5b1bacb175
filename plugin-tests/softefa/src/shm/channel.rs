//! A one-way channel from one process to another: a ring of messages, and a word per operation in flight with which
//! the two agree on who may touch the operation's memory.
//!
//! The ring has one producer and one consumer, each inside one process under that process's engine lock. A producer
//! that dies before it moves `head` has sent nothing.

use std::cell::UnsafeCell;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::process::ProcessId;
use super::{Mapping, Shared};
use crate::abi::verbs::ibv_gid;

/// Messages on their way in one channel.
pub const MESSAGES_MAX: u32 = 1024;
/// Operations in flight from one process to another; the rest wait in their send queues.
pub const SLOTS_MAX: u32 = 1024;
/// Pieces of memory that one work request may name (EFA: 2 in a send).
pub const SPANS_MAX: usize = 2;

/// A range of memory in some process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Virtual address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// [`HOST`] or [`GPU`]. What a message names is the host's: only its owner can copy a GPU's.
    pub memory: u64,
}

/// Memory that the owner's processor can read, and so can other processes.
pub const HOST: u64 = 0;
/// Memory of a GPU, which only CUDA can copy, in the process that owns it.
pub const GPU: u64 = 1;

/// What a message is.
pub mod kind {
    /// An operation for the receiver to carry out.
    pub const REQUEST: u8 = 1;
    /// The end of an operation, or, for a read, leave to fetch.
    pub const REPLY: u8 = 2;
    /// A read that was granted from a bounce buffer (`serial` of the reply) has been fetched, or will never be.
    pub const FETCHED: u8 = 3;
}

/// One message. Plain data: what a peer wrote is checked where it is used.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Message {
    /// See [`kind`].
    pub kind: u8,
    /// [`crate::status::Op`] of a request.
    pub op: u8,
    /// Bit 0: has immediate data.
    pub flags: u8,
    /// [`crate::status::Status`] of a reply.
    pub status: u8,
    /// Slot of the operation in the channel that carries its request.
    pub slot: u32,
    /// Generation of that slot.
    pub generation: u32,
    /// Sender's queue pair.
    pub source_qpn: u32,
    /// Receiver's queue pair.
    pub destination_qpn: u32,
    /// Key that the receiver's queue pair must have.
    pub qkey: u32,
    /// Immediate data, as the caller gave it (network order).
    pub immediate: u32,
    /// Remote registration of an RDMA operation.
    pub rkey: u32,
    /// Remote address of an RDMA operation.
    pub remote_address: u64,
    /// Number of this operation on its queue pair: chance is drawn from it. In the reply to a read: the bounce buffer
    /// that it is granted from, 0 for none.
    pub serial: u64,
    /// GID of the sender's device.
    pub source_gid: [u8; 16],
    /// GID of the receiver's device.
    pub destination_gid: [u8; 16],
    /// Where the data is: in the sender of this message.
    pub spans: [Span; SPANS_MAX],
}

impl Message {
    /// The request's or reply's bytes in all.
    pub fn length(&self) -> u64 {
        self.spans.iter().fold(0, |sum, span| sum.saturating_add(span.length))
    }

    /// GID of the sender's device.
    pub fn source(&self) -> ibv_gid {
        ibv_gid { raw: self.source_gid }
    }

    /// GID of the receiver's device.
    pub fn destination(&self) -> ibv_gid {
        ibv_gid { raw: self.destination_gid }
    }
}

/// Keeps two counters out of one cache line.
#[repr(C, align(64))]
struct Line(AtomicU32);

/// The shared part.
#[repr(C)]
pub struct Channel {
    head: Line,
    tail: Line,
    claims: [AtomicU32; SLOTS_MAX as usize],
    ring: [UnsafeCell<Message>; MESSAGES_MAX as usize],
}

// SAFETY: zero is an empty ring with idle slots, and any bit pattern of `Message` is valid. A ring cell is written only
// by the producer while it lies outside head..tail and read only by the consumer while it lies inside.
unsafe impl Shared for Channel {}

/// State of a slot, in the low two bits; the generation is above.
const IDLE: u32 = 0;
const POSTED: u32 = 1;
const BUSY: u32 = 2;

impl Channel {
    /// Producer: room for another message.
    pub fn has_room(&self) -> bool {
        self.head.0.load(Ordering::Relaxed).wrapping_sub(self.tail.0.load(Ordering::Acquire)) < MESSAGES_MAX
    }

    /// Producer: sends, if there is room.
    pub fn send(&self, message: &Message) -> bool {
        let head = self.head.0.load(Ordering::Relaxed);
        if !self.has_room() {
            return false;
        }
        let cell = self.ring[(head % MESSAGES_MAX) as usize].get();
        // SAFETY: there is room, so this cell is outside of what the consumer reads, and this is the only producer.
        unsafe { cell.write_volatile(*message) };
        self.head.0.store(head.wrapping_add(1), Ordering::Release);
        true
    }

    /// Consumer: the next message.
    pub fn receive(&self) -> Option<Message> {
        let tail = self.tail.0.load(Ordering::Relaxed);
        if self.head.0.load(Ordering::Acquire) == tail {
            return None;
        }
        let cell = self.ring[(tail % MESSAGES_MAX) as usize].get();
        // SAFETY: head is past this cell, so the producer has finished it and will not touch it before tail moves;
        // any content is a valid message.
        let message = unsafe { cell.read_volatile() };
        self.tail.0.store(tail.wrapping_add(1), Ordering::Release);
        Some(message)
    }

    /// Source: opens a slot for an operation and returns its generation.
    pub fn post(&self, slot: u32) -> u32 {
        let claim = &self.claims[(slot % SLOTS_MAX) as usize];
        let generation = (claim.load(Ordering::Relaxed) >> 2).wrapping_add(1) & (u32::MAX >> 2);
        claim.store(generation << 2 | POSTED, Ordering::Release);
        generation
    }

    /// Source: closes a slot, so that the target no longer reads the operation's memory. False while it does.
    pub fn retire(&self, slot: u32) -> bool {
        let claim = &self.claims[(slot % SLOTS_MAX) as usize];
        let now = claim.load(Ordering::Acquire);
        if now & 3 == BUSY {
            return false;
        }
        claim.compare_exchange(now, now & !3 | IDLE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Target: may it read the operation's memory now? Ends with [`Channel::unclaim`].
    pub fn claim(&self, slot: u32, generation: u32) -> bool {
        let Some(claim) = self.claims.get(slot as usize) else { return false };
        let posted = generation << 2 | POSTED;
        claim.compare_exchange(posted, generation << 2 | BUSY, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Target: has finished reading for now.
    pub fn unclaim(&self, slot: u32, generation: u32) {
        if let Some(claim) = self.claims.get(slot as usize) {
            claim.store(generation << 2 | POSTED, Ordering::Release);
        }
    }

    /// Source: takes a slot away from a target that died while reading.
    pub fn seize(&self, slot: u32) {
        let claim = &self.claims[(slot % SLOTS_MAX) as usize];
        claim.store(claim.load(Ordering::Relaxed) & !3 | IDLE, Ordering::Release);
    }
}

/// The file of the channel between two processes.
pub fn path(dir: &Path, source: ProcessId, target: ProcessId) -> PathBuf {
    dir.join(format!("channel-{source}-to-{target}"))
}

/// Maps a channel, for either end.
pub fn create(dir: &Path, source: ProcessId, target: ProcessId) -> io::Result<Mapping<Channel>> {
    Mapping::create(&path(dir, source, target))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel(name: &str) -> Mapping<Channel> {
        let path = std::env::temp_dir().join(format!("softefa-channel-{name}-{}", std::process::id()));
        let mapping = Mapping::create(&path).expect("map");
        std::fs::remove_file(path).expect("remove");
        mapping
    }

    #[test]
    fn messages_arrive_in_order_and_a_full_ring_refuses() {
        let channel = channel("order");
        for round in 0..3_u32 {
            for slot in 0..MESSAGES_MAX {
                assert!(channel.send(&Message { slot, generation: round, ..Message::default() }));
            }
            assert!(!channel.send(&Message::default()));
            for slot in 0..MESSAGES_MAX {
                let message = channel.receive().expect("sent");
                assert_eq!((message.slot, message.generation), (slot, round));
            }
            assert!(channel.receive().is_none());
        }
    }

    #[test]
    fn a_retired_or_reused_slot_cannot_be_claimed() {
        let channel = channel("claims");
        let first = channel.post(5);
        assert!(channel.claim(5, first));
        assert!(!channel.retire(5), "the target reads");
        channel.unclaim(5, first);
        assert!(channel.retire(5));
        assert!(!channel.claim(5, first));
        let second = channel.post(5);
        assert!(!channel.claim(5, first));
        assert!(channel.claim(5, second));
        channel.seize(5);
        assert!(!channel.claim(5, second));
        assert!(!channel.claim(SLOTS_MAX, 0), "a slot out of range is refused");
    }
}
