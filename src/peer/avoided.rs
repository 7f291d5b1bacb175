//! Ways to a peer that led nowhere while others did.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::types::RailId;

/// How long such a way is left alone. A transfer that tries it again in vain waits for as long as a NIC tries.
pub(super) const REST: Duration = Duration::from_secs(60);

/// Pairs of a rail here and an endpoint there.
#[derive(Default)]
pub(super) struct Avoided {
    /// There are some: asked for each lane of a post.
    some: AtomicBool,
    since: Mutex<HashMap<(RailId, u16), Instant>>,
}

impl Avoided {
    /// Adds one. Whether it is new.
    pub fn add(&self, rail: RailId, endpoint: u16, now: Instant) -> bool {
        let is_new = self.lock().insert((rail, endpoint), now).is_none();
        self.some.store(true, Ordering::Relaxed);
        is_new
    }

    pub fn holds(&self, rail: RailId, endpoint: u16) -> bool {
        self.some.load(Ordering::Relaxed) && self.holds_at(rail, endpoint, Instant::now())
    }

    fn holds_at(&self, rail: RailId, endpoint: u16, now: Instant) -> bool {
        let mut since = self.lock();
        let Some(at) = since.get(&(rail, endpoint)) else { return false };
        if now.duration_since(*at) < REST {
            return true;
        }
        since.remove(&(rail, endpoint));
        self.some.store(!since.is_empty(), Ordering::Relaxed);
        false
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(RailId, u16), Instant>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_rests_for_a_while() {
        let (avoided, now) = (Avoided::default(), Instant::now());
        assert!(!avoided.holds(RailId(1), 2));
        assert!(avoided.add(RailId(1), 2, now) && !avoided.add(RailId(1), 2, now));
        assert!(avoided.holds(RailId(1), 2) && !avoided.holds(RailId(2), 1));
        assert!(!avoided.holds_at(RailId(1), 2, now + REST));
        assert!(!avoided.holds(RailId(1), 2) && avoided.add(RailId(1), 2, now));
    }
}
