//! What arrives from an agent that speaks version 2: numbers of 64 bits that never wrap, and a window of transfers.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::assembly::{Assembly, Budget, Fit, Place};
use super::ids::{ACK_EVERY, WINDOW};
use crate::error::Result;
use crate::wire::Fragment;
use crate::wire::immediate::ID_LOW_COUNT;
use crate::wire::serdes::malformed;

/// Messages by which arrival may run ahead of the oldest that lacks. Beyond it the oldest count as arrived.
const MESSAGES_AHEAD_MAX: u64 = 1 << 16;

#[derive(Debug)]
pub(super) struct SessionReceiver {
    notif_bytes_max: u64,
    /// Every transfer below is done. The first is 1.
    floor: u64,
    /// The floor last given to the sender.
    acked: u64,
    /// Transfers from the floor on, as far as anything of them was seen; at most [`WINDOW`].
    transfers: VecDeque<Transfer>,
    /// Unfinished stand-alone messages.
    messages: HashMap<u64, Message>,
    delivered: Delivered,
}

#[derive(Debug, Default)]
struct Transfer {
    writes: u32,
    done: bool,
    message: Option<Box<Message>>,
}

#[derive(Debug)]
struct Message {
    assembly: Assembly,
    total_len: u32,
    expected_writes: u32,
}

/// Stand-alone messages that came out already: each below the floor, and some above it.
#[derive(Debug)]
struct Delivered {
    floor: u64,
    above: BTreeSet<u64>,
}

impl Delivered {
    fn contains(&self, id: u64) -> bool {
        id < self.floor || self.above.contains(&id)
    }

    fn insert(&mut self, id: u64) {
        self.above.insert(id);
        let oldest = (id + 1).saturating_sub(MESSAGES_AHEAD_MAX);
        if oldest > self.floor {
            self.above = self.above.split_off(&oldest);
            self.floor = oldest;
        }
        while self.above.remove(&self.floor) {
            self.floor += 1;
        }
    }
}

impl Message {
    fn new(fragment: &Fragment<'_>) -> Self {
        Self {
            assembly: Assembly::new(Place::Offset),
            total_len: fragment.total_len,
            expected_writes: fragment.expected_writes,
        }
    }

    /// Takes a fragment; one that is here already changes nothing.
    fn take(&mut self, fragment: &Fragment<'_>, budget: &mut Budget) -> Result<()> {
        if (fragment.total_len, fragment.expected_writes) != (self.total_len, self.expected_writes) {
            return Err(malformed(format!(
                "a notification of {} bytes after {} writes has a fragment that says {} after {}",
                self.total_len, self.expected_writes, fragment.total_len, fragment.expected_writes
            )));
        }
        match self.assembly.fit(fragment.offset, fragment.payload) {
            Fit::New => self.assembly.insert(fragment.offset, fragment.payload, budget),
            Fit::Repeated => Ok(()),
            Fit::Overlap => Err(malformed(format!(
                "{} bytes at {} of a notification overlap others",
                fragment.payload.len(),
                fragment.offset
            ))),
        }
    }

    fn is_whole(&self) -> bool {
        self.assembly.next() == self.total_len
    }
}

impl SessionReceiver {
    pub(super) fn new(notif_bytes_max: u64) -> Self {
        Self {
            notif_bytes_max,
            floor: 1,
            acked: 1,
            transfers: VecDeque::new(),
            messages: HashMap::new(),
            delivered: Delivered { floor: 1, above: BTreeSet::new() },
        }
    }

    /// A write of a transfer that is done, because it failed, means nothing any more.
    pub(super) fn on_immediate(&mut self, id_low: u16, budget: &mut Budget) -> Option<Vec<u8>> {
        let ahead = id_low.wrapping_sub(self.floor as u16) % ID_LOW_COUNT;
        let transfer = self.transfer_mut(self.floor + u64::from(ahead)).ok()??;
        transfer.writes = transfer.writes.saturating_add(1);
        self.deliver(ahead as usize, budget)
    }

    pub(super) fn on_fragment(
        &mut self,
        fragment: &Fragment<'_>,
        budget: &mut Budget,
    ) -> Result<Option<Vec<u8>>> {
        if u64::from(fragment.total_len) > self.notif_bytes_max {
            return Err(malformed(format!(
                "a notification has {} bytes, more than {} (`notif_bytes_max`)",
                fragment.total_len, self.notif_bytes_max
            )));
        }
        if fragment.transfer_id == 0 {
            return self.on_message_fragment(fragment, budget);
        }
        let Some(transfer) = self.transfer_mut(fragment.transfer_id)? else { return Ok(None) };
        if let Some(message) = &mut transfer.message {
            message.take(fragment, budget)?;
        } else {
            let mut message = Message::new(fragment);
            message.take(fragment, budget)?;
            transfer.message = Some(Box::new(message));
        }
        Ok(self.deliver((fragment.transfer_id - self.floor) as usize, budget))
    }

    fn on_message_fragment(
        &mut self,
        fragment: &Fragment<'_>,
        budget: &mut Budget,
    ) -> Result<Option<Vec<u8>>> {
        let id = fragment.message_id;
        if let Some(message) = self.messages.get_mut(&id) {
            message.take(fragment, budget)?;
            if !message.is_whole() {
                return Ok(None);
            }
            self.delivered.insert(id);
            return Ok(self.messages.remove(&id).map(|message| message.assembly.finish(budget)));
        }
        if self.delivered.contains(id) {
            return Ok(None);
        }
        let mut message = Message::new(fragment);
        message.take(fragment, budget)?;
        if message.is_whole() {
            self.delivered.insert(id);
            return Ok(Some(message.assembly.finish(budget)));
        }
        self.messages.insert(id, message);
        Ok(None)
    }

    pub(super) fn on_failed(&mut self, transfer_id: u64, budget: &mut Budget) -> Result<()> {
        if let Some(transfer) = self.transfer_mut(transfer_id)? {
            transfer.done = true;
            if let Some(message) = transfer.message.take() {
                message.assembly.finish(budget);
            }
            self.raise_floor();
        }
        Ok(())
    }

    pub(super) fn take_ack(&mut self) -> Option<u64> {
        if self.floor - self.acked < ACK_EVERY {
            return None;
        }
        self.acked = self.floor;
        Some(self.floor)
    }

    /// `None` for a transfer that is done; an error for one outside the window.
    fn transfer_mut(&mut self, id: u64) -> Result<Option<&mut Transfer>> {
        let Some(ahead) = id.checked_sub(self.floor) else { return Ok(None) };
        if ahead >= WINDOW {
            return Err(malformed(format!(
                "transfer {id} is beyond the window of {WINDOW} from {}",
                self.floor
            )));
        }
        let at = ahead as usize;
        if self.transfers.len() <= at {
            self.transfers.resize_with(at + 1, Transfer::default);
        }
        Ok(Some(&mut self.transfers[at]).filter(|transfer| !transfer.done))
    }

    fn deliver(&mut self, at: usize, budget: &mut Budget) -> Option<Vec<u8>> {
        let transfer = &mut self.transfers[at];
        let writes = transfer.writes;
        let ready = |message: &mut Box<Message>| message.is_whole() && writes >= message.expected_writes;
        let message = transfer.message.take_if(ready)?;
        transfer.done = true;
        self.raise_floor();
        Some(message.assembly.finish(budget))
    }

    fn raise_floor(&mut self) {
        while self.transfers.front().is_some_and(|transfer| transfer.done) {
            self.transfers.pop_front();
            self.floor += 1;
        }
    }
}
