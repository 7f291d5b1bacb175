//! Work: operations that several rails share by taking of them what they have room for.

use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Destination, Event};
use crate::error::Error;
use crate::fabric::RmaList;
use crate::types::Op;

/// What belongs to a piece of work or a message, given back with its event. A rail does not look at it.
pub type Tag = Arc<dyn Any + Send + Sync>;

/// One post of a list of operations. Rails that are invited claim ranges of it, so the load follows what each gets
/// done. It is over when every operation is settled: completed, failed, or given up.
pub struct Work {
    op: Op,
    len: u32,
    bytes: u64,
    /// Operations settled.
    settled: AtomicU32,
    /// Nothing more of it is posted.
    stopped: AtomicBool,
    claims: Mutex<Claims>,
    tag: Tag,
}

struct Claims {
    /// Gone when the work is over: an invitation that nobody has looked at keeps no memory registered.
    list: Option<Arc<RmaList>>,
    /// Operations from here on are nobody's yet.
    next: u32,
    /// Operations before that which are nobody's again.
    returned: Vec<Range<u32>>,
    /// Lanes that have returned theirs.
    left: Vec<u16>,
    /// Those of them that did not reach the peer, with the reason.
    lost: Vec<(u16, Error)>,
    /// Lanes that have had no answer of the peer yet, with the reason to doubt that one comes.
    doubted: Vec<(u16, Error)>,
    error: Option<Error>,
}

impl Work {
    /// Work on a list that is not empty.
    pub fn new(op: Op, list: Arc<RmaList>, tag: Tag) -> Arc<Self> {
        debug_assert!(!list.is_empty());
        Arc::new(Self {
            op,
            len: list.len(),
            bytes: list.bytes(),
            settled: AtomicU32::new(0),
            stopped: AtomicBool::new(false),
            claims: Mutex::new(Claims {
                list: Some(list),
                next: 0,
                returned: Vec::new(),
                left: Vec::new(),
                lost: Vec::new(),
                doubted: Vec::new(),
                error: None,
            }),
            tag,
        })
    }

    /// Direction.
    pub fn op(&self) -> Op {
        self.op
    }

    /// Operations.
    #[allow(clippy::len_without_is_empty, reason = "there is no empty work")]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whose it is.
    pub fn tag(&self) -> &Tag {
        &self.tag
    }

    /// The first error of an operation.
    pub fn error(&self) -> Option<Error> {
        self.lock().error.clone()
    }

    /// Whether every operation is settled.
    pub fn is_over(&self) -> bool {
        self.settled.load(Ordering::Acquire) == self.len
    }

    /// Gives up what nobody has claimed. Whether that was all that was left: then nobody else says that it is over.
    #[must_use]
    pub fn stop(&self) -> bool {
        self.stopped.store(true, Ordering::Relaxed);
        let unclaimed = {
            let mut claims = self.lock();
            let returned: usize = claims.returned.drain(..).map(|range| range.len()).sum();
            let unclaimed = self.len - claims.next;
            claims.next = self.len;
            unclaimed + returned as u32
        };
        self.settle(unclaimed)
    }

    /// Records the first error, and gives up what nobody has claimed.
    pub(super) fn fail(self: &Arc<Self>, error: Error, events: &mut Vec<Event>) {
        {
            let mut claims = self.lock();
            // What is over is over well: its error was read already, or there is none.
            if claims.list.is_none() || claims.error.is_some() {
                return;
            }
            claims.error = Some(error);
        }
        let work = Arc::clone(self);
        events.push(if self.stop() { Event::WorkOver { work } } else { Event::WorkFailed { work } });
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Takes operations: of `operations_max` at the most, as many as have `bytes_max`, but one at least.
    pub(super) fn claim(&self, operations_max: u32, bytes_max: u64) -> Option<(Arc<RmaList>, Range<u32>)> {
        let mut claims = self.lock();
        let list = claims.list.clone()?;
        let Range { start, end: limit } =
            if claims.next < self.len { claims.next..self.len } else { claims.returned.pop()? };
        let most = start.saturating_add(operations_max).min(limit);
        let mut bytes = 0;
        let end = (start..most)
            .find(|&index| {
                bytes += u64::from(list.slices()[index as usize].len);
                bytes > bytes_max && index > start
            })
            .unwrap_or(most);
        if claims.next < self.len {
            claims.next = end;
        } else if end < limit {
            claims.returned.push(end..limit);
        }
        (end > start).then_some((list, start..end))
    }

    /// A lane leaves: what it has claimed and what is not all known to be done is nobody's again. `settled` of that were
    /// said to be settled, not all. `lost` says why it does not reach the peer, if that is so. False if the work was stopped:
    /// then what is not settled has to be.
    pub(super) fn give_back(
        &self,
        lane: u16,
        ranges: impl IntoIterator<Item = Range<u32>>,
        settled: u32,
        lost: Option<Error>,
    ) -> bool {
        let mut claims = self.lock();
        if self.is_stopped() {
            return false;
        }
        claims.returned.extend(ranges);
        claims.left.push(lane);
        claims.lost.extend(lost.map(|why| (lane, why)));
        // Under the lock: whoever stops the work comes before, and is seen, or settles what was returned.
        self.settled.fetch_sub(settled, Ordering::AcqRel);
        true
    }

    /// The lanes that did not reach the peer, with the reason.
    pub fn lost(&self) -> Vec<(u16, Error)> {
        self.lock().lost.clone()
    }

    /// A lane has had no answer of the peer for long.
    pub(super) fn doubt(&self, lane: u16, why: Error) {
        self.lock().doubted.push((lane, why));
    }

    /// The answer came.
    pub(super) fn trust(&self, lane: u16) {
        self.lock().doubted.retain(|(doubted, _)| *doubted != lane);
    }

    /// The lanes that were of no use, with the reason: those that did not reach the peer, and those without an answer.
    pub fn useless(&self) -> Vec<(u16, Error)> {
        let claims = self.lock();
        claims.lost.iter().chain(&claims.doubted).cloned().collect()
    }

    /// Its operations, until it is over.
    pub(super) fn list(&self) -> Option<Arc<RmaList>> {
        self.lock().list.clone()
    }

    /// Whether there is something to claim, now that a lane has left.
    pub fn wants_rails(&self) -> bool {
        let claims = self.lock();
        claims.list.is_some() && (claims.next < self.len || !claims.returned.is_empty())
    }

    /// Whether a lane has left the work.
    pub fn was_left_by(&self, lane: u16) -> bool {
        self.lock().left.contains(&lane)
    }

    /// Operations that were claimed are over. Whether that is the end of the work; then whoever is told so says it on.
    #[must_use]
    pub(super) fn settle(&self, count: u32) -> bool {
        if count == 0 || self.settled.fetch_add(count, Ordering::AcqRel) + count < self.len {
            return false;
        }
        self.lock().list = None;
        true
    }

    fn lock(&self) -> MutexGuard<'_, Claims> {
        // Every change is a plain store: a panic elsewhere leaves nothing half done.
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A rail's way into a piece of work.
#[derive(Clone)]
pub struct Invitation {
    /// The work.
    pub work: Arc<Work>,
    /// The lane of its list that begins at this rail.
    pub lane: u16,
    /// Where that lane leads.
    pub destination: Destination,
    /// Whether other rails are invited too: then this one takes a little at a time.
    pub shared: bool,
}
