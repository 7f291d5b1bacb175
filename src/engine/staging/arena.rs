//! Which slots of a region are free.

use std::sync::atomic::{AtomicU64, Ordering};

/// Slots that lie one behind the other. Whoever took it gives it back, once: it cannot be copied.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    arena: u64,
    first: u16,
    count: u16,
}

impl Run {
    /// Its first slot.
    pub fn first(&self) -> u16 {
        self.first
    }

    /// Its number of slots.
    pub fn count(&self) -> u16 {
        self.count
    }
}

/// The slots of a region.
pub struct Arena {
    /// Tells its runs from those of every other.
    id: u64,
    slot_bytes: u32,
    free: Vec<bool>,
}

impl Arena {
    /// All are free.
    pub fn new(slots: u16, slot_bytes: u32) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Self { id, slot_bytes, free: vec![true; slots.into()] }
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.free.len()
    }

    /// Bytes from the beginning of the region to that of a run. `None` if the run is of a region that was given up.
    pub fn offset(&self, run: &Run) -> Option<u64> {
        (run.arena == self.id).then(|| u64::from(run.first) * u64::from(self.slot_bytes))
    }

    /// Bytes of a run.
    pub fn bytes(&self, run: &Run) -> u64 {
        u64::from(run.count) * u64::from(self.slot_bytes)
    }

    /// Takes the first run for so many bytes; where there is none so long, the longest, if it holds `least`.
    pub fn take(&mut self, bytes: u64, least: u64) -> Option<Run> {
        let slots = |bytes: u64| bytes.div_ceil(self.slot_bytes.into()).max(1) as usize;
        let (wanted, least) = (slots(bytes), slots(least));
        let (mut first, mut longest) = (0, 0..0);
        while first < self.free.len() && longest.len() < wanted {
            let count = self.free[first..].iter().take(wanted).take_while(|free| **free).count();
            if count > longest.len() {
                longest = first..first + count;
            }
            first += count + 1;
        }
        if longest.len() < least {
            return None;
        }
        self.free[longest.clone()].fill(false);
        Some(Run { arena: self.id, first: longest.start as u16, count: longest.len() as u16 })
    }

    /// Takes a run back; one of a region that was given up is nothing.
    #[allow(clippy::needless_pass_by_value, reason = "nobody gives it back twice")]
    pub fn give_back(&mut self, run: Run) {
        if run.arena != self.id {
            return;
        }
        let slots = usize::from(run.first)..usize::from(run.first) + usize::from(run.count);
        debug_assert!(self.free[slots.clone()].iter().all(|free| !free), "{run:?} was free");
        self.free[slots].fill(true);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_never_meet_and_none_is_lost(slots in 1_u16..200, steps in prop::collection::vec((0_u64..40, 0_u64..40, any::<usize>()), 0..200)) {
            let mut arena = Arena::new(slots, 4096);
            let mut taken: Vec<Run> = Vec::new();
            for (wanted, least, which) in steps {
                if let Some(run) = arena.take(wanted * 4096, least.min(wanted) * 4096) {
                    prop_assert!(u64::from(run.count()) >= least.min(wanted) && u64::from(run.count()) <= wanted.max(1));
                    prop_assert!(arena.offset(&run).unwrap() + arena.bytes(&run) <= u64::from(slots) * 4096);
                    let meets = |other: &Run| run.first < other.first + other.count && other.first < run.first + run.count;
                    prop_assert!(!taken.iter().any(meets));
                    taken.push(run);
                } else {
                    let free = arena.free.split(|free| !free).map(<[bool]>::len).max().unwrap_or(0);
                    prop_assert!((free as u64) < least.min(wanted).max(1), "{free} lie free");
                }
                if which % 3 == 0 && !taken.is_empty() {
                    arena.give_back(taken.swap_remove(which % taken.len()));
                }
            }
            for run in taken {
                arena.give_back(run);
            }
            let other = Arena::new(slots, 4096).take(4096, 0).unwrap();
            prop_assert_eq!(arena.offset(&other), None);
            let all = arena.take(u64::MAX, 0).unwrap();
            arena.give_back(other);
            prop_assert_eq!((all.count(), arena.take(1, 0)), (slots, None));
        }
    }
}
