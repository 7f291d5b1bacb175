//! Who holds a registration, and what uses it: no use begins after its last holder has gone without being seen.
//!
//! Checked by plugin-tests/sim/tests/interleavings.rs.

use crate::sync::{AtomicUsize, Ordering, fence};

/// The two counts. Either side changes its own and looks at the other's after a fence, so one of two that meet sees the other.
#[derive(Debug)]
pub(super) struct Uses {
    /// Posts in flight.
    in_use: AtomicUsize,
    /// At 0 no new post may begin.
    holders: AtomicUsize,
}

impl Uses {
    /// Not in use, with one holder.
    pub fn new() -> Self {
        Self { in_use: AtomicUsize::new(0), holders: AtomicUsize::new(1) }
    }

    /// A use begins. Whoever begins it looks afterwards whether it is [retired](Self::is_retired), and then ends it at once.
    pub fn begin(&self) {
        self.in_use.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    /// A use is over. `true` if it was the last, of what nobody holds any more.
    pub fn end(&self) -> bool {
        let last = self.in_use.fetch_sub(1, Ordering::AcqRel) == 1;
        fence(Ordering::SeqCst);
        last && self.is_retired()
    }

    /// Uses that are not over.
    pub fn count(&self) -> usize {
        self.in_use.load(Ordering::Acquire)
    }

    /// One more holder. `false` if there is none any more.
    pub fn add_holder(&self) -> bool {
        let more = |holders: usize| (holders > 0).then_some(holders + 1);
        self.holders.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    /// One holder less. `true` if that was the last: no new use begins.
    pub fn drop_holder(&self) -> bool {
        let last = self.holders.fetch_sub(1, Ordering::AcqRel) == 1;
        fence(Ordering::SeqCst);
        last
    }

    /// Whether the last holder has gone.
    pub fn is_retired(&self) -> bool {
        self.holders.load(Ordering::Acquire) == 0
    }
}
