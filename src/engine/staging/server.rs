//! The side whose GPU memory a peer reads and writes: lends slots and copies on request.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::slots::{Making, SLOT_BYTES, Slots};
use super::{COPIES_PER_TURN, Directions, Staging};
use crate::cuda::{InFlight, Span};
use crate::engine::mail::Wish;
use crate::engine::shared::Shared;
use crate::error::{Error, Result};
use crate::memory::{Registration, begin_uses};
use crate::peer::Peer;
use crate::wire::{Body, Staging as Message};

/// Bytes lent to one peer.
const PEER_BYTES_MAX: u64 = 16 << 20;
/// Bytes of page-locked memory lent in all. A peer gets at most half of what is left, so that there is some for another.
const LENT_BYTES_MAX: u64 = 1 << 30;
/// Bytes of a slot where a copy takes one slot: the most that such a peer moves at a time.
const LONE_SLOT_BYTES: u32 = 1 << 20;
/// Copies that wait: more than peers that keep to their slots can ask for.
const WISHES_MAX: usize = 65_536;

struct Lent {
    peer: Arc<Peer>,
    /// The peer's connection, with which it ends.
    session: u64,
    bytes: u64,
    slots: Lending,
}

enum Lending {
    Making(Making),
    Ready(Slots),
}

struct Job {
    peer: Arc<Peer>,
    ticket: u64,
    /// Bytes of what is lent to the peer.
    lent: Range<u64>,
    into_memory: bool,
    region: Arc<Registration>,
    copy: InFlight,
}

/// What is lent, and the copies under way.
#[derive(Default)]
pub struct Server {
    lent: Vec<Lent>,
    wishes: VecDeque<(Arc<Peer>, Wish)>,
    jobs: Vec<Job>,
}

impl Server {
    /// Whether something is to be done that no message tells of.
    pub fn is_busy(&self) -> bool {
        self.is_copying() || self.lent.iter().any(|lent| matches!(lent.slots, Lending::Making(_)))
    }

    /// Whether copies wait or are under way.
    pub fn is_copying(&self) -> bool {
        !self.jobs.is_empty() || !self.wishes.is_empty()
    }

    /// A peer asks for slots. One that asks again gets the same.
    pub fn lend(&mut self, staging: &Staging, shared: &Shared, peer: &Arc<Peer>) {
        log::debug!("agent {}: {} asks for staging memory", shared.local.name, peer.name());
        // One that has begun anew gets other memory: what it has left in flight may still arrive in the old.
        self.lent.retain(|lent| lent.peer.check().is_ok() && lent.session == lent.peer.session());
        match self.lent.iter().find(|lent| Arc::ptr_eq(&lent.peer, peer)).map(|lent| &lent.slots) {
            Some(Lending::Making(_)) => {}
            Some(Lending::Ready(slots)) => answer(peer, offer(Some(slots), &slots.metadata().encode())),
            None => match self.make(staging, shared, peer) {
                Ok(lent) => self.lent.push(lent),
                Err(e) => refuse(shared, peer, &e),
            },
        }
    }

    fn make(&self, staging: &Staging, shared: &Shared, peer: &Arc<Peer>) -> Result<Lent> {
        let context = staging.context.get();
        let context = context.ok_or_else(|| Error::not_found("no VRAM is registered"))?;
        let slot_bytes = if peer.stages_ranges() { SLOT_BYTES } else { LONE_SLOT_BYTES };
        let left = LENT_BYTES_MAX.saturating_sub(self.lent.iter().map(|lent| lent.bytes).sum());
        let count = (left / 2).min(PEER_BYTES_MAX) / u64::from(slot_bytes);
        if count == 0 {
            return Err(Error::not_supported(format!(
                "{} peers hold {LENT_BYTES_MAX} bytes already; remove some",
                self.lent.len()
            )));
        }
        let making = Making::start(context, &shared.local.rails, slot_bytes, count as u16)?;
        let bytes = count * u64::from(slot_bytes);
        let (peer, session) = (Arc::clone(peer), peer.session());
        Ok(Lent { peer, session, bytes, slots: Lending::Making(making) })
    }

    /// Offers the slots that are made by now. Returns how many peers got an answer.
    fn offer_made(&mut self, shared: &Shared) -> usize {
        let mut answered = 0;
        self.lent.retain_mut(|lent| {
            let Lending::Making(making) = &mut lent.slots else { return true };
            let Some(made) = making.finished() else { return true };
            answered += 1;
            match made {
                Ok(slots) => {
                    answer(&lent.peer, offer(Some(&slots), &slots.metadata().encode()));
                    lent.slots = Lending::Ready(slots);
                    true
                }
                Err(e) => {
                    refuse(shared, &lent.peer, &e);
                    false
                }
            }
        });
        answered
    }

