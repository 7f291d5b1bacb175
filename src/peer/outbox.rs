//! What waits for a peer: notifications until it has answered our handshake, and bytes until they have left.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::error::{Error, Result};
use crate::rail::Tag;
use crate::types::AgentName;

/// What one message costs beside its bytes, about.
const MESSAGE_COST: u64 = 128;

/// Bytes of messages for one peer that have not left yet, handshake or not.
#[derive(Debug)]
pub struct Pending {
    bytes: AtomicU64,
    bytes_max: u64,
}

impl Pending {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes: AtomicU64::new(0), bytes_max }
    }

    /// Takes room for a message that is to be sent, now or when its data has arrived; or says that there is none. One message is
    /// always let in.
    pub(super) fn reserve(&self, len: usize, peer: &AgentName) -> Result<()> {
        let cost = len as u64 + MESSAGE_COST;
        let before = self.bytes.fetch_add(cost, Ordering::Relaxed);
        if before > 0 && before + cost > self.bytes_max {
            self.bytes.fetch_sub(cost, Ordering::Relaxed);
            return Err(Error::disconnected(format!(
                "{peer} does not take its notifications: {before} bytes wait for it already (pending_bytes_max is {}). Is it \
                 alive, and does its progress thread run or its application call NIXL?",
                self.bytes_max
            )));
        }
        Ok(())
    }

    /// Takes room for a message that has to be sent in any case.
    pub(super) fn add(&self, len: usize) {
        self.bytes.fetch_add(len as u64 + MESSAGE_COST, Ordering::Relaxed);
    }

    /// What waits now.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// A message of so many bytes has left, or never will.
    pub(super) fn release(&self, len: usize) {
        self.bytes.fetch_sub(len as u64 + MESSAGE_COST, Ordering::Relaxed);
    }
}

/// What cannot be sent before the peer is ready.
pub(super) enum Waiting {
    /// A notification, and the transfer that it follows.
    Message { message: Vec<u8>, of: Option<Tag> },
    /// A transfer to a peer whose device must know us first.
    Transfer(Tag),
}

/// Waits until the peer is ready.
#[derive(Default)]
pub(super) struct Outbox {
    waiting: VecDeque<Waiting>,
    /// Since when nothing has got on for what waits.
    since: Option<Instant>,
}

impl Outbox {
    pub fn push(&mut self, waiting: Waiting) {
        self.since.get_or_insert_with(Instant::now);
        self.waiting.push_back(waiting);
    }

    /// Everything, in order.
    pub fn take(&mut self) -> VecDeque<Waiting> {
        self.since = None;
        std::mem::take(&mut self.waiting)
    }

    /// The peer was heard: the wait begins anew.
    pub fn progress(&mut self) {
        if self.since.is_some() {
            self.since = Some(Instant::now());
        }
    }

    /// Since when what waits has waited without progress.
    pub fn stuck_since(&self) -> Option<Instant> {
        self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_wait_have_a_limit_but_one_message_is_always_let_in() {
        let pending = Pending::new(1000);
        let peer = AgentName::from("b");
        pending.reserve(5000, &peer).unwrap();
        assert!(pending.reserve(1, &peer).unwrap_err().to_string().contains("pending_bytes_max"));
        pending.release(5000);
        pending.reserve(300, &peer).unwrap();
        pending.reserve(300, &peer).unwrap();
        assert!(pending.reserve(300, &peer).is_err());
    }
}
