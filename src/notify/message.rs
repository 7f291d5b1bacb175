//! What arrives from an agent of ours: notifications in fragments, each with the number of its notification.
//!
//! No fabric delivers a fragment twice, but a sender whose rail failed sends again what was under way, so it is remembered
//! which numbers were delivered: in order that is a count.

use std::collections::{BTreeMap, HashMap};

use super::assembly::{Assembly, Budget, Fit, Place};
use crate::error::Result;
use crate::wire::Fragment;
use crate::wire::serdes::malformed;

#[derive(Debug)]
pub(super) struct MessageReceiver {
    notif_bytes_max: u64,
    delivered: Delivered,
    unfinished: HashMap<u64, Message>,
}

#[derive(Debug)]
struct Message {
    assembly: Assembly,
    total_len: u32,
}

impl MessageReceiver {
    pub(super) fn new(notif_bytes_max: u64) -> Self {
        Self { notif_bytes_max, delivered: Delivered::default(), unfinished: HashMap::new() }
    }

    pub(super) fn on_fragment(
        &mut self,
        fragment: &Fragment<'_>,
        budget: &mut Budget,
    ) -> Result<Option<Vec<u8>>> {
        let &Fragment { message_id: id, total_len, offset, payload } = fragment;
        if u64::from(total_len) > self.notif_bytes_max {
            return Err(malformed(format!(
                "a notification of {total_len} bytes is longer than {} (`notif_bytes_max`)",
                self.notif_bytes_max
            )));
        }
        if self.delivered.holds(id) {
            return Ok(None);
        }
        if payload.len() == total_len as usize && !self.unfinished.contains_key(&id) {
            self.delivered.add(id);
            return Ok(Some(payload.to_vec()));
        }
        let known = self.unfinished.get(&id);
        if let Some(known) = known.filter(|known| known.total_len != total_len) {
            return Err(malformed(format!(
                "a notification of {} bytes has a fragment that says {total_len}",
                known.total_len
            )));
        }
        let fit = known.map_or(Fit::New, |known| known.assembly.fit(offset, payload));
        match fit {
            Fit::Repeated => return Ok(None),
            Fit::Overlap => {
                return Err(malformed(format!(
                    "{} bytes at {offset} of a notification overlap others",
                    payload.len()
                )));
            }
            Fit::New => {}
        }
        // Only what the budget has room for leaves an entry.
        let mut message = self
            .unfinished
            .remove(&id)
            .unwrap_or_else(|| Message { assembly: Assembly::new(Place::Offset), total_len });
        let taken = message.assembly.insert(offset, payload, budget);
        if message.assembly.next() == total_len {
            self.delivered.add(id);
            return Ok(Some(message.assembly.finish(budget)));
        }
        if message.assembly.arrived() > 0 {
            self.unfinished.insert(id, message);
        }
        taken.map(|()| None)
    }
}

/// Gaps between delivered numbers that are kept; beyond, the oldest is taken as delivered. An honest peer has as many as it
/// has notifications under way, and one for each that it gave up.
const GAPS_MAX: usize = 1024;

/// Numbers of notifications that were delivered; they count up from 1.
#[derive(Debug, Default)]
struct Delivered {
    highest: u64,
    /// Numbers below that are missing: first and last of each row.
    gaps: BTreeMap<u64, u64>,
}

impl Delivered {
    fn holds(&self, id: u64) -> bool {
        id <= self.highest && self.gap(id).is_none()
    }

    fn add(&mut self, id: u64) {
        if id > self.highest {
            if id > self.highest + 1 {
                self.gaps.insert(self.highest + 1, id - 1);
            }
            self.highest = id;
        } else if let Some((first, last)) = self.gap(id) {
            self.gaps.remove(&first);
            if first < id {
                self.gaps.insert(first, id - 1);
            }
            if id < last {
                self.gaps.insert(id + 1, last);
            }
        }
        if self.gaps.len() > GAPS_MAX {
            self.gaps.pop_first();
        }
    }

    /// The gap that a number lies in.
    fn gap(&self, id: u64) -> Option<(u64, u64)> {
        let (&first, &last) = self.gaps.range(..=id).next_back()?;
        (id <= last).then_some((first, last))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn delivered_numbers_are_told_from_others(ids in prop::collection::vec(1u64..60, 0..200)) {
            let (mut delivered, mut model) = (Delivered::default(), BTreeSet::new());
            for id in ids {
                delivered.add(id);
                model.insert(id);
                prop_assert!((1..70).all(|id| delivered.holds(id) == model.contains(&id)));
            }
        }
    }

    #[test]
    fn gaps_have_a_limit() {
        let mut delivered = Delivered::default();
        for id in (2..10_000).step_by(2) {
            delivered.add(id);
        }
        delivered.add(u64::MAX);
        assert!(delivered.gaps.len() <= GAPS_MAX);
        assert!(delivered.holds(1) && !delivered.holds(9_999) && delivered.holds(u64::MAX));
    }
}
