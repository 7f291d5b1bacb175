//! What one rail does of one piece of work.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::destination::DestinationKey;
use super::work::{Invitation, Work};
use crate::error::Error;

/// What the rail does of one piece of work. The endpoint knows it by the same number, from the first claim of
/// operations until none is held any more.
pub(super) struct Share {
    pub work: Arc<Work>,
    pub lane: u16,
    pub destination: DestinationKey,
    pub kind: Kind,
    /// Others were invited, because its destination does not answer.
    pub waits: bool,
    /// Operations claimed and not posted.
    pub claimed: Range<u32>,
    /// Operations posted and not settled. The endpoint counts those in flight; of some it may have told already what was
    /// not looked at yet.
    pub posted: u32,
    /// Bytes of those.
    pub posted_bytes: u64,
    /// It stands in the queue of shares with something to claim or to post.
    pub queued: bool,
    pub fed: Fed,
    /// What was claimed since nothing was last held.
    pub held: Held,
    /// Nothing more is posted, and what was not done goes back to the work, because of this.
    pub leaving: Option<Box<Error>>,
    /// When its NIC last gave up an operation because it could not reach the peer.
    pub given_up: Option<Instant>,
}

/// Whose the work is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// This rail's alone.
    Alone,
    /// Other rails take of it, too.
    Shared,
    /// Nobody's: it asks whether the destination answers; see `probe.rs`.
    Probe,
}

/// How a share has been supplied with operations.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fed {
    NotYet,
    /// It never ran dry.
    Enough,
    RanDry,
}

impl Share {
    pub fn new(invitation: Invitation, destination: DestinationKey) -> Self {
        let Invitation { work, lane, shared, .. } = invitation;
        Self {
            work,
            lane,
            destination,
            kind: if shared { Kind::Shared } else { Kind::Alone },
            waits: false,
            claimed: 0..0,
            posted: 0,
            posted_bytes: 0,
            queued: true,
            fed: Fed::NotYet,
            held: Held::default(),
            leaving: None,
            given_up: None,
        }
    }

    pub fn is_shared(&self) -> bool {
        self.kind == Kind::Shared
    }

    pub fn is_probe(&self) -> bool {
        self.kind == Kind::Probe
    }

    /// Whether nothing is claimed or in flight.
    pub fn is_empty(&self) -> bool {
        self.posted == 0 && self.claimed.is_empty()
    }
}

/// Operations that a share has claimed, of which not all are known to be done. Which of them are is not kept: that would
/// be one more word for each operation in flight, for the day on which a device fails.
#[derive(Default)]
pub(super) struct Held {
    last: Range<u32>,
    before: Vec<Range<u32>>,
    /// So many of them are settled.
    pub settled: u32,
}

impl Held {
    pub fn claimed(&mut self, range: &Range<u32>) {
        if self.last.end == range.start {
            self.last.end = range.end;
        } else {
            let last = std::mem::replace(&mut self.last, range.clone());
            self.before.extend(Some(last).filter(|last| !last.is_empty()));
        }
    }

    pub fn clear(&mut self) {
        self.last = 0..0;
        self.before.clear();
        self.settled = 0;
    }

    /// So many operations.
    pub fn len(&self) -> u32 {
        self.ranges().map(|range| range.len() as u32).sum()
    }

    pub fn ranges(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        self.before.iter().chain(Some(&self.last)).filter(|range| !range.is_empty()).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_continue_are_one() {
        let mut held = Held::default();
        for range in [5..8, 8..10, 20..21, 0..2] {
            held.claimed(&range);
        }
        assert_eq!(held.ranges().collect::<Vec<_>>(), [5..10, 20..21, 0..2]);
        assert_eq!(held.len(), 8);
        held.clear();
        assert_eq!(held.len(), 0);
    }
}