    /// A peer wants a copy between its slots and GPU memory here.
    pub fn wish(&mut self, peer: Arc<Peer>, wish: Wish) {
        if self.wishes.len() < WISHES_MAX {
            self.wishes.push_back((peer, wish));
        } else {
            answer(&peer, Message::Copied { ticket: wish.ticket, error: b"too many copies wait" });
        }
    }

    /// Begins copies, and answers for what is over. Returns how much was done.
    pub fn advance(&mut self, staging: &Staging, streams: &Directions, shared: &Shared) -> usize {
        let mut handled = self.offer_made(shared) + self.settle();
        let mut copies = 0;
        while copies < COPIES_PER_TURN
            && let Some((peer, wish)) = self.wishes.pop_front()
        {
            handled += 1;
            copies += wish.ranges.len();
            match self.start(staging, streams, &peer, &wish) {
                Ok(job) => self.jobs.push(job),
                Err(e) => {
                    log::warn!(
                        "agent {}: a copy of staged VRAM for {} is refused: {e}",
                        shared.local.name,
                        peer.name()
                    );
                    answer(&peer, Message::Copied { ticket: wish.ticket, error: e.to_string().as_bytes() });
                }
            }
        }
        handled
    }

    /// Begins a copy; the region stays in use until the copy is over.
    fn start(&self, staging: &Staging, streams: &Directions, peer: &Arc<Peer>, wish: &Wish) -> Result<Job> {
        let of_peer = self.lent.iter().find(|lent| Arc::ptr_eq(&lent.peer, peer));
        let Some(Lending::Ready(slots)) = of_peer.map(|lent| &lent.slots) else {
            return Err(Error::not_found("the peer holds no slots"));
        };
        let bytes: u64 = wish.ranges.iter().map(|(_, len)| u64::from(*len)).sum();
        let first = u64::from(wish.slot) * u64::from(slots.slot_bytes());
        let lent = first..first + bytes;
        let room = if peer.stages_ranges() { slots.bytes() } else { first + u64::from(slots.slot_bytes()) };
        if lent.end > room.min(slots.bytes()) {
            return Err(Error::invalid(format!(
                "{bytes} bytes from slot {} on of {} of {} bytes",
                wish.slot,
                slots.count(),
                slots.slot_bytes()
            )));
        }
        let meets = |job: &Job| job.lent.start < lent.end && lent.start < job.lent.end;
        if self.jobs.iter().any(|job| Arc::ptr_eq(&job.peer, peer) && meets(job)) {
            return Err(Error::invalid(format!("slot {} is in use", wish.slot)));
        }
        let region = staging.region_of(&wish.ranges)?;
        let context = region.copy_context()?.ok_or_else(|| Error::invalid("the region is host memory"))?;
        let mut at = first;
        let mut pairs = Vec::with_capacity(wish.ranges.len());
        for &(addr, len) in &wish.ranges {
            let len = u64::from(len);
            pairs.push((slots.span(at, len)?, Span::registered(region.range(), addr, len)?));
            at += len;
        }
        begin_uses(std::iter::once(&region))
            .map_err(|gone| Error::not_found(format!("{gone} was deregistered")))?;
        let copy = streams.copy(&context, wish.into_memory, pairs).inspect_err(|_| region.end_use())?;
        let (peer, ticket, into_memory) = (Arc::clone(peer), wish.ticket, wish.into_memory);
        Ok(Job { peer, ticket, lent, into_memory, region, copy })
    }

    /// Answers for the copies that are over. Returns how many.
    fn settle(&mut self) -> usize {
        let before = self.jobs.len();
        // Copies of one direction end in the order in which they began, but on different GPUs; looking at each costs.
        let mut waits = [false; 2];
        self.jobs.retain_mut(|job| {
            let waits = &mut waits[usize::from(job.into_memory)];
            if *waits {
                return true;
            }
            let outcome = match job.copy.is_done() {
                Ok(false) => {
                    *waits = true;
                    return true;
                }
                Ok(true) => String::new(),
                Err(e) => e.to_string(),
            };
            job.region.end_use();
            answer(&job.peer, Message::Copied { ticket: job.ticket, error: outcome.as_bytes() });
            false
        });
        before - self.jobs.len()
    }
}

fn offer<'a>(slots: Option<&Slots>, region: &'a [u8]) -> Message<'a> {
    let (slot_bytes, slots) = slots.map_or((SLOT_BYTES, 0), |slots| (slots.slot_bytes(), slots.count()));
    Message::Lend { slot_bytes, slots, region }
}

fn refuse(shared: &Shared, peer: &Arc<Peer>, why: &Error) {
    log::warn!("agent {}: no staging memory for {}: {why}", shared.local.name, peer.name());
    answer(peer, offer(None, &[]));
}

fn answer(peer: &Arc<Peer>, message: Message<'_>) {
    if let Err(e) = peer.say(Body::Staging(message)) {
        log::debug!("no answer about staging to {}: {e}", peer.name());
    }
}
