//! How much of shared work a rail holds at a time.
//!
//! Little, so that a slow rail does not sit on what a fast one could have done; but enough that the rail never runs dry
//! between two looks at it. How long that is depends on who drives, so it is learned: a rail that ran dry while there
//! was more to take may hold twice as much, one that did not a little less.

use crate::fabric::BATCH_WRITES_MAX;

/// Operations and bytes that a rail may hold at first: at 100 Gb/s and some 20 us to a peer and back about 250 KB are
/// under way, and few devices complete more than 128 operations in that time.
const OPERATIONS_MIN: u32 = 128;
const BYTES_MIN: u64 = 2 << 20;
/// Doublings at the most: 2 GiB.
const LEVEL_MAX: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct Window {
    level: u32,
    operations: u32,
    bytes: u64,
}

impl Window {
    /// Operations of shared work that are in flight.
    pub fn operations(&self) -> u32 {
        self.operations
    }

    /// Whether nothing of shared work is in flight.
    pub fn is_empty(&self) -> bool {
        self.operations == 0
    }

    /// Operations and bytes that the rail may take now: whole batches for a doorbell. None where there is no room for one
    /// and what is in flight makes some.
    pub fn room(&self) -> Option<(u32, u64)> {
        let operations = (OPERATIONS_MIN << self.level).saturating_sub(self.operations);
        let operations = operations - operations % BATCH_WRITES_MAX;
        let bytes = (BYTES_MIN << self.level).saturating_sub(self.bytes);
        (self.is_empty() || (operations >= BATCH_WRITES_MAX && bytes > 0)).then_some((operations, bytes))
    }

    /// Operations that the rail may hold.
    pub fn operations_max(&self) -> u32 {
        OPERATIONS_MIN << self.level
    }

    /// So much is in flight.
    pub fn posted(&mut self, operations: u32, bytes: u64) {
        self.operations += operations;
        self.bytes += bytes;
    }

    /// So much no longer is.
    pub fn settled(&mut self, operations: u32, bytes: u64) {
        self.operations -= operations;
        self.bytes -= bytes;
    }

    /// The rail had nothing in flight, and there was more to take.
    pub fn ran_dry(&mut self) {
        self.level = (self.level + 1).min(LEVEL_MAX);
    }

    /// The rail has done its share of some work without running dry.
    pub fn sufficed(&mut self) {
        self.level = self.level.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_what_the_rail_needs_and_stays_within_bounds() {
        let mut window = Window::default();
        let first = window.room().unwrap();
        window.ran_dry();
        assert_eq!(window.room().unwrap(), (first.0 * 2, first.1 * 2));
        for _ in 0..100 {
            window.ran_dry();
        }
        assert_eq!(window.room().unwrap().1, 2 << 30);
        for _ in 0..100 {
            window.sufficed();
        }
        assert_eq!(window.room(), Some(first));
    }

    #[test]
    fn it_waits_for_room_that_is_worth_a_doorbell() {
        let mut window = Window::default();
        window.posted(OPERATIONS_MIN - BATCH_WRITES_MAX + 1, 4096);
        assert_eq!(window.room(), None);
        for settled in 1..BATCH_WRITES_MAX {
            window.settled(1, 0);
            assert_eq!(window.room().unwrap().0, BATCH_WRITES_MAX, "{settled} settled");
        }
        window.posted(BATCH_WRITES_MAX - 1, BYTES_MIN);
        assert_eq!(window.room(), None, "bytes count, too");
        window.settled(OPERATIONS_MIN - BATCH_WRITES_MAX + 1, BYTES_MIN + 4096);
        assert!(window.is_empty() && window.room().is_some());
    }
}
