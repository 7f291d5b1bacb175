//! A rail that fails, and shares that leave their work to other rails.
//!
//! An operation that has completed is over, in error too: the NIC sends nothing more of it. So what a share has claimed is
//! given back when nothing of the share is in flight any more. On a device that has failed, that is when the NIC has given
//! up everything, or when the endpoint is closed; and then as long as a packet may live, so that nothing of the earlier
//! attempt lands when the transfer is done. A share that does not reach its peer leaves in the same way: whether the peer is
//! gone, or only this way to it, the other lanes tell.

use std::fmt;
use std::time::{Duration, Instant};

use super::Event;
use super::core::Core;
use crate::error::{Error, Status};
use crate::fabric::FabricError;

/// What has left a NIC before it failed may arrive for so long: a thousand times what a packet takes across a region.
const PACKET_LIFETIME: Duration = Duration::from_millis(100);
/// So many posts in a row that are refused without a reason that could be the peer's are the device's failure.
const REFUSALS_MAX: u32 = 64;

/// A rail out of use.
pub(super) struct Failure {
    why: Error,
    /// When the NIC last gave something up: until then it may have sent of that.
    since: Instant,
    /// The endpoint is closed, or can neither be closed nor read: there is nothing to poll for.
    silent: bool,
}

impl Core {
    /// Why the rail is out of use, if it is.
    pub fn failure(&self) -> Option<&Error> {
        self.failure.as_ref().map(|failure| &failure.why)
    }

    /// The device has failed: nothing more is posted.
    pub(super) fn fail(&mut self, why: &dyn fmt::Display, events: &mut Vec<Event>) {
        if self.failure.is_some() {
            return;
        }
        let device = self.endpoint.domain().device().domain_name().to_owned();
        log::warn!(
            "rail {} on {device} has failed and is out of use: {why}. Transfers go on over the other rails. Look at the device \
             (dmesg, its hw_counters), and restart the process to use it again",
            self.id
        );
        let why = Error::new(Status::Backend, format!("rail {} on {device} has failed: {why}", self.id));
        self.failure = Some(Failure { why: why.clone(), since: self.now, silent: false });
        self.turns.clear();
        self.resting.clear();
        for (_, share) in &mut self.shares {
            share.leaving.get_or_insert_with(|| Box::new(why.clone()));
        }
        self.messages.hand_back(&why, &mut self.destinations, events);
        events.push(Event::Failed);
        if self.endpoint.open_batch().is_some() {
            // Provider versions hold a lock until a batch is closed: neither poll nor close.
            self.lose(events);
        }
    }

    /// The NIC has given up an operation.
    pub(super) fn given_up(&mut self) {
        if let Some(failure) = &mut self.failure {
            failure.since = self.now;
        }
    }

    /// One turn of a rail that has failed: what is in flight ends, and what was not done goes back to its work.
    pub(super) fn wind_down(&mut self, room: bool, events: &mut Vec<Event>) -> usize {
        let is_silent = self.failure.as_ref().is_none_or(|failure| failure.silent);
        let handled = if is_silent { 0 } else { self.poll(room, events) };
        // What was just polled may have changed it.
        let Some(Failure { since, silent, .. }) = self.failure else { return handled };
        let waited = self.now.duration_since(since);
        if waited < PACKET_LIFETIME || self.shares.is_empty() {
            return handled;
        }
        let over: Vec<usize> =
            self.shares.iter().filter(|(_, share)| share.posted == 0).map(|(key, _)| key).collect();
        for &key in &over {
            self.leave(key, events);
        }
        if waited > self.limits.stall_timeout && !self.shares.is_empty() && !silent {
            self.lose(events);
        }
        handled + over.len()
    }

    /// Nothing is heard of what is in flight any more. It ends with the endpoint; where that cannot be closed, its work
    /// fails, because nobody knows what is still to land.
    pub(super) fn lose(&mut self, events: &mut Vec<Event>) {
        let closed = match self.endpoint.open_batch() {
            None => self.endpoint.shut(),
            Some(_) => Err(Error::backend("writes that were batched were not handed to it")),
        };
        let Some(failure) = &mut self.failure else { return };
        failure.silent = true;
        match closed {
            Ok(()) => {
                failure.since = self.now;
                for (_, share) in &mut self.shares {
                    share.posted = 0;
                }
            }
            Err(e) => {
                let why = failure.why.clone();
                log::debug!("rail {}: what is in flight stays so: {e}", self.id);
                self.end_shares(&why, events);
            }
        }
    }

