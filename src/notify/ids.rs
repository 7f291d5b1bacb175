//! The sender's numbers, one set for each peer.

use std::collections::HashSet;

/// Numbers for notifications to a stock peer: 1 to 65535, then again from 1, so that the fragments of two of them do not
/// mix.
///
/// A stock receiver forgets a number when it has delivered its notification. One that never was, because a fragment
/// was lost, stays there for ever and would eat the fragments of the next: [`retire`](Self::retire) it.
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
