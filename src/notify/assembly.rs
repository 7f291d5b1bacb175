//! One message out of fragments in any order.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::wire::serdes::malformed;

/// What keeping one fragment costs beside its bytes, about: map entries, their slack and an allocation.
const FRAGMENT_COST: u64 = 192;

/// Bytes that one peer may make us hold.
#[derive(Debug)]
pub(super) struct Budget {
    used: u64,
    max: u64,
}

impl Budget {
    pub(super) fn new(max: u64) -> Self {
        Self { used: 0, max }
    }

    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Whether a fragment of this size fits.
    pub(super) fn has_room(&self, payload: usize) -> bool {
        self.max - self.used >= payload as u64 + FRAGMENT_COST
    }

    fn charge(&mut self, payload: usize) -> Result<u64> {
        let cost = payload as u64 + FRAGMENT_COST;
        if self.max - self.used < cost {
            return Err(malformed(format!(
                "{} bytes of unfinished notifications wait; one more fragment would pass the limit of {} (`pending_bytes_max`)",
                self.used, self.max
            )));
        }
        self.used += cost;
        Ok(cost)
    }

    fn release(&mut self, cost: u64) {
        self.used -= cost;
    }
}

/// What a fragment's place counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Fragments: 0, 1, 2.
    Index,
    /// Bytes of the message.
    Offset,
}

/// Fragments of one message. Memory grows with what has arrived, never with what is announced.
#[derive(Debug)]
pub(super) struct Assembly {
    place: Place,
    /// The message up to the first gap.
    data: Vec<u8>,
    /// Place of the first gap.
    next: u32,
    /// Fragments behind the first gap.
    early: BTreeMap<u32, Box<[u8]>>,
    /// Bytes that have arrived.
    arrived: u64,
    charged: u64,
}

/// How a fragment lies to those that are here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// It fills a gap.
    New,
    /// It is here already, or a fragment at its place is.
    Repeated,
    /// It covers a part of another.
    Overlap,
}

impl Assembly {
    pub(super) fn new(place: Place) -> Self {
        Self { place, data: Vec::new(), next: 0, early: BTreeMap::new(), arrived: 0, charged: 0 }
    }

    /// Place of the first gap: the message's end when all is here.
    pub(super) fn next(&self) -> u32 {
        self.next
    }

    /// Fragments that wait behind the first gap.
    pub(super) fn early_count(&self) -> usize {
        self.early.len()
    }

    pub(super) fn arrived(&self) -> u64 {
        self.arrived
    }

    /// Places that a payload takes. Callers have checked that `at` and this stay within the message.
    fn span(&self, payload: &[u8]) -> u32 {
        match self.place {
            Place::Index => 1,
            Place::Offset => payload.len() as u32,
        }
    }

    pub(super) fn fit(&self, at: u32, payload: &[u8]) -> Fit {
        let end = at + self.span(payload);
        // An empty message is whole from the start; its one fragment is new all the same.
        if self.early.contains_key(&at) || (self.charged > 0 && end <= self.next) {
            return Fit::Repeated;
        }
        let before = self.early.range(..at).next_back();
        let runs_into = before.is_some_and(|(start, bytes)| start + self.span(bytes) > at);
        let covers = self.early.range(at..).next().is_some_and(|(start, _)| *start < end);
        if at < self.next || runs_into || covers { Fit::Overlap } else { Fit::New }
    }

    /// Takes a fragment that [`fit`](Self::fit) calls new.
    pub(super) fn insert(&mut self, at: u32, payload: &[u8], budget: &mut Budget) -> Result<()> {
        debug_assert_eq!(self.fit(at, payload), Fit::New);
        self.charged += budget.charge(payload.len())?;
        self.arrived += payload.len() as u64;
        if at != self.next {
            self.early.insert(at, payload.into());
            return Ok(());
        }
        self.next += self.span(payload);
        self.data.extend_from_slice(payload);
        while let Some(bytes) = self.early.remove(&self.next) {
            self.next += self.span(&bytes);
            self.data.extend_from_slice(&bytes);
        }
        Ok(())
    }

    /// Ends the assembly and gives its bytes back to the budget.
    pub(super) fn finish(self, budget: &mut Budget) -> Vec<u8> {
        budget.release(self.charged);
        self.data
    }
}
