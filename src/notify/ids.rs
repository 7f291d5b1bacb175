//! The sender's numbers, one set for each peer.

use std::collections::HashSet;

use crate::error::Result;
use crate::wire::immediate::ID_LOW_COUNT;
use crate::wire::serdes::malformed;

/// Transfers that a sender may have begun and not seen acknowledged. Half of what an immediate can tell apart: a
/// late write of a failed transfer falls into the other half, and is known as such.
pub const WINDOW: u64 = ID_LOW_COUNT as u64 / 2;
/// Transfers after which a receiver acknowledges, at the latest.
pub const ACK_EVERY: u64 = WINDOW / 4;

/// Numbers for a stock peer: 1 to 65535, then again from 1. Used for transfers with notification, and for
/// stand-alone notifications of several fragments, so that two of them do not mix.
///
/// A stock receiver forgets a number when it has delivered its notification. One that never was delivered, because
/// its transfer failed, stays there for ever and would eat the fragments of the next: [`retire`](Self::retire) it.
#[derive(Debug, Clone)]
pub struct StockIds {
    next: u16,
    retired: HashSet<u16>,
}

impl StockIds {
    /// Begins at `first`, or at 1 for 0. A peer met again is best served from where the last connection stopped
    /// ([`position`](Self::position)): it may hold unfinished numbers of ours.
    pub fn starting_at(first: u16) -> Self {
        Self { next: first.max(1), retired: HashSet::new() }
    }

    /// The number that comes next.
    pub fn position(&self) -> u16 {
        self.next
    }

    /// A number; `None` when all are retired.
    pub fn allocate(&mut self) -> Option<u16> {
        if self.retired.len() == usize::from(u16::MAX) {
            return None;
        }
        loop {
            let id = self.next;
            self.next = id.checked_add(1).unwrap_or(1);
            if !self.retired.contains(&id) {
                return Some(id);
            }
        }
    }

    /// Never gives this number again.
    pub fn retire(&mut self, id: u16) {
        if id != 0 {
            self.retired.insert(id);
        }
    }
}

/// Transfer numbers for a peer that speaks version 2: from 1, within a window that its acknowledgements move.
#[derive(Debug, Clone)]
pub struct WindowIds {
    next: u64,
    floor: u64,
}

impl WindowIds {
    /// For a new session.
    pub fn new() -> Self {
        Self { next: 1, floor: 1 }
    }

    /// A number; `None` while the window is full: wait for an acknowledgement.
    pub fn allocate(&mut self) -> Option<u64> {
        if self.next - self.floor >= WINDOW {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    /// The peer is done with every transfer below `completed_below`.
    pub fn acknowledge(&mut self, completed_below: u64) -> Result<()> {
        if completed_below > self.next {
            return Err(malformed(format!(
                "transfers below {completed_below} are acknowledged; the last one begun is {}",
                self.next - 1
            )));
        }
        // Acknowledgements may arrive out of order.
        self.floor = self.floor.max(completed_below);
        Ok(())
    }

    /// The bits of a number that go into an immediate.
    pub fn low(id: u64) -> u16 {
        (id % u64::from(ID_LOW_COUNT)) as u16
    }
}

impl Default for WindowIds {
    fn default() -> Self {
        Self::new()
    }
}