    /// The queue itself failed: nothing more is heard of what is in flight.
    pub(super) fn break_down(&mut self, why: &dyn fmt::Display, events: &mut Vec<Event>) {
        self.fail(why, events);
        if self.failure.as_ref().is_some_and(|failure| !failure.silent) {
            self.lose(events);
        }
    }

    /// A post of a share was refused, for a reason that need not be the device's.
    pub(super) fn refused(&mut self, key: usize, why: FabricError, events: &mut Vec<Event>) {
        self.refusals += u32::from(why.may_be_of_device());
        if why.is_of_device() {
            self.fail(&why, events);
        } else if self.refusals >= REFUSALS_MAX && self.completions_confirm {
            self.fail(&format_args!("{REFUSALS_MAX} posts in a row were refused: {why}"), events);
        } else {
            let anew = self.can_begin_anew(key);
            let share = &mut self.shares[key];
            let why = share.leaving.get_or_insert_with(|| Box::new(why.into()));
            if !anew {
                share.work.fail((**why).clone(), events);
            }
        }
    }

    /// An operation of a share was given up because its peer does not answer. Others may do what it has claimed, and tell by
    /// that whether the peer is gone. False where that cannot be.
    pub(super) fn may_be_lost(&mut self, key: usize, error: &Error) -> bool {
        let anew = self.can_begin_anew(key) && self.endpoint.ends_with_failure(self.shares[key].work.op());
        let share = &mut self.shares[key];
        if !anew || error.status() != Status::RemoteDisconnect || share.work.is_stopped() {
            return false;
        }
        share.given_up = Some(self.now);
        share.leaving.get_or_insert_with(|| Box::new(error.clone()));
        true
    }

    /// Whether something that a share's NIC has sent of what it gave up may arrive yet, and matter.
    fn may_land(&self, key: usize) -> bool {
        let share = &self.shares[key];
        let lives = |at| self.now.duration_since(at) < PACKET_LIFETIME;
        share.given_up.is_some_and(lives) && !share.work.is_stopped()
    }

    /// A share that holds nothing in flight leaves its work as soon as it may.
    pub(super) fn leave_in_time(&mut self, key: usize, events: &mut Vec<Event>) {
        if self.may_land(key) {
            self.resting.push(key);
        } else {
            self.leave(key, events);
        }
    }

    /// Looks after the shares that are to leave. Returns how many did.
    pub(super) fn look_after_resting(&mut self, events: &mut Vec<Event>) -> usize {
        let resting = std::mem::take(&mut self.resting);
        let count = resting.len();
        for key in resting {
            self.leave_in_time(key, events);
        }
        count - self.resting.len()
    }

    /// Whether others may do what a share has claimed. Not where what completed need not have arrived and may arrive late,
    /// if anything was posted.
    fn can_begin_anew(&self, key: usize) -> bool {
        let share = &self.shares[key];
        self.completions_confirm || share.held.len() == share.claimed.len() as u32
    }

    /// A share that holds nothing in flight leaves its work.
    pub(super) fn leave(&mut self, key: usize, events: &mut Vec<Event>) {
        let anew = self.can_begin_anew(key);
        let share = &mut self.shares[key];
        let (work, lane) = (share.work.clone(), share.lane);
        let Some(error) = share.leaving.take() else { return };
        if share.is_probe() {
            return self.probe_over(key, Some(&error), events);
        }
        let lost = share.given_up.map(|_| (*error).clone());
        let mut held = std::mem::take(&mut share.held);
        if held.settled == held.len() {
            held.clear();
        }
        self.remove_share(key);
        if !anew {
            work.fail(*error, events);
        } else if work.give_back(lane, held.ranges(), held.settled, lost) {
            events.push(Event::WorkLeft { work, error: *error });
            return;
        }
        if work.settle(held.len() - held.settled) {
            events.push(Event::WorkOver { work });
        }
    }

    /// Ends every share and message with this error.
    pub fn end_all(&mut self, error: &Error, events: &mut Vec<Event>) {
        self.turns.clear();
        self.end_shares(error, events);
        self.messages.fail_all(error, events);
    }

    fn end_shares(&mut self, error: &Error, events: &mut Vec<Event>) {
        self.resting.clear();
        for (key, share) in std::mem::take(&mut self.shares) {
            self.endpoint.end(key as u32);
            if share.is_probe() {
                continue;
            }
            share.work.fail(error.clone(), events);
            if share.work.settle(share.held.len() - share.held.settled) {
                events.push(Event::WorkOver { work: share.work });
            }
        }
    }
}
