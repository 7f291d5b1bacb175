//! What arrives from an agent that speaks the stock wire.
//!
//! Such an agent numbers transfers with 16 bits that wrap, draws them from one counter for all its peers, and sends
//! an immediate for every write, also where no notification follows. So a count can be left over when its number is
//! used again, and the wire does not tell. The rule here: numbers move forward, and what no write and no fragment
//! has touched while they moved on by half a turn (32768) belongs to an earlier use of its number and is forgotten.
//! Where we see only a few of the numbers, because most go to other peers, whole turns can pass unseen: then a count
//! left by a write without notification can still make one notification early. Only a newer wire can mend that.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::assembly::{Assembly, Budget, Fit, Place};
use crate::error::Result;
use crate::types::AgentName;
use crate::wire::serdes::malformed;
use crate::wire::{StockFirst, StockFragment};

/// Numbers in a turn.
const TURN: usize = 1 << 16;
const HALF_TURN: u32 = 1 << 15;
/// Unfinished notifications with number 0, which have to be searched.
const LOOSE_MAX: usize = 1024;
/// Transfers that are known to have failed before anything of their notification came.
const FAILED_MAX: usize = 1024;

#[derive(Debug)]
pub(super) struct StockReceiver {
    peer: AgentName,
    notif_bytes_max: u64,
    clock: Clock,
    /// Writes that arrived before the first fragment, by number: empty, or a full turn (512 KiB).
    early_writes: Vec<u64>,
    /// Unfinished notifications by number, other than 0.
    pending: HashMap<u16, Partial>,
    /// Unfinished notifications with number 0, oldest first: every stand-alone notification of a stock agent has it.
    loose: Vec<Partial>,
    /// Transfers that failed before the first fragment came, by number.
    failed: HashMap<u16, Failure>,
}

/// The furthest number seen, with its turns.
#[derive(Debug, Clone, Copy, Default)]
struct Clock {
    now: u32,
    started: bool,
}

impl Clock {
    fn saw(&mut self, id: u16) {
        // Stand-alone notifications have 0 at any time: it says nothing about where the numbers are.
        if id == 0 {
            return;
        }
        let ahead = u32::from(id.wrapping_sub(self.now as u16));
        if !self.started {
            *self = Self { now: u32::from(id), started: true };
        } else if ahead < HALF_TURN {
            self.now = self.now.wrapping_add(ahead);
        }
    }

    fn is_past(self, stamp: u32) -> bool {
        self.now.wrapping_sub(stamp) >= HALF_TURN
    }
}

/// Writes counted, and the clock at the last of them. Packed, because zeroed integers cost no memory until they are
/// written, and most peers use few numbers.
#[derive(Debug, Clone, Copy)]
struct EarlyWrites {
    count: u32,
    stamp: u32,
}

impl EarlyWrites {
    fn pack(self) -> u64 {
        u64::from(self.count) << 32 | u64::from(self.stamp)
    }

    fn unpack(bits: u64) -> Self {
        Self { count: (bits >> 32) as u32, stamp: bits as u32 }
    }
}

/// The sender's word that a transfer has failed.
#[derive(Debug, Clone, Copy)]
struct Failure {
    /// Writes that have arrived or will.
    final_writes: u32,
    /// The clock when it came.
    stamp: u32,
}

/// An unfinished notification.
#[derive(Debug)]
struct Partial {
    count: u16,
    first: Option<StockFirst>,
    assembly: Assembly,
    /// Its transfer has failed: it is not delivered, and ends when so many writes have come.
    failed: Option<u32>,
    /// Writes that have arrived; unused with number 0.
    writes: u32,
    /// The clock at the last fragment or write.
    stamp: u32,
}

impl Partial {
    fn new(count: u16, writes: u32, stamp: u32) -> Self {
        Self { count, first: None, assembly: Assembly::new(Place::Index), failed: None, writes, stamp }
    }

    fn is_whole(&self) -> bool {
        self.assembly.next() == u32::from(self.count)
    }

    /// Writes that it waits for, once it is whole.
    fn expected(&self) -> Option<u32> {
        let first = self.first.filter(|_| self.is_whole())?;
        Some(self.failed.unwrap_or(first.expected_writes))
    }

    fn is_ready(&self, writes: u32) -> bool {
        self.expected().is_some_and(|expected| writes >= expected)
    }

