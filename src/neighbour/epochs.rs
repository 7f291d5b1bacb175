//! Who copies, and that a region which is withdrawn is left by all: between processes, by words of a board.
//!
//! A copier's word is odd while it copies. It makes it so first and looks at the region second; the owner withdraws the region
//! first and looks at the words second. Both pass a fence in between, so one of two that meet sees the other: the copier finds
//! the region withdrawn, or the owner finds it copying and waits until its word has changed.
//!
//! Checked by plugin-tests/sim/tests/interleavings.rs.

use crate::sync::{AtomicU64, Ordering, fence};

/// What a region's word holds when there is none.
const NONE: u64 = 0;

/// The words of a place for a region. The place is given to others after the region, which have other generations.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub generation: &'a AtomicU64,
    pub addr: &'a AtomicU64,
    pub len: &'a AtomicU64,
}

impl Place<'_> {
    /// A region of this generation, never 0, is there from now on, with this address and length.
    pub fn publish(self, generation: u64, (addr, len): (u64, u64)) {
        self.addr.store(addr, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Release);
    }

    /// No turn that begins from now on finds the region.
    pub fn withdraw(self) {
        self.generation.store(NONE, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// The range of the region of this generation, if it is there. To be asked within a turn: then it stays until that is over.
    pub fn range(self, generation: u64) -> Option<(u64, u64)> {
        let is_there = || self.generation.load(Ordering::Acquire) == generation;
        if !is_there() {
            return None;
        }
        let range = (self.addr.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        // The place may be another region's by now: then this is not believed.
        fence(Ordering::Acquire);
        is_there().then_some(range)
    }
}

/// A turn begins: regions are looked at after it. The word is this copier's alone.
pub(super) fn begin(epoch: &AtomicU64) {
    epoch.fetch_add(1, Ordering::AcqRel);
    fence(Ordering::SeqCst);
}

/// The turn is over: nothing more is copied.
pub(super) fn end(epoch: &AtomicU64) {
    epoch.fetch_add(1, Ordering::Release);
}

/// The turn that a copier is in, asked after regions were withdrawn; `None` if it is in none.
pub(super) fn turn(epoch: &AtomicU64) -> Option<u64> {
    let seen = epoch.load(Ordering::Acquire);
    (seen % 2 == 1).then_some(seen)
}

/// Whether that turn is over, and what was copied in it has arrived.
pub(super) fn is_over(epoch: &AtomicU64, turn: u64) -> bool {
    epoch.load(Ordering::Acquire) != turn
}
