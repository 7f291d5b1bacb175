//! Posting the shares of work that a rail has: each in turn, as far as the provider, the credits and the window let it.

use std::ops::Range;
use std::sync::Arc;

use super::Core;
use crate::fabric::{BATCH_WRITES_MAX, FabricError, Posted};
use crate::rail::Event;
use crate::rail::probe::Answer;
use crate::rail::share::Fed;

enum Turn {
    /// Nothing is left to post, for now or for good.
    Rests,
    /// The provider or the credits put it off.
    Blocked,
    /// Its destination has not answered yet.
    Waits {
        /// The question is the last turn.
        asked: bool,
    },
    /// Its share of this turn is used up.
    Yielded,
}

enum Claim {
    /// There is something to post.
    Taken,
    /// Every operation of the work is somebody's, or it was given up.
    NothingLeft,
    /// The rail holds as much of shared work as it may.
    WindowFull,
}

impl Core {
    pub(super) fn post_shares(&mut self, events: &mut Vec<Event>) -> usize {
        let mut posted = 0;
        let mut turns = self.turns.len();
        while turns > 0 {
            turns -= 1;
            let Some(key) = self.turns.pop_front() else { break };
            let turn = self.post_share(key, &mut posted, events);
            if self.failure.is_some() {
                break;
            }
            if self.endpoint.open_batch().is_some() {
                self.turns.push_back(key);
                break;
            }
            match turn {
                Turn::Rests => {
                    self.shares[key].queued = false;
                    if self.shares[key].posted == 0 {
                        self.end_share(key, events);
                    }
                }
                Turn::Yielded => self.turns.push_back(key),
                Turn::Waits { asked } => {
                    self.turns.push_back(key);
                    turns += usize::from(asked);
                }
                Turn::Blocked => {
                    self.turns.push_back(key);
                    self.fail_if_stalled(key, events);
                }
            }
        }
        posted
    }

    fn post_share(&mut self, key: usize, posted: &mut usize, events: &mut Vec<Event>) -> Turn {
        let mut left = self.limits.batch_slices;
        while left > 0 {
            let share = &mut self.shares[key];
            if share.leaving.is_some() {
                return Turn::Rests;
            }
            if share.work.is_stopped() {
                self.give_up(key, events);
                return Turn::Rests;
            }
            match self.answer(key, events) {
                Answer::Here => {}
                Answer::Asked => return Turn::Waits { asked: true },
                Answer::Awaited => return Turn::Waits { asked: false },
                Answer::Missing => return Turn::Rests,
            }
            let share = &mut self.shares[key];
            let entry = self.destinations.get(share.destination);
            // A destination may hold as many operations as are left for all others, so that some always are: a peer
            // that stands still cannot take the rail from the rest.
            let held = self.endpoint.in_flight_to(entry.addr).rma;
            let room = self.endpoint.room().saturating_sub(held).div_ceil(2);
            let batch = self.quirks.batches && entry.reached;
            // Batches that are not full cost a doorbell each; what is in flight makes room for full ones.
            let room = if batch && share.posted > 0 { room - room % BATCH_WRITES_MAX } else { room };
            if room == 0 {
                return Turn::Blocked;
            }
            let room = room.min(left);
            if share.claimed.is_empty() {
                match self.claim(key, room) {
                    Claim::Taken => {}
                    Claim::NothingLeft => return Turn::Rests,
                    Claim::WindowFull => return Turn::Yielded,
                }
            }
            let count = room.min(self.shares[key].claimed.len() as u32);
            match self.post_claimed(key, count, batch, posted) {
                Ok(0) => return Turn::Blocked,
                Ok(done) => left -= done,
                Err(error) => {
                    self.refused(key, error, events);
                    return Turn::Rests;
                }
            }
        }
        Turn::Yielded
    }

