//! What arrives from an agent of ours: notifications in fragments, each with the number of its notification.
//!
//! A notification that is here in one fragment, as nearly all are, leaves no trace. No fabric delivers a fragment twice,
//! and nobody sends one again, so what was delivered need not be remembered.

use std::collections::HashMap;

use super::assembly::{Assembly, Budget, Fit, Place};
use crate::error::Result;
use crate::wire::Fragment;
use crate::wire::serdes::malformed;

#[derive(Debug)]
pub(super) struct MessageReceiver {
    notif_bytes_max: u64,
    unfinished: HashMap<u64, Message>,
}

#[derive(Debug)]
struct Message {
    assembly: Assembly,
    total_len: u32,
}

impl MessageReceiver {
    pub(super) fn new(notif_bytes_max: u64) -> Self {
        Self { notif_bytes_max, unfinished: HashMap::new() }
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
        if payload.len() == total_len as usize && !self.unfinished.contains_key(&id) {
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
            return Ok(Some(message.assembly.finish(budget)));
        }
        if message.assembly.arrived() > 0 {
            self.unfinished.insert(id, message);
        }
        taken.map(|()| None)
    }
}