    /// Whether the fragment can be a part of this notification; the error says why not.
    fn check(&self, fragment: &StockFragment<'_>, notif_bytes_max: u64) -> Result<()> {
        let StockFragment { transfer_id: id, index, count, .. } = *fragment;
        if count != self.count {
            return Err(malformed(format!(
                "notification {id} has a fragment of {count}, others say it has {}",
                self.count
            )));
        }
        if self.assembly.fit(u32::from(index), &fragment.payload) != Fit::New {
            return Err(malformed(format!("fragment {index} of notification {id} came twice")));
        }
        let arrived = self.assembly.arrived() + fragment.payload.len() as u64;
        // Each fragment that lacks holds at least one byte.
        let lacking =
            u64::from(count) - 1 - u64::from(self.assembly.next()) - self.assembly.early_count() as u64;
        match self.first.or(fragment.first) {
            Some(first) => {
                let total = u64::from(first.total_len);
                if total - u64::from(first.name_len) > notif_bytes_max {
                    return Err(malformed(format!(
                        "notification {id} has {total} bytes, more than {notif_bytes_max} (`notif_bytes_max`)"
                    )));
                }
                let fits = if lacking == 0 { arrived == total } else { arrived + lacking <= total };
                if !fits {
                    return Err(malformed(format!(
                        "notification {id} announces {total} bytes; with fragment {index} it would have {arrived} and lack {lacking} fragments"
                    )));
                }
            }
            None if arrived > notif_bytes_max + u64::from(u16::MAX) => {
                return Err(malformed(format!(
                    "notification {id} has passed {notif_bytes_max} bytes (`notif_bytes_max`)"
                )));
            }
            None => {}
        }
        Ok(())
    }

    /// Takes a fragment that [`check`](Self::check) lets pass.
    fn take(&mut self, fragment: &StockFragment<'_>, stamp: u32, budget: &mut Budget) -> Result<()> {
        self.assembly.insert(u32::from(fragment.index), &fragment.payload, budget)?;
        self.first = self.first.or(fragment.first);
        self.stamp = stamp;
        Ok(())
    }
}

impl StockReceiver {
    pub(super) fn new(peer: AgentName, notif_bytes_max: u64) -> Self {
        Self {
            peer,
            notif_bytes_max,
            clock: Clock::default(),
            early_writes: Vec::new(),
            pending: HashMap::new(),
            loose: Vec::new(),
            failed: HashMap::new(),
        }
    }

    /// The peer says that a transfer has failed, and how many of its writes come all the same. The C++ plugin delivers its
    /// notification nevertheless; here a notification means that all data is there, so that of a failed transfer is
    /// dropped. It stays until what is under way for it has come, which else would count for the next use of the number.
    pub(super) fn on_failed(&mut self, id: u16, final_writes: u32, budget: &mut Budget) -> Result<()> {
        self.clock.saw(id);
        if id == 0 {
            return Err(malformed(format!(
                "{} says that transfer 0 has failed, a number that other notifications have, too",
                self.peer
            )));
        }
        if let Entry::Occupied(mut entry) = self.pending.entry(id) {
            let partial = entry.get_mut();
            if !self.clock.is_past(partial.stamp) {
                (partial.failed, partial.stamp) = (Some(final_writes), self.clock.now);
                let over = partial.is_ready(partial.writes).then(|| entry.remove());
                return over.map_or(Ok(()), |partial| self.deliver(partial, budget).map(drop));
            }
            entry.remove().assembly.finish(budget);
        }
        let clock = self.clock;
        self.failed.retain(|_, failure| !clock.is_past(failure.stamp));
        if self.failed.len() >= FAILED_MAX {
            return Err(malformed(format!(
                "{FAILED_MAX} failed transfers of {} wait for their notifications",
                self.peer
            )));
        }
        self.failed.insert(id, Failure { final_writes, stamp: self.clock.now });
        Ok(())
    }

    pub(super) fn on_writes(&mut self, id: u16, count: u32, budget: &mut Budget) -> Result<Option<Vec<u8>>> {
        self.clock.saw(id);
        if id == 0 {
            self.add_early_writes(0, count);
            let writes = self.writes_so_far(0);
            let ready = self.loose.iter().position(|partial| partial.is_ready(writes));
            return ready.map(|at| self.deliver_loose(at, budget)).transpose();
        }
        if let Entry::Occupied(mut entry) = self.pending.entry(id) {
            let partial = entry.get_mut();
            if !self.clock.is_past(partial.stamp) {
                partial.stamp = self.clock.now;
                partial.writes = partial.writes.saturating_add(count);
                let ready = partial.is_ready(partial.writes).then(|| entry.remove());
                return ready.map(|partial| self.deliver(partial, budget)).transpose();
            }
            entry.remove().assembly.finish(budget);
        }
        self.add_early_writes(id, count);
        Ok(None)
    }

