//! Host memory that peers have lent, and whether they are still there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::arena::{Arena, Run};
use crate::error::{Error, Result};
use crate::peer::Peer;
use crate::wire::{Body, PublicMetadata, Staging as Message};

/// Shortest slot that is taken from a peer, in bytes.
const SLOT_BYTES_MIN: u32 = 4096;
/// Most of its slots that are used.
const SLOTS_MAX: u16 = 1024;
/// A peer that says nothing for so long, while a transfer is under way, is asked for memory once more. It lends the same again, which is
/// news to nobody; but a message to a peer that is gone cannot be sent, and that tells of its end. One that stands still takes
/// such messages, four for each second that a transfer waits for it.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// What is known of a peer's memory.
pub struct Lease {
    pub peer: Arc<Peer>,
    since: Instant,
    /// The peer's connection in which it was asked: what it lends ends with that.
    session: u64,
    /// The last message about staging, of either side; none until it could be asked.
    last_word: Option<Instant>,
    /// `None` until the peer has answered.
    granted: Option<Granted>,
}

/// Memory that a peer has lent.
pub struct Granted {
    region: PublicMetadata,
    arena: Arena,
    /// Whether a copy may have several ranges and take several slots.
    takes_ranges: bool,
}

impl Lease {
    /// Nothing is asked for yet.
    pub fn new(peer: Arc<Peer>) -> Self {
        Self { peer, since: Instant::now(), session: 0, last_word: None, granted: None }
    }

    /// Whether it is of this peer.
    pub fn is_of(&self, peer: &Arc<Peer>) -> bool {
        Arc::ptr_eq(&self.peer, peer)
    }

    /// The memory, once it is lent.
    pub fn granted(&mut self) -> Option<&mut Granted> {
        self.granted.as_mut()
    }

    /// Slots that it lends.
    pub fn slots(&self) -> usize {
        self.granted.as_ref().map_or(0, |granted| granted.arena.slots())
    }

    /// Asks, if that was not done and the handshake is over. Returns whether it has asked now.
    pub fn ask(&mut self) -> Result<bool> {
        // In this order: one that changes meanwhile is noticed.
        let session = self.peer.session();
        let asks = self.last_word.is_none() && self.peer.say(Body::Staging(Message::Ask))?;
        if asks {
            self.session = session;
            self.last_word = Some(Instant::now());
        }
        Ok(asks)
    }

    /// Whether the peer has begun another connection since it was asked, and so has forgotten it.
    pub fn is_void(&self) -> bool {
        self.last_word.is_some() && self.session != self.peer.session()
    }

    /// Whether the peer has still to be asked, and may become so in this time.
    pub fn is_unasked(&self, limit: Duration) -> bool {
        self.last_word.is_none() && self.since.elapsed() < limit
    }

    /// A message about staging went to the peer, or came from it.
    pub fn heard(&mut self) {
        self.last_word = Some(Instant::now());
    }

    /// Finds out whether the peer is still there, once it was silent for long enough.
    pub fn ask_again(&mut self) {
        let silent = self.last_word.is_some_and(|at| at.elapsed() >= ASK_AGAIN);
        // While something has not left, that tells.
        if silent && self.peer.pending_bytes() == 0 && self.peer.say(Body::Staging(Message::Ask)) == Ok(true)
        {
            self.heard();
        }
    }

    /// The peer lends. What it says again changes nothing.
    pub fn grant(&mut self, slot_bytes: u32, slots: u16, region: PublicMetadata) -> Result<()> {
        self.heard();
        if self.granted.is_none() {
            self.granted = Some(Granted::new(slot_bytes, slots, region, self.peer.stages_ranges())?);
            log::debug!("{} lends {slots} slots of {slot_bytes} bytes for staging", self.peer.name());
        }
        Ok(())
    }
}

impl Granted {
    /// What a peer lends, if anything can be moved through it.
    fn new(slot_bytes: u32, slots: u16, region: PublicMetadata, takes_ranges: bool) -> Result<Self> {
        if slots == 0 {
            return Err(Error::backend("no staging memory is left there"));
        }
        if slot_bytes < SLOT_BYTES_MIN {
            return Err(Error::backend(format!(
                "it lends slots of {slot_bytes} bytes for staging, and {SLOT_BYTES_MIN} are the least"
            )));
        }
        if region.addr.checked_add(u64::from(slots) * u64::from(slot_bytes)).is_none() {
            return Err(Error::backend(format!(
                "it lends {slots} slots of {slot_bytes} bytes from {:#x} on, beyond the address space",
                region.addr
            )));
        }
        Ok(Self { region, arena: Arena::new(slots.min(SLOTS_MAX), slot_bytes), takes_ranges })
    }

    /// Whether a copy may have several ranges.
    pub fn takes_ranges(&self) -> bool {
        self.takes_ranges
    }

    /// Most bytes of a copy.
    pub fn copy_bytes_max(&self) -> u64 {
        let slot = u64::from(self.arena.slot_bytes());
        if self.takes_ranges { slot * self.arena.slots() as u64 } else { slot }
    }

    /// Where in the region a run begins. `None` if the run is of what was lent before.
    pub fn offset(&self, run: &Run) -> Option<u64> {
        self.arena.offset(run)
    }

    /// Its slots.
    pub fn arena(&mut self) -> &mut Arena {
        &mut self.arena
    }

    /// The region that they are in.
    pub fn region(&self) -> &PublicMetadata {
        &self.region
    }
}

#[cfg(test)]
mod tests {
    use super::{Granted, SLOT_BYTES_MIN, SLOTS_MAX};
    use crate::wire::PublicMetadata;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_lease_that_nothing_fits_through_is_refused(slot_bytes: u32, slots: u16, addr: u64, ranges: bool) {
            let edges = [(slot_bytes, slots, addr), (slot_bytes % 8192, slots % 3, addr), (slot_bytes, slots, !(addr >> 17))];
            for (slot_bytes, slots, addr) in edges {
                let bytes = u64::from(slot_bytes) * u64::from(slots);
                let usable = slots > 0 && slot_bytes >= SLOT_BYTES_MIN && addr.checked_add(bytes).is_some();
                let granted = Granted::new(slot_bytes, slots, PublicMetadata::new(vec![Some(1)], addr), ranges);
                prop_assert_eq!(granted.is_ok(), usable);
                if let Ok(mut granted) = granted {
                    prop_assert!(granted.copy_bytes_max() <= bytes);
                    let all = granted.arena().take(u64::MAX, 0).unwrap();
                    prop_assert_eq!((all.first(), all.count()), (0, slots.min(SLOTS_MAX)));
                }
            }
        }
    }
}