    /// Takes operations of a share's work, as many as there is room for.
    fn claim(&mut self, key: usize, room: u32) -> Claim {
        let share = &mut self.shares[key];
        let (mut operations, mut bytes) = (room, u64::MAX);
        if share.is_shared() {
            let Some((window_operations, window_bytes)) = self.window.room() else {
                return Claim::WindowFull;
            };
            (operations, bytes) = (operations.min(window_operations), window_bytes);
        }
        let Some((list, claimed)) = share.work.claim(operations, bytes) else { return Claim::NothingLeft };
        share.held.claimed(&claimed);
        share.claimed = claimed;
        if share.fed == Fed::NotYet {
            share.fed = Fed::Enough;
        } else if share.is_shared() && self.window.is_empty() {
            self.window.ran_dry();
            share.fed = Fed::RanDry;
        }
        if share.posted > 0 {
            return Claim::Taken;
        }
        // The number of the share is not in use at the endpoint while it holds nothing.
        self.endpoint.end(key as u32);
        let address = self.destinations.get(share.destination).addr;
        if let Err(e) = self.endpoint.begin(key as u32, list, share.lane, address, None) {
            log::error!("rail {}: {e}", self.id);
        }
        Claim::Taken
    }

    /// Posts the next `count` operations that were claimed; gives how many went through.
    fn post_claimed(
        &mut self,
        key: usize,
        count: u32,
        batch: bool,
        posted: &mut usize,
    ) -> Result<u32, FabricError> {
        let share = &mut self.shares[key];
        let Range { start, end } = share.claimed;
        let outcome =
            self.endpoint.post_slices(key as u32, share.work.op(), start..start + count, end, batch);
        if outcome.count > 0 {
            self.refusals = 0;
            share.claimed.start += outcome.count;
            share.posted += outcome.count;
            share.posted_bytes += outcome.bytes;
            if share.is_shared() {
                self.window.posted(outcome.count, outcome.bytes);
            }
            self.destinations.get(share.destination).last_progress = self.now;
            *posted += outcome.count as usize;
        }
        match outcome.stopped {
            Some(Err(e)) => Err(e),
            Some(Ok(Posted::Again)) => {
                self.counters.again += 1;
                self.news = true;
                Ok(outcome.count)
            }
            _ => Ok(outcome.count),
        }
    }

    /// Settles what was claimed and will not be posted.
    fn give_up(&mut self, key: usize, events: &mut Vec<Event>) {
        let share = &mut self.shares[key];
        let count = share.claimed.len() as u32;
        share.claimed = 0..0;
        share.held.settled += count;
        if share.posted == 0 {
            self.endpoint.end(key as u32);
        }
        if share.work.settle(count) {
            events.push(Event::WorkOver { work: Arc::clone(&share.work) });
        }
    }

    /// Rings for writes that the NIC was not told of, by posting the next one of their share. `false` while that is put
    /// off: until then nothing else may touch the endpoint.
    pub(super) fn close_batch(&mut self, events: &mut Vec<Event>) -> bool {
        let Some(key) = self.endpoint.open_batch() else {
            self.open_since = None;
            return true;
        };
        let since = *self.open_since.get_or_insert(self.now);
        while !self.shares[key as usize].claimed.is_empty() {
            match self.post_claimed(key as usize, 1, false, &mut 0) {
                Ok(0) if self.now.duration_since(since) < self.limits.stall_timeout => return false,
                Ok(0) => break,
                Ok(_) => return true,
                // It goes back to its work with all that the share holds; the next one may ring.
                Err(error) => {
                    self.refused(key as usize, error, events);
                    let Some(share) = self.shares.get_mut(key as usize).filter(|_| self.failure.is_none())
                    else {
                        return false;
                    };
                    share.claimed.start += 1;
                }
            }
        }
        self.break_down(&"writes that were batched cannot be handed to the NIC", events);
        false
    }

    fn fail_if_stalled(&mut self, key: usize, events: &mut Vec<Event>) {
        let share = &self.shares[key];
        if share.is_probe() {
            return self.give_up_asking(key);
        }
        let entry = self.destinations.get(share.destination);
        let in_flight = self.endpoint.in_flight_to(entry.addr);
        if let Some(error) = entry.stalled(in_flight, self.now, self.limits.stall_timeout) {
            self.counters.stalled += 1;
            self.news = true;
            share.work.fail(error, events);
        }
    }
}