    pub(super) fn on_fragment(
        &mut self,
        fragment: &StockFragment<'_>,
        budget: &mut Budget,
    ) -> Result<Option<Vec<u8>>> {
        let id = fragment.transfer_id;
        self.clock.saw(id);
        if !budget.has_room(fragment.payload.len()) {
            self.drop_past(budget);
        }
        if id == 0 {
            return self.on_loose_fragment(fragment, budget);
        }
        let writes = self.writes_so_far(id);
        if let Entry::Occupied(mut entry) = self.pending.entry(id) {
            if !self.clock.is_past(entry.get().stamp) {
                let partial = entry.get_mut();
                partial.check(fragment, self.notif_bytes_max)?;
                partial.take(fragment, self.clock.now, budget)?;
                let ready = partial.is_ready(partial.writes).then(|| entry.remove());
                return ready.map(|partial| self.deliver(partial, budget)).transpose();
            }
            entry.remove().assembly.finish(budget);
        }
        let mut partial = Partial::new(fragment.count, writes, self.clock.now);
        partial.check(fragment, self.notif_bytes_max)?;
        partial.take(fragment, self.clock.now, budget)?;
        let failure = self.failed.remove(&id).filter(|failure| !self.clock.is_past(failure.stamp));
        partial.failed = failure.map(|failure| failure.final_writes);
        self.set_early_writes(id, 0);
        if partial.is_ready(partial.writes) {
            return self.deliver(partial, budget).map(Some);
        }
        self.pending.insert(id, partial);
        Ok(None)
    }

    /// Number 0 does not say which notification a fragment belongs to. It goes to the oldest that lacks it, has as
    /// many fragments, and whose announced length it fits; else it begins one.
    fn on_loose_fragment(
        &mut self,
        fragment: &StockFragment<'_>,
        budget: &mut Budget,
    ) -> Result<Option<Vec<u8>>> {
        let limit = self.notif_bytes_max;
        let found = self.loose.iter().position(|partial| partial.check(fragment, limit).is_ok());
        let at = if let Some(at) = found {
            self.loose[at].take(fragment, self.clock.now, budget)?;
            at
        } else {
            if self.loose.len() >= LOOSE_MAX {
                return Err(malformed(format!("{LOOSE_MAX} notifications without a number are unfinished")));
            }
            let mut partial = Partial::new(fragment.count, 0, self.clock.now);
            partial.check(fragment, limit)?;
            partial.take(fragment, self.clock.now, budget)?;
            self.loose.push(partial);
            self.loose.len() - 1
        };
        if self.loose[at].is_ready(self.writes_so_far(0)) {
            return self.deliver_loose(at, budget).map(Some);
        }
        Ok(None)
    }

    fn deliver_loose(&mut self, at: usize, budget: &mut Budget) -> Result<Vec<u8>> {
        let partial = self.loose.remove(at);
        let expected = partial.expected().unwrap_or(0);
        self.set_early_writes(0, self.writes_so_far(0).saturating_sub(expected));
        self.deliver(partial, budget)
    }

    /// The message, without the sender's name, which must be the peer's.
    fn deliver(&self, partial: Partial, budget: &mut Budget) -> Result<Vec<u8>> {
        let name_len = partial.first.map_or(0, |first| first.name_len as usize);
        let mut payload = partial.assembly.finish(budget);
        if let Some(arrived) = partial.failed {
            return Err(malformed(format!(
                "a transfer of {} has failed there after {arrived} writes; its notification is dropped",
                self.peer
            )));
        }
        let message = payload.split_off(name_len);
        if payload != self.peer.as_bytes() {
            return Err(malformed(format!(
                "a notification on the connection of {} names {} as its sender and is dropped (an agent of NIXL before 1.4 \
                 numbers its peers in another way: upgrade it)",
                self.peer,
                payload.escape_ascii()
            )));
        }
        Ok(message)
    }

    fn drop_past(&mut self, budget: &mut Budget) {
        let clock = self.clock;
        for (_, partial) in self.pending.extract_if(|_, partial| clock.is_past(partial.stamp)) {
            partial.assembly.finish(budget);
        }
    }

    fn writes_so_far(&self, id: u16) -> u32 {
        let entry = EarlyWrites::unpack(self.early_writes.get(id as usize).copied().unwrap_or(0));
        if self.clock.is_past(entry.stamp) { 0 } else { entry.count }
    }

    fn add_early_writes(&mut self, id: u16, count: u32) {
        self.set_early_writes(id, self.writes_so_far(id).saturating_add(count));
    }

    fn set_early_writes(&mut self, id: u16, count: u32) {
        if self.early_writes.is_empty() {
            if count == 0 {
                return;
            }
            self.early_writes = vec![0; TURN];
        }
        self.early_writes[id as usize] = EarlyWrites { count, stamp: self.clock.now }.pack();
    }
}
