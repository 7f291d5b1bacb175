//! How much of shared work a rail holds at a time.
//!
//! Little, so that a slow rail does not sit on what a fast one could have done; but enough that the rail never runs dry
//! between two looks at it. How long that is depends on who drives, so it is learned: a rail that ran dry while there
//! was more to take may hold twice as much, one that did not a little less.

/// Operations and bytes that a rail may hold at first: at 100 Gb/s and some 20 us to a peer and back about 250 KB are
/// under way, and few devices complete more than 128 operations in that time.
const OPERATIONS_MIN: u32 = 128;
const BYTES_MIN: u64 = 2 << 20;
/// Doublings at the most: 2 GiB.
const LEVEL_MAX: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct Window {
    level: u32,
}

impl Window {
    /// Operations that the rail may hold.
    pub fn operations(&self) -> u32 {
        OPERATIONS_MIN << self.level
    }

    /// Bytes that the rail may hold.
    pub fn bytes(&self) -> u64 {
        BYTES_MIN << self.level
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
        let first = (window.operations(), window.bytes());
        window.ran_dry();
        assert_eq!((window.operations(), window.bytes()), (first.0 * 2, first.1 * 2));
        for _ in 0..100 {
            window.ran_dry();
        }
        assert_eq!(window.bytes(), 2 << 30);
        for _ in 0..100 {
            window.sufficed();
        }
        assert_eq!((window.operations(), window.bytes()), first);
    }
}
