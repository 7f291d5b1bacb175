//! Whether a destination answers, asked by reading one byte of the memory that work is to move.
//!
//! The efa fabric shakes hands with each endpoint before it moves data, in software, and what is posted before that waits
//! inside the provider: without a deadline, if the answer is lost; and to be sent after all, if the peer wakes when its
//! transfer has long failed (`efa_rdm_ep_enforce_handshake_for_txe`, 1.22 to 2.6). So a destination is asked first, and
//! no operation of a user is posted to one that has never answered.
//!
//! What the provider writes in several packets, where the NIC cannot write, waits for words of the target's software. If
//! that has ended, nothing tells: the write is over when the target says so (`efa_rdm_pke_handle_eor_recv`). A read is the
//! NIC's, of a process that stands still too: so a destination is asked again when nothing gets done.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::core::Core;
use super::destination::DestinationKey;
use super::share::{Kind, Share};
use super::work::{Invitation, Work};
use super::{Event, Tag};
use crate::error::{Error, Result, Status};
use crate::fabric::efa::NETWORK_HELP;
use crate::fabric::{Device, Domain, RegisteredBuffer, efa, next_key};
use crate::types::Op;

/// How long nothing gets done before a destination is asked again.
const QUIET: Duration = Duration::from_secs(1);
/// How long one may take to answer when somebody was not reached. Who lives does so in far less.
const SUSPICION: Duration = Duration::from_secs(1);
/// So much of the time that a destination has to answer the first of its lanes has for itself; then others are invited, too.
const PATIENCE_PARTS: u32 = 10;

/// What a share knows of its destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It has answered.
    Here,
    /// It was asked just now.
    Asked,
    /// It was asked before.
    Awaited,
    /// It had its time, or nothing is left to do: the share ends.
    Missing,
}

/// Where the answers of probes are put: nobody reads them.
pub(super) struct Probes {
    answers: Option<RegisteredBuffer>,
}

/// A question to a destination.
#[derive(Debug)]
pub(super) struct Question {
    since: Instant,
    /// From when on the destination is taken to be gone.
    until: Instant,
}

impl Question {
    /// The destination may be one that was not reached just now.
    pub fn suspect(&mut self, now: Instant) {
        self.until = self.until.min(now + SUSPICION);
    }
}

impl Probes {
    pub fn new(domain: &Arc<Domain>, device: &Device) -> Result<Self> {
        let answers = efa::shakes_hands(device).then(|| RegisteredBuffer::new(domain, 1, next_key()));
        Ok(Self { answers: answers.transpose()? })
    }

    pub fn registered(&self) -> Option<&RegisteredBuffer> {
        self.answers.as_ref()
    }
}

impl Core {
    /// Whether operations of a share may be posted. If not, its destination is asked, and the share waits, or leaves its work to
    /// others when the time is over.
    pub(super) fn answer(&mut self, key: usize, events: &mut Vec<Event>) -> Answer {
        let share = &mut self.shares[key];
        let destination = share.destination;
        if share.is_probe() || self.probes.answers.is_none() || self.destinations.get(destination).answered {
            if share.waits {
                share.waits = false;
                share.work.trust(share.lane);
            }
            return Answer::Here;
        }
        if !share.work.wants_rails() {
            // Others have done it.
            return Answer::Missing;
        }
        let Some((waited, is_over)) = self.ask(key) else { return Answer::Asked };
        if is_over {
            self.unanswered(destination, &silent(waited), events);
            return Answer::Missing;
        }
        let share = &mut self.shares[key];
        if waited >= self.limits.stall_timeout / PATIENCE_PARTS && !share.waits {
            share.waits = true;
            share.work.doubt(share.lane, silent(waited));
            events.push(Event::WorkWaits { work: Arc::clone(&share.work) });
        }
        Answer::Awaited
    }

    /// Asks the destination of a share, unless a question is on its way. For how long that is, and whether it was long enough.
    fn ask(&mut self, key: usize) -> Option<(Duration, bool)> {
        let share = &self.shares[key];
        let (destination, lane) = (share.destination, share.lane);
        let entry = self.destinations.get(destination);
        if let Some(question) = &entry.question {
            return Some((self.now.duration_since(question.since), self.now >= question.until));
        }
        let name = entry.name.clone();
        let list = match share.work.list()?.probe(lane, self.probes.answers.as_ref()?) {
            Ok(list) => Arc::new(list),
            Err(e) => {
                // The operations themselves will tell.
                log::error!("rail {}: {e}", self.id);
                self.destinations.get(destination).answered = true;
                return Some((Duration::ZERO, false));
            }
        };
        let work = Work::new(Op::Read, list, Arc::new(()) as Tag);
        let invitation = Invitation { work, lane: 0, destination: name, shared: false };
        self.turns.push_back(
            self.shares.insert(Share { kind: Kind::Probe, ..Share::new(invitation, destination) }),
        );
        let entry = self.destinations.get(destination);
        entry.users += 1;
        entry.question = Some(Question { since: self.now, until: self.now + self.limits.stall_timeout });
        None
    }

