//! The side whose GPU memory a peer reads and writes: lends slots and copies on request.

use std::sync::Arc;

use super::slots::Slots;
use super::{Directions, Staging};
use crate::cuda::{InFlight, Span};
use crate::engine::mail::Wish;
use crate::engine::shared::Shared;
use crate::error::{Error, Result};
use crate::memory::{Registration, begin_uses};
use crate::peer::Peer;
use crate::types::Desc;
use crate::wire::{Body, Staging as Message};

/// Slots lent to one peer.
const SLOTS_PER_PEER: u16 = 16;
/// Peers that hold slots at a time: with 16 slots of 1 MiB each, 1 GiB of page-locked memory.
const LENT_MAX: usize = 64;

struct Lent {
    peer: Arc<Peer>,
    slots: Slots,
}

struct Job {
    peer: Arc<Peer>,
    ticket: u64,
    slot: u16,
    region: Arc<Registration>,
    copy: InFlight,
}

/// What is lent, and the copies under way.
#[derive(Default)]
pub struct Server {
    lent: Vec<Lent>,
    jobs: Vec<Job>,
}

impl Server {
    /// Whether copies are under way.
    pub fn is_busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// A peer asks for slots. One that asks again, after an error, gets the same.
    pub fn lend(&mut self, staging: &Staging, shared: &Shared, peer: &Arc<Peer>) {
        self.lent.retain(|lent| lent.peer.check().is_ok());
        if !self.lent.iter().any(|lent| Arc::ptr_eq(&lent.peer, peer)) {
            match self.make(staging, shared) {
                Ok(slots) => self.lent.push(Lent { peer: Arc::clone(peer), slots }),
                Err(e) => log::warn!("no staging memory for {}: {e}", peer.name()),
            }
        }
        let slots = self.slots_of(peer);
        let region = slots.map(|slots| slots.metadata().encode()).unwrap_or_default();
        let slots = slots.map_or(0, Slots::count);
        answer(peer, Message::Lend { slot_bytes: super::slots::SLOT_BYTES, slots, region: &region });
    }

    fn make(&self, staging: &Staging, shared: &Shared) -> Result<Slots> {
        if self.lent.len() == LENT_MAX {
            return Err(Error::not_supported(format!("{LENT_MAX} peers hold some already")));
        }
        let context = staging.context.get();
        let context = context.ok_or_else(|| Error::not_found("no VRAM is registered"))?;
        Slots::new(context, &shared.local.rails, SLOTS_PER_PEER)
    }

    fn slots_of(&self, peer: &Arc<Peer>) -> Option<&Slots> {
        self.lent.iter().find(|lent| Arc::ptr_eq(&lent.peer, peer)).map(|lent| &lent.slots)
    }

    /// A peer wants a copy between its slot and GPU memory here.
    pub fn copy(&mut self, staging: &Staging, streams: &Directions, peer: Arc<Peer>, wish: Wish) {
        match self.start(staging, streams, &peer, wish) {
            Ok((region, copy)) => {
                self.jobs.push(Job { peer, ticket: wish.ticket, slot: wish.slot, region, copy });
            }
            Err(e) => {
                log::warn!("a staging copy for {} is refused: {e}", peer.name());
                answer(&peer, Message::Copied { ticket: wish.ticket, error: e.to_string().as_bytes() });
            }
        }
    }

    /// Begins a copy; the region stays in use until the copy is over.
    fn start(
        &self,
        staging: &Staging,
        streams: &Directions,
        peer: &Arc<Peer>,
        wish: Wish,
    ) -> Result<(Arc<Registration>, InFlight)> {
        let slots = self.slots_of(peer).ok_or_else(|| Error::not_found("the peer holds no slots"))?;
        if self.jobs.iter().any(|job| job.slot == wish.slot && Arc::ptr_eq(&job.peer, peer)) {
            return Err(Error::invalid(format!("slot {} is in use", wish.slot)));
        }
        let desc = Desc { addr: wish.addr, len: wish.len.into(), dev_id: 0 };
        let region = staging.region_of(&desc)?;
        let context = region.copy_context()?.ok_or_else(|| Error::invalid("the region is host memory"))?;
        let slot = slots.span(wish.slot, desc.len)?;
        let memory = Span::registered(region.range(), desc.addr, desc.len)?;
        begin_uses(std::iter::once(&region))
            .map_err(|gone| Error::not_found(format!("{gone} was deregistered")))?;
        let copy =
            streams.copy(&context, wish.into_memory, slot, memory).inspect_err(|_| region.end_use())?;
        Ok((region, copy))
    }

    /// Answers for the copies that are over. Returns how many.
    pub fn settle(&mut self) -> usize {
        let before = self.jobs.len();
        self.jobs.retain_mut(|job| {
            let outcome = match job.copy.is_done() {
                Ok(false) => return true,
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

fn answer(peer: &Arc<Peer>, message: Message<'_>) {
    if let Err(e) = peer.say(Body::Staging(message)) {
        log::debug!("no answer about staging to {}: {e}", peer.name());
    }
}