    /// A question could not be posted yet. Nobody waits longer than for an answer.
    pub(super) fn give_up_asking(&mut self, key: usize) {
        let now = self.now;
        let share = &mut self.shares[key];
        let question = self.destinations.get(share.destination).question.as_ref();
        if let Some(question) = question.filter(|question| now >= question.until) {
            share.leaving = Some(Box::new(silent(now.duration_since(question.since))));
        }
    }

    /// A probe is over. Any answer will do, also one that refuses; why, the operations themselves will tell.
    pub(super) fn probe_over(&mut self, key: usize, error: Option<&Error>, events: &mut Vec<Event>) {
        let destination = self.shares[key].destination;
        let entry = self.destinations.get(destination);
        entry.question = None;
        let lost = error.filter(|error| error.status() == Status::RemoteDisconnect);
        if lost.is_none() && self.failure.is_none() {
            entry.answered = true;
            entry.reached |= error.is_none();
            entry.last_progress = self.now;
        }
        if self.shares[key].queued {
            self.turns.retain(|&turn| turn != key);
        }
        self.remove_share(key);
        if let Some(error) = lost.filter(|_| self.failure.is_none()) {
            self.unanswered(destination, error, events);
        }
    }

    /// A destination does not answer: what was to begin there is left to others, and what waits for its software fails.
    fn unanswered(&mut self, destination: DestinationKey, error: &Error, events: &mut Vec<Event>) {
        self.counters.stalled += 1;
        self.news = true;
        let has_answered = self.destinations.get(destination).answered;
        let to_it =
            |share: &Share| share.destination == destination && !share.is_probe() && share.leaving.is_none();
        let concerned: Vec<usize> =
            self.shares.iter().filter(|(_, share)| to_it(share)).map(|(key, _)| key).collect();
        for key in concerned {
            let share = &mut self.shares[key];
            if !has_answered {
                share.given_up = Some(self.now);
                share.leaving = Some(Box::new(error.clone()));
            } else if share.posted > 0 && !self.endpoint.ends_with_failure(share.work.op()) {
                // Nobody knows whether it is ever over.
                share.work.fail(error.clone(), events);
                self.leave_window(key);
            }
        }
    }

    /// Asks destinations that have done nothing for a while of what their software is to do.
    pub(super) fn ask_again(&mut self, events: &mut Vec<Event>) {
        if self.probes.answers.is_none() || self.endpoint.ends_with_failure(Op::Write) {
            return;
        }
        // Also what is left of work that failed, while that has part of the window.
        let matters = |share: &Share| share.is_shared() || !share.work.is_stopped();
        let waiting = |share: &Share| share.posted > 0 && !share.is_probe() && matters(share);
        let waiting: Vec<usize> =
            self.shares.iter().filter(|(_, share)| waiting(share)).map(|(key, _)| key).collect();
        for key in waiting {
            let share = &self.shares[key];
            let (destination, op) = (share.destination, share.work.op());
            let quiet = self.now.duration_since(self.destinations.get(destination).last_progress) >= QUIET;
            let asked = if quiet && op == Op::Write { self.ask(key) } else { None };
            if let Some((waited, true)) = asked {
                self.unanswered(destination, &silent(waited), events);
            }
        }
    }

    /// What is in flight of a share no longer counts as shared work: it may stay so for ever.
    fn leave_window(&mut self, key: usize) {
        let share = &mut self.shares[key];
        if share.is_shared() {
            share.kind = Kind::Alone;
            self.window.settled(share.posted, share.posted_bytes);
        }
    }
}

fn silent(waited: Duration) -> Error {
    Error::disconnected(format!(
        "it has not answered for {} ms (connect_timeout_ms is the limit, or 1 s when libfabric says that somebody was not \
         reached): is it alive, and does its progress thread run or its application call NIXL? {NETWORK_HELP}",
        waited.as_millis()
    ))
}
